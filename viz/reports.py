"""Evaluation reports: a table beside the paper's numbers, the confusion matrix, the best and worst images."""

import math
from pathlib import Path

import numpy as np

from config import IGNORE
from files.labels import LabelSet
from viz import pictures, plots

# The paper's numbers in percent: LIP Tables 1, 2, 6 (hat ... right shoe, background), CIHP Table 5, PPP Table 4.
PUBLISHED = {
    ("lip", False): {"pixel_acc": 89.54, "mean_acc": 78.12, "miou": 62.98, "iou": (
        72.87, 75.26, 53.28, 43.56, 73.91, 47.60, 63.31, 56.20, 79.09, 37.21, 44.31, 39.38, 76.86, 72.59, 73.88, 71.15,
        71.50, 58.96, 59.48, 89.28)},
    ("lip", True): {"pixel_acc": 90.04, "mean_acc": 78.42, "miou": 64.25, "iou": (
        73.53, 75.99, 55.46, 45.21, 75.06, 49.59, 64.60, 58.42, 80.21, 38.02, 44.26, 40.39, 77.51, 74.00, 74.93, 73.06,
        72.82, 60.60, 61.54, 89.71)},
    ("cihp", True): {"miou": 72.27},
    ("ppp", True): {"miou": 78.67},
}


def table(result: dict, labels: LabelSet, tta: bool) -> str:
    """The result as lines of text: classes in the order of the paper's Table 1, the background last.

    For LIP beside both of the paper's rows, without and with test-time augmentation; the difference is to the one of
    the same kind.
    """
    rows = [PUBLISHED.get((labels.name, kind), {}) for kind in (False, True)]
    paper, beside = rows[tta], "iou" in rows[tta]
    width = max(map(len, (*labels.classes, "pixel accuracy"))) + 2
    lines = [f"{'class':<{width}}{'IoU':>8}{'acc.':>8}"
             + (f"{'paper':>10}{'with TTA':>10}{'difference':>12}" if beside else "")]
    for place, k in enumerate([*range(1, len(labels.classes)), 0]):
        line = f"{labels.classes[k]:<{width}}{_percent(result['iou'][k])}{_percent(result['acc'][k])}"
        if beside:
            line += "".join(f"{row['iou'][place]:10.2f}" for row in rows)
            line += f"{_difference(result['iou'][k], paper['iou'][place]):>12}"
        lines.append(line)
    lines.append("-" * len(lines[0]))
    for key, name in (("pixel_acc", "pixel accuracy"), ("mean_acc", "mean accuracy"), ("miou", "mIoU")):
        line = f"{name:<{width}}{_percent(result[key])}"
        if beside:
            line += f"{'':8}" + "".join(f"{row[key]:10.2f}" for row in rows)
            line += f"{_difference(result[key], paper[key]):>12}"
        elif key in paper:
            line += f"   paper {paper[key]:.2f} ({_difference(result[key], paper[key])})"
        lines.append(line)
    return "\n".join(lines)


def _percent(value: float) -> str:
    return f"{'-':>8}" if math.isnan(value) else f"{100 * value:8.2f}"


def _difference(value: float, paper: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value - paper:+.2f}"


def best_and_worst(per_image: list[tuple[float, int]], count: int = 3) -> list[tuple[str, int]]:
    """(caption with a place for the name, index) of the images with the highest and the lowest mIoU."""
    ranked = sorted((item for item in per_image if not math.isnan(item[0])), reverse=True)
    best = ranked[:count] if len(ranked) >= 2 * count else ranked
    worst = ranked[len(best):][-count:]
    return [(f"{word}: {{}}, mIoU {100 * miou:.1f}", i)
            for word, items in (("best", best), ("worst", worst)) for miou, i in items]


def draw(folder: Path, title: str, labels: LabelSet, matrix: np.ndarray,
         shown: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]) -> list[Path]:
    """PNGs: the confusion matrix, and a sheet of the images `shown` (caption, photo, ground truth, prediction)."""
    rows = [[photo, pictures.drawn_label(truth, labels.palette), pictures.drawn_label(predicted, labels.palette),
             pictures.errors(photo, truth, predicted)] for _, photo, truth, predicted in shown]
    titles = ["photo", "ground truth", "prediction", "errors (red)"]
    sheet = pictures.sheet(rows, titles=titles, captions=[row[0] for row in shown])
    legend = [*range(len(labels.classes)), *[IGNORE] * any((truth == IGNORE).any() for _, _, truth, _ in shown)]
    drawn = {"confusion.png": plots.confusion_picture(matrix, labels.classes, title),
             "best_worst.png": pictures.with_legend(sheet, labels.classes, labels.palette, legend, size=16)}
    for name, picture in drawn.items():
        pictures.save_png(folder / name, picture)
    return [folder / name for name in drawn]
