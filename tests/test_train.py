"""A stage: what is trained, the run folder, going on after an interrupt or a kill, and clear refusals."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

from ironlogic.burden import Burden
from ironlogic.data.chats import ChatError
from ironlogic.data.problems import make_tasks, task_chat
from ironlogic.models import ModelError, load_model, resolve, with_adapters
from ironlogic.presets import LoraSettings, TrainSettings
from ironlogic.training.runs import RunError, newest_whole_checkpoint, open_run, run_folder
from ironlogic.training.sft import _prepare, train_sft

import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SETTINGS = TrainSettings(
    learning_rate=5e-3,
    batch_size=4,
    accumulation=1,
    max_length=128,
    log_steps=1,
    save_steps=3,
    lora=LoraSettings(rank=4, alpha=8),
)
CHATS = [task_chat(task) for task in make_tasks(32, seed=1)]


def nano():
    return load_model("nano", max_length=128)


def as_dataset(chats):
    import datasets

    return datasets.Dataset.from_list([{"messages": messages} for messages in chats])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train_sft(nano(), CHATS, SETTINGS, run=tmp_path_factory.mktemp("runs") / "a", burden=Burden())


def test_loss_falls_and_every_decision_is_written_down(finished):
    losses = [line["loss"] for line in finished.metrics]
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3])
    record = json.loads((finished.folder / "run.json").read_text())
    assert record["finished"]
    assert record["stage"] == "ft"
    assert record["burden"]["ratio"] == 0.7
    assert record["settings"]["lora"]["rank"] == 4
    assert record["versions"]["trl"] == "1.14.2"
    assert record["four_bit_share"] > 0.4
    assert not (finished.folder / "checkpoints").exists()


def test_adapter_is_plain_peft(finished):
    tensors = load_file(finished.adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * 7
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(finished.adapter)
    assert plain.peft_config["default"].r == 4


def test_adapter_finds_its_base_where_the_repository_lies_now(finished, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished.adapter, moved)
    settings = json.loads((moved / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/elsewhere/data/nano"
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    assert load_model(moved).base.endswith("data/nano")


def test_reloaded_model_is_the_trained_one(finished):
    ids = torch.randint(10, 900, (1, 20), generator=torch.Generator().manual_seed(0))
    again = open_run(finished.folder).model()
    with torch.no_grad():
        torch.testing.assert_close(
            again.model(input_ids=ids).logits, finished.loaded.model.eval()(input_ids=ids).logits
        )


def test_same_run_is_not_trained_twice(finished):
    before = (finished.folder / "run.json").read_bytes()
    again = train_sft(nano(), CHATS, SETTINGS, run=finished.folder, burden=Burden())
    assert again.loaded is None
    assert again.record == finished.record
    assert (finished.folder / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"burden": None}, "stage, burden"),
        ({"burden": Burden(ratio=0.3)}, "burden"),
        ({"settings": replace(SETTINGS, seed=1)}, "settings"),
        ({"chats": CHATS[1:]}, "rows, data_sha256"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(finished, change, named):
    call = {"chats": CHATS, "settings": SETTINGS, "burden": Burden()} | change
    with pytest.raises(RunError, match=f"differs in {named}"):
        train_sft(nano(), call["chats"], call["settings"], run=finished.folder, burden=call["burden"])


def test_end_of_turn_is_trained_and_the_prompt_is_not():
    loaded = nano()
    rows, _ = _prepare(loaded, as_dataset(CHATS), SETTINGS, None)
    for row in rows:
        trained = [token for token in row["labels"] if token >= 0]
        text = loaded.tokenizer.decode(trained)
        assert text.endswith("<|im_end|>")
        assert text.count("<|im_end|>") == 1
        assert "<|im_start|>" not in text
        assert "Answer:" in text


def test_loss_on_all_tokens_is_the_seeds_way():
    rows, _ = _prepare(nano(), as_dataset(CHATS), replace(SETTINGS, loss="all"), None)
    assert all(row["labels"] == row["input_ids"] for row in rows)


def test_burden_is_drawn_anew_every_epoch_unless_told_not_to():
    loaded, settings = nano(), replace(SETTINGS, epochs=3, batch_size=1)

    def prompts(burden):
        rows, _ = _prepare(loaded, as_dataset(CHATS), settings, burden)
        third = len(rows) // 3
        return [{tuple(r["input_ids"]) for r in rows.select(range(e * third, (e + 1) * third))} for e in range(3)]

    fresh, once = prompts(Burden()), prompts(Burden(redraw=False))
    assert fresh[0] != fresh[1] != fresh[2] != fresh[0]
    assert once[0] == once[1] == once[2]


def test_twin_sees_the_same_rows_in_the_same_order():
    loaded = nano()
    ft, _ = _prepare(loaded, as_dataset(CHATS), SETTINGS, Burden())
    sft, _ = _prepare(loaded, as_dataset(CHATS), SETTINGS, None)
    answers = [[[t for t in row["labels"] if t >= 0] for row in rows] for rows in (ft, sft)]
    assert answers[0] == answers[1]
    assert [r["input_ids"] for r in ft] != [r["input_ids"] for r in sft]


def test_rows_around_the_cut_leave_the_order_of_the_others_alone():
    rng = random.Random(0)
    chats = []
    for i in range(120):
        words = " ".join(rng.choice(["apple", "Ann", "seven", "zebra-like"]) for _ in range(rng.randint(5, 70)))
        chats.append([{"role": "user", "content": words}, {"role": "assistant", "content": f"Answer: {i}"}])
    loaded, orders = nano(), []
    for burden in (None, Burden()):
        rows, report = _prepare(loaded, as_dataset(chats), SETTINGS, burden)
        assert report.dropped > 0
        orders.append([tuple(t for t in row["labels"] if t >= 0) for row in rows])
    both = {answer for answer in set(orders[0]) & set(orders[1]) if answer[-1] == loaded.tokenizer.eos_token_id}
    assert len(both) > 30
    assert [a for a in orders[0] if a in both] == [a for a in orders[1] if a in both]


def test_rows_beyond_the_context_are_counted(tmp_path):
    long = [{"role": "user", "content": "word " * 500}, {"role": "assistant", "content": "Answer: 1"}]
    run = train_sft(nano(), [*CHATS[:7], long], replace(SETTINGS, log_steps=1), run=tmp_path / "long")
    assert "1 of 8 rows is longer than 128 tokens" in run.record["data"]
    assert "1 had no trained token left" in run.record["data"]


def test_watch_sees_every_logged_step(tmp_path):
    seen = []
    train_sft(nano(), CHATS[:8], SETTINGS, run=tmp_path / "w", watch=lambda lines: seen.append(len(lines)))
    assert seen == [1, 2]


def interrupt_at(step, error):
    def watch(lines):
        if lines[-1]["step"] == step:
            raise error

    return watch


def weights_of(loaded):
    return {name: p.detach() for name, p in loaded.model.named_parameters() if "lora_" in name}


def weights(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def test_interrupted_run_goes_on_to_the_same_bytes(finished, tmp_path, capsys):
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train_sft(nano(), CHATS, SETTINGS, run=folder, burden=Burden(), watch=interrupt_at(5, KeyboardInterrupt()))
    assert "go on from checkpoint-3" in capsys.readouterr().out
    with pytest.raises(RunError, match="has not finished"):
        open_run(folder)
    again = train_sft(nano(), CHATS, SETTINGS, run=folder, burden=Burden())
    assert [line["step"] for line in again.metrics] == list(range(1, 9))
    assert [line["loss"] for line in again.metrics] == [line["loss"] for line in finished.metrics]
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_half_written_checkpoint_is_passed_over(tmp_path):
    for step in (3, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"step": step}, folder / name)
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-6"
    whole = (tmp_path / "checkpoint-6" / "optimizer.pt").read_bytes()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(whole[: len(whole) // 2])
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-3"
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    assert newest_whole_checkpoint(tmp_path) is None


def test_non_finite_gradient_stops_before_the_weights_are_ruined(tmp_path):
    loaded = nano()
    hooked = next(m for n, m in loaded.model.named_modules() if n.endswith("layers.2.mlp.up_proj"))
    hooked.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(RunError, match="not finite"):
        train_sft(loaded, CHATS[:8], SETTINGS, run=tmp_path / "nan")
    assert all(p.isfinite().all() for p in loaded.model.parameters() if p.is_floating_point())


def test_unwritable_results_folder_is_one_message(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="can't be written.*IRONLOGIC_RUNS"):
        train_sft(nano(), CHATS[:4], SETTINGS, run=tmp_path / "file" / "run")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a disk of our own needs root on Linux")
@pytest.mark.parametrize("kilobytes", [300, 1000, 1800])
def test_full_disk_is_one_message(tmp_path, kilobytes):
    """A real one: each size is full at another moment, and each library says so in its own way."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        settings = replace(SETTINGS, lora=LoraSettings(rank=16, alpha=16))
        with pytest.raises(RunError, match="can't be written.*IRONLOGIC_RUNS"):
            train_sft(nano(), CHATS, settings, run=disk / "full")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class _Small:
    """A card that holds so many rows: more of them in one forward pass are out of memory, from some pass on."""

    def __init__(self, model, rows, passes=0):
        self.rows, self.passes, self.seen = rows, passes, []
        model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, _, args, kwargs):
        self.seen.append(len(kwargs["input_ids"]))
        if self.seen[-1] > self.rows and len(self.seen) > self.passes:
            raise torch.OutOfMemoryError("out of memory (a test)")


