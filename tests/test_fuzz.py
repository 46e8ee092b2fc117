"""10,000 generated rows through every reader and on into burden and tokens: good ones survive, nothing escapes.

A row is anything JSON can say, or a good row of one of the forms (images too) with one place damaged.
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
HOSTILE += ["<script>alert(1)</script>", "{{ 7 * 7 }}", "<|im_end|>", "user", "image", "", "\0", "a" * 3000]
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(HOSTILE)
KEYS = ["messages", "conversations", "texts", "image", "images", "role", "content", "type", "text", "bytes", "path"]
NAMES = st.sampled_from([*KEYS, "from", "value", "instruction", "output", "history", "system", "user", "assistant"])
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


def as_parquet(rows, folder):
    """A table has one type a column, so a row's odd values travel as text, and odd rows as nulls."""
    columns = {name: [] for name in KEYS[:5]}
    for row in rows:
        for name in columns:
            value = row.get(name) if isinstance(row, dict) else None
            columns[name].append(None if value is None else json.dumps(value))
    for name, kind in {"messages": dict, "conversations": dict, "texts": dict}.items():
        values = [json.loads(v) if v else None for v in columns[name]]
        plain = [v if isinstance(v, list) and all(isinstance(turn, kind) for turn in v) else None for v in values]
        columns[name] = [v and [{k: str(x) for k, x in turn.items() if x is not None} for turn in v] for v in plain]
    path = folder / "rows.parquet"
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), path)
    return path


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
        for line, messages in zip(came, chats, strict=True):
            noised = burden_messages(messages, Burden(), seed=1, row=line)
            assert [turn["role"] for turn in noised] == [turn["role"] for turn in messages]
            with contextlib.suppress(ChatError):  # such as an image part for a template without images
                encoded = encode_chat(noised, tokenizer)
                assert len(encoded.input_ids) == len(encoded.labels)
