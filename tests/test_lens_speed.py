"""Cost of a checked layer reading against a bare forward pass, in one run; what it holds in memory.

A random Qwen3 of 28 layers, width 1,024 and V = 151,936 in bfloat16 (the shape of Qwen3-0.6B). CPU seconds of one
thread, the best of interleaved rounds. T is IRONLOGIC_LENS_TOKENS, 32 by default: a processor that emulates
bfloat16 needs a quarter of an hour for the 256 of a real prompt. The longer the prompt, the smaller our share.

Measured on such a processor, relative to the bare pass (the seed's loop: norm and head on every position):

    T                                      16     32     64    256
    last position, checked               1.18   1.08   1.07   1.00
    attention of the last position       1.16   1.17   1.15   1.12
    one head product a layer             1.65   1.36
    the seed's loop                      11.4   11.4
    all positions                         3.2    3.2           3.0
"""

import math
import os
import time
from itertools import accumulate

from ironlogic.lens.parts import decoder_layers, final_norm, output_head
from ironlogic.lens.read import read_layers

import pytest
import torch
import transformers

TOKENS = int(os.environ.get("IRONLOGIC_LENS_TOKENS", "32"))
VOCABULARY, ROUNDS = 151_936, 2


def make_model(*, layers: int = 28, width: int = 1024, dtype=torch.bfloat16):
    """Random weights without transformers' slow initialisation, logits of a spread as trained models have it."""
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=128,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    pool = (torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for begin in range(0, flat.numel(), pool.numel()):
                part = flat[begin : begin + pool.numel()]
                part.copy_(pool[: part.numel()])
            if parameter.ndim == 1:
                parameter.add_(1)
        model.model.norm.weight.mul_(6 * math.sqrt(1024 / width))
    return model.eval()


def bare(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def layer_loop(model, ids):
    """One position, one product with the head per layer."""
    with torch.inference_mode():
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        norm, head = final_norm(model), output_head(model)
        return [torch.softmax(head(norm(state[:, -1:]))[0, -1].float(), -1).topk(5) for state in states]


def works(model, ids):
    return {
        "bare forward pass": lambda: bare(model, ids),
        "ours, last position": lambda: read_layers(model, ids),
        "one head product a layer": lambda: layer_loop(model, ids),
        "ours, all positions": lambda: read_layers(model, ids, positions=None),
    }


def cpu_seconds(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(works: dict, *, rounds: int) -> dict[str, float]:
    """Best CPU seconds of each, interleaved; what takes more than three bare passes is done once."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, work in works.items():
            if best.get(name, 0) <= 3 * best.get("bare forward pass", math.inf):
                best[name] = min(cpu_seconds(work), best.get(name, math.inf))
    return best


def table(best: dict[str, float]) -> str:
    base = best["bare forward pass"]
    return "\n".join(f"{name:40} {seconds:8.2f} s {seconds / base:6.2f} x" for name, seconds in best.items())


@pytest.mark.benchmarks
@pytest.mark.slow
def test_a_checked_reading_costs_little_more_than_a_forward_pass(capsys):
    torch.set_num_threads(1)
    model = make_model()
    assert 550e6 < sum(p.numel() for p in model.parameters()) < 650e6
    ids = torch.randint(0, 150_000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    best = measure(works(model, ids), rounds=ROUNDS)
    with capsys.disabled():
        print(f"\nT = {TOKENS}, bfloat16, one thread\n{table(best)}")
    base = best["bare forward pass"]
    assert best["ours, last position"] <= 1.2 * base
    assert best["ours, all positions"] <= 12 * base
    assert best["ours, last position"] < best["one head product a layer"]


def peak_mb(work) -> float:
    """The most that torch held at once of what it allocated during the work, in MB; the same on every machine."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]  # what is freed counts below zero
    return max(accumulate(sizes)) / 1e6


@pytest.mark.slow
def test_extra_memory_does_not_grow_with_the_prompt(capsys):
    model = make_model(width=128)
    ours, others = {}, {}
    for tokens in (64, 512):
        ids = torch.randint(0, 150_000, (1, tokens), generator=torch.Generator().manual_seed(1))
        ours[tokens] = peak_mb(lambda ids=ids: read_layers(model, ids))
        others[tokens] = peak_mb(lambda ids=ids: bare(model, ids))
    logits = (len(decoder_layers(model)) + 2) * VOCABULARY * 4 / 1e6  # of one position in all layers
    with capsys.disabled():
        print(f"\npeak memory, MB: {ours}; a bare pass {others}; the logits alone {logits:.1f}")
    for tokens in ours:
        assert logits < ours[tokens] - others[tokens] < 1.5 * logits
    assert abs(ours[512] - ours[64]) < 1
