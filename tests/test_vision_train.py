"""The two stages: what is trained, what is frozen, what is saved and reloaded, going on after a kill, refusals."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from ironlogic.burden import Burden
from ironlogic.data.chats import make_chats
from ironlogic.data.scenes import scene_chats
from ironlogic.models import ModelError, load_model
from ironlogic.presets import VISION_PRESETS, LoraSettings, TrainSettings
from ironlogic.training.prepared import prepare_sft, train_prepared
from ironlogic.training.runs import Run, RunError, newest_whole_checkpoint, open_run
from ironlogic.vision.answers import answer_pictures, control_rows
from ironlogic.vision.splice import SpliceError, projector_of, splice, tower_of
from ironlogic.vision.train import reopen, save_spliced, train_and_answer, train_instruct, train_projector

import numpy as np
import psutil
import pytest
import torch
import transformers
from eyes import chat, on_nano
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SETTINGS = TrainSettings(
    learning_rate=3e-3,
    batch_size=4,
    accumulation=2,
    max_length=128,
    epochs=2,
    log_steps=1,
    save_steps=1,
    lora=LoraSettings(rank=4, alpha=8, dropout=0.1),
)
RATES = replace(SETTINGS, projector_learning_rate=1e-3)


def tiny(kind="clip"):
    return on_nano(kind, max_length=128)


def conversations(text_only=0):
    """16 flat pictures, bright or dark, and what they are."""
    rng, rows = np.random.default_rng(0), []
    for index in range(16):
        noise = rng.integers(0, 40, (32, 32, 3)) + 200 * (index % 2)
        image = Image.fromarray(noise.astype(np.uint8))
        rows.append(chat("Bright or dark?", ("dark", "bright")[index % 2], image))
    plain = [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "yes"}]
    return rows + [plain] * text_only


CHATS = conversations()
ROWS, MORE = make_chats(CHATS), make_chats(conversations(2))


def tensors(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both stages one after the other, and what the parts were before and between."""
    folder = tmp_path_factory.mktemp("runs")
    loaded = tiny()
    before = {name: tensors(part) for name, part in parts(loaded).items()}
    one = train_projector(loaded, ROWS, SETTINGS, run=folder / "one", cache=folder / "features")
    between = {name: tensors(part) for name, part in parts(loaded).items()}
    two = train_instruct(one.loaded, MORE, RATES, run=folder / "two", cache=folder / "features")
    return one, two, before, between, folder


def parts(loaded):
    language = loaded.model.model.language_model
    return {"tower": tower_of(loaded.model), "projector": projector_of(loaded.model), "language": language}


def test_stage_1_trains_the_projector_and_nothing_else(runs):
    one, _, before, between, _ = runs
    assert same(before["tower"], between["tower"])
    assert same(before["language"], between["language"])
    assert all(
        not torch.equal(before["projector"][name], between["projector"][name]) for name in before["projector"]
    )
    assert len(one.metrics) == 4
    assert one.metrics[-1]["loss"] < 0.9 * one.metrics[0]["loss"]
    assert one.record["trained_parameters"] == sum(t.numel() for t in before["projector"].values())
    assert (one.record["stage"], one.record["features"]) == ("projector", "computed once")
    assert same(load_file(one.folder / "projector.safetensors"), between["projector"])


