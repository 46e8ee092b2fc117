"""Iron Logic: a single-GPU notebook workbench for Fragmented Training, with the controls.

Nothing heavy is imported here: `session.start` has to run before torch, transformers or Unsloth are loaded. The
names below are loaded when they are first used.
"""

import importlib
import sys
from collections.abc import Mapping

__version__ = "0.2.0.dev0"

# An older Python installs every package and fails somewhere inside: it is told at the door.
if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(
        "Iron Logic needs Python 3.11 or newer, this is {}.{} ({}). Make the environment with a newer one, "
        "for instance: python3.12 -m venv .venv".format(*sys.version_info[:2], sys.executable)
    )


class IronLogicError(Exception):
    """The base of every error that this package raises itself: what is wrong, where, and what to do."""


def lazy(package: str, names: Mapping[str, str]) -> tuple:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names are loaded when first used (PEP 562).

    `names`: submodule -> the names that it gives, separated by blanks.
    """
    module_of = {name: f"{package}.{module}" for module, given in names.items() for name in given.split()}

    def getattr_(name: str):
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    return getattr_, lambda: sorted(module_of), sorted(module_of)


__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "burden": "Burden apply_burden",
        "data.chats": "load_chats make_chats",
        "data.problems": "make_tasks",
        "presets": "find_preset",
        "memory": "plan_memory",
        "models": "load_model",
        "training.runs": "open_run",
        "training.sft": "train_sft",
        "training.grpo": "train_grpo",
        "evidence.twins": "train_twins",
        "evidence.claims": "judge_claims",
        "vision.splice": "splice",
        "vision.check": "check_splice",
        "vision.train": "train_projector train_instruct",
        "lens.read": "read_layers",
        "lens.compare": "compare_layers",
        "export.write": "merge_adapter export_gguf check_export",
    },
)
