"""Pictures for people: label maps in colour, overlays, legends, contact sheets, curves, bars, confusion matrices.

Pillow, NumPy and OpenCV only. A picture is an array (H, W, 3), uint8, RGB; a label map is (H, W), uint8, 255 = ignore.
Every picture grows to hold its text: nothing is ever cut off.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

IGNORE = 255
PAPER, INK, FAINT, GRID = (255, 255, 255), (33, 37, 41), (108, 117, 125), (228, 231, 234)
HATCH = ((158, 158, 158), (186, 186, 186))                 # diagonal stripes: a label without a colour
SERIES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))    # Okabe and Ito

Palette = Sequence[Sequence[int]]


# ---- label maps ----------------------------------------------------------------------------------------------------

def present(label: np.ndarray) -> list[int]:
    """The labels that occur, rising; ignore (255) among them."""
    return np.flatnonzero(cv2.calcHist([label], [0], None, [256], [0, 256])).tolist()


def colourise(label: np.ndarray, palette: Palette) -> np.ndarray:
    """A label map in its colours; ignore and labels the palette does not know are hatched in grey."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    rgb = table[label]
    unknown = label >= len(palette)
    if unknown.any():
        rgb[unknown] = _hatch(*label.shape)[unknown]
    return rgb


def overlay(image: np.ndarray, label: np.ndarray, palette: Palette, alpha: float = 0.6) -> np.ndarray:
    """The photo under its label map, thin white lines between the classes.

    Black classes (the background in most palettes) only dim the photo, or most of it would be lost in the dark."""
    rgb = cv2.addWeighted(image, 1 - alpha, colourise(label, palette), alpha, 0)
    black = np.array([not any(colour) for colour in palette] + [False] * (256 - len(palette)))[label]
    rgb[black] = cv2.convertScaleAbs(image, alpha=1 - alpha / 2)[black]
    rgb[_outlines(label)] = PAPER
    return rgb


def _outlines(label: np.ndarray) -> np.ndarray:
    """True on the pixels where two classes meet, about 1 pixel wide for each 600 of the picture's side."""
    edge = np.zeros(label.shape, np.uint8)
    edge[:, 1:] = label[:, 1:] != label[:, :-1]
    edge[1:] |= label[1:] != label[:-1]
    width = round(math.sqrt(label.size) / 600)
    return (cv2.dilate(edge, np.ones((width, width), np.uint8)) if width > 1 else edge).astype(bool)


def _hatch(height: int, width: int) -> np.ndarray:
    stripe = (np.arange(height, dtype=np.int32)[:, None] + np.arange(width, dtype=np.int32)) >> 2 & 1
    return np.array(HATCH, np.uint8)[stripe]


# ---- text ----------------------------------------------------------------------------------------------------------

@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))


def _wrap(text: str, size: int, width: int) -> list[str]:
    """Lines that are at most `width` pixels wide; words (file names) that are too long are broken."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and _width(f"{lines[-1]} {word}", size) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
        while len(lines[-1]) > 1 and _width(lines[-1], size) > width:
            keep = next(n for n in range(len(lines[-1]) - 1, 0, -1) if n == 1 or _width(lines[-1][:n], size) <= width)
            lines[-1:] = [lines[-1][:keep], lines[-1][keep:]]
    return lines


def _canvas(height: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (width, height), PAPER)
    return picture, ImageDraw.Draw(picture)


def _write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, anchor: str = "lm", colour=INK):
    """Text at a point; the anchor is Pillow's: l, m, r across and t (ascender: a), m, s (baseline) down."""
    draw.text((x, y), text, fill=colour, font=_font(size), anchor=anchor)


# ---- legends and sheets --------------------------------------------------------------------------------------------

