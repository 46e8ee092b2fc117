"""GGUF files read back: by transformers, and by llama.cpp itself where the package xllamacpp is installed.

That package brings llama.cpp compiled, with its server, which also takes pictures. It runs in this process, on the
CPU.
"""

import base64
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ironlogic.export.gguf import ExportError
from ironlogic.generate import chat_ids, visible_text
from ironlogic.models import load_tokenizer

import gguf
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

__all__ = ["Llama", "gguf_log_probs", "gguf_readers", "has_llama", "llama_answers", "load_gguf"]

Prompt = str | list[int] | list[dict[str, Any]]  # text, token ids, or messages


def has_llama() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def gguf_readers(path: Path) -> tuple[str, list[str]]:
    """The kind of a file (f16, q8_0, ...), and who can run it here: "transformers", "llama.cpp".

    transformers' reader assumes that Qwen3's heads are 128 wide.
    """
    fields = _fields(path)
    try:
        architecture = fields["general.architecture"].contents()
        kind = gguf.LlamaFileType(fields["general.file_type"].contents()).name.removeprefix("MOSTLY_").lower()
    except (ValueError, KeyError) as error:
        raise ExportError(f"{path} doesn't say what it is ({error}); it is cut short or damaged") from error
    width = fields.get(f"{architecture}.attention.key_length")
    fits = not architecture.startswith("qwen3") or width is None or width.contents() == 128
    known = architecture in modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES and fits
    return kind, ["transformers"] * known + ["llama.cpp"] * has_llama()


def gguf_log_probs(
    path: Path, rows: Sequence[list[int]], tokenizer: Any
) -> tuple[str, dict[str, list[torch.Tensor]]]:
    """The kind of a file, and by every reader at hand log probabilities (token, vocabulary) after each token.

    Raises `ExportError` where there is no reader, or llama.cpp cuts the rows' texts into other tokens.
    """
    kind, readers = gguf_readers(path)
    if not readers:
        raise ExportError(
            f"{path.name} can't be checked here: transformers doesn't read its kind, and llama.cpp is not "
            "installed (pip install xllamacpp)"
        )
    read: dict[str, list[torch.Tensor]] = {}
    if "transformers" in readers:
        model = load_gguf(path)
        with torch.inference_mode():
            logits = [model(input_ids=torch.tensor([row])).logits[0].float() for row in rows]
        read["transformers"] = [x.log_softmax(-1) for x in logits]
    if "llama.cpp" in readers:
        llama = Llama(path, length=max(map(len, rows)) + 8)
        read["llama.cpp"] = [_after_each(llama, row, tokenizer) for row in rows]
    return kind, read


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


# --- llama.cpp ----------------------------------------------------------------------------------------------
class Llama:
    """A GGUF file in llama.cpp, with a LoRA file or an eye (`mmproj`) beside it; `length`: tokens of context.

    Raises `ExportError` where it can't be loaded, also on what is asked of it.
    """

    def __init__(self, path: Path, *, length: int, lora: Path | None = None, eye: Path | None = None) -> None:
        import xllamacpp

        fields = _fields(path)
        self.path, self.vocabulary = path, len(fields["tokenizer.ggml.tokens"].data)
        begins = fields.get("tokenizer.ggml.add_bos_token")
        self.adds_bos = bool(begins and begins.contents())
        options = xllamacpp.CommonParams()
        options.model.path, options.n_ctx = str(path), length
        options.n_parallel, options.n_gpu_layers, options.warmup, options.verbosity = 1, 0, False, 0
        options.cpuparams.n_threads = torch.get_num_threads()
        if lora:
            options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        if eye:
            options.mmproj.path, options.mmproj_use_gpu = str(eye), False
        try:
            self._server = xllamacpp.Server(options)
        except (RuntimeError, IndexError) as error:  # the latter: a vocabulary that it can't use
            files = " with ".join(file.name for file in (path, lora, eye) if file)
            raise ExportError(f"{files} can't be read by llama.cpp: {error}") from error

    def after(self, prompt: Prompt) -> tuple[int, torch.Tensor]:
        """(tokens of the prompt, log probabilities (vocabulary,) of the token that comes next)."""
        reply = self._ask(prompt, 1, self.vocabulary)
        log_probs = torch.full((self.vocabulary,), -torch.inf)
        for token in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            log_probs[token["id"]] = token["logprob"]
        return reply["usage"]["prompt_tokens"], log_probs

    def answer(self, prompt: Prompt, *, max_new_tokens: int) -> list[int]:
        """The tokens of a greedy answer, with the one that ends it."""
        return [token["id"] for token in self._ask(prompt, max_new_tokens, 1)["choices"][0]["logprobs"]["content"]]

    def _ask(self, prompt: Prompt, tokens: int, alternatives: int) -> dict[str, Any]:
        asked = {"max_tokens": tokens, "temperature": 0.0}
        try:
            if isinstance(prompt, list) and isinstance(prompt[0], dict):
                asked |= {"messages": [_as_openai_has_it(turn) for turn in prompt]}
                reply = self._server.handle_chat_completions(
                    asked | {"logprobs": True, "top_logprobs": alternatives}
                )
            else:
                reply = self._server.handle_completions(asked | {"prompt": prompt, "logprobs": alternatives})
        except (RuntimeError, IndexError) as error:  # the latter: a vocabulary that it can't use
            raise ExportError(f"{self.path.name}: llama.cpp fails on a prompt: {error}") from error
        if "error" in reply:
            raise ExportError(f"{self.path.name}: llama.cpp says {reply['error'].get('message', reply)}")
        return reply


def _as_openai_has_it(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose pictures (PIL) are written into it."""
    if isinstance(turn["content"], str):
        return turn
    parts = []
    for part in turn["content"]:
        if part["type"] == "image":
            file = io.BytesIO()
            part["image"].save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            part = {"type": "image_url", "image_url": {"url": url}}
        parts.append(part)
    return turn | {"content": parts}


def _after_each(llama: Llama, row: list[int], tokenizer: Any) -> torch.Tensor:
    """Log probabilities (token, vocabulary); the row's text gives the same tokens in llama.cpp."""
    log_probs = [llama.after(row[:end])[1] for end in range(1, len(row) + 1)]
    text = tokenizer.decode(row)
    count, of_text = llama.after(text.removeprefix(tokenizer.bos_token or "") if llama.adds_bos else text)
    if count != len(row) or (of_text - log_probs[-1]).abs().max() > 0.1:
        raise ExportError(f"{llama.path.name}: llama.cpp cuts {text!r} into other tokens than the tokenizer")
    return torch.stack(log_probs)


def llama_answers(
    path: Path, prompts: Sequence[str], *, like: Path, lora: Path | None = None, max_new_tokens: int = 72
) -> list[str]:
    """Greedy answers of llama.cpp. `like`: the folder of the model, whose tokenizer renders and decodes."""
    tokenizer = load_tokenizer(like)
    rows = chat_ids(tokenizer, prompts)
    llama = Llama(path, length=max(map(len, rows)) + max_new_tokens + 1, lora=lora)
    answers = [llama.answer(row, max_new_tokens=max_new_tokens) for row in rows]
    return [visible_text(tokenizer, answer, {tokenizer.eos_token_id}) for answer in answers]


def _fields(path: Path) -> dict[str, Any]:
    try:
        return gguf.GGUFReader(path).fields
    except (OSError, ValueError, IndexError) as error:
        raise ExportError(f"{path} can't be read as GGUF ({error}); it is cut short or damaged") from error
