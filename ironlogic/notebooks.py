"""Notebooks as files and as programs: find, normalise, set parameters, execute headless.

Does not know what the notebooks are about, and prints nothing: progress goes to a callable. Cells are executed by
nbclient; ours is a kernel of this interpreter whatever is registered, a clock while a cell runs, Ctrl-C that keeps
the outputs, and failures told in a few lines.
"""

import ast
import asyncio
import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

from ironlogic import IronLogicError
from ironlogic.session import ROOT
from ironlogic.setup_cell import SETUP_CELL

import nbformat
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets import Type

__all__ = [
    "NotebookError",
    "NotebookFailure",
    "execute",
    "find_notebooks",
    "normal_form",
    "read_notebook",
    "read_parameters",
    "save_notebook",
    "set_parameters",
]

_SILENT = logging.getLogger(f"{__name__}.nbclient")  # it logs what it also raises
_SILENT.disabled = True
NOTEBOOKS = ROOT / "notebooks"
METADATA = {
    "accelerator": "GPU",  # what Colab is to give
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # in Colab and in JupyterLab
ANSI = re.compile(r"\x1b\[[0-9;]*m")
FAULTY_LINE = re.compile(r"^-+> *(\d+)|Cell In *\[\d+\], line (\d+)", re.MULTILINE)


class NotebookError(IronLogicError, ValueError):
    """A notebook or a parameter that cannot be used; the message says which and what to do."""


class NotebookFailure(IronLogicError, RuntimeError):
    """A cell that did not end well; the message names notebook, cell, line and the end of the traceback."""


# -- files


def find_notebooks(names: Sequence[str] = (), *, folder: Path = NOTEBOOKS) -> list[Path]:
    """The numbered notebooks, all or those named by number ("02"), stem or path. Raises NotebookError."""
    known = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not names and not known:
        raise NotebookError(f"no notebooks in {folder}")
    found = [_find_notebook(name, known) for name in names] or known
    return list(dict.fromkeys(found))


def _find_notebook(name: str, known: Sequence[Path]) -> Path:
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    stem = Path(name).name.removesuffix(".ipynb")
    for path in known:
        if stem == path.stem or (stem.isdigit() and int(stem) == int(path.stem[:2])):
            return path
    raise NotebookError(f"no notebook {name!r}; there are {', '.join(path.stem for path in known) or 'none'}")


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook of format 4, its cells with ids. Raises NotebookError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotebookError(f"{path} cannot be read as a notebook: {error}") from None
    cells = raw.get("cells") if isinstance(raw, dict) and raw.get("nbformat") == 4 else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise NotebookError(f"{path} is no notebook of format 4: open it in JupyterLab and save it")
    raw["nbformat_minor"] = 5  # the first with cell ids; nbformat itself would draw them at random
    seen: set[str] = set()
    for cell in cells:
        cell["id"] = _stable_id(cell, seen)
        seen.add(cell["id"])
    notebook = nbformat.from_dict(raw)
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        raise NotebookError(f"{path} is no valid notebook: {error.message}") from None
    for cell in notebook.cells:
        cell.source = "".join(cell.source)
    return notebook


def _stable_id(cell: Mapping[str, Any], seen: set[str]) -> str:
    """The cell's own id, or one made from its text: the same whenever it is asked for."""
    proposal, text = cell.get("id"), "".join(cell.get("source", ""))
    while not proposal or proposal in seen:
        text = proposal = hashlib.sha256(text.encode()).hexdigest()[:8]
    return proposal


def normal_form(path: Path) -> str:
    """The text the notebook should have: no outputs, counts, widget state or machine; the shared set-up cell."""
    notebook = read_notebook(path)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if "setup" in tags:
            cell.source = SETUP_CELL
            cell.metadata.update(FOLDED)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cell.source = cell.source.replace("\r\n", "\n").strip("\n")
    return nbformat.writes(notebook, indent=1, ensure_ascii=False) + "\n"


def save_notebook(text: str, path: Path) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)


# -- parameters


