"""Proof that a splice sees, before it is trained and after it is reloaded: a row for each thing that can be wrong.

The rows come from faults met in public projects, most of which train without a word and with a falling loss. The
check runs the model on small batches, one backward pass of the projector, and one save and reload. It does not say
whether the model has *learned* to see: that takes held-out questions and controls (blank and exchanged pictures).
"""

import html
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby
from typing import Any

from ironlogic.models import LoadedModel
from ironlogic.vision.splice import (
    SpliceError,
    bare,
    feature_fields,
    image_token_ids,
    is_tiled,
    keeps_image,
    projector_name,
    projector_of,
    tower_of,
)

import numpy as np
import peft
import torch
import transformers
from PIL import Image

__all__ = ["SpliceReport", "SpliceRow", "check_splice"]

Reference = LoadedModel | tuple[torch.Tensor, torch.Tensor]
Images = Sequence[Any] | None  # two different ones; None: noise
Verdict = tuple[bool, str]  # passed, detail


@dataclass(frozen=True)
class SpliceRow:
    """One thing checked. `detail` holds the numbers, and for a failure the field and what to do."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class SpliceReport:
    """What `check_splice` found. Prints as a table; a notebook shows it in colour."""

    rows: tuple[SpliceRow, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def failed(self) -> tuple[SpliceRow, ...]:
        return tuple(row for row in self.rows if not row.passed)

    def require(self) -> "SpliceReport":
        """Itself when everything passed. Raises `SpliceError` that names what is broken."""
        if not self.passed:
            raise SpliceError("; ".join(f"{row.name}: {row.detail}" for row in self.failed))
        return self

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        return "\n".join(f"{'ok ' if row.passed else 'BAD'} {row.name:{width}} {row.detail}" for row in self.rows)

    def _repr_html_(self) -> str:
        lines = []
        for row in self.rows:
            color, mark = ("#1a7f37", "ok") if row.passed else ("#cf222e", "broken")
            cells = f"<b style='color:{color}'>{mark}</b>", html.escape(row.name), html.escape(row.detail)
            lines.append("".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells))
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def check_splice(
    loaded: LoadedModel,
    images: Images = None,
    reference: Reference | None = None,
    *,
    reload: bool = True,
) -> SpliceReport:
    """Runs every check on a spliced model, with or without an adapter, in 4 bit or not.

    `images`: two different ones; generated if None. `reference`: the language model, or (ids, its logits), to which
    text alone is compared; only sensible while the language model is untrained. `reload` saves the model and loads
    it with plain transformers, which takes its size again in memory and on disk. On the meta device only what
    needs no numbers is checked. Raises `SpliceError` for a model of another class.
    """
    model = bare(loaded.model)
    if getattr(model.config, "model_type", "") not in ("llava", "smolvlm") or loaded.processor is None:
        raise SpliceError(f"check_splice checks what splice makes, with its processor; got {type(model).__name__}")
    training = loaded.model.training
    checks: dict[str, Callable[[], Verdict]] = {
        "image token": partial(_image_token, loaded),
        "tokenizer fits": partial(_tokenizer_fits, loaded),
        "chat template": partial(_chat_template, loaded),
        "answer ends": partial(_answer_ends, loaded),
        "mean and deviation": partial(_mean_and_deviation, loaded),
        "tied weights": partial(_tied_weights, loaded),
        "trainable parts": partial(_trainable_parts, loaded, training),
        "image features": partial(_image_features, loaded),
    }
    if model.device.type != "meta":
        checks |= {
            "placeholders": partial(_placeholders, loaded, images),
            "tiles": partial(_tiles, loaded, images),
            "image reaches logits": partial(_image_reaches_logits, loaded, images),
            "batch equals single": partial(_batch_equals_single, loaded, images),
            "projector gradient": partial(_projector_gradient, loaded, images),
        }
        if not is_tiled(loaded):
            del checks["tiles"]
        if reference is not None:
            checks["text alone"] = partial(_text_alone, loaded, reference)
        if isinstance(loaded.model, peft.PeftModel):
            checks["adapter saved"] = partial(_adapter_saved, loaded)
        elif reload:
            checks["reload"] = partial(_reload, loaded, images)
    loaded.model.eval()
    try:
        return SpliceReport(tuple(_run(name, check) for name, check in checks.items()))
    finally:
        loaded.model.train(training)


def _run(name: str, check: Callable[[], Verdict]) -> SpliceRow:
    try:
        return SpliceRow(name, *check())
    except Exception as error:  # whatever a broken splice raises is what this row has to report
        return SpliceRow(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _verdict(passed: bool, detail: str, advice: str) -> Verdict:
    return passed, detail if passed else f"{detail}: {advice}"


# --- checks of configuration, tokenizer and processor: nothing is run -------------------------------------------
def _image_token(loaded: LoadedModel) -> Verdict:
    """One special token, and every copy of its id the same."""
    processor, token = loaded.processor, loaded.processor.image_token
    ids = processor.tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        return False, f"{token!r} is {len(ids)} tokens, {ids}; it has to be one: add it as a special token"
    if token not in processor.tokenizer.get_added_vocab():
        return False, f"{token!r} is an ordinary token, so any text may hold it; add it as a special token"
    copies = {"processor.image_token_id": processor.image_token_id} | image_token_ids(bare(loaded.model))
    wrong = [f"{name} is {copy}" for name, copy in copies.items() if copy != ids[0]]
    if wrong:
        return False, f"{', '.join(wrong)}; the tokenizer's {token!r} is {ids[0]}: set it to that"
    return True, f"{token!r} is {ids[0]} in the tokenizer and in {len(copies)} other places"


def _tokenizer_fits(loaded: LoadedModel) -> Verdict:
    model = bare(loaded.model)
    tokens = len(loaded.processor.tokenizer)
    embedding = len(model.get_input_embeddings().weight)
    head = len(model.get_output_embeddings().weight)
    size = model.config.get_text_config().vocab_size
    detail = (
        f"{tokens} tokens, {embedding} rows of the embedding, {head} of the head, text_config.vocab_size {size}"
    )
    return _verdict(tokens <= embedding == head == size, detail, "call resize_token_embeddings")


def _chat_template(loaded: LoadedModel) -> Verdict:
    processor = loaded.processor
    text = keeps_image(processor, processor.image_token)
    if not text:
        return False, "processor.chat_template drops the image or the question of a list of parts"
    if text != keeps_image(processor.tokenizer, processor.image_token):
        return False, "tokenizer.chat_template writes a picture otherwise than processor.chat_template"
    return True, repr(text)


def _answer_ends(loaded: LoadedModel) -> Verdict:
    """What the template writes behind an answer is what generation stops at, and not what pads."""
    tokenizer = loaded.processor.tokenizer
    eos = bare(loaded.model).generation_config.eos_token_id
    stops = eos if isinstance(eos, list) else [eos]
    names = tokenizer.convert_ids_to_tokens([token for token in stops if token is not None])
    chat = [{"role": "user", "content": "zxq"}, {"role": "assistant", "content": "qxz"}]
    behind = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("qxz")[2].strip()
    ids = tokenizer.encode(behind, add_special_tokens=False)
    end = ids[0] if ids else None
    if end not in stops:
        written = tokenizer.decode([end]) if ids else "no token"
        return False, f"the template ends an answer with {written!r}, generation_config.eos_token_id is {names}"
    if tokenizer.pad_token_id in (None, end):  # a further end of generation_config may pad: Qwen3's does
        return False, f"the pad token, {tokenizer.pad_token!r}, has to be one that doesn't end an answer"
    return True, f"ends {names}, pads with {tokenizer.pad_token!r}"


def _mean_and_deviation(loaded: LoadedModel) -> Verdict:
    """Pixels are scaled as the tower was trained on."""
    image_processor, vision = loaded.processor.image_processor, bare(loaded.model).config.vision_config.to_dict()
    details, wrong = [], []
    for name in ("image_mean", "image_std"):
        ours = [round(float(value), 4) for value in getattr(image_processor, name)]
        if name not in vision:
            details.append(f"{name} {ours} (the tower's is not recorded)")
            theirs = ours
        else:
            details.append(f"{name} {ours}")
            theirs = [round(float(value), 4) for value in vision[name]]
        if ours != theirs or not image_processor.do_normalize:
            wrong.append(f"image_processor.{name} is {ours}, the tower's {theirs}")
    if not image_processor.do_rescale or abs(image_processor.rescale_factor * 255 - 1) > 1e-6:
        wrong.append("image_processor.rescale_factor has to be 1/255")
    return not wrong, ", ".join(wrong or details)


def _tied_weights(loaded: LoadedModel) -> Verdict:
    model = bare(loaded.model)
    outer = model.config.tie_word_embeddings
    inner = model.config.get_text_config().tie_word_embeddings
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    shared = head is embedding or (not head.is_meta and head.data_ptr() == embedding.data_ptr())
    detail = f"config {outer}, text_config {inner}, head and embedding {'shared' if shared else 'apart'}"
    return _verdict(outer == inner == shared, detail, "all three have to agree")


def _trainable_parts(loaded: LoadedModel, training: bool) -> Verdict:
    """The tower is frozen and holds no adapter; whoever trains anything trains the projector."""
    model = bare(loaded.model)
    parameters = dict(model.named_parameters())
    tower = {id(parameter) for parameter in tower_of(model).parameters()}
    projector = {id(parameter) for parameter in projector_of(model).parameters()}
    trainable = {"tower": 0, "projector": 0, "adapter": 0, "language model": 0}
    for name, parameter in parameters.items():
        if id(parameter) in tower:
            part = "tower"
        elif id(parameter) in projector:
            part = "projector"
        else:
            part = "adapter" if "lora_" in name else "language model"
        if parameter.requires_grad:
            trainable[part] += parameter.numel()
    detail = ", ".join(f"{part} {count:,}" for part, count in trainable.items())
    if misplaced := [name for name, p in parameters.items() if "lora_" in name and id(p) in tower]:
        return False, f"{detail}: an adapter sits in the vision tower ({misplaced[0]}); give LoRA a pattern"
    floats = [p for p in parameters.values() if p.is_floating_point()]  # 4-bit weights can't be trained
    if all(p.requires_grad for p in floats) and not training:
        return True, f"{detail}: nothing is frozen yet"
    if trainable["tower"]:
        return False, f"{detail}: the vision tower has to be frozen"
    if any(trainable.values()) and not trainable["projector"]:
        return False, f"{detail}: the projector is frozen; name it in modules_to_save"
    return True, detail


def _image_features(loaded: LoadedModel) -> Verdict:
    """One feature for each patch, none cut off and no CLS among them, and as many places for them."""
    model, wrong = bare(loaded.model), []
    for field, expected in feature_fields(loaded).items():
        holder, *path = field.split(".")
        value = reduce(getattr, path, model.config if holder == "config" else loaded.processor)
        if value != expected:
            wrong.append(f"{field} is {value!r}, not {expected!r}")
    return not wrong, "; ".join(wrong) or f"a place for each patch of {type(tower_of(model)).__name__}"


# --- checks that run the model ----------------------------------------------------------------------------------
def _two_pictures(loaded: LoadedModel, images: Images) -> list[Any]:
    """Two of `images`, or two of noise, one wide and one high."""
    if images is not None:
        if len(images) < 2:
            raise SpliceError(f"images holds {len(images)}; two different ones are needed")
        return list(images[:2])
    short = bare(loaded.model).config.vision_config.image_size
    long = short + short // 4
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        for shape in ((short, long, 3), (long, short, 3))
    ]


def _prompt(loaded: LoadedModel, *questions: str) -> str:
    """One user turn with a picture before each question."""
    parts = []
    for question in questions:
        parts += [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": parts}]
    return loaded.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def _batch(loaded: LoadedModel, texts: Sequence[str], pictures: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
    """Texts with the pictures of each."""
    if not is_tiled(loaded):  # one picture a list: what the SmolVLM class needs, and LLaVA's takes
        pictures = [[picture] for row in pictures for picture in row]
    batch = loaded.processor(text=list(texts), images=pictures, padding=True, return_tensors="pt")
    batch = {name: value.to(loaded.device) for name, value in batch.items()}
    batch["pixel_values"] = batch["pixel_values"].to(next(tower_of(loaded.model).parameters()).dtype)
    return batch


def _twin_batch(loaded: LoadedModel, images: Images) -> dict[str, torch.Tensor]:
    """The same question about each of the two pictures."""
    first, second = _two_pictures(loaded, images)
    return _batch(loaded, [_prompt(loaded, "zxq")] * 2, [[first], [second]])


def _next_token_logits(loaded: LoadedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, V), in float32."""
    return bare(loaded.model)(**batch).logits[:, -1].float()


