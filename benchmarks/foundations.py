"""Two small foundations, made the way CLIP and SAM were, and saved as files with the official names.

    python benchmarks/foundations.py                       # clip.pt, sam.pth in runs/table6/foundations
    python benchmarks/foundations.py clip_dim=128          # other sizes: any key of the config

Both see drawn people (synthetic), other ones than those SCHNet is later trained or scored on.
  * CLIP matches pictures with sentences: image and text tower are trained together, contrastively. The sentences are
    the class prompts of `config.prompt`; a picture's are those of the classes in it. Random crops, so that an arm may be
    in the picture without the other one.
  * SAM gives, for a point, the mask of the part it lies on; it never hears a class name. A part is a connected region of
    one label. A small decoder reads the point; it is kept in the file, under SAM's name for it, and nobody loads it.
The sizes have the official ones' relations: SAM is a third wider than CLIP and twice as deep, with windows on all layers but
the last of each quarter; CLIP is trained on smaller pictures than it later sees. What they have learnt is measured on
held-out figures, and stands in clip.json and sam.json. What is made is kept: a second call trains nothing.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from timing import processor
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from clip_vit import CLIP, load_clip  # noqa: E402
from config import Config, load_config, user_path  # noqa: E402
from datasets import DrawnSet, label_set, open_split, train_loader  # noqa: E402
from errors import UserError, run_program  # noqa: E402
from files.atomic import atomic_write, write_text  # noqa: E402
from sam_vit import SAMViT, load_sam  # noqa: E402
from tokenizer import tokenize  # noqa: E402
from train import get_lr  # noqa: E402

SIZES = ["sam_dim=128", "sam_depth=8", "sam_heads=2", "sam_window=4", "sam_grid=8", "clip_dim=96", "clip_depth=4",
         "clip_heads=2", "clip_grid=4", "clip_taps=[0, 1, 2, 3]", "clip_embed=64", "text_dim=64", "text_depth=2",
         "text_heads=1"]
DATA = ["dataset=synthetic", "synthetic_size=[128, 64]", "crop_size=[128, 64]", "base_size=128", "synthetic_val=200",
        "workers=0", "precision=fp32"]
CLIP_RUN = ["iters=6000", "batch_size=256", "lr=1e-3", "warmup_iters=50", "crop_size=[32, 32]", "scale_range=[0.75, 1.5]",
            "synthetic_train=16000"]
SAM_RUN = ["iters=2500", "batch_size=8", "lr=1e-3", "warmup_iters=50", "scale_range=[1.0, 1.5]", "synthetic_train=4000"]
FILES = ("clip.pt", "sam.pth")
FIRST_SEED = 1_000_000                                     # figures that no training of SCHNet sees
POINTS = 32                                                # prompts per picture
SEEN = 12                                                  # pixels of a class that a picture must show to be said to


def vocabulary() -> str:
    """CLIP's merges: what download.py fetched, or the copy that open_clip (requirements-dev.txt) brings along."""
    mine, package = ROOT / Config().vocab, importlib.util.find_spec("open_clip")
    found = mine if mine.exists() or package is None else Path(package.origin).with_name(mine.name)
    if not found.exists():
        raise UserError(f"{mine}: no such file; `python download.py` fetches CLIP's vocabulary")
    return str(found)


# ------------------------------------------------------------------------------------------------------------ the loop

def fit(module: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], cfg: Config, tick: Callable[[], None]) -> float:
    """Train `module` on batches (image (B, 3, H, W) in [0, 1], label (B, H, W)); the processor's seconds it took."""
    begun = time.process_time()
    decays = {decay: [p for p in module.parameters() if (p.ndim > 1) == decay] for decay in (True, False)}
    optimizer = torch.optim.AdamW([{"params": part, "weight_decay": cfg.weight_decay * decay}
                                   for decay, part in decays.items()], betas=(0.9, 0.98), fused=True)
    batches = train_loader(cfg, open_split(cfg, "train"))
    for it in range(cfg.iters):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(it, cfg)
        image, label, _ = next(batches)
        optimizer.zero_grad()
        loss_of(image / 255, label).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        tick()
    return time.process_time() - begun


