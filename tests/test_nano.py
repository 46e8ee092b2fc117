"""What is shipped: whole, described, of the stated size; and the upcycling is exact before training."""

import hashlib
import json
import random
import re
from pathlib import Path

from data.make.nano import DATA, build_tokenizer, corpus_document, dense_config, moe_from_dense
from data.make.pretrain import pretrain
from ironlogic.data.problems import check_answer
from ironlogic.models import load_model

import pytest
import torch
import transformers


def test_files_are_those_of_the_readme():
    listed = dict(re.findall(r"\| `([^`]+)` \|[^|]+\| `([0-9a-f]{64})` \|", (DATA / "README.md").read_text()))
    files = [p for p in DATA.rglob("*") if p.is_file() and p.name != "README.md"]
    files = [p for p in files if not {"pictures", "make"} & {*p.parts}]
    shipped = {p.relative_to(DATA).as_posix(): p for p in files}
    assert set(listed) == set(shipped)
    for name, path in shipped.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == listed[name], name
    assert sum(path.stat().st_size for path in shipped.values()) < 25e6
    assert not [name for name in shipped if Path(name).suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_248_conversations_with_reasoning_on_the_hard_ones():
    rows = [json.loads(line) for line in (DATA / "reasoning-248.jsonl").read_text().splitlines()]
    assert len(rows) == 248
    assert {row["order"] for row in rows} == {"free", "bound"}
    assert all(check_answer(row["answer"], row["messages"][1]["content"]) for row in rows)
    thinking = sum("<think>" in row["messages"][1]["content"] for row in rows)
    assert 60 < thinking < 140


@pytest.mark.parametrize(("name", "parameters"), [("nano", 1_116_288), ("nano-moe", 2_887_808)])
def test_size_and_class(name, parameters):
    model = transformers.AutoModelForCausalLM.from_pretrained(DATA / name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.head_dim == 128
    assert model.config.model_type == ("qwen3_moe" if "moe" in name else "qwen3")


def test_template_knows_thinking_and_images():
    tokenizer = load_model("nano", four_bit=False).tokenizer
    text = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "reasoning_content": "hm", "content": "Answer: 1"},
        ],
        tokenize=False,
    )
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm\n</think>\nAnswer: 1<|im_end|>\n"
    )
    for special in ("<|image_pad|>", "<think>", "</think>", "assistant", "user", "system"):
        assert len(tokenizer.encode(special)) == 1, special


@pytest.mark.slow
def test_experts_compute_what_the_dense_model_computes():
    torch.manual_seed(0)
    dense = transformers.Qwen3ForCausalLM(dense_config(build_tokenizer(random.Random(0))))
    ids = torch.randint(0, 1000, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(moe_from_dense(dense)(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_experts_of_the_shipped_mixture_have_parted():
    model = transformers.AutoModelForCausalLM.from_pretrained(DATA / "nano-moe", dtype=torch.float32)
    for layer in model.model.layers:
        fused = layer.mlp.experts.gate_up_proj
        assert not torch.allclose(fused[0], fused[1], atol=1e-3)


@pytest.mark.slow
def test_pretraining_learns():
    torch.manual_seed(0)
    tokenizer = build_tokenizer(random.Random(0))
    model = transformers.Qwen3ForCausalLM(dense_config(tokenizer))
    first = pretrain(model, tokenizer, corpus_document, steps=1, seed=0)
    assert first == pytest.approx(6.93, abs=0.3)  # ln 1024: knows nothing
    pretrain(model, tokenizer, corpus_document, steps=12, seed=0)
    now = pretrain(model, tokenizer, corpus_document, steps=1, seed=1)  # the smoothed loss starts anew
    assert now < first - 1
