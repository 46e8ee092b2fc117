"""GGUF files of dense Qwen3 models and of adapters on them, through the `gguf` package alone; Ollama's Modelfile.

No checkout of llama.cpp and no compiler is needed; one tensor is in memory at a time. Does not know any other
architecture, scaled rotary positions or tokenizers other than byte-level BPE with GPT-2's or Qwen2's way of cutting
words; `why_not_gguf` says which of these is the reason. Whether a file computes what its model computes is
`export.check_export`.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ironlogic import IronLogicError

import gguf
import numpy as np
from jinja2 import TemplateError
from safetensors import safe_open

__all__ = ["ExportError", "modelfile_text", "plain_template", "why_not_gguf", "write_gguf", "write_lora_gguf"]

# How Qwen2 and Qwen3 cut a text into words before BPE
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_THINKING = ("<think>", "</think>")  # text to read, as in Qwen3's own tokenizer
_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


class ExportError(IronLogicError, RuntimeError):
    """An artefact that can't be written or isn't what it should be; whatever was there before is untouched."""


def why_not_gguf(folder: Path) -> str:
    """Why this module can't write the model in that folder; "" when it can."""
    config = _json(folder / "config.json")
    if config.get("architectures") != ["Qwen3ForCausalLM"]:
        return f"it is a {' '.join(config.get('architectures') or ['model of no stated class'])}, not a dense Qwen3"
    rope = _rope(config)
    if rope.get("rope_type", "default") != "default" or config.get("use_sliding_window"):
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
    if reason := why_not_gguf(folder):
        raise ExportError(f"{folder}: {reason}")
    config = _json(folder / "config.json")
    writer = gguf.GGUFWriter(path, "qwen3")
    try:
        _describe_model(writer, config, folder.name, quantization)
        _describe_tokenizer(writer, folder, config["vocab_size"])
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
        for key, shape in _shapes(folder):
            kind = _kind(shape, quantization)
            block, size = gguf.GGML_QUANT_SIZES[kind]  # weights, bytes
            bytes_ = math.prod(shape) // block * size
            writer.add_tensor_info(_gguf_name(names, key), shape, np.dtype(np.float32), bytes_, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, array in _tensors(folder):
            writer.write_tensor_data(_stored(key, array, _kind(array.shape, quantization)))
    finally:
        writer.close()


def write_lora_gguf(adapter: Path, base: Path, path: Path) -> None:
    """A PEFT adapter as a LoRA file for llama.cpp (`--lora`, Ollama's `ADAPTER`); float32, as it was trained.

    Raises `ExportError` when the base is no dense Qwen3 or the adapter has more than plain low-rank pairs.
    """
    if reason := why_not_gguf(base):
        raise ExportError(f"{base}: {reason}")
    settings = _json(adapter / "adapter_config.json")
    special = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if settings.get(name)]
    if special or settings.get("modules_to_save"):
        raise ExportError(f"{adapter}: {', '.join(special) or 'modules_to_save'} can't be written as a LoRA file")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, _json(base / "config.json")["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    writer.add_name(adapter.resolve().parent.name)
    for key, array in _tensors(adapter):
        inner = key.removeprefix("base_model.model.")
        layer, _, part = inner.partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise ExportError(f"{adapter}: {key} is no low-rank pair")
        writer.add_tensor(f"{_gguf_name(names, layer + '.weight')}.lora_{part[0].lower()}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    tokenizer, settings = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    ids = dict(tokenizer["model"]["vocab"])
    kinds = dict.fromkeys(ids.values(), gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        ids[added["content"]] = added["id"]
        hidden = added["special"] and added["content"] not in _THINKING
        kinds[added["id"]] = gguf.TokenType.CONTROL if hidden else gguf.TokenType.USER_DEFINED
    text = {i: token for token, i in ids.items()}
    every = range(max(vocabulary, len(ids)))
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre(_word_rule(tokenizer))
    writer.add_token_list([text.get(i, f"[PAD{i}]") for i in every])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in every])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(ids[_token(settings["eos_token"])])
    if settings.get("pad_token"):
        writer.add_pad_token_id(ids[_token(settings["pad_token"])])
    writer.add_add_bos_token(False)
    template = folder / "chat_template.jinja"
    if text := template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template"):
        writer.add_chat_template(plain_template(text))


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


def _token(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else entry["content"]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    old = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}  # before transformers 5
    return config.get("rope_parameters") or old


# --- tensors ------------------------------------------------------------------------------------------------
def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ExportError(f"{folder}: no .safetensors file here")
    return files


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (no dict)
                yield key, tuple(tensors.get_slice(key).get_shape())


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 values, one tensor at a time, in the order of `_shapes`."""
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:  # numpy knows no bfloat16
            for key in tensors.keys():  # noqa: SIM118
                yield key, tensors.get_tensor(key).float().numpy()


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


def _stored(key: str, array: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if kind is gguf.GGMLQuantizationType.F32:
        return array
    if not np.abs(array).max(initial=0) <= 65504:
        raise ExportError(f"{key}: weights that are not finite, or beyond the range of float16 (65504)")
    if kind is gguf.GGMLQuantizationType.F16:
        return array.astype(np.float16)
    return gguf.quants.quantize(array, kind)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} can't be read: {error}") from None


# --- Ollama -------------------------------------------------------------------------------------------------
def plain_template(template: str) -> str:
    """The chat template without transformers' own `generation` tags, which mark what is trained.

    >>> plain_template("{%- generation -%}x{% endgeneration %}")
    '{%- if true -%}x{% endif %}'
    """
    opened = re.sub(r"({%-?\s*)generation(\s*-?%})", r"\1if true\2", template)
    return re.sub(r"({%-?\s*)endgeneration(\s*-?%})", r"\1endif\2", opened)


def modelfile_text(file: str, tokenizer: Any, *, stops: Sequence[str], system: str = "") -> str:
    """An Ollama Modelfile: the file's name, the chat template in Go's form, stop tokens, a system text.

    The Go template is made from what the tokenizer's own template does with a short conversation; raises
    `ExportError` when that is no plain row of turns. Tools and earlier reasoning are not carried over.
    """
    lines = [f"FROM ./{file}", f'TEMPLATE """{_go_template(tokenizer)}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, *([f'SYSTEM """{system}"""'] if system else []), ""])


