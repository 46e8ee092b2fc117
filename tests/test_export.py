"""What leaves the workbench computes what was trained; what went wrong is noticed, and nothing earlier is lost."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from ironlogic.data.problems import make_tasks
from ironlogic.export import (
    ExportError,
    check_export,
    export_gguf,
    export_lora_gguf,
    llama_answers,
    merge_adapter,
    open_export,
    write_modelfile,
)
from ironlogic.export.readers import has_llama
from ironlogic.generate import generate, stream
from ironlogic.models import DATA, add_lora, load_model
from ironlogic.training.grpo import GrpoSettings, train_grpo
from ironlogic.training.runs import save_adapter
from ironlogic.vision.splice import splice

import gguf
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from trained import CHATS, LORA, SETTINGS, train_ft

slow = pytest.mark.slow
NANO = DATA / "nano"
PROMPTS = [task.prompt for task in make_tasks(20, seed=5, split="test")]


@pytest.fixture
def run(small_run):
    return small_run


@pytest.fixture
def merged(small_merge):
    return small_merge


@pytest.fixture(scope="module")
def q8(small_merge, tmp_path_factory):
    return export_gguf(small_merge, tmp_path_factory.mktemp("gguf"), quantization="q8_0")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A spliced model of random eyes, an adapter on it, and both merged."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    eyes = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
    maker = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    place = tmp_path_factory.mktemp("seeing")
    spliced = splice((transformers.CLIPVisionModel(eyes).eval(), maker), "nano")
    spliced.model.save_pretrained(place / "spliced")
    spliced.processor.save_pretrained(place / "spliced")
    adapter = add_random_adapter(load_model(place / "spliced", four_bit=False), place / "run")
    return place / "spliced", adapter, merge_adapter(adapter, place / "merged")


def add_random_adapter(loaded, folder, seed=1):
    """An adapter that changes something, without training."""
    adapted = add_lora(loaded, LORA, seed=seed)
    torch.manual_seed(seed)
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    save_adapter(adapted, folder)
    return folder / "adapter"


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def answers(model, prompts=PROMPTS):
    return [c.text for c in generate(model, prompts, max_new_tokens=40)]


# --- merged -------------------------------------------------------------------------------------------------
def test_merged_weights_are_base_plus_update(run, merged):
    base, ours = load_file(NANO / "model.safetensors"), load_file(merged / "model.safetensors")
    pairs = load_file(run.adapter / "adapter_model.safetensors")
    stem = "base_model.model.{}.lora_{}.weight"
    moved = [name.removesuffix(".weight") for name in ours if stem.format(name[:-7], "A") in pairs]
    assert len(moved) == 4 * 7
    for name in moved:
        a, b = (pairs[stem.format(name, half)].double() for half in "AB")
        torch.testing.assert_close(ours[f"{name}.weight"].double(), base[f"{name}.weight"].double() + 2 * b @ a)
    rest = set(ours) - {f"{name}.weight" for name in moved}
    assert all(torch.equal(ours[name], base[name]) for name in rest)
    noted = json.loads((merged / "export.json").read_text())["merged"]
    assert (noted["run"], noted["base"], noted["comparisons"][0]["kind"]) == ("ft", "nano", "f32")
    assert not [p for p in merged.parent.iterdir() if p != merged], "a helper's folder is left"


@slow
def test_exports_are_compared_beside_unsloths_patches(run, merged, monkeypatch):
    """On a card the patched rotary embedding hands out tensors that lie there, also to a plain model on the CPU."""
    rotary = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding
    plain = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda *given, **named: [t.to("meta") for t in plain(*given, **named)])
    with pytest.raises(RuntimeError, match="device"):
        check_export(merged, run)
    monkeypatch.setattr("ironlogic.models._unsloth_is_on_the_card", lambda: True)
    (found,) = check_export(merged, run)
    assert (found.kind, found.top1) == ("f32", 1.0)
    assert found.mean_kl < 1e-6
    with pytest.raises(ExportError, match="no such folder"):
        check_export(merged, merged.parent / "nothing")


@slow
def test_a_merge_that_went_wrong_is_found(run, merged, tmp_path):
    with pytest.raises(ExportError, match="nano, read by transformers, is not the model it was made from"):
        check_export(NANO, run)  # as if the adapter had been forgotten
    broken = shutil.copytree(merged, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.self_attn.o_proj.weight"][:8] *= 1.5
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="broken.*Don't use it"):
        check_export(broken, run)


@slow
@pytest.mark.parametrize("packed", [False, True], ids=["bfloat16", "4-bit"])
def test_bases_of_other_types_come_out_in_bfloat16(tmp_path, packed):
    base = load_model("nano", four_bit=packed, backend="transformers")
    (base.model if packed else base.model.bfloat16()).save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    adapter = add_random_adapter(load_model(NANO), tmp_path / "run")
    out = merge_adapter(adapter, tmp_path / "merged", base=tmp_path / "base")
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    (found,) = check_export(out, out)
    assert found.kind == "bf16"


@slow
def test_plain_transformers_in_a_process_of_its_own_loads_it_and_sees(run, merged, seeing, tmp_path):
    script = """
