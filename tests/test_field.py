"""What people reported from the field, each built anew and small; the rule behind it is tested where it lives."""

import json
import shutil

from ironlogic.data.chats import ChatError, load_chats
from ironlogic.data.masking import encode_chat
from ironlogic.data.problems import check_answer
from ironlogic.export.gguf import ExportError
from ironlogic.export.write import export_gguf, merge_adapter, write_modelfile
from ironlogic.generate import end_ids, generate
from ironlogic.lens.attention import read_routing
from ironlogic.lens.read import read_layers
from ironlogic.models import DATA, LoadedModel, ModelError, add_lora, load_model, lora_places
from ironlogic.presets import LoraSettings
from ironlogic.vision.check import check_splice
from ironlogic.vision.splice import splice

import datasets
import gguf
import numpy as np
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file

IDS = torch.tensor([5, 17, 23, 101, 55, 9, 200, 31, 77, 12])
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def built(config: str, **more) -> LoadedModel:
    """An untrained model of that family, its weights large enough to tell its parts."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return LoadedModel(model, None)


# -- rows


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reasoning", "I look."),
        ("reasoning_details", [{"type": "reasoning.text", "text": "I look."}]),
        ("thought", "I look."),
        ("refusal", "I can't."),
        ("loss", False),
        *((name, 0) for name in ("weight", "train", "training", "trainable")),
    ],
)
def test_what_a_turn_says_of_itself_is_not_dropped(name, value):
    with pytest.raises(ChatError, match=rf"messages\[1\].{name} is"):
        load_chats([{"messages": [CHAT[0], CHAT[1] | {name: value}, *CHAT]}])
    assert len(load_chats([{"messages": [CHAT[0], CHAT[1] | {"weight": 1, "train": True, "loss": None}]}])) == 1


@pytest.mark.parametrize("name", ["video", "videos", "audio", "audios"])
def test_a_row_about_a_film_or_a_sound_is_rejected(name):
    with pytest.raises(ChatError, match=f"{name} is 'cat.mp4'; is not seen by any model here"):
        load_chats([{name: "cat.mp4", "messages": CHAT}])
    assert len(load_chats([{name: None, "messages": CHAT}])) == 1


def test_tables_with_odd_dates_saved_folders_and_a_home_are_read(tmp_path, monkeypatch):
    dates = pa.array([2**60, 1], pa.timestamp("ms"))
    table = pa.table({"instruction": ["q1", "q2"], "output": ["a1", "a2"], "at": dates})
    pq.write_table(table, tmp_path / "dates.parquet")
    chats = load_chats(tmp_path / "dates.parquet")
    assert (len(chats), len(chats.rejected)) == (1, 1)
    datasets.Dataset.from_list([{"instruction": "q", "output": "a"}]).save_to_disk(tmp_path / "saved")
    assert len(load_chats(tmp_path / "saved")) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jsonl").write_text(json.dumps({"instruction": "q", "output": "a"}))
    assert len(load_chats("~/mine.jsonl")) == 1


# -- models as people have them


def nano_copy(folder, **changed):
    """nano in `folder`; `changed`: what its settings files say otherwise, by name."""
    shutil.copytree(DATA / "nano", folder)
    for name, change in changed.items():
        settings = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(settings | change))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("token", "number"), [("<|endoftext|>", 0), ("<|vision_end|>", 4)])
def test_a_base_model_ends_an_answer_where_training_ends_it(tmp_path, token, number):
    """Its eos ends a document, as Qwen-Base's does; the template ends a turn with another token."""
    end = {"eos_token_id": number}
    settings = {"tokenizer_config": {"eos_token": token}, "generation_config": end, "config": end}
    folder = nano_copy(tmp_path / "base", **settings)
    loaded = load_model(folder, four_bit=False)
    encoded = encode_chat(CHAT, loaded.tokenizer)
    assert [label for label in encoded.labels if label >= 0][-1] in end_ids(loaded)
    (answer,) = generate(loaded, ["What is the opposite of the word hot please?"], max_new_tokens=24)
    assert answer.finished
    assert check_answer("cold", answer.text)
    file = export_gguf(folder, tmp_path / "m.gguf", quantization="f16")
    assert 'PARAMETER stop "<|im_end|>"' in write_modelfile(file, folder).read_text()
    end = gguf.GGUFReader(file).fields["tokenizer.ggml.eos_token_id"].contents()
    assert end == loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.slow
@pytest.mark.parametrize("several", ["a list in the settings", "a folder beside"])
def test_of_several_named_templates_the_default_is_taken(tmp_path, several):
    text = (DATA / "nano/chat_template.jinja").read_text()
    if several == "a folder beside":
        folder = nano_copy(tmp_path / "named")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    else:
        named = [{"name": "tool_use", "template": "{{ messages }}"}, {"name": "default", "template": text}]
        folder = nano_copy(tmp_path / "named", tokenizer_config={"chat_template": named})
        (folder / "chat_template.jinja").unlink()
    loaded = load_model(folder, four_bit=False)
    assert loaded.tokenizer.chat_template == text
    assert check_splice(splice("nano-vision", loaded)).passed
    assert export_gguf(folder, tmp_path / "m.gguf", quantization="f16").is_file()