def with_legend(picture: np.ndarray, classes: Sequence[str], palette: Palette,
                shown: Iterable[int] | None = None) -> np.ndarray:
    """The picture with a legend of the classes `shown` (all if None; 255 is listed as "ignore"), beside or below it,
    whichever takes less room. The text grows with the picture, but never gets smaller than 12 pixels."""
    height, width = picture.shape[:2]
    labels = range(len(classes)) if shown is None else sorted({int(label) for label in shown})
    entries = [(classes[i], palette[i]) if i < len(classes) else ("ignore" if i == IGNORE else f"label {i}", None)
               for i in labels]
    if not entries:
        return picture.copy()
    size = max(12, round(math.sqrt(height * width) / 40))
    step, gap = math.ceil(size * 1.5), size // 2
    column = size + gap + max(_width(name, size) for name, _ in entries) + 2 * gap

    def layout(columns: int, below: bool) -> tuple[int, int]:
        high, wide = math.ceil(len(entries) / columns) * step + 2 * gap, columns * column + gap
        return (height + high, max(width, wide)) if below else (max(height, high), width + wide)

    options = [(columns, below) for columns in range(1, len(entries) + 1) for below in (False, True)]
    columns, below = min(options, key=lambda option: math.prod(layout(*option)))
    canvas, draw = _canvas(*layout(columns, below))
    canvas.paste(Image.fromarray(picture), (0, 0))
    left, top = (gap, height + gap) if below else (width + gap, gap)
    rows = math.ceil(len(entries) / columns)
    for n, (name, colour) in enumerate(entries):
        x, y = left + n // rows * column, top + n % rows * step + (step - size) // 2
        if colour is None:
            canvas.paste(Image.fromarray(_hatch(size, size)), (x, y))
        draw.rectangle((x, y, x + size - 1, y + size - 1), fill=colour and tuple(colour), outline=FAINT)
        _write(draw, x + size + gap, y + size / 2, name, size)
    return np.asarray(canvas)


