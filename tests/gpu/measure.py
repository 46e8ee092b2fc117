"""Peak memory and tokens per second on a card: our stage beside the seed's plain script, and the lens on 4 bit.

    python tests/gpu/measure.py --out tests/gpu/table.md              # on a card; minutes a system
    python tests/gpu/measure.py --tiny --cap 0 --out /tmp/table.md    # anywhere; shows only that this script works

Models have random weights at their true shapes, written to a folder of their own for as long as they are measured
(57 GB for the largest), so nothing is downloaded. Each measurement is a process of its own that may take `--cap`
GiB of the card and no more, so that a large card stands for a smaller one. Rows have `--length` tokens. The table
shows what `memory.plan_memory` said beside it. Speed under a cap is that of the card at hand, not of a smaller one.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SPLICES = ("vqwen3-4b", "qwen3-smvl")
SYSTEMS = ("qwen3-vl-4b", "gemma-3-27b", "qwen3-30b-a3b", *SPLICES)
SHRUNK = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
SHRUNK |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1088}
EYES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_heads": 4, "depth": 2}
EYES |= {"num_hidden_layers": 2, "out_hidden_size": 128, "deepstack_visual_indexes": [0]}
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


# --- a model to measure ---------------------------------------------------------------------------------------
def config_of(system: str, *, tiny: bool):
    """The published configuration of a preset's (language) model; `tiny`: the same architecture, nano-sized."""
    from ironlogic.memory import ARCHITECTURES
    from ironlogic.presets import PRESETS, VISION_PRESETS

    from transformers import CONFIG_MAPPING

    model = (VISION_PRESETS[system].language_model if system in SPLICES else PRESETS[system].model).lower()
    name = next(name for name in ARCHITECTURES if name.lower() in model)
    known = {key: value for key, value in ARCHITECTURES[name].items() if key != "total"}
    if tiny:
        known = known | (MIXTURE if "num_experts" in known else {})
        if "text_config" in known:
            turn = {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [16, 8, 8],
                "mrope_interleaved": True,
            }
            text = known["text_config"] | SHRUNK | ({"rope_parameters": turn} if "VL" in name else {})
            known |= {"text_config": text, "vision_config": known["vision_config"] | EYES}
        else:
            known |= SHRUNK
    return CONFIG_MAPPING[known.pop("model_type")](**known)


def build(system: str, folder: Path, *, tiny: bool) -> None:
    """Random weights, drawn on the card where there is one, and nano's tokenizer: every vocabulary has its ids."""
    from ironlogic.models import DATA

    import torch
    import transformers

    config = config_of(system, tiny=tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "nano")
    text = config.get_text_config()
    text.pad_token_id, text.eos_token_id, text.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    sees = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    if tiny:
        (folder / "tiny").touch()
    if sees:  # the text is what is trained here; a processor only has to be there
        write_processor(config, tokenizer, folder)
    else:
        tokenizer.save_pretrained(folder)


def write_processor(config, tokenizer, folder: Path) -> None:
    from ironlogic.backends import _StillQwen3VLProcessor
    from ironlogic.models import DATA

    import transformers

    if config.model_type == "gemma3":
        names = {"image_token": "<|image_pad|>", "boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>"}
        tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "nano", extra_special_tokens=names)
        pictures = transformers.Gemma3ImageProcessorPil()
        made = transformers.Gemma3Processor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    else:
        pictures = transformers.Qwen2VLImageProcessorPil(patch_size=16, merge_size=2)
        made = _StillQwen3VLProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    made.save_pretrained(folder)


def rows_of(length: int, count: int) -> list[list[dict]]:
    """Conversations of `length` tokens or some more, which the trainer cuts; half of them the answer's."""
    from ironlogic.data.problems import make_tasks

    words = " ".join(task.prompt for task in make_tasks(60, seed=3)).split()
    text = " ".join(words[i % len(words)] for i in range(length))  # a word is a token or more
    half = text[: len(text) // 2]
    return [[{"role": "user", "content": half}, {"role": "assistant", "content": half}] for _ in range(count)]


# --- one measurement, in a process of its own -----------------------------------------------------------------
def measure(what: str, system: str, folder: Path, *, cap: float, length: int, steps: int) -> dict:
    """{"peak_gib", "tokens_per_second"} of our stage, of the seed's script, or of the lens."""
    from ironlogic import models

    import torch

    if cap and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0))
    run = {"ours": our_splice if system in SPLICES else our_stage, "seed": seed_script, "lens": lens}[what]
    speed = run(system, folder, length, steps)
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
    return {"peak_gib": peak, "tokens_per_second": speed, "backend": models.BACKEND}


