"""`python -m ironlogic`: run the notebooks headless, bring them into their normal form, look at the machine.

Imports no torch: the notebooks' kernels do that, each in a process of its own.
"""

import argparse
import ast
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from ironlogic import IronLogicError, session
except ModuleNotFoundError as error:  # the wrong one of two Pythons, most often
    sys.exit(f"error: {error.name} is missing from {sys.executable}. Use .venv/bin/python as README.md shows")

__all__ = ["build_parser", "main"]

OUT = "results go there (else IRONLOGIC_RUNS, else runs/)"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ironlogic", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    run = commands.add_parser("run", help="execute notebooks headless; executed copies go to runs/notebooks/")
    run.add_argument("notebooks", nargs="*", metavar="notebook", help="02, a name or a path; none: all of them")
    run.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a name of the cell tagged `parameters`; an existing file is found from here",
    )
    run.add_argument("--out", metavar="DIR", help=OUT)
    run.set_defaults(work=run_notebooks)

    form = commands.add_parser("format", help="strip outputs, refresh the set-up cell, make ids stable")
    form.add_argument("notebooks", nargs="*", metavar="notebook")
    form.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something would change")
    form.set_defaults(work=format_notebooks)

    table = commands.add_parser("evidence", help="every claim of the seeds against its control, as a page of HTML")
    table.add_argument("--preset", default="nano")
    table.add_argument("--data", default="", help="your conversations (none: the preset's own)")
    table.add_argument("--items", default="", help="your items with checkable answers, JSONL")
    table.add_argument("--rows", type=int, default=0, help="conversations an arm is trained on, at most")
    table.add_argument(
        "--seeds", type=int, default=0, help="trainings an arm; of these three, none is the preset's number"
    )
    table.add_argument("--questions", type=int, default=0, help="held-out problems that every model is asked")
    table.add_argument("--short", action="store_true", help="base, SFT and FT alone, at the preset's learning rate")
    table.add_argument(
        "--arms", nargs="+", default=[], metavar="ARM", help='--short with these beside them: "FT then SFT", ...'
    )
    table.add_argument("--out", metavar="DIR", help=OUT)
    table.set_defaults(work=gather_evidence)

    look = commands.add_parser("session", help="what the first cell of a notebook sees; installs what is missing")
    look.add_argument("--all", action="store_true", help="install Unsloth without a card too")
    look.set_defaults(work=look_around)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: all went well, 1: a notebook failed or is not in normal form, 2: bad arguments, 130: Ctrl-C."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return options.work(options)
    except IronLogicError as error:
        print(f"error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("nbclient", "nbformat", "jupyter_client", "traitlets"):
            raise
        print(f"error: {error.name} is missing. Run: pip install -r requirements.txt", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 2


def look_around(options: argparse.Namespace) -> int:
    session.start(everything=options.all)
    return 0


def results_folder(options: argparse.Namespace) -> Path:
    environ = {**os.environ, **({"IRONLOGIC_RUNS": options.out} if options.out else {})}
    return session.results_folder(session.see_place(environ), environ=environ)


# -- format


def format_notebooks(options: argparse.Namespace) -> int:
    from ironlogic import notebooks

    texts = {path: notebooks.normal_form(path) for path in notebooks.find_notebooks(options.notebooks)}
    changed = [path for path, text in texts.items() if path.read_bytes() != text.encode()]
    for path in changed:
        print(f"{'would change' if options.check else 'changed'}: {path.name}")
        if not options.check:
            notebooks.save_notebook(texts[path], path)
    print(f"{len(texts)} notebooks, {len(changed)} {'to change' if options.check else 'changed'}")
    return 1 if changed and options.check else 0


# -- run


def run_notebooks(options: argparse.Namespace) -> int:
    from ironlogic.notebooks import find_notebooks

    paths = find_notebooks(options.notebooks)
    chosen = share_parameters(paths, {name: read_value(value) for name, value in options.parameter})
    runs = results_folder(options)
    print(f"{len(paths)} notebooks · results in {runs}", flush=True)
    rows = [(path.stem, *run_notebook(path, chosen[path], runs)) for path in paths]
    print(f"\n{'notebook':<40}{'result':<10}minutes")
    for name, good, seconds in rows:
        print(f"{name:<40}{'passed' if good else 'FAILED':<10}{seconds / 60:7.1f}")
    print(f"executed copies: {runs / 'notebooks'}")
    return 0 if all(good for _, good, _ in rows) else 1


def read_value(text: str) -> Any:
    """A Python literal, else the text. A path that exists from here gets its whole path: kernels run elsewhere."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return str(Path(text).resolve()) if Path(text).exists() else text


def share_parameters(paths: Sequence[Path], values: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """For each notebook the values it knows. Raises NotebookError on a name that none of them knows."""
    from ironlogic.notebooks import NotebookError, read_notebook, read_parameters

    known = {path: read_parameters(read_notebook(path)) for path in paths}
    names = sorted(set().union(*known.values()))
    if unknown := [name for name in values if name not in names]:
        raise NotebookError(f"unknown parameter {', '.join(unknown)}; there are {', '.join(names) or 'none'}")
    return {path: {name: value for name, value in values.items() if name in known[path]} for path in paths}


def run_notebook(path: Path, parameters: Mapping[str, Any], runs: Path) -> tuple[bool, float]:
    """Execute one notebook and save its copy, whole or as far as it came. Returns (passed, seconds)."""
    from ironlogic.notebooks import NotebookFailure, execute, read_notebook, save_notebook, set_parameters

    import nbformat

    began = time.monotonic()
    print(f"\n{path.stem}", flush=True)
    notebook = read_notebook(path)
    set_parameters(notebook, parameters)
    failure = None
    try:
        execute(notebook, path, env={"IRONLOGIC_RUNS": str(runs)}, report=show_progress)
    except NotebookFailure as error:
        failure = error
    finally:
        if sys.stdout.isatty():
            print()  # below the line that is written over
        save_notebook(nbformat.writes(notebook) + "\n", runs / "notebooks" / path.name)
    if failure is not None:
        print(f"FAILED {failure}", flush=True)
    return failure is None, time.monotonic() - began


def show_progress(text: str, done: bool) -> None:
    """One line that is written over on a terminal, one line per finished cell in a log."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{f'  {text}'[:width]:<{width}}", end="", flush=True)
    elif done:
        print(f"  {text}"[:110], flush=True)


# -- evidence


def gather_evidence(options: argparse.Namespace) -> int:
    began, runs = time.monotonic(), results_folder(options)
    from ironlogic.presets import find_preset

    preset = find_preset(options.preset)  # before what takes long to import
    from ironlogic.evidence import compare_recipes, describe, judge_claims, open_study, run_full_study, run_study
    from ironlogic.evidence.items import load_items
    from ironlogic.evidence.study import shown_base
    from ironlogic.show.report import write_report

    items, rejected = load_items(options.items) if options.items else (None, [])
    print(*rejected, sep="\n", end="\n" if rejected else "")
    asked = {"rows": options.rows, "seeds": options.seeds, "questions": options.questions}
    study = open_study(preset, runs, data=options.data, items=items, **asked)
    short = options.short or options.arms
    recipes = study.twins() | {arm: study.arm(arm) for arm in options.arms} if short else study.full()
    print(f"{len(recipes)} arms in {study.folder}", flush=True)
    if short:
        arms, sizes = run_study(study, recipes, report=partial(print, flush=True)) | shown_base(study), ()
    else:
        study, arms, sizes = run_full_study(study, report=partial(print, flush=True))
    findings = judge_claims(arms, study.items, sizes=sizes)
    for finding in findings:
        print(f"{finding.verdict:20}{finding.claim.said}: {finding.claim.measure} {finding.effect or finding.note}")
    page = write_report(
        study.folder / "report.html",
        findings,
        title=f"The claims on {preset.name}",
        lines=study.summary(),
        recipes=compare_recipes(arms, study.items),
        sweep=study.sweep_points(),
        measures=describe(arms, study.items),
    )
    print(f"{page} · {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