@pytest.mark.parametrize(("passes", "tried"), [(0, [4, 2, 1]), (2, [4, 4, 4, 2, 1]), (5, [4] * 6 + [2, 1])])
def test_out_of_memory_halves_the_batch_and_learns_the_same(tmp_path, finished, capsys, passes, tried):
    loaded = nano()
    card = _Small(loaded.model, rows=1, passes=passes)
    run = train_sft(loaded, CHATS, SETTINGS, run=tmp_path, burden=Burden())
    assert card.seen[: len(tried)] == tried
    assert "out of memory with 4 rows a forward pass: going on with 2, 2 passes a step" in capsys.readouterr().out
    assert run.record["rows_a_pass"] == 1
    assert run.record["steps"] == finished.record["steps"]
    for ours, theirs in zip(run.metrics, finished.metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)


def test_out_of_memory_with_one_row_is_one_message(tmp_path):
    loaded = nano()
    _Small(loaded.model, rows=0)
    with pytest.raises(RunError, match=r"out of memory with 1 row a forward pass\. Choose a smaller max_length"):
        train_sft(loaded, CHATS[:8], SETTINGS, run=tmp_path)


def test_two_processes_never_write_one_folder(tmp_path):
    hold = f"filelock.FileLock({str(tmp_path / 'writing.lock')!r}).acquire()"
    code = f"import filelock, sys; lock = {hold}; print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=r"being written by another notebook or process.*choose another name"):
        train_sft(nano(), CHATS[:8], SETTINGS, run=tmp_path)
    other.kill()  # a killed process leaves no lock behind
    other.wait()
    assert train_sft(nano(), CHATS[:8], SETTINGS, run=tmp_path).record["finished"]


