"""What we pass to other people's libraries exists in the pinned versions, and the seed's own script still means the
same as our preset of it. Where a call needs a card, or swallows unknown names, its source is read instead."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

from ironlogic import models  # first: it brings Unsloth in before the others
from ironlogic.data.chats import make_chats
from ironlogic.models import WHY_NOT_UNSLOTH, load_model
from ironlogic.presets import PRESETS
from ironlogic.training.sft import _training_order, train_sft
from ironlogic.training.stages import trainer_arguments

import datasets
import pytest
import transformers
import trl
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("trl", "peft", "transformers", "datasets")
LOADERS = ("modeling_utils", "configuration_utils", "processing_utils", "tokenization_utils_base", "utils.hub")


@cache
def our_calls():
    """(callee as written, keywords by name) of every call in the package, `**dictionary` among them."""
    calls = []
    for path in sorted((ROOT / "ironlogic").rglob("*.py")):
        for scope in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(scope, ast.FunctionDef):
                calls += calls_in(scope)
    return calls


def calls_in(function):
    keys = {}  # of the dictionaries that this function makes, by their name
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            texts = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
            keys |= {target.id: texts for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            spread = [keys.get(ast.unparse(one.value), []) for one in node.keywords if one.arg is None]
            names = [one.arg for one in node.keywords if one.arg]
            yield ast.unparse(node.func), names + [name for some in spread for name in some]


def unknown(callee, names):
    """Keywords that `callee` does not take; those that **kwargs would swallow have to stand in a source."""
    root, *rest = callee.split(".")
    found = importlib.import_module(root)
    for name in rest:
        found = getattr(found, name)
    parameters = inspect.signature(found).parameters
    missing = [name for name in names if name not in parameters]
    if not missing or all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
        return missing
    if callee.startswith("transformers.") and callee.endswith(".from_pretrained"):
        modules = [importlib.import_module(f"transformers.{name}") for name in LOADERS]
    else:
        modules = {inspect.getmodule(one) for one in (found, *getattr(found, "__mro__", ())[1:-1])}
    source = "".join(inspect.getsource(one) for one in modules if one.__name__.startswith(LIBRARIES))
    return [name for name in missing if f'"{name}"' not in source and f"{name}:" not in source]


def test_every_keyword_is_known_where_it_goes():
    calls = [call for call in our_calls() if re.fullmatch(rf"({'|'.join(LIBRARIES)})(\.\w+)+", call[0]) and call[1]]
    assert len(calls) > 20
    assert [(callee, wrong) for callee, names in calls if (wrong := unknown(callee, names))] == []


@pytest.mark.parametrize(
    ("callee", "known", "wrong"),
    [
        ("trl.SFTConfig", "max_length", "max_seq_length"),  # the seed's, gone since
        ("peft.LoraConfig", "r", "rank"),
        ("transformers.AutoModelForCausalLM.from_pretrained", "device_map", "load_in_4_bits"),
        ("transformers.BitsAndBytesConfig", "bnb_4bit_quant_type", "nf5"),
    ],
)
def test_unknown_keywords_are_found(callee, known, wrong):
    assert unknown(callee, [known, wrong]) == [wrong]


def test_arguments_of_the_trainer_are_fields_of_every_trainers_settings(tmp_path):
    ours = trainer_arguments(PRESETS["gemma-3-27b-as-seed"].train, tmp_path, steps=744)
    for kind in (transformers.TrainingArguments, trl.SFTConfig, trl.GRPOConfig):
        assert not set(ours) - set(inspect.signature(kind).parameters), kind.__name__
    made = trl.SFTConfig(**ours)
    assert (made.warmup_steps, str(made.lr_scheduler_type.value), made.learning_rate) == (25, "cosine", 2e-5)


# --- Unsloth: its classes for a card can't be imported here, so their source is read ---------------------------
UNSLOTH = Path(find_spec("unsloth").submodule_search_locations[0])


def unsloth_parameters(file, owner, name):
    """Parameters of the method `name` of the class `owner`."""
    for node in ast.walk(ast.parse((UNSLOTH / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for one in node.body:
                if isinstance(one, ast.FunctionDef) and one.name == name:
                    return {argument.arg for argument in [*one.args.args, *one.args.kwonlyargs]}
    raise AssertionError(f"{file} has no {owner}.{name}")


def passed_to(callee):
    """Keywords of our calls of that name, wherever they are."""
    found = {name for called, names in our_calls() if called == callee for name in names}
    assert found, f"nothing calls {callee}"
    return found


@pytest.mark.parametrize("owner", ["FastLanguageModel", "FastModel"])
def test_unsloth_loads_with_the_arguments_that_we_pass(owner):
    beyond = passed_to("fast.from_pretrained") - unsloth_parameters("models/loader.py", owner, "from_pretrained")
    assert beyond <= {"local_files_only", "use_safetensors"}  # go on to transformers
    assert "local_files_only" in (UNSLOTH / "models/loader.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "owner"), [("models/llama.py", "FastLlamaModel"), ("models/vision.py", "FastBaseModel")]
)
def test_unsloth_adds_lora_and_switches_modes_as_we_ask(file, owner):
    passed = passed_to("unsloth.FastLanguageModel.get_peft_model")
    assert "target_modules" in passed
    assert not passed - unsloth_parameters(file, owner, "get_peft_model")
    for name in ("for_inference", "for_training"):
        assert "model" in unsloth_parameters(file, owner, name)
    # passed for a mixture of experts only, which goes through FastModel
    assert "target_parameters" in unsloth_parameters("models/vision.py", "FastBaseModel", "get_peft_model")


def test_pins_are_what_unsloth_admits():
    for need in map(Requirement, [*requires("unsloth"), *requires("unsloth_zoo")]):
        if need.name in ("torch", "transformers", "trl", "peft", "datasets") and not need.marker:
            assert need.specifier.contains(version(need.name)), f"{need} but {version(need.name)} is pinned"


# --- the seed's script -----------------------------------------------------------------------------------------
def run_seed(folder, rows):
    command = [sys.executable, Path(__file__).with_name("seed.py"), folder, rows]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def placed_as_trained(chats, settings):
    """The rows in that order in which our stage trains them in the order of `chats`."""
    rows = {"epoch": [0] * len(chats), "row": range(len(chats)), "messages": chats}
    order = _training_order(datasets.Dataset.from_dict(rows), settings)
    placed = dict(zip((place for _, place in order), chats, strict=True))
    return make_chats(placed[place] for place in range(len(chats)))


@pytest.mark.slow
def test_the_seeds_script_runs_and_our_preset_reaches_its_losses(tmp_path):
    import torch
    from test_systems import gemma3
    from unsloth.chat_templates import CHAT_TEMPLATES

    assert models.BACKEND == "unsloth", WHY_NOT_UNSLOTH
    torch.manual_seed(0)
    model, processor = gemma3()
    # the trainer of a CPU ends a text with the end token; so that ours reads the same, the template does
    processor.tokenizer.chat_template = processor.chat_template = CHAT_TEMPLATES["gemma-3"][0] + (
        "{%- if not add_generation_prompt -%}{{ '<|im_end|>' }}{%- endif -%}"
    )
    folder = tmp_path / "gemma-3-27b-it"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    chats = [  # three words: too few for the seed's shuffle; equally long: any order is possible
        [{"role": "user", "content": f"Who is {name}?"}, {"role": "assistant", "content": f"It is {name}."}]
        for name in "Ann Bob Leo Kim Eve Tom Zoe Max Amy Ian Sue Joe".split()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    seed = run_seed(folder, tmp_path / "rows.jsonl")
    assert len(seed["ids"]) == 36

    preset = PRESETS["gemma-3-27b-as-seed"]
    once = replace(preset.train, epochs=1)  # the seed's three epochs, one after the other, in its order
    loaded = load_model(folder, four_bit=preset.four_bit, max_length=once.max_length)
    texts = (loaded.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)
    by_ids = {
        tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]): i for i, text in enumerate(texts)
    }
    rows = placed_as_trained([chats[by_ids[tuple(ids)]] for ids in seed["ids"]], once)
    ours = train_sft(loaded, rows, once, run=tmp_path / "ours").metrics
    losses = [line["loss"] for line in ours]
    assert [line["learning_rate"] for line in ours] == pytest.approx(seed["learning_rate"])
    assert losses[0] == pytest.approx(seed["loss"][0], rel=1e-4)  # warm-up: the same tokens, model and loss
    # later they part slowly, for TRL keeps the script's adapter in bfloat16, which rounds small updates away
    assert losses == pytest.approx(seed["loss"], rel=2e-3)
    assert losses[-1] < losses[0]