def held_out(cfg: Config, batch: int = 20) -> Iterator[tuple[Tensor, Tensor]]:
    return pictures(open_split(cfg, "val"), batch)


def pictures(pairs: DrawnSet, batch: int = 20) -> Iterator[tuple[Tensor, Tensor]]:
    """RGB in [0, 1], (B, 3, H, W), and label (B, H, W), of a whole set."""
    for start in range(0, len(pairs), batch):
        images, labels = zip(*(pairs.read(i) for i in range(start, min(start + batch, len(pairs)))))
        yield (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255, torch.from_numpy(np.stack(labels)))


# ---------------------------------------------------------------------------------------------------------------- CLIP

def small_clip(cfg: Config) -> CLIP:
    return CLIP(cfg.clip_dim, cfg.clip_depth, cfg.clip_heads, cfg.clip_grid, taps=cfg.clip_taps, embed=cfg.clip_embed,
                text_dim=cfg.text_dim, text_depth=cfg.text_depth, text_heads=cfg.text_heads)


def prompts(cfg: Config) -> Tensor:
    """The tokens of the sentences that model.py makes of the class names, (K, 77)."""
    names = [name.lower().replace("-", " ") for name in label_set(cfg).classes]
    return tokenize([cfg.prompt.replace("{class}", name) for name in names], cfg.vocab)


def shown(label: Tensor, classes: int) -> Tensor:
    """Which classes a picture shows: label (B, H, W) -> (B, K) of 0 and 1."""
    counts = torch.stack([torch.bincount(x.flatten().long(), minlength=256)[:classes] for x in label])
    return (counts >= SEEN).float()


def contrast(clip: CLIP, tokens: Tensor, image: Tensor, label: Tensor) -> Tensor:
    """CLIP's loss, both ways. A picture has several sentences and a sentence several pictures: the mean over them."""
    logits = clip.logit_scale.clamp(max=math.log(100)).exp() * clip.encode_image(image)[0] @ clip.encode_text(tokens).T
    match = shown(label, len(tokens))                                                    # (B, K)
    ways = [(match, logits), (match.T, logits.T)]
    return sum(-(m / m.sum(1, keepdim=True).clamp(min=1) * x.log_softmax(1)).sum(1).mean() for m, x in ways) / 2


@torch.no_grad()
def retrieval(clip: CLIP, cfg: Config) -> dict[str, float]:
    """Average precision of finding the held-out figures that show a class by its sentence, the mean over the classes;
    `chance` is what a random order gets."""
    f_txt, cosines, matches = clip.encode_text(prompts(cfg)), [], []
    for image, label in held_out(cfg):
        cosines.append(clip.encode_image(image)[0] @ f_txt.T)
        matches.append(shown(label, len(f_txt)))
    cosines, matches = torch.cat(cosines).T, torch.cat(matches).T                        # (K, N)
    some = (matches.sum(1) > 0) & (matches.sum(1) < matches.shape[1])                    # else any order is perfect
    ranked = matches.gather(1, cosines.argsort(1, descending=True))
    precision = ranked.cumsum(1) / torch.arange(1, ranked.shape[1] + 1)
    found = (precision * ranked).sum(1)[some] / ranked.sum(1)[some]
    return {"retrieval": found.mean().item(), "chance": matches.mean(1)[some].mean().item()}


def make_clip(path: Path, cfg: Config, rng: np.random.Generator, tick: Callable[[], None]) -> dict:
    clip, tokens = small_clip(cfg), prompts(cfg)
    seconds = fit(clip, lambda image, label: contrast(clip, tokens, image, label), cfg, tick)
    with torch.no_grad():
        clip.logit_scale.clamp_(max=math.log(100))
    save(path, clip.state_dict())
    return {"seconds": seconds, **retrieval(clip.eval(), cfg),
            "scale": clip.logit_scale.exp().item()}


# ----------------------------------------------------------------------------------------------------------------- SAM

class PointDecoder(nn.Module):
    """Masks of points: the features at a point make the weights of a classifier of pixels at stride 4."""

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
    """A number for each connected region of one label, from 0; -1 where nothing is labelled."""
    numbers, count = np.full(label.shape, -1, np.int32), 0
    for k in np.unique(label[label != 255]):
        found, regions = cv2.connectedComponents((label == k).astype(np.uint8), connectivity=4)
        numbers[regions > 0] = regions[regions > 0] - 1 + count
        count += found - 1
    return numbers


