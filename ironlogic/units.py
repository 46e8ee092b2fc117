"""The units a text is made of (words, characters, tokens, sentences), and how far two orders of them are apart.

Taking apart is exact: gaps and units alternate and join to the text again. There is no grammar in it (the full stop
of an abbreviation ends a sentence) and no dictionary (a Chinese or Japanese word is its characters; Thai, Lao and
Khmer words are whole runs without blanks).
"""

import bisect
import re
import unicodedata
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from numbers import Real
from typing import Literal, get_args

from ironlogic import IronLogicError

import numpy as np

__all__ = [
    "PROTECTED",
    "BurdenError",
    "Disorder",
    "Unit",
    "count_units",
    "expected_disorder",
    "measure_disorder",
    "moved_units",
    "pieces_of",
    "pooled_disorder",
    "protected_spans",
]

Unit = Literal["word", "char", "token", "sentence", "seed"]
PROTECTED = ("code", "url", "latex", "tag", "table")


class BurdenError(IronLogicError, ValueError):
    """A setting or an input that no burden can be laid on. The message says where, what came and what to do."""


def check_unit(where: str, unit) -> None:
    if unit not in get_args(Unit):
        raise BurdenError(f"{where}: unit is {unit!r}; expected one of {', '.join(get_args(Unit))}")


def check_share(where: str, name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise BurdenError(f"{where}: {name} is {value!r}; expected a number from 0 to 1")


# One rule for Chinese and Japanese: every code point of these blocks is a word of its own, punctuation,
# full-width letters and the planes beyond 16 bits included. Korean is written with blanks, so its syllables
# are not here.
_CJK = (
    "\u2e80-\u2fff"  # radicals
    "\u3001-\u3029"  # punctuation; U+3000 is a blank
    "\u3030-\u3098"  # punctuation, hiragana
    "\u309b-\u312f"  # hiragana, katakana, bopomofo
    "\u3190-\u4dbf"  # kanbun, strokes, enclosed, extension A
    "\u4e00-\u9fff"  # ideographs
    "\uf900-\ufaff"  # compatibility ideographs
    "\ufe30-\ufe4f"  # vertical forms
    "\uff01-\uff9d"  # full-width forms, half-width katakana
    "\U0001aff0-\U0001b16f"  # old kana
    "\U0001f200-\U0001f2ff"  # enclosed ideographs
    "\U00020000-\U0003ffff"  # extensions B and later
)
# Tone and voicing marks and variation selectors stay with the character before them.
_MARKS = "\u302a-\u302f\u3099-\u309a\ufe00-\ufe0f\uff9e-\uff9f\U000e0100-\U000e01ef"

# -------------------------------------------------------------------------------------------- spans that stay
# Kind, sign and pattern: a text without the sign is not searched. Repeats are possessive or bounded by a length, a
# line or the next opening sign, so that no text takes quadratic time.
_URL_REST = rf"[^\s<>\"`{_CJK}]+"
_OPENS_LINE = r"(?<![^\n]>)"
_QUOTED_REST = r"(?:\n>(?![ \t>]*+(?P=quoted))[^\n]*+)*+(?:\n>[ \t>]*+(?P=quoted)[^\n]*+)?"
_SPANS = (
    # A fence closes with as many signs as open it; one that opens a line and never closes runs to the end, as in
    # Markdown, or to the end of its quotation.
    ("code", "`", r"(?P<ticks>```(?<!````)`*+).*?(?P=ticks)|```(?<![^\n]```).*|``[^\n]+?``|`[^`\n]+`"),
    ("code", "~~~", r"^[ \t]*+(?P<tildes>~{3,}+)(?:.*?^[ \t]*+(?P=tildes)|.*)"),
    ("code", ">", rf">{_OPENS_LINE}[ \t>]*+(?P<quoted>`{{3,}}+(?=[^`\n]*+$)|~{{3,}}+)[^\n]*+{_QUOTED_REST}"),
    ("code", ">", rf">{_OPENS_LINE}(?:[ ]{{5}}|[ ]?\t)[^\n]*+"),  # indented
    ("url", "://", rf"https?://{_URL_REST}|ftp://{_URL_REST}"),
    ("url", "www.", rf"www\.{_URL_REST}"),
    # A dollar opens before ink, and closes after ink and before no digit: "$5 and $6" is no formula.
    ("latex", "$", r"\$\$[^$]+\$\$|\$(?<!\\\$)(?![\s$])[^$\n]*(?<![\s\\])\$(?!\d)"),
    ("latex", "\\", r"\\\((?:[^\\]|\\[^(])+?\\\)|\\\[(?:[^\\]|\\[^\[])+?\\\]"),
    ("latex", "\\begin", r"\\begin\{(?P<name>\w+\*?)\}.{0,4000}?\\end\{(?P=name)\}"),
    ("tag", "<", r"<[|｜][^|｜<>\s]*[|｜]>|</?[A-Za-z_][\w\-.]*/?>"),
    # A row with a bar, a row of dashes and bars, and all rows with a bar that follow.
    (
        "table",
        "|",
        r"^[^|\n]*+\|[^\n]*+\n(?=[^\n]*\|)[ \t>]*+\|?[ \t:]*+-[ \t\r|:-]*+$(?:\n[^|\n]*+\|[^\n]*+)*+",
    ),
)


@cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(patterns), re.DOTALL | re.MULTILINE)


