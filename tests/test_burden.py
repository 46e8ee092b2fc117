"""What a burden moves and what not; that a draw is uniform, keyed and the same anywhere; the disorder it makes."""

import copy
import hashlib
import itertools
import random
import re
import time
from collections import Counter

from ironlogic import burden as burdens
from ironlogic import units
from ironlogic.burden import (
    Burden,
    BurdenError,
    Disorder,
    apply_burden,
    burden_messages,
    expected_disorder,
    measure_disorder,
    moved_units,
    seed_burden,
)
from ironlogic.data.chats import Chats

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(150)]
LETTERS = "the cat, sat. Naïve e\u0301a \u0301x 你 好， 。 𠀀 「か\u3099」 ｶﾞ 한국어 नमस्ते"
LETTERS += " 👩\u200d👩\u200d👧 🇩🇪🇫🇷 ❤\ufe0f 你\ufe0f"
MARKS = [*"\ufe0f \U000e0100 \u200d \ud83d \udc00 \x00 \x07".split(" "), "```py\nx = 1\n```", "`a b`", "$x + y$"]
MARKS += ["\n~~~\n", "\n> ```\n> x y\n", "\na|b\n-|-\n1 2|3"]
SIGNS = r"` `` ``` $ $$ \( \) \begin{a} \end{a} < > <image> <|im_start|> <｜User｜> </think> www. ://"
URLS = ["https://a.b/c?d=e", "http://例"]
BLANKS = [*" \n\r\t\x0b\x1c\x85\xa0\u2003\u2028\u3000\ufeff\u200b", "  ", "\r\n"]
FRAGMENTS = [*LETTERS.split(" "), *MARKS, *SIGNS.split(), *URLS, *BLANKS]
hostile = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=40).map("".join)
ratios = st.sampled_from([0, 0.3, 0.5, 0.7, 1]) | st.floats(0, 1)
keys = st.tuples(st.integers(0, 3), st.integers() | st.text(max_size=5), st.integers(0, 3))


def seed_function(text, burden_ratio=0.7):
    """Seed 001's function, on the global generator, written out again."""
    if not text:
        return ""
    words = text.split(" ")
    if len(words) > 3:
        number = int(len(words) * burden_ratio)
        indices = random.sample(range(len(words)), number)
        subset = [words[i] for i in indices]
        random.shuffle(subset)
        shuffled = list(words)
        for i, index in enumerate(indices):
            shuffled[index] = subset[i]
        return " ".join(shuffled)
    return text


