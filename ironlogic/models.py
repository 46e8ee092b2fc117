"""Loading models: the one place that knows Unsloth, transformers, 4 bit, architecture names and devices.

Unsloth has to be imported before transformers, TRL and PEFT, so this module is imported before them, by every
module that needs a model. Where Unsloth is absent or can't do a thing (vision on a CPU, a card older than
capability 7.0), the same calls use transformers + PEFT + bitsandbytes. `IRONLOGIC_BACKEND` (auto, unsloth,
transformers) chooses by hand. Weights that don't fit are refused before they are downloaded, the experts of a
mixture among them: transformers 5 fuses them into tensors that its own 4 bit leaves as they are.
"""

import contextlib
import functools
import gc
import importlib
import inspect
import io
import json
import logging
import multiprocessing
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ironlogic import IronLogicError
from ironlogic.memory import GIB, NF4_BYTES, PlanError, count_model, plan_memory
from ironlogic.presets import LoraSettings
from ironlogic.session import results_path, see_memory, see_place
from ironlogic.smollm2 import NAME as SMOLLM2
from ironlogic.smollm2 import unpack

import torch

__all__ = [
    "BACKEND",
    "WHY_NOT_UNSLOTH",
    "LoadedModel",
    "ModelError",
    "add_lora",
    "as_loaded",
    "bare",
    "card_has_bfloat16",
    "four_bit_share",
    "free_memory",
    "in_plain_process",
    "inference",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "longest",
    "lora_places",
    "model_inputs",
    "need_template",
    "projector_name",
    "projector_of",
    "put_adapter",
    "real_size",
    "refuse_pickles",
    "resolve",
    "split_adapter",
    "trainer_hardware",
    "trainer_optimizer",
    "use_adapter",
    "with_adapters",
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


# bitsandbytes warns, as it is imported, of an optional kernel that is missing
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
BACKEND, WHY_NOT_UNSLOTH = _choose_backend()

from ironlogic.data.chats import ChatError  # noqa: E402
from ironlogic.data.masking import turn_end  # noqa: E402

import bitsandbytes  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil  # noqa: E402
from transformers.processing_utils import ProcessorMixin  # noqa: E402

transformers.utils.logging.disable_progress_bar()

# Never in 4 bit. transformers 5 matches full prefixes, hence "model."
_VISION = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "connector")
_NOT_QUANTIZED = ["lm_head", *(f"model.{name}" for name in _VISION)]

DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it. `four_bit_share`: the share of weight bytes in 4 bit (0 to 1)."""

    model: Any
    tokenizer: Any
    processor: Any = None  # of a vision-language model
    backend: str = "transformers"
    source: str = ""  # what it was asked for by
    base: str = ""  # folder or hub name of its weights without adapters
    max_length: int = 2048  # tokens
    four_bit_share: float = 0.0
    in_16_bit: "Callable[[], LoadedModel] | None" = None  # makes it again, where no folder holds its weights

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __str__(self) -> str:
        count = sum(real_size(p) for p in self.model.parameters())
        bits = f"{self.four_bit_share:.0%} of the bytes in 4 bit" if self.four_bit_share else "no 4 bit"
        name = self.source or type(self.model).__name__
        return f"{name}: {count / 1e6:,.1f} M parameters, {bits}, {self.backend} on {self.device}"


def resolve(name_or_path: str | Path) -> str:
    """A folder of data/ by its bare name (`nano`), a local folder, one in the results; else a hub name, kept.

    `smollm2` is unpacked into the results when it is first asked for.
    """
    name = str(name_or_path)
    results = results_path(see_place(os.environ), environ=os.environ)
    if name == SMOLLM2:
        return str(unpack(results / "models" / name))
    folders = [Path(name).expanduser()] if name else []
    if name and Path(name).name == name:
        folders.append(DATA / name)
    elif name:
        folders.append(results / name)
    for folder in folders:
        if any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            return str(folder.resolve())
    if folders and folders[0].exists():
        raise ModelError(f"{name}: no config.json or adapter_config.json in this folder, so it holds no model")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local:
        shipped = ", ".join(sorted(p.parent.name for p in DATA.glob("*/config.json")))
        raise ModelError(
            f"{name!r}: no such folder, and not a hub name (owner/model). Shipped models: {shipped or 'none'}"
        )
    return name


def load_model(
    name_or_path: str | Path,
    *,
    four_bit: bool = True,
    max_length: int = 2048,
    seed: int = 3407,
    backend: str | None = None,
) -> LoadedModel:
    """A causal language model, in 4 bit (nf4, double quantisation) unless told otherwise.

    `name_or_path`: a folder of data/ by its name (`nano`), a local folder, a hub name, or the folder of an
    adapter (its base is loaded with it). On a CPU everything but the 4-bit weights is float32.
    Raises `ModelError` with one message when the model isn't there, is incomplete or doesn't fit the backend.
    """
    source = resolve(name_or_path)
    backend = backend or BACKEND
    if backend == "unsloth" != BACKEND:
        raise ModelError(f"Unsloth was asked for but is not in use: {WHY_NOT_UNSLOTH}")
    base, adapter = split_adapter(source)
    free_memory()  # a model that nobody holds any more goes before this one comes
    for folder in (base, adapter or base):
        refuse_pickles(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(base, **_only_safe(base))
        max_length = min(max_length, longest(config) or max_length)
        options = {"four_bit": four_bit, "max_length": max_length, "seed": seed}
        model, processor, backend = _load_weights(base, config, backend=backend, **options)
        if adapter:
            model = put_adapter(model, adapter)
    except ModelError:
        raise
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source} can't be loaded: {_reason(error)}") from error
    if model.device.type == "cpu" and sum(map(real_size, model.parameters())) < 20e6:
        _keep_unpacked(model)
        if "OMP_NUM_THREADS" not in os.environ:
            # a fifth slower than two threads on idle cores, three times faster when something else runs
            torch.set_num_threads(1)
    tokenizer = getattr(processor, "tokenizer", processor)
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        processor=processor if processor is not tokenizer else None,
        backend=backend,
        source=str(name_or_path),
        base=base,
        max_length=max_length,
        four_bit_share=four_bit_share(model),
    )
    if four_bit and not loaded.four_bit_share:
        raise ModelError(f"{source}: 4 bit was asked for, but no weight came out in 4 bit")
    return _made_safe(loaded)


def _only_safe(base: str) -> dict[str, Any]:
    """Arguments of every `from_pretrained`: no network for a folder; told not to trust, else it asks on the
    keyboard whether to run a stranger's code."""
    return {"local_files_only": Path(base).is_dir(), "trust_remote_code": False}


def _keep_unpacked(model: torch.nn.Module) -> None:
    """Keep 4-bit weights unpacked beside themselves: a small model on a CPU answers in two thirds of the time.

    bitsandbytes unpacks them anew in every pass. The numbers are the same to the bit.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            kept: dict[str, torch.Tensor] = {}
            _unpacked(module, kept)
            module.forward = functools.partial(_unpacked_linear, module, kept)


def _unpacked_linear(module: torch.nn.Module, kept: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    weight = _unpacked(module, kept)
    return torch.nn.functional.linear(x.to(weight.dtype), weight, module.bias).to(x.dtype)


def _unpacked(module: torch.nn.Module, kept: dict[str, torch.Tensor]) -> torch.Tensor:
    packed = module.weight
    if kept.get("packed") is not packed:  # at first, and when an adapter was merged into it
        with torch.inference_mode(False), torch.no_grad():
            weight = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
        kept.update(packed=packed, weight=weight)
    return kept["weight"]


def _made_safe(loaded: LoadedModel) -> LoadedModel:
    """Switches off what fails silently; refuses what would fail later."""
    for module in loaded.model.modules():
        # bitsandbytes 0.50 repacks weights for AVX512-BF16 in evaluation; later gradients are garbage
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    name = loaded.source or type(loaded.model).__name__
    _mend_processor(loaded.processor or loaded.tokenizer)
    if not loaded.tokenizer("a", add_special_tokens=False)["input_ids"]:
        # transformers 5 makes an empty one where the files are missing
        raise ModelError(f"{name}: its folder holds no tokenizer (tokenizer.json); copy it from the base model")
    if loaded.tokenizer.pad_token is None:
        raise ModelError(f"{name}: the tokenizer has no pad token; set one that is not the end-of-turn token")
    return loaded


def put_adapter(model: torch.nn.Module, folder: str | Path, **options: Any) -> peft.PeftModel:
    """The model with the adapter of that folder. Raises `ModelError` where a part of it finds no place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # PEFT goes on with half of the adapter
        try:
            return peft.PeftModel.from_pretrained(model, folder, **options)
        except UserWarning as error:
            raise ModelError(
                f"{folder}: a part of the adapter finds no place in {type(model).__name__} as it is saved, which "
                f"would be another model: {' '.join(str(error).split())[:200]}"
            ) from error