def ask(label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Points on parts, each part as likely as another, and the parts' masks: (B, P, 2), (B, P, H, W)."""
    points, masks = [], []
    for numbers in map(parts, label.numpy()):
        sizes = np.bincount(numbers[numbers >= 0])
        for part in rng.choice(np.flatnonzero(sizes >= SEEN), POINTS):
            y, x = np.divmod(rng.choice(np.flatnonzero(numbers == part)), numbers.shape[1])
            points.append(((x + 0.5) / numbers.shape[1] * 2 - 1, (y + 0.5) / numbers.shape[0] * 2 - 1))
            masks.append(numbers == part)
    masks = torch.from_numpy(np.stack(masks)).float()
    return (torch.tensor(points, dtype=torch.float32).view(len(label), POINTS, 2),
            masks.view(len(label), POINTS, *label.shape[1:]))


def mask_loss(sam: SAMViT, decoder: PointDecoder, rng: np.random.Generator, image: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of pixels and the Dice loss of masks, as in SAM's training."""
    points, masks = ask(label, rng)
    logits, masks = decoder(sam(image)[-1], points), F.avg_pool2d(masks, 4)
    found = logits.sigmoid()
    dice = 1 - (2 * (found * masks).sum((2, 3)) + 1) / (found.sum((2, 3)) + masks.sum((2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + dice.mean()


@torch.no_grad()
def mask_iou(sam: SAMViT, decoder: PointDecoder, cfg: Config) -> float:
    """Mean IoU of the masks of points on held-out figures."""
    rng, ious = np.random.default_rng(0), []
    for image, label in held_out(cfg):
        points, masks = ask(label, rng)
        found = F.interpolate(decoder(sam(image)[-1], points), masks.shape[-2:], mode="bilinear") > 0
        ious.append((found & (masks > 0)).sum((2, 3)) / (found | (masks > 0)).sum((2, 3)))
    return torch.cat(ious).mean().item()


def make_sam(path: Path, cfg: Config, rng: np.random.Generator, tick: Callable[[], None]) -> dict:
    sam = SAMViT(cfg.sam_dim, cfg.sam_depth, cfg.sam_heads, cfg.sam_window, cfg.sam_grid)
    decoder = PointDecoder(cfg.sam_dim)
    both = nn.ModuleDict({"image_encoder": sam, "mask_decoder": decoder})
    untrained = mask_iou(sam, decoder, cfg)
    seconds = fit(both, lambda image, label: mask_loss(sam, decoder, rng, image, label), cfg, tick)
    save(path, both.state_dict())
    return {"seconds": seconds, "mask_iou": mask_iou(sam, decoder, cfg), "untrained": untrained}


# ------------------------------------------------------------------------------------------- what an encoder has learnt

@torch.no_grad()
def explained(features: Callable[[Tensor], Tensor], cfg: Config, fitted: int = 600) -> float:
    """How much of what a patch holds its tokens tell a linear map: each class's share of the pixels of a patch, predicted
    by ridge regression from `features`, image (B, 3, H, W) -> (B, h, w, C). R^2 on held-out figures, mean of the classes."""
    count, samples = len(label_set(cfg).classes), []
    for batches in (pictures(open_split(dataclasses.replace(cfg, synthetic_train=fitted), "train")), held_out(cfg)):
        x, y = zip(*((features(image).flatten(0, 2), shares(label, count)) for image, label in batches))
        samples.append((torch.cat(x).double(), torch.cat(y).double()))
    (x, y), (x_new, y_new) = samples
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_new = ((v - mean) / std for v in (x, x_new))
    weights = torch.linalg.solve(x.T @ x + len(x) * 1e-3 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - y.mean(0)))
    error = (y_new - y.mean(0) - x_new @ weights).square().sum(0)
    spread = (y_new - y.mean(0)).square().sum(0)
    return (1 - error / spread)[spread > 0].mean().item()


def shares(label: Tensor, classes: int) -> Tensor:
    """The part of each 16 x 16 patch that each class takes: label (B, H, W) -> (B h w, K)."""
    one_hot = F.one_hot(label.long().clamp(max=classes), classes + 1)[..., :classes].permute(0, 3, 1, 2).float()
    return F.avg_pool2d(one_hot, 16).permute(0, 2, 3, 1).flatten(0, 2)


def place(image: Tensor) -> Tensor:
    """Features that say where a patch is and nothing else."""
    h, w = image.shape[2] // 16, image.shape[3] // 16
    return torch.eye(h * w).view(1, h, w, h * w).expand(len(image), -1, -1, -1)


def probe(folder: Path, changes: Sequence[str] = ()) -> dict[str, float]:
    """`explained` for both foundations, the same encoders with random weights, the place of the patch, and its colours."""
    cfg = load_config(None, [*DATA, *SIZES, *changes, "vocab=", "sam_weights=", "clip_weights="])
    torch.manual_seed(0)
    sam, clip = SAMViT(cfg.sam_dim, cfg.sam_depth, cfg.sam_heads, cfg.sam_window, cfg.sam_grid), small_clip(cfg)
    encoders = {"SAM": load_sam(str(folder / "sam.pth")), "SAM, random": sam,
                "CLIP": load_clip(folder / "clip.pt", cfg.clip_taps, cfg.clip_heads, cfg.text_heads), "CLIP, random": clip}
    features = {name: (lambda image, e=encoder: e(image)[-1]) if isinstance(encoder, SAMViT) else
                (lambda image, e=encoder: e.encode_image(image)[1][-1]) for name, encoder in encoders.items()}
    features |= {"place": place, "pixels": lambda image: torch.cat(
        [F.unfold(image, 16, stride=16).transpose(1, 2).unflatten(1, (image.shape[2] // 16, -1)), place(image)], -1)}
    return {name: explained(of, cfg) for name, of in features.items()}


# ------------------------------------------------------------------------------------------------------------- program

def save(path: Path, tensors: dict[str, Tensor]):
    with atomic_write(path) as part:
        torch.save(tensors, part)


def make(folder: Path, seed: int = 0, changes: Sequence[str] = (), iters: Sequence[int] = (0, 0)) -> dict:
    """Both files in `folder`; what each cost and can do. `iters`: of CLIP, of SAM, if not the usual ones."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, file, run, train, count in zip(("clip", "sam"), FILES, (CLIP_RUN, SAM_RUN), (make_clip, make_sam), iters):
        asked = [*DATA, *SIZES, *run, *([f"iters={count}"] if count else []), *changes, f"seed={FIRST_SEED + seed}"]
        record = folder / f"{name}.json"
        if not record.exists():
            cfg = load_config(None, [*asked, f"vocab={vocabulary()}", "sam_weights=", "clip_weights="])
            torch.manual_seed(seed)
            with tqdm(total=cfg.iters, desc=name, unit="it", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
                found = train(folder / file, cfg, np.random.default_rng(seed), bar.update)
            write_text(record, json.dumps({"machine": f"{processor()}, torch {torch.__version__}", "iters": cfg.iters}
                                          | found | {"settings": asked}, indent=1))
        made[name] = json.loads(record.read_text())
        if made[name]["settings"] != asked:
            raise UserError(f"{record}: was made with other settings: choose another --out")
    return made


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=user_path, default="runs/table6/foundations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iters", type=int, nargs=2, default=(0, 0), metavar=("CLIP", "SAM"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, for both")
    args = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    made = make(Path(args.out), args.seed, args.overrides, args.iters)
    clip, sam = made["clip"], made["sam"]
    print(f"{clip['machine']}, one thread\n"
          f"CLIP: {clip['seconds']:.0f} s of CPU time, retrieval {100 * clip['retrieval']:.1f} "
          f"(chance {100 * clip['chance']:.1f}), scale {clip['scale']:.1f}\n"
          f"SAM:  {sam['seconds']:.0f} s of CPU time, mask IoU {100 * sam['mask_iou']:.1f} "
          f"(untrained {100 * sam['untrained']:.1f})")
    for name, value in probe(Path(args.out), args.overrides).items():
        print(f"{name:14} tells {100 * value:5.1f} % of the classes' shares in a patch to a linear map")


if __name__ == "__main__":
    run_program(main, less_memory="a smaller batch_size")
