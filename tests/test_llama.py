"""llama.cpp itself, where it is installed: the same tokens, distributions and greedy answers as transformers."""

from importlib.util import find_spec

from ironlogic.data.problems import make_tasks, task_chat
from ironlogic.export import ExportError, check_export, export_gguf, export_lora_gguf, merge_adapter
from ironlogic.generate import generate
from ironlogic.llama import convert, find_quantizer, gguf_readers, llama_answers
from ironlogic.models import DATA, load_model
from ironlogic.presets import LoraSettings, TrainSettings
from ironlogic.training.sft import train_sft

import gguf
import pytest

NANO = DATA / "nano"
PROMPTS = [task.prompt for task in make_tasks(20, seed=5, split="test")]
needs_llama = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="no llama.cpp here (pip install llama-cpp-python compiles it)"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = TrainSettings(
        learning_rate=5e-3, batch_size=4, accumulation=1, max_length=128, lora=LoraSettings(rank=4, alpha=8)
    )
    chats = [task_chat(task) for task in make_tasks(16, seed=1)]
    return train_sft(load_model("nano"), chats, settings, run=tmp_path_factory.mktemp("runs") / "ft")


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    return merge_adapter(run, tmp_path_factory.mktemp("exports") / "merged")


@pytest.fixture(scope="module")
def answers(run):
    """Of the base in 32 bit with the adapter beside it, by transformers."""
    return [c.text for c in generate(load_model(run.adapter, four_bit=False), PROMPTS, max_new_tokens=72)]


@needs_llama
@pytest.mark.parametrize(("quantization", "equal"), [("f16", 20), ("q8_0", 18), ("q4_k_m", 15)])
def test_greedy_answers_are_those_of_transformers(merged, answers, tmp_path, quantization, equal):
    path = export_gguf(merged, tmp_path, quantization=quantization)
    found = check_export(path, merged)
    assert {c.reader for c in found} == {"transformers", "llama.cpp"}
    same = sum(a == b for a, b in zip(answers, llama_answers(path, PROMPTS, like=merged), strict=True))
    print(f"{quantization}: {same} of {len(PROMPTS)} answers the same; {found}")
    assert same >= equal


@needs_llama
def test_base_and_lora_file_together_are_the_adapter(run, answers, tmp_path):
    base = export_gguf("nano", tmp_path, quantization="f16")
    lora = export_lora_gguf(run, tmp_path)
    alone = llama_answers(base, PROMPTS, like=NANO)
    assert llama_answers(base, PROMPTS, like=NANO, lora=lora) == answers != alone


@needs_llama
def test_another_way_of_cutting_words_is_found(merged, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ironlogic.gguf_file._word_rule", lambda _: "qwen2"
    )  # single digits: nano has whole numbers
    with pytest.raises(ExportError, match=r"llama\.cpp cuts .* into other tokens"):
        export_gguf(merged, tmp_path, quantization="f16")


@pytest.mark.slow
def test_readers_of_a_file(tmp_path, monkeypatch):
    path = export_gguf("nano", tmp_path, quantization="q8_0")
    assert gguf_readers(path)[0] == "q8_0"
    assert "transformers" in gguf_readers(path)[1]
    reader = gguf.GGUFReader(path, "r+")
    reader.fields["qwen3.attention.key_length"].parts[-1][0] = 64
    reader.data.flush()
    assert "transformers" not in gguf_readers(path)[1], "its reader would take 128 for granted"
    path.write_bytes(b"GGUF")
    with pytest.raises(ExportError, match="cut short or damaged"):
        gguf_readers(path)


def test_tools_of_a_checkout(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="is no checkout"):
        convert(tmp_path, NANO, tmp_path / "x.gguf", "f16")
    tool = tmp_path / "build" / "bin" / "llama-quantize"
    tool.parent.mkdir(parents=True)
    tool.touch()
    assert find_quantizer(tmp_path) == tool
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))"
    )
    convert(tmp_path, NANO, tmp_path / "x.gguf", "f16")
    assert (tmp_path / "x.gguf").read_text() == f"{NANO} --outfile {tmp_path / 'x.gguf'} --outtype f16"