def protected_spans(text: str, protect: Sequence[str]) -> list[tuple[int, int]]:
    """(start, end) of the code, URLs, LaTeX, tags and tables in `text`, in order and without overlap.

    >>> protected_spans("see `x = 1` at <image>", PROTECTED)
    [(4, 11), (15, 22)]
    """
    patterns = tuple(pattern for kind, sign, pattern in _SPANS if kind in protect and sign in text)
    return [match.span() for match in _any_of(patterns).finditer(text)] if patterns else []


def movable_places(pieces: list[str], spans: list[tuple[int, int]]) -> np.ndarray:
    """Places in `pieces` of the units that overlap none of the spans, (units,)."""
    places = np.arange(1, len(pieces), 2)
    if not spans:
        return places
    ends = np.cumsum([len(piece) for piece in pieces])
    starts, stops = np.transpose(spans)
    following = np.searchsorted(stops, ends[places - 1], "right")  # the first span that ends after the unit begins
    return places[np.append(starts, ends[-1])[following] >= ends[places]]


# ------------------------------------------------------------------------------------- text -> gaps and units
_CJK_FIRST = re.compile(f"[{_CJK}]")
_WORDS = re.compile(rf"([{_CJK}][{_MARKS}]*|[^\s{_CJK}{_MARKS}][^\s{_CJK}]*)")
_BETWEEN_BLANKS = re.compile(r"((?<![^ ])[^ ]*)")  # the seed's words: may be empty, may hold line breaks
_LINE = re.compile(r"[^\r\n\u2028\u2029]+")
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]]*(?=\s|\Z)|[。！？]+[」』”’）)]*")
_CLOSED = re.compile(r"([.!?…。！？])[\"'”’)\]」』）]*\Z")


def pieces_of(text: str, unit: Unit, tokenizer=None) -> list[str]:
    """Gap, unit, gap, unit, ..., gap: an odd number of strings that join to `text`, the units at the odd places.

    >>> pieces_of("Hello,  你好\\n", "word")
    ['', 'Hello,', '  ', '你', '', '好', '\\n']
    """
    if unit == "word":
        return _WORDS.split(text)
    if unit == "seed":
        return _BETWEEN_BLANKS.split(text)
    if unit == "token":
        spans = _token_spans(text, tokenizer)
    else:
        spans = _character_spans(text) if unit == "char" else _sentence_spans(text)
    pieces, last = [], 0
    for start, end in spans:
        pieces += [text[last:start], text[start:end]]
        last = end
    return [*pieces, text[last:]]


def count_units(text: str, *, unit: Unit = "word", protect: Sequence[str] = (), tokenizer=None) -> int:
    """How many units of the text may move; with nothing protected, how many it has."""
    return len(movable_places(pieces_of(text, unit, tokenizer), protected_spans(text, protect)))


