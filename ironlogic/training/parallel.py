"""Independent trainings side by side, each in a process of its own: the arms of a comparison, the seeds of an arm.

A small model gains next to nothing from a second thread, so without a card every core trains another one. A card
has room for one model: there the jobs run one after the other, in this process.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from ironlogic import IronLogicError
from ironlogic.training.runs import RunError

import psutil
import torch

__all__ = ["run_parallel"]

Job = Callable[..., Any]
Watch = Callable[[str, list[dict[str, Any]]], None]  # a job's name and all its metrics, at every logged step
_GIB_A_PROCESS = 1.5  # libraries and a small model


def run_parallel(
    jobs: Mapping[str, Job],
    *,
    after: Mapping[str, str] | None = None,
    processes: int | None = None,
    watch: Watch | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Calls every job, several at a time; their results by name, in the order of `jobs`.

    A job is a function of a module with its arguments, `functools.partial(train, "nano", rows, run=folder)`, so
    that another process can import it. It is called with the one further argument `watch`, to be handed on to
    `train_sft` and its like, and returns something small: a path or numbers, no model. A job that finds its run
    finished returns at once, so calling this again goes on where it stopped.

    `after`: for a job that needs another's adapter, that other job's name. `processes`: by default one a core, as
    far as the memory goes, and one with a card. `report` gets a line for each job that ended.

    Raises `RunError` when jobs failed, with the name and the error of each, after all others have finished.
    Ctrl-C ends every process; a training goes on from its last checkpoint next time.
    """
    processes = min(processes or _processes_that_fit(), len(jobs))
    if torch.cuda.is_available() or processes <= 1:
        outcomes = _one_by_one(jobs, after or {}, watch)
    else:
        _check_importable(jobs)
        outcomes = _side_by_side(jobs, after or {}, processes, watch)
    results, failures = {}, {}
    for ended, outcome in enumerate(outcomes, 1):
        (results if outcome.error is None else failures)[outcome.name] = outcome.error or outcome.result
        ending = "" if outcome.error is None else ", FAILED"
        report(f"{ended} of {len(jobs)}: {outcome.name}, {outcome.seconds:.0f} s{ending}")
    if failures:
        raise RunError(
            f"{len(failures)} of {len(jobs)} failed ({len(results)} finished and will not be done again):\n"
            + "\n".join(f"{name}: {failures[name]}" for name in jobs if name in failures)
        )
    return {name: results[name] for name in jobs}


@dataclass(frozen=True)
class _Outcome:
    name: str
    seconds: float
    result: Any = None
    error: str | None = None  # its description: what an exception holds may not fit through a pipe


def _processes_that_fit() -> int:
    by_memory = int(psutil.virtual_memory().available / 2**30 / _GIB_A_PROCESS)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cores, by_memory))


def _check_importable(jobs: Mapping[str, Job]) -> None:
    for name, job in jobs.items():
        function = getattr(job, "func", job)
        if function.__module__ == "__main__" or "<" in function.__qualname__:
            raise RunError(
                f"{name}: {function.__qualname__} is defined in a notebook, a script or another function, where no "
                "other process can import it. Put it into a module, or pass processes=1"
            )


def _one_by_one(jobs: Mapping[str, Job], after: Mapping[str, str], watch: Watch | None) -> Iterator[_Outcome]:
    unfinished = dict(jobs)
    while unfinished:
        name = _next_job(unfinished, unfinished, after)
        began = time.perf_counter()
        result, error = _call(jobs[name], watch and partial(watch, name))
        del unfinished[name]
        yield _Outcome(name, time.perf_counter() - began, result, error)


def _side_by_side(
    jobs: Mapping[str, Job], after: Mapping[str, str], processes: int, watch: Watch | None
) -> Iterator[_Outcome]:
    waiting, unfinished = dict(jobs), set(jobs)
    idle, busy = [_Worker(watched=watch is not None) for _ in range(processes)], {}
    try:
        while unfinished:
            while idle and (name := _next_job(waiting, unfinished, after)):
                worker = idle.pop()
                busy[worker.connection] = (worker, name, time.perf_counter())
                with contextlib.suppress(BrokenPipeError):  # of a process that has ended: noticed below
                    worker.connection.send(waiting.pop(name))
            for connection in wait(list(busy)):
                worker, name, began = busy[connection]
                try:
                    kind, *content = connection.recv()
                except (EOFError, ConnectionResetError):  # the latter: it never read its job
                    kind, content = "ended", [None, worker.last_words()]
                    worker = _Worker(watched=watch is not None)
                if kind == "metrics":
                    watch(name, *content)
                    continue
                del busy[connection]
                idle.append(worker)
                unfinished.remove(name)
                yield _Outcome(name, time.perf_counter() - began, *content)
    finally:
        for worker, *_ in busy.values():  # interrupted
            worker.process.kill()
        for worker in [*idle, *(worker for worker, *_ in busy.values())]:
            worker.end()


def _next_job(waiting: Mapping[str, Job], unfinished, after: Mapping[str, str]) -> str | None:
    """The first job whose forerunner, if it has one among these, has ended."""
    return next((name for name in waiting if after.get(name) not in unfinished), None)


def _call(job: Job, watch: Callable | None) -> tuple[Any, str | None]:
    """(result, None), or (None, the error in words; of one that nobody foresaw the whole traceback)."""
    try:
        return job(watch=watch), None
    except IronLogicError as error:
        return None, str(error)
    except Exception:
        return None, traceback.format_exc()


class _Worker:
    """A process that takes jobs through a pipe until it is ended."""

    def __init__(self, *, watched: bool) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, watched))
        with _main_hidden():
            self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def end(self) -> None:
        self.connection.close()  # an idle process returns, and cleans up behind it
        self.process.join(timeout=10)
        self.process.kill()
        self.process.join()

    def last_words(self) -> str:
        self.process.join()
        code = self.process.exitcode
        cause = (
            "; most likely the machine is out of memory: take fewer processes" if code == -signal.SIGKILL else ""
        )
        return f"its process ended early (exit code {code}{cause})"


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Else a new process would run the caller's script once more; jobs are functions of modules."""
    main = vars(sys.modules["__main__"])
    hidden = {name: main.pop(name) for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def _end_with_the_first() -> None:
    """Else a process whose notebook was closed trains on to the end of its job, unseen."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(connection: Connection, watched: bool) -> None:
    """In the other process: ("metrics", lines) as often as they come, then ("ended", result, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends us
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    torch.set_num_threads(1)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # several write over each other
    send_metrics = (lambda lines: connection.send(("metrics", lines))) if watched else None
    while True:
        try:
            job = connection.recv()
        except EOFError:  # the first process is gone
            return
        except Exception:  # nothing here imports the job's function
            connection.send(("ended", None, traceback.format_exc()))
        else:
            connection.send(("ended", *_call(job, send_metrics)))