def test_stage_2_trains_projector_and_lora_on_the_language_model_alone(runs):
    _, two, _, between, _ = runs
    saved = load_file(two.adapter / "adapter_model.safetensors")
    assert {"lora" if "lora_" in name else "projector" for name in saved} == {"lora", "projector"}
    assert all("language_model" in name for name in saved if "lora_" in name)
    assert any(t.abs().sum() > 0 for name, t in saved.items() if "lora_B" in name)
    assert any(
        not torch.equal(t, between["projector"][name.rpartition("projector.")[2]])
        for name, t in saved.items()
        if "projector" in name
    )
    layers = load_model("nano", four_bit=False).model.config.num_hidden_layers
    assert sum("lora_" in name for name in saved) == 2 * 7 * layers
    settings = json.loads((two.adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8, 0.1)


def test_each_part_has_its_own_learning_rate(runs, tmp_path):
    """A projector whose rate is 0 stays where it was."""
    one, *_ = runs
    loaded = reopen(one, tiny())
    rates = replace(SETTINGS, projector_learning_rate=0.0, weight_decay=0.0)
    two = train_instruct(loaded, ROWS, rates, run=tmp_path / "zero", cache=None)
    saved = load_file(two.adapter / "adapter_model.safetensors")
    start = load_file(one.folder / "projector.safetensors")
    assert all(torch.equal(t, start[n.rpartition("projector.")[2]]) for n, t in saved.items() if "projector" in n)
    assert any(t.abs().sum() > 0 for name, t in saved.items() if "lora_B" in name)
    assert two.record["features"] == "computed at every step"


def test_a_finished_run_comes_back_from_its_folder(runs):
    one, two, _, between, folder = runs
    loaded = tiny()
    before = (one.folder / "run.json").read_bytes()
    again = train_projector(loaded, ROWS, SETTINGS, run=one.folder, cache=folder / "features")
    assert same(tensors(projector_of(again.loaded.model)), between["projector"])
    second = train_instruct(again.loaded, MORE, RATES, run=two.folder, cache=folder / "features")
    assert (one.folder / "run.json").read_bytes() == before
    assert logits(second.loaded).equal(logits(two.loaded))
    with pytest.raises(ModelError, match="an earlier run put an adapter into this model"):
        train_instruct(second.loaded, ROWS, SETTINGS, run=folder / "three")


def logits(loaded):
    text = loaded.processor.apply_chat_template(CHATS[0][:1], tokenize=False, add_generation_prompt=True)
    images = [row[0]["content"][0]["image"] for row in CHATS[:2]]
    batch = loaded.processor(text=[text, text], images=images, return_tensors="pt")
    with torch.no_grad():
        return loaded.model.eval()(**batch).logits


def test_the_saved_whole_reloads_with_plain_transformers(runs, tmp_path):
    _, two, *_ = runs
    folder = save_spliced(two, tmp_path / "whole")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    merged = replace(two.loaded, model=model, processor=processor, tokenizer=processor.tokenizer)
    torch.testing.assert_close(logits(merged), logits(two.loaded), rtol=1e-4, atol=1e-4)
    again = load_model(folder, four_bit=False)
    assert logits(again).equal(logits(merged))  # and again
    assert logits(two.loaded).equal(logits(two.loaded))
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert not [name for name in names if "lora" in name or "original_module" in name]
    assert not list(tmp_path.glob("*.part"))
    whole = save_spliced(replace(two.loaded, model=model), tmp_path / "again")
    assert same(*(load_file(path / "model.safetensors") for path in (folder, whole)))


def test_both_stages_as_one_job_train_the_same_bytes_and_answer(runs, tmp_path):
    """`train_and_answer`, and the same call again when all is finished."""
    one, two, *_, folder = runs
    job = partial(
        train_and_answer,
        tiny_with_seed,
        {"right": CHATS[:4], "none": control_rows(CHATS[:4], "none")},
        projector=(ROWS, SETTINGS),
        instruct=(MORE, RATES),
        run=tmp_path / "job",
        seed=SETTINGS.seed,
        cache=folder / "features",
        max_new_tokens=6,
    )
    watched = []
    answers = job(watch=watched.append)
    stages = {"projector": (one, "projector.safetensors"), "instruct": (two, "adapter/adapter_model.safetensors")}
    for stage, (run, file) in stages.items():
        assert (tmp_path / "job" / stage / file).read_bytes() == (run.folder / file).read_bytes()
    assert answers["right"] == answer_pictures(two.loaded, CHATS[:4], max_new_tokens=6)
    assert answers.keys() == {"right", "none"}
    watched.clear()
    assert job(watch=watched.append) == answers
    assert [lines[-1]["step"] for lines in watched] == [4, 5], "all metrics at once: nothing is trained again"
    reopened = reopen(open_run(tmp_path / "job" / "instruct"), tiny())
    assert answer_pictures(reopened, CHATS[:4], max_new_tokens=6) == answers["right"]


def tiny_with_seed(*, seed):
    return tiny()


def test_rows_that_cant_be_used_are_told_and_the_rest_is_trained(tmp_path):
    bad = [
        {"role": "user", "content": [{"type": "image", "image": "no/such.png"}]},
        {"role": "assistant", "content": "x"},
    ]
    run = train_projector(
        tiny(), make_chats([*CHATS[:8], bad, *conversations(1)[-1:]]), SETTINGS, run=tmp_path / "a", cache=None
    )
    assert run.record["rows"] == 10
    assert run.record["data"].startswith("8 rows")
    assert "2 rows left out" in run.record["data"]
    assert "no such picture" in run.record["data"]
    assert "holds no picture" in run.record["data"]


def test_another_run_in_the_same_folder_is_refused(runs):
    """Other settings, rows, order; another projector or tower to begin with."""
    one, two, *_ = runs
    others = {
        "settings": {"settings": replace(SETTINGS, seed=1)},
        "rows .*data_sha256": {"chats": ROWS[1:]},
        "data_sha256": {"chats": make_chats([*CHATS[1:], CHATS[0]])},
    }
    for named, change in others.items():
        with pytest.raises(RunError, match=f"holds another run: it differs in {named}"):
            train_projector(tiny(), **({"chats": ROWS, "settings": SETTINGS} | change), run=one.folder)
    for part in (projector_of, tower_of):
        loaded = tiny()
        with torch.no_grad():
            next(part(loaded.model).parameters()).add_(0.01)
        with pytest.raises(RunError, match="differs in splice_sha256"):
            train_projector(loaded, ROWS, SETTINGS, run=one.folder)
    with pytest.raises(RunError, match="differs in splice_sha256"):
        train_instruct(tiny(), MORE, RATES, run=two.folder)  # not from stage 1's projector


def test_a_broken_splice_is_not_trained(tmp_path):
    loaded = tiny()
    loaded.model.config.image_token_index += 1
    with pytest.raises(SpliceError, match="image"):
        train_projector(loaded, ROWS, SETTINGS, run=tmp_path / "a", cache=None)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["shuffle", "tiles"])
