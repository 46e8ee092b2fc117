"""The model card: what the model is, how it was trained, what was measured, what it may not be used for.

Every figure comes from the run folder, from export.json or from the findings beside a report of notebook 05; where
nothing was measured, the card says that. Its words are in `card.md`, a Jinja template. Does not know the licence of
a base: its own card does.
"""

import json
from pathlib import Path
from typing import Any

from ironlogic.export.write import read_notes
from ironlogic.training.runs import Run, RunError, open_run, replacing

import jinja2
from huggingface_hub import ModelCardData

__all__ = ["model_card", "write_model_card"]


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
    burdened = any(stage.record.get("burden") for stage in stages)
    head = ModelCardData(
        license="other",
        license_name="see-the-section-licence",
        library_name="transformers",
        base_model=base if "/" in base else None,  # the hub knows owner/name only
        tags=["iron-logic", "lora", *(["fragmented-training"] if burdened else [])],
    )
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.from_string(template).render(
        head=head.to_yaml(),
        base=base,
        run=run,
        stages=stages,
        losses={stage.folder: [line["loss"] for line in stage.metrics if "loss" in line] for stage in stages},
        notes=read_notes(Path(exports)) if exports else {},
        **(_findings(stages, Path(report).absolute()) if report else {}),
    )


def write_model_card(run: Run | str | Path, folder: str | Path, **more: Any) -> Path:
    """README.md in that folder, where Hugging Face looks for it; `more` as in `model_card`."""
    path = Path(folder) / "README.md"
    with replacing(path) as part:
        part.write_text(model_card(run, **more), encoding="utf-8")
    return path


def _stages(run: Run) -> list[Run]:
    """The run and those whose adapter it went on with, the first of them in front."""
    before = Path(run.record["model"])
    if before.name == "adapter" and (before.parent / "run.json").is_file():
        return [*_stages(open_run(before.parent.absolute())), run]
    return [run]


def _findings(stages: list[Run], report: Path) -> dict[str, Any]:
    beside = report.with_suffix(".json")
    if not beside.is_file():
        raise RunError(f"{beside}: no findings here; notebook 05 writes them beside its report.html")
    try:
        findings = json.loads(beside.read_text(encoding="utf-8"))["findings"]
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{beside} is damaged ({error}); make the report again") from error
    own = [stage.folder.name for stage in stages if stage.folder.absolute().parent == beside.parent]
    return {"findings": findings, "study": beside.parent.name, "own": own}
