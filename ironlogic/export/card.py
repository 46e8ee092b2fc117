"""The model card: what the model is, how it was trained, what was measured, what it may not be used for.

Every figure comes from the run folder, from export.json or from the findings beside a report of notebook 05; where
nothing was measured, the card says that. Does not know the licence of a base: its own card does.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ironlogic.training.runs import Run, RunError, open_run

from huggingface_hub import ModelCardData

__all__ = ["model_card", "write_model_card"]

_CITATION = """\
@misc{aifeifei_fragmented_training,
  author = {aifeifei798},
  title = {Fragmented Training},
  publisher = {Hugging Face},
  doi = {10.57967/hf/7592},
  url = {https://huggingface.co/aifeifei798/Fragmented-Training}
}"""
_LIMITS = """\
- It can be wrong, biased or offensive, and sound sure of it. Check what it says before you rely on it.
- Training changed how it reads, not how it was aligned: refusals and other safety behaviour are those of the base
  at best, and were not measured. Leave the base's safety mechanisms in.
- Not for decisions that hurt when wrong (medicine, law, money, automated decisions about people) without validation
  and a person who answers for them; not for anything unlawful, and not for content that harms people.
- What you type and what comes out is yours to protect: no warranty is given, for privacy or for anything else.
- Word order carries meaning. A model trained on scrambled prompts guesses where order decides: test that on your
  own questions first."""
_LICENCE = """\
The adapter's own weights are its trainer's to license (the seeds chose Apache-2.0). Merged weights contain the
base, so the base's licence and terms of use hold for them too (`{base}`: see its card), and for a vision-language
model those of the tower. The rows it was trained on have a licence of their own. The seeds of this method publish
under an agreement of lawful use for research, learning and development; keep to it when you pass a model on."""


def model_card(
    run: Run | str | Path,
    *,
    exports: str | Path | None = None,
    report: str | Path | None = None,
) -> str:
    """The card of a run's model as Markdown with Hugging Face's front matter.

    `exports`: a folder with an export.json; `report`: a page of `report.write_report`, with its findings beside it
    as JSON. They speak of the study's trainings; the card says so, and which of these the run is.
    """
    run = run if isinstance(run, Run) else open_run(run)
    stages = _stages(run)
    base = stages[0].record["model"]
    base = Path(base).name if Path(base).is_absolute() else base
    training = []
    for i, stage in enumerate(stages, 1):
        heading = [f"### {i}. {stage.folder.name}\n"] if len(stages) > 1 else []
        training += [*heading, _table(("", ""), _training_rows(base, stage))]
    parts = [
        _front_matter(base, stages),
        f"# {run.folder.name}\n",
        f"A low-rank adapter on `{base}`, trained with Iron Logic {run.record['ironlogic']}: "
        f"{'; then '.join(_how(stage.record) for stage in stages)}.\n",
        "## Training\n",
        *training,
        "## What was measured\n",
        *_evidence(stages, Path(report) if report else None),
        "## Files\n",
        *_files(Path(exports) if exports else None),
        f"## Limits and safe use\n\n{_LIMITS}\n",
        f"## Licence\n\n{_LICENCE.format(base=base)}\n",
        f"## Citation\n\nFragmented Training is the method of aifeifei798:\n\n```bibtex\n{_CITATION}\n```\n",
    ]
    return "\n".join(parts)


def write_model_card(run: Run | str | Path, folder: str | Path, **more: Any) -> Path:
    """README.md in that folder, where Hugging Face looks for it; `more` as in `model_card`."""
    path = Path(folder) / "README.md"
    beside = path.with_suffix(".part")
    beside.write_text(model_card(run, **more), encoding="utf-8")
    return beside.replace(path)


def _stages(run: Run) -> list[Run]:
    """The run and those whose adapter it went on with, the first of them in front."""
    before = Path(run.record["model"])
    if before.name == "adapter" and (before.parent / "run.json").is_file():
        return [*_stages(open_run(before.parent.absolute())), run]
    return [run]


def _front_matter(base: str, stages: Sequence[Run]) -> str:
    burdened = any(stage.record.get("burden") for stage in stages)
    data = ModelCardData(
        license="other",
        license_name="see-the-section-licence",
        library_name="transformers",
        base_model=base if "/" in base else None,  # the hub knows owner/name only
        tags=["iron-logic", "lora", *(["fragmented-training"] if burdened else [])],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _how(record: dict[str, Any]) -> str:
    if burden := record.get("burden"):
        return (
            f"Fragmented Training, {burden['ratio']:.0%} of the {burden['unit']}s of the user's turns put out of "
            "order and the answers left as they are"
        )
    names = {"grpo": "reinforcement learning with verifiable rewards (GRPO)", "sft": "supervised fine-tuning"}
    return names.get(record["stage"], record["stage"])


def _training_rows(base: str, run: Run) -> list[tuple[str, str]]:
    record, settings = run.record, run.record["settings"]
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    lora = settings.get("lora") or {}
    rows = [
        ("base", base),
        ("stage", record["stage"]),
        ("rows", f"{record['rows']:,} (sha256 {record['data_sha256'][:16]}…)"),
        ("optimizer steps", f"{record.get('steps', '?')}"),
        ("learning rate, seed", f"{settings['learning_rate']:g}, {settings['seed']}"),
        (
            "adapter",
            f"rank {lora.get('rank')}, alpha {lora.get('alpha')}, {record['trained_parameters']:,} parameters",
        ),
        ("weights in 4 bit while training", f"{record['four_bit_share']:.0%} of the bytes"),
        ("time, device", f"{record.get('seconds', 0):,.0f} s, {record['device']}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v)),
    ]
    if losses:
        rows.insert(4, ("training loss, first and last logged", f"{losses[0]:.3f}, {losses[-1]:.3f} nats a token"))
    return rows


def _evidence(stages: Sequence[Run], report: Path | None) -> list[str]:
    if report is None:
        return ["Nothing was measured against a control for this card: believe no claim about it.\n"]
    beside = report.absolute().with_suffix(".json")
    if not beside.is_file():
        raise RunError(f"{beside}: no findings here; notebook 05 writes them beside its report.html")
    rows, study = [], beside.parent
    findings = json.loads(beside.read_text(encoding="utf-8"))
    for f in findings:
        claim, effect = f["claim"], f["effect"]
        said = "{mean:+.3g} [{low:+.3g}, {high:+.3g}]".format(**effect) if effect else f["note"] or "–"
        said = f"at least {said}" if f["at_least"] else said
        measured = f"{claim['measure']}: {claim['ours']} against {claim['control']}"
        rows.append((claim["said"], measured, said, f"{f['repeats']} x {f['items']}", f["verdict"]))
    own = [stage.folder.name for stage in stages if stage.folder.absolute().parent == study]
    about = f"This model went through {own[-1]}, one of them" if own else "This model is none of them"
    head = ("claim", "measured", "effect, 95 % interval", "trainings x items", "verdict")
    text = f"Each claim against its control, over the trainings of the study `{study.name}`. {about}.\n"
    return [text, _table(head, rows)]


def _files(folder: Path | None) -> list[str]:
    path = folder / "export.json" if folder else None
    if path is None or not path.is_file():
        return ["The adapter alone (PEFT, safetensors).\n"]
    rows = []
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        for c in entry["comparisons"]:
            rows.append(
                (
                    f"`{name}`",
                    f"{c['bytes'] / 2**20:,.1f}",
                    c["reader"],
                    f"{c['logit_difference']:.2g}",
                    f"{c['mean_kl']:.1e} (allowed {c['tolerance']:g})",
                    f"{c['top1']:.1%}",
                )
            )
    head = ("file", "MiB", "read by", "largest logit difference", "mean KL, nats", "same likeliest token")
    text = "Each file was read again and its next-token distributions compared with those of its source:\n"
    return [text, _table(head, rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:], ""])
