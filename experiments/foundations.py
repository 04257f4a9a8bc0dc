"""Trains a small CLIP and a small SAM on drawn people, and saves them in files like the official ones.

    python experiments/foundations.py                      # clip.pt, sam.pth in runs/table6/foundations

The drawings differ from those that SCHNet is trained and scored on.
  * CLIP: image and text tower are trained contrastively on small random crops. The sentences are the class prompts
    (`Config.prompt`); an image matches those of the classes it shows.
  * SAM: predicts the mask of the part at a point, without class names. A part is a connected region of one label. The
    file also holds the small mask decoder, which no program loads.
The proportions are the official ones: SAM is a third wider than CLIP and twice as deep, with windowed attention in all
layers but the last of each quarter. Quality on held-out drawings is saved in clip.json and sam.json. Existing files are
reused.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from runner import ROOT
from timing import processor
from torch import Tensor, nn
from tqdm import tqdm

import clip_vit
import sam_vit
from clip_vit import CLIP, load_clip
from config import Config, load_config, user_path
from datasets import DrawnSet, open_split, train_loader
from errors import UserError, run_program
from files.atomic import atomic_write, mark_folder, write_text
from files.labels import label_set
from sam_vit import SAMViT, load_sam
from tokenizer import tokenize
from train import get_lr

#                              dim  depth heads window grid
sam_vit.SIZES["miniature"] = (128, 8,    2,    4,     8)
#                               dim depth heads grid embed | text: dim  depth heads
clip_vit.SIZES["miniature"] = (96, 4,    2,    4,   64,            64,  2,    1)
DATA = ["sam=miniature", "clip=miniature", "clip_taps=[0, 1, 2, 3]", "clip_activation=quick_gelu", "dataset=synthetic",
        "synthetic_size=[128, 64]", "crop_size=[128, 64]", "base_size=128", "synthetic_val=200", "workers=0",
        "precision=fp32"]
CLIP_RUN = ["iters=2000", "batch_size=256", "lr=1e-3", "warmup_iters=50", "crop_size=[32, 32]",
            "scale_range=[0.75, 1.5]", "synthetic_train=8000"]
SAM_RUN = ["iters=1500", "batch_size=8", "lr=1e-3", "warmup_iters=50", "scale_range=[1.0, 1.5]", "synthetic_train=4000"]
QUICK = ["iters=5", "warmup_iters=1", "synthetic_train=64"]
CLIP_FILE, SAM_FILE = "clip.pt", "sam.pth"
SEED = 1_000_000                                           # of the drawings: SCHNet is trained on others
POINTS = 32                                                # point prompts per image
VISIBLE = 12                                               # an image shows a class from this many pixels on


def vocabulary() -> str:
    """The path of CLIP's vocabulary: download.py's file, or the copy in open_clip (requirements-dev.txt)."""
    downloaded, package = ROOT / Config().vocab, importlib.util.find_spec("open_clip")
    path = downloaded if downloaded.exists() or package is None else Path(package.origin).with_name(downloaded.name)
    if not path.exists():
        raise UserError(f"{downloaded}: not found; `python download.py {downloaded.name}` downloads it")
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# training

def fit(module: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], cfg: Config, name: str) -> float:
    """Trains `module` on batches (image (B, 3, H, W) in [0, 1], label (B, H, W)); returns the CPU seconds it took."""
    start = time.process_time()
    decays = {decay: [p for p in module.parameters() if (p.ndim > 1) == decay] for decay in (True, False)}
    optimizer = torch.optim.AdamW([{"params": part, "weight_decay": cfg.weight_decay * decay}
                                   for decay, part in decays.items()], betas=(0.9, 0.98), fused=True)
    pairs = open_split(cfg, "train")
    pairs.read = functools.cache(pairs.read)               # drawing an image is slower than a training step
    batches = train_loader(cfg, pairs)
    for it in tqdm(range(cfg.iters), desc=name, unit="it", mininterval=0.5 if sys.stderr.isatty() else 30):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(it, cfg)
        image, label, _ = next(batches)
        optimizer.zero_grad()
        loss_of(image / 255, label).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return time.process_time() - start


def images_of(pairs: DrawnSet) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples in batches: image (B, 3, H, W) in [0, 1] and label (B, H, W)."""
    for first in range(0, len(pairs), 20):
        images, labels = zip(*(pairs.read(i) for i in range(first, min(first + 20, len(pairs)))))
        yield (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255, torch.from_numpy(np.stack(labels)))


