"""Pre-training of the nano models: batches of documents, two optimizers, one loop. Plain torch, no trainer.

Fine-tuning, with everything that a user's run needs, is `train`.
"""

import math
import random
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3MoeForCausalLM

__all__ = ["pretrain"]

Document = Callable[[random.Random], list[dict[str, str]] | str]  # a chat or a plain text, at random


def _batches(
    tokenizer: PreTrainedTokenizerFast, document_from: Document, rng: random.Random, rows: int = 64
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded token ids (B, T) and loss weights (B, T): 1 on what is to be said, 0.1 on prompts, 0 on padding.

    Documents of similar length share a batch; no document sees another.
    """
    start, assistant = tokenizer.convert_tokens_to_ids(["<|im_start|>", "assistant"])
    while True:
        texts = []
        for document in (document_from(rng) for _ in range(rows * 16)):
            chat = not isinstance(document, str)
            text = tokenizer.apply_chat_template(document, tokenize=False) if chat else document
            texts.append(text + "<|endoftext|>")
        documents = sorted(tokenizer(texts)["input_ids"], key=len)
        batches = [documents[i : i + rows] for i in range(0, len(documents), rows)]
        rng.shuffle(batches)
        for batch in batches:
            ids = torch.full((rows, max(map(len, batch))), tokenizer.pad_token_id)
            weights = torch.zeros(ids.shape)
            for row, document in enumerate(batch):
                role = assistant
                for t, token in enumerate(document):
                    ids[row, t] = token
                    if token == start:
                        role = document[t + 1]
                    weights[row, t] = 1.0 if role == assistant else 0.1
            yield ids, weights


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices (N, rows, columns), by five Newton-Schulz steps."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class _Muon(torch.optim.Optimizer):
    """Momentum orthogonalised (Jordan et al. 2024), in float32 and batched by shape.

    torch.optim.Muon works in bfloat16, which costs three times the whole step on a CPU without bfloat16 units.
    """

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "weight_decay": 0.05})

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            shapes.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in shapes.items():
            gradients = torch.stack([parameter.grad for parameter in parameters])
            momentum = self.state[parameters[0]].setdefault("momentum", torch.zeros_like(gradients))
            momentum.lerp_(gradients, 1 - group["momentum"])
            nesterov = gradients.lerp(momentum, group["momentum"])
            update = _orthogonal(nesterov.flatten(0, -3)).view_as(nesterov)
            scale = group["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5
            for parameter, change in zip(parameters, update, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-scale)


def pretrain(
    model: Qwen3ForCausalLM | Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    document_from: Document,
    *,
    steps: int,
    seed: int,
    muon_rate: float = 0.05,
    adam_rate: float = 6e-3,
) -> float:
    """Train on `steps` batches of 64 documents, in float32; returns the smoothed loss in nats per spoken token."""
    matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [_Muon(matrices, muon_rate), torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98))]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    warmup, smooth, began = max(20, steps // 20), math.nan, time.perf_counter()
    model.train()
    for step, (ids, weights) in zip(
        range(steps), _batches(tokenizer, document_from, random.Random(seed)), strict=False
    ):
        share = min(1.0, (step + 1) / warmup) * max(0.02, 1 - step / steps)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
        hidden = model.model(input_ids=ids).last_hidden_state
        spoken = weights[:, 1:] > 0
        losses = F.cross_entropy(model.lm_head(hidden[:, :-1][spoken]), ids[:, 1:][spoken], reduction="none")
        weight = weights[:, 1:][spoken]
        loss = (losses * weight).sum() / weight.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        now = losses[weight == 1].mean().item()
        smooth = now if math.isnan(smooth) else 0.98 * smooth + 0.02 * now
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1:5d}  loss {smooth:.3f}  {time.perf_counter() - began:5.0f} s", flush=True)
    return smooth
