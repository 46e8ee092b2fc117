"""Jobs side by side: order, progress, errors by name, processes that die."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

from ironlogic.session import ROOT
from ironlogic.training.parallel import run_parallel
from ironlogic.training.runs import RunError

import psutil
import pytest


def write_after(path, other=None, *, watch=None):
    """A job: needs the file of the job before, reports a step, leaves a file of its own."""
    text = other.read_text() if other else ""
    if watch:
        watch([{"step": 1}])
    path.write_text(text + path.name)
    return path.read_text(), os.getpid()


def fail(message, *, watch=None):
    raise RunError(message)


def die(*, watch=None):
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(*, watch=None):
    watch([{"process": os.getpid()}])
    time.sleep(600)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_job_is_done_in_order_and_a_failure_stops_no_other(tmp_path, processes):
    a, b = tmp_path / "a", tmp_path / "b"
    jobs = {"b": partial(write_after, b, a), "a": partial(write_after, a)}
    failing = {"bad": partial(fail, "no rows"), "bug": partial(write_after, None)}
    if processes > 1:
        failing["dies"] = die
    steps, lines = [], []
    options = {"processes": processes, "report": lines.append}
    with pytest.raises(RunError) as error:
        run_parallel(failing | jobs, after={"b": "a"}, watch=lambda name, lines: steps.append(name), **options)
    parts = ["bad: no rows", "bug: Traceback"] + ["dies: its process ended early (exit code -9"] * (processes > 1)
    assert str(error.value).startswith(f"{len(failing)} of {len(jobs) + len(failing)} failed (2 finished")
    assert [part for part in parts if part not in str(error.value)] == []
    assert b.read_text() == "ab"
    assert sorted(steps) == ["a", "b", "bug"]
    assert sum("FAILED" in line for line in lines) == len(failing)
    if processes == 1:
        results = run_parallel(jobs, **options)
        assert [text for text, _ in results.values()] == ["ab", "a"]
        assert {process for _, process in results.values()} == {os.getpid()}


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_processes_end_with_the_one_that_began_them(end):
    """A notebook that is stopped, closed, or killed leaves nothing behind that trains on."""
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.path[:0] = {[str(ROOT / "tests"), str(ROOT)]!r}
from test_parallel import sleep
from ironlogic.training.parallel import run_parallel

def show(name, lines):
    print(lines[-1]["process"], flush=True)

run_parallel({{"a": sleep, "b": sleep}}, processes=2, watch=show)
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=subprocess.DEVNULL, text=True)
    others = [int(first.stdout.readline()) for _ in range(2)]
    first.send_signal(end)
    first.wait()
    for _ in range(100):
        if not any(map(psutil.pid_exists, others)):
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {others}")


def test_what_no_other_process_can_import_is_refused():
    with pytest.raises(RunError, match="mine: .*lambda.* no other process can import"):
        run_parallel({"mine": lambda watch: None, "other": die}, processes=2)