def _go_template(tokenizer: Any) -> str:
    user, system, reply, more = "USER", "SYSTEM", "REPLY", "MORE"

    def render(*texts: str, **options: Any) -> str:
        roles = {user: "user", system: "system", reply: "assistant", more: "user"}
        chat = [{"role": roles[text], "content": text} for text in texts]
        return tokenizer.apply_chat_template(chat, tokenize=False, **options).removeprefix(
            tokenizer.bos_token or ""
        )

    whole = render(user, reply, more)
    before = whole.partition(user)[0]
    middle, after = whole.partition(user)[2].partition(more)[::2]
    to_reply, after_reply = middle.partition(reply)[::2]
    prompt = render(user, add_generation_prompt=True).removeprefix(render(user))
    try:
        with_system = render(system, user)
    except TemplateError:  # Gemma 2 refuses a system turn
        with_system = before + system + "\n\n" + user + after
    opening, between = with_system.removesuffix(user + after).partition(system)[::2]
    parts = (
        to_reply.startswith(after),
        after_reply.endswith(before),
        opening and between,
        whole.endswith(more + after),
    )
    if not all(parts) or "{{" in whole:
        raise ExportError("this chat template is no plain row of turns; write the Modelfile's TEMPLATE by hand")
    start = before
    if between.endswith(before):  # the system text is a turn of its own
        between = between.removesuffix(before) if before else between
    else:  # Gemma: it stands at the head of the first user turn
        start = '{{ if or (ne $i 1) (ne (index $.Messages 0).Role "system") }}' + before + "{{ end }}"
    return (
        '{{- range $i, $m := .Messages }}{{ if eq $m.Role "system" }}'
        + f"{opening}{{{{ $m.Content }}}}{between}"
        + '{{ else if eq $m.Role "user" }}'
        + f"{start}{{{{ $m.Content }}}}{after}"
        + '{{ else if eq $m.Role "assistant" }}'
        + f"{to_reply.removeprefix(after)}{{{{ $m.Content }}}}{after_reply.removesuffix(before)}"
        + f"{{{{ end }}}}{{{{ end }}}}{prompt}"
    )
