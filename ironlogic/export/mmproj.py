"""A splice for llama.cpp: its language model as a folder of its own, and its eye as an `mmproj` file.

The eye is written by the programs of the user's llama.cpp checkout, from a folder that they take: SmolVLM's layout
by `convert_hf_to_gguf.py --mmproj`, LLaVA's by the older `convert_image_encoder_to_gguf.py`, as the former takes no
CLIP. `why_not_mmproj` says what llama.cpp can't express. Both files together are compared with the splice by
`write.check_export`, on a picture that needs no scaling: llama.cpp scales with a filter of its own, and under LLaVA
pads pictures that are not square, where CLIP's processor crops.
"""

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ironlogic.export.gguf import ExportError, call, convert

import torch
import transformers
from safetensors.torch import save_file

# Towers of llama.cpp's LLaVA, each with what LLaVA calls the removal of its CLS feature, or that there is none
_TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
_QUICK, _TANH = "quick_gelu", ("gelu", "gelu_pytorch_tanh")  # llama.cpp computes the others with tanh
_TILE_MARKS = ("\n", "\n\n", "<fake_token_around_image>", "<global-img>")
_OLD_SCRIPT = Path("tools", "mtmd", "legacy-models", "convert_image_encoder_to_gguf.py")
# The script expects the nesting that towers have in transformers 4, and the projector as a pickle
_AS_IT_EXPECTS = """
import runpy, sys, safetensors.torch, torch, transformers
class Nested(torch.nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.vision_model = tower
    @classmethod
    def from_pretrained(cls, folder):
        return cls(transformers.AutoModel.from_pretrained(folder, local_files_only=True))
transformers.CLIPVisionModel = transformers.SiglipVisionModel = Nested
torch.load = safetensors.torch.load_file
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def why_not_mmproj(config: Any, processor: Any) -> str:
    """Why llama.cpp can't show a picture to a model as this splice sees it; "" when it can."""
    if config.model_type not in ("llava", "smolvlm"):
        return (
            f"it is a {config.model_type}, no splice; where llama.cpp knows it (Gemma 3, Qwen3-VL), "
            "convert_hf_to_gguf.py, once with --mmproj and once without, takes its merged folder"
        )
    vision = config.vision_config
    if vision.hidden_act not in (_QUICK, *_TANH):
        return f"its tower has the activation {vision.hidden_act}; llama.cpp's towers have {_QUICK} or gelu"
    if config.model_type == "llava":
        if vision.model_type not in _TOWERS:
            return f"its tower is a {vision.model_type}; llama.cpp's LLaVA reads those of CLIP and SigLIP"
        if config.vision_feature_select_strategy != _TOWERS[vision.model_type]:
            return "the CLS feature of its tower is among those of a picture; llama.cpp's LLaVA takes patches alone"
        return ""
    if not getattr(processor.image_processor, "do_image_splitting", False):
        return (
            "it sees a picture in one view, and llama.cpp's SmolVLM always shows tiles, then the whole; splice "
            "with tiles=... or projector='mlp2x_gelu'"
        )
    if config.scale_factor < 2:
        return "its projector joins no patches (shuffle_factor 1); llama.cpp's SmolVLM joins 2 x 2 or more"
    words = [m for m in _TILE_MARKS if len(processor.tokenizer.encode(m, add_special_tokens=False)) != 1]
    if words:
        return (
            f"llama.cpp's SmolVLM writes {', '.join(map(repr, words))} round a picture's tiles as one token, and "
            "the language model's tokenizer has none for it"
        )
    return ""


def find_eye_converter(config: Any, checkout: Path | None) -> Path:
    """The program of a llama.cpp checkout that writes the eye of such a splice. Raises `ExportError`."""
    if checkout is None:
        raise ExportError("the eye of a splice is written by a llama.cpp checkout: name one (llama_cpp=...)")
    script = checkout / (_OLD_SCRIPT if config.model_type == "llava" else "convert_hf_to_gguf.py")
    if not script.is_file():
        raise ExportError(f"{checkout}: this checkout of llama.cpp has no {script.relative_to(checkout)}")
    return script


def unscaled_side(image_processor: Any) -> int:
    """Pixels on each side of a picture that a splice sees without scaling it; the view of the whole aside."""
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    return size["longest_edge"] if "longest_edge" in size else size["height"]


def picture_mark(processor: Any) -> str:
    """What a prompt of llama.cpp has to hold in the place of a picture, for the turn that the splice was taught."""
    question, picture = {"type": "text", "text": "?"}, {"type": "image"}
    with_it, without = (
        processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        for parts in ([picture, question], [question])
    )
    before, _, behind = without.partition("?")
    written = with_it.removeprefix(before).removesuffix(f"?{behind}")
    return written.replace(processor.image_token, "<__media__>")


# --- the two halves -----------------------------------------------------------------------------------------
def write_language_model(model: Any, processor: Any, folder: Path) -> None:
    """The language model of a splice with its tokenizer, as a plain causal model."""
    with torch.device("meta"):
        alone = transformers.AutoModelForCausalLM.from_config(model.config.text_config)
    trunk = model.model.text_model if model.config.model_type == "smolvlm" else model.model.language_model
    setattr(alone, alone.base_model_prefix, trunk)
    alone.set_output_embeddings(model.get_output_embeddings())
    if len(processor.tokenizer) < alone.config.vocab_size:  # llama.cpp knows no rows without a token
        alone = copy.deepcopy(alone)  # the splice keeps its rows
        alone.resize_token_embeddings(len(processor.tokenizer))
    alone.generation_config = model.generation_config
    alone.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def write_eye(model: Any, processor: Any, folder: Path) -> None:
    """Tower and projector of a splice, as the converter wants them."""
    if model.config.model_type == "llava":
        tower, projector = model.model.vision_tower.float(), model.model.multi_modal_projector.float()
        if getattr(tower, "head", None) is not None:  # SigLIP's, which LLaVA doesn't use
            tower.config.vision_use_head = False
            del tower.head
        tower.save_pretrained(folder)
        weights = {f"multi_modal_projector.{name}": value for name, value in projector.state_dict().items()}
        save_file(weights, folder / "projector.safetensors")
        file, settings = folder / "config.json", {"vision_feature_layer": model.config.vision_feature_layer}
        settings["hidden_act"] = "gelu" if tower.config.hidden_act in _TANH else _QUICK  # the script knows no other
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")
        return
    processor.save_pretrained(folder)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["vision_config"].pop("architectures", None)  # the converter would look for a tower alone
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    parts = ("model.vision_model.", "model.connector.")
    weights = {name: value for name, value in model.state_dict().items() if name.startswith(parts)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def convert_eye(script: Path, folder: Path, path: Path, image_processor: Any) -> None:
    """The folder of `write_eye` as an mmproj file in f16."""
    if script.name == "convert_hf_to_gguf.py":
        convert(script.parent, folder, path, "f16", "--mmproj")
        return
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    written = folder / "out" / "mmproj-model-f16.gguf"
    options = ["--clip-model-is-vision", *(["--clip-model-is-siglip"] if kind == "siglip_vision_model" else [])]
    options += ["--llava-projector", folder / "projector.safetensors", "--output-dir", written.parent]
    for name in ("mean", "std"):
        options += [f"--image-{name}", *getattr(image_processor, f"image_{name}")]
    call([sys.executable, "-c", _AS_IT_EXPECTS, script, "--model-dir", folder, *options], written)
    shutil.move(written, path)