@torch.no_grad()
def _placeholders(loaded: LoadedModel, images: Images) -> Verdict:
    """In a batch, each text has as many places as its own pictures have features; the sum is no proof."""
    model = bare(loaded.model)
    first, second = _two_pictures(loaded, images)
    texts, pictures = [_prompt(loaded, "zxq"), _prompt(loaded, "zxq", "qxz")], [[first], [second, first]]
    places = (_batch(loaded, texts, pictures)["input_ids"] == model.config.image_token_id).sum(1).tolist()
    features = []
    for text, own in zip(texts, pictures, strict=True):
        pixels = _batch(loaded, [text], [own])["pixel_values"]
        features.append(sum(map(len, model.get_image_features(pixel_values=pixels).pooler_output)))
    detail = f"{places} in texts of one and two pictures, {features} features"
    return _verdict(places == features, detail, "the processor writes the wrong number")


@torch.no_grad()
def _tiles(loaded: LoadedModel, images: Images) -> Verdict:
    """Each view of a picture has its own places, and tiles in another order are another picture."""
    model, (picture, _) = bare(loaded.model), _two_pictures(loaded, images)
    batch = _batch(loaded, [_prompt(loaded, "zxq")], [[picture]])
    is_place = (batch["input_ids"][0] == model.config.image_token_id).tolist()
    places = [len(list(run)) for place, run in groupby(is_place) if place]
    views, features = batch["pixel_values"].shape[1], model.model.image_seq_len
    if places != [features] * views:
        return False, f"{views} views of {features} features have {places} places: one view runs into the next"
    order = [1, 0, *range(2, views)]
    change = _change(loaded, batch, batch["pixel_values"][:, order])
    detail = (
        f"{views} views of {features} features; exchanging two changes the next token's logits by {change[0]:.2g}"
    )
    return _verdict(change[0] > 1e-6 * change[1], detail, "the order of the tiles is lost")


