"""What is learnt from photos at equal cost: a small SCHNet beside SegFormer of transformers, random weights both.

    python benchmarks/learn.py --data FOLDER                   a grid of learning rates, then twelve minutes a seed
    python benchmarks/learn.py --data FOLDER --device cuda --large       a GPU: a larger SCHNet beside SegFormer-B2
    python benchmarks/learn.py batch_size=8 --data FOLDER      other values of configs/custom.yaml, for both

FOLDER: images/train, labels/train, images/val, labels/val; the classes are configs/custom.yaml's. Both get the same
data in the same order, augmentation, loss, batch, optimiser, weight decay, warm-up and decay, and each its own learning
rate: the best of --lrs after --grid-minutes. The rate follows the budget used, not the steps: both end with it.

The budget is the process's own CPU time, spent on batches and steps alone: on a machine that others use too it is the
fair clock, for the wall's depends on who else runs. Wall time is reported beside it. The two run at the same time, each
pinned to a core of its own, so that what slows memory and caches slows both. On a GPU they run one after the other by
the wall's clock. Scores are those of evaluate.py, at the photos' own size; scoring does not count as time.

A run that is finished is kept: the same command goes on with what is missing. It leaves in --out: results.json,
curves.csv, table.txt, curves.png, overlays_*.png (photo | ground truth | both models), and two files for each run.
"""

import argparse
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timing import processor
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from engine import checkpoint  # noqa: E402
import conftest  # noqa: E402, F401                        torchvision beside a CPU-only torch, for the peer
from viz import pictures  # noqa: E402
from viz import plots  # noqa: E402
from transformers import SegformerConfig, SegformerForSemanticSegmentation  # noqa: E402

from config import Config, load_config, to_yaml  # noqa: E402
from datasets import label_set, open_split, train_loader  # noqa: E402
from errors import UserError  # noqa: E402
from evaluate import confusion_matrix, evaluate_split, scores  # noqa: E402
from inference import predict_labels  # noqa: E402
from model import build_model  # noqa: E402
from train import forward_backward, param_groups  # noqa: E402

MODELS = ("schnet", "segformer")
TICKS = 1_000_000                                          # the schedule's "iterations": parts of the budget
LOOKS = 4                                                  # scored after each quarter of the budget
SHOWN = 10                                                 # validation photos in the overlays
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # ImageNet's, SegFormer's preprocessing
B2 = {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}     # B0: the defaults
LARGE = ["sam_dim=384", "sam_depth=12", "sam_heads=6", "sam_grid=24", "clip_dim=256", "clip_heads=4", "clip_grid=24",
         "clip_embed=128", "head_dim=256", "prior_dim=64", "deform_heads=8", "deform_points=4", "crop_size=[384, 256]",
         "base_size=384", "batch_size=16", "precision=bf16", "workers=8"]


# --------------------------------------------------------------------------------------------------------------- models

class SegFormer(nn.Module):
    """The peer with SCHNet's interface: RGB in [0, 1] -> logits at the image's size, enlarged bilinearly."""

    def __init__(self, cfg: Config, num_classes: int, large: bool):
        super().__init__()
        self.cfg = cfg
        self.net = SegformerForSemanticSegmentation(SegformerConfig(
            num_labels=num_classes, drop_path_rate=cfg.drop_path, classifier_dropout_prob=cfg.head_dropout,
            **(B2 if large else {})))
        for conv in self.net.modules():                    # the original's start: transformers' own, 0.02 for all, is
            if isinstance(conv, nn.Conv2d):                # made to be overwritten and stifles the depthwise kernels
                fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
                nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, None]:
        logits = self.net((image - self.mean) / self.std).logits         # (B, K, H/4, W/4)
        logits = F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
        return (logits, None) if self.training else logits


def groups(model: nn.Module) -> list[dict]:
    """AdamW's groups; SegFormer's as in its paper: biases and norms do not decay."""
    if not isinstance(model, SegFormer):
        return param_groups(model)
    parts = {decay: [p for p in model.parameters() if (p.ndim > 1) == decay] for decay in (True, False)}
    return [{"params": part, "weight_decay": model.cfg.weight_decay * decay, "lr_factor": 1.0}
            for decay, part in parts.items()]