def plain_order(n, seed, key):
    """Positions 0..n-1 by (score, position), from the definition, with Python's own integers."""
    fields = b"".join(b"i%d;" % field for field in (seed, *key))
    start = int.from_bytes(hashlib.blake2b(fields, digest_size=8).digest(), "little")
    scores = []
    for position in range(n):
        x = (start + position * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        scores.append(((x ^ (x >> 31)) >> 28, position))
    return [position for _, position in sorted(scores)]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of a few hundred tokens: Chinese characters are three of them."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|image_pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bare, additional_special_tokens=special)
    fast.add_tokens(["ADDED"])
    assert 256 < len(fast) <= 301
    return fast


# ------------------------------------------------------------------------------------------------------- the draw
@settings(deadline=None)
@given(st.lists(st.text("abc.,!", min_size=1, max_size=5), max_size=60), st.integers(0, 1000), st.integers(0, 9))
def test_a_plain_text_follows_the_written_definition(words, row, tenths):
    k = (2 * tenths * len(words) + 10) // 20  # ratio * n, halves up, in whole numbers
    drawn = plain_order(len(words), 5, (1, row, 0))[:k]
    expected = list(words)
    for place, source in zip(drawn, sorted(drawn), strict=True):
        expected[place] = words[source]
    assert apply_burden(" ".join(words), ratio=tenths / 10, seed=5, key=(1, row, 0)) == " ".join(expected)


def test_known_keys_give_known_bytes():
    text = "The quick brown fox jumps\n  over 9 lazy dogs, `see this` and 请看这里。"
    known = {
        (0, 0, 0, 0): "lazy quick brown The 9\n  over and fox dogs, `see this` jumps 里。这请看",
        (3407, 2, 17, 1): "quick dogs, fox over jumps\n  brown 9 The lazy `see this` and 请。这里看",
        (3407, 2, "row-17", 1): "The fox brown dogs, jumps\n  over 9 and quick `see this` lazy 。里看请这",
    }
    for (seed, *key), moved in known.items():
        assert apply_burden(text, seed=seed, key=tuple(key)) == moved
    letters = "The xuick brown doq jumps\n  over 9 lazg dons, `see this` ayf 请看这里。"
    assert apply_burden(text, unit="char", ratio=0.2, key=(0, 0, 0)) == letters
    seeded = "fox quick brown this` jumps\n  `see 9 lazy dogs, The over and 请看这里。"
    assert apply_burden(text, unit="seed", key=(0, 0, 0)) == seeded
    sentences = apply_burden("One. Two? Three! Four", unit="sentence", ratio=1, key=(0, 0, 2))
    assert sentences == "Two? One. Three! Four"


def test_permutations_are_uniform():
    """Chi-square of the 24 orders of 4 words, and of which 2 of 4 move; 23 and 5 degrees of freedom, p = 1e-4."""
    orders = Counter(apply_burden("a b c d", ratio=1, key=(row,)) for row in range(6000))
    assert len(orders) == 24
    assert sum((seen - 250) ** 2 / 250 for seen in orders.values()) < 57
    pairs = Counter(frozenset(burdens.draw(4, 10**15 * row, 0.5).tolist()) for row in range(6000))
    assert len(pairs) == 6
    assert sum((seen - 1000) ** 2 / 1000 for seen in pairs.values()) < 26


def test_fields_of_a_key_do_not_run_into_each_other():
    text = " ".join(WORDS)
    cases = [(1, 23), (12, 3), ("1", 23), ("1", "23"), ("12", "3"), ("i1;i23;",), (1, 23, 0), (-1, 23), ()]
    assert len({apply_burden(text, key=key) for key in cases}) == len(cases)
    assert apply_burden(text, seed=1, key=(2,)) != apply_burden(text, seed=12)
    assert apply_burden(text, key=(np.int64(1), 23)) == apply_burden(text, key=(1, 23))


# ---------------------------------------------------------------------------------------- what stays, what moves
@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(hostile, ratios, keys)
def test_words_keep_their_number_and_whitespace_its_place(text, ratio, key):
    moved = apply_burden(text, ratio=ratio, key=key)
    before, after = units.pieces_of(text, "word"), units.pieces_of(moved, "word")
    assert after[::2] == before[::2]
    assert Counter(after[1::2]) == Counter(before[1::2])
    assert re.findall(r"\s", moved) == re.findall(r"\s", text)
    ends = list(itertools.accumulate(map(len, before)))
    for start, end in units.protected_spans(text, units.PROTECTED):
        held = [i for i, stop in enumerate(ends) if start < stop and stop - len(before[i]) < end]
        assert held
        assert [after[i] for i in held] == [before[i] for i in held]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(hostile, st.sampled_from(["word", "char", "sentence", "seed"]), ratios, keys)
def test_no_character_is_lost_and_taking_apart_is_exact(text, unit, ratio, key):
    pieces = units.pieces_of(text, unit)
    assert "".join(pieces) == text
    assert len(pieces) % 2 == 1
    moved = apply_burden(text, unit=unit, ratio=ratio, key=key)
    assert sorted(moved) == sorted(text)
    assert apply_burden(text, unit=unit, ratio=0, key=key) == text
    disorder = measure_disorder(text, moved, unit=unit)
    assert all(0 <= share <= 1 for share in (disorder.displaced, disorder.kendall_tau, disorder.bigrams_kept))
    assert "".join(piece for piece, _ in moved_units(text, moved, unit=unit)) == moved


SPANS = {
    "code": [
        *("`x = 1`", "``a ` b``", "```python\ndef f(x):\n    return x + 1\n```", "````md\n```py\nx = y\n```\n````"),
        *("~~~py\nx = y + 1\n~~~", "  ~~~~\n  ~~~\n  x = y\n  ~~~\n  ~~~~"),
        *("> ```py\n> x = y + 1\n> ```", "> > ~~~\n> > x = y + 1", ">     x = y + 1"),
    ],
    "url": ["https://example.org/a?b=c&d=1", "www.example.org/x", "ftp://a.b/c"],
    "latex": [
        *("$x^2 + y = 3$", "$$a\n= b$$", "\\(a + b\\)", "\\[ a + b \\]"),
        "\\begin{align}a &= b\\\\\n c\\end{align}",
    ],
    "tag": "<image> <|im_start|> <|vision_start|> <think> </think> <｜User｜> <br/> <start_of_turn>".split(),
    "table": [
        "| name | of it |\n|------|:-----:|\n| x y z | 1 2 |\n| a b c | 3 4 |",
        "name | of it\r\n--|--\r\nx y z | 1 2\r",
    ],
}


@pytest.mark.parametrize(("kind", "span"), [(kind, span) for kind, spans in SPANS.items() for span in spans])
def test_protected_spans_stay_where_they_are(kind, span):
    text = f"{' '.join(WORDS[:10])}\n{span}\n\n{' '.join(WORDS[10:20])}"

    def stays(row, **options):
        head, found, tail = apply_burden(text, ratio=1, key=(0, row, 0), **options).partition(span)
        return bool(found) and len(head.split()) == len(tail.split()) == 10

    assert all(stays(row, protect=(kind,)) for row in range(20))
    others = tuple(other for other in SPANS if other != kind)
    assert not all(stays(row, protect=others) for row in range(20))
    assert not all(stays(row, unit="seed") for row in range(20))  # the published recipe knows no spans


@pytest.mark.parametrize("fence", ["```python", "~~~"])
def test_an_open_fence_protects_to_the_end(fence):
    rest = f"\n{fence}\nfive six\n\nseven"
    assert all(apply_burden("one two three four" + rest, ratio=1, key=(i,)).endswith(rest) for i in range(9))


@pytest.mark.parametrize(
    "text",
    [
        *("from $5 to $6 or $7-$8, \\$9 or 10$", "a ` lone tick, x < y and a <b c> d", "a ~~~ b", "a > ```b"),
        *("cat x | grep y\nls | wc", "x | y\n\n---", "> plain words\n> of a quotation"),
    ],
)
def test_what_only_looks_like_a_span_moves(text):
    assert units.protected_spans(text, units.PROTECTED) == []


def test_a_unit_that_touches_a_span_stays():
    text = "look at `x y`, and (see https://a.b/c) or <image>Describe it now"
    fixed = {2: "`x", 3: "y`,", 6: "https://a.b/c)", 8: "<image>Describe"}
    for row in range(20):
        moved = apply_burden(text, ratio=1, key=(row,)).split(" ")
        assert {place: moved[place] for place in fixed} == fixed


def test_chinese_really_moves_and_words_never_grow_together():
    text = "请用Python和Java解释为什么天空是蓝色的，并给出三个例子。𠀀𠀁"
    moved = {apply_burden(text, key=(row,)) for row in range(50)}
    assert len(moved) == 50
    for one in moved:
        assert sorted(one) == sorted(text)
        assert set(re.findall(r"[A-Za-z]+", one)) == {"Python", "Java"}
    assert measure_disorder(text, moved.pop()).displaced > 0.4
    assert apply_burden("かき゛く が\u3099ぎ", ratio=1, key=(3,)).count("が\u3099") == 1


def test_characters_a_reader_sees_are_not_split():
    clusters = "👩\u200d👩\u200d👧 🇩🇪 🇫🇷 👍🏽 e\u0301 ने 각 ❤\ufe0f 🏴\U000e0067\U000e0062\U000e007f".split(" ")
    text = "ab " + "x".join(clusters) + "\n  cd"
    for row in range(30):
        moved = apply_burden(text, unit="char", ratio=1, key=(row,))
        assert Counter(units.pieces_of(moved, "char")[1::2]) == Counter(units.pieces_of(text, "char")[1::2])
        assert all(cluster in moved for cluster in clusters)
        assert units.pieces_of(moved, "char")[::2] == units.pieces_of(text, "char")[::2]
    assert units.pieces_of("\u0301a\u200d b", "char") == ["\u0301", "a\u200d", " ", "b", ""]


def test_sentences_move_whole():
    text = 'It is late. "Is it?" he said! Well…\n  A heading\nAnother line\n你好。再见！ 3.14 is pi.'
    whole = [
        "It is late.",
        '"Is it?"',
        "he said!",
        "Well…",
        "A heading",
        "Another line",
        "你好。",
        "再见！",
        "3.14 is pi.",
    ]
    moved = {apply_burden(text, unit="sentence", ratio=1, key=(row,)) for row in range(30)}
    assert len(moved) > 20
    for one in (text, *moved):
        assert sorted(units.pieces_of(one, "sentence")[1::2]) == sorted(whole)
        assert units.pieces_of(one, "sentence")[::2] == units.pieces_of(text, "sentence")[::2]
    held = {
        apply_burden("Use `x. y` now. Then go. And stop.", unit="sentence", ratio=1, key=(i,)) for i in range(9)
    }
    assert all(one.startswith("Use `x. y` now. ") for one in held)


def test_too_little_to_move():
    for text in ("", " ", "\n\n", "a", "  a\n", "`a b c d e f`"):
        assert all(apply_burden(text, unit=unit, ratio=1) == text for unit in ("word", "char", "sentence"))
    assert apply_burden("", unit="seed") == ""
    assert apply_burden("only three words", unit="seed") == "only three words"
    assert {apply_burden("a b", ratio=1, key=(row,)) for row in range(20)} == {"a b", "b a"}


ENDLESS = [
    text * 10_000 for text in ("~~~\n", "> ```\n", "a|b\n", "a|b\n|-\n", " ~~~~a", "> > >", "|-|", "````a\n")
]
ENDLESS += ["\\(" * 50_000, "\\begin{a}" * 10_000, "```" * 33_333, "``a" * 33_333, "$$x" * 33_333, "<|" * 50_000]


@pytest.mark.slow
@pytest.mark.parametrize("text", [*ENDLESS, "." * 100_000 + "x"])
def test_no_text_takes_quadratic_time(text):
    began = time.process_time()
    for unit in ("word", "sentence"):
        apply_burden(text, unit=unit)
    apply_burden("a" + "\u0301" * 30_000 + " " * 100_000 + "b", unit="char")
    assert time.process_time() - began < 10  # a quadratic pattern takes minutes here


# -------------------------------------------------------------------------------------------------- the seed's own
@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(hostile | st.lists(st.sampled_from(WORDS)).map(" ".join), ratios, st.integers(0, 2**32))
def test_the_seeds_function_word_for_word(text, ratio, state):
    rng = random.Random(state)
    random.seed(state)
    assert [seed_burden(text, ratio, rng) for _ in range(3)] == [seed_function(text, ratio) for _ in range(3)]
    assert rng.getstate() == random.getstate()
    keyed = {apply_burden("a b c d e f g h i j", unit="seed", key=(state, row)) for row in range(20)}
    assert len(keyed) == 20


# -------------------------------------------------------------------------------------------------------- tokens
def test_special_and_added_tokens_never_move(tokenizer):
    text = "<|im_start|>the cat sat<|image_pad|> ADDED on the mat ADDED and the dog 你好 `the log` end"
    before = tokenizer(text)["input_ids"]
    fixed = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    assert sum(token in fixed for token in before) == 4
    for row in range(20):
        moved = apply_burden(text, unit="token", ratio=1, key=(row,), tokenizer=tokenizer)
        assert sorted(moved) == sorted(text)
        assert "\ufffd" not in moved
        after = tokenizer(moved)["input_ids"]
        assert [token for token in after if token in fixed] == [token for token in before if token in fixed]
        assert moved.startswith("<|im_start|>")
        assert "`the log`" in moved
    assert apply_burden(text, unit="token", tokenizer=tokenizer) != apply_burden(text, tokenizer=tokenizer)
    assert measure_disorder(text, text, unit="token", tokenizer=tokenizer) == Disorder(0, 0, 1)


@pytest.mark.parametrize("wrong", [None, "gpt2", object()])
def test_tokens_need_a_fast_tokenizer(wrong):
    with pytest.raises(BurdenError, match="needs a fast tokenizer"):
        apply_burden("a b c d", unit="token", tokenizer=wrong)
    with pytest.raises(BurdenError, match="needs a fast tokenizer"):
        measure_disorder("a b", "b a", unit="token", tokenizer=wrong)


def test_half_a_character_is_no_text_for_a_tokenizer(tokenizer):
    with pytest.raises(BurdenError, match="surrogate"):
        apply_burden("a \ud83d b c", unit="token", tokenizer=tokenizer)


# ------------------------------------------------------------------------------------------------------ disorder
def brute_disorder(source):
    """Shares for a permutation given as source positions, pair by pair."""
    n = len(source)
    inverted = sum(a > b for a, b in itertools.combinations(source, 2)) / max(n * (n - 1) // 2, 1)
    kept = sum(b == a + 1 for a, b in itertools.pairwise(source)) / (n - 1) if n > 1 else 1
    return np.array([sum(a != i for i, a in enumerate(source)) / max(n, 1), inverted, kept])


def shares(disorder):
    return np.array([disorder.displaced, disorder.kendall_tau, disorder.bigrams_kept])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300).flatmap(lambda n: st.permutations(range(n))))
