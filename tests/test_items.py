"""Items and the ways to damage them."""

import json
from dataclasses import replace

from ironlogic.data.chats import ChatError
from ironlogic.data.problems import check_answer
from ironlogic.evidence.items import (
    delete_words,
    items_of_chats,
    load_items,
    made_items,
    scramble,
    shuffle_answers,
    substitute_words,
)

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


def test_shuffled_answers_are_all_there_and_none_in_its_place():
    chats = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(9)]
    shuffled = shuffle_answers(chats, seed=1)
    assert [chat[0] for chat in shuffled] == [chat[0] for chat in chats]
    answers = [chat[-1]["content"] for chat in shuffled]
    assert sorted(answers) == [f"a{i}" for i in range(9)]
    assert not [i for i in range(9) if answers[i] == f"a{i}"]
    assert shuffled == shuffle_answers(chats, seed=1) != shuffle_answers(chats, seed=2)


def test_own_items_are_read_and_bad_rows_are_named(tmp_path):
    rows = [
        {"prompt": "2 + 2?", "answer": 4, "order": "free", "hard": False},
        {"prompt": "Who?", "answer": "Ann", "reply": "<think>hm</think>\nAnswer: Ann"},
        {"prompt": "no answer"},
        {"prompt": "odd", "answer": "x", "order": "loose"},
        ["prompt"],
        {"prompt": "half \ud800", "answer": "x"},
        {"prompt": "3 + 3?", "answer": "6", "reply": None, "order": None},
        {"prompt": "is it?", "answer": True},
        {"prompt": "Who?", "answer": "Bob"},
        {"prompt": "easy?", "answer": "x", "hard": 0},
        {"prompt": "kind?", "answer": 7.0, "kind": "sum"},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n\n")
    items, rejected = load_items(path)
    marks = [(task.order, task.hard, task.answer) for task in items.tasks]
    unknown = [("unknown", None, answer) for answer in ("Ann", "6", "7")]
    assert marks == [("free", False, "4"), *unknown]
    assert [task.kind for task in items.tasks] == ["item", "item", "item", "sum"]
    assert items.chats[1][1]["content"].startswith("<think>")
    assert items.checkable
    assert check_answer(items.tasks[0], "Answer: 4")
    faults = [(row.line, row.field) for row in rejected]
    assert faults[:4] == [(3, "answer"), (4, "order"), (5, "row"), (6, "prompt")]
    assert faults[4:] == [(8, "answer"), (9, "prompt"), (10, "hard"), (12, "row")]
    assert str(rejected[5]).endswith("stands in line 2 too")
    assert str(rejected[1]).startswith(f"{path}:4: order is 'loose'; expected one of free, bound")
    path.write_text('{"question": "?"}\n')
    with pytest.raises(ChatError, match="no usable item"):
        load_items(path)
    with pytest.raises(ChatError, match="can't be read"):
        load_items(tmp_path / "none.jsonl")


def test_a_question_is_put_with_its_system_prompt_and_the_form_of_its_answer(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "3 + 3?", "answer": 6}\n')
    items, _ = load_items(path, system="Be brief.", form="Say a number.")
    assert [message["content"] for message in items.ask("3? + 3")] == ["Be brief.", "3? + 3\n\nSay a number."]
    assert load_items(path)[0].ask("x") == [{"role": "user", "content": "x"}]
    solved = ({"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Answer: 2"})
    assert replace(items, shots=solved).ask("x")[1:3] == list(solved)


def test_intervals_are_over_kinds_where_there_are_enough():
    items = made_items(40, seed=1)
    free = items.among("free")
    assert list(items.kinds(free)) == [task.kind for task in items.tasks if task.order == "free"]
    few = replace(items, tasks=tuple(replace(task, kind=task.order) for task in items.tasks))
    assert few.kinds(free) is None


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