def test_without_a_template_there_is_one_sentence(tmp_path):
    folder = nano_copy(tmp_path / "none")
    (folder / "chat_template.jinja").unlink()
    loaded = load_model(folder, four_bit=False)
    for work in (
        lambda: generate(loaded, ["hi"]),
        lambda: export_gguf(folder, tmp_path / "m.gguf", quantization="f16"),
        lambda: write_modelfile(tmp_path / "m.gguf", folder),
    ):
        with pytest.raises(ModelError, match="no chat template"):
            work()


def saved_adapter(folder, *, grow=False):
    model = transformers.AutoModelForCausalLM.from_pretrained(DATA / "nano", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "nano")
    if grow:
        model.resize_token_embeddings(len(tokenizer) + 9)
    whole = ["embed_tokens", "lm_head"] if grow else None
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
    peft.get_peft_model(model, settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_adapters_that_do_not_fit_or_are_damaged_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ModelError, match="size mismatch.*1033"):
        load_model(saved_adapter(tmp_path / "grown", grow=True), four_bit=False)
    cut = saved_adapter(tmp_path / "cut")
    (cut / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config.json: can't be read"):
        load_model(cut, four_bit=False)
    pickled = saved_adapter(tmp_path / "pickled")
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickles are not read"):
        load_model(pickled, four_bit=False)
    with pytest.raises(ExportError, match="pickles are not read"):
        merge_adapter(pickled, tmp_path / "merged")


def test_no_pickle_is_read_on_the_way_out(tmp_path):
    old = nano_copy(tmp_path / "old")
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="pickles are not read"):
        merge_adapter(old, tmp_path / "merged")


def test_a_hub_model_called_nano_is_not_ours(tmp_path):
    adapter = saved_adapter(tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "acme/nano"}))
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(adapter, four_bit=False)


# -- families


@pytest.mark.parametrize("config", ["LlamaConfig", "Phi3Config", "Glm4Config", "Starcoder2Config", "PhiConfig"])
def test_lora_sits_on_every_matrix_that_was_asked_for(config):
    loaded = built(config, **SMALL | ({"head_dim": 16} if config == "Glm4Config" else {}))
    places = lora_places(add_lora(loaded, LoraSettings(rank=4), seed=1).model)
    assert set(places) == {"attention", "mlp"}
    assert all(adapted == count > 0 for adapted, count in places.values())


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 32}),
        ("MixtralConfig", {"num_local_experts": 4}),
        ("GraniteMoeConfig", {"num_local_experts": 4}),
    ],
)
def test_routed_experts_carry_an_adapter_only_if_asked(config, more):
    options = SMALL | {"num_experts_per_tok": 2} | more
    without = lora_places(add_lora(built(config, **options), LoraSettings(rank=4, mlp=False), seed=1).model)
    assert without["experts"] == (0, 4)
    assert without["attention"] == (8, 8)
    asked = add_lora(built(config, **options), LoraSettings(rank=4, experts=True), seed=1)
    assert lora_places(asked.model)["experts"] == (4, 4)


def test_a_family_that_can_not_be_trained_is_refused_in_our_words():
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    deepseek = (
        ranks | experts | {"first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
    )
    with pytest.raises(ModelError, match="experts weights carry an adapter, expected 0"):
        add_lora(built("DeepseekV3Config", **SMALL | deepseek), LoraSettings(rank=4), seed=1)
    gpt2 = built("GPT2Config", vocab_size=300, n_embd=64, n_layer=2, n_head=4)
    with pytest.raises(ModelError, match="no layer named q_proj"):
        add_lora(gpt2, LoraSettings(rank=4), seed=1)
    assert read_layers(gpt2, IDS).proved  # learned positions and all


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("MixtralConfig", {}),
        ("GraniteMoeConfig", {}),
        ("GraniteMoeSharedConfig", {"shared_intermediate_size": 32}),
    ],
)
def test_routing_is_read_as_the_model_routed(config, more):
    loaded = built(config, **SMALL, num_experts_per_tok=2, num_local_experts=4, **more)
    used = []

    def note(_, args, kwargs):
        tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor)]
        used.append(next(part for part in tensors if not part.is_floating_point()))

    stacks = [module for name, module in loaded.model.named_modules() if name.endswith("experts")]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in stacks]
    with torch.no_grad():
        loaded.model(input_ids=IDS[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    reading = read_routing(loaded, IDS)
    assert reading.probabilities.shape[-1] == 4
    for chosen, right in zip(reading.chosen, used, strict=True):
        assert np.array_equal(np.sort(chosen, -1), np.sort(right.reshape(10, -1).numpy(), -1))
