"""The card script runs from end to end on tiny models without a card, and goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu" / "card.py"


def card(out, *arguments):
    command = [sys.executable, SCRIPT, "--out", out, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(out):
    text = (out / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


@pytest.mark.slow
def test_parts_run_in_processes_of_their_own_and_are_not_run_twice(tmp_path):
    only = ["a 01", "d qwen3-30b-a3b, ours, 31.4"]
    card(tmp_path, "--tiny", "--jobs", "1", "--only", *only)
    lines = results(tmp_path)
    assert [line.get("failed") for line in lines] == [None] * len(only), lines
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"part": "cut whi')
    card(tmp_path, "--tiny", "--only", *only)
    assert results(tmp_path) == lines
    table = card(tmp_path, "--table")
    assert table.count("passed") == len(only)
    assert "| d gemma-3-27b, ours, 31.4 GiB | not run |" in table


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b qwen3-vl-4b, layer reading", "e qwen3-smvl, stage 1"])
def test_other_kinds_of_parts_run(tmp_path, tmp_runs, monkeypatch, name):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from card import all_parts, run_part
    from weights import build

    (part,) = (part for part in all_parts(4096) if part.name == name)
    build(part.system, tmp_path / "weights", tiny=True)
    result = run_part(part, tmp_path / "weights", tiny=True)
    assert "failed" not in result, result


@pytest.mark.gpu
@pytest.mark.slow
def test_qwen3_vl_takes_no_more_than_the_seeds_script(tmp_path):
    """At its true shape; the larger systems are measured by hand, tests/gpu/README.md tells when."""
    card(tmp_path, "--length", "2048", "--only", "b qwen3-vl-4b")
    ours, seed, _ = results(tmp_path)
    assert ours["reserved_gib"] <= 1.05 * seed["reserved_gib"]
