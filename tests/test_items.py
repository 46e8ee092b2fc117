"""Items and the ways to damage them."""

import json

from ironlogic.data.chats import ChatError
from ironlogic.data.problems import check_answer
from ironlogic.evidence.items import delete_words, items_of_chats, load_items, scramble, substitute_words

import pytest

TEXT = "one two three four five six seven eight nine ten"


def test_substitution_replaces_that_many_words_and_keeps_the_rest_in_place():
    after = substitute_words(TEXT, 0.7, ["x", "y"], seed=1, item=0).split()
    assert sum(word in ("x", "y") for word in after) == 7
    assert all(word in ("x", "y", before) for word, before in zip(after, TEXT.split(), strict=True))
    assert after == substitute_words(TEXT, 0.7, ["x", "y"], seed=1, item=0).split()
    assert after != substitute_words(TEXT, 0.7, ["x", "y"], seed=1, item=1).split()


def test_test_scrambles_are_drawn_by_seed_and_item():
    drawn = {scramble(TEXT, 0.7, seed=seed, item=item) for seed in range(4) for item in range(4)}
    assert len(drawn) > 12
    assert scramble(TEXT, 0.7, seed=1, item=0) == scramble(TEXT, 0.7, seed=1, item=0)


def test_deletion_takes_from_user_turns_only_and_keeps_the_order():
    chat = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
    after = delete_words(chat, 0.3, seed=1, row=0)
    left = after[0]["content"].split()
    assert len(left) == 7
    assert left == [word for word in TEXT.split() if word in left]
    assert after[1] == chat[1]
    assert chat[0]["content"] == TEXT


def test_own_items_are_read_and_bad_rows_are_named(tmp_path):
    rows = [
        {"prompt": "2 + 2?", "answer": 4, "order": "free", "hard": False},
        {"prompt": "Who?", "answer": "Ann", "reply": "<think>hm</think>\nAnswer: Ann"},
        {"prompt": "no answer"},
        {"prompt": "odd", "answer": "x", "order": "loose"},
        ["prompt"],
        {"prompt": "half \ud800", "answer": "x"},
        {"prompt": "3 + 3?", "answer": "6", "reply": None, "order": None},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n\n")
    items, rejected = load_items(path)
    marks = [(task.order, task.hard, task.answer) for task in items.tasks]
    assert marks == [("free", False, "4"), ("unknown", None, "Ann"), ("unknown", None, "6")]
    assert items.chats[1][1]["content"].startswith("<think>")
    assert items.checkable
    assert check_answer(items.tasks[0], "Answer: 4")
    faults = [(row.line, row.field) for row in rejected]
    assert faults == [(3, "answer"), (4, "order"), (5, "row"), (6, "prompt"), (8, "row")]
    assert str(rejected[1]).startswith(f"{path}:4: order is 'loose'; expected one of free, bound")
    path.write_text('{"question": "?"}\n')
    with pytest.raises(ChatError, match="no usable item"):
        load_items(path)
    with pytest.raises(ChatError, match="can't be read"):
        load_items(tmp_path / "none.jsonl")


def test_chats_become_items_without_answers():
    turns = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "q"), ("assistant", "r"))]
    picture = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "r"}]
    items = items_of_chats([turns, picture])
    assert not items.checkable
    assert [task.prompt for task in items.tasks] == ["q"]
    assert not items.among("free").any()
    assert items.among("all").all()
    with pytest.raises(ChatError, match="none begins"):
        items_of_chats([picture])
