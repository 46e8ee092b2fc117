"""GGUF files: written, converted, quantized; Ollama's Modelfile.

Dense Qwen3 models and adapters on them are written here, through the `gguf` package alone: no checkout of llama.cpp
and no compiler is needed, and one tensor is in memory at a time. Other architectures, scaled rotary positions and
other tokenizers than byte-level BPE with GPT-2's or Qwen2's way of cutting words need the converter of a llama.cpp
checkout; `why_not_gguf` says which of these is the reason. Converter and quantizer are programs that the user
names; nothing is downloaded or built. Files are read back by `readers`; whether one computes what its model
computes is `write.check_export`.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ironlogic import IronLogicError
from ironlogic.models import load_tokenizer

import gguf
import numpy as np
import peft
from jinja2 import TemplateError
from safetensors import safe_open

__all__ = ["ExportError", "plain_template", "why_not_gguf", "write_gguf"]

# How Qwen2 and Qwen3 cut a text into words before BPE
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Settings of a plain low-rank adapter; any other that isn't PEFT's default says that it is more than that
_OF_ANY_PAIR = set(
    "auto_mapping base_model_name_or_path exclude_modules inference_mode init_lora_weights layers_pattern "
    "layers_to_transform lora_alpha lora_dropout peft_version r revision target_modules task_type".split()
)
_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


class ExportError(IronLogicError, RuntimeError):
    """An artefact that can't be written or isn't what it should be; whatever was there before is untouched."""


def why_not_gguf(folder: Path) -> str:
    """Why this module can't write the model in that folder; "" when it can."""
    config = _json(folder / "config.json")
    if config.get("architectures") != ["Qwen3ForCausalLM"]:
        return f"it is a {' '.join(config.get('architectures') or ['model of no stated class'])}, not a dense Qwen3"
    if _rope(config).get("rope_type", "default") != "default" or config.get("use_sliding_window"):
        return "it scales its rotary positions or has sliding windows"
    if config.get("attention_bias"):
        return "its attention has biases"
    tokenizer = _json(folder / "tokenizer.json")
    if tokenizer.get("model", {}).get("type") != "BPE" or not _word_rule(tokenizer):
        return "its tokenizer is no byte-level BPE with GPT-2's or Qwen2's way of cutting words"
    return ""


