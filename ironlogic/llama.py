"""GGUF files in the hands of others: converted and quantized by llama.cpp, read back by transformers and llama.cpp.

Converter and quantizer are programs of a checkout that the user names; llama.cpp itself is the package
llama-cpp-python, an extra that need not be there. Nothing is downloaded or built. Runs on the CPU only.
"""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ironlogic.generate import chat_ids, visible_text
from ironlogic.gguf_file import ExportError

import gguf
import numpy as np
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

__all__ = [
    "convert",
    "find_quantizer",
    "gguf_logits",
    "gguf_readers",
    "llama_answers",
    "load_gguf",
    "open_llama",
    "quantize",
]


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
    tokenizer = transformers.AutoTokenizer.from_pretrained(like, local_files_only=True, trust_remote_code=False)
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