def _character_spans(text: str) -> list[tuple[int, int]]:
    """Characters as a reader sees them: with their marks, and emoji and flags whole."""
    starts, flags = [], 0
    for i, character in enumerate(text):
        flags = flags + 1 if "\U0001f1e6" <= character <= "\U0001f1ff" else 0  # two such letters make a flag
        glued = i > 0 and text[i - 1] == "\u200d" and not character.isspace()  # after a zero-width joiner
        if i == 0 or not (glued or _attaches(character) or (flags and flags % 2 == 0)):
            starts.append(i)
    ends = [*starts[1:], len(text)]
    spans = zip(starts, ends, strict=True) if text else ()
    return [(a, b) for a, b in spans if not (text[a].isspace() or _attaches(text[a]))]


def _attaches(character: str) -> bool:
    """Whether it belongs to the one before: marks, joiners, skin tones, tags, Korean vowels, low surrogates."""
    return character > "\x7f" and (
        unicodedata.category(character)[0] == "M"
        or character in "\u200c\u200d\u0e33\u0eb3\uff9e\uff9f"
        or "\u1160" <= character <= "\u11ff"
        or "\udc00" <= character <= "\udfff"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
        or "\U000e0020" <= character <= "\U000e007f"
    )


def _sentence_spans(text: str) -> list[tuple[int, int]]:
    """Sentences without the blanks around them; a line break ends one."""
    spans = []
    for line in _LINE.finditer(text):
        ends = [match.end() for match in _SENTENCE_END.finditer(text, *line.span())]
        for start, end in pairwise([line.start(), *ends, line.end()]):
            sentence = text[start:end]
            if sentence.strip():
                spans.append((end - len(sentence.lstrip()), start + len(sentence.rstrip())))
    return spans


def _token_spans(text: str, tokenizer) -> list[tuple[int, int]]:
    """The text of each token; tokens that share a character are one unit. Special and added tokens are gaps."""
    if not getattr(tokenizer, "is_fast", False):  # None, a processor or a slow tokenizer: no offsets
        raise BurdenError(
            f'unit "token" needs a fast tokenizer; pass tokenizer=..., got {type(tokenizer).__name__}'
        )
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except TypeError as error:
        raise BurdenError("the text holds half a surrogate pair, which no tokenizer reads") from error
    fixed = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    spans: list[tuple[int, int]] = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token in fixed or start == end:
            continue
        if spans and start < spans[-1][1]:
            start, end = spans[-1][0], max(end, spans.pop()[1])
        spans.append((start, end))
    return spans


def kind_of(piece: str, unit: Unit) -> int:
    """0, 1 or 2; units of one kind may change places.

    A word is 0 and a CJK character 1; a sentence is 0 when it is closed in the Latin way, 1 by 。！？ and 2 when
    it is open.
    """
    if unit == "word":
        return int(_CJK_FIRST.match(piece) is not None)
    if unit == "sentence":
        closed = _CLOSED.search(piece)
        return 2 if closed is None else int(closed[1] in "。！？")
    return 0


# ------------------------------------------------------------------------------------- how far from the order
@dataclass(frozen=True)
class Disorder:
    """How far the order of a text's units is from another's. All three are shares from 0 to 1."""

    displaced: float  # units that are not where they were
    kendall_tau: float  # pairs of units in the opposite order; 0 as it was, about 0.5 at random, 1 reversed
    bigrams_kept: float  # neighbours that are still neighbours, in order


def measure_disorder(before: str, after: str, *, unit: Unit = "word", tokenizer=None) -> Disorder:
    """The disorder of `after` against `before`.

    A word that stands where it stood is not displaced; the other occurrences of a repeated word are matched in
    order, first with first. So repeated words never look more displaced than they were moved, and tau comes out
    lower as a rule. A unit found in one text only counts as displaced and breaks its bigrams; Kendall's tau is
    of the others. Raises `BurdenError` for an unknown unit, and for `unit="token"` without a fast tokenizer.

    >>> measure_disorder("one two three four", "one three two four")
    Disorder(displaced=0.5, kendall_tau=0.16..., bigrams_kept=0.0)
    """
    return pooled_disorder([(before, after)], unit=unit, tokenizer=tokenizer)