def write_gguf(folder: Path, path: Path, *, quantization: Literal["f16", "q8_0"] = "f16") -> None:
    """The model and tokenizer of `folder` (safetensors) as one file; norms stay float32.

    q8_0: runs of 32 weights share a scale; a matrix whose width is no multiple of 32 stays float16. Raises
    `ExportError` when the model is none that this module knows, or has weights beyond the range of float16.
    """
    config, weights, names = _open_qwen3(folder, folder)
    kinds = {}
    writer = gguf.GGUFWriter(path, "qwen3")
    try:
        _describe_model(writer, config, folder.name, quantization)
        _describe_tokenizer(writer, folder, config["vocab_size"])
        for key, file in weights.items():
            shape = tuple(file.get_slice(key).get_shape())
            kind = kinds[key] = _kind(shape, quantization)
            size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
            writer.add_tensor_info(_gguf_name(names, key), shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, file in weights.items():
            values = file.get_tensor(key).float().numpy()
            if values.ndim > 1 and not np.abs(values).max(initial=0) <= 65504:
                raise ExportError(f"{key}: weights that are not finite, or beyond the range of float16 (65504)")
            writer.write_tensor_data(gguf.quantize(values, kinds[key]))
    finally:
        writer.close()


def write_lora_gguf(adapter: Path, base: Path, path: Path) -> None:
    """A PEFT adapter as a LoRA file for llama.cpp (`--lora`, Ollama's `ADAPTER`); float32, as it was trained.

    Raises `ExportError` when the base is no dense Qwen3 or the adapter has more than plain low-rank pairs.
    """
    _, weights, names = _open_qwen3(base, adapter)
    settings = _json(adapter / "adapter_config.json")
    if special := _beyond_pairs(settings):
        raise ExportError(f"{adapter}: {', '.join(special)} can't be written as a LoRA file; merge it")
    tied = _json(base / "config.json").get("tie_word_embeddings")
    writer = gguf.GGUFWriter(path, "qwen3")
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
        writer.add_name(adapter.resolve().parent.name)
        for key, file in weights.items():
            layer, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            if part not in ("A.weight", "B.weight"):
                raise ExportError(f"{adapter}: {key} is no low-rank pair")
            if tied and layer == "lm_head":
                raise ExportError(f"{adapter}: it changes the head, which the base ties to its embedding")
            name = f"{_gguf_name(names, layer + '.weight')}.lora_{part[0].lower()}"
            writer.add_tensor(name, file.get_tensor(key).float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _beyond_pairs(settings: dict[str, Any]) -> list[str]:
    """Names of an adapter's settings that make it more than low-rank pairs beside an unchanged base."""
    plain = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
    changed = [name for name, value in settings.items() if name not in _OF_ANY_PAIR and value != plain.get(name)]
    start = settings.get("init_lora_weights", True)
    return changed + ["init_lora_weights"] * (start not in (True, False, "gaussian"))


# --- what a file says about its model -----------------------------------------------------------------------
def _describe_model(writer: gguf.GGUFWriter, config: dict[str, Any], name: str, quantization: str) -> None:
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(_FILE_TYPES[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _describe_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> None:
    tokenizer, file = load_tokenizer(folder), _json(folder / "tokenizer.json")
    text = {i: token for token, i in tokenizer.get_vocab().items()}
    kinds = dict.fromkeys(text, gguf.TokenType.NORMAL)
    for i, added in tokenizer.added_tokens_decoder.items():
        kinds[i] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    every = range(max(vocabulary, len(text)))
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre(_word_rule(file))
    writer.add_token_list([text.get(i, f"[PAD{i}]") for i in every])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in every])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(plain_template(tokenizer.chat_template))


def _word_rule(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a tokenizer cuts words before BPE; "" when it is none of those known."""
    rule = tokenizer.get("pre_tokenizer") or {}
    parts = rule.get("pretokenizers", [rule])
    if any(part.get("add_prefix_space") for part in parts):
        return ""
    if [part.get("type") for part in parts] == ["ByteLevel"]:
        return "gpt-2" if parts[0].get("use_regex", True) else ""
    if [part.get("type") for part in parts] == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        return "qwen2" if parts[0]["pattern"].get("Regex") == _QWEN2_WORDS else ""
    return ""


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    old = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}  # before transformers 5
    return config.get("rope_parameters") or old


# --- tensors ------------------------------------------------------------------------------------------------
def _open_qwen3(base: Path, holder: Path) -> tuple[dict[str, Any], dict[str, Any], gguf.TensorNameMap]:
    """config.json of the base; the open file of every tensor in `holder` by the tensor's name; GGUF's names."""
    if reason := why_not_gguf(base):
        raise ExportError(f"{base}: {reason}")
    files = [safe_open(path, framework="pt") for path in sorted(holder.glob("*.safetensors"))]
    if not files:
        raise ExportError(f"{holder}: no .safetensors file here")
    config = _json(base / "config.json")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    return config, {key: file for file in files for key in file.keys()}, names  # noqa: SIM118


def _gguf_name(names: gguf.TensorNameMap, key: str) -> str:
    name = names.get_name(key, try_suffixes=(".weight",))
    if name is None:
        raise ExportError(f"the tensor {key} has no place in a GGUF file of Qwen3")
    return name


def _kind(shape: tuple[int, ...], quantization: str) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if quantization == "q8_0" and shape[-1] % 32 == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} can't be read: {error}") from None


# --- llama.cpp ----------------------------------------------------------------------------------------------
def convert(checkout: Path, folder: Path, path: Path, quantization: str, *options: str) -> None:
    """A model folder written as GGUF by the converter of a llama.cpp checkout, in a process of its own."""
    script = checkout / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise ExportError(f"{checkout} is no checkout of llama.cpp (no convert_hf_to_gguf.py)")
    call([sys.executable, script, folder, "--outfile", path, "--outtype", quantization, *options], path)


def find_quantizer(checkout: Path | None) -> Path:
    """llama-quantize of the checkout or on the PATH. Raises `ExportError` where there is neither."""
    places = [checkout / "llama-quantize", checkout / "build" / "bin" / "llama-quantize"] if checkout else []
    if on_path := shutil.which("llama-quantize"):
        places.append(Path(on_path))
    tool = next((place for place in places if place.is_file()), None)
    if tool is None:
        raise ExportError(
            "q4_k_m needs a quantizer. Export f16 here, and where llama.cpp is installed run: "
            "llama-quantize MODEL-f16.gguf MODEL-q4_k_m.gguf Q4_K_M"
        )
    return tool


def call(command: Sequence[Any], path: Path) -> None:
    """Runs a program that has to leave a file at `path`. Raises `ExportError` with its last words."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode or not path.is_file():
        last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise ExportError(f"{path.name} was not written; {Path(command[0]).name} said: {last}")


# --- chat templates elsewhere -------------------------------------------------------------------------------
def plain_template(template: str) -> str:
    """The chat template without transformers' own `generation` tags, which mark what is trained.

    >>> plain_template("{%- generation -%}x{% endgeneration %}")
    '{%- if true -%}x{% endif %}'
    """
    opened = re.sub(r"({%-?\s*)generation(\s*-?%})", r"\1if true\2", template)
    return re.sub(r"({%-?\s*)endgeneration(\s*-?%})", r"\1endif\2", opened)


# Families of chat templates, by what they make of the texts S, U, A, V of a system, user, assistant and user; with
# each, what of that is there for the system's text, and how Go's template engine writes the same.
_FAMILIES = {
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n": (  # ChatML: Qwen, SmolLM, nano
        "<|im_start|>system\nS<|im_end|>\n",
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}",
    ),
    "<start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nV<end_of_turn>\n": (  # Gemma: the system's text stands at the head of the user's
        "S\n\n",
        '{{- range $i, $m := .Messages }}{{ if eq .Role "system" }}<start_of_turn>user\n{{ .Content }}\n\n'
        '{{ else if eq .Role "assistant" }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n{{ else }}'
        '{{ if or (ne $i 1) (ne (index $.Messages 0).Role "system") }}<start_of_turn>user\n{{ end }}'
        "{{ .Content }}<end_of_turn>\n{{ end }}{{ end }}",
    ),
}


def modelfile_text(file: str, tokenizer: Any, *, stops: Sequence[str], system: str = "") -> str:
    """An Ollama Modelfile: the file's name, the chat template in Go's form, stop tokens, a system text.

    Raises `ExportError` for a chat template of a family that is not known here. Tools and earlier reasoning are not
    carried over.
    """
    lines = [f"FROM ./{file}", f'TEMPLATE """{_go_template(tokenizer)}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f'SYSTEM """{system}"""'] if system else []
    return "\n".join([*lines, ""])


def _go_template(tokenizer: Any) -> str:
    def render(texts: str, **options: Any) -> str:
        roles = {"S": "system", "U": "user", "A": "assistant", "V": "user"}
        chat = [{"role": roles[text], "content": text} for text in texts]
        written = tokenizer.apply_chat_template(chat, tokenize=False, **options)
        return written.removeprefix(tokenizer.bos_token or "")

    without_system = render("UAV")
    try:
        whole = render("SUAV")
    except TemplateError:  # Gemma 2 refuses a system turn
        whole = without_system.replace("U", "S\n\nU")
    of_system, turns = _FAMILIES.get(whole, ("", ""))
    if not turns or whole.replace(of_system, "") != without_system:  # some have a system text of their own
        raise ExportError("this chat template is of no known family; write the Modelfile's TEMPLATE by hand")
    return turns + render("UAV", add_generation_prompt=True).removeprefix(without_system)
