"""The card says what the run folder, the exports and the findings say, and nothing about what was not measured."""

import json
from dataclasses import asdict

from ironlogic.evidence.claims import CLAIMS, Finding
from ironlogic.evidence.statistics import Interval
from ironlogic.export import ExportError, write_model_card
from ironlogic.export.card import model_card
from ironlogic.training.runs import Run, RunError

import pytest
import yaml

RECORD = {
    "ironlogic": "0.1",
    "stage": "ft",
    "model": "google/gemma-3-12b-it",
    "four_bit_share": 0.81,
    "rows": 248,
    "data_sha256": "ab" * 32,
    "settings": {"learning_rate": 2e-4, "seed": 3407, "lora": {"rank": 8, "alpha": 16}},
    "burden": {"ratio": 0.7, "unit": "word"},
    "device": "cpu",
    "versions": {"torch": "2.13.0", "unsloth": None},
    "finished": True,
    "trained_parameters": 34_000,
    "steps": 93,
    "seconds": 12.3,
}
COMPARISON = {
    "artefact": "m-q8_0.gguf", "reader": "llama.cpp", "kind": "q8_0", "bytes": 2**20, "positions": 9,
    "logit_difference": 0.31, "mean_kl": 2.7e-4, "top1": 0.99, "tolerance": 0.01,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(RECORD))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 93, "loss": 0.75}\n')
    return Run(folder, RECORD)


def test_training_comes_from_the_run(run, tmp_path):
    card = write_model_card(run.folder, tmp_path).read_text()
    assert card == model_card(run)
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["base_model"]) == ("other", "google/gemma-3-12b-it")
    assert "fragmented-training" in head["tags"]
    for fact in (
        "on `google/gemma-3-12b-it`, trained with Iron Logic 0.1: Fragmented Training, 70% of the words of",
        "| training loss, first and last logged | 2.500, 0.750 nats a token |",
        "248 (sha256 abababababababab…)",
        "rank 8, alpha 16, 34,000 parameters",
        "| 81% of the bytes |",
        "| 12 s, cpu |",
        "| versions | torch 2.13.0 |",  # unsloth was not there
        "Nothing was measured against a control",
        "## Limits and safe use",
        "## Licence",
        "10.57967/hf/7592",
    ):
        assert fact in card
    with pytest.raises(RunError, match="no run here"):
        model_card(tmp_path)


def test_what_was_measured_stands_with_interval_and_verdict(run, tmp_path):
    notes = tmp_path / "export.json"
    notes.write_text(json.dumps({"m-q8_0.gguf": {"run": "my-run", "base": "nano", "comparisons": [COMPARISON]}}))
    claim = CLAIMS[0]
    findings = [
        Finding(claim, "fails", Interval(-0.02, -0.05, 0.01), repeats=5, items=170),
        Finding(CLAIMS[1], "can't be told here", note="no answers that can be checked | here"),
        Finding(CLAIMS[2], "holds", Interval(1.5, 1, 2), repeats=5, items=170, at_least=True),
    ]
    study = tmp_path / "02_study"
    study.mkdir()
    page = study / "report.html"
    page.with_suffix(".json").write_text(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    card = model_card(run, exports=tmp_path, report=page)
    assert f"| {claim.said} | {claim.measure}: FT against SFT | -0.02 [-0.05, +0.01] | 5 x 170 | fails |" in card
    assert r"no answers that can be checked \| here" in card, "a bar would break the table"
    assert "| at least +1.5 [+1, +2] |" in card
    assert "study `02_study`. This model is none of them." in card
    assert "| `m-q8_0.gguf` | 1.0 | llama.cpp | 0.31 | 2.7e-04 (allowed 0.01) | 99.0% |" in card
    assert "believe no claim" not in card
    own = Run(study / "FT-1", RECORD)
    assert "This model went through FT-1, one of them." in model_card(own, report=page)
    with pytest.raises(RunError, match="no findings here; notebook 05 writes them"):
        model_card(run, report=tmp_path / "report.html")
    notes.write_text("{")
    page.with_suffix(".json").write_text("[")
    for where in ({"exports": tmp_path}, {"report": page}):
        with pytest.raises((RunError, ExportError), match="is damaged"):
            model_card(run, **where)


def test_a_chain_of_stages_is_told_from_its_base_on_and_no_folder_is_named(run, tmp_path):
    record = RECORD | {"model": str(run.folder / "adapter"), "burden": None, "stage": "sft", "steps": 7}
    card = model_card(Run(tmp_path / "polished", record))
    assert "base_model: google/gemma-3-12b-it" in card
    assert "- fragmented-training" in card
    assert "answers left as they are; then supervised fine-tuning." in card
    assert card.index("### 1. my-run") < card.index("### 2. polished")
    assert "| optimizer steps | 93 |" in card
    assert "| optimizer steps | 7 |" in card
    alone = Run(run.folder, RECORD | {"model": str(run.folder / "base"), "burden": None, "stage": "grpo"})
    card = model_card(alone)
    assert str(run.folder.parent) not in card
    assert "on `base`, trained with Iron Logic 0.1: reinforcement learning with verifiable rewards" in card
    assert "base_model" not in card, "the hub would look for it"
