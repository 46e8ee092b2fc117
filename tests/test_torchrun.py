"""A run folder carries its stage: trained from the command line, by one process and by two, it is the same run."""

import os
import subprocess
import sys
from dataclasses import replace

from ironlogic.burden import Burden
from ironlogic.data.problems import make_tasks, task_chat
from ironlogic.models import load_model
from ironlogic.presets import LoraSettings, TrainSettings
from ironlogic.training.runs import RunError, open_run, read_metrics
from ironlogic.training.sft import main, prepare_sft, train_prepared, train_sft

import datasets
import pytest
import torch
from safetensors.torch import load_file

SETTINGS = TrainSettings(
    learning_rate=5e-3,
    batch_size=4,
    accumulation=1,
    max_length=128,
    log_steps=1,
    save_steps=50,
    lora=LoraSettings(rank=4, alpha=8),
)
CHATS = [task_chat(task) for task in make_tasks(32, seed=1)]


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_prepared_folder_trains_to_the_same_bytes(tmp_path):
    rows = datasets.Dataset.from_dict({"messages": CHATS[:16], "row": list(range(100, 116)), "other": ["x"] * 16})
    folder = prepare_sft("nano", rows, SETTINGS, run=tmp_path / "prepared", burden=Burden())
    assert sorted(path.name for path in folder.iterdir()) == ["chats.jsonl", "stage.json"]
    prepared = train_prepared(folder)
    direct = train_sft(load_model("nano", max_length=128), rows, SETTINGS, run=tmp_path / "direct", burden=Burden())
    for name in ("stage.json", "chats.jsonl"):
        assert (folder / name).read_bytes() == (direct.folder / name).read_bytes()
    assert [line["loss"] for line in prepared.metrics] == [line["loss"] for line in direct.metrics]
    ours, theirs = weights(folder), weights(direct.folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert train_prepared(folder).record == prepared.record  # finished: not trained again


def test_another_stage_in_a_prepared_folder_is_refused(tmp_path):
    prepare_sft("nano", CHATS, SETTINGS, run=tmp_path / "a", burden=Burden())
    prepare_sft("nano", CHATS, SETTINGS, run=tmp_path / "a", burden=Burden())  # the same one again is fine
    with pytest.raises(RunError, match="prepared for another run: it differs in settings"):
        prepare_sft("nano", CHATS, replace(SETTINGS, seed=1), run=tmp_path / "a", burden=Burden())
    with pytest.raises(RunError, match="differs in stage, burden"):
        train_sft(load_model("nano"), CHATS, SETTINGS, run=tmp_path / "a")
    assert not (tmp_path / "a" / "run.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("stage.json", None, "no stage.json here; expected a folder written by train_sft or prepare_sft"),
        ("chats.jsonl", None, "no chats.jsonl here"),
        ("stage.json", "{", "damaged.*prepare it again"),
        ("stage.json", "{}", "damaged.*settings"),
        ("chats.jsonl", "{", "damaged"),
        ("chats.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "not the rows that stage.json names"),
    ],
)
def test_changed_folder_is_refused(tmp_path, name, content, message):
    folder = prepare_sft("nano", CHATS[:4], SETTINGS, run=tmp_path / "x")
    (folder / name).write_text(content) if content else (folder / name).unlink()
    with pytest.raises(RunError, match=message):
        train_prepared(folder)


@pytest.mark.slow
def test_another_number_of_processes_does_not_go_on(tmp_path, monkeypatch):
    def stop(lines):
        raise KeyboardInterrupt

    loaded = load_model("nano", max_length=128)
    with pytest.raises(KeyboardInterrupt):
        train_sft(loaded, CHATS[:8], SETTINGS, run=tmp_path / "cut", watch=stop)
    monkeypatch.setattr("ironlogic.training.sft.PROCESSES", 2)
    with pytest.raises(RunError, match="was begun with 1 process, here are 2"):
        train_prepared(tmp_path / "cut")


def command(*words):
    return subprocess.run([sys.executable, *words], env=os.environ, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(tmp_path):
    two = prepare_sft("nano", CHATS, SETTINGS, run=tmp_path / "two", burden=Burden())
    one = prepare_sft("nano", CHATS, replace(SETTINGS, accumulation=2), run=tmp_path / "one", burden=Burden())
    alone = command("-m", "ironlogic.training.sft", str(one))
    assert alone.returncode == 0, alone.stderr[-2000:]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    both = command(*torchrun, "-m", "ironlogic.training.sft", str(two))
    assert both.returncode == 0, both.stderr[-2000:]
    runs = [open_run(folder) for folder in (one, two)]
    assert [run.record["processes"] for run in runs] == [1, 2]
    lines = [read_metrics(folder) for folder in (one, two)]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]  # written once, by the first process
    assert both.stdout.count("step 2 of 4") == both.stdout.count("finished: ") == 1
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [line[name] for line in lines[1]] == pytest.approx([line[name] for line in lines[0]], rel=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-4, atol=1e-6)


def test_command_line_says_what_is_wrong_in_one_line(tmp_path, monkeypatch):
    def refused(folder):
        monkeypatch.setattr(sys, "argv", ["train", str(folder)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    assert refused(tmp_path) == (
        f"{tmp_path}: no stage.json here; expected a folder written by train_sft or prepare_sft"
    )
    folder = prepare_sft("no-such-model", CHATS[:4], SETTINGS, run=tmp_path / "x")
    assert "no such folder, and not a hub name" in refused(folder)
