"""Loading: 4 bit for real, adapters, the silent bitsandbytes fault, clear refusals."""

import copy
import shutil

from ironlogic.models import DATA, ModelError, add_lora, as_loaded, inference, load_model
from ironlogic.presets import LoraSettings

import bitsandbytes
import pytest
import torch

LORA = LoraSettings(rank=4, alpha=8)


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", max_length=256)


def test_weights_are_in_four_bit(nano):
    packed = [p for p in nano.model.parameters() if type(p).__name__ == "Params4bit"]
    assert len(packed) == 4 * 7  # every linear layer of every block, never the head
    assert nano.four_bit_share > 0.4
    assert "4 bit" in str(nano)
    assert load_model("nano", four_bit=False).four_bit_share == 0.0


def test_pad_token_is_not_the_end_of_turn(nano):
    assert nano.tokenizer.pad_token_id != nano.tokenizer.eos_token_id


def test_lora_is_on_every_linear_layer_and_seeded():
    states = []
    for seed in (1, 1, 2):
        loaded = add_lora(load_model("nano"), LORA, seed=seed)
        trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 4 * 7
        assert all("lora_" in name for name in trained)
        states.append(next(p for name, p in trained.items() if "lora_A" in name).detach().clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_second_adapter_is_refused():
    loaded = add_lora(load_model("nano"), LORA, seed=1)
    with pytest.raises(ModelError, match="carries an adapter already"):
        add_lora(loaded, LORA, seed=1)


def gradients(loaded, ids, *, evaluate_first: bool) -> torch.Tensor:
    if evaluate_first:
        with inference(loaded) as model:
            model(input_ids=ids)
    loaded.model.train()
    loaded.model.zero_grad()
    loaded.model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in loaded.model.parameters() if p.grad is not None])


def test_evaluating_first_leaves_gradients_alone(monkeypatch):
    """bitsandbytes 0.50 repacks 4-bit weights for AVX512-BF16 in evaluation and then returns wrong gradients."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # as if this processor had it
    ids = torch.randint(10, 900, (2, 24), generator=torch.Generator().manual_seed(0))
    loaded = add_lora(load_model("nano"), LORA, seed=1)
    layers = [m for m in loaded.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert layers
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * len(layers)
    for p in loaded.model.parameters():  # B starts at zero, which would hide half of the gradients
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    before = gradients(loaded, ids, evaluate_first=False)
    after = gradients(loaded, ids, evaluate_first=True)
    torch.testing.assert_close(before, after)


def test_weights_kept_unpacked_give_the_same_bytes_and_notice_a_merge():
    loaded = add_lora(load_model("nano"), LORA, seed=1)
    layers = [m for m in loaded.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 4 * 7

    def compare():
        for layer in layers:
            x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
            with torch.inference_mode():
                assert torch.equal(layer(x), type(layer).forward(layer, x))
            both = layer(x), type(layer).forward(layer, x)
            assert torch.equal(*both)
            assert torch.equal(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in both))

    compare()
    for name, p in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    before = layers[0](torch.ones(1, layers[0].in_features))
    loaded.model.merge_adapter()
    assert not torch.equal(before, layers[0](torch.ones(1, layers[0].in_features)))
    compare()


def test_inference_restores_training_mode(nano):
    nano.model.train()
    with inference(nano) as model:
        assert not model.training
    assert nano.model.training
    nano.model.eval()
    with inference(nano):
        pass
    assert not nano.model.training


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-model", "no such folder, and not a hub name.*nano"),
        ("./nowhere", "no such folder"),
        ("", "no such folder"),
        ("/no/such/place/nano", "no such folder"),
        ("someone/some-model", "someone/some-model can't be loaded"),
        ("tests", "no config.json or adapter_config.json"),
    ],
)
def test_a_model_that_is_not_there_is_one_message(name, message, monkeypatch):
    monkeypatch.chdir(DATA.parent)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{not json"),
        ("model.safetensors", (DATA / "nano/model.safetensors").read_bytes()[:100_000]),
    ],
)
def test_a_damaged_folder_is_one_message(tmp_path, file, content):
    shutil.copytree(DATA / "nano", tmp_path / "cut")
    (tmp_path / "cut" / file).write_bytes(content)
    with pytest.raises(ModelError, match="cut can't be loaded") as caught:
        load_model(tmp_path / "cut")
    assert "\n" not in str(caught.value)


def test_context_is_at_most_the_models():
    assert load_model("nano", max_length=4096).max_length == 512


@pytest.mark.parametrize("asked", [False, True])
def test_adapter_stays_out_of_experts_unless_asked(asked):
    lora = LoraSettings(rank=4, alpha=8, experts=asked)
    loaded = add_lora(load_model("nano-moe", four_bit=False), lora, seed=1)
    names = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    assert names
    assert any("experts" in name for name in names) == asked


def test_plain_model_without_pad_token_is_refused(nano):
    tokenizer = copy.deepcopy(nano.tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no pad token"):
        as_loaded(nano.model, tokenizer)


def test_wraps_plain_models(nano):
    plain = as_loaded(nano.model, nano.tokenizer)
    assert plain.four_bit_share == pytest.approx(nano.four_bit_share)
    assert as_loaded(nano) is nano
