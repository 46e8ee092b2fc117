"""Train a run folder: `python -m ironlogic.training FOLDER`, or in several processes
`torchrun --nproc_per_node 2 -m ironlogic.training FOLDER`."""

import argparse
from pathlib import Path
from typing import Any

from ironlogic import IronLogicError
from ironlogic.training.prepared import train_prepared
from ironlogic.training.runs import PROCESS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ironlogic.training", description=train_prepared.__doc__)
    parser.add_argument(
        "folder", help="a folder written by train_sft or prepare_sft, or its name in the results folder"
    )
    folder = parser.parse_args().folder
    if Path(folder).is_dir():
        folder = Path(folder).absolute()

    def watch(lines: list[dict[str, Any]]) -> None:
        print("step {step} of {steps}: loss {loss:.4f}, {seconds:.0f} s".format(**lines[-1]), flush=True)

    try:
        run = train_prepared(folder, watch=watch if PROCESS == 0 else None)
    except IronLogicError as error:
        raise SystemExit(str(error)) from error
    if PROCESS == 0:
        print(f"finished: {run.folder}")


if __name__ == "__main__":
    main()
