"""Splices broken on purpose, and the training loop that does not notice: what `check_splice` is there for.

Each fault is one line that somebody once wrote or forgot; `check_splice` names every one.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ironlogic.data.chats import Chats
from ironlogic.models import LoadedModel, free_memory
from ironlogic.presets import TrainSettings
from ironlogic.training.picture_rows import PictureBatches, encode_pictures
from ironlogic.vision.answers import answer_pictures
from ironlogic.vision.splice import is_tiled

import peft
import torch

__all__ = ["FAULTS", "TILE_FAULTS", "break_splice", "train_fault", "train_unchecked"]

_TEXT_ONLY = "{% for m in messages %}{{ m.content if m.content is string else '' }}{{ '<|im_end|>' }}{% endfor %}"
_EVERYWHERE = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
_NOT_THE_PROJECTOR = peft.LoraConfig(target_modules=r".*language_model.*q_proj")


def _nowhere(input_ids, inputs_embeds, image_features):
    """In the place of LLaVA's mask: no position of the text is a picture's, so features are computed and lost."""
    return torch.zeros_like(inputs_embeds, dtype=torch.bool)


def _shift_a_tile(loaded: LoadedModel) -> None:
    """One place more for a picture's first view and one less for its last: the sum fits."""
    processor, write = loaded.processor, loaded.processor.replace_image_token

    def shifted(*inputs: Any, **options: Any) -> str:
        token, view = processor.image_token, processor.image_token * processor.image_seq_len
        head, _, tail = write(*inputs, **options).rpartition(view)
        return head.replace(view, view + token, 1) + view.removesuffix(token) + tail

    processor.replace_image_token = shifted


# Each changes a LLaVA splice in place, or gives the adapted model; of the last ones, a splice that cuts tiles.
FAULTS: dict[str, Callable[[LoadedModel], Any]] = {
    "pictures go nowhere (seed 004)": lambda x: setattr(x.model.model, "get_placeholder_mask", _nowhere),
    "a wrong image token id": lambda x: setattr(x.model.config, "image_token_index", 7),
    "template that reads text only (Qwen3's)": lambda x: setattr(x.processor, "chat_template", _TEXT_ONLY),
    "tower's output sliced wrong": lambda x: setattr(x.model.config, "vision_feature_select_strategy", "full"),
    "another tower's colours": lambda x: setattr(x.processor.image_processor, "image_mean", [0.5] * 3),
    "answers padded on the right": lambda x: setattr(x.processor.tokenizer, "padding_side", "right"),
    "head no longer tied": lambda x: setattr(x.model, "lm_head", copy.deepcopy(x.model.lm_head)),
    "LoRA inside the tower": lambda x: peft.get_peft_model(x.model, copy.deepcopy(_EVERYWHERE)),
    "LoRA without the projector": lambda x: peft.get_peft_model(x.model, copy.deepcopy(_NOT_THE_PROJECTOR)),
}
TILE_FAULTS: dict[str, Callable[[LoadedModel], Any]] = {
    "a tile's tokens off by one": _shift_a_tile,
}


def break_splice(loaded: LoadedModel, fault: str) -> LoadedModel:
    """The splice with that fault, which is spoiled by it: a LLaVA one, for `TILE_FAULTS` one that cuts tiles.

    Raises `ValueError` for an unknown fault, or one that such a splice can't have.
    """
    known = TILE_FAULTS if is_tiled(loaded) else FAULTS
    if fault not in known:
        raise ValueError(f"break_splice: no fault {fault!r}; expected one of {', '.join(known)}")
    adapted = known[fault](loaded)
    return loaded if adapted is None else replace(loaded, model=adapted)


def train_unchecked(
    loaded: LoadedModel, chats: Chats, settings: TrainSettings, *, learning_rate: float = 2e-3
) -> list[dict[str, float]]:
    """One pass over `chats` that asks nothing; projector and language model both learn, inside `loaded`.

    Metrics as of a run: step and loss, in nats per trained token.
    """
    rows, reader, _ = encode_pictures(loaded, chats, max_length=settings.max_length)
    batches, model = PictureBatches(reader), loaded.model.train()
    model.model.language_model.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, lines = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0), []
    for begin in range(0, len(rows), settings.batch_size):
        batch = batches(rows[begin : begin + settings.batch_size])
        loss = model(**{name: tensor.to(loaded.device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"step": len(lines) + 1, "loss": loss.item()})
    model.eval()
    return lines


def train_fault(
    build: Callable[..., LoadedModel],
    fault: str,
    chats: Chats,
    settings: TrainSettings,
    test: Iterable[Sequence[dict[str, Any]]],
    *,
    seed: int,
    watch: Any = None,
    **answering: Any,
) -> tuple[list[dict[str, float]], list[str]]:
    """`train_unchecked` of a fresh splice with that fault ("": none): its metrics, and its answers to `test`.

    A job of `run_parallel`, which nobody watches; `build` and `answering` as in `train_and_answer`.
    """
    loaded = build(seed=seed)
    if fault:
        loaded = break_splice(loaded, fault)
    metrics = train_unchecked(loaded, chats, settings)
    answers = answer_pictures(loaded, test, **answering)
    del loaded
    free_memory()
    return metrics, answers