def longest(config: Any) -> int | None:
    """Tokens that a model's positions reach to; None where they end nowhere (Bloom, Mamba)."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def refuse_pickles(folder: str | Path) -> None:
    """Raises `ModelError` for a folder with weights in no safetensors file."""
    if Path(folder).is_dir() and not any(Path(folder).glob("*.safetensors")):
        raise ModelError(f"{folder}: no .safetensors file in it; weights in pickles are not read, save them anew")


def _reason(error: Exception) -> str:
    """The first line of what a library says, and the next where the first only announces it."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def load_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer alone, of what `load_model` takes."""
    base, _ = split_adapter(resolve(name_or_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, **_only_safe(base))
    _mend_processor(tokenizer)
    return tokenizer


def _mend_processor(processor: Any) -> None:
    """One chat template where there are several by name, and an end token at which the template ends an answer.

    A base model's (Qwen-Base, say) ends a document: trained answers would end with one token and generation go on
    for another.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    for holder in (tokenizer, processor):
        if isinstance(holder.chat_template, dict):
            templates = holder.chat_template
            holder.chat_template = templates.get("default") or next(iter(templates.values()))
    try:
        end = turn_end(tokenizer)
    except ChatError:  # no template, or none that can be used: whoever needs one says so
        return
    if end is not None and end != tokenizer.eos_token:
        tokenizer.eos_token = end


def need_template(processor: Any) -> None:
    """Raises `ModelError` where there is no chat template."""
    if not processor.chat_template and not getattr(processor, "tokenizer", processor).chat_template:
        raise ModelError(
            "the tokenizer has no chat template; set tokenizer.chat_template, or load an instruct model"
        )


def split_adapter(source: str) -> tuple[str, str | None]:
    """(base, adapter folder or None) of a model folder or an adapter folder."""
    settings = Path(source) / "adapter_config.json"
    if not settings.is_file():
        return source, None
    try:
        base = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{settings}: can't be read ({error}); copy the adapter again") from error
    if not base:
        raise ModelError(f"{settings}: names no base model (base_model_name_or_path)")
    of_hub = base.count("/") == 1 and not base.startswith("/")  # "someone/nano" is not our nano
    ours = (DATA / Path(base).name / "config.json").is_file() or Path(base).name == SMOLLM2
    if not of_hub and not Path(base).exists() and ours:
        base = Path(base).name  # trained where this repository or its results lay elsewhere
    return resolve(base), source


def as_loaded(model: Any, tokenizer: Any = None) -> LoadedModel:
    """A `LoadedModel` as it is; any transformers or PEFT model with its tokenizer wrapped into one."""
    if isinstance(model, LoadedModel):
        return model
    source = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if tokenizer is None:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"{type(model).__name__} from {source!r} has no tokenizer; pass it") from error
    share = four_bit_share(model)
    return _made_safe(LoadedModel(model, tokenizer, source=source, base=source, four_bit_share=share))


def add_lora(loaded: LoadedModel, lora: LoraSettings, *, seed: int) -> LoadedModel:
    """The model with a fresh low-rank adapter where `lora` asks for it; the same seed gives the same adapter.

    Raises `ModelError` where the adapter would sit elsewhere than `lora` asks, as `lora_places` has it.
    """
    if isinstance(loaded.model, peft.PeftModel):
        raise ModelError(f"{loaded.source} carries an adapter already; load the base model again for a fresh one")
    if any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in loaded.model.modules()):
        raise ModelError(f"{loaded.source}: an earlier run trained inside this model; load it again")
    asked = [kind for kind in ("attention", "mlp", "experts", "vision") if getattr(lora, kind)]
    parts = list(_trainable_parts(loaded.model))
    if lora.vision and not any(kind == "vision" for kind, _, _ in parts):
        raise ModelError(f"{loaded.source}: lora.vision, but this model has no vision tower; leave it off")
    if not {name.rpartition(".")[2] for _, name, _ in parts} & set(_FAMILIES):
        name, known = type(loaded.model).__name__, ", ".join(_FAMILIES)
        raise ModelError(f"{name} has no layer named {known}: it is of no family that is trained here")
    names = {name for kind, name, matrix in parts if matrix and kind in asked and kind != "vision"}
    target = rf"(?!.*(?:{'|'.join(_SENSES)})).*\.\d+\.(?:{_any_of(names)})"
    if lora.vision:
        names = {name for kind, name, _ in parts if kind == "vision"}
        target = rf"(?:{target}|.*(?:{'|'.join(_EYES)}).*\.\d+\.(?:{_any_of(names)}))"
    stacks = sorted({name for _, name, matrix in parts if not matrix})
    settings = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": target,
    }
    if stacks:  # named even if none is asked for: PEFT would put an adapter on stacked experts by itself
        settings["target_parameters"] = stacks if lora.experts else []
    transformers.set_seed(seed)
    on_card = loaded.device.type == "cuda"
    if loaded.backend == "unsloth":
        import unsloth

        with contextlib.redirect_stdout(io.StringIO()):
            model = unsloth.FastLanguageModel.get_peft_model(
                loaded.model,
                random_state=seed,
                use_gradient_checkpointing="unsloth" if on_card else False,
                **settings,
            )
    else:
        loaded.model.requires_grad_(False)
        if on_card:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
            loaded.model.enable_input_require_grads()
        try:
            model = peft.get_peft_model(loaded.model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        except ValueError as error:
            raise ModelError(
                f"{type(loaded.model).__name__} can't carry such an adapter: {_reason(error)}"
            ) from error
    _check_places(model, asked)
    return replace(loaded, model=model)


# Where a language model can be trained: matrices, and stacks of them where experts lie in one tensor
_FAMILIES = ("q_proj", "o_proj", "qkv_proj")  # every family that is trained here has one of these
# Parts beside the language model, and parts that an adapter on them would not reach
_EYES = ("vision", "visual")
_SENSES = (*_EYES, "audio", "projector", "connector", "encoder_attn", "indexer", "dt_proj")
_IN_A_LAYER = re.compile(r"\.(?:layers|h|blocks)\.\d+\.(.+)$")
_MIXES_TOKENS = re.compile(r"attn|attention|mixer|mamba|conv|rnn")
_ROUTERS = ("gate", "router", "wg", "shared_expert_gate")
_WRAPPED = re.compile(r"\.base_layer\b|\bbase_model\.model\.")


def _trainable_parts(model: torch.nn.Module) -> Iterator[tuple[str, str, bool]]:
    """(kind, name within its layer, matrix or stack) of every weight that LoRA can sit on, layer by layer."""
    for path, module in model.named_modules():
        place = _WRAPPED.sub("", f".{path}")
        inside = _IN_A_LAYER.search(place)
        if not inside or any(word in place for word in _SENSES if word not in _EYES):
            continue
        name, kind = inside[1], _part_kind(place, inside[1])
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D) and ".lora_" not in place:
            yield kind, name, True
        for weight, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "expert" in f"{name}.{type(module).__name__}".lower() and kind != "vision":
                yield "experts", f"{name}.{weight}", False


def _any_of(names: set[str]) -> str:
    """As a pattern."""
    return "|".join(map(re.escape, sorted(names)))


def _part_kind(place: str, name: str) -> str:
    """Of a weight by its path in the model and its name within the layer."""
    if any(word in place for word in _EYES):
        return "vision"
    if "expert" in name and "shared" not in name:
        return "experts"
    if name.rpartition(".")[2] in _ROUTERS:
        return "router"
    return "attention" if _MIXES_TOKENS.search(name) else "mlp"


def lora_places(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """By kind of part (attention, mlp, experts, router, vision): how many weights carry an adapter, of how many."""
    adapted, counts = Counter(), Counter(kind for kind, _, _ in _trainable_parts(model))
    for path, module in model.named_modules():
        place = _WRAPPED.sub("", f".{path}")
        inside = _IN_A_LAYER.search(place)
        if inside and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            stack = hasattr(module, "parameter_name")
            adapted["experts" if stack else _part_kind(place, inside[1])] += 1
    return {kind: (adapted[kind], counts[kind]) for kind in adapted | counts}


def _check_places(model: torch.nn.Module, asked: Sequence[str]) -> None:
    """Raises `ModelError` where an adapter sits on what was not asked for, or not on all that was."""
    for kind, (adapted, count) in lora_places(model).items():
        expected = count if kind in asked else 0
        if adapted != expected:
            raise ModelError(
                f"{type(model.get_base_model()).__name__}: {adapted} of {count} {kind} weights carry an adapter, "
                f"expected {expected}; this family can't be trained that way here"
            )


def with_adapters(loaded: LoadedModel, adapters: Mapping[str, Path]) -> LoadedModel:
    """One base model in memory that carries several adapters by name; `use_adapter` switches between them."""
    if isinstance(loaded.model, peft.PeftModel):
        raise ModelError(f"{loaded.source} carries an adapter already; load the base model for several of them")
    (first, folder), *others = adapters.items()
    model = put_adapter(loaded.model, folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    return replace(loaded, model=model)


@contextlib.contextmanager
def use_adapter(loaded: LoadedModel, name: str | None) -> Iterator[LoadedModel]:
    """The model with the adapter of that name; None: the base model as it was before any training."""
    if name is not None:
        loaded.model.set_adapter(name)
        yield loaded
    elif isinstance(loaded.model, peft.PeftModel):
        with loaded.model.disable_adapter():
            yield loaded
    else:
        yield loaded  # carries no adapter: it is the base


def free_memory() -> None:
    """Give the memory of models that nobody holds any more back to the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_plain_process(function: Callable) -> Callable:
    """A function that loads a plain model beside Unsloth, made to run in a process without Unsloth.

    Unsloth patches transformers' classes for good: a model loaded on the CPU after a training on the card shares
    the patched rotary embedding, whose tables lie on the card, and fails with tensors on two devices. Without a
    card nothing is on two devices, and the function runs here. Arguments and result have to be picklable; the
    process stays for the next call, as its imports take longer than its work.
    """

    @functools.wraps(function)
    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        if not _unsloth_is_on_the_card():
            return function(*args, **kwargs)
        return _plain_process().submit(_call, function.__module__, function.__qualname__, args, kwargs).result()

    return elsewhere


def _unsloth_is_on_the_card() -> bool:
    return BACKEND == "unsloth" and torch.cuda.is_available()


@functools.cache
def _plain_process() -> ProcessPoolExecutor:
    before = os.environ.get("IRONLOGIC_BACKEND", "auto")
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    os.environ["IRONLOGIC_BACKEND"] = "transformers"  # the child takes over the environment as it is now
    try:
        pool.submit(int).result()
    finally:
        os.environ["IRONLOGIC_BACKEND"] = before
    return pool


def _call(module: str, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """In the plain process: the function itself, whose wrapper sees no Unsloth there."""
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


def model_inputs(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch on the model's device. `token_type_ids` only where they are asked for: to Gemma 3 they say where a
    picture is, most models refuse them, and tokenizers give them to all."""
    taken = inspect.signature(bare(model).forward).parameters
    return {n: t.to(model.device) for n, t in batch.items() if n != "token_type_ids" or n in taken}


def bare(model: Any) -> Any:
    """The model inside an adapter, or the model as it is."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def projector_name(model: Any) -> str:
    """What stands between tower and language model is called so: `multi_modal_projector` or `connector`."""
    return "connector" if model.config.model_type == "smolvlm" else "multi_modal_projector"


def projector_of(model: Any) -> torch.nn.Module:
    """The part of a splice between tower and language model."""
    return getattr(bare(model).model, projector_name(bare(model)))


@contextlib.contextmanager
def inference(loaded: LoadedModel) -> Iterator[torch.nn.Module]:
    """The model in evaluation mode without gradients; its training mode comes back afterwards."""
    was_training = loaded.model.training
    on_card = loaded.backend == "unsloth" and loaded.device.type == "cuda"
    if on_card:
        import unsloth

        unsloth.FastLanguageModel.for_inference(loaded.model)
    loaded.model.eval()
    try:
        with torch.inference_mode():
            yield loaded.model
    finally:
        if was_training:
            if on_card:
                unsloth.FastLanguageModel.for_training(loaded.model)
            loaded.model.train()


def trainer_hardware() -> dict[str, Any]:
    """The arguments of transformers.TrainingArguments that depend on the machine."""
    if torch.cuda.is_available():
        return {"bf16": card_has_bfloat16(), "fp16": not card_has_bfloat16()}
    return {"use_cpu": True, "bf16": False, "fp16": False, "gradient_checkpointing": False}


def trainer_optimizer(name: str) -> str:
    """`name`, or plain AdamW where the 8-bit and paged optimizers of bitsandbytes have no card to work on."""
    return name if torch.cuda.is_available() or "8bit" not in name else "adamw_torch"


# --- how weights come into memory --------------------------------------------------------------------------------
def _load_weights(
    base: str, config: Any, *, backend: str, four_bit: bool, max_length: int, seed: int
) -> tuple[torch.nn.Module, Any, str]:
    """(model, tokenizer or processor, back end used) of a model folder or hub name with its configuration.

    Raises `ModelError` for weights that don't fit, before they are downloaded where that can be counted; what
    transformers and Unsloth raise comes through.
    """
    cuda = torch.cuda.is_available()
    if cuda and "LOCAL_RANK" in os.environ:  # torchrun: a card for each process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if hasattr(config, "vision_config") and not (cuda and _has_pictures(config)):
        backend = "transformers"  # Unsloth trains vision on a GPU only, and finds no image processor without that
    _refuse_too_large(base, config, four_bit=four_bit, packs_experts=backend == "unsloth" and cuda)
    try:
        if backend == "unsloth":
            model, processor = _load_with_unsloth(base, config, four_bit, max_length, seed)
        else:
            model, processor = _load_with_transformers(base, config, four_bit)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{base}: the card was full before all weights were loaded; memory.plan_memory says what fits"
        ) from error
    experts = [p for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name]
    if four_bit and any(p.is_floating_point() for p in experts):
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        _refuse_too_large(base, config, four_bit=True, packs_experts=False, held_gib=weights / GIB)
    return model, processor, backend


def _has_pictures(config: Any) -> bool:
    """Whether transformers finds an image processor: Qwen3-VL's own comes with one for films, by torchvision."""
    return config.model_type != "qwen3_vl" or transformers.utils.is_torchvision_available()


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


def _load_with_unsloth(base: str, config: Any, four_bit: bool, max_length: int, seed: int) -> tuple[Any, Any]:
    import unsloth

    plain = not hasattr(config, "vision_config") and not hasattr(config, "num_experts")
    fast = unsloth.FastLanguageModel if plain else unsloth.FastModel
    cuda = torch.cuda.is_available()
    with contextlib.redirect_stdout(io.StringIO()):
        model, processor = fast.from_pretrained(
            model_name=base,
            max_seq_length=max_length,  # no more than the context, or it stretches RoPE
            dtype=None if cuda else torch.float32,
            load_in_4bit=four_bit,
            use_gradient_checkpointing="unsloth" if cuda else False,
            random_state=seed,
            use_exact_model_name=True,  # not its own upload of that model, which keeps other layers in 16 bit
            use_safetensors=True,  # never a pickle
            **_only_safe(base),
        )
    # Unsloth writes the context's length there, and transformers then warns of it beside every max_new_tokens
    model.generation_config.max_length = None
    return model, processor


def _load_with_transformers(base: str, config: Any, four_bit: bool) -> tuple[Any, Any]:
    cuda, dtype = torch.cuda.is_available(), torch.float32
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
        use_safetensors=True,  # never a pickle
        **_only_safe(base),
    )
    return model, load_processor(base, config)


# That these need no torchvision, AutoProcessor doesn't see (transformers 5.17, huggingface/transformers#48607)
AutoImageProcessor.register("ironlogic-tiles", image_processor_classes={"pil": SmolVLMImageProcessorPil})


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


def load_processor(base: str, config: Any) -> Any:
    """The tokenizer of a model folder or hub name; of a vision-language model its processor."""
    safe = _only_safe(base)
    if not hasattr(config, "vision_config"):
        processor = transformers.AutoTokenizer.from_pretrained(base, **safe)
    elif not _has_pictures(config):  # AutoProcessor would return the tokenizer alone, without a word
        local = {"local_files_only": safe["local_files_only"]}
        pictures = transformers.Qwen2VLImageProcessorPil.from_pretrained(base, **local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, **safe)
        processor = _StillQwen3VLProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    else:
        processor = transformers.AutoProcessor.from_pretrained(base, **safe)
    _mend_processor(processor)
    return processor


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
