"""The runner on small notebooks made here: what it executes, prints, refuses and leaves behind."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import Empty

from ironlogic.__main__ import main, read_value, show_progress
from ironlogic.notebooks import (
    AsyncZMQSocketChannel,
    NotebookError,
    NotebookFailure,
    _PatientChannel,
    execute,
    find_notebooks,
    read_notebook,
    set_parameters,
)
from ironlogic.session import ROOT
from ironlogic.setup_cell import SETUP_CELL

import nbformat
import pytest

WIDGET = 'import ipywidgets as W\ntext = W.HTML("start")\nW.VBox([W.FloatSlider(), text])'


def outputs(notebook: nbformat.NotebookNode, kind: str, name: str = "") -> list[str]:
    """Texts of the outputs of that type (stream: of that name)."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == kind]
    return [output.get("text") or output.get("evalue") for output in found if output.get("name", "") == name]


def printed(path: Path, **options) -> list[str]:
    """What the cells of a notebook print, the first line of each."""
    notebook = read_notebook(path)
    execute(notebook, path, **options)
    return [text.splitlines()[0] for text in outputs(notebook, "stream", "stdout")]


@pytest.mark.slow
def test_run_good_and_bad(tmp_path, make_notebook, capsys):
    good = make_notebook(
        tmp_path / "books/01_good.ipynb",
        "import os, sys\nprint(A, B, sys.executable, os.getcwd(), os.environ['IRONLOGIC_RUNS'], sep='|')",
        WIDGET,
        parameters="A = 1\nB: str = 'b'  # a comment",
    )
    bad = make_notebook(
        tmp_path / "books/02_bad.ipynb", "x = 3", "# why\nimport json\njson.loads('{' * x)", "x = 4"
    )
    last = make_notebook(tmp_path / "books/03_last.ipynb", "x = = 1")
    runs = tmp_path / "results"
    chosen = ["-p", "B", "two words", "-p", "A", "[1, 2]", "--out", str(runs)]
    assert main(["run", str(good), str(bad), str(last), *chosen]) == 1
    said = capsys.readouterr()
    assert said.err == ""

    copy = nbformat.read(runs / "notebooks/01_good.ipynb", as_version=4)
    nbformat.validate(copy)
    assert outputs(copy, "stream", "stdout") == [f"[1, 2]|two words|{sys.executable}|{good.parent}|{runs}\n"]
    state = copy.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert "start" in [one["state"].get("value") for one in state.values()]  # so that the copy shows its widgets

    copy = nbformat.read(runs / "notebooks/02_bad.ipynb", as_version=4)
    assert [cell.execution_count for cell in copy.cells if cell.cell_type == "code"] == [1, 2, 3, 4, None]
    lines = said.out.splitlines()
    at = lines.index("FAILED 02_bad, code cell 4 of 5, line 3:")  # its own three and the parameters set
    assert lines[at + 1] == "    json.loads('{' * x)"
    end = lines.index("", at)
    assert lines[end - 1].startswith("JSONDecodeError: Expecting property name")
    assert end - at <= 15
    assert "FAILED 03_last, code cell 3 of 3, line 1:" in lines

    table = [line.split()[:2] for line in lines[-4:-1]]
    assert table == [["01_good", "passed"], ["02_bad", "FAILED"], ["03_last", "FAILED"]]


@pytest.mark.slow
def test_the_kernel_is_this_python_whatever_is_registered(tmp_path, make_notebook, monkeypatch):
    wrong = tmp_path / "share/kernels/python3"
    wrong.mkdir(parents=True)
    (wrong / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.setenv("MPLBACKEND", "Agg")  # a shell's choice must not hide the figures
    startup = tmp_path / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "mine.py").write_text("MINE = 1\n")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    questions = (
        "sys.executable, os.environ['MPLBACKEND'], 'MINE' in globals(), os.environ['IPYTHONDIR'], os.getpid()"
    )
    path = make_notebook(tmp_path / "01_x.ipynb", f"import os, sys\nprint({questions}, sep='|')")
    python, figures, mine, folder, kernel = printed(path)[0].split("|")
    assert (python, mine) == (sys.executable, "False")
    assert figures == "module://matplotlib_inline.backend_inline"
    assert not Path(folder).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(kernel), 0)


