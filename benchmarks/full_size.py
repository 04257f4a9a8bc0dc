"""The full-size network with random weights (SMALL: a small one), random batches, and its learner."""

import torch
from timing import ROOT

from config import Config, load_config
from datasets import label_set
from engine.processes import World
from layers import cast_frozen
from model import SCHNet, build_model
from train import Learner

RANDOM = ["sam_weights=", "clip_weights=", "vocab="]
SMALL = ["sam=demo", "clip=demo", "clip_taps=[0, 1, 2, 3]", "ftm_tokens=8", "prior_dim=8", "deform_heads=4",
         "head_dim=32", "aux_dim=16", "crop_size=128", "base_size=128"]


def lip_config(*overrides: str) -> Config:
    return load_config(ROOT / "configs/lip.yaml", [*RANDOM, *overrides])


def network(cfg: Config) -> SCHNet:
    """A network with its frozen weights in `cfg.precision`, as train.py and load_run build it."""
    torch.manual_seed(0)
    model = build_model(cfg, label_set(cfg).classes)
    cast_frozen(model, cfg.precision)
    return model


def batch(cfg: Config, images: int, device: str) -> tuple[torch.Tensor, torch.Tensor, list]:
    """A random batch on the device: image uint8 (b, 3, h, w), label uint8 (b, h, w) in blocks, no names."""
    height, width = cfg.crop_size
    image = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, device=device)
    label = torch.randint(0, 20, (images, height // 16, width // 16), dtype=torch.uint8, device=device)
    return image, label.repeat_interleave(16, 1).repeat_interleave(16, 2), []


def learner(model: SCHNet, device: str) -> Learner:
    return Learner(model, model.cfg, World(device))