def sheet(rows: Sequence[Sequence[np.ndarray | None]], titles: Sequence[str] | None = None,
          captions: Sequence[str] | None = None, height: int = 240) -> np.ndarray:
    """Rows of pictures of any sizes, each fitted into a cell `height` pixels high and at most 1.5 times as wide.

    `titles` head the columns, `captions` (one for each row) stand under their row; both are wrapped to the room there is.
    """
    size, gap = max(13, height // 16), max(8, height // 24)
    line = math.ceil(size * 1.35)
    cells = [[None if picture is None else _fit(picture, height, height * 3 // 2) for picture in row] for row in rows]
    count = max([len(row) for row in cells] + [len(titles or ())], default=0)
    widths = [max([row[n].shape[1] for row in cells if n < len(row) and row[n] is not None] + [height // 2])
              for n in range(count)]
    lefts = [gap + sum(widths[:n]) + n * gap for n in range(count)]
    total = sum(widths) + (count + 1) * gap
    heads = [_wrap(title, size, wide) for title, wide in zip(titles or (), widths)]
    notes = [_wrap(text, size, total - 2 * gap) for text in captions or [""] * len(cells)]
    head = max((len(lines) for lines in heads), default=0) * line + gap
    highs = [height + gap + (len(lines) * line if any(lines) else 0) for lines in notes]
    canvas, draw = _canvas(head + sum(highs), total)
    for left, wide, lines in zip(lefts, widths, heads):
        for n, text in enumerate(lines):
            _write(draw, left + wide / 2, gap / 2 + (n + 0.5) * line, text, size, "mm")
    top = head
    for row, lines, high in zip(cells, notes, highs):
        for left, wide, picture in zip(lefts, widths, row):
            if picture is not None:
                offset = (left + (wide - picture.shape[1]) // 2, top + (height - picture.shape[0]) // 2)
                canvas.paste(Image.fromarray(picture), offset)
        for n, text in enumerate(lines):
            _write(draw, gap, top + height + (n + 0.5) * line, text, size, colour=FAINT)
        top += high
    return np.asarray(canvas)


def _fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    scale = min(height / picture.shape[0], width / picture.shape[1])
    size = tuple(max(1, round(side * scale)) for side in (picture.shape[1], picture.shape[0]))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)


# ---- plots ---------------------------------------------------------------------------------------------------------

def curves(panels: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]], xlabel: str = "iteration",
           log: Sequence[str] = (), smooth: Sequence[str] = (), size: tuple[int, int] = (300, 480)) -> np.ndarray:
    """Line plots, one panel for each entry of `panels`: {title: {series: (x values, y values)}}, two panels a row.

    `log` names the panels with a logarithmic y axis; `smooth` those whose noisy series are drawn pale under their
    running mean. Values that are not finite (and, on a log axis, not positive) leave a gap."""
    pictures = [_panel(title, series, xlabel, title in log, title in smooth, size) for title, series in panels.items()]
    blank = np.full((*size, 3), 255, np.uint8)
    pictures += [blank] * (len(pictures) > 1 and len(pictures) % 2)
    return np.vstack([np.hstack(pictures[n:n + 2]) for n in range(0, len(pictures), 2)] or [blank])


def _panel(title: str, series: dict, xlabel: str, log: bool, smooth: bool, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    data = {name: _usable(x, y, log) for name, (x, y) in series.items()}
    xs, ys = (np.concatenate([pair[n] for pair in data.values()] or [np.empty(0)]) for n in (0, 1))
    ys = ys[np.isfinite(ys)]
    if not len(ys):
        canvas, draw = _canvas(height, width)
        _write(draw, width / 2, height / 2, f"{title}: nothing to show yet", 13, "mm", FAINT)
        return np.asarray(canvas)
    x_low, x_high, x_ticks = _axis(xs.min(), xs.max(), 6)
    y_low, y_high, y_ticks = _log_axis(ys.min(), ys.max()) if log else _axis(ys.min(), ys.max(), 5)
    y_names = [_number(10.0 ** tick if log else tick) for tick in y_ticks]
    legend = _legend_rows(list(data), width - 40)
    left, right = 24 + max(_width(name, 12) for name in y_names), width - 22
    top, bottom = 40 + 18 * len(legend), height - 48

    def place(x, y):
        return (left + (np.asarray(x) - x_low) / (x_high - x_low) * (right - left),
                bottom - (np.asarray(y) - y_low) / (y_high - y_low) * (bottom - top))

    canvas, draw = _canvas(height, width)
    for tick, name in zip(y_ticks, y_names):
        y = float(place(0, tick)[1])
        draw.line((left, y, right, y), fill=GRID)
        _write(draw, left - 8, y, name, 12, "rm", FAINT)
    for tick in x_ticks:
        x = float(place(tick, 0)[0])
        draw.line((x, top, x, bottom), fill=GRID)
        _write(draw, x, bottom + 14, _number(tick), 12, "mm", FAINT)
    draw.line((left, bottom, right, bottom), fill=FAINT)
    _write(draw, (left + right) / 2, bottom + 33, xlabel, 12, "mm", FAINT)
    _write(draw, left, 20, title, 16)
    _draw_legend(draw, legend, left)
    pixels = np.array(canvas)
    for n, (x, y) in enumerate(data.values()):
        colour = SERIES[n % len(SERIES)]
        if smooth and len(y) > 40:
            _line(pixels, *place(x, y), [(c + 2 * 255) // 3 for c in colour])
            y = _running_mean(y, len(y) // 40)
        _line(pixels, *place(x, y), colour, 2)
    return pixels


def _usable(x, y, log: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    if log:
        y = np.log10(np.where(y > 0, y, np.nan))
    return x, np.where(np.isfinite(y), y, np.nan)


def _axis(low: float, high: float, count: int) -> tuple[float, float, list[float]]:
    """Round limits around the values, and round ticks between them."""
    if high == low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * power) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [n * step for n in range(first, last + 1)]


def _log_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Limits and ticks in powers of ten, with 2 and 5 between them when the range is short."""
    marks = (1, 2, 5) if high - low < 2 else (1,)
    ticks = [n + math.log10(mark) for n in range(math.floor(low), math.ceil(high) + 1) for mark in marks]
    first = max((t for t in ticks if t <= low + 1e-9), default=ticks[0])
    last = min((t for t in ticks if t >= high - 1e-9 and t > first), default=ticks[-1])
    return first, last, [t for t in ticks if first <= t <= last]


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value / 1000:g}k" if abs(value) >= 1e4 else f"{round(value, 6):g}"


def _legend_rows(names: list[str], width: int) -> list[list[str]]:
    """The series' names in as many lines as they need; a panel with one series needs none."""
    rows = [[]] if len(names) > 1 else []
    for name in names if rows else ():
        if rows[-1] and sum(_width(other, 12) + 36 for other in (*rows[-1], name)) > width:
            rows.append([])
        rows[-1].append(name)
    return rows


def _draw_legend(draw: ImageDraw.ImageDraw, rows: list[list[str]], left: int):
    n = 0
    for row, names in enumerate(rows):
        x, y = left, 42 + 18 * row
        for name in names:
            draw.line((x, y, x + 16, y), fill=SERIES[n % len(SERIES)], width=3)
            _write(draw, x + 21, y, name, 12)
            x, n = x + _width(name, 12) + 36, n + 1


def _line(pixels: np.ndarray, x: np.ndarray, y: np.ndarray, colour, width: int = 1):
    """A smooth line through the points; a gap where y is NaN, a dot where a point stands alone."""
    points = np.stack([x, y], 1)
    finite = np.isfinite(y)
    for run in np.split(points, np.flatnonzero(np.diff(finite)) + 1):
        if not np.isfinite(run[0, 1]):
            continue
        run = np.round(run * 16).astype(np.int32)          # OpenCV takes fractions of a pixel as 1/16
        if len(run) == 1:
            cv2.circle(pixels, run[0].tolist(), 3 * 16, colour, -1, cv2.LINE_AA, 4)
        cv2.polylines(pixels, [run[:, None]], False, colour, width, cv2.LINE_AA, 4)


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """The mean over `half` neighbours to either side, fewer at the ends; NaNs do not count."""
    good = np.isfinite(values)
    sums, counts = (np.concatenate([[0], np.cumsum(v)]) for v in (np.where(good, values, 0), good))
    n = np.arange(len(values))
    low, high = np.maximum(n - half, 0), np.minimum(n + half + 1, len(values))
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(good, mean, np.nan)


def bars(names: Sequence[str], values: Sequence[float], reference: Sequence[float] | None = None,
         palette: Palette | None = None, title: str = "", key: tuple[str, str] = ("this run", "reference")) -> np.ndarray:
    """Horizontal bars for values from 0 to 100, each printed; NaN (a class that never occurs) has no bar.

    `reference` values are marked by a line across the bar; `key` says what is what."""
    size, step, wide = 14, 26, 420
    left, top = 20 + max(_width(name, size) for name in names), 18 + 30 * bool(title) + 26 * (reference is not None)
    height, width = top + step * len(names) + 34, left + wide + 130
    canvas, draw = _canvas(height, width)
    if title:
        _write(draw, 12, 24, title, 18)
    for tick in range(0, 101, 20):
        x = left + tick / 100 * wide
        draw.line((x, top, x, height - 30), fill=GRID)
        _write(draw, x, height - 16, str(tick), 12, "mm", FAINT)
    for n, (name, value) in enumerate(zip(names, values)):
        y = top + n * step
        _write(draw, left - 8, y + step / 2, name, size, "rm")
        missing = not math.isfinite(value)
        if not missing:
            colour = tuple(palette[n]) if palette is not None else SERIES[0]
            draw.rectangle((left, y + 5, left + value / 100 * wide, y + step - 5), fill=colour, outline=FAINT)
        text, end = "absent" if missing else f"{value:.2f}", 0 if missing else value
        if reference is not None and math.isfinite(reference[n]):
            mark = left + reference[n] / 100 * wide
            draw.line((mark, y + 1, mark, y + step - 1), fill=INK, width=3)
            text += "" if missing else f"  ({value - reference[n]:+.2f})"
            end = max(end, reference[n])
        _write(draw, left + end / 100 * wide + 8, y + step / 2, text, size, colour=FAINT if missing else INK)
    if reference is not None:
        y = top - 16
        draw.rectangle((left, y - 6, left + 18, y + 6), fill=SERIES[0] if palette is None else GRID, outline=FAINT)
        _write(draw, left + 24, y, key[0], 13)
        x = left + 50 + _width(key[0], 13)
        draw.line((x, y - 8, x, y + 8), fill=INK, width=3)
        _write(draw, x + 8, y, f"{key[1]} (difference in brackets)", 13)
    return np.asarray(canvas)


def confusion_picture(matrix: np.ndarray, classes: Sequence[str], title: str = "") -> np.ndarray:
    """A confusion matrix (rows: truth, columns: prediction), each row in percent of its pixels; empty rows are grey."""
    matrix = np.asarray(matrix, float)
    size, cell, gap = 13, 36, 8
    names = max(_width(name, size) for name in classes)
    left, top = names + 30 + gap, names + 30 + gap + 34 * bool(title)
    side = cell * len(classes)
    canvas, draw = _canvas(top + side + 40, max(left + side + 16, _width(title, 18) + 24))
    if title:
        _write(draw, 12, 22, title, 18)
    _write(draw, left + side / 2, top + side + 20, "% of the true class's pixels", size, "mm", FAINT)
    _write(draw, left, top - names - 22, "predicted", size, colour=FAINT)
    _write_up(canvas, 14, top, "true", size, FAINT)
    for n, name in enumerate(classes):
        middle = (n + 0.5) * cell
        _write(draw, left - gap, top + middle, name, size, "rm")
        _write_up(canvas, left + middle, top - gap, name, size, INK, bottom=True)
        total = matrix[n].sum()
        for m, count in enumerate(matrix[n]):
            share = count / total if total else 0.0
            x, y = left + m * cell, top + n * cell
            shade = _shade(share) if total else GRID
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=shade)
            if share >= 0.0005:
                text = f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.1f}"
                _write(draw, x + cell / 2 - 1, y + cell / 2, text, 13, "mm", PAPER if share > 0.45 else INK)
    return np.asarray(canvas)


def _shade(share: float) -> tuple[int, int, int]:
    """White to deep blue; the square root makes confusions of a few percent visible."""
    return tuple(round(255 + (dark - 255) * math.sqrt(share)) for dark in (8, 64, 129))


def _write_up(canvas: Image.Image, x: float, y: float, text: str, size: int, colour, bottom: bool = False):
    """Text that reads upwards, centred on x; y is where it begins (`bottom`) or its upper end."""
    strip = Image.new("RGB", (_width(text, size) + 2, math.ceil(size * 1.4)), PAPER)
    _write(ImageDraw.Draw(strip), 1, strip.height / 2, text, size, colour=colour)
    strip = strip.transpose(Image.Transpose.ROTATE_90)
    canvas.paste(strip, (round(x - strip.width / 2), round(y - strip.height if bottom else y)))


# ---- files ---------------------------------------------------------------------------------------------------------

def save_png(path: str | Path, rgb: np.ndarray):
    """Write a picture; the name appears only when the file is whole."""
    _save(Path(path), Image.fromarray(np.ascontiguousarray(rgb)))


def save_palette_png(path: str | Path, label: np.ndarray, palette: Palette):
    """Write a label map as an indexed PNG: the pixel values are the labels, a viewer shows the colours."""
    picture = Image.fromarray(np.ascontiguousarray(label))
    table = np.full((256, 3), HATCH[0][0], np.uint8)
    table[:len(palette)] = palette
    picture.putpalette(table.tobytes())
    _save(Path(path), picture)


def _save(path: Path, picture: Image.Image):
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            picture.save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