def _change(loaded: LoadedModel, batch: dict[str, torch.Tensor], pixels: torch.Tensor) -> tuple[float, float]:
    """By how much other pixels change the next token's logits, and the largest of these."""
    own, other = _next_token_logits(loaded, batch), _next_token_logits(loaded, batch | {"pixel_values": pixels})
    return (own - other).abs().max().item(), own.abs().max().item()


@torch.no_grad()
def _image_reaches_logits(loaded: LoadedModel, images: Images) -> Verdict:
    batch = _twin_batch(loaded, images)
    change, largest = _change(loaded, batch, batch["pixel_values"].flip(0))
    detail = f"exchanging two pictures changes the next token's logits by {change:.2g}"
    return _verdict(change > 1e-6 * largest, detail, "the pictures never reach the language model")


@torch.no_grad()
def _batch_equals_single(loaded: LoadedModel, images: Images) -> Verdict:
    if loaded.processor.tokenizer.padding_side != "left":
        return False, "tokenizer.padding_side is 'right': answers of a batch begin behind padding; set 'left'"
    texts = [_prompt(loaded, "zxq"), _prompt(loaded, "zxq and more of it")]
    pictures = [[picture] for picture in _two_pictures(loaded, images)]
    together = _next_token_logits(loaded, _batch(loaded, texts, pictures))
    rows = zip(texts, pictures, strict=True)
    alone = torch.cat([_next_token_logits(loaded, _batch(loaded, [text], [own])) for text, own in rows])
    spread = alone.std().item()
    apart = (together - alone).abs().max().item() / spread
    between_rows = (alone[0] - alone[1]).abs().max().item() / spread
    # other shapes take other kernels: in 16 bit that is some per cent of the spread
    rounding = 1e-3 if bare(loaded.model).dtype == torch.float32 else 0.1
    detail = f"logits of a padded batch differ by {apart:.2g} of their spread from those alone"
    passed = apart < max(rounding, between_rows / 10)
    return _verdict(passed, detail, "a row sees another row's picture, or its padding")


