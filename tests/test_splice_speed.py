"""Speed of stage 1 beside the seed's way of doing it: same rows, same labels, same loss, in one run.

The shapes are seed 004's: a SigLIP-B/16 tower for 512 x 512 pixels, a pixel-shuffle connector to 64 tokens a
picture, Qwen3-0.6B's width with its 151,936 words, every text token trained. Weights are random. Reduced here:
LAYERS of the 28 layers of the language model (one in the test run; LAYERS=4 for the table). The seed's way: one row
at a time, padded to 2,048 tokens, the tower run on it, logits for every place. It also cut a picture into up to 17
tiles; here both sides see one.

Measured on one thread of a shared 2-core machine, LAYERS = 4, rows of 92 to 114 tokens, both losses 11.93167:

    the seed's way                     86.80 s a row
    ours                                1.82 s a row   47.6 x
    ours, the tower's first look too    7.43 s a row   11.7 x
    head and loss of one row            3.49 GiB -> 0.051 GiB, 68 x (2,048 and 150 tokens)
"""

import os
import time
from functools import partial

from ironlogic.data.chats import make_chats
from ironlogic.training.picture_rows import PictureBatches, encode_pictures
from ironlogic.vision.features import cached_tower, compute_features, label_loss, open_head
from ironlogic.vision.splice import splice

import pytest
import torch
import transformers
from eyes import chat, image_processor, picture, tokenizer
from test_lens_speed import peak_mb
from transformers.loss.loss_utils import ForCausalLMLoss

LAYERS, PADDED, ROWS = int(os.environ.get("LAYERS", "1")), 2048, 8


def build(layers: int):
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    tower_config = transformers.SiglipVisionConfig(**sizes, image_size=512, patch_size=16, vision_use_head=False)
    tower = transformers.SiglipVisionModel(tower_config).eval()
    words = tokenizer()
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": layers, "head_dim": 128}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936}
    ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = transformers.Qwen3Config(**sizes, **ends, tie_word_embeddings=True, max_position_embeddings=4096)
    lm = transformers.Qwen3ForCausalLM(config)
    return splice(
        (tower, image_processor("siglip", 512)), (lm, words), projector="pixel_shuffle", max_length=PADDED
    )


def conversations():
    rows = []
    for index in range(ROWS):
        question = " ".join(["Which color is it?"] * (2 + index % 4))
        answer = " ".join(["It is red."] * (1 + index % 3))
        rows.append(chat(question, answer, picture().resize((640, 480))))
    return rows


def timed(call):
    began = time.process_time()
    result = call()
    return result, time.process_time() - began


@pytest.mark.benchmarks
@pytest.mark.slow
def test_stage_1_is_five_times_as_fast_at_the_same_loss(tmp_path, capsys):
    loaded = build(LAYERS)
    model = loaded.model
    projector = [p for p in model.parameters() if p.requires_grad]
    rows, reader, _ = encode_pictures(loaded, make_chats(conversations()), max_length=PADDED, loss="all")
    plain = PictureBatches(reader)

    def padded(row):
        batch = plain([row])
        space = (0, PADDED - row["length"])
        for name, filler in (("input_ids", loaded.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
            batch[name] = torch.nn.functional.pad(batch[name], space, value=filler)
        return batch

    def the_seeds_way(row):
        loss = model(**padded(row)).loss
        return loss.item(), torch.autograd.grad(loss, projector)

    def our_way(rows, features):
        batch = PictureBatches(reader, features)(rows)
        labels = batch.pop("labels")
        with open_head(model) as head, cached_tower(model):
            loss = label_loss(model(**batch).logits, labels, head)
        return loss.item(), torch.autograd.grad(loss, projector)

    (loss, gradients), seed_seconds = timed(lambda: the_seeds_way(rows[0]))
    keys = [key for row in rows for key in row["picture_keys"]]
    features, look_seconds = timed(lambda: compute_features(loaded, reader, keys, tmp_path, batch_size=ROWS))
    our_loss, our_gradients = our_way(rows[:1], features)
    assert our_loss == pytest.approx(loss, rel=1e-5)
    for ours, theirs in zip(our_gradients, gradients, strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()

    _, our_seconds = timed(lambda: our_way(sorted(rows, key=lambda row: row["length"]), features))
    first_seconds = our_seconds + look_seconds
    with capsys.disabled():
        lengths = [row["length"] for row in rows]
        print(f"\n{LAYERS} layers, {min(lengths)} to {max(lengths)} tokens, loss {loss:.5f} and {our_loss:.5f}")
        print(f"  the seed's way  {seed_seconds:8.2f} CPU seconds a row")
        for name, seconds in (("ours", our_seconds), ("ours, first look", first_seconds)):
            print(f"  {name:16}{seconds / ROWS:8.2f} CPU seconds a row: {seed_seconds * ROWS / seconds:.1f} x")
    assert seed_seconds * ROWS / our_seconds >= 5


@pytest.mark.benchmarks
@pytest.mark.slow
def test_head_and_loss_take_a_twentieth_of_the_memory(capsys):
    """Of one row of 150 tokens, in the seed's way padded to 2,048; 151,936 words."""
    torch.manual_seed(0)
    tokens, words, width = 150, 151_936, 1024
    head = torch.nn.Linear(width, words, bias=False).requires_grad_(False)
    hidden, labels = torch.randn(1, PADDED, width), torch.full((1, PADDED), -100)
    labels[:, 80:tokens] = torch.randint(0, words, (tokens - 80,))
    found = {}

    def work(name, length, loss):
        states = hidden[:, :length].clone().requires_grad_(True)
        value = loss(states, labels[:, :length])
        value.backward()
        found[name] = value.item(), states.grad[:, :tokens].norm().item()

    ours = partial(work, "ours", tokens, lambda states, labels: label_loss(states, labels, head))
    seed = partial(work, "seed", PADDED, lambda states, labels: ForCausalLMLoss(head(states), labels, words))
    sizes = {"ours": peak_mb(ours), "seed": peak_mb(seed)}
    with capsys.disabled():
        print(f"\nhead and loss of one row, MB: {sizes}")
    assert found["ours"] == pytest.approx(found["seed"], rel=1e-4)
    assert sizes["seed"] > 2000  # 1.16 GiB of logits, and their gradient
    assert sizes["seed"] >= 20 * sizes["ours"] > 0
