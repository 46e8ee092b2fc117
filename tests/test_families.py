"""The map of families: a tiny model of every causal language model that transformers builds, sent everywhere.

Each place is right, proved by other means than its own, or refused in our own words: someone else's traceback or a
wrong value fails. `families.md` is the map; `python tests/test_families.py [FAMILY ...]` draws its rows anew.
"""

import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run by hand

from ironlogic import IronLogicError
from ironlogic.export import export_lora_gguf, merge_adapter
from ironlogic.generate import chat_ids, end_ids, generate, visible_text
from ironlogic.lens import read_attention, read_layers, read_routing
from ironlogic.models import DATA, LoadedModel, add_lora, load_model, use_adapter
from ironlogic.presets import LoraSettings
from ironlogic.vision.check import check_splice
from ironlogic.vision.splice import splice

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny import build
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MAP = Path(__file__).with_name("families.md")
PLACES = ("load", "answers", "LoRA", "lens", "attention", "routing", "splice", "export")
HEAD = """# Families

What holds of every causal language model that transformers builds, on a tiny one of its kind: `right` (proved by
other means than its own) or `refused` in our own words. `tests/test_families.py` writes this table and compares it
with what it finds. Answers: together as alone. LoRA: on attention and MLP. Export: merged. Without experts there is
no routing to read.

"""
IDS = torch.tensor([[5, 17, 23, 101, 55, 9, 200, 31, 77, 12]])
# Encoders that decode on the side, decoders that want their encoder, and what has no small form
LEFT_OUT = set(
    """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small blt camembert cohere_compass_text
cpmant ctrl data2vec-text dbrx deepseek_v4 electra emu3 ernie gemma3 gemma3n gemma3n_text gemma4
gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 gpt-sw3 inkling_text jetmoe kimi_linear
llama4 longcat_flash marian mbart megatron-bert mllama modernbert-decoder moshi musicgen musicgen_melody mvp
nemotron_h pegasus phi4_multimodal plbart prophetnet qwen3_5 qwen3_5_moe qwen4_exp qwen4_exp_text reformer
rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xlstm
xmod zamba zamba2
""".split()
)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def check_loading(folder: Path, model) -> LoadedModel:
    loaded = load_model(folder, four_bit=False, backend="transformers")
    assert torch.allclose(logits(loaded.model), logits(model), atol=1e-5)
    return loaded


def check_answers(loaded: LoadedModel) -> None:
    """Prompts of other lengths at once get what each gets alone, cache and padding or not."""
    prompts = ["Who is it?", "Which number is the largest in this list: 4 9 2 please?"]
    together = generate(loaded, prompts, max_new_tokens=12)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor(chat_ids(loaded.tokenizer, [prompt]))
        asked = ids.shape[1]
        with torch.no_grad():
            for _ in range(answer.tokens):
                best = loaded.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, best], dim=1)
        assert answer.text == visible_text(loaded.tokenizer, ids[0, asked:].tolist(), end_ids(loaded))


def check_lora(loaded: LoadedModel) -> LoadedModel:
    """Every pair learns, none sits on a routed expert, and without them the base is back."""
    before = logits(loaded.model)
    adapted = add_lora(loaded, LoraSettings(rank=4), seed=1)
    assert torch.allclose(logits(adapted.model), before, atol=1e-5)
    factors = {name: p for name, p in adapted.model.named_parameters() if "lora_" in name}
    assert not any("expert" in name and "shared" not in name for name in factors)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in factors.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.model.train()
    adapted.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    adapted.model.eval()
    idle = [name for name, p in factors.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle, idle[:3]
    assert not torch.allclose(logits(adapted.model), before, atol=1e-3)
    with use_adapter(adapted, None):
        assert torch.allclose(logits(adapted.model), before, atol=1e-5)
    return adapted


def check_lens(loaded: LoadedModel) -> None:
    """Each row is what the model says that ends with this layer."""
    reading = read_layers(loaded, IDS, positions=None)
    count = len(reading.layers) - 1
    parent, name, layers = next(
        (parent, name, child)
        for parent in loaded.model.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == count
    )
    try:
        for layer in range(count + 1):
            setattr(parent, name, layers[:layer])
            log_p = logits(loaded.model)[0].double().log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1).numpy()
            assert np.abs(reading.entropy[layer] - entropy).max() < 1e-5, layer
    finally:
        setattr(parent, name, layers)


def check_attention(loaded: LoadedModel) -> None:
    reading = read_attention(loaded, IDS, positions=None)
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        right = loaded.model(input_ids=IDS, output_attentions=True, use_cache=False).attentions
    loaded.model.set_attn_implementation("sdpa")
    assert np.abs(reading.weights - torch.cat(right).numpy()).max() < 1e-5


