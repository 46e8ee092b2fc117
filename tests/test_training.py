"""A stage of SFT: rows and labels, the run folder, resuming, several processes, and clear refusals."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

from ironlogic.burden import Burden
from ironlogic.data.chats import ChatError, load_chats, make_chats
from ironlogic.models import ModelError, load_model, resolve, with_adapters
from ironlogic.presets import LoraSettings
from ironlogic.training.__main__ import main
from ironlogic.training.prepared import prepare_sft, train_prepared
from ironlogic.training.runs import RunError, newest_whole_checkpoint, open_run, read_metrics, run_folder
from ironlogic.training.sft import _prepare, train_sft

import peft
import pytest
import torch
from safetensors.torch import load_file
from trained import BURDEN, CHATS, SETTINGS, nano, train_ft

slow = pytest.mark.slow


def weights(run_or_folder):
    folder = getattr(run_or_folder, "folder", run_or_folder)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def losses(run_or_folder):
    return [line["loss"] for line in read_metrics(getattr(run_or_folder, "folder", run_or_folder))]


def prepare(chats, settings, burden=None):
    rows, _, _ = _prepare(nano(), chats, settings, burden, pictures=False)
    return rows


def interrupt(lines):
    if lines[-1]["step"] == 5:
        raise KeyboardInterrupt


def python(*words, **environ):
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), *sys.path])
    environ = {**os.environ, "PYTHONPATH": paths, **environ}
    return subprocess.run([sys.executable, *words], env=environ, capture_output=True, text=True, check=False)


# --- what is trained ----------------------------------------------------------------------------------------
def test_answers_with_their_end_are_trained_and_prompts_are_not():
    tokenizer = nano().tokenizer
    for row in prepare(CHATS, SETTINGS):
        text = tokenizer.decode([token for token in row["labels"] if token >= 0])
        assert text.endswith("<|im_end|>")
        assert text.count("<|im_end|>") == 1
        assert "<|im_start|>" not in text
        assert "Answer:" in text
    all_tokens = prepare(CHATS, replace(SETTINGS, loss="all"))  # as the seeds train
    assert all(row["labels"] == row["input_ids"] for row in all_tokens)


def test_burden_is_drawn_anew_every_epoch_unless_told_not_to():
    def epochs(burden):
        rows = prepare(CHATS, replace(SETTINGS, epochs=3, batch_size=1), burden)
        third = len(rows) // 3
        return [{tuple(ids) for ids in rows["input_ids"][e * third : (e + 1) * third]} for e in range(3)]

    fresh, once = epochs(Burden()), epochs(Burden(redraw=False))
    assert fresh[0] != fresh[1] != fresh[2] != fresh[0]
    assert once[0] == once[1] == once[2]


def test_twin_sees_the_same_rows_in_the_same_order_and_a_cut_moves_no_other_row():
    rng = random.Random(0)
    chats = []
    for i in range(120):
        words = " ".join(rng.choice(["apple", "Ann", "seven", "zebra-like"]) for _ in range(rng.randint(5, 70)))
        chats.append([{"role": "user", "content": words}, {"role": "assistant", "content": f"Answer: {i}"}])
    end = nano().tokenizer.eos_token_id
    for given, whole in ((CHATS, True), (make_chats(chats), False)):
        prompts, answers = [], []
        for burden in (None, Burden()):
            rows = prepare(given, SETTINGS, burden)
            assert (len(rows) == SETTINGS.epochs * len(given)) == whole
            prompts.append(rows["input_ids"][:])
            answers.append([tuple(token for token in labels if token >= 0) for labels in rows["labels"]])
        both = {answer for answer in set(answers[0]) & set(answers[1]) if answer[-1] == end}
        assert len(both) > 15
        assert [a for a in answers[0] if a in both] == [a for a in answers[1] if a in both]
        assert prompts[0] != prompts[1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Runs of plain transformers (Unsloth pads on a CPU) from another process, and why the last one was refused."""
    folder = tmp_path_factory.mktemp("plain")
    code = """
import sys
import transformers.masking_utils
from dataclasses import replace
from pathlib import Path
from trained import SETTINGS, train_ft
from ironlogic.training.runs import RunError
folder = Path(sys.argv[1])
train_ft(folder / "padded")
train_ft(folder / "twice", settings=replace(SETTINGS, accumulation=2))
free = replace(SETTINGS, padding_free=True)
train_ft(folder / "free", settings=free)
transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None
try:
    train_ft(folder / "seen", settings=free)
except RunError as error:
    print(error)
"""
    done = python("-c", code, str(folder), IRONLOGIC_BACKEND="transformers")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout.strip().splitlines()[-1]