def our_stage(system: str, folder: Path, length: int, steps: int) -> float:
    from ironlogic.models import load_model
    from ironlogic.presets import PRESETS
    from ironlogic.training.sft import train_sft

    preset = PRESETS[system]
    settings = replace(preset.train, epochs=1, accumulation=1, max_length=length, log_steps=1)
    loaded = load_model(folder, four_bit=True, max_length=length)
    run = train_sft(loaded, rows_of(length, steps), settings, run=folder / "run", burden=preset.burden)
    first, last = run.metrics[0]["seconds"], run.metrics[-1]["seconds"]
    return length * (len(run.metrics) - 1) / (last - first)


def stage_of(system: str, length: int):
    """A splice's second stage, as the preset has it but for its accumulation, rows of at most `length` tokens."""
    from ironlogic.presets import VISION_PRESETS

    stage = VISION_PRESETS[system].instruct_stage
    return replace(stage, accumulation=1, max_length=min(length, stage.max_length), log_steps=1)


def tower_of(system: str, *, tiny: bool):
    """(vision tower with random weights, its image processor)."""
    from ironlogic.memory import ARCHITECTURES

    import transformers
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

    shape = {key: value for key, value in ARCHITECTURES[system]["vision_config"].items() if key != "model_type"}
    if tiny:
        shape |= {key: EYES[key] for key in shape.keys() & EYES.keys()} | {"image_size": 4 * shape["patch_size"]}
    if system == "vqwen3-4b":
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape))
    else:
        tower = SmolVLMVisionTransformer(SmolVLMVisionConfig(**shape))
    size = {"height": shape["image_size"], "width": shape["image_size"]}
    return tower, transformers.SiglipImageProcessorPil(size=size)


