"""Proof that a splice sees, before it is trained and after it is reloaded: a row for each thing that can be wrong.

The rows come from faults met in public projects, most of which train without a word and with a falling loss. The
check runs the model on small batches, one backward pass of the projector, and one save and reload. It does not say
whether the model has *learned* to see: that takes held-out questions and controls (blank and exchanged pictures).
"""

import html
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ironlogic.models import LoadedModel
from ironlogic.vision.splice import (
    SpliceError,
    bare,
    feature_fields,
    image_token_ids,
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
Verdict = tuple[bool, str]


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
        wide = max(len(row.name) for row in self.rows)
        return "\n".join(f"{'ok ' if row.passed else 'BAD'} {row.name:{wide}} {row.detail}" for row in self.rows)

    def _repr_html_(self) -> str:
        mark = {True: "<b style='color:#1a7f37'>ok</b>", False: "<b style='color:#cf222e'>broken</b>"}
        lines = ((mark[row.passed], html.escape(row.name), html.escape(row.detail)) for row in self.rows)
        cells = ("".join(f"<td style='text-align:left'>{cell}</td>" for cell in line) for line in lines)
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def check_splice(
    loaded: LoadedModel,
    images: Sequence[Any] | None = None,
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
    probe = _Probe(loaded, model, images, training)
    checks: dict[str, Callable[[], Verdict]] = {
        "image token": probe.image_token,
        "tokenizer fits": probe.tokenizer_fits,
        "chat template": probe.chat_template,
        "answer ends": probe.answer_ends,
        "mean and deviation": probe.mean_and_deviation,
        "tied weights": probe.tied_weights,
        "trainable parts": probe.trainable_parts,
        "image features": probe.image_features,
    }
    if model.device.type != "meta":
        checks |= {
            "placeholders": probe.placeholders,
            "image reaches logits": probe.image_reaches_logits,
            "batch equals single": probe.batch_equals_single,
            "projector gradient": probe.projector_gradient,
        }
        if reference is not None:
            checks["text alone"] = lambda: probe.text_alone(reference)
        if isinstance(loaded.model, peft.PeftModel):
            checks["adapter saved"] = probe.adapter_saved
        elif reload:
            checks["reload"] = probe.reload
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


def _say(passed: bool, said: str, advice: str) -> Verdict:
    return passed, said if passed else f"{said}: {advice}"


@dataclass(frozen=True)
class _Probe:
    """The checks, each -> (passed, detail)."""

    loaded: LoadedModel
    model: Any
    images: Sequence[Any] | None
    training: bool = False

    @property
    def processor(self) -> Any:
        return self.loaded.processor

    # --- what needs no numbers

    def image_token(self) -> Verdict:
        token = self.processor.image_token
        ids = self.processor.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            return False, f"{token!r} is {len(ids)} tokens, {ids}; it has to be one: add it as a special token"
        if token not in self.processor.tokenizer.get_added_vocab():
            return False, f"{token!r} is an ordinary token, so any text may hold it; add it as a special token"
        places = {"processor.image_token_id": self.processor.image_token_id} | image_token_ids(self.model)
        wrong = [f"{place} is {found}" for place, found in places.items() if found != ids[0]]
        if wrong:
            return False, f"{', '.join(wrong)}; the tokenizer's {token!r} is {ids[0]}: set it to that"
        return True, f"{token!r} is {ids[0]} in the tokenizer and in {len(places)} other places"

    def tokenizer_fits(self) -> Verdict:
        table, head = (
            len(m.weight) for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        )
        size, tokens = self.model.config.get_text_config().vocab_size, len(self.processor.tokenizer)
        good = tokens <= table == head == size
        said = f"{tokens} tokens, {table} rows of the embedding, {head} of the head, text_config.vocab_size {size}"
        return _say(good, said, "call resize_token_embeddings")

    def chat_template(self) -> Verdict:
        processor, tokenizer = self.processor, self.processor.tokenizer
        text = keeps_image(processor, processor.image_token)
        if not text:
            return False, "processor.chat_template drops the image or the question of a list of parts"
        if text != keeps_image(tokenizer, processor.image_token):
            return False, "tokenizer.chat_template writes a picture otherwise than processor.chat_template"
        return True, repr(text)

    def answer_ends(self) -> Verdict:
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        chat = [{"role": "user", "content": "zxq"}, {"role": "assistant", "content": "qxz"}]
        written = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("qxz")[2].strip()
        ids = tokenizer.encode(written, add_special_tokens=False)
        end = ids[0] if ids else None
        names = tokenizer.convert_ids_to_tokens([one for one in ends if one is not None])
        if end not in ends:
            wanted = tokenizer.decode([end]) if ids else "no token"
            return False, f"the template ends an answer with {wanted!r}, generation_config.eos_token_id is {names}"
        if tokenizer.pad_token_id in (None, end):  # a further end of generation_config may pad: Qwen3's does
            return False, f"the pad token, {tokenizer.pad_token!r}, has to be one that doesn't end an answer"
        return True, f"ends {names}, pads with {tokenizer.pad_token!r}"

    def mean_and_deviation(self) -> Verdict:
        own, vision = self.processor.image_processor, self.model.config.vision_config.to_dict()
        wrong, said = [], []
        for name in ("image_mean", "image_std"):
            found = [round(float(value), 4) for value in getattr(own, name)]
            wanted = [round(float(value), 4) for value in vision.get(name, found)]
            said.append(f"{name} {found}" + ("" if name in vision else " (the tower's is not recorded)"))
            if found != wanted or not own.do_normalize:
                wrong.append(f"image_processor.{name} is {found}, the tower's {wanted}")
        if not own.do_rescale or abs(own.rescale_factor * 255 - 1) > 1e-6:
            wrong.append("image_processor.rescale_factor has to be 1/255")
        return not wrong, ", ".join(wrong or said)

    def tied_weights(self) -> Verdict:
        config = self.model.config
        outer, inner = config.tie_word_embeddings, config.get_text_config().tie_word_embeddings
        head, table = self.model.get_output_embeddings().weight, self.model.get_input_embeddings().weight
        shared = head is table or (not head.is_meta and head.data_ptr() == table.data_ptr())
        said = f"config {outer}, text_config {inner}, head and embedding {'shared' if shared else 'apart'}"
        return _say(outer == inner == shared, said, "all three have to agree")

    def trainable_parts(self) -> Verdict:
        every = list(self.model.named_parameters())
        tower = {id(parameter) for parameter in tower_of(self.model).parameters()}
        projector = {id(parameter) for parameter in projector_of(self.model).parameters()}
        counts = {"tower": 0, "projector": 0, "adapter": 0, "language model": 0}
        for name, parameter in every:
            kind = "tower" if id(parameter) in tower else "projector" if id(parameter) in projector else ""
            kind = kind or ("adapter" if "lora_" in name else "language model")
            counts[kind] += parameter.numel() * parameter.requires_grad
        said = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
        if strangers := [name for name, parameter in every if "lora_" in name and id(parameter) in tower]:
            return False, f"{said}: an adapter sits in the vision tower ({strangers[0]}); give LoRA a pattern"
        floats = (p for _, p in every if p.is_floating_point())  # 4-bit weights can't be trained
        if all(p.requires_grad for p in floats) and not self.training:
            return True, f"{said}: nothing is frozen yet"
        if counts["tower"]:
            return False, f"{said}: the vision tower has to be frozen"
        if any(counts.values()) and not counts["projector"]:
            return False, f"{said}: the projector is frozen; name it in modules_to_save"
        return True, said

    def image_features(self) -> Verdict:
        """One feature for each patch, none cut off and no CLS among them, and as many places for them."""
        wrong = []
        for name, wanted in feature_fields(self.model).items():
            holder = self.model.config if name.startswith("config") else self.processor
            found = getattr(holder, name.partition(".")[2])
            wrong += [f"{name} is {found!r}, not {wanted!r}"] if found != wanted else []
        return not wrong, "; ".join(wrong) or f"a place for each patch of {type(tower_of(self.model)).__name__}"

    # --- what runs the model

    def _batch(self, texts: Sequence[str], images: Sequence[Any]) -> dict[str, torch.Tensor]:
        # one picture a list: what the SmolVLM class needs, and LLaVA's takes
        nested = [[image] for image in images]
        batch = self.processor(text=list(texts), images=nested, padding=True, return_tensors="pt")
        batch = {name: value.to(self.loaded.device) for name, value in batch.items()}
        batch["pixel_values"] = batch["pixel_values"].to(next(tower_of(self.model).parameters()).dtype)
        return batch

    def _pictures(self) -> list[Any]:
        if self.images is not None:
            if len(self.images) < 2:
                raise SpliceError(f"images holds {len(self.images)}; two different ones are needed")
            return list(self.images[:2])
        size, rng = self.model.config.vision_config.image_size, np.random.default_rng(0)
        shapes = ((size, size + size // 4, 3), (size + size // 4, size, 3))
        return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]

    def _ask(self, *questions: str) -> str:
        parts = [part for q in questions for part in ({"type": "image"}, {"type": "text", "text": q})]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )

    @torch.no_grad()
    def placeholders(self) -> Verdict:
        """In a batch, each text has as many places as its own pictures have features; the sum is no proof."""
        one, two = self._pictures()
        batch = self._batch([self._ask("zxq"), self._ask("zxq", "qxz")], [one, two, one])
        found = (batch["input_ids"] == self.model.config.image_token_id).sum(1).tolist()
        features = self.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        sent = [len(one) for one in features]
        wanted = [sent[0], sent[1] + sent[2]]
        said = f"{found} in texts of one and two pictures, {wanted} features"
        return _say(found == wanted, said, "the processor writes the wrong number")

    @torch.no_grad()
    def image_reaches_logits(self) -> Verdict:
        batch = self._batch([self._ask("zxq")] * 2, self._pictures())
        here = self.model(**batch).logits[:, -1].float()
        there = self.model(**batch | {"pixel_values": batch["pixel_values"].flip(0)}).logits[:, -1].float()
        change = (here - there).abs().max().item()
        passed = change > 1e-6 * here.abs().max().item()
        said = f"exchanging two pictures changes the next token's logits by {change:.2g}"
        return _say(passed, said, "the pictures never reach the language model")

    @torch.no_grad()
    def batch_equals_single(self) -> Verdict:
        if self.processor.tokenizer.padding_side != "left":
            return False, "tokenizer.padding_side is 'right': answers of a batch begin behind padding; set 'left'"
        rows = list(zip([self._ask("zxq"), self._ask("zxq and more of it")], self._pictures(), strict=True))
        together = self.model(**self._batch(*zip(*rows, strict=True))).logits[:, -1].float()
        alone = torch.cat([self.model(**self._batch([t], [image])).logits[:, -1].float() for t, image in rows])
        apart = (together - alone).abs().max().item() / alone.std().item()
        swapped = (alone[0] - alone[1]).abs().max().item() / alone.std().item()
        # other shapes take other kernels: in 16 bit that is some per cent of the spread
        passed = apart < max(1e-3 if self.model.dtype == torch.float32 else 0.1, swapped / 10)
        said = f"logits of a padded batch differ by {apart:.2g} of their spread from those alone"
        return _say(passed, said, "a row sees another row's picture, or its padding")

    def projector_gradient(self) -> Verdict:
        """0.0 is what a projector gets whose features go nowhere while the loss falls; None, one cut off."""
        batch = self._batch([self._ask("zxq")] * 2, self._pictures())
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -3:] = batch["input_ids"][:, -3:]
        every = projector_of(self.model).named_parameters()
        named = {name: parameter for name, parameter in every if "original_module" not in name}
        before = [parameter.requires_grad for parameter in named.values()]
        for parameter in named.values():
            parameter.requires_grad_(True)
        try:
            loss = self.model(**batch, labels=labels).loss
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        finally:
            for parameter, trainable in zip(named.values(), before, strict=True):
                parameter.requires_grad_(trainable)
        most = {name: g if g is None else g.abs().max().item() for name, g in zip(named, grads, strict=True)}
        said = ", ".join(f"{name} {'None' if one is None else f'{one:.2g}'}" for name, one in most.items())
        passed = all(one is not None and 0 < one < float("inf") for one in most.values())
        return _say(passed, said, "the loss does not depend on the pictures")

    @torch.no_grad()
    def text_alone(self, reference: Reference) -> Verdict:
        if isinstance(reference, tuple):
            ids, logits = reference
        else:
            ids = reference.tokenizer("Where is it?", return_tensors="pt", add_special_tokens=False)["input_ids"]
            logits = reference.model(input_ids=ids.to(reference.device)).logits
        mine = self.model(input_ids=ids.to(self.loaded.device)).logits.float().cpu()
        words = min(mine.shape[-1], logits.shape[-1])  # an added token makes the head longer
        change = (mine[..., :words] - logits[..., :words].float().cpu()).abs().max().item()
        said = f"logits of a text differ from the language model's by {change:.2g}"
        return _say(change < 1e-3, said, "its head or its embedding is not the language model's")

    # --- what is written

    @torch.no_grad()
    def reload(self) -> Verdict:
        """Plain transformers reads the same model from a folder. On a card its tensors are compared, on the CPU."""
        there = self.loaded.device if self.model.device.type == "cpu" or self.loaded.four_bit_share else "cpu"
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                folder, dtype=self.model.dtype, device_map={"": there}, local_files_only=True
            ).eval()
        again = _Probe(LoadedModel(model, processor.tokenizer, processor), model, self.images)
        here, back = (one._batch([one._ask("zxq")] * 2, one._pictures()) for one in (self, again))
        pixels = (here["pixel_values"].cpu() - back["pixel_values"].cpu()).abs().mean().item()
        wrong = ["token ids"] * (not torch.equal(here["input_ids"].cpu(), back["input_ids"].cpu()))
        wrong += ["pixels"] * (pixels > 0.02)  # with torchvision another resampler is read back, a hair apart
        if there == self.loaded.device:
            wrong += ["logits"] * (not torch.equal(self.model(**here).logits, model(**here).logits))
        else:
            tensors = model.state_dict()
            wrong += [n for n, x in self.model.state_dict().items() if not torch.equal(x.cpu(), tensors[n])][:3]
        said = f"{type(model).__name__} with {type(processor).__name__} from a folder"
        return not wrong, f"{said}: {'other ' + ', '.join(wrong) if wrong else 'the same logits'}"

    def adapter_saved(self) -> Verdict:
        """The trained projector is among what the adapter writes."""
        name = projector_name(self.model)
        saved = [key for key in peft.get_peft_model_state_dict(self.loaded.model) if f".{name}." in key]
        active = [key for key, _ in projector_of(self.model).named_parameters() if "original_module" not in key]
        said = f"{len(saved)} of {len(active)} tensors of the projector are saved with the adapter"
        return _say(len(saved) == len(active), said, f"name {name} in modules_to_save")
