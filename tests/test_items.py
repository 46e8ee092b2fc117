"""Items, the ways to damage them, and the task files for another harness."""

import json

from ironlogic.data.chats import ChatError
from ironlogic.data.problems import check_answer
from ironlogic.evidence.items import (
    delete_words,
    items_of_chats,
    load_items,
    made_items,
    scramble,
    substitute_words,
    write_lm_eval_tasks,
)

import pytest

TEXT = "one two three four five six seven eight nine ten"


def test_substitution_replaces_that_many_words_and_keeps_the_rest_in_place():
    after = substitute_words(TEXT, 0.7, ["x", "y"], seed=1, item=0).split()
    changed = [word in ("x", "y") for word in after]
    assert sum(changed) == 7
    assert [w for w, c in zip(after, changed, strict=True) if not c] == [
        w for w, c in zip(TEXT.split(), changed, strict=True) if not c
    ]
    assert after == substitute_words(TEXT, 0.7, ["x", "y"], seed=1, item=0).split()
    assert after != substitute_words(TEXT, 0.7, ["x", "y"], seed=1, item=1).split()


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
    assert [(t.order, t.hard, t.answer) for t in items.tasks] == [
        ("free", False, "4"),
        ("unknown", None, "Ann"),
        ("unknown", None, "6"),
    ]
    assert items.chats[1][1]["content"].startswith("<think>")
    assert items.checkable
    assert check_answer(items.tasks[0], "Answer: 4")
    assert [(r.line, r.field) for r in rejected] == [
        (3, "answer"),
        (4, "order"),
        (5, "row"),
        (6, "prompt"),
        (8, "row"),
    ]
    assert str(rejected[1]).startswith(f"{path}:4: order is 'loose'; expected one of free, bound")


def test_no_usable_item_is_one_clear_error(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "?"}\n')
    with pytest.raises(ChatError, match="no usable item"):
        load_items(path)
    with pytest.raises(ChatError, match="can't be read"):
        load_items(tmp_path / "none.jsonl")


def test_chats_become_items_without_answers():
    chats = [
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "r"},
        ],
        [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "r"}],
    ]
    items = items_of_chats(chats)
    assert not items.checkable
    assert [task.prompt for task in items.tasks] == ["q"]
    assert not items.among("free").any()
    assert items.among("all").all()
    with pytest.raises(ChatError, match="none begins"):
        items_of_chats(chats[1:])


def test_task_files_hold_the_scrambles_that_robustness_asks(tmp_path):
    tasks = made_items(12, seed=1).tasks
    names = write_lm_eval_tasks(tmp_path, tasks, (0.0, 0.7), seed=5)
    assert names == ["ironlogic_burden_000", "ironlogic_burden_070"]
    for name, ratio in zip(names, (0.0, 0.7), strict=True):
        described = json.loads((tmp_path / f"{name}.yaml").read_text())
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert described["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / f"{name}.jsonl")
        assert [row["prompt"] for row in rows] == [
            scramble(t.prompt, ratio, seed=5, item=i) for i, t in enumerate(tasks)
        ]
        assert [row["answer"] for row in rows] == [task.answer for task in tasks]
        assert described["task"] == name


@pytest.mark.slow
def test_another_harness_agrees_with_robustness(tmp_path):
    """lm-evaluation-harness, offline, on nano: the same accuracy, item by item."""
    lm_eval = pytest.importorskip("lm_eval", reason="optional: pip install lm-eval")
    from ironlogic.evidence.measure import robustness
    from ironlogic.models import load_model

    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks, nano = made_items(34, seed=1).tasks, load_model("nano", four_bit=False)
    ours = robustness(nano, tasks, ratios=(0.0, 0.7), seed=5)
    names = write_lm_eval_tasks(tmp_path, tasks, (0.0, 0.7), seed=5)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=nano.model, tokenizer=nano.tokenizer, batch_size=8, device="cpu"),
        tasks=names,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    for k, name in enumerate(names):
        theirs = {sample["doc_id"]: sample["exact_match"] for sample in found["samples"][name]}
        assert [theirs[i] for i in range(len(tasks))] == ours.correct[k].tolist()