def read_parameters(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Name -> default of the cell tagged `parameters`, {} without one. NotebookError on more than literals."""
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) > 1:
        raise NotebookError(f"{len(cells)} cells are tagged 'parameters'; expected one")
    values: dict[str, Any] = {}
    for statement in ast.parse(cells[0].source).body if cells else []:
        try:
            (target,) = [statement.target] if isinstance(statement, ast.AnnAssign) else statement.targets
            values[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            line = ast.unparse(statement)
            raise NotebookError(f"parameters, line {statement.lineno}: {line!r} is not NAME = literal") from None
    return values


def set_parameters(notebook: nbformat.NotebookNode, values: Mapping[str, Any]) -> None:
    """Put a cell with those values below the parameters. Raises NotebookError on a name that the notebook lacks."""
    known = read_parameters(notebook)
    if unknown := sorted(set(values) - set(known)):
        raise NotebookError(f"unknown parameter {', '.join(unknown)}; there are {', '.join(known) or 'none'}")
    if values:
        lines = [f"{name} = {value!r}" for name, value in values.items()]
        cell = nbformat.v4.new_code_cell("\n".join(["# set from outside", *lines]), id="parameters-set")
        at = next(i for i, one in enumerate(notebook.cells) if "parameters" in one.metadata.get("tags", []))
        notebook.cells.insert(at + 1, cell)


# -- execution


def execute(
    notebook: nbformat.NotebookNode,
    path: Path,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    report: Callable[[str, bool], None] = lambda progress, done: None,
) -> None:
    """Run the code cells in a kernel of this interpreter, in the folder of `path`; outputs go into the notebook.

    `env` is added to the kernel's environment; `timeout` in seconds a cell; `report` gets (where the execution is,
    whether this cell is done) about once a second.
    Raises NotebookFailure when a cell fails; the notebook then holds the outputs up to there.
    """
    cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
    with tempfile.TemporaryDirectory(prefix="il-", ignore_cleanup_errors=True) as folder:
        client = NotebookClient(
            notebook,
            km=_kernel_manager(folder),
            timeout=timeout,
            startup_timeout=180,
            log=_SILENT,
            resources={"metadata": {"path": str(Path(path).resolve().parent)}},
        )
        environ = {
            **os.environ,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # not what the shell has for windows
            "IPYTHONDIR": folder,  # nobody's start-up files, no shared history
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else a debugger that nobody started writes a warning
            **(env or {}),
        }
        # selector: zmq cannot wait on Windows' own loop. A Runner turns Ctrl-C into a cancelled task.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(_execute(client, Path(path).stem, cells, environ, report))


async def _execute(
    client: NotebookClient, name: str, cells: Sequence[int], environ: Mapping[str, str], report: Callable
) -> None:
    manager, finished = client.km, False
    try:
        await client.async_start_new_kernel(env=environ)
        await client.async_start_new_kernel_client()
        for number, index in enumerate(cells, 1):
            try:
                await _execute_cell(client, index, f"[{number}/{len(cells)}]", report)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                where = f"{name}, code cell {number} of {len(cells)}"
                raise NotebookFailure(_describe(error, where, client.nb.cells[index], client.timeout)) from None
        client.set_widgets_metadata()
        finished = True
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
        if manager.has_kernel:
            await manager.shutdown_kernel(now=not finished)


async def _execute_cell(client: NotebookClient, index: int, place: str, report: Callable) -> None:
    cell, began = client.nb.cells[index], time.monotonic()
    code = [line for line in cell.source.splitlines() if line and not line.startswith("# ")]
    task = asyncio.ensure_future(client.async_execute_cell(cell, index))

    def tell(done: bool) -> None:
        report(f"{place} {time.monotonic() - began:6.1f} s  {code[0] if code else ''}", done)

    try:
        while not task.done():
            tell(False)
            await asyncio.wait({task}, timeout=1)
    except asyncio.CancelledError:  # Ctrl-C: stop the cell, so that its output is kept
        await client.km.interrupt_kernel()
        await asyncio.wait({task}, timeout=5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    await task
    tell(True)


def _describe(error: Exception, where: str, cell: nbformat.NotebookNode, timeout: float | None) -> str:
    """The faulty line and the end of the traceback."""
    if isinstance(error, DeadKernelError):
        return f"{where}: the kernel died (out of memory?)"
    if isinstance(error, CellTimeoutError):
        return f"{where}: no end after {timeout:g} s"
    outputs = [output for output in cell.outputs if output.output_type == "error"]
    trace = ANSI.sub("", "\n".join(outputs[-1].traceback if outputs else [str(error)]))
    found = FAULTY_LINE.search(trace)
    line = int(found[1] or found[2]) if found else 1
    source = [f"    {text.strip()}" for text in cell.source.splitlines()[line - 1 : line]]
    end = [text for text in trace.splitlines() if text.strip()][-12:]
    return "\n".join([f"{where}, line {line}:", *source, *end])


# -- the kernel


class _PatientChannel(AsyncZMQSocketChannel):
    """Waits in steps of a second: one long wait now and then misses a message (nbclient issue 312)."""

    step = 1.0

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        """As its parent: a message, or Empty after `timeout` seconds (None: never)."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return await super().get_msg(max(0.0, min(self.step, end - time.monotonic())))
            except Empty:
                if time.monotonic() >= end:
                    raise


class _PatientClient(AsyncKernelClient):
    shell_channel_class = Type(_PatientChannel)
    iopub_channel_class = Type(_PatientChannel)


class _ThisInterpreter(KernelSpecManager):
    """Every kernel is the Python that asks, whatever is registered under its name or under none."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


def _kernel_manager(folder: str) -> AsyncKernelManager:
    """A kernel of this interpreter. Sockets are files where there are such: no ports, no races, no warning."""
    manager = AsyncKernelManager(kernel_spec_manager=_ThisInterpreter(), client_factory=_PatientClient)
    manager.connection_file = os.path.join(folder, "kernel.json")
    if os.name == "posix" and len(folder) < 80:  # a socket's path has room for about 100 characters
        manager.transport, manager.ip = "ipc", os.path.join(folder, "socket")
    return manager