def test_disorder_of_a_permutation(source):
    before, after = (" ".join(f"w{i}" for i in order) for order in (range(len(source)), source))
    measured = measure_disorder(before, after)
    np.testing.assert_allclose(shares(measured), brute_disorder(source), atol=1e-12)


@pytest.mark.parametrize("n", range(1, 7))
def test_expected_disorder_is_the_mean_over_all_draws(n):
    for k in range(n + 1):
        total, count = np.zeros(3), 0
        for chosen in itertools.combinations(range(n), k):
            for images in itertools.permutations(chosen):
                source = list(range(n))
                for place, image in zip(chosen, images, strict=True):
                    source[place] = image
                total += brute_disorder(source)
                count += 1
        np.testing.assert_allclose(shares(expected_disorder(n, k / n)), total / count, atol=1e-12)


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        ("a b c d", "d c b a", (1, 1, 0)),
        ("", "", (0, 0, 1)),
        ("the cat the dog", "the dog the cat", (0.5, 0.5, 0)),
        ("a b c", "a c", (2 / 3, 0, 0)),
        ("a b a c", "c b a a", (0.5, 5 / 6, 1 / 3)),
        ("a b", "x a", (1, 0, 0)),
        ("你好吗", "吗好你", (2 / 3, 1, 0)),
    ],
)
def test_disorder_of_simple_texts(before, after, reached):
    assert measure_disorder(before, after) == Disorder(*reached)


