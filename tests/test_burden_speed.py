"""Speed of the burden against the seed's own function and against the tokenizer that follows, in one run.

10,000 rows of about 150 words, frequencies as in natural text (Zipf), a quarter of the rows with line breaks, code,
formulas, tags or URLs and some with Chinese. CPU seconds of one thread, the best of several interleaved rounds.
"""

import random
import time

from ironlogic.burden import apply_burden

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROWS = 10_000
EXTRAS = [
    "\n```python\ndef f(x):\n    if x:\n        return x + 1\n    return 0\n```\n",
    " https://example.org/a/b?c=d ",
    " solve $x^2 + y = 3$ beside <image> ",
    "\n\n",
    "\n\n    ",
    "请用中文解释为什么天空是蓝色的，并给出三个例子。",
]


def make_texts():
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 9))) for _ in range(20_000)]
    words = [word + "," if rng.random() < 0.1 else word for word in words]
    frequency = [1 / rank for rank in range(1, len(words) + 1)]
    texts = []
    for _ in range(ROWS):
        line = rng.choices(words, frequency, k=rng.randint(100, 200))
        half = len(line) // 2
        extra = rng.choice(EXTRAS) if rng.random() < 0.25 else " "
        texts.append(" ".join(line[:half]) + extra + " ".join(line[half:]))
    return texts


def seed_function(text, burden_ratio=0.7):
    words = text.split(" ")
    indices = random.sample(range(len(words)), int(len(words) * burden_ratio))
    subset = [words[i] for i in indices]
    random.shuffle(subset)
    for i, index in enumerate(indices):
        words[index] = subset[i]
    return " ".join(words)


def cpu_seconds(work):
    began = time.process_time()
    work()
    return time.process_time() - began


@pytest.mark.slow
@pytest.mark.benchmarks
def test_burden_against_the_seed_and_the_tokenizer(monkeypatch, capsys):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    texts = make_texts()
    keys = [(0, row, 0) for row in range(ROWS)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(texts[:2000], trainers.BpeTrainer(vocab_size=4096, show_progress=False))
    assert tokenizer.get_vocab_size() == 4096
    works = {
        "seed": lambda: [seed_function(text) for text in texts],
        "reference": lambda: [apply_burden(text, key=key) for text, key in zip(texts, keys, strict=True)],
    }
    rounds = [{name: cpu_seconds(work) for name, work in works.items()} for _ in range(3)]
    best = {name: min(seconds[name] for seconds in rounds) for name in works}
    quarter = texts[: ROWS // 4]
    best["tokenizer"] = 4 * min(cpu_seconds(lambda: tokenizer.encode_batch(quarter)) for _ in range(2))
    with capsys.disabled():
        print()
        for name, seconds in best.items():
            micro = seconds / ROWS * 1e6
            print(f"{name:10} {micro:6.1f} us a row, {best['seed'] / seconds:5.2f} x the seed's speed")
        print(f"burden / tokenizer: {best['reference'] / best['tokenizer']:.1%} of its time")
    assert best["seed"] / best["reference"] >= 0.5
    assert best["reference"] <= 0.5 * best["tokenizer"]
