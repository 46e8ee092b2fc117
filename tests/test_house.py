"""The repository itself: its tree, its style, its licence, its requirements, and what README.md promises."""

import ast
import hashlib
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from graphlib import TopologicalSorter
from io import StringIO
from pathlib import Path
from types import ModuleType

from ironlogic.__main__ import build_parser
from ironlogic.session import ROOT
from ironlogic.setup_cell import SETUP_CELL

import nbformat
import pytest
from packaging.requirements import Requirement

TOP = {
    *("notebooks", "ironlogic", "data", "tests", ".ci", "requirements.txt", "pyproject.toml", "README.md"),
    *("LICENSE", "CHANGELOG.md", ".gitignore", ".gitattributes"),
}
# Imports run one way, from the ground up; what stands in one line knows nothing of its neighbours.
GROUND_UP = """
    data units
    burden
    presets
    session memory
    models
    generate lens
    training
    vision evidence export
    show
    __main__
"""
# Files that still have to be folded into the place named behind them
FOLDED = {
    "setup_cell": "session",
    "notebooks": "__main__",
}
LARGEST_FILE, LARGEST_DATA = 6 * 2**20, 25 * 2**20
SKIPPED = {".git", ".venv", ".venv-test", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
FIRST = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/pip install --no-deps "
    "-r ironlogic/requirements-unsloth.txt && .venv/bin/python -m ironlogic run"
)
SECOND = (
    "python3 -m venv .venv-test && .venv-test/bin/pip install -r requirements.txt -r tests/requirements.txt && "
    ".venv-test/bin/pip install --no-deps -r ironlogic/requirements-unsloth.txt && "
    ".venv-test/bin/python -m pytest -n 2"
)


