"""What we pass to other people's libraries exists in the pinned versions, and the seed's own script still means the
same as our preset of it. Where a call needs a card, or swallows unknown names, its source is read instead."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from ironlogic import models  # first: it brings Unsloth in before the others
from ironlogic.models import WHY_NOT_UNSLOTH
from ironlogic.presets import PRESETS

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("trl", "peft", "transformers", "datasets")


def calls_in(source):
    """(callee as written, line, keywords) of every call with keywords by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            names = [one.arg for one in node.keywords if one.arg]
            if names:
                yield ast.unparse(node.func), node.lineno, names


def resolve(callee):
    """The object of `trl.SFTConfig`."""
    root, *rest = callee.split(".")
    found = importlib.import_module(root)
    for name in rest:
        found = getattr(found, name)
    return found


LOADERS = ("modeling_utils", "configuration_utils", "processing_utils", "tokenization_utils_base", "utils.hub")


def sources_of(callee, found):
    """What may read the names that `found` swallows."""
    if callee.startswith("transformers.") and callee.endswith(".from_pretrained"):
        modules = [importlib.import_module(f"transformers.{name}") for name in LOADERS]
    else:
        modules = {inspect.getmodule(one) for one in (found, *getattr(found, "__mro__", ())[1:-1])}
    return "".join(inspect.getsource(one) for one in modules if one.__name__.startswith(LIBRARIES))


def unknown(callee, names):
    """Keywords that `callee` does not take; those that **kwargs would swallow have to stand in a source."""
    found = resolve(callee)
    parameters = inspect.signature(found).parameters
    missing = [name for name in names if name not in parameters]
    if missing and any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        source = sources_of(callee, found)
        missing = [name for name in missing if f'"{name}"' not in source and f"{name}:" not in source]
    return missing


def our_calls():
    for path in sorted((ROOT / "ironlogic").rglob("*.py")):
        for callee, line, names in calls_in(path.read_text(encoding="utf-8")):
            if re.fullmatch(rf"({'|'.join(LIBRARIES)})(\.\w+)+", callee):
                yield pytest.param(callee, names, id=f"{path.stem}:{line}:{callee}")


@pytest.mark.parametrize(("callee", "names"), our_calls())
def test_every_keyword_is_known_where_it_goes(callee, names):
    assert unknown(callee, names) == []


def test_unknown_keywords_are_found():
    assert unknown("trl.SFTConfig", ["max_seq_length", "max_length"]) == [
        "max_seq_length"
    ]  # the seed's, gone since
    assert unknown("peft.LoraConfig", ["r", "rank"]) == ["rank"]
    read = unknown("transformers.AutoModelForCausalLM.from_pretrained", ["dtype", "device_map", "load_in_4_bits"])
    assert read == ["load_in_4_bits"]
    assert unknown("transformers.BitsAndBytesConfig", ["bnb_4bit_quant_type", "nf5"]) == ["nf5"]
    assert len(list(our_calls())) > 20


def test_arguments_of_the_trainer_are_fields_of_every_trainers_settings(tmp_path):
    from ironlogic.training.stages import trainer_arguments

    import transformers
    import trl

    ours = trainer_arguments(PRESETS["gemma-3-27b-as-seed"].train, tmp_path, steps=744)
    for kind in (transformers.TrainingArguments, trl.SFTConfig, trl.GRPOConfig):
        assert not set(ours) - set(inspect.signature(kind).parameters), kind.__name__
    made = trl.SFTConfig(**ours)
    assert (made.warmup_steps, str(made.lr_scheduler_type.value), made.learning_rate) == (25, "cosine", 2e-5)


