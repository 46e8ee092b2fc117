"""What must not change when the house is rebuilt, as a JSON file of facts: `python tests/unchanged.py FILE`.

Run before and after a change on the same machine; `--compare BEFORE AFTER` prints what differs. The facts are bytes
(burdened rows, adapters, merged and GGUF files) and readings (layers, splice, claims) of the shipped models.
Names that moved are looked for in their new place first, so that the script runs on both sides of a move.
"""

import argparse
import hashlib
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(IRONLOGIC_BACKEND="transformers", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
ROOT = Path(os.environ.get("IRONLOGIC_ROOT", Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(ROOT))
SEED = 3407


def find(name: str, *modules: str):
    """`name` from the first of these modules of the package that has it."""
    for module in modules:
        try:
            return getattr(importlib.import_module(f"ironlogic.{module}"), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise SystemExit(f"{name}: in none of {', '.join(modules)}")


def sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def conversations(count: int) -> list:
    make_tasks = find("make_tasks", "data.problems", "tasks")
    task_chat = find("task_chat", "data.problems", "tasks")
    return [task_chat(task) for task in make_tasks(count, seed=SEED)]


def train(folder: Path, *, stop_at: int = 0):
    """FT on nano, 20 steps; `stop_at`: interrupted there once, then gone on with."""
    from dataclasses import replace

    Burden = find("Burden", "burden")
    load_model = find("load_model", "models")
    preset = find("PRESETS", "presets")["nano"]
    train_sft = find("train_sft", "training.sft", "train")
    make_chats = find_or_none("make_chats", "data.chats")
    rows = conversations(320)
    rows = make_chats(rows) if make_chats else rows
    settings = replace(preset.train, save_steps=5, log_steps=1)

    def watch(lines):
        if stop_at and lines[-1]["step"] == stop_at:
            raise KeyboardInterrupt

    options = {"run": folder, "burden": Burden(ratio=0.7)}
    try:
        return train_sft(load_model("nano", max_length=256), rows, settings, **options, watch=watch)
    except KeyboardInterrupt:
        return train_sft(load_model("nano", max_length=256), rows, settings, **options)


def find_or_none(name: str, module: str):
    try:
        return getattr(importlib.import_module(f"ironlogic.{module}"), name, None)
    except ModuleNotFoundError:
        return None


def adapter_bytes(run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


# --- the facts --------------------------------------------------------------------------------------------------
def burden(folder: Path) -> dict:
    """1,000 texts in every unit: problems, Chinese, code, links."""
    apply_burden = find("apply_burden", "burden")
    tokenizer = find("load_model", "models")("nano", four_bit=False).tokenizer
    extra = (
        "请用中文解释为什么天空是蓝色的。",
        "see `a b c` at https://x.org/a b\n\n  and $x + y$ too. Then go! Why?",
    )
    texts = [f"{chat[0]['content']} {extra[i % 2]}" for i, chat in enumerate(conversations(1000))]
    facts = {}
    for unit in ("word", "char", "token", "sentence", "seed"):
        options = {"tokenizer": tokenizer} if unit == "token" else {}
        moved = (
            apply_burden(text, ratio=0.7, unit=unit, seed=SEED, key=(0, row, 0), **options)
            for row, text in enumerate(texts)
        )
        facts[unit] = sha256(*(text.encode() for text in moved))
    return facts


def adapter(folder: Path) -> dict:
    whole, resumed = train(folder / "whole"), train(folder / "resumed", stop_at=12)
    return {"whole": sha256(adapter_bytes(whole)), "resumed": sha256(adapter_bytes(resumed))}


def lens(folder: Path) -> dict:
    read_layers = find("read_layers", "lens.read", "lens")
    read_routing = find("read_routing", "lens.attention", "lens")
    load_model = find("load_model", "models")
    reading = read_layers(load_model("nano"), "Who is older, Ann or Bob?", positions=None)
    routing = read_routing(load_model("nano-moe", four_bit=False), "Who is older, Ann or Bob?")
    return {
        "top ids": reading.top_ids.tolist(),
        "entropy": reading.entropy.round(4).tolist(),
        "experts": [[list(map(int, token)) for token in layer] for layer in routing.chosen],
    }


def splice_check(folder: Path) -> dict:
    splice = find("splice", "vision.splice", "splice")
    check_splice = find("check_splice", "vision.check", "splice_check")
    report = check_splice(splice("nano-vision", "nano", seed=1))
    return {row.name: row.passed for row in report.rows}


def claims(folder: Path) -> dict:
    """The short study, one training an arm, 400 rows."""
    open_study = find("open_study", "evidence.study", "study")
    run_study = find_or_none("run_study", "evidence.study") or find("run_jobs", "evidence.study", "study")
    find_all = find_or_none("judge_claims", "evidence.claims") or find("find_all", "evidence.claims", "claims")
    study = open_study(find("find_preset", "presets")("nano"), folder, rows=400, seeds=2, questions=102)
    findings = find_all(run_study(study, study.short()), study.items)
    shown = {}
    for finding in findings:
        effect = finding.effect
        shown[finding.claim.key] = [str(finding.verdict), None if effect is None else round(effect.mean, 4)]
    return shown


def exports(folder: Path) -> dict:
    merge_adapter, export_gguf = find("merge_adapter", "export"), find("export_gguf", "export")
    merged = merge_adapter(train(folder / "run"), folder / "merged")
    gguf = export_gguf(merged, folder, quantization="f16")
    return {
        "merged": sha256((merged / "model.safetensors").read_bytes()),
        "gguf": sha256(gguf.read_bytes()),
    }


FACTS = {fact.__name__: fact for fact in (burden, adapter, lens, splice_check, exports, claims)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="+", help="where the facts go; with --compare two files of facts")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--only", choices=FACTS, action="append")
    chosen = parser.parse_args()
    if chosen.compare:
        before, after = (json.loads(Path(file).read_text(encoding="utf-8")) for file in chosen.file)
        for fact in before | after:
            for name in before.get(fact, {}) | after.get(fact, {}):
                old, new = before.get(fact, {}).get(name), after.get(fact, {}).get(name)
                print(
                    f"{'equal' if old == new else 'DIFFERS'}: {fact} {name}",
                    "" if old == new else f"{old} -> {new}",
                )
        return
    facts = {}
    for name in chosen.only or FACTS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["IRONLOGIC_RUNS"] = folder
            facts[name] = FACTS[name](Path(folder))
        print(name, json.dumps(facts[name])[:300], flush=True)
        Path(chosen.file[0]).write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