import sys, transformers as t
from PIL import Image
words, eyes, question, picture = sys.argv[1:]
def ask(auto, reader, place, content, **more):
    model, reader = auto.from_pretrained(place).eval(), reader.from_pretrained(place)
    chat = [dict(role="user", content=content)]
    text = reader.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = reader(text=text, return_tensors="pt", **more)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    print(type(model).__name__, reader.decode(out, skip_special_tokens=True).strip(), sep="|")
ask(t.AutoModelForCausalLM, t.AutoTokenizer, words, question)
ask(t.AutoModelForImageTextToText, t.AutoProcessor, eyes, [dict(type="image"), dict(type="text", text=question)],
    images=[Image.open(picture)])
"""
    _, adapter, whole = seeing
    picture = Image.radial_gradient("L").convert("RGB")
    picture.save(tmp_path / "x.png")
    command = [sys.executable, "-c", script, merged, whole, PROMPTS[0], tmp_path / "x.png"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    (read,) = generate(load_model(run.adapter, four_bit=False), PROMPTS[:1], max_new_tokens=8)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS[0]}]}]
    loaded = load_model(adapter, four_bit=False)
    seen = stream(loaded, asked, lambda _: None, pictures=[picture], max_new_tokens=8)
    assert said == [
        f"Qwen3ForCausalLM|{read.text.strip()}",
        f"LlavaForConditionalGeneration|{seen.text.strip()}",
    ]


@slow
def test_a_spliced_model_is_merged_whole_and_its_gguf_wants_a_checkout(seeing, tmp_path):
    folder, adapter, out = seeing
    (found,) = check_export(out, adapter)
    assert found.mean_kl < 1e-6
    with pytest.raises(ExportError, match="is not the model it was made from"):
        check_export(folder, adapter)
    with pytest.raises(ExportError, match="eye of a splice is written by a llama.cpp checkout"):
        export_gguf(out, tmp_path / "x.gguf", llama_cpp="")
    with pytest.raises(ExportError, match="adapts a model that sees"):
        export_lora_gguf(adapter, tmp_path / "x.gguf")
    assert merge_adapter(folder, tmp_path / "copy").is_dir()  # nothing to merge: a checked copy


# --- refusals, and what lies there already ------------------------------------------------------------------
def test_a_wrong_adapter_is_refused(run, tmp_path):
    config = transformers.AutoConfig.from_pretrained(NANO)
    for change in (
        {"num_hidden_layers": 5, "layer_types": None},
        {"num_hidden_layers": 3, "layer_types": None},
        {"intermediate_size": 256},
    ):
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(config.to_dict() | change)))
        model.save_pretrained(tmp_path / "other")
        transformers.AutoTokenizer.from_pretrained(NANO).save_pretrained(tmp_path / "other")
        with pytest.raises(ExportError, match="was not trained on .*name its base"):
            merge_adapter(run, tmp_path / "out", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_truncated_weights_are_named(run, merged, tmp_path):
    before = digest(merged)
    cut = shutil.copytree(run.adapter, tmp_path / "adapter") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors is cut short or damaged"):
        merge_adapter(cut.parent, merged)
    base = shutil.copytree(NANO, tmp_path / "base") / "model.safetensors"
    base.write_bytes(base.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"base/model\.safetensors is cut short"):
        merge_adapter(run, merged, base=base.parent)
    assert digest(merged) == before


@slow
def test_what_is_there_is_not_overwritten_unless_it_is_an_export(run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (mine / "export.json").write_text(json.dumps({"ft-q8_0.gguf": {}}))  # GGUF files lie here
    with pytest.raises(ExportError, match="holds something that is no earlier merge"):
        merge_adapter(run, mine)
    (mine / "export.json").write_text("{")
    with pytest.raises(ExportError, match=r"export\.json is damaged"):
        merge_adapter(run, mine)
    for own in (run.adapter, run.folder, NANO):
        with pytest.raises(ExportError, match="holds"):
            merge_adapter(run, own)
    with pytest.raises(ExportError, match="can't be written"):
        export_lora_gguf(run, mine / "thesis.txt" / "x.gguf")
    out = merge_adapter(run, tmp_path / "out")
    (out / "old").write_text("of an earlier export")
    assert not (merge_adapter(run, out) / "old").exists()


def test_room_is_asked_for_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10**6))
    for export in (merge_adapter, export_gguf):
        with pytest.raises(ExportError, match="of disk.*nothing was written"):
            export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a disk of our own needs root on Linux")
def test_a_full_disk_leaves_the_earlier_artefact_whole(run, merged, tmp_path, monkeypatch):
    """A real disk that fills up while it is written, as if the check before had been right at its time."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        merge_adapter(run, disk / "merged")
        export_gguf(merged, disk / "small.gguf")
        before = digest(disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40))
        with pytest.raises(ExportError, match="merged can't be written.*what was there before is untouched"):
            merge_adapter(run, disk / "merged")
        (disk / "filler").write_bytes(bytes(2**20))
        with pytest.raises(ExportError, match="small.gguf can't be written.*what was there before is untouched"):
            export_gguf(merged, disk / "small.gguf", quantization="f16")
        (disk / "filler").unlink()
        assert digest(disk) == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- GGUF ---------------------------------------------------------------------------------------------------