# ----------------------------------------------------------------------------------------------------------------------
# CLIP

def prompts(cfg: Config) -> Tensor:
    """Token ids (K, 77) of the class prompts, as in model.py."""
    names = [name.lower().replace("-", " ") for name in label_set(cfg).classes]
    return tokenize([cfg.prompt.replace("{class}", name) for name in names], cfg.vocab)


def presence(label: Tensor, classes: int) -> Tensor:
    """Which classes each image shows: label (B, H, W) -> (B, K) of 0 and 1."""
    counts = torch.stack([torch.bincount(x.flatten().long(), minlength=256)[:classes] for x in label])
    return (counts >= VISIBLE).float()


def contrastive_loss(clip: CLIP, tokens: Tensor, image: Tensor, label: Tensor) -> Tensor:
    """CLIP's symmetric loss, averaged over the sentences that match an image (images that match a sentence)."""
    logits = clip.logit_scale.clamp(max=math.log(100)).exp() * clip.visual(image)[0] @ clip.encode_text(tokens).T
    match = presence(label, len(tokens))                                                    # (B, K)
    directions = [(match, logits), (match.T, logits.T)]
    return sum(-(m / m.sum(1, keepdim=True).clamp(min=1) * x.log_softmax(1)).sum(1).mean() for m, x in directions) / 2


@torch.no_grad()
def retrieval(clip: CLIP, cfg: Config) -> dict[str, float]:
    """Mean average precision of retrieving the held-out drawings that show a class by its sentence; `chance`: in random
    order."""
    f_txt, cosines, matches = clip.encode_text(prompts(cfg)), [], []
    for image, label in images_of(open_split(cfg, "val")):
        cosines.append(clip.visual(image)[0] @ f_txt.T)
        matches.append(presence(label, len(f_txt)))
    cosines, matches = torch.cat(cosines).T, torch.cat(matches).T                        # (K, N)
    mixed = (matches.sum(1) > 0) & (matches.sum(1) < matches.shape[1])            # of the others, any order is perfect
    ranked = matches.gather(1, cosines.argsort(1, descending=True))
    precision = ranked.cumsum(1) / torch.arange(1, ranked.shape[1] + 1)
    average = (precision * ranked).sum(1)[mixed] / ranked.sum(1)[mixed]
    return {"retrieval": average.mean().item(), "chance": matches.mean(1)[mixed].mean().item()}


def make_clip(path: Path, cfg: Config) -> dict:
    clip, tokens = CLIP(*clip_vit.SIZES[cfg.clip], cfg.clip_taps), prompts(cfg)
    seconds = fit(clip, lambda image, label: contrastive_loss(clip, tokens, image, label), cfg, "clip")
    with torch.no_grad():
        clip.logit_scale.clamp_(max=math.log(100))
    save(path, clip.state_dict())
    return {"seconds": seconds, **retrieval(clip.eval(), cfg), "scale": clip.logit_scale.exp().item()}


# ----------------------------------------------------------------------------------------------------------------------
# SAM

class PointDecoder(nn.Module):
    """Predicts masks from points: the features at a point give the weights of a pixel classifier at stride 4."""

    def __init__(self, dim: int, width: int = 32):
        super().__init__()
        self.upscale = nn.Sequential(nn.ConvTranspose2d(dim, 2 * width, 2, 2), nn.GELU(),
                                     nn.ConvTranspose2d(2 * width, width, 2, 2), nn.GELU(),
                                     nn.Conv2d(width, width, 3, padding=1))
        self.query = nn.Sequential(nn.Linear(dim + width + 2, 4 * width), nn.GELU(), nn.Linear(4 * width, width + 1))

    def forward(self, x: Tensor, points: Tensor) -> Tensor:
        """Tokens (B, h, w, C), points (B, P, 2) as x, y in [-1, 1] -> logits (B, P, 4h, 4w)."""
        x = x.permute(0, 3, 1, 2)
        pixels = self.upscale(x)                                                         # (B, d, 4h, 4w)
        at = [F.grid_sample(f, points[:, None], padding_mode="border", align_corners=False)[:, :, 0].transpose(1, 2)
              for f in (x, pixels)]                                                      # (B, P, .)
        query = self.query(torch.cat([*at, points], -1))                                 # (B, P, d + 1)
        return torch.einsum("bpd,bdhw->bphw", query[..., :-1], pixels) + query[..., -1:, None]