def test_a_long_text_is_measured_quickly():
    text = " ".join(f"w{i}" for i in range(10_000))
    moved = apply_burden(text, ratio=1)
    began = time.process_time()
    measured = measure_disorder(text, moved)
    assert time.process_time() - began < 1
    assert 0.48 < measured.kendall_tau < 0.52


def test_moved_units_tell_what_to_colour():
    before, after = "one  two\nthree four", "two  one\nthree four"
    moved = moved_units(before, after)
    assert "".join(piece for piece, _ in moved) == after
    assert [piece for piece, is_moved in moved if is_moved] == ["two", "one"]


# ------------------------------------------------------------------------------------------- messages, data sets
def chat(row):
    words = " ".join(f"r{row}w{i}" for i in range(30))
    answer = {"role": "assistant", "content": "<think>It is as simple as that</think> Yes it is"}
    asked = [{"role": "user", "content": words}, answer, {"role": "user", "content": words[4:]}, answer]
    return [{"role": "system", "content": "You are kind and very patient indeed"}, *asked]


def test_only_the_chosen_roles_move_and_nothing_is_mutated():
    talk = [{**message, "weight": 1, "extra": {"a": [1]}} for message in chat(0)]
    frozen = copy.deepcopy(talk)
    for roles in (("user",), ("user", "system")):
        moved = burden_messages(talk, Burden(roles=roles), seed=7, epoch=2, row=5)
        for index, (old, new) in enumerate(zip(talk, moved, strict=True)):
            text = apply_burden(old["content"], seed=7, key=(2, 5, index))
            assert text != old["content"]
            assert new == {**old, "content": text if old["role"] in roles else old["content"]}
    assert talk == frozen


