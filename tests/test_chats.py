"""Reading chats: every form, every kind of bad row beside good ones, every kind of bad file; splitting."""

import copy
import io
import json
import re
from pathlib import Path

from ironlogic.data import chats
from ironlogic.data.chats import (
    ChatError,
    Chats,
    Rejected,
    RejectedRows,
    check_chat,
    image_parts,
    load_chats,
    make_chats,
)

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def chat(*texts: str, **extras) -> dict:
    """A row: texts by user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, **extras}


GOOD = chat("What is 2 + 2?", "4")
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def write(folder: Path, *lines: object, name: str = "x.jsonl") -> Path:
    path = folder / name
    path.write_bytes(
        b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)
    )
    return path


def load(source, **options):
    """(rows, rejected)"""
    chats = load_chats(source, **options)
    return chats.rows, list(chats.rejected)


def texts(dataset: datasets.Dataset) -> list[list[tuple[str, str]]]:
    return [[(turn["role"], turn["content"]) for turn in messages] for messages in dataset["messages"]]


# --- forms


PLAIN, SYSTEM = [("user", "Q"), ("assistant", "A")], ("system", "S")
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
FORMS = [
    (chat("Q", "A"), PLAIN),
    (chat("Q", "A", system="S"), [SYSTEM, *PLAIN]),
    ({"conversations": SHAREGPT}, PLAIN),
    ({"conversations": SHAREGPT, "system": "S"}, [SYSTEM, *PLAIN]),
    ({"conversations": [{"from": "system", "value": "S"}, *SHAREGPT], "system": "T"}, [SYSTEM, *PLAIN]),
    ({"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, PLAIN),
    ({"instruction": "Q", "output": "A"}, PLAIN),
    ({"instruction": "Q", "input": " ", "output": "A", "system": "", "history": []}, PLAIN),
    (
        {"instruction": "Q", "input": "more", "output": "A", "system": "S", "history": [["q", "a"]]},
        [SYSTEM, ("user", "q"), ("assistant", "a"), ("user", "Q\n\nmore"), ("assistant", "A")],
    ),
    (chat("Q", "A") | {"instruction": None, "output": None}, PLAIN),  # as in a table of two forms
    ({"messages": None, "instruction": "Q", "output": "A"}, PLAIN),
    ({"messages": [USER, USER, ANSWER, ANSWER]}, [("user", "q")] * 2 + [("assistant", "a")] * 2),
]


def test_the_forms_in_one_file(tmp_path):
    dataset, rejected = load(write(tmp_path, *[row for row, _ in FORMS]))
    assert texts(dataset) == [expected for _, expected in FORMS]
    assert rejected == []
    assert dataset["source_row"][:] == [*range(1, len(FORMS) + 1)]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", "list", "dataset"])
def test_every_source_gives_the_same_rows(tmp_path, kind):
    rows = [chat("q", "a", order="free", answer=3), chat("你好", "🙂", order="bound", answer=None)]
    path = tmp_path / f"x{kind}"
    if kind == ".jsonl":
        write(tmp_path, *rows)
    elif kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    before = copy.deepcopy(rows)
    source = {"list": rows, "dataset": datasets.Dataset.from_list(rows)}.get(kind, path)
    dataset, rejected = load(source)
    assert rejected == []
    assert dataset.to_list() == [rows[0] | {"source_row": 1}, rows[1] | {"source_row": 2}]
    assert rows == before


def test_a_number_too_long_to_print_and_a_key_that_is_no_text_in_memory():
    dataset, rejected = load([{"messages": 10**5000}, GOOD | {"\ud800": 1, 5: 2}])
    assert dataset.column_names == ["messages", "source_row"]
    assert [str(one) for one in rejected] == ["row 1: messages is <int>; expected a list of turns"]


def test_a_dataset_that_was_selected_from_keeps_its_choice():
    dataset = datasets.Dataset.from_list([chat(f"q{i}", "a") for i in range(5)]).select([3, 1])
    assert [one[0][1] for one in texts(load(dataset)[0])] == ["q3", "q1"]


# --- bad rows beside good ones

ROLE = {"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]}
NO_FORM = "expected messages, or conversations (ShareGPT), or instr"
NO_JSON = "expected JSON in UTF-8: "
PART = {"role": "assistant", "content": [{"type": "audio"}]}
BAD = [
    (ROLE, "messages[1].role is 'bot'; expected system, user or assistant"),
    (b'{"messages": [', f"line is '{{\"messages\": ['; {NO_JSON}Expecting value: column 15 (char 14)"),
    (b'{"a": "\xff"}', f"line is '{{\"a\": \"\ufffd\"}}'; {NO_JSON}'utf-8' codec can't decode byte 0xff in"),
    (b"[" * 100_000, f"line is '[[[[[[[[[[[[...[[[[[[[[[[[[['; {NO_JSON}maximum recursion depth"),
    (b'{"n": ' + b"1" * 5000 + b"}", f"line is '{{\"n\": 111111...111111111111}}'; {NO_JSON}Exceeds the"),
    ([1, 2], "row is [1, 2]; expected an object"),
    ({}, f"row has the fields nothing; {NO_FORM}"),
    ({"text": "x", "id": 1}, f"row has the fields text, id; {NO_FORM}"),
    ({"messages": None}, "messages is None; expected a list of turns"),
    ({"messages": []}, "messages is []; expected a list of turns"),
    ({"messages": ["hi"]}, "messages[0] is 'hi'; expected an object with role and content"),
    ({"messages": [{"role": ["user"], "content": "q"}]}, "messages[0].role is ['user']; expected system, user or"),
    ({"messages": [{"content": "q"}, ANSWER]}, "messages[0].role is None; expected system, user or assistant"),
    ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content is None; expected text"),
    (chat(5, "a"), "messages[0].content is 5; expected text"),
    (chat(" \n", "a"), "messages[0].content is ' \\n'; expected text"),
    (chat("q", []), "messages[1].content is ''; expected text"),
    ({"messages": [USER, PART]}, "messages[1].content[0] is {'type'"),
    ({"messages": [USER, ANSWER | {"tool_calls": [1]}]}, "messages[1].tool_calls is [1]; is not read"),
    ({"messages": [ANSWER]}, "messages has no user turn"),
    ({"messages": [USER]}, "messages has no assistant turn"),
    ({"messages": [USER, ANSWER, USER]}, "messages ends with a user turn; expected assistant"),
    ({"messages": [ANSWER, USER, ANSWER]}, "messages has an assistant turn before the first user turn"),
    (chat("\ud800", "a"), "messages[0].content holds half a surrogate pair, which is not Unicode text"),
    (chat("q", "a\0"), "messages[1].content holds a NUL character, a sign of UTF-16 or binary data"),
    (
        {"conversations": [{"from": "bot", "value": "q"}]},
        "conversations[0].from is 'bot'; expected system, human or",
    ),
    ({"instruction": "q", "output": ""}, "output is ''; expected text"),
    ({"instruction": "q", "output": "a", "history": [["q"]]}, "history[0] is ['q']; expected [question, answer]"),
    ({"instruction": "q", "output": "a", "history": 7}, "history[0] is 7; expected [question, answer]"),
    ({"texts": [5]}, "texts is [5]; expected a list of objects with user and assistant"),
]


@pytest.mark.parametrize(("row", "sentence"), BAD, ids=[sentence[:30] for _, sentence in BAD])
def test_a_bad_row_says_what_it_is_and_costs_no_good_one(tmp_path, row, sentence):
    path = write(tmp_path, chat("q1", "a1"), row, chat("q2", "a2"))
    dataset, rejected = load(path)
    assert [one[0][1] for one in texts(dataset)] == ["q1", "q2"]
    assert dataset["source_row"][:] == [1, 3]
    assert len(rejected) == 1
    assert str(rejected[0]).startswith(f"{path}:2: {sentence}")
    assert len(str(rejected[0])) < len(str(path)) + 300


def test_byte_order_mark_windows_newlines_and_blank_lines_keep_the_line_numbers(tmp_path):
    good = json.dumps(chat("a\u2028b", "c\u0085d"), ensure_ascii=False).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\r\n  \n" + good + b"\r\n" + good)  # no newline at the end
    dataset, rejected = load(path)
    assert dataset["source_row"][:] == [1, 4, 5]
    assert texts(dataset)[2] == [("user", "a\u2028b"), ("assistant", "c\u0085d")]
    assert rejected == []


@pytest.mark.slow
def test_a_line_of_50_megabytes_is_passed_by(tmp_path):
    path = write(tmp_path, GOOD, b'{"messages": "' + b"x" * 50_000_000 + b'"}', GOOD, b"y" * 40_000_000)
    dataset, rejected = load(path)
    assert dataset["source_row"][:] == [1, 3]
    assert [str(one) for one in rejected] == [f"{path}:{line}: line is longer than 32 MiB" for line in (2, 4)]


def test_text_that_is_not_utf8_inside_a_table_costs_its_row_only():
    messages = pa.array([chat("q", "a")["messages"]] * 3)
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    broken = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffc"))
    dataset, rejected = load(datasets.Dataset(pa.table({"messages": messages, "note": broken})))
    assert dataset["note"][:] == ["a", "c"]
    assert dataset["source_row"][:] == [1, 3]
    assert str(rejected[0]).startswith("row 2: row can't be read ('utf-8' codec can't decode byte 0xff")


# --- bad sources


def refuse(source, *parts: str, **options) -> None:
    with pytest.raises(ChatError) as caught:
        load_chats(source, **options)
    for part in parts:
        assert part in str(caught.value)


LINE = json.dumps(GOOD).encode()
EMPTY = "nothing to train on: it is empty; expected an object with a chat per row"
SOURCES = [
    ("x.jsonl", b"", [EMPTY]),
    ("x.jsonl", b"\n \n", [EMPTY]),
    ("x.json", b"[]", [EMPTY]),
    ("x.json", b'[\n  {"messages": []},\n  {"messages" []}\n]', ["expected JSON in UTF-8", "line 3 column 15"]),
    ("x.json", LINE + b"\n" + LINE, ["Extra data: line 2 column 1", "name the file .jsonl"]),
    ("x.json", LINE, ["x.json: holds {'messages':", "expected an array of objects"]),
    ("x.parquet", b"PAR1" * 9, ["x.parquet: can't be read", "check its path, rights and size"]),
    ("x.csv", LINE, ["x.csv: not a kind of file that is read here; expected .jsonl, .json, .parquet"]),
    ("x.jsonl", (json.dumps(ROLE).encode() + b"\n") * 4, ["4 rows left out\n  4 x messages[1].role is 'bot'"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), SOURCES)
def test_a_file_without_a_good_row_says_why(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, f"{name}: ", *parts)


def test_sources_that_lead_nowhere(tmp_path):
    write(tmp_path, GOOD, name="b.jsonl")
    refuse(tmp_path / "no.jsonl", "no.jsonl: can't be read ([Errno 2] No such file", "check its path")
    refuse(str(tmp_path), "is a directory; name one file in it (b.jsonl)")
    refuse("x" * 5000 + ".jsonl", "can't be read", "too long")
    refuse(3.5, "the source is a float; expected a path, hub name, list or Dataset")
    refuse([], "the rows: nothing to train on: it is empty")


def test_the_hub_is_asked_plainly_and_its_failures_are_one_message(monkeypatch, tmp_path):
    asked = []

    def hub(*args, **options):
        asked.append((args, options))
        if args[0] == "org/down":
            raise ConnectionError("Couldn't reach\nthe hub")
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(chats, "load_dataset", hub)
    assert len(load("org/chats", split="test")[0]) == 1
    assert len(load("org/many/one.part")[0]) == 1
    asked_for = [(("org/chats", None), {"split": "test"}), (("org/many", "one.part"), {"split": "train"})]
    assert asked == asked_for  # and no trust_remote_code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/many").mkdir(parents=True)
    refuse("org/many/one.part", "org/many/one.part: not a kind of file that is read here")
    refuse(
        "org/down",
        "org/down: no such file here, and the split 'train' of a hub dataset",
        "ConnectionError",
        "the hub is switched off here, set HF_HUB_OFFLINE=0",
    )
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    refuse("org/down", "ConnectionError", "or give the path of a local file")


def test_the_real_loader_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refuse("nobody/nothing-here", "nobody/nothing-here: no such file here", "could not be loaded (")


# --- columns


def test_scalars_of_one_type_stay_and_the_rest_goes():
    rows = [
        chat("q", "a", order="free", hard=True, level=1, share=1, mixed=1, deep=[1], big=2**70, only=None),
        chat("q", "a", order="bound", hard=False, level=2, share=0.5, mixed="x", long=2**60, deep=1, big=3),
        chat("q", "a", order=None, later=7, long=0.5, source_row=99, **{"": "unnamed"}),
    ]
    dataset, _ = load(rows)
    columns = dataset.remove_columns(["messages"]).to_dict()
    assert columns == {
        "source_row": [1, 2, 3],
        "order": ["free", "bound", None],
        "hard": [True, False, None],
        "level": [1, 2, None],
        "share": [1.0, 0.5, None],
        "later": [None, None, 7],
        "long": [None, float(2**60), 0.5],
        "": [None, None, "unnamed"],
    }


def test_rows_whose_keys_are_data_do_not_make_a_wide_table():
    dataset, _ = load([chat("q", "a", **{f"k{i}": i}) for i in range(100)])
    assert (len(dataset), len(dataset.column_names)) == (100, 2 + 64)


def test_rows_in_several_pieces_of_arrow(monkeypatch):
    monkeypatch.setattr(chats, "_BATCH", 1000)  # characters
    dataset, _ = load([chat(f"q{i}" * (i % 50), f"a{i}", n=i) for i in range(1, 200)])
    rows = [i for i in range(1, 200) if i % 50]  # the others ask nothing
    assert dataset.data.column("messages").num_chunks > 10
    assert dataset["n"][:] == rows
    assert [one[1][1] for one in texts(dataset)] == [f"a{i}" for i in rows]


def test_one_image_turns_every_content_into_parts():
    image = [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What?"}]
    seen = {"messages": [{"role": "user", "content": image}, ANSWER]}
    joined = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}, ANSWER]}
    assert texts(load([joined])[0]) == [[("user", "aa"), ("assistant", "a")]]
    dataset, _ = load([GOOD, seen])
    assert dataset[0]["messages"][1]["content"] == [{"type": "text", "text": "4", "image": None}]
    assert [part["image"] for part in dataset[1]["messages"][0]["content"]] == ["cat.png", None]
    assert check_chat(dataset[0]["messages"]) == GOOD["messages"]  # and back
    assert list(Chats(dataset)) == [GOOD["messages"], seen["messages"]]


def test_chats_are_like_a_list_of_conversations_that_knows_its_file(tmp_path):
    path = write(tmp_path, *[chat(f"q{i}", "a", n=i) for i in range(3)], ROLE, chat("q4", "a"))
    chats = load_chats(path)
    assert [messages[0]["content"] for messages in chats] == ["q0", "q1", "q2", "q4"]
    assert (len(chats), chats[-1], chats[1][0]["content"]) == (4, chat("q4", "a")["messages"], "q1")
    assert [messages[0]["content"] for messages in chats[::-2]] == ["q4", "q1"]
    assert chats[:2].rows["n"][:] == [0, 1]
    assert str(chats[2:].reject(1, ChatError("is too long", field="messages"))) == f"{path}:5: messages is too long"
    assert str(chats.rejected).startswith("1 row left out\n  1 x messages[1].role is 'bot'")
    with pytest.raises(IndexError):
        chats[4]
    chats.to_json(tmp_path / "out.jsonl")
    assert list(load_chats(tmp_path / "out.jsonl")) == list(chats)


def test_conversations_in_memory_are_checked_once_and_the_first_bad_one_is_named():
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the pot?"}]
    named = [{"role": "user", "content": parts, "name": 5}, ANSWER]
    chats = make_chats([named, [USER | {"name": "ann"}, ANSWER]])
    assert list(chats) == [[{"role": "user", "content": "Where is the pot?"}, ANSWER], [USER, ANSWER]]
    assert named[0]["content"] is parts
    assert list(make_chats(iter([named]))) == list(chats[:1])
    with pytest.raises(ChatError, match=r"^row 2: messages\[0\].content is None; expected text"):
        make_chats([named, [{"role": "user", "content": None}, ANSWER]])


# --- summaries and splits


def test_a_summary_counts_reasons_by_frequency():
    rejected = [Rejected("f", i, f"messages[{i}].role", "'bot'", "expected user") for i in range(1, 6)]
    rejected += [Rejected("f", 9, name, "", "has no user turn") for name in "abcdef"]
    lines = str(RejectedRows(rejected)).split("\n")
    assert lines[:2] == ["11 rows left out", "  5 x messages[1].role is 'bot'; expected user (line 1, 2, 3, ...)"]
    assert lines[-2:] == ["  1 x d has no user turn (line 9)", "  and 2 more reasons"]
    assert str(RejectedRows([])) == "0 rows left out"
    gone = [
        Rejected("f", i, "picture 1", "", f"coco/{name}.jpg: no such picture in d") for i, name in enumerate("abc")
    ]
    assert len(str(RejectedRows(gone)).split("\n")) == 2


def split_chats(dataset: datasets.Dataset, holdout=0.1, **options):
    return [chats.rows for chats in Chats(dataset).split(holdout, **options)]


def questions(dataset: datasets.Dataset) -> list[str]:
    return [messages[0]["content"] for messages in dataset["messages"]]


def test_the_split_is_the_same_everywhere_and_nothing_straddles_it():
    names = [f"q{i}" for i in range(600)]
    dataset, _ = load([chat(name, answer) for answer in ("a", "b") for name in names])
    train, test = split_chats(dataset)
    assert not set(questions(train)) & set(questions(test))
    assert len(train) + len(test) == len(dataset)
    assert questions(test)[:5] == SPLIT_ON_ANY_MACHINE
    assert abs(len(test) / len(dataset) - 0.1) < 4 * (0.1 * 0.9 / 600) ** 0.5  # four standard errors
    fewer, _ = load([chat(name, "c") for name in names[::7]])
    assert set(questions(split_chats(fewer)[1])) == set(questions(test)) & set(names[::7])
    assert set(questions(split_chats(dataset, seed=1)[1])) != set(questions(test))
    assert set(questions(test)) < set(questions(split_chats(dataset, holdout=0.2)[1]))
    assert len(split_chats(dataset, holdout=0)[1]) == 0


SPLIT_ON_ANY_MACHINE = ["q10", "q14", "q16", "q26", "q29"]


def test_a_holdout_that_is_no_share():
    for holdout in (1, -0.1, float("nan")):
        with pytest.raises(ChatError, match=r"holdout is .*; expected a share of the chats, from 0 to below 1"):
            split_chats(load([GOOD])[0], holdout=holdout)


def test_odd_text_in_a_column_beside_the_chat_loses_no_chat():
    dataset, rejected = load([GOOD | {"meta": "bad\0x"}, GOOD | {"meta": "\udfff"}, GOOD])
    assert (len(dataset), rejected) == (3, [])


# --- pictures
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def png(image=IMAGE) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "coco").mkdir()
    for name in ("x.png", "coco/y.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:200])
    return tmp_path


def llava(image, *texts, **extras):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return ({"image": image} if image is not None else {}) | {"conversations": turns} | extras


def kinds(messages):
    return [[(p["type"], p["text"]) for p in turn["content"]] for turn in messages]


IMG, ASKED = ("image", None), ("text", "What is it?")
LLAVA = [  # a row, and the parts of its first turn
    (llava("x.png", "<image>\nWhat is it?", "A cat.", "Sure?", "Yes.", id="000"), [IMG, ASKED]),
    (llava("coco/y.png", "What is it?\n<image>", "A dog.", id="001"), [ASKED, IMG]),
    (llava("x.png", "What is it?", "This."), [IMG, ASKED]),  # no place: in front
    (llava(None, "What is it?", "Hello"), [ASKED]),
    (llava(["x.png", "coco/y.png"], "<image>\n<image>\nWhat is it?", "Alike."), [IMG, IMG, ASKED]),
    ({"instruction": "What is it?", "output": "A cat.", "image": "x.png"}, [IMG, ASKED]),
]


def test_llava_json(folder):
    (folder / "data.json").write_text(json.dumps([row for row, _ in LLAVA]))
    dataset, rejected = load(folder / "data.json")
    assert rejected == []
    assert [kinds(row["messages"])[0] for row in dataset] == [parts for _, parts in LLAVA]
    paths = [str((folder / name).resolve()) for name in ("x.png", "coco/y.png")]
    assert [part["image"] for part in image_parts(dataset[4]["messages"])] == paths
    assert "images" not in dataset.column_names  # paths stay paths
    assert dataset["id"][:2] == ["000", "001"]


def test_a_bad_picture_costs_its_row_only(folder):
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (9000, 20)).save(folder / "wide.png")
    good = llava("dot.png", "<image>\nWhat?", "A cat.")
    bad = {
        "../x.png": "leads out of",
        "none.png": "no such picture",
        "cut.png": "cut off",
        "wide.png": "9000 x 20 pixels",
        5: "expected a path",
    }
    bad_rows = [llava(image, "<image>\nWhat?", "A cat.") for image in bad]
    bad_rows += [llava(None, "<image>\nWhat?", "A cat."), llava("x.png", "<image><image> What?", "A cat.")]
    reasons = [*bad.values(), "1 places for pictures .* has 0 pictures", "2 places for pictures .* has 1 pictures"]
    path = folder / "data.json"
    path.write_text(json.dumps([good, *bad_rows, good]))
    dataset, rejected = load(path)
    assert dataset["source_row"][:] == [1, len(bad_rows) + 2]
    assert [one.line for one in rejected] == list(range(2, len(bad_rows) + 2))
    for one, reason in zip(rejected, reasons, strict=True):
        assert re.search(reason, str(one))


def test_the_folder_of_pictures_can_be_another_one(folder, tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("text") / "data.jsonl"
    path.write_text(json.dumps(llava("x.png", "<image>\nWhat?", "A cat.")))
    monkeypatch.setenv("HOME", str(folder.parent))
    for images in (folder, f"~/{folder.name}"):
        dataset, _ = load(path, images=images)
        assert image_parts(dataset[0]["messages"])[0]["image"] == str((folder / "x.png").resolve())


CAULDRON = {
    "images": [{"bytes": png(), "path": None}],
    "texts": [
        {"user": "What?", "assistant": "A cat.", "source": "s"},
        {"user": "Sure?", "assistant": "Yes.", "source": "s"},
    ],
}


@pytest.mark.parametrize("kind", ["list", "bytes", "dataset", "parquet"])
def test_the_cauldron_from_memory_and_parquet(tmp_path, kind):
    source = [CAULDRON, CAULDRON | {"images": []}]
    if kind == "bytes":
        source[0] = CAULDRON | {"images": [png()]}
    elif kind == "dataset":
        features = datasets.Features(
            images=datasets.List(datasets.Image()),
            texts=datasets.List({name: datasets.Value("string") for name in ("user", "assistant", "source")}),
        )
        source = datasets.Dataset.from_list(source, features=features)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(source), tmp_path / "x.parquet")
        source = tmp_path / "x.parquet"
    dataset, rejected = load(source)
    assert rejected == []
    said = [("text", "A cat.")], [("text", "Sure?")], [("text", "Yes.")]
    assert kinds(dataset[0]["messages"]) == [[("image", None), ("text", "What?")], *said]
    assert dataset[0]["images"] == [png()]
    assert dataset[1]["images"] is None


def test_our_messages_take_pictures_of_every_kind(folder):
    parts = [{"type": "image", "image": one} for one in (str(folder / "x.png"), IMAGE, png())]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": "Alike?"}]}
    dataset, rejected = load([{"messages": [user, {"role": "assistant", "content": "Yes."}]}])
    assert rejected == []
    row = dataset[0]
    assert [p["image"] for p in image_parts(row["messages"])] == [str(folder / "x.png"), None, None]
    assert row["images"][0] is None
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["images"][1]))), PIXELS)


def test_rows_with_pictures_are_read_again_as_they_are():
    first, _ = load([CAULDRON, {"messages": [{"role": "user", "content": "q"}, ANSWER]}])
    again, rejected = load(first)
    assert rejected == []
    assert again["messages"][:] == first["messages"][:]
    assert again["images"][:] == first["images"][:]


def test_images_and_messages_as_trl_has_them():
    places = [{"type": "image"}, {"type": "text", "text": "What?"}]
    dataset, rejected = load(
        [
            {"messages": [{"role": "user", "content": places}, ANSWER], "images": [IMAGE]},
            {"messages": [{"role": "user", "content": "<image>What?"}, ANSWER], "images": [IMAGE]},
            {"messages": [{"role": "user", "content": "What is <image> in HTML?"}, ANSWER]},  # only a text
            {"messages": [{"role": "user", "content": places}, ANSWER], "images": [IMAGE, IMAGE]},
        ]
    )
    assert kinds(dataset[0]["messages"]) == kinds(dataset[1]["messages"])
    assert kinds(dataset[2]["messages"])[0] == [("text", "What is <image> in HTML?")]
    assert "holds 1 places for pictures" in str(rejected[0])


UNSEEN = [
    (CAULDRON | {"images": [png()[:99]]}, "picture 1 the picture: is damaged or cut off"),
    (CAULDRON | {"images": [png(), None]}, "picture 2 is null"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        "messages holds 1 places for pictures",
    ),
    (llava(None, "<video>\nWhat happens?", "A cat jumps."), "conversations holds the mark <video>"),
    (
        {"messages": [USER | {"images": ["x.png"]}, ANSWER]},
        "messages[0].images is ['x.png']; is not read in a turn",
    ),
    ({"messages": [USER | {"audio": "x.wav"}, ANSWER]}, "messages[0].audio is 'x.wav'; is not seen by any model"),
    ({"instruction": "What?", "output": "A cat.", "image": "no.png"}, "picture 1 no.png: no such picture"),
]


@pytest.mark.parametrize(("row", "sentence"), UNSEEN)
def test_a_row_about_what_no_model_sees_is_rejected(folder, row, sentence):
    dataset, rejected = load([GOOD, row], images=folder)
    assert len(dataset) == 1
    assert str(rejected[0]).startswith(f"row 2: {sentence}")
    html = "How do I show a film?\n<video>\n  <source src=x>\n</video>"
    assert len(load([llava(None, html, "So.")])[0]) == 1


@pytest.mark.parametrize(
    ("role", "mark", "obeyed"),
    [
        *(("assistant", mark, True) for mark in (1, True, 1.0, None)),
        *(("user", mark, True) for mark in (0, False, None)),
        *(("assistant", mark, False) for mark in (0, False, 0.5, "0", "false", [], 2)),
        *(("user", mark, False) for mark in (1, True, 0.5, "no")),
    ],
)
def test_a_mark_on_a_turn_is_obeyed_or_named(role, mark, obeyed):
    marked = [turn | ({"train": mark} if turn["role"] == role else {}) for turn in (USER, ANSWER)]
    dataset, rejected = load([GOOD, {"messages": marked}])
    assert len(dataset) == 1 + obeyed
    assert obeyed or f".train is {mark!r}; " in str(rejected[0])


def test_rows_with_pictures_are_split_by_picture():
    """One question about many of them, and several about each, as LLaVA's rows have them."""
    pictures = [png(Image.new("RGB", (8, 8), (color, 0, 0))) for color in range(60)]
    rows = []
    for question in ("What is it?", "Which colour?"):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a colour"}]
        rows += [{"messages": turns, "images": [picture]} for picture in pictures]
    dataset, rejected = load(rows)
    assert not rejected
    train, test = split_chats(dataset, holdout=0.3)
    assert min(len(train), len(test)) > 10
    assert not {row[0] for row in train["images"]} & {row[0] for row in test["images"]}
