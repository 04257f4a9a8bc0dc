"""The log of a training run, and pictures of it: curves, samples of its validation."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from config import IGNORE
from errors import UserError, reading
from files.labels import LabelSet
from viz import pictures, plots

LOSSES = {"loss": "total", "ce": "cross-entropy", "lovasz": "Lovasz-softmax", "aux": "auxiliary head"}
SCORES = {"miou": "mIoU", "mean_acc": "mean accuracy", "pixel_acc": "pixel accuracy"}


def read_log(path: Path) -> list[dict]:
    """The entries of a log.jsonl."""
    with reading(path, "log of a run"):
        lines = path.read_text().splitlines()
    try:
        return [*map(json.loads, filter(str.strip, lines))]
    except ValueError as error:
        raise UserError(f"{path}: a line is no JSON ({error}): remove it or the file") from None


def curves(entries: Sequence[dict]) -> np.ndarray:
    """The loss and its parts, learning rate, gradient norm and validation scores from the lines of log.jsonl."""
    train, val = [e for e in entries if "lr" in e], [e for e in entries if "miou" in e]
    ends = (0, train[-1]["iter"]) if train else (0, 0)     # all panels span the same iterations

    def series(entries: list[dict], key: str, factor: float = 1) -> tuple[list, list]:
        values = [math.nan if e.get(key) is None else factor * e[key] for e in entries]
        return [*ends, *(e["iter"] for e in entries)], [math.nan, math.nan, *values]

    panels = {"loss": {name: series(train, key) for key, name in LOSSES.items() if any(key in e for e in train)},
              "validation, %": {name: series(val, key, 100) for key, name in SCORES.items()},
              "learning rate": {"lr": series(train, "lr")},
              "gradient norm": {"grad": series(train, "grad")}}
    return plots.curves(panels)


def validation(samples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], labels: LabelSet,
               iteration: int) -> np.ndarray:
    """(photo, label, prediction) of some photos, side by side."""
    rows = [[photo] + [pictures.overlay(photo, part, labels.palette) for part in (label, predicted)]
            for photo, label, predicted in samples]
    sheet = pictures.sheet(rows, titles=["photo", "ground truth", f"iteration {iteration}"])
    shown = [*range(len(labels.classes)), *[IGNORE] * any((label == IGNORE).any() for _, label, _ in samples)]
    return pictures.with_legend(sheet, labels.classes, labels.palette, shown, size=16)