# ------------------------------------------------------------------------------------------------------------- one run

@dataclasses.dataclass(frozen=True)
class Job:
    model: str
    lr: float
    seed: int
    minutes: float

    def path(self, args: argparse.Namespace) -> Path:
        return Path(args.out) / f"{self.model}_lr{self.lr:g}_seed{self.seed}_{self.minutes:g}min.json"


def settings(args: argparse.Namespace, lr: float | None = None, seed: int = 0) -> Config:
    """configs/custom.yaml, its schedule stretched over the budget."""
    changes = [f"data_root={args.data}", *(LARGE if args.large else [])]
    if args.device == "cpu":                               # batches are made in the process: they are paid for
        changes += ["workers=0", "precision=fp32"]
    cfg = load_config(ROOT / "configs" / "custom.yaml", changes + args.overrides)
    return dataclasses.replace(cfg, lr=lr or cfg.lr, seed=seed, out="", iters=TICKS,
                               warmup_iters=round(TICKS * cfg.warmup_iters / cfg.iters))


def train_one(job: Job, args: argparse.Namespace, core: int | None):
    """A process: train for the budget, score at each quarter of it, and leave the record."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C reaches all: the main process ends this one
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    cfg, device = settings(args, job.lr, job.seed), torch.device(args.device)
    classes, val = label_set(cfg).classes, open_split(cfg, "val")
    torch.manual_seed(job.seed)
    model = SegFormer(cfg, len(classes), args.large) if job.model == "segformer" else build_model(cfg, classes)
    model.to(device).train()
    optimizer = torch.optim.AdamW(groups(model), lr=cfg.lr, betas=cfg.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    batches = train_loader(cfg, open_split(cfg, "train"))
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    budget, used, wall, steps, losses, looks = 60 * job.minutes, 0.0, 0.0, 0, [], []
    while used < budget:
        begun, begun_wall = clock(), time.perf_counter()
        parts = forward_backward(model, optimizer, scaler, [next(batches)], cfg, device, int(TICKS * used / budget))
        optimizer.step()
        used, wall, steps = used + clock() - begun, wall + time.perf_counter() - begun_wall, steps + 1
        losses.append(parts["loss"])
        if not multiprocessing.parent_process().is_alive():
            sys.exit(1)
        if used >= budget * (len(looks) + 1) / LOOKS:
            look = {"minutes": used / 60, "wall_minutes": wall / 60, "steps": steps, "loss": float(np.mean(losses))}
            looks.append(look | scores(evaluate_split(model, val, len(classes))[0]))
            losses = []
            print(f"{job.model:10} lr {job.lr:<7g} seed {job.seed}: {used / 60:5.1f} min ({wall / 60:5.1f} by the "
                  f"wall), {steps:5} steps, loss {look['loss']:.3f}, mIoU {100 * looks[-1]['miou']:.2f}", flush=True)
    save(job, args, looks, predict_labels(model.eval(), [val.read(i)[0] for i in shown(val)]), {
        "params": sum(p.numel() for p in model.parameters()), "config": to_yaml(cfg)})


def save(job: Job, args: argparse.Namespace, looks: list[dict], labels: list[np.ndarray], facts: dict):
    """The record comes last: where it is, the run is whole."""
    part = job.path(args).with_suffix(".part")
    with open(part, "wb") as file:
        np.savez_compressed(file, *labels)
    os.replace(part, job.path(args).with_suffix(".npz"))
    checkpoint.write_text(job.path(args), json.dumps(dataclasses.asdict(job) | facts | {"looks": looks}))


def shown(pairs) -> list[int]:
    """Indices of the photos in the overlays, spread over the set."""
    return [n * len(pairs) // SHOWN for n in range(min(SHOWN, len(pairs)))]


def record(job: Job, args: argparse.Namespace) -> dict | None:
    """The finished run, or None; other settings than today's are an error, not a result."""
    if not job.path(args).exists():
        return None
    found = json.loads(job.path(args).read_text())
    if found["config"] != to_yaml(settings(args, job.lr, job.seed)):
        sys.exit(f"error: {job.path(args)} was made with other settings: choose another --out")
    return found


