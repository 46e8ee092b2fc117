"""GGUF files: written, converted, quantized, read back; Ollama's Modelfile.

Dense Qwen3 models and adapters on them are written here, through the `gguf` package alone: no checkout of llama.cpp
and no compiler is needed, and one tensor is in memory at a time. Other architectures, scaled rotary positions and
other tokenizers than byte-level BPE with GPT-2's or Qwen2's way of cutting words need the converter of a llama.cpp
checkout; `why_not_gguf` says which of these is the reason. Converter and quantizer are programs that the user
names; llama.cpp itself is the package llama-cpp-python, which need not be there. Nothing is downloaded or built.
Whether a file computes what its model computes is `write.check_export`.
"""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ironlogic import IronLogicError
from ironlogic.generate import chat_ids, visible_text
from ironlogic.models import load_tokenizer

import gguf
import numpy as np
import torch
import transformers
from jinja2 import TemplateError
from safetensors import safe_open
from transformers import modeling_gguf_pytorch_utils

__all__ = [
    "ExportError",
    "convert",
    "find_quantizer",
    "gguf_logits",
    "gguf_readers",
    "llama_answers",
    "load_gguf",
    "modelfile_text",
    "open_llama",
    "plain_template",
    "quantize",
    "why_not_gguf",
    "write_gguf",
    "write_lora_gguf",
]

# How Qwen2 and Qwen3 cut a text into words before BPE
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
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
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    text = {i: token for token, i in ids.items()}
    every = range(max(vocabulary, len(ids)))
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre(_word_rule(tokenizer))
    writer.add_token_list([text.get(i, f"[PAD{i}]") for i in every])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in every])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    mended = load_tokenizer(folder)
    writer.add_eos_token_id(mended.eos_token_id)
    if settings.get("pad_token"):
        writer.add_pad_token_id(ids[_token(settings["pad_token"])])
    writer.add_add_bos_token(False)
    if mended.chat_template:
        writer.add_chat_template(plain_template(mended.chat_template))


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


# --- llama.cpp ----------------------------------------------------------------------------------------------
_QUANTIZE = """
import ctypes, sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""


def convert(checkout: Path, folder: Path, path: Path, quantization: str) -> None:
    """A model folder written as GGUF by the converter of a llama.cpp checkout, in a process of its own."""
    script = checkout / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise ExportError(f"{checkout} is no checkout of llama.cpp (no convert_hf_to_gguf.py)")
    _call([sys.executable, script, folder, "--outfile", path, "--outtype", quantization], path)


def find_quantizer(checkout: Path | None) -> Path | None:
    """llama-quantize of the checkout or on the PATH; None: the package llama-cpp-python does it.

    Raises `ExportError` where there is neither.
    """
    places = [checkout / "llama-quantize", checkout / "build" / "bin" / "llama-quantize"] if checkout else []
    if on_path := shutil.which("llama-quantize"):
        places.append(Path(on_path))
    if found := next((place for place in places if place.is_file()), None):
        return found
    if importlib.util.find_spec("llama_cpp") is None:
        raise ExportError(
            "q4_k_m needs a quantizer. Export f16 here, and where llama.cpp is installed run: "
            "llama-quantize MODEL-f16.gguf MODEL-q4_k_m.gguf Q4_K_M (or: pip install llama-cpp-python, then again)"
        )
    return None


def quantize(source: Path, path: Path, *, tool: Path | None) -> None:
    """An f16 file as q4_k_m. Matrices whose width is no multiple of 256 come out in other types."""
    if tool:
        _call([tool, source, path, "Q4_K_M"], path)
    else:
        _call([sys.executable, "-c", _QUANTIZE, source, path], path)  # it writes past Python's stderr


def _call(command: Sequence[str | Path], path: Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode or not path.is_file():
        last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise ExportError(f"{path.name} was not written; {Path(command[0]).name} said: {last}")


# --- reading back -------------------------------------------------------------------------------------------
def gguf_readers(path: Path) -> tuple[str, list[str]]:
    """The kind of a file (f16, q8_0, ...), and who can run it here: "transformers", "llama.cpp".

    transformers' reader assumes that Qwen3's heads are 128 wide.
    """
    try:
        fields = gguf.GGUFReader(path).fields
        architecture = fields["general.architecture"].contents()
        kind = gguf.LlamaFileType(fields["general.file_type"].contents()).name.removeprefix("MOSTLY_").lower()
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ExportError(f"{path} can't be read as GGUF ({error}); it is cut short or damaged") from error
    width = fields.get(f"{architecture}.attention.key_length")
    fits = not architecture.startswith("qwen3") or width is None or width.contents() == 128
    known = architecture in modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES and fits
    return kind, ["transformers"] * known + ["llama.cpp"] * (importlib.util.find_spec("llama_cpp") is not None)


def load_gguf(path: Path) -> Any:
    """The file as a transformers model in float32; its own tokenizer lacks the chat template: use the source's."""
    bar, modeling_gguf_pytorch_utils.tqdm = modeling_gguf_pytorch_utils.tqdm, lambda rows, **_: rows
    try:  # without its progress bar, which has no switch
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            device_map="cpu",
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"{path} can't be read by transformers: {str(error).strip().splitlines()[0]}") from error
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar


def open_llama(path: Path, *, length: int = 512, lora: Path | None = None) -> Any:
    """The file in llama.cpp, on the CPU, keeping the logits of every position. `length`: tokens of context."""
    import llama_cpp

    try:
        return llama_cpp.Llama(
            str(path),
            lora_path=str(lora) if lora else None,
            n_ctx=length,
            logits_all=True,
            n_gpu_layers=0,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"{path} can't be read by llama.cpp: {error}") from error


def gguf_logits(path: Path, reader: str, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Float32 logits (token, vocabulary) of every row of token ids."""
    if reader == "transformers":
        model = load_gguf(path)
        with torch.inference_mode():
            return [model(input_ids=torch.tensor([row])).logits[0].float() for row in rows]
    llama = open_llama(path, length=max(map(len, rows)) + 8)
    found = []
    for row in rows:
        llama.reset()
        llama.eval(row)
        found.append(torch.tensor(np.array(llama.scores[: len(row)])))
    return found


def llama_answers(
    path: Path, prompts: Sequence[str], *, like: Path, lora: Path | None = None, max_new_tokens: int = 72
) -> list[str]:
    """Greedy answers of llama.cpp. `like`: the folder of the model, whose tokenizer renders and decodes."""
    tokenizer = load_tokenizer(like)
    rows = chat_ids(tokenizer, prompts)
    llama = open_llama(path, length=max(map(len, rows)) + max_new_tokens + 1, lora=lora)
    answers = []
    for row in rows:
        llama.reset()
        spoken: list[int] = []
        for token in llama.generate(row, temp=0.0, repeat_penalty=1.0):
            if token == tokenizer.eos_token_id or len(spoken) == max_new_tokens:
                break
            spoken.append(token)
        answers.append(visible_text(tokenizer, spoken))
    return answers


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