@slow
def test_plain_transformers_and_rows_without_padding_reach_the_same_losses(small_run, plain):
    """Losses that only hold if no row sees its neighbour; where one does, training does not begin."""
    folder, refused = plain
    padded = open_run(folder / "padded")
    assert [run.record["backend"] for run in (small_run, padded)] == ["unsloth", "transformers"]
    assert losses(padded) == pytest.approx(losses(small_run), rel=1e-3)
    norms = [[line["grad_norm"] for line in run.metrics] for run in (padded, small_run)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert losses(folder / "free") == pytest.approx(losses(small_run), rel=2e-3)
    assert "rows of one batch see each other in this model" in refused


# --- the run folder -----------------------------------------------------------------------------------------
@slow
def test_every_decision_is_written_down_and_the_adapter_is_plain_peft(small_run, tmp_path):
    assert len(losses(small_run)) == 8
    assert sum(losses(small_run)[-3:]) < sum(losses(small_run)[:3])
    record = json.loads((small_run.folder / "run.json").read_text())
    assert record == small_run.record
    assert record["finished"]
    assert (record["stage"], record["burden"]["ratio"], record["settings"]["lora"]["rank"]) == ("ft", 0.7, 4)
    assert record["versions"]["trl"] == "1.14.2"
    assert record["four_bit_share"] > 0.4
    assert record["adapted"] == {"attention": [16, 16], "mlp": [12, 12]}
    assert sorted(path.name for path in small_run.folder.iterdir() if path.suffix != ".lock") == (
        ["adapter", "chats.jsonl", "metrics.jsonl", "run.json"]
    )
    tensors = weights(small_run)
    assert len(tensors) == 2 * 4 * 7
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert peft.AutoPeftModelForCausalLM.from_pretrained(small_run.adapter).peft_config["default"].r == 4
    ids = torch.randint(10, 900, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            run.load_model().model.eval()(input_ids=ids).logits for run in (small_run, open_run(small_run.folder))
        )
    torch.testing.assert_close(ours, theirs)
    moved = tmp_path / "moved"  # an adapter finds its base where the repository lies now
    shutil.copytree(small_run.adapter, moved)
    settings = json.loads((moved / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/elsewhere/data/nano"
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    assert load_model(moved).base.endswith("data/nano")


@slow
def test_the_same_run_is_not_trained_twice_and_another_is_refused(small_run):
    before, seen = (small_run.folder / "run.json").read_bytes(), []
    again = train_ft(small_run.folder, settings=replace(SETTINGS, report_to="none"), watch=seen.append)
    assert again.loaded is None
    assert again.record == small_run.record
    assert seen == [small_run.metrics]
    for change, named in [
        ({"burden": None}, "stage .*burden"),
        ({"burden": Burden(ratio=0.3)}, "burden"),
        ({"settings": replace(SETTINGS, seed=1)}, r"settings\.seed \(3407, now 1\)"),
        ({"chats": CHATS[1:]}, "rows .*data_sha256"),
    ]:
        with pytest.raises(RunError, match=f"holds another run: it differs in {named}"):
            train_ft(small_run.folder, **change)
    assert (small_run.folder / "run.json").read_bytes() == before


@slow
def test_a_run_of_the_release_before_is_known_by_what_it_recorded(small_run, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(small_run.folder, folder)
    record = json.loads((folder / "run.json").read_text())
    del record["four_bit"], record["settings"]["padding_free"], record["settings"]["report_to"]
    del record["settings"]["lora"]["vision"]
    (folder / "run.json").write_text(json.dumps(record))
    assert train_ft(folder).loaded is None
    eyes = replace(SETTINGS, lora=replace(SETTINGS.lora, vision=True))
    with pytest.raises(RunError, match=r"differs in settings\.lora\.vision \(None, now True\)"):
        train_ft(folder, settings=eyes)
    (folder / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        open_run(folder)


@slow
def test_a_short_run_logs_is_watched_and_counts_what_does_not_fit(tmp_path):
    long = [{"role": "user", "content": "word " * 500}, {"role": "assistant", "content": "Answer: 1"}]
    odd = [{"messages": chat, "row": i % 3} for i, chat in enumerate([*CHATS[:7], long])]  # names no row
    seen = []
    run = train_ft(
        tmp_path / "short",
        chats=load_chats(odd),
        settings=replace(SETTINGS, log_steps=50),
        burden=None,
        watch=lambda lines: seen.append(len(lines)),
    )
    assert seen == [1, 2]
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert "1 of 8 rows is longer than 128 tokens" in run.record["data"]
    assert "1 had no trained token left" in run.record["data"]


@pytest.mark.parametrize("name", ["", "..", "a/../../b"])
def test_names_that_leave_the_results_folder_are_refused(name, tmp_runs):
    assert run_folder("a/b") == tmp_runs / "a" / "b"
    assert run_folder(tmp_runs / "x") == tmp_runs / "x"
    with pytest.raises(RunError, match="is no name for a run"):
        run_folder(name)


@slow
def test_a_finished_run_is_read_from_a_full_disk(small_run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setenv("IRONLOGIC_RUNS", str(small_run.folder.parent))
    assert open_run(small_run.folder.name).record == small_run.record
    assert resolve(f"{small_run.folder.name}/adapter") == str(small_run.adapter)


# --- rows and models that are refused -----------------------------------------------------------------------
def test_bad_rows_claim_no_folder_and_are_named(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ChatError, match="no row is left"):
        train_ft(folder, chats=make_chats([[{"role": "user", "content": "word " * 300}, CHATS[0][1]]]))
    picture = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what is it"}]
    answer = [{"type": "text", "text": "a cat"}]
    seen = [{"role": "user", "content": picture}, {"role": "assistant", "content": answer}]
    with pytest.raises(RunError, match=r"row 2: messages holds a picture, but \S+ takes none"):
        train_ft(folder, chats=make_chats([CHATS[0], seen]))
    with pytest.raises(RunError, match=r"the chats are a list; expected what load_chats or make_chats returns"):
        train_ft(folder, chats=[CHATS[0]])
    assert not folder.exists()


@slow
def test_an_adapter_goes_on_but_not_twice_inside_one_model_nor_by_name(small_run, tmp_path):
    run = train_ft(tmp_path / "polish", source=small_run.adapter, chats=CHATS[:8], burden=None)
    assert not same(weights(run), weights(small_run))
    assert run.record["trained_parameters"] == small_run.record["trained_parameters"]
    loaded = nano()
    several = with_adapters(loaded, {"FT": small_run.adapter})
    with pytest.raises(ModelError, match=r"carries adapters by name \(FT\); load the one to train"):
        train_sft(several, CHATS[:4], SETTINGS, run=tmp_path / "named")
    with pytest.raises(ModelError, match="load it again"):  # PEFT has put its layers into it
        train_sft(loaded, CHATS[:4], SETTINGS, run=tmp_path / "twice")


# --- trackers -----------------------------------------------------------------------------------------------
def test_a_tracker_that_is_not_here_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    trackers = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(trackers, lambda: ["wandb"])
    for name, message in (
        ("trackio", "'trackio', which is not installed here"),
        ("x", "'x'; expected one of none, .*wandb"),
    ):
        with pytest.raises(RunError, match=f"report_to is {message}"):
            train_ft(tmp_path / "run", settings=replace(SETTINGS, report_to=name))
    assert not (tmp_path / "run").exists()


@slow
def test_tensorboard_writes_into_the_run_folder(tmp_path, monkeypatch):
    """Its writer is a stand-in, for the package is not among the requirements."""
    writer = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    run = train_ft(tmp_path / "run", chats=CHATS[:8], settings=replace(SETTINGS, report_to="tensorboard"))
    writer.assert_called_once_with(log_dir=str(run.folder / "tensorboard"))
    written = [call.args for call in writer().add_scalar.call_args_list]
    assert [args for args in written if args[0] == "train/loss"] == (
        [("train/loss", loss, step) for step, loss in enumerate(losses(run), 1)]
    )


# --- going on -----------------------------------------------------------------------------------------------
@slow
def test_interrupted_run_goes_on_to_the_same_bytes(small_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train_ft(folder, watch=interrupt)
    assert "go on from checkpoint-3" in capsys.readouterr().out
    with pytest.raises(RunError, match="has not finished"):
        open_run(folder)
    with monkeypatch.context() as patch:  # a step would take another number of rows
        patch.setattr("ironlogic.training.stages.PROCESSES", 2)
        with pytest.raises(RunError, match=r"differs in processes \(1, now 2\)"):
            train_prepared(folder)
    again = train_ft(folder)
    assert [line["step"] for line in again.metrics] == list(range(1, 9))
    assert losses(again) == losses(small_run)
    assert same(weights(again), weights(small_run))


def test_checkpoints_that_are_half_written_or_copied_are_passed_over(tmp_path):
    (tmp_path / "checkpoint-100 (1)").mkdir()
    assert newest_whole_checkpoint(tmp_path) is None
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


@pytest.mark.parametrize("half", ["", '{"step": 2, "text": {"a": 1}', '{"step": 2, "text": "}', '{"text": "ä'])
def test_half_a_line_at_the_end_of_the_metrics_is_passed_over(tmp_path, half):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + half.encode()[: -1 if "ä" in half else None])
    assert read_metrics(tmp_path) == [{"step": 1}]
    (tmp_path / "metrics.jsonl").write_text(f"{half}x\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged"):
        read_metrics(tmp_path)


@slow
def test_non_finite_gradient_stops_before_the_weights_are_ruined(tmp_path):
    loaded = nano()
    hooked = next(m for n, m in loaded.model.named_modules() if n.endswith("layers.2.mlp.up_proj"))
    hooked.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(RunError, match="not finite"):
        train_sft(loaded, CHATS[:8], SETTINGS, run=tmp_path / "nan")
    assert all(p.isfinite().all() for p in loaded.model.parameters() if p.is_floating_point())


class _SmallCard:
    """A card that holds so many rows: more of them in one forward pass are out of memory, from some pass on."""

    def __init__(self, model, rows, passes):
        self.rows, self.passes, self.seen = rows, passes, []
        model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, _, args, kwargs):
        self.seen.append(len(kwargs["input_ids"]))
        if self.seen[-1] > self.rows and len(self.seen) > self.passes:
            raise torch.OutOfMemoryError("out of memory (a test)")


@slow
def test_out_of_memory_halves_the_batch_and_learns_the_same(tmp_path, small_run, capsys):
    loaded = nano()
    card = _SmallCard(loaded.model, rows=1, passes=5)
    run = train_sft(loaded, CHATS, SETTINGS, run=tmp_path, burden=BURDEN)
    assert card.seen[:8] == [4] * 6 + [2, 1]
    assert "out of memory with 4 rows a forward pass: going on with 2, 2 passes a step" in capsys.readouterr().out
    assert run.record["rows_a_pass"] == 1
    assert losses(run) == pytest.approx(losses(small_run), abs=2e-3)


@slow
def test_out_of_memory_with_one_row_is_one_message(tmp_path):
    loaded = nano()
    _SmallCard(loaded.model, rows=0, passes=0)
    with pytest.raises(RunError, match=r"out of memory with 1 row a forward pass\. Choose a smaller max_length"):
        train_sft(loaded, CHATS[:8], SETTINGS, run=tmp_path)


@slow
def test_unwritable_results_folder_is_one_message(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="can't be written.*IRONLOGIC_RUNS"):
        train_ft(tmp_path / "file" / "run", chats=CHATS[:4])


@slow
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
        with pytest.raises(RunError, match="can't be written.*IRONLOGIC_RUNS"):
            train_ft(disk / "full", settings=replace(SETTINGS, lora=LoraSettings(rank=16, alpha=16)))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@slow
def test_two_processes_never_write_one_folder(tmp_path):
    hold = f"filelock.FileLock({str(tmp_path / 'writing.lock')!r}).acquire()"
    code = f"import filelock, sys; lock = {hold}; print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=r"being written by another notebook or process.*choose another name"):
        train_ft(tmp_path, chats=CHATS[:8])
    other.kill()  # a killed process leaves no lock behind
    other.wait()
    assert train_ft(tmp_path, chats=CHATS[:8]).record["finished"]


# --- from the command line, and in several processes --------------------------------------------------------
@slow
def test_a_prepared_folder_trains_to_the_same_bytes(small_run, tmp_path):
    rows = load_chats([{"messages": chat, "other": "x"} for chat in CHATS])
    options = {"run": tmp_path / "prepared", "burden": BURDEN}
    folder = prepare_sft("nano", rows, SETTINGS, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["chats.jsonl", "run.json"]
    assert (folder / "chats.jsonl").read_bytes() == (small_run.folder / "chats.jsonl").read_bytes()
    assert prepare_sft("nano", rows, SETTINGS, **options) == folder  # the same again is fine
    with pytest.raises(RunError, match="holds another run: it differs in settings"):
        prepare_sft("nano", rows, replace(SETTINGS, seed=1), **options)
    prepared = train_prepared(folder)
    assert losses(prepared) == losses(small_run)
    assert same(weights(prepared), weights(small_run))
    assert train_prepared(folder).record == prepared.record  # finished: not trained again


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", None, "no run.json here; expected a folder written by train_sft or prepare_sft"),
        ("chats.jsonl", None, "no chats.jsonl here"),
        ("run.json", "{", "damaged"),
        ("run.json", "{}", "damaged"),
        ("chats.jsonl", "{", "damaged.*prepare it again"),
        ("chats.jsonl", '{"instruction": "x", "output": "y"}\n', "not the rows that run.json names"),
    ],
)
def test_a_changed_folder_is_refused_in_one_line(tmp_path, monkeypatch, name, content, message):
    folder = prepare_sft("nano", CHATS[:4], SETTINGS, run=tmp_path / "x")
    (folder / name).write_text(content) if content else (folder / name).unlink()
    monkeypatch.setattr(sys, "argv", ["training", str(folder)])
    with pytest.raises(SystemExit, match=message) as stop:
        main()
    assert "\n" not in stop.value.code


@slow
def test_two_processes_are_one_with_twice_the_accumulation(plain, tmp_path):
    one = plain[0] / "twice"
    two = prepare_sft("nano", CHATS, SETTINGS, run=tmp_path / "two", burden=BURDEN)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    both = python(*torchrun, "-m", "ironlogic.training", str(two), IRONLOGIC_BACKEND="transformers")
    assert both.returncode == 0, both.stderr[-2000:]
    assert [open_run(folder).record["processes"] for folder in (one, two)] == [1, 2]
    lines = [read_metrics(folder) for folder in (one, two)]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]  # written once, by the first process
    assert both.stdout.count("step 2 of 4") == both.stdout.count("finished: ") == 1
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [line[name] for line in lines[1]] == pytest.approx([line[name] for line in lines[0]], rel=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-4, atol=1e-6)