def our_splice(system: str, folder: Path, length: int, steps: int) -> float:
    """Stage 2: projector and LoRA, a picture in every row, as many rows a pass as the preset has."""
    from ironlogic.presets import VISION_PRESETS
    from ironlogic.vision.splice import splice, train_instruct

    from PIL import Image

    preset = VISION_PRESETS[system]
    settings = stage_of(system, length)
    length, tiny = settings.max_length, (folder / "tiny").exists()
    loaded = splice(
        tower_of(system, tiny=tiny), folder, projector=preset.projector, four_bit=preset.four_bit, max_length=length
    )
    picture = {"type": "image", "image": Image.effect_noise((336, 336), 64).convert("RGB")}
    rows = rows_of(length, steps * settings.batch_size)
    for user, _ in rows:
        words = user["content"].split()
        user["content"] = [picture, {"type": "text", "text": " ".join(words[: len(words) // 4])}]
    run = train_instruct(loaded, rows, settings, run=folder / "run", cache=None)
    first, last = run.metrics[0]["seconds"], run.metrics[-1]["seconds"]
    return settings.batch_size * length * (len(run.metrics) - 1) / (last - first)


def seed_script(system: str, folder: Path, length: int, steps: int) -> float:
    """The published script's calls (seed 001), with `max_steps`; its own reading of text."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel, get_chat_template

    model, processor = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=length,
        dtype=None,
        load_in_4bit=True,
        full_finetuning=False,
        local_files_only=True,
        use_gradient_checkpointing="unsloth",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        finetune_vision_layers=False,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer = get_chat_template(tokenizer, "gemma-3") if "gemma" in system else tokenizer
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in rows_of(length, steps)]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        dataset_text_field="text",
        max_seq_length=length,
        packing=False,
        args=SFTConfig(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            warmup_steps=25,
            max_steps=steps,
            learning_rate=2e-5,
            fp16=not torch.cuda.is_bf16_supported(),
            bf16=torch.cuda.is_bf16_supported(),
            logging_steps=5,
            optim="paged_adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            seed=3407,
            output_dir=str(folder / "output"),
            report_to="none",
        ),
    )
    times, step = [], trainer.training_step

    def timed(*given):
        loss = step(*given).item()  # waits for the card
        times.append(time.perf_counter())
        return torch.tensor(loss)

    trainer.training_step = timed
    trainer.train()
    return length * (len(times) - 1) / (times[-1] - times[0])


def lens(system: str, folder: Path, length: int, steps: int) -> float:
    """Tokens of one prompt read in all layers; `read_layers` proves its reading or raises."""
    from ironlogic.lens.read import read_layers
    from ironlogic.models import load_model

    loaded = load_model(folder, four_bit=True, max_length=length)
    prompt = rows_of(min(length, 256), 1)[0][0]["content"]
    began = time.perf_counter()
    reading = read_layers(loaded, prompt)
    return reading.entropy.shape[0] / (time.perf_counter() - began)  # layers a second


# --- all of them ----------------------------------------------------------------------------------------------
def in_its_own_process(arguments: list[str]) -> dict:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    short = next((line for line in said if "out of memory" in line.lower()), said[-1] if said else "no message")
    return {"failed": short.strip()[:160]}


def row(system: str, cap: float, what: str, found: dict, planned: str) -> str:
    name = {"ours": "our stage", "seed": "the seed's script", "lens": "lens, layers a second"}[what]
    if "failed" in found:
        return f"| {system} | {cap:g} | {name} | {planned} | {found['failed']} | |"
    return (
        f"| {system} | {cap:g} | {name} | {planned} | {found['peak_gib']:.2f} | {found['tokens_per_second']:.0f} |"
    )


def table(chosen: argparse.Namespace) -> str:
    from ironlogic.memory import plan_memory
    from ironlogic.models import BACKEND

    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card: this only tries the script"
    lines = [
        f"{card}, {BACKEND}, torch {torch.__version__}, rows of {chosen.length} tokens, {chosen.steps} steps.",
        "",
    ]
    lines += ["| system | cap GiB | what | planned GiB | peak GiB | tokens/s |", "|---|---|---|---|---|---|"]
    for system in chosen.systems:
        length = stage_of(system, chosen.length).max_length if system in SPLICES else chosen.length
        peak = "" if chosen.tiny else f"{plan_memory(system, card_gib=80, length=length).peak_gib:.2f}"
        with tempfile.TemporaryDirectory(dir=chosen.scratch) as scratch:
            folder = Path(scratch) / "model"
            common = [system, "--folder", str(folder), "--length", str(chosen.length), "--steps", str(chosen.steps)]
            common += ["--tiny"] * chosen.tiny
            built = in_its_own_process(["--only", "build", *common])
            for cap in chosen.cap if "failed" not in built else ():
                for what in ("ours",) if system in SPLICES else ("ours", "seed", "lens"):
                    shutil.rmtree(folder / "run", ignore_errors=True)
                    found = in_its_own_process(["--only", what, "--cap", str(cap), *common])
                    lines.append(row(system, cap, what, found, peak if what == "ours" else ""))
                    print(lines[-1], file=sys.stderr, flush=True)
            if "failed" in built:
                lines.append(f"| {system} | | not built | | {built['failed']} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=SYSTEMS, help=f"presets (default: {', '.join(SYSTEMS)})")
    parser.add_argument("--cap", type=float, action="append", help="GiB of the card (default: 23.5 and 31.4)")
    parser.add_argument("--length", type=int, default=4096, help="tokens per row")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="nano-sized models, to try this script")
    parser.add_argument("--scratch", type=Path, help="where the weights are written meanwhile")
    parser.add_argument("--out", type=Path, help="file for the table (default: printed)")
    parser.add_argument("--only", choices=("build", "ours", "seed", "lens"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    if chosen.only == "build":
        build(chosen.systems[0], chosen.folder, tiny=chosen.tiny)
        print("{}")
    elif chosen.only:
        cap = chosen.cap[0]
        found = measure(
            chosen.only, chosen.systems[0], chosen.folder, cap=cap, length=chosen.length, steps=chosen.steps
        )
        print(json.dumps(found))
    else:
        chosen.cap = chosen.cap or [23.5, 31.4]
        text = table(chosen)
        chosen.out.write_text(text, encoding="utf-8") if chosen.out else print(text)


if __name__ == "__main__":
    main()