def parts(label: np.ndarray) -> np.ndarray:
    """Numbers the connected regions of each label from 0; ignored pixels are -1."""
    numbers, count = np.full(label.shape, -1, np.int32), 0
    for k in np.unique(label[label != 255]):
        found, regions = cv2.connectedComponents((label == k).astype(np.uint8), connectivity=4)
        numbers[regions > 0] = regions[regions > 0] - 1 + count
        count += found - 1
    return numbers


def sample_points(label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random points, all parts equally likely, and the masks of their parts: (B, P, 2), (B, P, H, W)."""
    points, masks = [], []
    for numbers in map(parts, label.numpy()):
        sizes = np.bincount(numbers[numbers >= 0])
        for part in rng.choice(np.flatnonzero(sizes >= VISIBLE), POINTS):
            y, x = np.divmod(rng.choice(np.flatnonzero(numbers == part)), numbers.shape[1])
            points.append(((x + 0.5) / numbers.shape[1] * 2 - 1, (y + 0.5) / numbers.shape[0] * 2 - 1))
            masks.append(numbers == part)
    masks = torch.from_numpy(np.stack(masks)).float()
    return (torch.tensor(points, dtype=torch.float32).view(len(label), POINTS, 2),
            masks.view(len(label), POINTS, *label.shape[1:]))


def mask_loss(sam: SAMViT, decoder: PointDecoder, rng: np.random.Generator, image: Tensor, label: Tensor) -> Tensor:
    """Pixel cross-entropy plus Dice loss (SAM: focal loss plus Dice loss)."""
    points, masks = sample_points(label, rng)
    logits, masks = decoder(sam(image)[-1], points), F.avg_pool2d(masks, 4)
    found = logits.sigmoid()
    dice = 1 - (2 * (found * masks).sum((2, 3)) + 1) / (found.sum((2, 3)) + masks.sum((2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + dice.mean()


@torch.no_grad()
def mask_iou(sam: SAMViT, decoder: PointDecoder, cfg: Config) -> float:
    """Mean IoU of the masks predicted from points on held-out drawings."""
    rng, ious = np.random.default_rng(0), []
    for image, label in images_of(open_split(cfg, "val")):
        points, masks = sample_points(label, rng)
        predicted = F.interpolate(decoder(sam(image)[-1], points), masks.shape[-2:], mode="bilinear") > 0
        ious.append((predicted & (masks > 0)).sum((2, 3)) / (predicted | (masks > 0)).sum((2, 3)))
    return torch.cat(ious).mean().item()


def make_sam(path: Path, cfg: Config) -> dict:
    sam, rng = SAMViT(*sam_vit.SIZES[cfg.sam]), np.random.default_rng(0)
    decoder = PointDecoder(sam.dim)
    both = nn.ModuleDict({"image_encoder": sam, "mask_decoder": decoder})
    untrained = mask_iou(sam, decoder, cfg)
    seconds = fit(both, lambda image, label: mask_loss(sam, decoder, rng, image, label), cfg, "sam")
    save(path, both.state_dict())
    return {"seconds": seconds, "mask_iou": mask_iou(sam, decoder, cfg), "untrained": untrained}


def save(path: Path, tensors: dict[str, Tensor]):
    with atomic_write(path) as part:
        torch.save(tensors, part)


# ----------------------------------------------------------------------------------------------------------------------
# linear probe

@torch.no_grad()
def r_squared(features: Callable[[Tensor], Tensor], cfg: Config, fitted: int = 600) -> float:
    """R^2 on held-out drawings of a ridge regression from `features` (image (B, 3, H, W) -> (B, h, w, C)) to each
    class's share of a patch, averaged over the classes."""
    count, samples = len(label_set(cfg).classes), []
    for pairs in (open_split(dataclasses.replace(cfg, synthetic_train=fitted), "train"), open_split(cfg, "val")):
        x, y = zip(*((features(image).flatten(0, 2), shares(label, count)) for image, label in images_of(pairs)))
        samples.append((torch.cat(x).double(), torch.cat(y).double()))
    (x, y), (x_new, y_new) = samples
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_new = ((v - mean) / std for v in (x, x_new))
    weights = torch.linalg.solve(x.T @ x + len(x) * 1e-3 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - y.mean(0)))
    error = (y_new - y.mean(0) - x_new @ weights).square().sum(0)
    spread = (y_new - y.mean(0)).square().sum(0)
    return (1 - error / spread)[spread > 0].mean().item()