def test_adapter_can_be_trained_further(finished, tmp_path):
    first = weights(finished)
    run = train_sft(open_run(finished.folder).model(), CHATS[:8], SETTINGS, run=tmp_path / "polish")
    assert any(not torch.equal(first[name], tensor) for name, tensor in weights(run).items())
    assert run.record["trained_parameters"] == finished.record["trained_parameters"]
    again = weights_of(open_run(run.folder).model())
    assert all(torch.equal(again[name], tensor) for name, tensor in weights_of(run.loaded).items())


def test_training_twice_inside_one_model_is_refused(tmp_path):
    loaded = nano()
    train_sft(loaded, CHATS[:4], SETTINGS, run=tmp_path / "one")
    with pytest.raises(ModelError, match="load it again"):
        train_sft(loaded, CHATS[:4], SETTINGS, run=tmp_path / "two")


def test_pictures_are_refused_and_not_trained_as_text(tmp_path):
    parts = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what is it"}]
    seen = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    for chats in ([CHATS[0], seen], datasets.Dataset.from_list([{"messages": seen}])):
        with pytest.raises(RunError, match=r"row \d holds a picture, which this stage would not see; vision_train"):
            train_sft(load_model("nano"), chats, SETTINGS, run=tmp_path / "run")


def test_short_run_logs_too(tmp_path):
    run = train_sft(nano(), CHATS[:8], replace(SETTINGS, log_steps=50), run=tmp_path / "short")
    assert [line["step"] for line in run.metrics] == [1, 2]


