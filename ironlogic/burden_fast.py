"""The draw behind every burden, and words moved in many texts at once.

Apart from `burden` because that module says what a burden *is* and this one only makes it quick: `move_words`
gives the bytes of `burden.apply_burden(unit="word")` from a few array operations for a hundred texts. It
knows nothing of settings, messages or protected spans (they come as offsets), and leaves a text it cannot do
to the reference.
"""

from collections.abc import Sequence

from ironlogic.units import CJK, MARKS, chosen_count

import numpy as np

__all__ = ["draw", "move_words"]

_BLANKS = (*range(0x09, 0x0E), *range(0x1C, 0x21), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))
_BLANKS += (0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
_BLANK, _WORD, _CJK, _MARK = range(4)

_TEXTS = 128  # texts per pass: about what the second-level cache holds
_ODD, _GOLDEN = np.uint64(0xD1342543DE82EF95), np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_18, _27, _28, _30, _31, _54 = (np.uint64(bits) for bits in (18, 27, 28, 30, 31, 54))
_LOW18 = np.uint64((1 << 18) - 1)


def _classes() -> np.ndarray:
    """Class of every code point, (0x110000,) bytes."""
    table = np.full(0x110000, _WORD, np.uint8)
    for ranges, kind in ((CJK, _CJK), (MARKS, _MARK)):
        for low, high in ranges:
            table[low : high + 1] = kind
    table[list(_BLANKS)] = _BLANK
    return table


_CLASSES = _classes()
_ASCII = _CLASSES[:256].tobytes()


def _scores(steps: np.ndarray) -> np.ndarray:
    """36 random bits from each key + position * odd constant (uint64): splitmix64 of Steele, Lea and Flood 2014."""
    x = steps + _GOLDEN  # arrays of uint64 wrap by definition
    x = (x ^ (x >> _30)) * _MIX1
    x = (x ^ (x >> _27)) * _MIX2
    return (x ^ (x >> _31)) >> _28


def draw(n: int, key: int, ratio: float) -> np.ndarray:
    """`chosen_count` of the positions 0..n-1 in a uniform random order, (k,): the first by (score, position)."""
    scores = _scores(np.arange(n, dtype=np.uint64) * _ODD + np.uint64(key))
    return np.argsort(scores, kind="stable")[: chosen_count(n, ratio)]


def _draw_rows(counts: np.ndarray, keys: Sequence[int], ratio: float) -> np.ndarray:
    """`draw` for up to 1,024 rows laid end to end, `counts` (R,) units in each: row after row, (sum of k,)."""
    row = np.repeat(np.arange(len(counts)), counts)
    start = (np.cumsum(counts) - counts)[row]
    rank = np.arange(len(row)) - start
    position = rank.astype(np.uint64)
    scores = _scores(np.asarray(keys, np.uint64)[row] + position * _ODD)
    order = (row.astype(np.uint64) << _54) | (scores << _18)
    if counts.max(initial=0) <= 1 << 18:  # the position fits below: a plain sort, several times quicker
        drawn = start + (np.sort(order | position) & _LOW18).astype(np.int64)
    else:
        drawn = np.argsort(order, kind="stable")
    return drawn[rank < chosen_count(counts, ratio)[row]]


def move_words(
    texts: Sequence[str], keys: Sequence[int], ratio: float, spans: Sequence[Sequence[tuple[int, int]]]
) -> list[str | None]:
    """The texts with words moved; None where only the reference can do it (marks beside CJK characters).

    `spans[i]` are the (start, end) character offsets in `texts[i]` that no moved word may touch.
    """
    moved: list[str | None] = list(texts)
    groups: tuple[list[int], list[int]] = ([], [])
    for i, text in enumerate(moved):
        if text:
            groups[text.isascii()].append(i)
    for ascii_only, group in enumerate(groups):
        for at in range(0, len(group), _TEXTS):
            part = group[at : at + _TEXTS]
            columns = [[column[i] for i in part] for column in (texts, keys, spans)]
            for i, text in zip(part, _move_part(*columns, ratio, ascii_only=bool(ascii_only)), strict=True):
                moved[i] = text
    return moved


def _move_part(texts, keys, spans, ratio, *, ascii_only: bool) -> list[str | None]:
    joined = "".join(texts)
    encoding, dtype = ("ascii", "u1") if ascii_only else ("utf-32-le", "<u4")
    raw = joined.encode(encoding, "surrogatepass")
    code = np.frombuffer(raw, dtype)
    kind = np.frombuffer(raw.translate(_ASCII), "u1") if ascii_only else _CLASSES[code]
    stop = np.cumsum([len(text) for text in texts])
    text_at = np.concatenate(([0], stop[:-1]))

    mark = np.setdiff1d(np.flatnonzero(kind == _MARK), text_at)
    if len(mark):  # as in an emoji: part of the word before it
        kind[mark[kind[mark - 1] == _WORD]] = _WORD

    # Segments: runs of one class inside one text; each CJK character is a segment of its own.
    edge = kind == _CJK
    edge[1:] |= kind[1:] != kind[:-1]
    edge[text_at] = True
    begin = np.flatnonzero(edge)
    length = np.diff(begin, append=len(code))
    segment_kind = kind[begin]
    movable = segment_kind != _BLANK
    movable &= ~_touched(begin, begin + length, text_at, spans)
    unit = np.flatnonzero(movable)
    first_unit = np.searchsorted(unit, np.searchsorted(begin, text_at))
    chosen = unit[_draw_rows(np.diff(first_unit, append=len(unit)), keys, ratio)]

    source = np.arange(len(begin))
    for same in (_WORD, _CJK):  # words change places with words, CJK characters with CJK characters
        group = chosen[segment_kind[chosen] == same]
        source[group] = np.sort(group)
    new_length = length[source]
    shift = begin[source] - (np.cumsum(new_length) - new_length)
    out = code[np.repeat(shift, new_length) + np.arange(len(code))].tobytes().decode(encoding, "surrogatepass")
    done: list[str | None] = [out[a:b] for a, b in zip(text_at.tolist(), stop.tolist(), strict=True)]
    for i in np.unique(np.searchsorted(stop, np.flatnonzero(kind == _MARK), "right")).tolist():
        done[i] = None
    return done


def _touched(begin, end, text_at, spans) -> np.ndarray:
    """Which segments overlap a protected span, (segments,) bool."""
    offsets = [(at + a, at + b) for at, found in zip(text_at.tolist(), spans, strict=True) for a, b in found]
    if not offsets:
        return np.zeros(len(begin), bool)
    low, high = np.asarray(offsets).T
    depth = np.zeros(len(begin) + 1, np.int64)
    np.add.at(depth, np.searchsorted(end, low, "right"), 1)
    np.add.at(depth, np.searchsorted(begin, high, "left"), -1)
    return np.cumsum(depth[:-1]) > 0