def _projector_gradient(loaded: LoadedModel, images: Images) -> Verdict:
    """0.0 is what a projector gets whose features go nowhere while the loss falls; None, one cut off."""
    model, batch = bare(loaded.model), _twin_batch(loaded, images)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -3:] = batch["input_ids"][:, -3:]
    named = _active_parameters(model)
    before = [parameter.requires_grad for parameter in named.values()]
    for parameter in named.values():
        parameter.requires_grad_(True)
    try:
        loss = model(**batch, labels=labels).loss
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    finally:
        for parameter, trainable in zip(named.values(), before, strict=True):
            parameter.requires_grad_(trainable)
    largest = [None if gradient is None else gradient.abs().max().item() for gradient in gradients]
    passed = all(value is not None and 0 < value < float("inf") for value in largest)
    shown = ["None" if value is None else f"{value:.2g}" for value in largest]
    detail = ", ".join(f"{name} {value}" for name, value in zip(named, shown, strict=True))
    return _verdict(passed, detail, "the loss does not depend on the pictures")


def _active_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The projector's parameters, without the untrained copy that PEFT keeps beside them."""
    named = projector_of(model).named_parameters()
    return {name: parameter for name, parameter in named if "original_module" not in name}


@torch.no_grad()
def _text_alone(loaded: LoadedModel, reference: Reference) -> Verdict:
    if isinstance(reference, tuple):
        ids, theirs = reference
    else:
        ids = reference.tokenizer("Where is it?", return_tensors="pt", add_special_tokens=False)["input_ids"]
        theirs = reference.model(input_ids=ids.to(reference.device)).logits
    ours = bare(loaded.model)(input_ids=ids.to(loaded.device)).logits
    words = min(ours.shape[-1], theirs.shape[-1])  # an added token makes the head longer
    ours, theirs = (logits[..., :words].float().cpu() for logits in (ours, theirs))
    change = (ours - theirs).abs().max().item()
    detail = f"logits of a text differ from the language model's by {change:.2g}"
    return _verdict(change < 1e-3, detail, "its head or its embedding is not the language model's")