def test_the_smolvlm_class_goes_through_both_stages_and_reloads(kind, tmp_path):
    loaded = tiny(kind)
    eye, words = tensors(tower_of(loaded.model)), tensors(loaded.model.model.text_model)
    one = train_projector(loaded, ROWS, SETTINGS, run=tmp_path / "one", cache=tmp_path / "features")
    assert one.record["trained_parameters"] == 4 * 64 * 128
    assert same(tensors(one.loaded.model.model.text_model), words)
    two = train_instruct(one.loaded, MORE, SETTINGS, run=tmp_path / "two", cache=tmp_path / "features")
    assert same(tensors(tower_of(two.loaded.model)), eye)
    again = load_model(save_spliced(two, tmp_path / "whole"), four_bit=False)
    assert type(again.model).__name__ == "SmolVLMForConditionalGeneration"
    ours, reloaded = (answer_pictures(one, CHATS[:3], max_new_tokens=3) for one in (two.loaded, again))
    assert ours == reloaded


def test_tiles_read_a_digit_that_is_too_small_for_one_view(tmp_path):
    """Unseen scans on a canvas twice as wide and high, in one view seven pixels; chance is .1."""
    rows = {}
    for split, count in (("train", 1920), ("test", 120)):
        rows[split] = scene_chats(count, tmp_path / split, kinds=["number"], seed=1, split=split, tiles=2)
    tests = {name: control_rows(rows["test"], name) for name in ("image", "blank", "shuffled")}
    settings = VISION_PRESETS["nano-vision"].instruct_stage
    right = {}
    for tiles in (4, 0):
        look = {"projector": "pixel_shuffle", "shuffle_factor": 1, "tiles": tiles}
        answers = train_and_answer(
            partial(splice, "nano-siglip", "nano", **look),
            tests,
            instruct=(make_chats(rows["train"]), settings),
            run=tmp_path / str(tiles),
            seed=1,
            cache=tmp_path / "features",
            max_new_tokens=6,
        )
        for name, said in answers.items():
            hits = [answer == row[1]["content"] for answer, row in zip(said, rows["test"], strict=True)]
            right[tiles, name] = sum(hits) / len(hits)
    assert right.pop((4, "image")) > 0.6
    assert max(right.values()) < 0.35, right


