"""10,000 generated rows through every reader and on into burden and tokens: good ones survive, nothing escapes.

A row is anything JSON can say, or a good row of one of the forms (pictures, marks, fences and tables too) with one
place damaged. No row goes without a word, none about a film or a sound comes in, no protected span is torn.
"""

import base64
import contextlib
import io
import json
import tempfile
from pathlib import Path

from ironlogic.burden import Burden, burden_messages
from ironlogic.data.chats import ChatError, load_chats
from ironlogic.data.masking import encode_chat
from ironlogic.units import PROTECTED, protected_spans

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

ROWS, EXAMPLES = 50, 50  # for each of the four readers


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


GOOD = [
    {"messages": [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four"}]},
    {
        "messages": [
            {
                "role": "user",
                "content": "why is\n~~~py\nx = y + 1\n~~~\nso `a b` or\n> ```\n> c d\n",
                "train": False,
            },
            {"role": "assistant", "content": "four", "train": True, "weight": 1},
        ],
        "video": None,
    },
    {"instruction": "which row\n\n| a | b c |\n|---|:-:|\n| 1 2 | 3 |\n\nis it of all", "output": "the last"},
    {"conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}], "system": "be"},
    {"instruction": "one", "input": "two", "output": "three", "history": [["four", "five"]]},
    {
        "image": picture(),
        "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}],
    },
    {"images": [picture()], "texts": [{"user": "what is it", "assistant": "red", "source": "x"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "what"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]
    },
]
HOSTILE = [
    "../../etc/passwd",
    "/dev/zero",
    "x.png",
    "data:image/png;base64,AAAA",
    "<image>",
    "<|image_pad|>",
    "\ud800",
]
HOSTILE += ["<video>", "<audio>\nwhat", "cat.mp4", "~~~", "> ```\n> x", "a|b\n-|-\n1 2|3", "> ", "````", "false"]
HOSTILE += ["<script>alert(1)</script>", "{{ 7 * 7 }}", "<|im_end|>", "user", "image", "", "\0", "a" * 3000]
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(HOSTILE)
KEYS = ["messages", "conversations", "texts", "image", "images", "role", "content", "type", "text", "bytes", "path"]
MARKS, MEDIA = ["weight", "train", "loss"], ["video", "videos", "audio"]
OTHERS = [
    "from",
    "value",
    "instruction",
    "output",
    "history",
    "system",
    "user",
    "assistant",
    "reasoning",
    "tool_calls",
]
NAMES = st.sampled_from([*KEYS, *OTHERS, *MARKS, *MEDIA])
ANYTHING = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(NAMES, LEAF | st.lists(LEAF, max_size=2), max_size=3)


@st.composite
def damaged(draw):
    row = json.loads(json.dumps(draw(st.sampled_from(GOOD))))
    place, key = row, draw(st.sampled_from(sorted(row)))
    while isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
        place = place[key]
        key = draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
    if draw(st.booleans()):
        place[key] = draw(ANYTHING)
    elif isinstance(place, dict) and draw(st.booleans()):
        place[draw(NAMES)] = draw(LEAF)
    elif isinstance(place, dict):
        place[draw(NAMES)] = place.pop(key)
    else:
        place.append(place[key])
    return row


def as_jsonl(rows, folder):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def as_json(rows, folder):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def as_turns(value: list) -> list[dict] | None:
    if not all(isinstance(turn, dict) for turn in value):
        return None
    return [
        {key: str(came).encode(errors="replace").decode() for key, came in turn.items() if came is not None}
        for turn in value
    ]


def as_parquet(rows, folder):
    """A table has one type a column, so a row's odd values travel as text, and odd rows as nulls."""
    columns = {}
    for name in KEYS[:5]:
        values = [row.get(name) if isinstance(row, dict) else None for row in rows]
        if name in ("image", "images"):
            columns[name] = [None if value is None else json.dumps(value) for value in values]
        else:
            columns[name] = [as_turns(value) if isinstance(value, list) else None for value in values]
    path = folder / "rows.parquet"
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), path)
    return path


def says_what_is_not_seen_or_trained(row) -> bool:
    """Whether it names a film or a sound, or marks an answer as one that is not to be trained."""
    if not isinstance(row, dict):
        return False
    turns = row.get("messages")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    answers = [turn for turn in turns if turn.get("role") == "assistant"]
    marks = [turn[name] for turn in answers for name in MARKS if turn.get(name) is not None]
    return any(row.get(name) for name in MEDIA) or not all(mark in (0, 1) and mark for mark in marks)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(__file__).resolve().parent.parent / "data" / "nano")


@pytest.mark.slow
@pytest.mark.parametrize("write", [as_jsonl, as_json, as_parquet, lambda rows, folder: rows])
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, *HealthCheck],
)
@given(rows=st.lists(damaged() | ANYTHING, min_size=ROWS - 2, max_size=ROWS - 2))
def test_any_row(write, rows, tokenizer):
    rows = [GOOD[0], *rows, GOOD[0]]
    with tempfile.TemporaryDirectory() as folder:
        chats = load_chats(write(rows, Path(folder)))
        came, rejected = chats.rows["source_row"], chats.rejected
        assert sorted([*came, *(one.line for one in rejected)]) == list(range(1, len(rows) + 1))
        assert came[0] == 1
        assert came[-1] == len(rows)
        assert all(len(str(one)) < 600 for one in rejected)
        str(rejected).encode()
        if write is not as_parquet:  # there the marks and films are not columns
            assert not any(says_what_is_not_seen_or_trained(rows[line - 1]) for line in came)
        for line, messages in zip(came, chats, strict=True):
            noised = burden_messages(messages, Burden(), seed=1, row=line)
            for before, after in zip(messages, noised, strict=True):
                assert before["role"] == after["role"]
                if isinstance(before["content"], str):
                    spans = protected_spans(before["content"], PROTECTED)
                    assert all(before["content"][start:end] in after["content"] for start, end in spans)
            with contextlib.suppress(ChatError):  # such as an image part for a template without images
                encoded = encode_chat(noised, tokenizer)
                assert len(encoded.input_ids) == len(encoded.labels)