def test_of_a_content_list_only_the_text_parts_move():
    image, words = object(), " ".join(WORDS[:20])
    text = {"type": "text", "text": words}
    parts = [{"type": "image", "image": image, "text": words}, text, dict(text)]
    content = burden_messages([{"role": "user", "content": parts}], Burden(), row=3)[0]["content"]
    assert text["text"] == words
    assert content[0] == parts[0]
    assert content[1]["text"] == apply_burden(words, key=(0, 3, 0)) != words
    assert content[2]["text"] == apply_burden(words, key=(0, 3, 0, 1)) not in (words, content[1]["text"])
    plain = burden_messages([{"role": "user", "content": words}], Burden(), row=3)
    assert plain[0]["content"] == content[1]["text"]


def test_mix_is_the_share_of_rows_burdened_at_all():
    def burdened(mix, epoch=0):
        chosen = set()
        for row in range(500):
            moved = burden_messages(chat(row), Burden(mix=mix), epoch=epoch, row=row)
            changes = [moved[index] != chat(row)[index] for index in (1, 3)]
            assert all(changes) == any(changes)
            chosen |= {row} if any(changes) else set()
        return chosen

    third, half = burdened(0.3), burdened(0.5)
    assert abs(len(third) - 150) < 4 * (500 * 0.3 * 0.7) ** 0.5
    assert third < half
    assert burdened(0.3, epoch=1) != third
    assert burdened(0) == set()


