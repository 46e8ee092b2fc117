"""How weights come into memory: with Unsloth, or with transformers + bitsandbytes where Unsloth can't be used.

Unsloth has to be imported before transformers, TRL and PEFT, so `models` imports this module first. Beside it
this is the only one that knows either of them. Weights that don't fit are refused before they are downloaded, the
experts of a mixture among them: transformers 5 fuses them into tensors that its 4 bit leaves as they are. Knows no
adapter.
"""

import contextlib
import io
import logging
import os
from pathlib import Path
from typing import Any

from ironlogic import IronLogicError
from ironlogic.architectures import PlanError, count_model
from ironlogic.memory import GIB, NF4_BYTES, plan_memory
from ironlogic.session import see_memory

import torch

__all__ = [
    "BACKEND",
    "WHY_NOT_UNSLOTH",
    "ModelError",
    "card_has_bfloat16",
    "four_bit_share",
    "load_weights",
    "real_size",
]


class ModelError(IronLogicError, RuntimeError):
    """A model that can't be loaded or used; the message says what to do."""


def _choose_backend() -> tuple[str, str]:
    """("unsloth" or "transformers", why not Unsloth)."""
    asked = os.environ.get("IRONLOGIC_BACKEND", "auto")
    if asked not in ("auto", "unsloth", "transformers"):
        raise ModelError(f"IRONLOGIC_BACKEND is {asked!r}; expected auto, unsloth or transformers")
    if asked == "transformers":
        return "transformers", "IRONLOGIC_BACKEND says so"
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it would call the hub
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 7:
        reason = f"{torch.cuda.get_device_name()} is older than compute capability 7.0"
    else:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # its banner
                import unsloth  # noqa: F401
        except Exception as error:  # a missing package, an unsupported machine, a version clash: all mean "without"
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no reason'}"
        else:
            return "unsloth", ""
    if asked == "unsloth":
        raise ModelError(f"IRONLOGIC_BACKEND=unsloth, but Unsloth can't be used: {reason}")
    return "transformers", reason


BACKEND, WHY_NOT_UNSLOTH = _choose_backend()

import transformers  # noqa: E402
from transformers.processing_utils import ProcessorMixin  # noqa: E402

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a missing optional kernel
transformers.utils.logging.disable_progress_bar()

# Never in 4 bit. transformers 5 matches full prefixes, hence "model."
_VISION = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "connector")
_NOT_QUANTIZED = ["lm_head", *(f"model.{name}" for name in _VISION)]


def load_weights(
    base: str, config: Any, *, backend: str, four_bit: bool, max_length: int, seed: int
) -> tuple[torch.nn.Module, Any, str]:
    """(model, tokenizer or processor, back end used) of a model folder or hub name with its configuration.

    Raises `ModelError` for weights that don't fit, before they are downloaded where that can be counted; what
    transformers and Unsloth raise comes through.
    """
    cuda = torch.cuda.is_available()
    if hasattr(config, "vision_config") and not cuda:
        backend = "transformers"  # Unsloth trains vision on a GPU only
    if cuda and "LOCAL_RANK" in os.environ:  # torchrun: a card for each process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mixture = four_bit and hasattr(config.get_text_config(), "num_experts")
    _refuse_too_large(base, config, four_bit=four_bit, packs_experts=backend == "unsloth" and cuda)
    if config.model_type == "qwen3_vl" and not transformers.utils.is_torchvision_available():
        backend = "transformers"  # Unsloth finds no image processor for it then
    max_length = min(max_length, config.get_text_config().max_position_embeddings)  # Unsloth would stretch RoPE
    load = _load_with_unsloth if backend == "unsloth" else _load_with_transformers
    try:
        model, processor = load(base, config, four_bit, max_length, seed, Path(base).is_dir())
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{base}: the card was full before all weights were loaded; memory.plan_memory says what fits"
        ) from error
    if mixture and any(_is_expert(name, p) and p.is_floating_point() for name, p in model.named_parameters()):
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        _refuse_too_large(base, config, four_bit=True, packs_experts=False, held_gib=weights / GIB)
    return model, processor, backend


