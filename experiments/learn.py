"""Trains a small SCHNet and transformers' SegFormer-B0 on photos, from random weights, for the same CPU time.

    python experiments/learn.py --data FOLDER                  a grid of learning rates, then twelve minutes per seed
    python experiments/learn.py batch_size=8 --data FOLDER     overrides of configs/custom.yaml, for both

FOLDER holds images/train, labels/train, images/val and labels/val, with the classes of configs/custom.yaml. Both
networks use the same data in the same order, augmentation, loss, batch size, optimizer and schedule, and each the best
learning rate of --lrs after --grid-minutes with seed 0. The budget is CPU time for batches and steps; the schedule
follows the time used. Scores are those of evaluate.py, at the photos' own size.

Writes to --out: table.txt, learn.csv (four evaluations per run), differences.csv and a file per run. Finished runs are
kept: the same command trains the missing ones.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import runner
import torch
import torch.nn as nn
import torch.nn.functional as F
from runner import ROOT, Job
from timing import processor
from torch import Tensor

import conftest  # noqa: F401                              torchvision importable with a CPU-only torch
from config import Config, load_config, user_path
from datasets import open_split
from errors import run_program
from evaluate import confusion_matrix, scores
from files.atomic import mark_folder
from files.labels import label_set
from model import build_model
from transformers import SegformerConfig, SegformerForSemanticSegmentation

ITERS = 1_000_000                                          # of the schedule, which is stretched over the CPU time
LOOKS = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # ImageNet's: SegFormer's preprocessing


class SegFormer(nn.Module):
    """SegFormer-B0 with SCHNet's interface: RGB in [0, 1] -> logits, resized bilinearly to the image's size."""

    def __init__(self, cfg: Config, classes: Sequence[str]):
        super().__init__()
        self.cfg, self.encoder = cfg, SimpleNamespace(patch_embed=nn.Identity())         # for train.param_groups
        self.net = SegformerForSemanticSegmentation(SegformerConfig(
            num_labels=len(classes), drop_path_rate=cfg.drop_path, classifier_dropout_prob=cfg.head_dropout))
        for conv in self.net.modules():                    # the original's initialisation: transformers' std of 0.02
            if isinstance(conv, nn.Conv2d):                # is too small for depthwise kernels
                fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
                nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, None]:
        logits = self.net((image - self.mean) / self.std).logits         # (B, K, H/4, W/4)
        logits = F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
        return (logits, None) if self.training else logits


MODELS = {"SCHNet": build_model, "SegFormer-B0": SegFormer}


def settings(args: argparse.Namespace) -> Config:
    """configs/custom.yaml with its schedule stretched over the CPU time."""
    data = f"data_root={args.data.resolve()}"
    cfg = load_config(ROOT / "configs" / "custom.yaml", [data, "workers=0", *args.overrides])
    return dataclasses.replace(cfg, out="", iters=ITERS, warmup_iters=round(ITERS * cfg.warmup_iters / cfg.iters))


def train_grid(args: argparse.Namespace, cfg: Config) -> dict[str, dict[float, float]]:
    """{model: {learning rate: mIoU}} after `grid_minutes` with seed 0."""
    seconds = 60 * args.grid_minutes
    jobs = {(name, lr): Job(f"{name}_lr{lr:g}", dataclasses.replace(cfg, lr=lr), seconds, 1, MODELS[name])
            for lr in args.lrs for name in MODELS}
    records = dict(zip(jobs, runner.run_jobs(list(jobs.values()), args.out)))
    return {name: {lr: records[name, lr]["looks"][-1]["miou"] for lr in args.lrs} for name in MODELS}


def background_scores(cfg: Config) -> dict:
    """The scores of predicting background everywhere."""
    pairs, count = open_split(cfg, "val"), len(label_set(cfg).classes)
    labels = (torch.from_numpy(pairs.read(i)[1]) for i in range(len(pairs)))
    return scores(sum(confusion_matrix(torch.zeros_like(label), label, count) for label in labels))


def tables(grid: dict, records: list[dict], rates: dict[str, float], background: dict,
           args: argparse.Namespace) -> list[str]:
    """Two tables as lines of text: the learning rates, each run's scores over time."""
    lines = [f"mIoU of the learning rates after {args.grid_minutes:g} minutes",
             f"{'':14}" + "".join(f"{lr:10g}" for lr in args.lrs)]
    lines += [f"{name:14}" + "".join(f"{100 * miou:10.2f}" for miou in mious.values()) for name, mious in grid.items()]
    times = "".join(f"{args.minutes * n / LOOKS:7g} min" for n in range(1, LOOKS + 1))
    lines += ["", "mIoU against CPU time, one thread",
              f"{'':14}{'seed':>5}{'rate':>8}{'M params':>10}{'steps':>7}{times}{'pixel acc.':>12}{'mean acc.':>11}"]
    for name in MODELS:
        runs = [record for record in records if record["name"] == name]
        for record in runs:
            lines.append(f"{name:14}{record['seed']:5}{rates[name]:8g}{record['parameters'] / 1e6:10.2f}"
                         f"{record['looks'][-1]['steps']:7}{scores_over_time([record])}")
        lines.append(f"{name:14}{'mean':>5}{'':25}{scores_over_time(runs)}")
    return [*lines, "all background: " + ", ".join(f"{key} {100 * background[key]:.2f}"
                                                   for key in ("miou", "pixel_acc", "mean_acc"))]


def scores_over_time(records: list[dict]) -> str:
    mious = [np.mean([record["looks"][n]["miou"] for record in records]) for n in range(LOOKS)]
    pixel, mean = (np.mean([record["looks"][-1][key] for record in records]) for key in ("pixel_acc", "mean_acc"))
    return "".join(f"{100 * miou:11.2f}" for miou in mious) + f"{100 * pixel:12.2f}{100 * mean:11.2f}"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=user_path, required=True, help="folder with images/, labels/ of train and val")
    parser.add_argument("--lrs", nargs="+", type=float, default=(1e-3, 2e-3, 4e-3), help="learning rates to try")
    parser.add_argument("--grid-minutes", type=float, default=2, help="CPU time for each learning rate (2)")
    parser.add_argument("--minutes", type=float, default=12, help="CPU time of a run (12)")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="trains seeds 0 to N - 1 (2)")
    parser.add_argument("--out", type=user_path, default=Path("runs/learn"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of configs/custom.yaml")
    args = parser.parse_intermixed_args(argv)
    mark_folder(args.out)
    cfg = settings(args)
    background = background_scores(cfg)                    # reads the data, so faults show before the training
    grid = train_grid(args, cfg)
    rates = {name: max(mious, key=mious.get) for name, mious in grid.items()}
    records = runner.run_jobs([
        Job(name, dataclasses.replace(cfg, lr=rates[name], seed=seed), 60 * args.minutes, LOOKS, MODELS[name])
        for seed in range(args.seeds) for name in MODELS], args.out)
    titles, differences = dict(zip(MODELS, MODELS)), runner.differences(records, [tuple(MODELS)])
    runner.write_report(args.out, [
        f"{processor()}, torch {torch.__version__}", "", *tables(grid, records, rates, background, args), "",
        *runner.difference_table(differences, titles)], differences)
    runner.write_looks(args.out / "learn.csv", records, label_set(cfg).classes)


if __name__ == "__main__":
    run_program(main)
