"""Iron Logic: a single-GPU notebook workbench for Fragmented Training, with the controls.

Nothing heavy is imported here: `session.start` has to run before torch, transformers or Unsloth are loaded.
"""

import sys

__version__ = "0.1.0"

# An older Python installs every package and fails somewhere inside: it is told at the door.
if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(
        "Iron Logic needs Python 3.11 or newer, this is {}.{} ({}). Make the environment with a newer one, "
        "for instance: python3.12 -m venv .venv".format(*sys.version_info[:2], sys.executable)
    )