def _is_expert(name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.ndim == 3 and "experts" in name


def _refuse_too_large(
    base: str, config: Any, *, four_bit: bool, packs_experts: bool, held_gib: float | None = None
) -> None:
    """Raises ModelError when the weights alone are larger than the memory there is; `held_gib`: what they take."""
    try:
        model = count_model(base, config)
    except PlanError:
        return  # not one of the kinds that can be counted: loading itself will show
    cuda = torch.cuda.is_available()
    room = torch.cuda.get_device_properties("cuda").total_memory / GIB if cuda else see_memory()
    four_bit = four_bit or hasattr(config, "quantization_config")  # packed in its repository already
    packed = four_bit * (model.linear + packs_experts * model.experts)
    half = (packed * NF4_BYTES + (model.total - packed) * 2) / GIB
    needed = held_gib or (half if cuda else half + (model.total - packed) * 2 / GIB)  # float32 on a CPU
    if needed <= room:
        return
    here = f"the card has {room:.1f}" if cuda else f"in float32 {needed:.1f} GiB, and this machine has {room:.1f}"
    if packs_experts or not (four_bit and model.experts):
        place = {"card_gib": room if cuda else None, "ram_gib": room}
        advice = plan_memory(config, batch_size=1, four_bit=four_bit, **place).advice
        raise ModelError(f"{base}: its weights take {half:.1f} GiB; {here} GiB. To train it: {advice}")
    why = f" (not in use here: {WHY_NOT_UNSLOTH})" if WHY_NOT_UNSLOTH else ""
    least = half - model.experts * (2 - NF4_BYTES) / GIB
    raise ModelError(
        f"{base}: its experts would not be in 4 bit, as transformers fuses them: {model.experts:,} parameters x 2 "
        f"bytes = {model.experts * 2 / GIB:.1f} of {half:.1f} GiB of weights; {here} GiB. On a card of compute "
        f"capability 7.0 or newer Unsloth packs them{why}, which takes {least:.1f} GiB"
    )


def _load_with_unsloth(base, config, four_bit, max_length, seed, local_only):
    import unsloth

    plain = not hasattr(config, "vision_config") and not hasattr(config, "num_experts")
    fast = unsloth.FastLanguageModel if plain else unsloth.FastModel
    cuda = torch.cuda.is_available()
    with contextlib.redirect_stdout(io.StringIO()):
        return fast.from_pretrained(
            model_name=base,
            max_seq_length=max_length,
            dtype=None if cuda else torch.float32,
            load_in_4bit=four_bit,
            use_gradient_checkpointing="unsloth" if cuda else False,
            random_state=seed,
            use_exact_model_name=True,  # not its own upload of that model, which keeps other layers in 16 bit
            local_files_only=local_only,
            trust_remote_code=False,
            use_safetensors=True,  # never a pickle
        )


def _load_with_transformers(base, config, four_bit, max_length, seed, local_only):
    cuda = torch.cuda.is_available()
    dtype = torch.float32
    if cuda:
        dtype = torch.bfloat16 if card_has_bfloat16() else torch.float16
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_NOT_QUANTIZED,
    )
    vision = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(
        base,
        dtype=dtype,
        device_map={"": torch.cuda.current_device() if cuda else "cpu"},
        quantization_config=nf4 if four_bit else None,
        local_files_only=local_only,
        trust_remote_code=False,
        use_safetensors=True,  # never a pickle
    )
    return model, _load_processor(base, config, local_only)


class _StillQwen3VLProcessor(transformers.Qwen3VLProcessor):
    """Without the half for films, which can't be loaded without torchvision (transformers 5.17)."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        for name, token in (
            ("image_token", "<|image_pad|>"),
            ("video_token", "<|video_pad|>"),
            ("vision_start_token", "<|vision_start|>"),
            ("vision_end_token", "<|vision_end|>"),
        ):
            setattr(self, name, token)
            setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _load_processor(base: str, config: Any, local_only: bool) -> Any:
    safe = {"local_files_only": local_only, "trust_remote_code": False}  # else it asks on the keyboard
    if not hasattr(config, "vision_config"):
        return transformers.AutoTokenizer.from_pretrained(base, **safe)
    if config.model_type == "qwen3_vl" and not transformers.utils.is_torchvision_available():
        # AutoProcessor would return the tokenizer alone, without a word
        pictures = transformers.Qwen2VLImageProcessorPil.from_pretrained(base, local_files_only=local_only)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, **safe)
        return _StillQwen3VLProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    return transformers.AutoProcessor.from_pretrained(base, **safe)


def four_bit_share(model: torch.nn.Module) -> float:
    """The share of the weights' bytes that are in 4 bit, 0 to 1."""
    sizes = [(type(p).__name__ == "Params4bit", p.numel() * p.element_size()) for p in model.parameters()]
    return sum(size for packed, size in sizes if packed) / sum(size for _, size in sizes)


def real_size(parameter: torch.nn.Parameter) -> int:
    """Parameters stored; a 4-bit tensor packs two in a byte."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


def card_has_bfloat16() -> bool:
    """In hardware. `torch.cuda.is_bf16_supported` says yes where it is emulated; on a T4, Unsloth replaces it."""
    return torch.cuda.get_device_capability() >= (8, 0)
