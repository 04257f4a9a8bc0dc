"""From a checkpoint and a photo to class probabilities (§4.4): what validation, evaluation, prediction and export share.

    model, labels, path = load_run("runs/cihp")
    probabilities = predict(model, image, model.cfg.tta_scales, labels.flip_pairs)     # (K, H, W)

A photo is an RGB array (H, W, 3), uint8. It is seen with its long side at `base_size` times each scale, padded as in
training, and, with `flip_pairs`, mirrored too; the softmax of every view is brought to the photo's own size and averaged.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import config
from augment import MEAN_COLOUR, flip_order, pad, resize_photo, scaled_size
from config import Config
from datasets import LabelSet
from engine import checkpoint
from engine.errors import UserError
from engine.processes import pick_device
from files import weights
from model import SCHNet, build_model

# What may be said anew of a trained network: where files lie, what it is shown, how it computes. The rest it was built of.
ANEW = {*config.CUSTOM, *"dataset data_root synthetic_size synthetic_train synthetic_val crop_size base_size workers "
                         "sam_weights clip_weights vocab ftm_residual ftm_scale_logits srm_sites precision "
                         "tta_scales".split()}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
CPU_STRIP, GPU_STRIP = 2 << 20, 256 << 20          # bytes: probabilities are made in strips of rows, so that no photo
#                                                    is too large; in a CPU's cache they also take a third of the time


# ----------------------------------------------------------------------------------------------------------------------
# the network of a run

def load_run(run: str | Path | None = None, overrides: Sequence[str] = (),
             device: str | torch.device = "") -> tuple[SCHNet, LabelSet, Path]:
    """A trained network ready for `predict`, its label set, and the checkpoint it came from. `run` None: the newest run.

    On a CPU the network runs in fp32 unless `precision=bf16` is among the overrides: few CPUs have bf16 units.
    """
    path = checkpoint.find(run)
    target = device if isinstance(device, torch.device) else pick_device(device)
    if target.type == "cpu" and "precision" not in config.parse_overrides(overrides):
        overrides = [*overrides, "precision=fp32"]
    model, labels = restore(checkpoint.read(path), path, overrides)
    store_frozen(model, model.cfg.precision)
    return model.to(target), labels, path


def restore(content: dict, path: Path, overrides: Sequence[str] = ()) -> tuple[SCHNet, LabelSet]:
    """The network of a checkpoint, in evaluation mode on the CPU. `overrides` (`key=value`): of the keys in `ANEW`."""
    anew, before = config.parse_overrides(overrides), config.from_dict(content["config"], source=str(path))
    cfg = dataclasses.replace(before, **anew)
    for key in anew:
        own = key in ("classes", "palette", "flip_pairs") and cfg.dataset == before.dataset
        if getattr(cfg, key) != getattr(before, key) and (own or key not in ANEW):
            raise UserError(f"{key}: {path} was trained with {getattr(before, key)!r}, which cannot be changed any more")
    labels = LabelSet(**content["labels"])
    for key, expected in content["official"].items():
        file = getattr(cfg, key)
        if not Path(file).exists():
            raise UserError(f"{path} needs {file}: run `python download.py`, or say where it is with {key}=PATH")
        if weights.sha256(file) != expected:
            raise UserError(f"{path} was trained on another {file} (its SHA-256 starts with {expected[:12]})")
    state = content["model"]
    random = {key: "" for key in ("sam_weights", "clip_weights") if key not in content["official"]}  # all is in here
    text = (state["f_txt"], state["sim_scale"]) if cfg.srm else None
    model = build_model(dataclasses.replace(cfg, **random), labels.classes, text)
    checkpoint.load_state(model, state, path)
    return model.eval(), labels


def autocast(device: torch.device, precision: str):
    dtype = DTYPES[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def store_frozen(model: nn.Module, precision: str):
    """Keep frozen linear layers' weights as `autocast` would round them at every use: the same results to the last bit,
    half the memory of the weights, and no second copy of them for the backward pass. For use under that autocast only."""
    if DTYPES[precision] is not None:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and parameter.ndim == 2 and name.endswith("weight"):      # in_proj_weight too
                parameter.data = parameter.data.to(DTYPES[precision])


# ----------------------------------------------------------------------------------------------------------------------
# from a photo to probabilities

def canvas(image: np.ndarray, cfg: Config, scale: float) -> tuple[np.ndarray, tuple[int, int]]:
    """The photo (H, W, 3) as the network sees it at `scale`, and the photo's size in it.

    Its long side is base_size * scale; at the bottom and right it is padded to what training saw, in multiples of 32
    (480: 384, 480, 608, 736).
    """
    size = scaled_size(image.shape[:2], cfg.base_size * scale)
    sides = [-(-max(side, round(crop * scale)) // 32) * 32 for side, crop in zip(size, cfg.crop_size)]
    return pad(resize_photo(image, size), sides, MEAN_COLOUR), size


def views(model: nn.Module, images: list[np.ndarray], scales: Sequence[float],
          flip_pairs: Sequence[tuple[int, int]] | None) -> list[list[Tensor]]:
    """Per image a list of logits (K, h, w): one for each scale and, unless `flip_pairs` is None, one mirrored back."""
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
                    flipped = model(torch.stack([_mirror(x, size[1]) for x, (_, _, size) in zip(batch, group)]))
                    logits.append(flipped[:, flip_order(flipped.shape[1], flip_pairs)])
            for k, (n, _, (h, w)) in enumerate(group):
                result[n].append(logits[0][k, :, :h, :w].float())
                if flip_pairs is not None:
                    result[n].append(logits[1][k, :, :h, :w].float().flip(-1))
    return result


def _mirror(image: Tensor, width: int) -> Tensor:
    """The photo mirrored within its own width; the padding stays on the right."""
    return torch.cat([image[..., :width].flip(-1), image[..., width:]], -1)


def probabilities(logits: list[Tensor], size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """(K, bottom - top, W), these rows of the photo: softmax at its own size (bilinear), averaged over the views.

    Down by hand: of rows that are cut out first, `F.interpolate` would make others at the edges of a strip.
    """
    total = 0
    for view in logits:
        h = view.shape[1]
        y = ((torch.arange(top, bottom, device=view.device) + 0.5) * (h / size[0]) - 0.5).clamp(0, h - 1)
        above = y.floor().long()
        weight = (y - above)[:, None]
        rows = torch.lerp(view[:, above], view[:, (above + 1).clamp(max=h - 1)], weight)     # (K, rows, w)
        rows = F.interpolate(rows[None], (bottom - top, size[1]), mode="bilinear", align_corners=False)[0]
        total = total + rows.softmax(0)
    return total / len(logits)


def strips(logits: list[Tensor], size: tuple[int, int],
           merge: Sequence[Sequence[int]] | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(top row, probabilities (K, rows, W), labels uint8 (rows, W)) of a photo of any size, from the top down.

    With `merge` the classes are others, each the sum of the network's labels that it lists (classmap.py).
    """
    height, width = size
    limit = CPU_STRIP if logits[0].device.type == "cpu" else GPU_STRIP
    rows = max(1, limit // (4 * width * logits[0].shape[0]))
    for top in range(0, height, rows):
        strip = probabilities(logits, size, top, min(top + rows, height))
        if merge is not None:
            # Added before the maximum is taken: what is 40 % skirt, 35 % shirt and 25 % coat is an upper garment. The
            # label alone, renamed afterwards, would say skirt.
            strip = torch.stack([strip[list(sources)].sum(0) for sources in merge])
        yield top, strip, strip.max(0).indices.to(torch.uint8)           # on a CPU argmax(0) takes four times as long


@torch.inference_mode()
def predict(model: nn.Module, image: np.ndarray, scales: Sequence[float] = (1.0,),
            flip_pairs: Sequence[tuple[int, int]] | None = None,
            merge: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Class probabilities (K, H, W) of an RGB photo (H, W, 3) uint8, at its own size.

    `scales` and `flip_pairs` (None: no flip; (): a flip without left and right) are §4.4's test-time augmentation;
    `merge`: as for `strips`.
    """
    logits = views(model, [image], scales, flip_pairs)[0]
    result = logits[0].new_empty(len(logits[0] if merge is None else merge), *image.shape[:2])
    for top, strip, _ in strips(logits, image.shape[:2], merge):
        result[:, top:top + strip.shape[1]] = strip
    return result


@torch.inference_mode()
def predict_labels(model: nn.Module, images: list[np.ndarray], scales: Sequence[float] = (1.0,),
                   flip_pairs: Sequence[tuple[int, int]] | None = None,
                   merge: Sequence[Sequence[int]] | None = None) -> list[np.ndarray]:
    """Label maps (H, W) uint8 of RGB photos of any sizes, in bounded memory."""
    result = []
    for image, logits in zip(images, views(model, images, scales, flip_pairs)):
        label = np.empty(image.shape[:2], np.uint8)        # filled in: kept, the small parts would tear up the memory
        for top, _, part in strips(logits, label.shape, merge):
            label[top:top + len(part)] = part.cpu().numpy()
        result.append(label)
    return result


def read_ahead(read: Callable, items: Iterable, threads: int) -> Iterator[tuple]:
    """(item, read(item)) in this order; files are decoded by threads while the network works."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        items = iter(items)
        waiting = deque((item, pool.submit(read, item)) for item in islice(items, threads + 1))
        while waiting:
            item, future = waiting.popleft()
            waiting.extend((item, pool.submit(read, item)) for item in islice(items, 1))
            yield item, future.result()
