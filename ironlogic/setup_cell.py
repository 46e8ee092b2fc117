"""Source of the first code cell of every notebook, the same bytes in all of them.

The cell finds the repository wherever a notebook may have been opened (in it, above it, as Kaggle input, as a zip
uploaded beside the notebook, or by git), then hands over to `session.start`. It is kept as text, because running
it installs packages; `python -m ironlogic format` copies it into the notebooks.
"""

__all__ = ["SETUP_CELL"]

SETUP_CELL = """\
# @title Setup: run this first (safe to run again)
import os
import subprocess
import sys
import zipfile
from pathlib import Path

here, mark = Path.cwd(), "ironlogic/session.py"
kaggle = Path(os.environ.get("IRONLOGIC_INPUT", "/kaggle/input"))  # uploads lie unpacked there
levels = [(here, 1), (here, 2), (kaggle, 1), (kaggle, 2), (kaggle, 3), (kaggle, 4)]
below = (spot for top, deep in levels for spot in top.glob("*/" * deep))
near = [spot for spot in (here, *here.parents) if os.path.isfile(spot / mark)]
root = near[0] if near else next((spot for spot in below if os.path.isfile(spot / mark)), None)
for archive in [] if root else filter(zipfile.is_zipfile, here.glob("*.zip")):
    packed, folder = zipfile.ZipFile(archive), here.resolve() / archive.stem
    for name in [name for name in packed.namelist() if Path(name).match(mark)][:1]:
        inside = [(folder / name).resolve().is_relative_to(folder) for name in packed.namelist()]
        assert all(inside), f"{archive} would write outside {folder}"
        packed.extractall(folder)
        root = (folder / name).parents[1]
if root is None and os.environ.get("IRONLOGIC_REPO"):
    root, ref = here / "ironlogic-clone", os.environ.get("IRONLOGIC_REF")
    branch = ["--branch", ref] if ref else []
    subprocess.run(["git", "clone", "-q", *branch, "--", os.environ["IRONLOGIC_REPO"], str(root)])
assert os.path.isfile(f"{root}/{mark}"), f"no Iron Logic near {here}: add its zip, or set IRONLOGIC_REPO"
sys.path.insert(0, str(root.resolve()))
from ironlogic import session

S = session.start()
""".strip()
