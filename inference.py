"""From a checkpoint and a photo to class probabilities (§4.4): for validation, evaluation, prediction, export.

    model, labels, path = load_run("runs/cihp")
    probabilities = predict(model, image, *tta_views(model.cfg, labels.flip_pairs))    # (K, H, W)

A photo is an RGB array (H, W, 3), uint8. Its views have the long side at `base_size` times each scale, padded as in
training, and with `flip_pairs` each is also flipped. Their softmax at the photo's size is averaged.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import config
import fast
from augment import MEAN_COLOUR, flip_order, pad, resize_photo, scaled_size
from config import Config
from engine import checkpoint
from engine.processes import pick_device
from errors import UserError
from files.labels import LabelSet
from layers import autocast, cast_frozen, round_up
from model import SCHNet, build_model

Views = tuple[Sequence[float], Sequence[tuple[int, int]] | None]         # scales; flip pairs, None: no flip

# ----------------------------------------------------------------------------------------------------------------------
# the network of a run

def add_run_options(parser: argparse.ArgumentParser, batch: int | None = None):
    """The options of the programs that use a trained run; `batch`: the default of --batch, None: no such option."""
    parser.add_argument("--run", "--checkpoint", help="folder of a run, or a checkpoint; the newest run if not given. "
                        "Under torchrun, which has options that begin with --run, only --checkpoint")
    parser.add_argument("--tta", action="store_true", help="average over scales and flips (§4.4), slower")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; the GPU if there is one")
    if batch is not None:
        parser.add_argument("--batch", type=_positive, default=batch, help=f"photos at a time per process ({batch})")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def load_run(run: str | Path | None = None, overrides: Sequence[str] = (),
             device: str | torch.device = "") -> tuple[SCHNet, LabelSet, Path]:
    """A trained network ready for `predict`, its label set and its checkpoint. `run` None: the newest run.

    On a CPU the network runs in fp32 unless `precision=bf16` is among the overrides: few CPUs have bf16 units.
    """
    config.parse_overrides(overrides)                      # a mistake in them is reported before the file is read
    path = checkpoint.find(run)
    return *load_content(checkpoint.read(path), path, overrides, device), path


def load_content(content: dict, path: Path, overrides: Sequence[str] = (),
                 device: str | torch.device = "") -> tuple[SCHNet, LabelSet]:
    """As `load_run`, of a checkpoint that has been read."""
    target = device if isinstance(device, torch.device) else pick_device(device)
    if target.type == "cpu" and "precision" not in config.parse_overrides(overrides):
        overrides = [*overrides, "precision=fp32"]
    model, labels = restore(content, path, overrides)
    cast_frozen(model, model.cfg.precision)
    return model.to(target), labels


def restore(content: dict, path: Path, overrides: Sequence[str] = ()) -> tuple[SCHNet, LabelSet]:
    """The network of a checkpoint, in evaluation mode on the CPU; `overrides` are keys of config.OVERRIDABLE."""
    given, trained = config.parse_overrides(overrides), config.from_dict(content["config"], source=str(path))
    cfg = dataclasses.replace(trained, **given)
    for key in given:
        own = key in ("classes", "palette", "flip_pairs") and cfg.dataset == trained.dataset
        if getattr(cfg, key) != getattr(trained, key) and (own or key not in config.OVERRIDABLE):
            raise UserError(f"{key}: {path} was trained with {getattr(trained, key)!r}, which cannot be changed")
    labels, official = LabelSet(**content["labels"]), content["official"]
    for key in official:
        if not Path(getattr(cfg, key)).exists():
            raise UserError(f"{path} needs {getattr(cfg, key)}: run `python download.py`, or set {key}=PATH")
    known = {key: "" for key in ("sam_weights", "clip_weights") if key not in official}  # the tensors are in `content`
    known |= {"clip_activation": official["clip_weights"]["activation"]} if "clip_weights" in official else {}
    model = build_model(dataclasses.replace(cfg, **known), labels.classes, content["model"])
    checkpoint.check_official(model, official, path)
    checkpoint.load_state(model, content["model"], path)
    return model.eval(), labels


# ----------------------------------------------------------------------------------------------------------------------
# from a photo to probabilities

def tta_views(cfg: Config, flip_pairs: Sequence[tuple[int, int]], tta: bool = True) -> Views:
    """§4.4's views with test-time augmentation, or the single one without."""
    return (cfg.tta_scales, flip_pairs) if tta else ((1.0,), None)


