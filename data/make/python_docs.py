"""`python -m data.make.python_docs`: questions about Python's standard library, answered by its own docstrings.

Real text that everyone has, as an example of `DATA`: put your own conversations in its place.
"""

import importlib
import inspect
import json
import random
from pathlib import Path

MODULES = (
    "argparse array ast base64 bisect calendar cmath codecs collections colorsys configparser contextlib copy csv "
    "datetime decimal difflib dis email.message enum filecmp fnmatch fractions functools gettext glob gzip hashlib "
    "heapq hmac html inspect io ipaddress itertools json keyword linecache locale logging math mimetypes numbers "
    "operator os os.path pathlib pickle pprint queue random re sched secrets shlex shutil signal socket statistics "
    "string struct subprocess tempfile textwrap threading time timeit tokenize types unicodedata urllib.parse uuid "
    "warnings weakref zipfile zlib"
).split()
QUESTIONS = (
    "What does {name} do in Python?",
    "Explain in a sentence what {name} is for.",
    "I found {name} in a Python program. What is it?",
    "How does Python's documentation describe {name}?",
)
LONGEST = 300  # characters of an answer


def answers() -> dict[str, str]:
    """The first paragraph of every docstring that is a sentence, by the name of its function or class."""
    found = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or dir(module)):
            member = getattr(module, name, None)
            if name.startswith("_") or not callable(member) or not inspect.getdoc(member):
                continue
            text = " ".join(inspect.getdoc(member).split("\n\n")[0].split())
            if 40 <= len(text) <= LONGEST and text[0].isupper() and text.endswith("."):
                found.setdefault(text, f"{module_name}.{name}")  # an alias says the same again
    return {name: text for text, name in found.items()}


def main(rows: int = 400, seed: int = 3407) -> None:
    rng = random.Random(seed)
    chosen = rng.sample(sorted(answers().items()), rows)
    with (Path(__file__).parent.parent / "python-docs.jsonl").open("w", encoding="utf-8", newline="\n") as out:
        for name, text in chosen:
            question = {"role": "user", "content": rng.choice(QUESTIONS).format(name=name)}
            out.write(json.dumps({"messages": [question, {"role": "assistant", "content": text}]}) + "\n")


if __name__ == "__main__":
    main()
