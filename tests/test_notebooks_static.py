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
        found = [] if path.read_text(encoding="utf-8") == normal_form(path) else ["run: python -m ironlogic format"]
        read_parameters(notebook)
    except (NotebookError, SyntaxError) as error:
        return [str(error)]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    found += [*title_faults(path, notebook), *order_faults(notebook), *size_faults(code)]
    for number, cell in enumerate(code, 1):
        found += [f"code cell {number}: {fault}" for fault in code_faults(cell.source)]
    return found + [fault for cell in prose for fault in link_faults(path.parent, cell.source)]


def title_faults(path: Path, notebook: nbformat.NotebookNode) -> Iterator[str]:
    first = notebook.cells[0] if notebook.cells else nbformat.v4.new_code_cell("")
    if first.cell_type != "markdown" or not re.match(rf"# {path.name[:2]} · \S", first.source):
        yield f"the first cell is not a title '# {path.name[:2]} · ...'"
    table = "\n".join(line for line in first.source.splitlines() if line.startswith("|")).lower()
    if "|--" not in table or "time" not in table or "memory" not in table:
        yield "the title has no table of time and memory"
    numbered = sorted(path.parent.glob("[0-9][0-9]_*.ipynb"))
    at = numbered.index(path)
    for neighbour in (numbered[at - 1] if at else None, *numbered[at + 1 : at + 2]):
        if neighbour and f"]({neighbour.name})" not in first.source:
            yield f"the title has no link to {neighbour.name}"


def order_faults(notebook: nbformat.NotebookNode) -> Iterator[str]:
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells if cell.cell_type == "code"]
    for tag, at in (("setup", 0), ("parameters", 1), ("checks", -1)):
        if [i for i, some in enumerate(tags) if tag in some] != [at % len(tags) if tags else at]:
            yield f"code cell {at} alone has to be tagged {tag!r}"
    if not any(re.search(r"^#+ Try this", cell.source, re.M) for cell in notebook.cells):
        yield "no section 'Try this'"
    last = [cell.source for cell in notebook.cells if cell.cell_type == "code"][-1:]
    if not any(isinstance(node, ast.Assert) for source in last for node in _walk(source)):
        yield "the checks assert nothing"


def size_faults(code: list[nbformat.NotebookNode]) -> Iterator[str]:
    own = [cell.source for cell in code if cell.source != SETUP_CELL]
    lines = sum(bool(line.strip()) for source in own for line in source.splitlines())
    if lines > LONGEST_NOTEBOOK:
        yield f"{lines} lines of code; at most {LONGEST_NOTEBOOK}"
    functions = sum(isinstance(node, ast.FunctionDef) for source in own for node in _walk(source))
    if functions > MOST_FUNCTIONS:
        yield f"{functions} functions; at most {MOST_FUNCTIONS}: put them into the package"


def code_faults(source: str) -> Iterator[str]:
    if not source.strip():
        yield "empty"
    if len(source.splitlines()) > LONGEST_CELL:
        yield f"{len(source.splitlines())} lines; at most {LONGEST_CELL}"
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError as error:
        yield f"line {error.lineno} is no Python (magics are not): {error.msg}"
        return
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    if any(isinstance(node, ast.ClassDef) for node in nodes):
        yield "a class: put it into the package"
    if "get_ipython" in names:
        yield "get_ipython: a magic by another name"
    if found := names & OUTPUT_WIDGETS:
        yield f"{', '.join(sorted(found))}: output widgets hang a headless run"


def link_faults(folder: Path, source: str) -> Iterator[str]:
    targets = re.findall(r"\]\(([^)\s]+)", source) + re.findall(r"(?:src|href)=[\"']([^\"']+)", source)
    for target in targets:
        local = target.partition("#")[0]
        if local and not re.match(r"[a-z]+:", local) and not (folder / local).exists():
            yield f"link to {target}, which does not exist"


def _walk(source: str) -> Iterator[ast.AST]:
    try:
        yield from ast.walk(ast.parse(source))
    except SyntaxError:
        return  # code_faults says it


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: path.stem)
def test_notebook(path):
    assert faults(path) == []


def test_numbers_are_those_of_the_readme_and_none_stands_twice():
    numbers = [path.stem[:2] for path in PRESENT]
    assert numbers == sorted(set(numbers))
    table = re.findall(r"^\| \[(\d\d)_\w+\]", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert numbers == table


def test_setup_cell_keeps_its_own_rules():
    assert list(code_faults(SETUP_CELL)) == []


# -- the checks can fail

TITLE = """# 07 · Sample

| | CPU | card |
|---|---|---|
| time | 1 min | 1 min |
| memory | 1 GB | - |
"""


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


def another(cell: nbformat.NotebookNode, **changes: object) -> nbformat.NotebookNode:
    return nbformat.from_dict({**cell, **changes})


def many(cells: list) -> None:
    cells[4:4] = [another(cells[4], id=f"n{i}", source="x = 1\n" * 30) for i in range(6)]


def source(index: int, text: str) -> Callable[[list], None]:
    return lambda cells: cells[index].update(source=text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (source(0, TITLE.replace("07", "08")), "the first cell is not a title"),
        (source(0, "# 07 · Sample"), "no table of time and memory"),
        (lambda cells: cells.pop(1), "tagged 'setup'"),
        (lambda cells: cells.pop(2), "tagged 'parameters'"),
        (lambda cells: cells.append(another(cells[2], id="twice")), "2 cells are tagged 'parameters'"),
        (lambda cells: cells.append(another(cells[4], id="after")), "tagged 'checks'"),
        (source(2, "RATIO = 1 / 2"), "'RATIO = 1 / 2' is not NAME = literal"),
        (source(4, "%matplotlib inline"), "magics"),
        (source(4, "get_ipython().run_line_magic('time', '')"), "get_ipython"),
        (source(4, "class A:\n    pass"), "a class"),
        (source(4, "\n".join(f"def f{i}(): ..." for i in range(4))), "4 functions; at most 3"),
        (source(4, "from ipywidgets import interact"), "interact: output widgets hang"),
        (source(4, "x = 1\n" * 31), "31 lines; at most 30"),
        (source(4, " "), "empty"),
        (many, "lines of code; at most 160"),
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
        lambda raw: raw["cells"][4].update(execution_count=3),
        lambda raw: raw["cells"][4].update(
            outputs=[{"output_type": "stream", "name": "stdout", "text": ["1.4\n"]}]
        ),
        lambda raw: raw["cells"][4]["metadata"].update(collapsed=True),
        lambda raw: raw["cells"][1].update(source=["import os"]),
        lambda raw: raw["cells"][1]["metadata"].pop("cellView"),
        lambda raw: raw["metadata"].update(widgets={"application/vnd.jupyter.widget-state+json": {"state": {}}}),
        lambda raw: raw["metadata"]["kernelspec"].update(display_name="venv"),
        lambda raw: raw["metadata"]["language_info"].update(version="3.13.1"),
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
        ("", "cannot be read as a notebook"),
        ("{", "cannot be read as a notebook"),
        ("[]", "no notebook of format 4"),
        ('{"nbformat": 3, "worksheets": []}', "no notebook of format 4"),
        (
            '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}',
            "no valid notebook",
        ),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": ["x"]}', "no notebook of format 4"),
    ],
)
def test_what_is_no_notebook(tmp_path, text, said):
    path = tmp_path / "07_sample.ipynb"
    path.write_text(text)
    assert said in faults(path)[0]
