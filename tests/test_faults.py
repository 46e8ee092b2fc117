"""What breaks a run from outside: it is killed again and again, its model folder is incomplete or hostile.

Each fault ends in the bytes of an undisturbed run, or in one clear message.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from ironlogic.data.chats import make_chats
from ironlogic.data.problems import make_tasks, task_chat
from ironlogic.models import DATA, ModelError, load_model
from ironlogic.training.runs import read_metrics
from ironlogic.vision.splice import splice
from ironlogic.vision.train import save_spliced

import pytest
import torch
from jinja2.exceptions import SecurityError
from trained import CHATS, SETTINGS, train_ft

pytestmark = pytest.mark.slow
KILLS = 3


def train(folder: Path):
    """30 optimizer steps."""
    chats = make_chats(map(task_chat, make_tasks(120, seed=1)))
    return train_ft(folder, chats=chats, settings=replace(SETTINGS, save_steps=2))


def in_a_child(work, *arguments) -> int:
    """The work in a copy of this process, which has every package loaded already: seconds saved at each kill."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return pid


def writes_a_checkpoint(folder: Path) -> bool:
    """One is there without the file that is written last."""
    found = list((folder / "checkpoints").glob("checkpoint-*"))
    return any(not (path / "trainer_state.json").exists() for path in found)


def harness(folder: Path, seed: int) -> None:
    """Kills a run `KILLS` times, half of them while it writes a checkpoint, and lets it finish."""
    rng, while_writing = random.Random(seed), 0
    for kill in range(KILLS):
        pid, before = in_a_child(train, folder), len(read_metrics(folder))
        end = time.monotonic() + 120
        while len(read_metrics(folder)) <= before and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        while kill % 2 and not writes_a_checkpoint(folder) and time.monotonic() < end:
            pass
        os.kill(pid, signal.SIGKILL)
        while_writing += writes_a_checkpoint(folder)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it ended before it was killed"
    pid = in_a_child(train, folder)
    assert os.waitpid(pid, 0)[1] == 0, "the last child failed"
    print(f"{while_writing} kills while a checkpoint was written")


def test_kills_leave_the_bytes_of_an_undisturbed_run(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code = f"from test_faults import *; train(Path({str(whole)!r})); harness(Path({str(killed)!r}), 1)"
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), *sys.path])
    environ = os.environ | {"PYTHONPATH": paths, "IRONLOGIC_BACKEND": "transformers"}  # imports faster
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split(" kills while")[0].split()[-1]) >= 1
    name = "adapter/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (killed / name).read_bytes()
    steps = [line["step"] for line in read_metrics(killed)]
    assert steps == list(range(1, len(steps) + 1)), "no step is missing from the metrics and none is there twice"
    same = [[line["loss"] for line in read_metrics(folder)] for folder in (whole, killed)]
    assert same[0] == same[1]


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_model_folder_that_lacks_a_file_is_one_message(tmp_path, missing):
    folder = tmp_path / "nano"
    shutil.copytree(DATA / "nano", folder)
    (folder / missing).unlink()
    if missing == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def stranger(tmp_path):
    """A copy of nano to be made hostile, and the file that its code would leave."""
    shutil.copytree(DATA / "nano", tmp_path / "model")
    return tmp_path / "model", tmp_path / "ran"


def test_weights_in_a_pickle_are_not_read(stranger):
    folder, ran = stranger

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Command()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors file in it; weights in pickles are not read"):
        load_model(folder)
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nano"}))
    torch.save({"x": Command()}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="adapter: no .safetensors file"):
        load_model(adapter)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["qwen3", "unheard_of"])
def test_code_in_a_model_folder_does_not_run_and_nobody_is_asked(stranger, monkeypatch, kind):
    folder, ran = stranger
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the keyboard"))
    if kind == "qwen3":
        assert type(load_model(folder).model).__module__.startswith("transformers.")
    else:
        with pytest.raises(ModelError, match="custom code"):
            load_model(folder)
    assert not ran.exists()


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json"])
def test_code_of_a_processor_does_not_run_and_nobody_is_asked(tmp_path, monkeypatch, file):
    folder, ran = save_spliced(splice("nano-vision", "nano"), tmp_path / "whole"), tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\n")
    known = json.loads((folder / file).read_text())
    classes = {"AutoProcessor": "theirs.P", "AutoTokenizer": ["theirs.T", None]}
    theirs = {"processor_class": "P", "tokenizer_class": "T", "auto_map": classes}
    (folder / file).write_text(json.dumps(known | theirs))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the keyboard"))
    with contextlib.suppress(ModelError):  # refused or read by transformers' own class
        assert type(load_model(folder, four_bit=False).processor).__module__.startswith("transformers.")
    assert not ran.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.popen('touch RAN').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(messages[0]) }}",
    ],
)
def test_a_hostile_chat_template_is_stopped(stranger, template):
    folder, ran = stranger
    (folder / "chat_template.jinja").write_text(template.replace("RAN", str(ran)))
    tokenizer = load_model(folder).tokenizer
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    assert not ran.exists()