def canvas(image: np.ndarray, cfg: Config, scale: float) -> tuple[np.ndarray, tuple[int, int]]:
    """The padded photo that the network gets at `scale`, and the size of the photo in it.

    Its long side is base_size * scale; it is padded at the bottom and right to the size of training samples, in
    multiples of 32 (TTA scales of 480: 384, 480, 608, 736).
    """
    size = scaled_size(image.shape[:2], cfg.base_size * scale)
    sides = [round_up(max(side, round(crop * scale))) for side, crop in zip(size, cfg.crop_size)]
    return pad(resize_photo(image, size), sides, MEAN_COLOUR), size


def view_logits(model: nn.Module, images: list[np.ndarray], scales: Sequence[float],
                flip_pairs: Sequence[tuple[int, int]] | None) -> list[list[Tensor]]:
    """For each image a list of logits (K, h, w), one per scale; with `flip_pairs` also of the flipped image."""
    device = next(model.parameters()).device
    result = [[] for _ in images]
    for scale in scales:
        groups: dict[tuple, list] = {}
        for n, image in enumerate(images):
            padded, size = canvas(image, model.cfg, scale)
            groups.setdefault(padded.shape, []).append((n, padded, size))
        for group in groups.values():
            batch = torch.from_numpy(np.stack([padded for _, padded, _ in group])).to(device)
            batch = batch.permute(0, 3, 1, 2).float() / 255              # (B, 3, H, W)
            with autocast(device, model.cfg.precision):
                logits = [model(batch)]
                if flip_pairs is not None:
                    flipped = model(torch.stack([_flip(x, size[1]) for x, (_, _, size) in zip(batch, group)]))
                    logits.append(flipped[:, flip_order(flipped.shape[1], flip_pairs)])
            for k, (n, _, (h, w)) in enumerate(group):
                result[n].append(logits[0][k, :, :h, :w].float())
                if flip_pairs is not None:
                    result[n].append(logits[1][k, :, :h, :w].float().flip(-1))
    return result


def _flip(image: Tensor, width: int) -> Tensor:
    """Flips the photo within its own width; the padding stays on the right."""
    return torch.cat([image[..., :width].flip(-1), image[..., width:]], -1)


@fast.replaced_by(fast.probabilities)
def probabilities(logits: list[Tensor], size: tuple[int, int], merge: Sequence[Sequence[int]] | None = None) -> Tensor:
    """(K, H, W): the softmax of every view's logits (K, h, w) at the photo's size, averaged (§4.4).

    `merge`: sums of the network's classes, see files/labels.py. They are added before the maximum is taken: 40 % skirt,
    35 % shirt and 25 % coat is an upper garment.
    """
    full = [F.interpolate(view[None], size, mode="bilinear", align_corners=False)[0] for view in logits]
    mean = torch.stack([view.softmax(0) for view in full]).mean(0)
    return mean if merge is None else torch.stack([mean[list(sources)].sum(0) for sources in merge])


@fast.replaced_by(fast.label_map)
def label_map(logits: list[Tensor], size: tuple[int, int], merge: Sequence[Sequence[int]] | None = None) -> Tensor:
    """(H, W) uint8 on the CPU: the most probable class of each pixel."""
    return probabilities(logits, size, merge).argmax(0).byte().cpu()


@torch.inference_mode()
def predict(model: nn.Module, image: np.ndarray, scales: Sequence[float] = (1.0,),
            flip_pairs: Sequence[tuple[int, int]] | None = None,
            merge: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Class probabilities (K, H, W) of an RGB photo (H, W, 3) uint8, at its own size.

    `scales` and `flip_pairs` (None: no flip; (): a flip without left and right) are §4.4's test-time augmentation.
    """
    return probabilities(view_logits(model, [image], scales, flip_pairs)[0], image.shape[:2], merge)


@torch.inference_mode()
def predict_labels(model: nn.Module, images: list[np.ndarray], scales: Sequence[float] = (1.0,),
                   flip_pairs: Sequence[tuple[int, int]] | None = None,
                   merge: Sequence[Sequence[int]] | None = None) -> list[np.ndarray]:
    """Label maps (H, W) uint8 of RGB photos of any sizes."""
    return [label_map(logits, image.shape[:2], merge).numpy()
            for image, logits in zip(images, view_logits(model, images, scales, flip_pairs))]
