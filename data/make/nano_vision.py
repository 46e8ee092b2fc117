"""The embedded eyes: vision towers of CLIP's and of SigLIP's shape, pre-trained on the scenes' training scans.

Contrastive as CLIP is (Radford et al. 2021, arXiv 2103.00020): picture and caption of one scene shall agree more
than any other pairing. The text half is thrown away afterwards, so that no language model has seen the tower's
features: joining them is what splicing teaches. Says nothing about photographs.
"""

import time
from pathlib import Path
from typing import Literal

from ironlogic.data.scenes import SIZE, make_scenes

import torch
import torch.nn.functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

__all__ = ["image_processor", "pretrain_tower", "save_tower", "siglip_config", "tower_config"]

Kind = Literal["clip", "siglip"]
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
_SIZES |= {"image_size": SIZE, "patch_size": 16}
_PATCHES = (SIZE // 16) ** 2


def tower_config() -> CLIPVisionConfig:
    """Four layers of width 64; 32 x 32 pixels in patches of 16, so four image tokens."""
    return CLIPVisionConfig(**_SIZES, projection_dim=64)


def siglip_config() -> SiglipVisionConfig:
    """The same sizes in SigLIP's shape, which splices of SmolVLM's class take."""
    return SiglipVisionConfig(**_SIZES, vision_use_head=False)


def image_processor(kind: Kind = "clip") -> CLIPImageProcessorPil | SiglipImageProcessorPil:
    """Scales to 32 x 32 and normalises as such towers do; needs PIL alone, no torchvision."""
    size = {"height": SIZE, "width": SIZE}
    if kind == "siglip":
        return SiglipImageProcessorPil(size=size)
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size)


def pretrain_tower(
    kind: Kind = "clip",
    *,
    seed: int = 3407,
    steps: int = 1200,
    batch: int = 128,
    scenes: int = 20_000,
) -> CLIPVisionModel | SiglipVisionModel:
    """The tower after `steps` of contrast between scenes and captions; equal captions count as one."""
    torch.manual_seed(seed)
    made = make_scenes(scenes, seed=seed)
    pixels = image_processor(kind)([scene.image for scene in made], return_tensors="pt")["pixel_values"]
    words = {word: i for i, word in enumerate(dict.fromkeys(" ".join(s.caption for s in made).split()))}
    captions = torch.tensor([[words[word] for word in scene.caption.split()] for scene in made])
    tower = CLIPVisionModel(tower_config()) if kind == "clip" else SiglipVisionModel(siglip_config())
    width, seen = tower.config.hidden_size, tower.config.hidden_size * (1 if kind == "clip" else _PATCHES)
    looked, read = torch.nn.Linear(seen, width, bias=False), torch.nn.EmbeddingBag(len(words), width)
    heat = torch.nn.Parameter(torch.tensor(2.66))  # log of the inverse temperature, CLIP's start
    parameters = [*tower.parameters(), *looked.parameters(), *read.parameters(), heat]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    draw, began = torch.Generator().manual_seed(seed), time.perf_counter()
    for step in range(steps):
        rows = torch.randint(scenes, (batch,), generator=draw)
        text = captions[rows]
        output = tower(pixels[rows])  # SigLIP's has no CLS that would gather what is seen: all patches in a row
        output = output.pooler_output if kind == "clip" else output.last_hidden_state.flatten(1)
        eye = F.normalize(looked(output), dim=-1)
        logits = heat.exp() * eye @ F.normalize(read(text), dim=-1).T
        same = (text[:, None] == text).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1:5d}  loss {loss.item():.3f}  {time.perf_counter() - began:5.0f} s", flush=True)
    return tower.eval()


def save_tower(tower: CLIPVisionModel | SiglipVisionModel, folder: Path) -> None:
    """Weights, configuration and preprocessor, as their class and `AutoImageProcessor` read them."""
    tower.save_pretrained(folder)
    image_processor("clip" if isinstance(tower, CLIPVisionModel) else "siglip").save_pretrained(folder)