def test_both_stages_over_a_4_bit_base_merge_into_its_16_bit_weights(tmp_path):
    base = save_spliced(tiny(), tmp_path / "base")
    loaded = load_model(base, four_bit=True, max_length=128)
    assert loaded.four_bit_share > 0.3
    one = train_projector(loaded, ROWS, SETTINGS, run=tmp_path / "one", cache=tmp_path / "features")
    assert one.loaded.model.is_quantized
    two = train_instruct(one.loaded, ROWS, SETTINGS, run=tmp_path / "two", cache=tmp_path / "features")
    again = Run(two.folder, two.record).load_model()  # base and adapter from disk
    assert logits(again).equal(logits(two.loaded))
    whole = load_model(save_spliced(two, tmp_path / "whole"), four_bit=False)
    apart = (logits(whole) - logits(two.loaded)).std() / logits(two.loaded).std()
    assert apart < 0.5  # what rounding to 4 bit does
    for name, tensor in tensors(projector_of(whole.model)).items():
        assert torch.equal(tensor, load_file(two.adapter / "adapter_model.safetensors")[PROJECTOR + name])


PROJECTOR = "base_model.model.model.multi_modal_projector."


def interrupt(lines):
    if lines[-1]["step"] == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize("stage", [train_projector, train_instruct])
def test_an_interrupted_stage_goes_on_with_equal_bytes(stage, tmp_path, capsys):
    loaded, features = tiny(), tmp_path / "features"
    start = tensors(projector_of(loaded.model))
    with pytest.raises(KeyboardInterrupt):
        stage(loaded, ROWS, SETTINGS, run=tmp_path / "a", watch=interrupt, cache=features)
    assert newest_whole_checkpoint(tmp_path / "a" / "checkpoints")
    assert same(tensors(projector_of(loaded.model)), start)  # the model is as it was
    resumed = stage(loaded, ROWS, SETTINGS, run=tmp_path / "a", cache=features)
    straight = stage(tiny(), ROWS, SETTINGS, run=tmp_path / "b", cache=features)
    name = "projector.safetensors" if stage is train_projector else "adapter/adapter_model.safetensors"
    assert (resumed.folder / name).read_bytes() == (straight.folder / name).read_bytes()
    assert [line["step"] for line in resumed.metrics] == [1, 2, 3, 4]


def test_a_stage_that_breaks_leaves_the_projector_in_its_type(tmp_path):
    """It is trained in float32 beside a model in 16 bit; here that breaks the first pass, for want of autocast."""
    loaded = tiny()
    loaded.model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"):
        train_projector(loaded, ROWS, SETTINGS, run=tmp_path / "a")
    assert {tensor.dtype for tensor in projector_of(loaded.model).parameters()} == {torch.bfloat16}


IN_A_CHILD = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from test_vision_train import ROWS, SETTINGS, tiny, train_projector
def die(lines):
    if lines[-1]["step"] == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
train_projector(tiny(), ROWS, SETTINGS, run=sys.argv[2], watch=die, cache=sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_stage_goes_on_with_equal_bytes(tmp_path):
    """All of it in processes of their own: what other tests of this one have patched can move the last bit."""

    def train(run, *, die_at=0):
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, str(tmp_path / run), str(tmp_path / "features"), str(die_at)]
        return subprocess.run([sys.executable, "-c", IN_A_CHILD, *paths], capture_output=True, env=os.environ)

    killed = train("a", die_at=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    (next((tmp_path / "features").glob("*/*.safetensors"))).write_bytes(b"cut")
    for run in ("a", "b"):
        assert train(run).returncode == 0
    one, other = (tmp_path / run / "projector.safetensors" for run in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()


# --- prepared, and in several processes ---------------------------------------------------------------------
ALONE = replace(SETTINGS, batch_size=2, epochs=4, accumulation=4, lora=LoraSettings(rank=4, alpha=8, dropout=0.0))
TOGETHER = replace(ALONE, accumulation=2)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ironlogic.training")


def torchrun(folder, *, kill_at=0):
    """What a user types, in a process of its own; at that step all of its trainings are killed. What it printed."""
    root, results = Path(__file__).resolve().parent.parent, folder.parent / "results"
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(root)])
    environ = os.environ | {
        "PYTHONPATH": paths,
        "IRONLOGIC_BACKEND": "transformers",
        "IRONLOGIC_RUNS": str(results),
    }
    command, printed = [sys.executable, *TORCHRUN, str(folder)], []
    with open(folder.parent / "errors.txt", "w+") as errors:
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True)
        for line in process.stdout:
            printed.append(line)
            if line.startswith(f"step {kill_at} of"):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
        process.wait()
        errors.seek(0)
        assert (process.returncode == 0) == (not kill_at), errors.read()[-3000:]
    return "".join(printed)