def run_all(jobs: list[Job], args: argparse.Namespace) -> list[dict]:
    """The records of all jobs; what is missing is run first, the models side by side on a CPU."""
    context = multiprocessing.get_context("spawn")
    together = 1 if args.device == "cuda" else len(args.models)
    cores = sorted(os.sched_getaffinity(0)) if args.threads == 1 and args.device == "cpu" else []
    missing = [job for job in jobs if record(job, args) is None]
    rows = [[job for job in missing if job.model == model] for model in args.models]
    while any(rows):
        batch = [row.pop(0) for row in [row for row in rows if row][:together]]
        places = [cores[n % len(cores)] if cores else None for n in range(len(batch))]
        processes = [context.Process(target=train_one, args=(job, args, core), daemon=True)
                     for job, core in zip(batch, places)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit("error: a run failed")
    return [record(job, args) for job in jobs]


# ------------------------------------------------------------------------------------------------------------- reports

def title(model: str, args: argparse.Namespace) -> str:
    return "SCHNet" if model == "schnet" else "SegFormer-B2" if args.large else "SegFormer-B0"


def background(cfg: Config) -> dict:
    """The scores of calling everything background."""
    pairs, count = open_split(cfg, "val"), len(label_set(cfg).classes)
    labels = (torch.from_numpy(pairs.read(i)[1]) for i in range(len(pairs)))
    return scores(sum(confusion_matrix(torch.zeros_like(label), label, count) for label in labels))


def table(grid: list[dict], runs: list[dict], empty: dict, args: argparse.Namespace) -> str:
    """Learning rates, mIoU against time, and classes, as lines of text."""
    names, lines = {model: title(model, args) for model in args.models}, []
    if grid:
        lines += [f"mIoU of the learning rates after {args.grid_minutes:g} minutes",
                  f"{'':16}" + "".join(f"{lr:>10g}" for lr in args.lrs)]
        for model, name in names.items():
            ends = [r["looks"][-1]["miou"] for r in grid if r["model"] == model]
            lines.append(f"{name:16}" + "".join(percent(end, 10) for end in ends))
        lines.append("")
    clock = "wall time" if args.device == "cuda" else f"CPU time, {args.threads} thread(s) each"
    marks = "".join(f"{args.minutes * n / LOOKS:7g} min" for n in range(1, LOOKS + 1))
    head = f"{'':14}{'seed':>6}{'rate':>8}{'M params':>10}{'steps':>7}{'wall min':>10}"
    lines += [f"mIoU against time ({clock})", f"{head}{marks}{'pixel acc.':>12}{'mean acc.':>11}"]
    for model, name in names.items():
        mine = [r for r in runs if r["model"] == model]
        for r in mine:
            end = r["looks"][-1]
            lines.append(f"{name:14}{r['seed']:6}{r['lr']:8g}{r['params'] / 1e6:10.2f}{end['steps']:7}"
                         f"{end['wall_minutes']:10.1f}" + scores_of([r]))
        lines.append(f"{name:14}{'mean':>6}{'':35}" + scores_of(mine))
    lines.append(f"{'all background':14}{'':{41 + 11 * (LOOKS - 1)}}{percent(empty['miou'], 11)}"
                 f"{percent(empty['pixel_acc'], 12)}{percent(empty['mean_acc'], 11)}")
    return "\n".join([*lines, "", *class_table(runs, names, label_set(settings(args)).classes)])


def scores_of(runs: list[dict]) -> str:
    means = [np.mean([r["looks"][n]["miou"] for r in runs]) for n in range(LOOKS)]
    pixel, mean = (np.mean([r["looks"][-1][key] for r in runs]) for key in ("pixel_acc", "mean_acc"))
    return "".join(percent(m, 11) for m in means) + percent(pixel, 12) + percent(mean, 11)


def class_table(runs: list[dict], names: dict[str, str], classes: tuple[str, ...]) -> list[str]:
    lines = ["IoU of each class at the end, mean of the seeds",
             f"{'':14}" + "".join(f"{name:>16}" for name in names.values())]
    ends = [np.mean([r["looks"][-1]["iou"] for r in runs if r["model"] == model], 0) for model in names]
    return lines + [f"{name:14}" + "".join(percent(end[k], 16) for end in ends) for k, name in enumerate(classes)]


def percent(value: float, width: int) -> str:
    return f"{'-':>{width}}" if value != value else f"{100 * value:{width}.2f}"


def write_csv(path: Path, runs: list[dict], classes: tuple[str, ...]):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        keys = ("minutes", "wall_minutes", "steps", "loss", "miou", "mean_acc", "pixel_acc")
        rows.writerow(["model", "lr", "seed", *keys, *classes])
        for r in runs:
            for look in r["looks"]:
                values = [*(look[key] for key in keys), *look["iou"]]
                rows.writerow([r["model"], r["lr"], r["seed"], *(f"{value:.5g}" for value in values)])


def draw(runs: list[dict], args: argparse.Namespace):
    """The curves, and the photos side by side, as the first seed's networks see them."""
    folder, cfg = Path(args.out), settings(args)
    mine = {title(model, args): [r for r in runs if r["model"] == model] for model in args.models}
    times = [args.minutes * n / LOOKS for n in range(1, LOOKS + 1)]
    panels = {heading: {name: (times, [[100 * look[key] for look in r["looks"]] for r in group])
                        for name, group in mine.items()}
              for heading, key in (("validation mIoU (%)", "miou"), ("pixel accuracy (%)", "pixel_acc"))}
    pictures.save_png(folder / "curves.png", plots.curves(panels, "minutes"))
    labels, pairs = label_set(cfg), open_split(cfg, "val")
    firsts = [Job(r["model"], r["lr"], r["seed"], r["minutes"]).path(args) for r, *_ in mine.values()]
    found = [np.load(path.with_suffix(".npz")) for path in firsts]
    rows, names = [], [pairs.name(i) for i in shown(pairs)]
    for n, i in enumerate(shown(pairs)):
        image, truth = pairs.read(i)
        maps = [truth, *(file[f"arr_{n}"] for file in found)]
        rows.append([image, *(pictures.overlay(image, label, labels.palette) for label in maps)])
    for n in range(0, len(rows), 5):
        picture = pictures.sheet(rows[n:n + 5], ("photo", "ground truth", *mine), names[n:n + 5], height=400)
        picture = pictures.with_legend(picture, labels.classes, labels.palette)
        pictures.save_png(folder / f"overlays_{n // 5 + 1}.png", picture)


# ------------------------------------------------------------------------------------------------------------- program

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with images/ and labels/ of train and val")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--lrs", nargs="+", type=float, default=(1e-3, 2e-3, 4e-3), help="for both; one: no grid")
    parser.add_argument("--grid-minutes", type=float, default=2)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--large", action="store_true", help="a larger SCHNet, SegFormer-B2")
    parser.add_argument("--out", default="runs/learn")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of configs/custom.yaml; they come first")
    args = parser.parse_intermixed_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    cfg = settings(args)
    empty = background(cfg)                                # reads the data: its faults show before anything is trained

    rates, grid = dict.fromkeys(args.models, args.lrs[0]), []
    if len(args.lrs) > 1:
        grid = run_all([Job(m, lr, args.seeds[0], args.grid_minutes) for lr in args.lrs for m in args.models], args)
        rates = {r["model"]: r["lr"] for r in sorted(grid, key=lambda r: r["looks"][-1]["miou"])}      # the last: best
    runs = run_all([Job(m, rates[m], seed, args.minutes) for seed in args.seeds for m in args.models], args)

    place, folder = f"{processor(args.device)}, torch {torch.__version__}", Path(args.out)
    text = f"{place}\n\n{table(grid, runs, empty, args)}"
    checkpoint.write_text(folder / "results.json", json.dumps({
        "machine": place, "all_background": empty, "grid": grid, "runs": runs}, indent=1))
    write_csv(folder / "curves.csv", runs, label_set(cfg).classes)
    checkpoint.write_text(folder / "table.txt", text + "\n")
    draw(runs, args)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
