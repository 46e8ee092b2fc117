"""Notebooks as files and as programs: find, normalise, set parameters, execute headless, question the kernel.

Does not know what the notebooks are about, and prints nothing: progress goes to a callable.
"""

import ast
import asyncio
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
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
    "NotebookSession",
    "Progress",
    "find_notebooks",
    "normal_form",
    "read_parameters",
    "save_notebook",
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


@dataclass(frozen=True)
class Progress:
    """Where an execution is. `number` counts code cells from 1; `seconds` are the cell's own."""

    number: int
    of: int
    line: str  # the cell's first line of code
    seconds: float
    done: bool


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
        proposal = hashlib.sha256(text.encode()).hexdigest()[:8]
        text = proposal
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


class _PatientChannel(AsyncZMQSocketChannel):
    """Waits in steps of a second: one long wait now and then misses a message (nbclient issue 312)."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        return await in_steps(super().get_msg, timeout)


async def in_steps(get: Callable[[float], Awaitable[Any]], timeout: float | None, *, step: float = 1.0) -> Any:
    """`await get(timeout)`, asked again every `step` seconds; Empty after `timeout` seconds (None: never)."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        left = step if end is None else max(0.0, min(step, end - time.monotonic()))
        try:
            return await get(left)
        except Empty:
            if end is not None and time.monotonic() >= end:
                raise


class _PatientClient(AsyncKernelClient):
    shell_channel_class = Type(_PatientChannel)
    iopub_channel_class = Type(_PatientChannel)


class _ThisInterpreter(KernelSpecManager):
    """Every kernel is the Python that asks, whatever is registered under its name or under none."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


class NotebookSession:
    """A notebook executed headless, its kernel kept up for questions and for moving widgets:

        with NotebookSession(path, parameters={"RATIO": 0.3}) as session:
            session.move("slider", value=0.2)
            assert session("slider.value") == 0.2

    The kernel is this interpreter, in the notebook's folder. `env` is added to its environment; `timeout` is in
    seconds per cell. Entering raises NotebookFailure when a cell fails; `notebook` holds the outputs up to there.
    """

    def __init__(
        self,
        path: Path,
        *,
        parameters: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.path = Path(path)
        self.notebook = read_notebook(self.path)
        set_parameters(self.notebook, parameters or {})
        self._env, self._timeout, self._report = dict(env or {}), timeout, report

    def __enter__(self) -> "NotebookSession":
        self._folder = Path(tempfile.mkdtemp(prefix="il-"))
        self._manager = _kernel_manager(self._folder)
        self._client = NotebookClient(
            self.notebook,
            km=self._manager,
            timeout=self._timeout,
            startup_timeout=180,
            log=_SILENT,
            resources={"metadata": {"path": str(self.path.resolve().parent)}},
        )
        # selector: zmq cannot wait on Windows' own loop. A Runner turns Ctrl-C into a cancelled task.
        self._runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
        try:
            self._runner.run(self._start())
            self._execute()
        except BaseException:
            self._close(now=True)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._close(now=kind is not None)

    def __call__(self, expression: str) -> Any:
        """The value, a literal, of an expression in the kernel."""
        cell = nbformat.v4.new_code_cell(f"print('\\x1e', repr(({expression})), sep='')")
        index = len(self.notebook.cells)
        self.notebook.cells.append(cell)  # nbclient looks its cell up by the index
        try:
            self._runner.run(self._client.async_execute_cell(cell, index, store_history=False))
        except CellExecutionError as error:
            raise NotebookFailure(f"{self.path.stem}: {expression}: {error.ename}: {error.evalue}") from None
        finally:
            self.notebook.cells.pop()
        text = "".join(output.get("text", "") for output in cell.outputs).partition("\x1e")[2]
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise NotebookFailure(f"{self.path.stem}: {expression} is {text[:80]!r}, not a literal") from None

    def move(self, widget: str, **state: Any) -> None:
        """Send what a browser sends when its user moves a control, and wait until the kernel has dealt with it."""
        data = {"method": "update", "state": state, "buffer_paths": []}
        client, comm = self._client.kc, self(f"{widget}.model_id")
        client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": comm, "data": data}))
        self("None")  # the same queue: answered after the message

    async def _start(self) -> None:
        env = {
            **os.environ,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # not what the shell has for windows
            "IPYTHONDIR": str(self._folder),  # nobody's start-up files, no shared history
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else a debugger that nobody started writes a warning
            **self._env,
        }
        await self._client.async_start_new_kernel(env=env)
        await self._client.async_start_new_kernel_client()

    def _execute(self) -> None:
        cells = self.notebook.cells
        code = [i for i, cell in enumerate(cells) if cell.cell_type == "code" and cell.source.strip()]
        for number, index in enumerate(code, 1):
            lines = [line for line in cells[index].source.splitlines() if line and not line.startswith("# ")]
            place = (number, len(code), (lines or [""])[0])
            try:
                self._runner.run(self._run_cell(index, place))
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                raise NotebookFailure(self._describe(error, number, len(code), cells[index])) from None
        self._client.set_widgets_metadata()

    async def _run_cell(self, index: int, place: tuple[int, int, str]) -> None:
        began = time.monotonic()
        task = asyncio.ensure_future(self._client.async_execute_cell(self.notebook.cells[index], index))
        try:
            while not task.done():
                self._report(Progress(*place, time.monotonic() - began, False))
                await asyncio.wait({task}, timeout=1)
        except asyncio.CancelledError:  # Ctrl-C: stop the cell, so that its output is kept
            await self._manager.interrupt_kernel()
            await asyncio.wait({task}, timeout=5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        await task
        self._report(Progress(*place, time.monotonic() - began, True))

    def _describe(self, error: Exception, number: int, of: int, cell: nbformat.NotebookNode) -> str:
        where = f"{self.path.stem}, code cell {number} of {of}"
        if isinstance(error, DeadKernelError):
            return f"{where}: the kernel died (out of memory?)"
        if isinstance(error, CellTimeoutError):
            return f"{where}: no end after {self._timeout:g} s"
        outputs = [output for output in cell.outputs if output.output_type == "error"]
        trace = ANSI.sub("", "\n".join(outputs[-1].traceback if outputs else [str(error)])).splitlines()
        found = FAULTY_LINE.search("\n".join(trace))
        line = int(found[1] or found[2]) if found else 1
        source = cell.source.splitlines()[line - 1 : line]
        shown = [text for text in trace if text.strip()][-12:]
        return "\n".join([f"{where}, line {line}:", *[f"    {text.strip()}" for text in source], *shown])

    def _close(self, *, now: bool) -> None:
        try:
            self._runner.run(self._stop(now))
        finally:
            self._runner.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _stop(self, now: bool) -> None:
        if self._client.kc is not None:
            self._client.kc.stop_channels()
        if self._manager.has_kernel:
            await self._manager.shutdown_kernel(now=now)


def _kernel_manager(folder: Path) -> AsyncKernelManager:
    """A kernel of this interpreter. Sockets are files where there are such: no ports, no races, no warning."""
    manager = AsyncKernelManager(kernel_spec_manager=_ThisInterpreter(), client_factory=_PatientClient)
    manager.connection_file = str(folder / "kernel.json")
    if os.name == "posix" and len(str(folder)) < 80:  # a socket's path has room for about 100 characters
        manager.transport, manager.ip = "ipc", str(folder / "socket")
    return manager