@slow
def test_a_damaged_gguf_is_found(merged, q8, tmp_path):
    broken = Path(shutil.copy(q8, tmp_path / "broken.gguf"))
    tensors = gguf.GGUFReader(broken, "r+").tensors
    next(t for t in tensors if t.name == "blk.1.ffn_down.weight").data[:] = 0
    with pytest.raises(ExportError, match=r"broken\.gguf, read by transformers, is not the model"):
        check_export(broken, merged)
    broken.write_bytes(q8.read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"broken\.gguf can't be read"):
        check_export(broken, merged)


def test_what_can_t_be_written_is_told_with_the_command_to_run_later(merged, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(
        ExportError, match=r"not a dense Qwen3.*convert_hf_to_gguf\.py MERGED --outfile moe\.gguf --outtype f16"
    ):
        export_gguf("nano-moe", out / "moe.gguf", quantization="f16")
    with pytest.raises(ExportError, match="expected f16, q8_0 or q4_k_m"):
        export_gguf(merged, out, quantization="q3")
    with pytest.raises(ExportError, match=r"no checkout of llama\.cpp"):
        export_gguf("nano-moe", out, llama_cpp=tmp_path)
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('pre-tokenizer not recognized')")
    with pytest.raises(ExportError, match="pre-tokenizer not recognized"):
        export_gguf("nano-moe", out, llama_cpp=tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ExportError, match=r"llama-quantize MODEL-f16\.gguf MODEL-q4_k_m\.gguf Q4_K_M"):
        export_gguf(merged, out, quantization="q4_k_m")
    monkeypatch.setattr("ironlogic.export.readers.modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES", [])
    monkeypatch.setattr("ironlogic.export.readers.has_llama", lambda: False)
    with pytest.raises(ExportError, match="can't be checked here"):  # nothing is published unread
        export_gguf(merged, out)
    assert list(out.iterdir()) == []


def test_lora_file_and_modelfile(run, merged, q8, tmp_path):
    reader = gguf.GGUFReader(export_lora_gguf(run, tmp_path))
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    pairs = load_file(run.adapter / "adapter_model.safetensors")
    assert len(reader.tensors) == len(pairs)
    stored = next(t for t in reader.tensors if t.name == "blk.3.attn_q.weight.lora_b")
    ours = pairs["base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(torch.tensor(stored.data), ours)
    with pytest.raises(ExportError, match="no adapter"):
        export_lora_gguf(merged, tmp_path)
    text = write_modelfile(q8, merged, system="Think first.").read_text()
    assert text.startswith(f"FROM ./{q8.name}\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'SYSTEM """Think first."""' in text


@slow
def test_from_fragments_to_gguf(small_run, tmp_path):
    """FT -> SFT -> GRPO -> merged -> GGUF: the same answers in the end, by llama.cpp too where it is installed."""
    few, settings = CHATS[:16], replace(SETTINGS, learning_rate=1e-3)
    polished = train_ft(tmp_path / "sft", source=small_run.adapter, chats=few, settings=settings, burden=None)
    grpo = GrpoSettings(
        steps=2, generations=4, batch_size=8, accumulation=1, max_new_tokens=32, learning_rate=1e-3, lora=LORA
    )
    rewarded = train_grpo(polished.loaded, make_tasks(16, seed=2), grpo, run=tmp_path / "grpo")
    merged = merge_adapter(rewarded, tmp_path / "merged")
    ours = answers(load_model(rewarded.adapter, four_bit=False))
    assert ours == answers(load_model(merged, four_bit=False))
    for quantization, least in (("f16", 20), ("q8_0", 18)):
        path = export_gguf(merged, tmp_path / "gguf", quantization=quantization)
        found = check_export(path, merged)
        assert {c.kind for c in found} == {quantization}
        assert min(c.top1 for c in found) > 0.95
        told = {"transformers": answers(open_export(path, like=merged))}
        if has_llama():
            told["llama.cpp"] = llama_answers(path, PROMPTS, like=merged, max_new_tokens=40)
        same = {reader: sum(map(str.__eq__, ours, theirs)) for reader, theirs in told.items()}
        print(quantization, same, "of 20 answers the same")
        assert min(same.values()) >= least
    assert sorted(p.name for p in (tmp_path / "gguf").iterdir()) == (
        ["export.json", "merged-f16.gguf", "merged-q8_0.gguf"]
    )
    with pytest.raises(ExportError, match="is not the model"):
        check_export(NANO, rewarded)  # the chain trained something
