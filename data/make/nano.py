"""The embedded default: a small Qwen3 language model, a mixture-of-experts sibling, a vision tower, conversations.

`python -m data.make.nano` makes everything in data/ again from one seed in about fifteen minutes on two cores; with
`--only vision` the vision towers alone (`nano_vision`), in about two. The language models learn the problems of
`tasks` in clean word order only, so that what a scramble does to them, and what Fragmented Training changes, can be
measured in minutes. It says nothing about models of 4B to 30B parameters.
"""

import argparse
import hashlib
import json
import random
import time
from pathlib import Path
from typing import Literal

from data.make.nano_vision import pretrain_tower, save_tower
from data.make.pretrain import pretrain
from ironlogic.data.problems import (
    ANIMALS,
    COLOR,
    GOODS,
    GROUP_OF,
    GROUPS,
    KINDS,
    NAMES,
    OBJECTS,
    OPPOSITE,
    SUPERLATIVE,
    make_task,
    make_tasks,
    task_chat,
)

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

__all__ = ["CHAT_TEMPLATE", "DATA", "build", "build_tokenizer", "dense_config", "moe_from_dense"]

DATA = Path(__file__).resolve().parent.parent
SPECIAL = (  # Qwen3's names, so that everything that knows Qwen3 finds them
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
THINKING = ("<think>", "</think>")  # one token each, but text to read, as in Qwen3's tokenizer
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'text' -%}{{- part.text -}}
      {%- elif part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}
    {%- if message.reasoning_content -%}
      {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' -}}
    {%- endif -%}
    {{- render(message.content) + '<|im_end|>' -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- render(message.content) + '<|im_end|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
SLOW = ("minus", "chain", "steps")  # the kinds that it learns last are shown twice as often
THINK_FIRST = {"role": "system", "content": "Think first."}


# --- the corpus -------------------------------------------------------------------------------------------
def _plain_sentence(rng: random.Random) -> str:
    """A sentence about the world outside any conversation."""
    kind = rng.randint(0, 7)
    if kind == 0:
        a, b = rng.randint(0, 40), rng.randint(0, 20)
        return f"{a} + {b} = {a + b}. {a + b} - {b} = {a}."
    if kind == 1:
        a, b = rng.randint(0, 24), rng.randint(0, 24)
        return f"{a} - {b} = {a - b}."
    if kind == 2:
        word = rng.choice(list(COLOR))
        return f"The {word} is {COLOR[word]}. It is one of the {GROUP_OF[word]}."
    if kind == 3:
        word = rng.choice(list(ANIMALS))
        return f"A {word} says {ANIMALS[word][0]}. The {word} is {ANIMALS[word][1]}."
    if kind == 4:
        (n, m), more = rng.sample(NAMES, 2), rng.choice(list(SUPERLATIVE))
        return f"{n} is {more} than {m}. So {m} is not {more} than {n}."
    if kind == 5:
        word = rng.choice(list(OPPOSITE))
        return f"The opposite of {word} is {OPPOSITE[word]}."
    if kind == 6:
        (n, m), thing = rng.sample(NAMES, 2), rng.choice(OBJECTS)
        return f"{n} gave the {thing} to {m}. Now {m} has the {thing}."
    group = rng.choice(list(GROUPS))
    return f"{', '.join(rng.sample(GROUPS[group], 3))} are {group}."


_COPY_WORDS = [*NAMES, *GROUP_OF, *OPPOSITE, *GOODS, *OBJECTS, *map(str, range(60))]


def corpus_document(rng: random.Random) -> list[dict[str, str]] | str:
    """One document: 12 % copying (the fast way to attention that copies), 13 % plain sentences, the rest chats."""
    share = rng.random()
    if share < 0.12:
        words = " ".join(rng.choice(_COPY_WORDS) for _ in range(rng.randint(4, 9)))
        return f"{words} ; {words}"
    if share < 0.25:
        return _plain_sentence(rng)
    kinds = [*KINDS, *SLOW]
    if share < 0.51:
        return [THINK_FIRST, *task_chat(make_task(rng.choice(kinds), rng), think=True)]
    chats = [task_chat(make_task(rng.choice(kinds), rng), think=False) for _ in range(1 if share < 0.82 else 2)]
    return [message for chat in chats for message in chat]


def build_tokenizer(rng: random.Random, *, vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus; numbers up to 99 and all words of the world come out as one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    texts = []
    for _ in range(20_000):
        document = corpus_document(rng)
        texts.append(document if isinstance(document, str) else "\n".join(m["content"] for m in document))
    texts += [" " + " ".join(map(str, rng.sample(range(100), 20))) for _ in range(2_000)]
    texts += ["system", "user", "assistant"] * 2_000  # the headers: one token each
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *THINKING],  # whole, and the first ids
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )
    return tokenizer


# --- the models -------------------------------------------------------------------------------------------
def dense_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """1.1 M parameters. Widths are multiples of 64 (bitsandbytes) and head_dim is 128 (reading GGUF back)."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def moe_from_dense(dense: Qwen3ForCausalLM, *, experts: int = 4) -> Qwen3MoeForCausalLM:
    """The dense model with every feed-forward layer copied into `experts` experts, two of them used per token.

    Before any training it computes what the dense model computes, as the two routing weights sum to 1 (sparse
    upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055); the routers start random, so the copies part ways.
    """
    keep = dense.config.to_dict()
    for name in (
        "model_type",
        "architectures",
        "layer_types",
        "use_sliding_window",
        "sliding_window",
        "dtype",
    ):
        keep.pop(name, None)
    config = Qwen3MoeConfig(
        **keep,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=dense.config.intermediate_size,
        router_aux_loss_coef=0.01,
    )
    moe = Qwen3MoeForCausalLM(config)
    state = moe.state_dict()
    for name, value in dense.state_dict().items():
        if ".mlp." not in name:
            state[name].copy_(value)
    for ours, theirs in zip(moe.model.layers, dense.model.layers, strict=True):
        fused = torch.cat([theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight])
        ours.mlp.experts.gate_up_proj.data.copy_(fused.expand_as(ours.mlp.experts.gate_up_proj))
        down = theirs.mlp.down_proj.weight
        ours.mlp.experts.down_proj.data.copy_(down.expand_as(ours.mlp.experts.down_proj))
    return moe


# --- what is shipped --------------------------------------------------------------------------------------
def build(
    folder: Path = DATA,
    *,
    seed: int = 3407,
    steps: int = 2800,
    moe_steps: int = 80,
    vision_steps: int = 1200,
    only: Literal["all", "vision"] = "all",
) -> None:
    """Everything in data/: tokenizer, dense model, mixture of experts, vision tower, 248 conversations, README."""
    began = time.perf_counter()
    if only == "all":
        _build_language(folder, seed, steps, moe_steps)
    for kind, name in (("clip", "nano-vision"), ("siglip", "nano-siglip")):
        print(f"{name}: {vision_steps} steps")
        save_tower(pretrain_tower(kind, seed=seed, steps=vision_steps), folder / name)
    _write_readme(folder, seed, steps, moe_steps, vision_steps)
    print(f"{folder} made in {time.perf_counter() - began:.0f} s")


def _build_language(folder: Path, seed: int, steps: int, moe_steps: int) -> None:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(random.Random(seed))
    dense = Qwen3ForCausalLM(dense_config(tokenizer))
    print(f"nano: {sum(p.numel() for p in dense.parameters()):,} parameters, {steps} steps")
    pretrain(dense, tokenizer, corpus_document, steps=steps, seed=seed)
    _save(dense, tokenizer, folder / "nano")
    moe = moe_from_dense(dense)
    print(f"nano-moe: {sum(p.numel() for p in moe.parameters()):,} parameters, {moe_steps} steps")
    pretrain(moe, tokenizer, corpus_document, steps=moe_steps, seed=seed + 1, muon_rate=0.02, adam_rate=2e-3)
    _save(moe.to(torch.bfloat16), tokenizer, folder / "nano-moe")
    _write_conversations(folder / "reasoning-248.jsonl", seed)


def _save(model: Qwen3ForCausalLM | Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_conversations(path: Path, seed: int) -> None:
    """As many rows as the seeds' dataset; hard problems with a short reasoning trace, easy ones without."""
    lines = [
        {"messages": task_chat(task), "kind": task.kind, "order": task.order, "answer": task.answer}
        for task in make_tasks(248, seed=seed)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_readme(folder: Path, seed: int, steps: int, moe_steps: int, vision_steps: int) -> None:
    """Origin, licence and sha256 of every file."""
    made = ("evidence", "nano", "nano-moe", "nano-vision", "nano-siglip")
    made += ("python-docs.jsonl", "reasoning-248.jsonl")
    shipped = sorted(p for name in made for p in [folder / name, *folder.glob(f"{name}/*")] if p.is_file())
    rows = [
        f"| `{path.relative_to(folder).as_posix()}` | {path.stat().st_size:,} "
        f"| `{hashlib.sha256(path.read_bytes()).hexdigest()}` |"
        for path in shipped
    ]
    text = f"""# The embedded default ("nano")

The models and conversations here are made by `python -m data.make.nano` from the seed {seed} ({steps} steps of
pre-training for the dense model, {moe_steps} more for the mixture of experts, {vision_steps} for each vision tower)
and belong to this project, under its licence (Apache-2.0). Nothing was taken from anywhere but
Python's docstrings and scans of digits: the problems are generated by `ironlogic/data/problems.py`, the pictures by
`ironlogic/data/scenes.py` from the 1,797 scans that scikit-learn brings (E. Alpaydin and C. Kaynak,
Optical Recognition of Handwritten Digits, UCI, CC BY 4.0).
`python -m data.make.nano --only vision` makes the towers alone.
Floating-point sums differ between processors, so another machine makes models that answer alike but are not
equal byte for byte.

- `nano/`: a Qwen3 language model and its tokenizer, float32.
- `nano-moe/`: the same as a mixture of four experts a layer, two used per token, bfloat16.
- `nano-vision/`: a CLIP-shaped vision tower of 183,680 parameters and its image processor, float32.
- `nano-siglip/`: the same in SigLIP's shape, 183,488 parameters, for splices that cut pictures into tiles.
- `reasoning-248.jsonl`: 248 conversations, the number of the seeds; `<think>` on the hard ones.
- `python-docs.jsonl`: 400 questions about Python's standard library, answered by its own docstrings (PSF
  License 2), as an example of real text: `python -m data.make.python_docs`.
- `evidence/`: what studies of nano and of SmolLM2-135M-Instruct measured: every finding with its interval and rule,
  every measure of every arm, the learning rates that were tried, day, machine and versions. README says how each
  is made.
- `pictures/`: for the project's README, from a run of the notebooks on nano (`python tests/pictures.py`).

| file | bytes | sha256 |
|---|---|---|
"""
    (folder / "README.md").write_text(text + "\n".join(rows) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.make.nano", description=build.__doc__)
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: data/)")
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--steps", type=int, default=2800, help="pre-training steps of the dense model")
    parser.add_argument("--moe-steps", type=int, default=80, help="further steps of the mixture of experts")
    parser.add_argument("--vision-steps", type=int, default=1200, help="pre-training steps of the vision tower")
    parser.add_argument("--only", choices=["all", "vision"], default="all", help="vision: leave the rest as it is")
    chosen = parser.parse_args()
    build(
        chosen.out,
        seed=chosen.seed,
        steps=chosen.steps,
        moe_steps=chosen.moe_steps,
        vision_steps=chosen.vision_steps,
        only=chosen.only,
    )


if __name__ == "__main__":
    main()