# --- Unsloth: its classes for a card can't be imported here, so their source is read ---------------------------
def unsloth_parameters(file, owner, name):
    """Parameters of the method `name` of the class `owner`."""
    folder = Path(find_spec("unsloth").submodule_search_locations[0])
    for node in ast.walk(ast.parse((folder / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for one in node.body:
                if isinstance(one, ast.FunctionDef) and one.name == name:
                    return {argument.arg for argument in [*one.args.args, *one.args.kwonlyargs]}
    raise AssertionError(f"{file} has no {owner}.{name}")


def passed_to(callee):
    """Keywords of our calls of that name, wherever they are."""
    found = set()
    for path in (ROOT / "ironlogic").rglob("*.py"):
        for name, _, keywords in calls_in(path.read_text(encoding="utf-8")):
            if name == callee:
                found |= set(keywords)
    assert found, f"nothing calls {callee}"
    return found


@pytest.mark.parametrize("owner", ["FastLanguageModel", "FastModel"])
def test_unsloth_loads_with_the_arguments_that_we_pass(owner):
    known = unsloth_parameters("models/loader.py", owner, "from_pretrained")
    assert passed_to("fast.from_pretrained") - known <= {
        "local_files_only",
        "use_safetensors",
    }  # go on to transformers
    folder = Path(find_spec("unsloth").submodule_search_locations[0])
    assert "local_files_only" in (folder / "models/loader.py").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "owner"), [("models/llama.py", "FastLlamaModel"), ("models/vision.py", "FastBaseModel")]
)
def test_unsloth_adds_lora_with_the_arguments_that_we_pass(file, owner):
    passed = passed_to("unsloth.FastLanguageModel.get_peft_model")
    assert "target_modules" in passed
    assert not passed - unsloth_parameters(file, owner, "get_peft_model")
    # passed for a mixture of experts only, which goes through FastModel
    assert "target_parameters" in unsloth_parameters("models/vision.py", "FastBaseModel", "get_peft_model")


@pytest.mark.parametrize("name", ["for_inference", "for_training"])
def test_unsloth_switches_between_modes(name):
    for file, owner in (("models/llama.py", "FastLlamaModel"), ("models/vision.py", "FastBaseModel")):
        assert "model" in unsloth_parameters(file, owner, name)


def test_pins_are_what_unsloth_admits():
    from importlib.metadata import requires, version

    from packaging.requirements import Requirement

    for text in [*requires("unsloth"), *requires("unsloth_zoo")]:
        need = Requirement(text)
        if need.name in ("torch", "transformers", "trl", "peft", "datasets") and not need.marker:
            assert need.specifier.contains(version(need.name)), f"{need} but {version(need.name)} is pinned"


# --- the seed's script -----------------------------------------------------------------------------------------
# Model, rows and template are tiny; every call and every argument is the published script's. One word differs: the
# back end for a CPU returns the tokenizer where that for a card returns a processor.
SEED = """
import json, random, sys
from unsloth import FastLanguageModel
from unsloth import get_chat_template
import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
model, processor = FastLanguageModel.from_pretrained(
    model_name="./models/gemma-3-27b-it", max_seq_length=4096, dtype=None, load_in_4bit=True, full_finetuning=False,
    local_files_only=True, use_gradient_checkpointing="unsloth",
)
model = FastLanguageModel.get_peft_model(
    model, r=8, finetune_vision_layers=False, finetune_language_layers=True, finetune_attention_modules=True,
    finetune_mlp_modules=True, lora_alpha=16, lora_dropout=0, bias="none", random_state=3407, use_rslora=False,
    loftq_config=None,
)
processor = get_chat_template(processor, "gemma-3")
def as_text(examples):
    chats = examples["messages"]
    return {"text": [processor.apply_chat_template(c, tokenize=False, add_generation_prompt=False) for c in chats]}
dataset = load_dataset("json", data_files="rows.jsonl", split="train")
dataset = dataset.map(as_text, batched=True, remove_columns=dataset.column_names, load_from_cache_file=False)
trainer = SFTTrainer(
    model=model, processing_class=getattr(processor, "tokenizer", processor), train_dataset=dataset,
    dataset_text_field="text", max_seq_length=4096, dataset_num_proc=1, packing=False,
    args=SFTConfig(
        per_device_train_batch_size=1, gradient_accumulation_steps=1, warmup_steps=25, num_train_epochs=3,
        learning_rate=2e-5, fp16=not torch.cuda.is_bf16_supported(), bf16=torch.cuda.is_bf16_supported(),
        logging_steps=5, optim="paged_adamw_8bit", weight_decay=0.01, lr_scheduler_type="cosine", seed=3407,
        output_dir="output", report_to="none",
    ),
)
seen, step = [], trainer.training_step
def spy(model, inputs, *rest):
    seen.append(inputs["input_ids"][0].tolist())
    return step(model, inputs, *rest)
trainer.training_step = spy
trainer.train()
model.save_pretrained("final")
processor.save_pretrained("final")
logged = [line for line in trainer.state.log_history if "loss" in line]
names = ("loss", "learning_rate", "grad_norm")
print(json.dumps({"ids": seen, **{name: [line[name] for line in logged] for name in names}}))
"""
OURS = """
import json, sys
from ironlogic.data.chats import make_chats
from ironlogic.models import BACKEND, load_model
from dataclasses import replace
from ironlogic.presets import find_preset
from ironlogic.training.sft import _prepare, _training_order, train_sft
import datasets
wanted = json.load(open("ids.json"))
rows = [json.loads(line)["messages"] for line in open("rows.jsonl")]
preset = find_preset("gemma-3-27b-as-seed")
once = replace(preset.train, epochs=1)  # the seed's three epochs, one after the other, in its order
loaded = load_model("models/gemma-3-27b-it", four_bit=preset.four_bit, max_length=once.max_length)
text = lambda chat: loaded.tokenizer(
    loaded.tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
by_ids = {tuple(text(chat)): chat for chat in rows}
chats = [by_ids[tuple(ids)] for ids in wanted]
order = _training_order(
    datasets.Dataset.from_dict({"epoch": [0] * len(chats), "row": range(len(chats)), "messages": chats}), once)
placed = [None] * len(chats)
for (_, place), chat in zip(order, chats):
    placed[place] = chat
run = train_sft(loaded, make_chats(placed), once, run=sys.argv[1])
names = ("loss", "learning_rate", "grad_norm")
print(json.dumps({"backend": BACKEND, **{name: [line[name] for line in run.metrics] for name in names}}))
"""


def python(code, folder, *arguments, **environ):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"} | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_seeds_script_runs_and_our_preset_reaches_its_losses(tmp_path):
    import torch
    from test_systems import gemma3
    from unsloth.chat_templates import CHAT_TEMPLATES

    torch.manual_seed(0)
    model, processor = gemma3()
    # the trainer of a CPU ends a text with the end token; so that ours reads the same, the template does
    processor.tokenizer.chat_template = processor.chat_template = CHAT_TEMPLATES["gemma-3"][0] + (
        "{%- if not add_generation_prompt -%}{{ '<|im_end|>' }}{%- endif -%}"
    )
    model.save_pretrained(tmp_path / "models" / "gemma-3-27b-it")
    processor.save_pretrained(tmp_path / "models" / "gemma-3-27b-it")
    names = ["Ann", "Bob", "Leo", "Kim", "Eve", "Tom", "Zoe", "Max", "Amy", "Ian", "Sue", "Joe"]
    assert models.BACKEND == "unsloth", WHY_NOT_UNSLOTH
    chats = [  # three words: too few for the seed's shuffle; equally long: any order is possible
        [{"role": "user", "content": f"Who is {name}?"}, {"role": "assistant", "content": f"It is {name}."}]
        for name in names
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    seed = python(SEED, tmp_path)
    assert len(seed["ids"]) == 36
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()
    (tmp_path / "ids.json").write_text(json.dumps(seed["ids"]))
    ours = python(OURS, tmp_path, str(tmp_path / "ours"))
    assert ours["backend"] == "unsloth"
    assert ours["learning_rate"] == pytest.approx(seed["learning_rate"])
    assert ours["loss"][0] == pytest.approx(seed["loss"][0], rel=1e-4)  # warm-up: the same tokens, model and loss
    # later they part slowly, for TRL keeps the script's adapter in bfloat16, which rounds small updates away
    assert ours["loss"] == pytest.approx(seed["loss"], rel=2e-3)
    assert ours["loss"][-1] < ours["loss"][0]
