"""What every notebook file must be, read without a kernel; and that each of these checks can fail."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ironlogic.notebooks import NOTEBOOKS, NotebookError, normal_form, read_notebook, read_parameters, save_notebook
from ironlogic.session import ROOT
from ironlogic.setup_cell import SETUP_CELL

import nbformat
import pytest

PRESENT = sorted(NOTEBOOKS.glob("*.ipynb"))
LONGEST_CELL, LONGEST_NOTEBOOK, MOST_FUNCTIONS = 30, 160, 3
OUTPUT_WIDGETS = set("Output interact interactive interactive_output interact_manual".split())  # they hang nbclient


def faults(path: Path) -> list[str]:
    """Everything that is wrong with a notebook of this repository, [] when it is right."""
    try:
        notebook = read_notebook(path)
        read_parameters(notebook)
        found = [] if path.read_text(encoding="utf-8") == normal_form(path) else ["run: python -m ironlogic format"]
    except (NotebookError, SyntaxError) as error:
        return [str(error)]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for number, cell in enumerate(code, 1):
        found += [f"code cell {number}: {fault}" for fault in cell_faults(cell.source)]
    return [*found, *code_faults(code), *prose_faults(path, prose)]


def cell_faults(source: str) -> Iterator[str]:
    lines = source.splitlines()
    if not source.strip() or len(lines) > LONGEST_CELL:
        yield f"{len(lines)} lines; 1 to {LONGEST_CELL}"
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError as error:
        yield f"line {error.lineno} is no Python (magics are not): {error.msg}"
        return
    names = {getattr(node, field, None) for node in nodes for field in ("id", "attr", "name")}
    if any(isinstance(node, ast.ClassDef) for node in nodes):
        yield "a class: put it into the package"
    if "get_ipython" in names:
        yield "get_ipython: a magic by another name"
    if found := names & OUTPUT_WIDGETS:
        yield f"{', '.join(sorted(found))}: output widgets hang a headless run"


def code_faults(cells: list[nbformat.NotebookNode]) -> Iterator[str]:
    tags = [cell.metadata.get("tags", []) for cell in cells]
    for tag, place in (("setup", 0), ("parameters", 1), ("checks", len(cells) - 1)):
        if [i for i, some in enumerate(tags) if tag in some] != [place]:
            yield f"code cell {place + 1} alone has to be tagged {tag!r}"
    own = [cell.source for cell in cells if cell.source != SETUP_CELL]
    if own and "assert " not in own[-1]:
        yield "the checks assert nothing"
    lines = [line for source in own for line in source.splitlines() if line.strip()]
    if len(lines) > LONGEST_NOTEBOOK:
        yield f"{len(lines)} lines of code; at most {LONGEST_NOTEBOOK}"
    if (functions := sum(line.lstrip().startswith("def ") for line in lines)) > MOST_FUNCTIONS:
        yield f"{functions} functions; at most {MOST_FUNCTIONS}: put them into the package"


def prose_faults(path: Path, cells: list[str]) -> Iterator[str]:
    title, text = next(iter(cells), ""), "\n".join(cells)
    if not re.match(rf"# {path.name[:2]} · \S", title):
        yield f"the first text is not a title '# {path.name[:2]} · ...'"
    if not re.search(r"^\|--(.|\n)*^\| time (.|\n)*^\| memory ", title, re.MULTILINE):
        yield "the title has no table of time and memory"
    numbered = sorted(path.parent.glob("[0-9][0-9]_*.ipynb"))
    at = numbered.index(path)
    for neighbour in (*numbered[max(at - 1, 0) : at], *numbered[at + 1 : at + 2]):
        if f"]({neighbour.name})" not in title:
            yield f"the title has no link to {neighbour.name}"
    if not re.search(r"^#+ Try this", text, re.MULTILINE):
        yield "no section 'Try this'"
    for target in re.findall(r"\]\(([^)\s#]+)", text) + re.findall(r"(?:src|href)=[\"']([^\"'#]+)", text):
        if not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
            yield f"link to {target}, which does not exist"


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: path.stem)
def test_notebook(path):
    assert faults(path) == []


def test_numbers_are_those_of_the_readme_and_none_stands_twice():
    numbers = [path.stem[:2] for path in PRESENT]
    assert numbers == sorted(set(numbers))
    table = re.findall(r"^\| \[(\d\d)_\w+\]", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert numbers == table


# -- the checks can fail

TITLE = "# 07 · Sample\n\n| | CPU | card |\n|---|---|---|\n| time | 1 min | 1 min |\n| memory | 1 GB | - |"


def write(path: Path, change: Callable[[list], object] = lambda cells: None) -> Path:
    """A right notebook, its list of cells changed, in normal form."""
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [
        markdown(TITLE, id="title"),
        code("old", id="setup", metadata={"tags": ["setup"]}),
        code("RATIO = 0.7", id="parameters", metadata={"tags": ["parameters"]}),
        markdown("## A section, [linked](#here)", id="section"),
        code("x = RATIO * 2\nx", id="work"),
        markdown("## Try this\n\n`RATIO = 0.2`", id="try"),
        code("assert x == RATIO * 2", id="checks", metadata={"tags": ["checks"]}),
    ]
    change(cells)
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)), encoding="utf-8")
    save_notebook(normal_form(path), path)
    return path


def source(index: int, text: str) -> Callable[[list], None]:
    return lambda cells: cells[index].update(source=text)


def repeat(index: int, *, times: int = 1, **changes: object) -> Callable[[list], None]:
    def change(cells: list) -> None:
        cells[4:4] = [nbformat.from_dict({**cells[index], "id": f"n{i}", **changes}) for i in range(times)]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (source(0, TITLE.replace("07", "08")), "is not a title"),
        (source(0, "# 07 · Sample"), "no table of time and memory"),
        (lambda cells: cells.pop(1), "tagged 'setup'"),
        (lambda cells: cells.pop(2), "tagged 'parameters'"),
        (repeat(2), "2 cells are tagged 'parameters'"),
        (lambda cells: cells.append(cells.pop(4)), "tagged 'checks'"),
        (source(2, "RATIO = 1 / 2"), "'RATIO = 1 / 2' is not NAME = literal"),
        (source(4, "%matplotlib inline"), "magics"),
        (source(4, "get_ipython().run_line_magic('time', '')"), "get_ipython"),
        (source(4, "class A:\n    pass"), "a class"),
        (source(4, "\n".join(f"def f{i}(): ..." for i in range(4))), "4 functions; at most 3"),
        (source(4, "from ipywidgets import interact"), "interact: output widgets hang"),
        (source(4, "x = 1\n" * 31), "31 lines; 1 to 30"),
        (source(4, " "), "lines; 1 to 30"),
        (repeat(4, times=6, source="x = 1\n" * 30), "lines of code; at most 160"),
        (source(3, "[gone](02_gone.ipynb)"), "link to 02_gone.ipynb"),
        (source(5, "## Exercises"), "no section 'Try this'"),
        (source(6, "print(x)"), "the checks assert nothing"),
    ],
)
def test_each_fault_is_found(tmp_path, change, said):
    assert faults(write(tmp_path / "07_sample.ipynb")) == []
    found = faults(write(tmp_path / "07_sample.ipynb", change))
    assert any(said in fault for fault in found), found


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw["cells"][4].update(
            execution_count=3, outputs=[{"output_type": "stream", "name": "stdout", "text": ["1.4\n"]}]
        ),
        lambda raw: raw["cells"][4]["metadata"].update(collapsed=True),
        lambda raw: raw["cells"][1].update(source=["import os"]),
        lambda raw: raw["metadata"].update(widgets={"application/vnd.jupyter.widget-state+json": {"state": {}}}),
        lambda raw: raw["metadata"]["kernelspec"].update(display_name="venv"),
        lambda raw: raw["cells"][5].pop("id"),
        lambda raw: raw["cells"][5].update(id="title"),
        lambda raw: raw.update(nbformat_minor=2),
    ],
)
def test_what_a_session_leaves_behind_is_found_and_formatted_away(tmp_path, spoil):
    path = write(tmp_path / "07_sample.ipynb")
    before = path.read_text()
    raw = json.loads(before)
    spoil(raw)
    path.write_text(json.dumps(raw))
    assert "run: python -m ironlogic format" in faults(path)
    save_notebook(normal_form(path), path)
    assert faults(path) == []
    after = path.read_text()
    assert normal_form(path) == after  # ids that had to be made are kept
    if raw["cells"][5].get("id") == "try":
        assert after == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as a notebook"),
        ("[]", "no notebook of format 4"),
        ('{"nbformat": 3, "worksheets": []}', "no notebook of format 4"),
        ('{"nbformat": 4, "cells": ["x"]}', "no notebook of format 4"),
        ('{"nbformat": 4, "metadata": {}, "cells": [{"cell_type": "code"}]}', "no valid notebook"),
    ],
)
def test_what_is_no_notebook(tmp_path, text, said):
    path = tmp_path / "07_sample.ipynb"
    path.write_text(text)
    assert said in faults(path)[0]