@pytest.mark.slow
def test_setup_cell_in_a_kernel(tmp_path, make_notebook, tmp_runs):
    (tmp_path / "checkout").symlink_to(ROOT, target_is_directory=True)
    path = make_notebook(tmp_path / "01_x.ipynb", SETUP_CELL, "print((str(S.root), str(S.runs), S.installed))")
    notebook = read_notebook(path)
    execute(notebook, path, timeout=120)
    assert outputs(notebook, "stream", "stderr") == []
    assert outputs(notebook, "stream", "stdout")[-1] == f"{(str(ROOT), str(tmp_runs), ())}\n"


@pytest.mark.slow
def test_a_kernel_that_dies_or_never_ends(tmp_path, make_notebook):
    path = make_notebook(tmp_path / "01_x.ipynb", "import os; os._exit(3)")
    with pytest.raises(NotebookFailure, match=r"01_x, code cell 2 of 2: the kernel died"):
        printed(path)
    path = make_notebook(tmp_path / "02_x.ipynb", "import time; time.sleep(60)")
    began = time.monotonic()
    with pytest.raises(NotebookFailure, match="no end after 1 s"):
        printed(path, timeout=1)
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_ctrl_c_ends_cleanly(tmp_path, make_notebook):
    code = "import os, pathlib, time\nprint('pid', os.getpid())\npathlib.Path('begun').touch()\ntime.sleep(60)"
    path = make_notebook(tmp_path / "01_x.ipynb", code)
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "ironlogic", "run", str(path), "--out", str(runs)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a job in the background has none
    )
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=30)
    assert (process.returncode, complained) == (130, "\ninterrupted\n")
    assert "Traceback" not in said
    copy = nbformat.read(runs / "notebooks/01_x.ipynb", as_version=4)
    assert outputs(copy, "error") == [""]  # the cell's own KeyboardInterrupt
    kernel = int(outputs(copy, "stream", "stdout")[0].split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def test_bad_arguments_are_said_and_nothing_runs(tmp_path, make_notebook, capsys):
    path = make_notebook(tmp_path / "01_x.ipynb", "print(1)", parameters="RATIO = 0.7\nSEED = 1")
    other = make_notebook(tmp_path / "02_x.ipynb", "print(1)", parameters="DATA = None")
    broken = make_notebook(tmp_path / "03_x.ipynb")
    broken.write_text("{")
    (tmp_path / "file").write_text("")
    unknown = "unknown parameter RATOI; there are DATA, RATIO, SEED"
    for argv, said in (
        (["run", str(path), str(other), "-p", "RATOI", "0.5"], unknown),
        (["run", "no_such"], "no notebook 'no_such'; there are"),
        (["run", str(broken)], "cannot be read as a notebook"),
        (["run", str(path), "--out", str(tmp_path / "file")], "Set IRONLOGIC_RUNS to another folder"),
        (["format", str(broken)], "cannot be read as a notebook"),
        (["evidence", "--preset", "huge", "--out", str(tmp_path)], "unknown preset 'huge'"),
    ):
        assert main(argv) == 2
        answer = capsys.readouterr()
        assert answer.err.startswith("error: ")
        assert said in answer.err
        assert "[1/" not in answer.out
    with pytest.raises(NotebookError, match="unknown parameter RATOI; there are RATIO, SEED"):
        set_parameters(read_notebook(path), {"RATOI": 1})


@pytest.mark.parametrize(
    ("python", "said"),
    [
        (["-S", "-m", "ironlogic"], r"error: \w+ is missing from .*python.*\. Use \.venv/bin/python"),
        (["-c", "import sys; sys.version_info = (3, 10, 1); import ironlogic"], "needs Python 3.11 or newer"),
    ],
)
def test_the_wrong_python_is_told_so(python, said):
    done = subprocess.run([sys.executable, *python], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr


def test_values_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("{}")
    for text, value in (
        ("0.5", 0.5),
        ("None", None),
        ("[1]", [1]),
        ("'x'", "x"),
        ("nano", "nano"),
        ("1 +", "1 +"),
        ("mine.jsonl", str(tmp_path / "mine.jsonl")),
        ("other.jsonl", "other.jsonl"),
    ):
        assert read_value(text) == value


def test_notebooks_are_found_by_number_name_and_path(tmp_path, make_notebook):
    one, two = (make_notebook(tmp_path / f"{name}.ipynb") for name in ("00_one", "01_two"))
    assert find_notebooks(folder=tmp_path) == [one, two]
    assert find_notebooks(["1", "01", "01_two", "01_two.ipynb", str(two)], folder=tmp_path) == [two]
    assert find_notebooks(["01_two", "00"], folder=tmp_path) == [two, one]
    with pytest.raises(NotebookError, match="no notebook '2'; there are 00_one, 01_two"):
        find_notebooks(["2"], folder=tmp_path)
    with pytest.raises(NotebookError, match="no notebooks in"):
        find_notebooks(folder=tmp_path / "none")


def test_format(tmp_path, make_notebook, capsys):
    path = make_notebook(tmp_path / "01_x.ipynb", "x = 1")
    right = path.read_bytes()
    assert main(["format", "--check", str(path)]) == 0
    for wrong in (
        right.replace(b'"execution_count": null', b'"execution_count": 4'),
        right.replace(b"\n", b"\r\n"),  # an editor on Windows
    ):
        path.write_bytes(wrong)
        assert main(["format", "--check", str(path)]) == 1
        assert path.read_bytes() == wrong
        assert "would change: 01_x.ipynb" in capsys.readouterr().out
        assert main(["format", str(path)]) == 0
        assert path.read_bytes() == right
    ruff = [sys.executable, "-m", "ruff", "format", "--check", path]
    assert subprocess.run(ruff, cwd=ROOT, capture_output=True).returncode == 0  # the two agree on what is normal


def test_without_a_command_help_is_printed(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("run", "format", "evidence", "session"))


@pytest.mark.slow
def test_the_runner_loads_no_torch(tmp_path, make_notebook):
    path = make_notebook(tmp_path / "01_x.ipynb", "A")
    code = f"""
import sys
from ironlogic.__main__ import main
assert main(["run", {str(path)!r}, "--out", {str(tmp_path)!r}]) == 0
print("HEAVY", sys.modules.keys() & {{"torch", "transformers", "datasets", "unsloth", "IPython"}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "HEAVY set()"


def test_progress_on_a_terminal_and_in_a_log(monkeypatch):
    terminal, log = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "24")
    for stream in (terminal, log):
        monkeypatch.setattr(sys, "stdout", stream)
        show_progress("[2/9]  3.0 s  x = train(...)", False)
        show_progress("[2/9]  4.0 s  x = 1", True)
    assert terminal.getvalue() == "\r  [2/9]  3.0 s  x = tra\r  [2/9]  4.0 s  x = 1  "
    assert log.getvalue() == "  [2/9]  4.0 s  x = 1\n"


def test_waiting_in_steps_survives_a_missed_message(monkeypatch):
    """What hung with widgets: a wait that passes although the message is there."""
    waits = []

    async def get_msg(channel, timeout):
        waits.append(timeout)
        await asyncio.sleep(0 if len(waits) < 3 else timeout)
        if len(waits) != 3:
            raise Empty
        return "reply"

    monkeypatch.setattr(AsyncZMQSocketChannel, "get_msg", get_msg)
    monkeypatch.setattr(_PatientChannel, "step", 0.05)
    channel = _PatientChannel.__new__(_PatientChannel)
    assert asyncio.run(asyncio.wait_for(channel.get_msg(), 5)) == "reply"
    assert waits == [0.05] * 3
    began = time.monotonic()
    with pytest.raises(Empty):
        asyncio.run(channel.get_msg(0.2))
    assert 0.2 <= time.monotonic() - began < 2


@pytest.mark.slow
def test_the_network_is_closed_in_kernels_and_below(tmp_path, make_notebook, network_attempts):
    code = """
import socket, subprocess, sys, urllib.request
for attempt in (
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: urllib.request.urlopen("http://example.invalid/x", timeout=1),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.2", 53)),
):
    try:
        attempt()
    except OSError as error:
        assert "the tests have closed the network" in str(error)
    else:
        raise AssertionError
below = [sys.executable, "-c", "import socket; socket.gethostbyname('example.org')"]
subprocess.run(below, stderr=subprocess.DEVNULL)
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
socket.create_connection(("localhost", server.getsockname()[1])).close()
""".strip()
    printed(make_notebook(tmp_path / "01_x.ipynb", code))
    assert network_attempts.read_text().split() == ["192.0.2.1", "example.invalid", "192.0.2.2", "example.org"]
    network_attempts.write_text("")  # these were meant