def check_routing(loaded: LoadedModel) -> None:
    """The experts read are those that were given the tokens."""
    used = []

    def note(_, args, kwargs):
        tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor)]
        chosen = next((part for part in tensors if not part.is_floating_point()), None)
        width = reading.probabilities.shape[-1]
        if chosen is None and tensors[-1].shape[-1] == width:  # logits: Aria
            chosen = tensors[-1].topk(reading.chosen.shape[-1]).indices
        elif chosen is None:  # every token for every expert, zeros where it is not asked: Llama 4
            asked = tensors[-1].reshape(width, IDS.shape[1], -1).abs().sum(-1).T
            chosen = asked.topk(reading.chosen.shape[-1]).indices
        used.append(chosen)

    reading = read_routing(loaded, IDS)
    stacks = [
        module
        for name, module in loaded.model.named_modules()
        if name.endswith(".experts") and "shared" not in name
    ]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in stacks]
    logits(loaded.model)
    for hook in hooks:
        hook.remove()
    for chosen, right in zip(reading.chosen, used, strict=True):
        assert np.array_equal(np.sort(chosen, -1), np.sort(right.reshape(IDS.shape[1], -1).numpy(), -1))


def check_export(adapted: LoadedModel, out: Path) -> None:
    """Merged, and read again by plain transformers. What carries no adapter is written as it is."""
    source = Path(adapted.base)
    if isinstance(adapted.model, peft.PeftModel):
        source = out / "adapter"
        adapted.model.save_pretrained(source)
    merged = transformers.AutoModelForCausalLM.from_pretrained(merge_adapter(source, out / "merged"))
    same = logits(merged).log_softmax(-1), logits(adapted.model).log_softmax(-1)
    assert torch.allclose(*same, atol=1e-3)


def travel(kind: str, folder: Path) -> dict[str, str]:
    """What becomes of a family in every place; whatever is neither right nor our own refusal is raised."""
    found = {}

    def send(place: str, work: Callable[[], Any]) -> Any:
        try:
            result = work()
        except IronLogicError:
            found[place] = "refused"
            return None
        found[place] = "right"
        return result

    model, tokenizer = build(kind), transformers.AutoTokenizer.from_pretrained(DATA / "nano")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    loaded = send("load", lambda: check_loading(folder / "base", model))
    loaded = loaded or LoadedModel(model, tokenizer, base=str(folder / "base"))
    send("answers", lambda: check_answers(loaded))
    send("lens", lambda: check_lens(loaded))
    send("attention", lambda: check_attention(loaded))
    send("routing", lambda: check_routing(loaded))
    adapted = send("LoRA", lambda: check_lora(loaded))
    send("export", lambda: check_export(adapted or loaded, folder))
    send("splice", lambda: check_splice(splice("nano-vision", (model, tokenizer))).require())
    return found


def read_map() -> dict[str, dict[str, str]]:
    """The rows of the table by family."""
    lines = MAP.read_text(encoding="utf-8").splitlines() if MAP.is_file() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    return {kind: dict(zip(PLACES, row, strict=True)) for kind, *row in cells}


def write_map(rows: dict[str, dict[str, str]]) -> None:
    lines = [("family", *PLACES), ("---",) * (1 + len(PLACES))]
    lines += [(kind, *(rows[kind][place] for place in PLACES)) for kind in sorted(rows)]
    MAP.write_text(HEAD + "".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")


def test_every_family_is_on_the_map_or_left_out_by_name():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == set(read_map()) | LEFT_OUT
    assert not set(read_map()) & LEFT_OUT


@pytest.fixture(scope="module")
def little_garbage():
    """Loading collects garbage; among all that was imported this takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("kind", read_map())
def test_a_family_is_right_or_refused_everywhere(kind, tmp_path, little_garbage):
    assert travel(kind, tmp_path) == read_map()[kind]


def lora(**more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | more)


ADAPTERS = {  # kind: (settings, whether it can be merged, whether it can be left beside as a LoRA file)
    "pairs": (lora(), True, True),
    "DoRA": (lora(use_dora=True), True, False),
    "trained biases": (lora(bias="all"), True, False),
    "bias of its own": (lora(lora_bias=True), False, False),
    "on the tied head": (lora(target_modules=["lm_head"]), False, False),
    "some tokens": (lora(trainable_token_indices=[5, 17]), True, False),
    "starts by changing the base": (lora(init_lora_weights="pissa"), True, False),
    "IA3": (
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        True,
        False,
    ),
    "a prompt": (peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), False, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_every_kind_leave_right_or_not_at_all(kind, tmp_path, little_garbage):
    settings, merges, stays = ADAPTERS[kind]
    base = transformers.AutoModelForCausalLM.from_pretrained(DATA / "nano", dtype=torch.float32)
    model = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
        trained = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    if merges:
        folder = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert torch.allclose(logits(merged), trained, atol=1e-3)
    else:
        with pytest.raises(IronLogicError):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    if stays:
        assert export_lora_gguf(tmp_path / "adapter", tmp_path / "lora.gguf").is_file()
    else:
        with pytest.raises(IronLogicError):
            export_lora_gguf(tmp_path / "adapter", tmp_path / "lora.gguf")


if __name__ == "__main__":
    rows = read_map()
    for kind in sys.argv[1:] or sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - LEFT_OUT):
        with tempfile.TemporaryDirectory() as place:
            rows[kind] = travel(kind, Path(place))
        write_map(rows)
        print(kind, rows[kind], flush=True)