# --- checks of what is written ----------------------------------------------------------------------------------
@torch.no_grad()
def _reload(loaded: LoadedModel, images: Images) -> Verdict:
    """Plain transformers reads the same model from a folder. On a card its tensors are compared, on the CPU."""
    model = bare(loaded.model)
    device = loaded.device if model.device.type == "cpu" or loaded.four_bit_share else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded.processor.save_pretrained(folder)
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        reloaded = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=model.dtype, device_map={"": device}, local_files_only=True
        ).eval()
    before = _twin_batch(loaded, images)
    after = _twin_batch(LoadedModel(reloaded, processor.tokenizer, processor), images)
    wrong = []
    if not torch.equal(before["input_ids"].cpu(), after["input_ids"].cpu()):
        wrong.append("token ids")
    # with torchvision another resampler is read back, a hair apart
    if (before["pixel_values"].cpu() - after["pixel_values"].cpu()).abs().mean().item() > 0.02:
        wrong.append("pixels")
    if device == loaded.device:
        if not torch.equal(model(**before).logits, reloaded(**before).logits):
            wrong.append("logits")
    else:
        tensors = reloaded.state_dict()
        wrong += [name for name, x in model.state_dict().items() if not torch.equal(x.cpu(), tensors[name])][:3]
    same = f"other {', '.join(wrong)}" if wrong else "the same logits"
    return not wrong, f"{type(reloaded).__name__} with {type(processor).__name__} from a folder: {same}"


def _adapter_saved(loaded: LoadedModel) -> Verdict:
    """The trained projector is among what the adapter writes."""
    name = projector_name(bare(loaded.model))
    saved = [key for key in peft.get_peft_model_state_dict(loaded.model) if f".{name}." in key]
    active = _active_parameters(loaded.model)
    detail = f"{len(saved)} of {len(active)} tensors of the projector are saved with the adapter"
    return _verdict(len(saved) == len(active), detail, f"name {name} in modules_to_save")