def files() -> list[Path]:
    """Every file that is or would be in git, relative to the repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True) if (ROOT / ".git").exists() else None
    if done is not None and done.returncode == 0:
        names = [Path(name) for name in done.stdout.split("\0") if name]
    else:  # an archive without git
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [name for name in names if not SKIPPED & set(name.parts)]
    return sorted(name for name in names if (ROOT / name).is_file())


FILES = files()
MODULES = sorted((ROOT / "ironlogic").rglob("*.py"))
SOURCES = [ROOT / name for name in FILES if name.suffix == ".py"]


def ruff(*arguments: str | Path) -> str:
    """What ruff has to say, "" when it is content."""
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


# -- style


def test_ruff_check():
    assert ruff("check", ".") == ""


def test_ruff_format():
    assert ruff("format", "--check", ".") == ""


def test_ruff_reads_notebooks_and_likes_the_setup_cell(tmp_path):
    cells = [nbformat.v4.new_code_cell(SETUP_CELL), nbformat.v4.new_code_cell("S.runs")]
    path = tmp_path / "01_x.ipynb"
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    config = ("--config", ROOT / "pyproject.toml")
    assert ruff("check", path, *config) + ruff("format", "--check", path, *config) == ""
    cells[1].source = "import  json"
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    assert "F401" in ruff("check", path, *config)
    assert ruff("format", "--check", path, *config) != ""


OF_THE_PACKAGE = ("IronLogicError", "lazy", "__version__")  # defined in its __init__


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted modules of this package that a source imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "ironlogic":
            names = [alias.name for alias in node.names if alias.name not in OF_THE_PACKAGE]
            yield from (f"ironlogic.{name}" for name in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ironlogic."):
            yield node.module
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"relative import of {node.module or node.names[0].name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ironlogic."))


def place(module: str) -> str:
    """The room or file at the top of the package in which a dotted module lies."""
    name = module.split(".")[1]
    return FOLDED.get(name, name)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(path.parts[-2:]))
def test_module(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it does"
    assigned = {
        t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if hasattr(t, "id")
    }
    assert "__all__" in assigned or path.stem in ("__init__", "__main__")


def test_imports_run_from_the_ground_up():
    level = {name: number for number, line in enumerate(GROUND_UP.split("\n")) for name in line.split()}
    wrong = []
    for path in MODULES:
        here = place(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if here == "__init__":
            continue
        assert here in level, f"{here} has no place in GROUND_UP"
        for module in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if place(module) != here and level[place(module)] >= level[here]:
                wrong.append(f"{path.name} ({here}) imports {module}")
    assert wrong == []


def test_no_module_imports_itself_in_a_circle():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): set(imports(tree))
        for path, tree in trees.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_every_name_at_a_door_is_there_and_there_are_not_too_many():
    names = []
    for door in ("ironlogic", *(f"ironlogic.{path.parent.name}" for path in ROOT.glob("ironlogic/*/__init__.py"))):
        module = importlib.import_module(door)
        for name in getattr(module, "__all__", ()):
            assert not isinstance(getattr(module, name), ModuleType), f"{door}.{name} is a module, not a verb"
            names.append(name)
    assert len(set(names)) <= 120


def test_imports_are_seen():
    code = "import os\nfrom ironlogic import a, __version__\nfrom ironlogic.b import c\nimport ironlogic.d.e"
    names = ["ironlogic.a", "ironlogic.b", "ironlogic.d.e", "relative import of f"]
    assert list(imports(ast.parse(f"{code}\nfrom .f import g"))) == names


LOADERS = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}


def forbidden(source: str) -> Iterator[str]:
    """What runs code out of a file or from the hub: no source of ours may."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            from_one = isinstance(node, ast.ImportFrom)
            names = [node.module or ""] if from_one else [alias.name for alias in node.names]
            yield from (name for name in names if name.partition(".")[0] in LOADERS)
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call.split(".")[-2:] in (["torch", "load"], ["pandas", "read_pickle"], ["pd", "read_pickle"]):
                yield call
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "allow_pickle") and ast.unparse(keyword.value) != "False":
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_runs_foreign_code(path):
    assert list(forbidden(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "x = torch.load('a.pt', weights_only=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=flag)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_foreign_code_is_found(source):
    assert len(list(forbidden(source))) == 1
    assert (
        list(forbidden("AutoModel.from_pretrained(p, trust_remote_code=False)\nimport torch\njson.load(f)")) == []
    )


# -- the tree


def test_top_level_is_what_the_design_says():
    top = {name.parts[0] for name in FILES}
    assert not top - TOP, f"not in the design: {sorted(top - TOP)}"
    assert not TOP - top, f"missing: {sorted(TOP - top)}"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_notebooks_are_notebooks():
    others = [
        str(name) for name in FILES if name.parts[0] == "notebooks" and not re.match(r"\d\d_\w+\.ipynb$", name.name)
    ]
    assert others == []


def test_files_are_small():
    sizes = {name: (ROOT / name).stat().st_size for name in FILES}
    assert {str(name): size for name, size in sizes.items() if size > LARGEST_FILE} == {}
    assert sum(size for name, size in sizes.items() if name.parts[0] == "data") <= LARGEST_DATA


def test_licence_is_apache():
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # the published text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "name", ["requirements.txt", "tests/requirements.txt", "ironlogic/requirements-unsloth.txt"]
)
def test_requirements_are_plain_and_bounded(name):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    needs = [Requirement(line) for line in lines if line]
    assert needs
    for need in needs:
        assert need.url is None
        assert any(one.operator in ("==", "<", "<=", "~=") for one in need.specifier), f"{need}: no upper bound"
    named = {need.name: need for need in needs}
    assert not {"torchvision", "torchaudio"} & named.keys(), "they break a CPU build of torch"
    assert ("unsloth" in named) == (name == "ironlogic/requirements-unsloth.txt")
    if "torch" in named:
        assert [one.operator for one in named["torch"].specifier] == ["=="], (
            "a range takes a CUDA build of gigabytes"
        )


# -- the command for continuous integration


def ci(folder: Path, readme: str | None) -> subprocess.CompletedProcess:
    """`bash .ci/run` in a folder of that README, a Chromium pretended."""
    for path, text in (
        (folder / ".ci/run", (ROOT / ".ci/run").read_text()),
        (folder / "bin/chromium", "#!/bin/sh\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    if readme is not None:
        (folder / "README.md").write_text(readme)
    (folder / ".venv-test").mkdir(exist_ok=True)
    environ = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(["bash", folder / ".ci/run"], cwd="/", env=environ, capture_output=True, text=True)


def test_ci_runs_the_command_of_the_readme(tmp_path):
    readme = "```sh\nfalse\n```\n## Two\nTo run the tests:\n\n```sh\n{}\n```\n```sh\ntouch late\n```\n"
    done = ci(tmp_path, readme.format("test ! -e .venv-test && pwd && exit 7"))
    assert done.returncode == 7
    assert done.stdout.splitlines()[-1] == str(tmp_path)
    assert ci(tmp_path, readme.format("true &&\\\n  true")).returncode == 0
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("readme", [None, "# Nothing", "run the tests", "To run the tests\n```\n\n```\n"])
def test_ci_says_when_the_readme_has_no_command(tmp_path, readme):
    done = ci(tmp_path, readme)
    assert done.returncode == 2
    assert "README.md has no fenced block after a line with the words 'run the tests'" in done.stderr


# -- README.md

FENCE = re.compile(r"^[ \t]*```(\w*)\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
SUFFIXES = (".py", ".ipynb", ".md", ".txt", ".toml", ".jsonl", ".json", ".png", ".safetensors")
MADE_BY_RUNNING = {"runs", ".venv", ".venv-test"}


def readme_faults(text: str) -> Iterator[str]:
    """Commands, files, links and names in that text that this repository does not have."""
    prose, blocks = FENCE.sub("", text), [body for _, body in FENCE.findall(text)]
    spans = re.findall(r"`([^`\n]+)`", prose)
    commands = [line.partition(" #")[0] for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    for command in (*commands, *spans):
        for arguments in re.findall(r"python -m ironlogic(?: ([^&|;]*))?$", command):
            yield from unknown_arguments(arguments)
        others = command.partition("-m ironlogic ")[0].split()  # our own parser has looked at the rest
        yield from (f"file {word}" for word in others if is_file(word) and not is_there(word))
    for span in spans:
        owner, _, name = span.partition("(")[0].partition(".")
        modules = [path for path in MODULES if path.stem == owner]
        if modules and name.isidentifier() and name != "py":
            defined = "|".join(path.read_text(encoding="utf-8") for path in modules)
            if not re.search(rf"^(def |class )?{name}\b", defined, re.MULTILINE):
                yield f"name {span}"
    for target in re.findall(r"\]\(([^)\s#]+)", prose):
        if not re.match(r"[a-z]+:", target) and not (ROOT / target).exists():
            yield f"link to {target}"
    parts = {part for name in FILES for part in name.parts}
    for name in re.findall(r"[├└]── ([^\s/]+)", text):
        if name not in parts | MADE_BY_RUNNING:
            yield f"tree: {name}"


def is_file(word: str) -> bool:
    """Whether a word is meant as a file of this repository: no option, no hub name, nothing made by running."""
    folder = word.partition("/")[0]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", word) or folder in MADE_BY_RUNNING:
        return False
    return word.endswith(SUFFIXES) or ("/" in word and folder in TOP)


def is_there(word: str) -> bool:
    return any((ROOT / folder / word).exists() for folder in ("", "ironlogic", "notebooks", "data", "tests"))


def unknown_arguments(arguments: str) -> Iterator[str]:
    """What the parser of `python -m ironlogic` says to them, if it refuses."""
    with redirect_stderr(StringIO()) as said:
        try:
            build_parser().parse_args(shlex.split(arguments))
        except SystemExit as stop:
            if stop.code:
                yield f"python -m ironlogic {arguments}: {said.getvalue().strip().splitlines()[-1]}"


def readme() -> str:
    path = ROOT / "README.md"
    assert path.is_file(), "README.md is not written yet"
    return path.read_text(encoding="utf-8")


def test_readme_names_nothing_that_is_not_there():
    assert list(readme_faults(readme())) == []


def test_readme_has_the_two_commands_and_every_notebook():
    text = readme()
    blocks = [body.strip() for _, body in FENCE.findall(text)]
    assert FIRST in blocks
    assert SECOND in blocks
    after = text[re.search("run the tests", text, re.IGNORECASE).start() :]
    assert FENCE.search(after)[2].strip() == SECOND  # what .ci/run will take
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert path.stem in text or path.stem[:2] + " " in text, f"README does not mention {path.stem}"


GOOD_README = """
```sh
python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python -m ironlogic run
.venv/bin/python -m ironlogic run 02 -p RATIO 0.4 --out /tmp/x   # comment
jupyter lab notebooks
```
Look at `session.start`, `session.py`, `ironlogic/session.py`, `runs/notebooks/x.png`, `python -m pytest`, `0.7`,
`results`, `google/gemma-3-27b-it`, `data/`, `.ci/run`, [the licence](LICENSE), [below](#run) and
[elsewhere](https://example.org/x.py#a).
```
├── ironlogic/
│   ├── session.py   this machine
│   └── presets.py
├── runs/
└── LICENSE
```
"""


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("-r requirements.txt", "-r requirements-all.txt", "file requirements-all.txt"),
        ("-m ironlogic run 02", "-m ironlogic execute 02", "python -m ironlogic execute 02"),
        ("--out /tmp/x", "--output-folder /tmp/x", "unrecognized arguments"),
        ("`session.start`", "`session.begin`", "name session.begin"),
        ("`ironlogic/session.py`", "`ironlogic/machine.py`", "file ironlogic/machine.py"),
        ("`.ci/run`", "`.ci/go`", "file .ci/go"),
        ("(LICENSE)", "(LICENCE)", "link to LICENCE"),
        ("└── presets.py", "└── settings.py", "tree: settings.py"),
        ("└── LICENSE", "└── LICENCE", "tree: LICENCE"),
    ],
)
def test_readme_check_finds_what_is_not_there_and_nothing_else(old, new, fault):
    assert list(readme_faults(GOOD_README)) == []
    assert GOOD_README.count(old)
    assert any(fault in found for found in readme_faults(GOOD_README.replace(old, new)))