@pytest.mark.parametrize("name", ["", "..", "a/../../b"])
def test_names_that_leave_the_results_folder_are_refused(name):
    with pytest.raises(RunError, match="is no name for a run"):
        run_folder(name)


def test_names_are_in_the_results_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("IRONLOGIC_RUNS", str(tmp_path))
    assert run_folder("a/b") == tmp_path / "a" / "b"
    assert run_folder(tmp_path / "x") == tmp_path / "x"


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from test_train import CHATS, SETTINGS, nano
from ironlogic.burden import Burden
from ironlogic.training.sft import train_sft
def watch(lines):
    if lines[-1]["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
train_sft(nano(), CHATS, SETTINGS, run=sys.argv[1], burden=Burden(), watch=watch)
"""


def test_killed_run_goes_on_to_the_same_bytes(finished, tmp_path):
    folder = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    again = train_sft(nano(), CHATS, SETTINGS, run=folder, burden=Burden())
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_a_column_named_row_that_names_none_loses_nothing(tmp_path):
    odd = as_dataset(CHATS[:12]).add_column("row", [i % 3 for i in range(12)])
    run = train_sft(nano(), odd, SETTINGS, run=tmp_path / "a", burden=Burden())
    assert run.record["data"].startswith("all 12 rows")
    assert run.record["steps"] == 3


def test_bad_rows_claim_no_folder_and_are_named(tmp_path):
    long = [[{"role": "user", "content": "word " * 300}, CHATS[0][1]]]
    with pytest.raises(ChatError, match="no row is left"):
        train_sft(nano(), long, SETTINGS, run=tmp_path / "a")
    assert train_sft(nano(), CHATS[:4], SETTINGS, run=tmp_path / "a").record["rows"] == 4
    for broken in ({"role": "user", "content": None}, {"role": "user"}, {"role": "user", "content": ["x", 5]}):
        with pytest.raises(RunError, match="row 1: .*content"):
            train_sft(nano(), [CHATS[0], [broken, CHATS[0][1]]], SETTINGS, run=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_model_with_adapters_by_name_is_not_trained(finished, tmp_path):
    loaded = with_adapters(nano(), {"FT": finished.adapter})
    with pytest.raises(ModelError, match=r"carries adapters by name \(FT\); load the one to train"):
        train_sft(loaded, CHATS[:4], SETTINGS, run=tmp_path / "a")


def test_a_copied_checkpoint_is_not_in_the_way(tmp_path):
    (tmp_path / "checkpoint-100 (1)").mkdir()
    assert newest_whole_checkpoint(tmp_path) is None


def test_a_finished_run_is_read_from_a_full_disk(finished, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setenv("IRONLOGIC_RUNS", str(finished.folder.parent))
    assert open_run("a").record == finished.record
    assert resolve("a/adapter") == str(finished.adapter)
