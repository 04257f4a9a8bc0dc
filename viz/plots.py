"""Plots of numbers: training curves and confusion matrices, as images (H, W, 3) uint8 RGB.

Pillow, NumPy and OpenCV only: a plot should not cost a training machine another package.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from viz.pictures import FAINT, INK, WHITE, blank, draw_text, text_width

GRID = (228, 231, 234)
SERIES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))    # Okabe and Ito
Series = dict[str, tuple[Sequence[float], Sequence[float]]]


# ----------------------------------------------------------------------------------------------------------------------
# curves

def curves(panels: dict[str, Series], xlabel: str = "iteration", size: tuple[int, int] = (300, 480)) -> np.ndarray:
    """Line plots, two panels a row: {title: {series: (x values, y values)}}.

    Several rows of y values are runs of one kind, drawn pale under their mean. Values that are not finite leave a gap.
    """
    drawn = [_panel(title, series, xlabel, size) for title, series in panels.items()]
    blank = np.full((*size, 3), 255, np.uint8)
    if len(drawn) % 2 and len(drawn) > 1:
        drawn.append(blank)
    return np.vstack([np.hstack(drawn[n:n + 2]) for n in range(0, len(drawn), 2)] or [blank])


def _panel(title: str, series: Series, xlabel: str, size: tuple[int, int]) -> np.ndarray:
    data = {name: _usable(x, y) for name, (x, y) in series.items()}
    xs, ys = (np.concatenate([pair[n].ravel() for pair in data.values()] or [np.empty(0)]) for n in (0, 1))
    ys = ys[np.isfinite(ys)]
    if not len(ys):
        canvas, draw = blank(*size)
        draw_text(draw, size[1] / 2, size[0] / 2, f"{title}: nothing to show yet", 13, "mm", FAINT)
        return np.array(canvas)
    x_axis = _axis(xs.min(), xs.max(), 6)
    y_axis = _axis(ys.min(), ys.max(), 5)
    legend = list(data) if len(data) > 1 else []
    pixels, place = _frame(title, xlabel, x_axis, y_axis, legend, size)
    for n, (x, y) in enumerate(data.values()):
        colour = SERIES[n % len(SERIES)]
        pale = [(c + 2 * 255) // 3 for c in colour]
        if y.ndim > 1:
            for row in y:
                _line(pixels, *place(x, row), pale)
            y = y.mean(0)
        _line(pixels, *place(x, y), colour, 2)
    return pixels


def _frame(title: str, xlabel: str, x_axis, y_axis, legend: list[str], size: tuple[int, int]):
    """An empty panel, and the function from values to its pixels."""
    (x_low, x_high, x_ticks), (y_low, y_high, y_ticks) = x_axis, y_axis
    names = [f"{tick:g}" for tick in y_ticks]
    left, right = 24 + max(text_width(name, 12) for name in names), size[1] - 22
    top, bottom = 40 + 18 * -(-len(legend) // 2), size[0] - 48

    def place(x, y):
        return (left + (np.asarray(x) - x_low) / (x_high - x_low) * (right - left),
                bottom - (np.asarray(y) - y_low) / (y_high - y_low) * (bottom - top))

    canvas, draw = blank(*size)
    for tick, name in zip(y_ticks, names):
        _, y = place(x_low, tick)
        draw.line((left, y, right, y), fill=GRID)
        draw_text(draw, left - 8, y, name, 12, "rm", FAINT)
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        draw.line((x, top, x, bottom), fill=GRID)
        draw_text(draw, x, bottom + 14, f"{tick:g}", 12, "mm", FAINT)
    draw.line((left, bottom, right, bottom), fill=FAINT)
    draw_text(draw, (left + right) / 2, bottom + 33, xlabel, 12, "mm", FAINT)
    draw_text(draw, left, 20, title, 16)
    for n, name in enumerate(legend):
        x, y = left + n % 2 * size[1] // 2, 42 + 18 * (n // 2)
        draw.line((x, y, x + 16, y), fill=SERIES[n % len(SERIES)], width=3)
        draw_text(draw, x + 21, y, name, 12)
    return np.array(canvas), place


def _usable(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    return x, np.where(np.isfinite(y), y, np.nan)


def _axis(low: float, high: float, count: int) -> tuple[float, float, list[float]]:
    """Round limits around the values, and round ticks between them."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * power) <= count + 1e-9)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [n * step for n in range(first, last + 1)]


def _line(pixels: np.ndarray, x: np.ndarray, y: np.ndarray, colour: Sequence[int], width: int = 1):
    """A smooth line through the points; a gap where y is NaN, a dot at a point without neighbours."""
    finite = np.isfinite(y)
    for run in np.split(np.stack([x, y], 1), np.flatnonzero(np.diff(finite)) + 1):
        if not len(run) or not np.isfinite(run[0, 1]):
            continue
        run = np.round(run * 16).astype(np.int32)          # OpenCV takes fractions of a pixel as 1/16
        if len(run) == 1:
            cv2.circle(pixels, run[0].tolist(), 3 * 16, colour, -1, cv2.LINE_AA, 4)
        cv2.polylines(pixels, [run[:, None]], False, colour, width, cv2.LINE_AA, 4)


# ----------------------------------------------------------------------------------------------------------------------
# confusion matrix

def confusion_picture(matrix: np.ndarray, classes: Sequence[str], title: str = "") -> np.ndarray:
    """A confusion matrix (rows: ground truth, columns: prediction) in percent of each row; empty rows are grey."""
    matrix = np.asarray(matrix, float)
    size, cell, gap = 13, 36, 8
    caption = "rows: true class, columns: predicted class, in % of the row; grey: does not occur"
    names = max(text_width(f"{n} {name}", size) for n, name in enumerate(classes))
    left, top = names + 12 + gap, 60
    side = cell * len(classes)
    right = max(left + side + 16, text_width(title, 18) + 24, text_width(caption, size) + 24)
    canvas, draw = blank(top + side + 40, right)
    draw_text(draw, 12, 22, title, 18)
    draw_text(draw, 12, top + side + 20, caption, size, colour=FAINT)
    totals = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.full_like(matrix, np.nan), where=totals > 0)
    for n, name in enumerate(classes):
        middle = (n + 0.5) * cell
        draw_text(draw, left - gap, top + middle, f"{n} {name}", size, "rm")
        draw_text(draw, left + middle, top - gap, str(n), size, "mm")
        for m, share in enumerate(shares[n]):
            x, y = left + m * cell, top + n * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=GRID if math.isnan(share) else _shade(share))
            if share >= 0.0005:
                text = f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.1f}"
                draw_text(draw, x + cell / 2 - 1, y + cell / 2, text, size, "mm", WHITE if share > 0.3 else INK)
    return np.array(canvas)


def _shade(share: float) -> tuple[int, int, int]:
    """White to deep blue; the square root makes confusions of a few percent visible."""
    return tuple(round(255 + (dark - 255) * math.sqrt(share)) for dark in (8, 64, 129))