def shares(label: Tensor, classes: int) -> Tensor:
    """Each class's share of each 16 x 16 patch: label (B, H, W) -> (B h w, K)."""
    one_hot = F.one_hot(label.long().clamp(max=classes), classes + 1)[..., :classes].permute(0, 3, 1, 2).float()
    return F.avg_pool2d(one_hot, 16).permute(0, 2, 3, 1).flatten(0, 2)


def position(image: Tensor) -> Tensor:
    """One-hot features of a patch's position."""
    h, w = image.shape[2] // 16, image.shape[3] // 16
    return torch.eye(h * w).view(1, h, w, h * w).expand(len(image), -1, -1, -1)


def probe(folder: Path) -> dict[str, float]:
    """R^2 of both encoders, of the same encoders with random weights, and of the position alone."""
    cfg = load_config(None, [*DATA, "vocab=", "sam_weights=", "clip_weights="])
    torch.manual_seed(0)
    sams = {"SAM": load_sam(folder / SAM_FILE, cfg.sam), "SAM, random": SAMViT(*sam_vit.SIZES[cfg.sam])}
    clips = {"CLIP": load_clip(folder / CLIP_FILE, cfg.clip_taps, cfg.clip, cfg.clip_activation),
             "CLIP, random": CLIP(*clip_vit.SIZES[cfg.clip], cfg.clip_taps)}
    features = {name: lambda image, sam=sam: sam(image)[-1] for name, sam in sams.items()}
    features |= {name: lambda image, clip=clip: clip.visual(image)[1][-1] for name, clip in clips.items()}
    features["position of the patch"] = position
    return {name: r_squared(function, cfg) for name, function in features.items()}


# ----------------------------------------------------------------------------------------------------------------------
# the program

def make(folder: Path, quick: bool = False) -> dict[str, dict]:
    """Trains both encoders into `folder` unless they exist; returns the cost and quality of each."""
    mark_folder(folder)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    records = {}
    for name, file, run, train in (("clip", CLIP_FILE, CLIP_RUN, make_clip), ("sam", SAM_FILE, SAM_RUN, make_sam)):
        settings, record = [*DATA, *run, *(QUICK if quick else []), f"seed={SEED}"], folder / f"{name}.json"
        if not record.exists():
            cfg = load_config(None, [*settings, f"vocab={vocabulary()}", "sam_weights=", "clip_weights="])
            torch.manual_seed(0)
            found = train(folder / file, cfg)
            write_text(record, json.dumps({"machine": f"{processor()}, torch {torch.__version__}"} | found
                                          | {"settings": settings}, indent=1))
        records[name] = json.loads(record.read_text(encoding="utf-8"))
        if records[name]["settings"] != settings:
            raise UserError(f"{record}: was made with other settings; choose another --out")
    return records


def summary(records: dict[str, dict]) -> str:
    clip, sam = records["clip"], records["sam"]
    return (f"foundations: CLIP {clip['seconds']:.0f} s of CPU time, retrieval {100 * clip['retrieval']:.1f} (chance "
            f"{100 * clip['chance']:.1f}), scale {clip['scale']:.1f}; SAM {sam['seconds']:.0f} s, mask IoU "
            f"{100 * sam['mask_iou']:.1f} (untrained {100 * sam['untrained']:.1f})")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=user_path, default=Path("runs/table6/foundations"))
    parser.add_argument("--quick", action="store_true", help="5 steps each, to test this script")
    args = parser.parse_args(argv)
    records = make(args.out, args.quick)
    print(f"{records['clip']['machine']}, one thread\n{summary(records)}\n"
          "R^2 of a linear map from an encoder's tokens to the classes' shares of a patch, in percent:")
    for name, value in probe(args.out).items():
        print(f"{name:23}{100 * value:6.1f}")


if __name__ == "__main__":
    run_program(main)
