"""The embedded eye: a CLIP-shaped vision tower of 183,680 parameters, pre-trained on the scenes' training scans.

Contrastive as CLIP is (Radford et al. 2021, arXiv 2103.00020): picture and caption of one scene shall agree more
than any other pairing. The text half is thrown away afterwards, so that no language model has seen the tower's
features: joining them is what splicing teaches. Says nothing about photographs.
"""

import time
from pathlib import Path

from ironlogic.data.scenes import SIZE, make_scenes

import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

__all__ = ["image_processor", "pretrain_tower", "save_tower", "tower_config"]


def tower_config() -> CLIPVisionConfig:
    """Four layers of width 64; 32 x 32 pixels in patches of 16, so four image tokens."""
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=16,
        projection_dim=64,
    )


def image_processor() -> CLIPImageProcessorPil:
    """Scales to 32 x 32 and normalises with CLIP's mean and deviation; needs PIL alone, no torchvision."""
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def pretrain_tower(
    *, seed: int = 3407, steps: int = 1200, batch: int = 128, scenes: int = 20_000
) -> CLIPVisionModel:
    """The tower after `steps` of contrast between scenes and captions; equal captions count as one."""
    torch.manual_seed(seed)
    made = make_scenes(scenes, seed=seed)
    pixels = image_processor()([scene.image for scene in made], return_tensors="pt")["pixel_values"]
    words = {word: i for i, word in enumerate(dict.fromkeys(" ".join(s.caption for s in made).split()))}
    captions = torch.tensor([[words[word] for word in scene.caption.split()] for scene in made])
    tower = CLIPVisionModel(tower_config())
    width = tower.config.hidden_size
    looked, read = torch.nn.Linear(width, width, bias=False), torch.nn.EmbeddingBag(len(words), width)
    heat = torch.nn.Parameter(torch.tensor(2.66))  # log of the inverse temperature, CLIP's start
    parameters = [*tower.parameters(), *looked.parameters(), *read.parameters(), heat]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    draw, began = torch.Generator().manual_seed(seed), time.perf_counter()
    for step in range(steps):
        rows = torch.randint(scenes, (batch,), generator=draw)
        text = captions[rows]
        eye = F.normalize(looked(tower(pixels[rows]).pooler_output), dim=-1)
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


def save_tower(tower: CLIPVisionModel, folder: Path) -> None:
    """Weights, configuration and preprocessor, as `CLIPVisionModel` and `AutoImageProcessor` read them."""
    tower.save_pretrained(folder)
    image_processor().save_pretrained(folder)