def test_redraw_gives_every_epoch_its_own_order():
    for burden, orders in ((Burden(), 4), (Burden(redraw=False), 1), (Burden(redraw=False, mix=0.5), 1)):
        for row in range(20 if orders == 1 else 1):
            seen = {burden_messages(chat(row), burden, epoch=epoch, row=row)[1]["content"] for epoch in range(4)}
            assert len(seen) == orders


def apply(rows, burden, **options):
    return burden.apply(Chats(rows), **options).rows


@pytest.fixture
def rows():
    return datasets.Dataset.from_list([{"messages": chat(row), "source": f"s{row}"} for row in range(40)])


def test_a_data_set_is_the_messages_of_every_epoch_in_order(rows):
    burden = Burden(mix=0.6)
    done = apply(rows, burden, seed=9, epochs=3)
    assert done["row"] == list(range(40)) * 3
    assert done["epoch"] == [epoch for epoch in range(3) for _ in range(40)]
    assert done["source"] == rows["source"][:] * 3
    for line in done:
        before = rows[line["row"]]["messages"]
        assert line["messages"] == burden_messages(before, burden, seed=9, epoch=line["epoch"], row=line["row"])
        pairs = [(before[index]["content"], line["messages"][index]["content"]) for index in (1, 3)]
        reached = shares(units.pooled_disorder(pairs))
        assert [line["displaced"], line["kendall_tau"], line["bigrams_kept"]] == list(reached)
    assert 0 < sum(share == 0 for share in done["displaced"]) < 120


