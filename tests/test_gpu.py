"""The card script runs from end to end on tiny models without a card, and goes on where it stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu" / "card.py"


def card(out, *arguments, **environ):
    command = [sys.executable, SCRIPT, "--out", out, *arguments]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_kind_of_part_runs_and_is_not_run_twice(tmp_path):
    only = ["a 01", "b qwen3-vl-4b, layer", "d qwen3-30b-a3b, ours, 31.4", "e qwen3-smvl, stage 1"]
    card(tmp_path, "--tiny", "--jobs", "1", "--only", *only, IRONLOGIC_BACKEND="transformers")  # imports faster
    lines = results(tmp_path)
    assert len(lines) == len(only)
    assert [line.get("failed") for line in lines] == [None] * len(only), lines
    card(tmp_path, "--tiny", "--only", *only)
    assert results(tmp_path) == lines
    table = card(tmp_path, "--table")
    assert table.count("passed") == len(only)
    assert "| d gemma-3-27b, ours, 31.4 GiB | not run |" in table


@pytest.mark.gpu
@pytest.mark.slow
def test_qwen3_vl_takes_no_more_than_the_seeds_script(tmp_path):
    """At its true shape; the larger systems are measured by hand, tests/gpu/README.md tells when."""
    card(tmp_path, "--length", "2048", "--only", "b qwen3-vl-4b")
    ours, seed, _ = results(tmp_path)
    assert ours["reserved_gib"] <= 1.05 * seed["reserved_gib"]