def test_two_processes_train_both_stages_as_one_with_twice_the_accumulation(tmp_path, monkeypatch):
    """Stage 2 is killed and goes on. One process adds the same numbers up in another order, by which a float32
    changes in its seventh digit. Adam divides by small numbers: eight steps later it is the loss' sixth."""
    monkeypatch.setenv("IRONLOGIC_RUNS", str(tmp_path / "results"))
    eyes = save_spliced(splice("nano-vision", "nano", max_length=128, seed=5), tmp_path / "eyes")
    mixed = make_chats(conversations(2)[2:])  # two rows of text share a batch: the projector sits it out
    folders, runs = {}, {}
    for name, settings in (("together", TOGETHER), ("alone", ALONE)):
        options = {"settings": settings, "four_bit": False}
        one = prepare_sft(eyes, ROWS, run=tmp_path / f"{name}-1", stage="projector", **options)
        two = prepare_sft(one, mixed, run=tmp_path / f"{name}-2", stage="instruct", **options)
        folders[name] = one, two
    with pytest.raises(RunError, match="together-1: this run has not finished"):
        train_prepared(folders["together"][1])
    runs["alone"] = [train_prepared(folder) for folder in folders["alone"]]
    (file,) = (tmp_path / "results" / "features").glob("*/*.safetensors")
    file.unlink()
    first, second = folders["together"]
    printed = torchrun(first)
    looked_at = file.stat().st_mtime_ns
    torchrun(second, kill_at=2)
    resumed = torchrun(second)
    assert "step 1 of 8" not in resumed
    for text in (printed, resumed):
        assert text.count("step 8 of 8") == text.count("finished: ") == 1, "one process alone speaks"
    runs["together"] = [open_run(folder) for folder in folders["together"]]
    for alone, together in zip(*runs.values(), strict=True):
        assert [run.record["processes"] for run in (alone, together)] == [1, 2]
        assert [line["step"] for line in together.metrics] == list(range(1, 9))
        for name, apart in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 0)):
            ours, theirs = ([line[name] for line in run.metrics] for run in (together, alone))
            assert ours == pytest.approx(theirs, rel=apart)
    one, two = runs["together"]
    assert file.stat().st_mtime_ns == looked_at
    begun = one.load_model()
    assert same(tensors(projector_of(begun.model)), load_file(one.folder / "projector.safetensors"))
    again, theirs = two.load_model(), runs["alone"][1].loaded
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-3, atol=1e-3)


def test_what_cant_be_prepared_is_refused(runs, tmp_path):
    one, *_ = runs
    for options, message in (
        ({"stage": "projektor"}, "stage is 'projektor'; expected sft, projector or instruct"),
        ({"stage": "instruct", "burden": Burden()}, "a burden with stage 'instruct'"),
    ):
        with pytest.raises(RunError, match=message):
            prepare_sft("nano", ROWS, SETTINGS, run=tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
    in_memory = prepare_sft(one.folder, MORE, RATES, run=tmp_path / "b", stage="instruct")
    with pytest.raises(RunError, match="holds a projector alone.*save_spliced"):
        train_prepared(in_memory)
    blind = prepare_sft("nano", ROWS, RATES, run=tmp_path / "c", stage="projector")
    with pytest.raises(SpliceError, match="got Qwen3ForCausalLM"):
        train_prepared(blind)


def test_a_splice_in_4_bit_is_saved_in_16_and_whatever_else_lies_there_stays(tmp_path):
    loaded = splice("nano-vision", "nano", four_bit=True, seed=5)
    whole = save_spliced(loaded, tmp_path / "whole")
    again = load_model(whole, four_bit=False)
    assert same(tensors(projector_of(again.model)), tensors(projector_of(loaded.model)))
    plain = splice("nano-vision", "nano", four_bit=False, seed=5)
    assert same(tensors(again.model), tensors(plain.model))
    assert save_spliced(plain, whole) == whole  # its own may be written anew
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="holds something that save_spliced did not write"):
        save_spliced(plain, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