def pooled_disorder(pairs: Sequence[tuple[str, str]], *, unit: Unit = "word", tokenizer=None) -> Disorder:
    """The disorder of several (before, after) taken together, as of the turns of one conversation."""
    units = displaced = order_pairs = inverted = bigrams = kept = 0
    for before, after in pairs:
        count, source = _sources(before, after, unit, tokenizer)
        longer = max(count, len(source))
        shared = source[source >= 0]  # units that both texts have
        units += longer
        displaced += longer - int((source == np.arange(len(source))).sum())
        order_pairs += len(shared) * (len(shared) - 1) // 2
        inverted += _inversions(shared)
        bigrams += max(longer - 1, 0)
        kept += int(((source[1:] == source[:-1] + 1) & (source[:-1] >= 0)).sum())
    return Disorder(displaced / max(units, 1), inverted / max(order_pairs, 1), kept / bigrams if bigrams else 1.0)


def chosen_count(n: int, ratio: float) -> int:
    """How many of `n` units are drawn: ratio * n rounded, halves upwards.

    The 1e-9 is for halves that binary fractions put a hair below, such as 0.29 * 50 = 14.499...

    >>> chosen_count(10, 0.7), chosen_count(5, 0.7), chosen_count(50, 0.29)
    (7, 4, 15)
    """
    return int(n * float(ratio) + (0.5 + 1e-9))


def expected_disorder(n: int, ratio: float) -> Disorder:
    """The mean disorder of a burden on `n` different units of one kind, exactly.

    k of n places are drawn and permuted uniformly. Displaced: each drawn unit stays with probability 1/k.
    Kendall's tau: a pair is inverted with probability 1/2 if both are drawn, and (k - 1) / 3 pairs per unit
    that is not. Bigrams: both stay; or one is drawn and stays; or both are drawn, and two neighbours among
    the drawn come there.

    >>> expected_disorder(150, 0.7)
    Disorder(displaced=0.693..., kendall_tau=0.383..., bigrams_kept=0.0958...)
    """
    check_share("expected_disorder", "ratio", ratio)
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise BurdenError(f"expected_disorder: n is {n!r}; expected a number of units, 0 or more")
    k = chosen_count(n, ratio)
    if k < 2:
        return Disorder(0.0, 0.0, 1.0)
    inverted = k * (k - 1) / 4 + (k - 1) * (n - k) / 3
    kept = (n - k) * (n - k - 1) + 2 * (n - k) + (n - 1 + (k - 1) * (k - 2)) / (n - 1)
    return Disorder((k - 1) / n, inverted / (n * (n - 1) / 2), kept / (n * (n - 1)))


def moved_units(before: str, after: str, *, unit: Unit = "word", tokenizer=None) -> list[tuple[str, bool]]:
    """`after` in pieces, gaps included, each with whether it is a unit that stands elsewhere than in `before`.

    >>> moved_units("a b c", "b a c")
    [('b', True), (' ', False), ('a', True), (' ', False), ('c', False)]
    """
    _, source = _sources(before, after, unit, tokenizer)
    pieces = pieces_of(after, unit, tokenizer)
    moved = [False] * len(pieces)
    moved[1::2] = (source != np.arange(len(source))).tolist()
    return [(piece, flag) for piece, flag in zip(pieces, moved, strict=True) if piece]


def _sources(before: str, after: str, unit: Unit, tokenizer) -> tuple[int, np.ndarray]:
    """Units in `before`, and for each unit of `after` its position in `before` or -1, (units,)."""
    check_unit("measure_disorder", unit)
    if not isinstance(before, str) or not isinstance(after, str):
        raise BurdenError(f"measure_disorder: the texts are {before!r} and {after!r}; expected two strings")
    old, new = (pieces_of(text, unit, tokenizer)[1::2] for text in (before, after))
    stays = {i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a == b}
    positions = defaultdict(deque)
    for position, piece in enumerate(old):
        if position not in stays:
            positions[piece].append(position)
    source = []
    for position, piece in enumerate(new):
        if position in stays:
            source.append(position)
        else:
            source.append(positions[piece].popleft() if positions[piece] else -1)
    return len(old), np.array(source, np.int64)


def _inversions(order: np.ndarray) -> int:
    """Pairs of `order` (n,) that stand in descending order: of each element, the larger ones before it."""
    ordered: list[int] = []
    count = 0
    for element in order.tolist():
        position = bisect.bisect(ordered, element)
        count += len(ordered) - position
        ordered.insert(position, element)
    return count
