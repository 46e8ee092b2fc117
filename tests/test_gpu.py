"""The script that measures on a card: it runs from end to end on tiny models, and on a card with true shapes."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu" / "measure.py"


def measure(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def cells(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.mark.slow
def test_the_script_itself_runs_without_a_card(tmp_path):
    out = tmp_path / "table.md"
    measure("qwen3-30b-a3b", "--tiny", "--cap", "0", "--length", "128", "--steps", "3", "--out", out)
    rows = cells(out)
    assert [row[2] for row in rows] == ["our stage", "the seed's script", "lens, layers a second"]
    assert all(float(row[5]) > 0 for row in rows), rows


@pytest.mark.slow
def test_splices_are_measured_too(tmp_path):
    out = tmp_path / "table.md"
    measure("vqwen3-4b", "qwen3-smvl", "--tiny", "--cap", "0", "--length", "128", "--steps", "3", "--out", out)
    assert [row[0] for row in cells(out)] == ["vqwen3-4b", "qwen3-smvl"]
    assert all(float(row[5]) > 0 for row in cells(out)), cells(out)


@pytest.mark.gpu
@pytest.mark.slow
def test_peaks_on_a_card_are_what_was_planned(tmp_path):
    """Qwen3-VL-4B at its true shape; the larger systems are measured by hand, the table tells when."""
    out = tmp_path / "table.md"
    measure("qwen3-vl-4b", "--cap", "23.5", "--length", "2048", "--steps", "6", "--out", out)
    ours, seed, _ = cells(out)
    assert float(ours[4]) + 1.0 == pytest.approx(float(ours[3]), rel=0.15)  # torch does not count the CUDA context
    assert float(ours[4]) <= 1.05 * float(seed[4])