def test_a_data_set_does_not_depend_on_processes_or_order(rows):
    one = apply(rows, Burden(), seed=1, epochs=2)
    assert apply(rows, Burden(), seed=1, epochs=2, num_proc=2).to_list() == one.to_list()
    unnamed = rows.add_column("row", [i % 3 for i in range(40)])  # names no row, so the index does
    assert apply(unnamed, Burden(), seed=1, epochs=2).to_list() == one.to_list()
    mixed = apply(rows.add_column("row", list(range(40))).shuffle(seed=4), Burden(), seed=1, epochs=2)
    assert mixed["row"][:40] != list(range(40))
    assert sorted(mixed.to_list(), key=lambda line: (line["epoch"], line["row"])) == one.to_list()
    words = rows.add_column("row", [f"doc-{i}" for i in range(40)])
    assert apply(words.select([7]), Burden())[0] == apply(words, Burden())[7]


def test_a_data_set_of_content_lists_keeps_its_other_parts():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": " ".join(WORDS)}]
    data = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": parts}]}] * 3)
    done = apply(data, Burden())
    assert done.features["messages"] == data.features["messages"]
    assert [line["messages"][0]["content"][0] for line in done] == [parts[0]] * 3
    assert len({line["messages"][0]["content"][1]["text"] for line in done} - {parts[1]["text"]}) == 3


# -------------------------------------------------------------------------------------------------------- errors
NO_SHARES = (1.2, -0.1, "0.7", float("nan"), True, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        *(({"ratio": came}, f"ratio is {came!r}; expected a number from 0 to 1") for came in NO_SHARES),
        ({"mix": 2}, "mix is 2; expected a number from 0 to 1"),
        ({"unit": "words"}, "unit is 'words'; expected one of word, char, token, sentence, seed"),
        ({"unit": ["word"]}, "unit is ['word']; expected one of word, char, token, sentence, seed"),
        ({"protect": ("code", "emoji")}, "protect is ('code', 'emoji'); expected a tuple of names out of code, "),
        ({"protect": "code"}, "protect is 'code'; expected a tuple of names out of code, url, latex, tag, table"),
        ({"roles": ("bot",)}, "roles is ('bot',); expected a tuple of names out of system, developer, user, "),
        ({"redraw": 1}, "redraw is 1; expected True or False"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(BurdenError, match=re.escape("Burden: " + message)):
        Burden(**setting)
    if setting.keys() <= {"ratio", "unit", "protect"}:
        with pytest.raises(BurdenError, match=re.escape(message)):
            apply_burden("a b c", **setting)


def test_a_burden_read_back_from_json_is_the_same():
    assert Burden(protect=["code"], roles=["user"]) == Burden(protect=("code",), roles=("user",))
    assert hash(Burden(protect=[])) == hash(Burden(protect=()))


def said(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apply_burden(None), "apply_burden: text is None; expected a string"),
        (lambda: apply_burden("a b c", key=(1.5,)), "key (1.5,); expected a whole number"),
        (lambda: apply_burden("a b c", key=3), "key 3; expected a whole number"),
        (lambda: expected_disorder(-1, 0.5), "n is -1; expected a number of units"),
        (lambda: measure_disorder("a", None), "expected two strings"),
        (lambda: measure_disorder("a", "a", unit="line"), "unit is 'line'; expected one of"),
        (lambda: burden_messages("hello", Burden()), "messages is a str; expected a list"),
        (lambda: burden_messages([{"content": "x"}], Burden(), row=4), "row 4, message 0 is {'content': 'x'}"),
        (lambda: burden_messages(said(None), Burden()), "row 0, message 0: content is None"),
        (lambda: burden_messages(said([{"type": "text"}]), Burden()), "text is None; expected a string"),
        (lambda: Burden().apply([{"messages": []}]), "got a list; expected Chats"),
        (lambda: apply(datasets.Dataset.from_dict({"messages": []}), Burden()), "the data has no rows"),
        (lambda: apply(datasets.Dataset.from_dict({"messages": [[]]}), Burden(), epochs=0), "epochs is 0"),
        (lambda: apply(datasets.Dataset.from_dict({"messages": [[]], "epoch": [0]}), Burden()), "burdened already"),
    ],
)
def test_bad_input_is_said_in_one_line(call, message):
    with pytest.raises(BurdenError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
