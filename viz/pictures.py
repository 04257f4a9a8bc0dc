"""Pictures of label maps: colours, overlays, legends, contact sheets. Plots of numbers are in plots.py.

A picture is an array (H, W, 3), uint8, RGB; a label map is (H, W), uint8, 255 = ignore. Pictures grow to hold their
text.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from config import IGNORE
from files.atomic import atomic_write
from files.labels import IGNORE_GREY

WHITE, INK, FAINT = (255, 255, 255), (33, 37, 41), (108, 117, 125)
WRONG = (214, 0, 28)

Palette = Sequence[Sequence[int]]


# ----------------------------------------------------------------------------------------------------------------------
# label maps

def colourise(label: np.ndarray, palette: Palette) -> np.ndarray:
    """A label map in its colours; ignore and labels the palette does not know are grey."""
    table = np.full((256, 1, 3), IGNORE_GREY, np.uint8)
    table[:len(palette), 0] = palette
    return cv2.LUT(cv2.merge([label] * 3), table)          # a fifth of the time of table[label]


def overlay(image: np.ndarray, label: np.ndarray, palette: Palette, alpha: float = 0.6) -> np.ndarray:
    """The photo under its label map, with thin white lines between the classes.

    Black classes (the background in most palettes) only dim the photo, or most of it would be lost in the dark.
    """
    rgb = cv2.addWeighted(image, 1 - alpha, colourise(label, palette), alpha, 0)
    black = np.zeros(256, np.uint8)
    black[:len(palette)] = [255 * (not any(colour)) for colour in palette]
    cv2.copyTo(cv2.convertScaleAbs(image, alpha=1 - alpha / 2), cv2.LUT(label, black), rgb)
    return _outlined(rgb, label)


def drawn_label(label: np.ndarray, palette: Palette) -> np.ndarray:
    """A label map in its colours with thin white lines between the classes: dark ones stand out from the black."""
    return _outlined(colourise(label, palette), label)


def errors(image: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Where a prediction is wrong, in red on the pale grey photo; pixels to ignore are grey."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    rgb = cv2.cvtColor(cv2.convertScaleAbs(grey, alpha=0.35, beta=160), cv2.COLOR_GRAY2RGB)
    rgb[label != prediction] = WRONG
    rgb[label == IGNORE] = IGNORE_GREY
    return rgb


def _outlined(rgb: np.ndarray, label: np.ndarray) -> np.ndarray:
    lined = cv2.bitwise_or(rgb, cv2.merge([_outlines(label)] * 3))
    strength = min(1.0, max(0.4, math.sqrt(label.size) / 250))      # in a small picture one pixel is a thick line
    return cv2.addWeighted(lined, strength, rgb, 1 - strength, 0)


def _outlines(label: np.ndarray) -> np.ndarray:
    """255 on the pixels where two classes meet, one pixel wide for each 600 of the picture's side; 0 elsewhere."""
    edge = np.zeros(label.shape, bool)
    edge[:, 1:] = label[:, 1:] != label[:, :-1]
    edge[1:] |= label[1:] != label[:-1]
    edge = edge.astype(np.uint8) * 255
    width = round(math.sqrt(label.size) / 600)
    return cv2.dilate(edge, np.ones((width, width), np.uint8)) if width > 1 else edge


# ----------------------------------------------------------------------------------------------------------------------
# text

font = lru_cache(ImageFont.load_default)                   # Pillow's own, of a size


def text_width(text: str, size: int) -> int:
    text = _drawable(text)
    return math.ceil(font(size).getlength(text))


def draw_text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, anchor: str = "lm", colour=INK):
    """One line of text; `anchor` says where in it the point (x, y) is: l, m, r across, m down."""
    text = _drawable(text)
    draw.text((x, y), text, fill=colour, font=font(size), anchor=anchor)


def _drawable(text: str) -> str:
    """A file name that is no valid UTF-8, with its bytes escaped: a font takes characters only."""
    return text.encode(errors="backslashreplace").decode()


def wrap(text: str, size: int, width: int) -> list[str]:
    """Lines of about `width` pixels: a letter is 0.6 of its height wide, on average."""
    return textwrap.wrap(text, max(1, 5 * width // (3 * size)))


def blank(height: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (width, height), WHITE)
    return picture, ImageDraw.Draw(picture)


# ----------------------------------------------------------------------------------------------------------------------
# legends and sheets

def with_legend(picture: np.ndarray, classes: Sequence[str], palette: Palette, shown: Iterable[int] | None = None,
                size: int | None = None) -> np.ndarray:
    """The picture with a legend of the classes `shown` (None: all), beside or below it by its shape.

    `size`: height of the text in pixels; if None it grows with the picture, but never gets smaller than 12.
    """
    height, width = picture.shape[:2]
    labels = range(len(classes)) if shown is None else sorted({int(label) for label in shown})
    entries = [(classes[i], tuple(palette[i])) if i < len(classes) else
               ("ignore" if i == IGNORE else f"label {i}", (IGNORE_GREY,) * 3) for i in labels]
    if not entries:
        return picture.copy()
    size = size or max(12, round(math.sqrt(height * width) / 40))
    step, gap = math.ceil(size * 1.5), size // 2
    column = size + 3 * gap + max(text_width(name, size) for name, _ in entries)

    def layout(columns: int, below: bool) -> tuple[int, int]:
        high, wide = math.ceil(len(entries) / columns) * step + 2 * gap, columns * column + gap
        return (height + high, max(width, wide)) if below else (max(height, high), width + wide)

    def cost(choice: tuple[int, bool]) -> float:
        high, wide = layout(*choice)
        return math.hypot(high, wide) * (1.3 if high > height and wide > width else 1)    # empty strips are ugly

    columns, below = min(((n, below) for n in range(1, len(entries) + 1) for below in (False, True)), key=cost)
    canvas, draw = blank(*layout(columns, below))
    canvas.paste(Image.fromarray(picture), (0, 0))
    left, top = (gap, height + gap) if below else (width + gap, gap)
    rows = math.ceil(len(entries) / columns)
    for n, (name, colour) in enumerate(entries):
        x, y = left + n // rows * column, top + n % rows * step + (step - size) // 2
        draw.rectangle((x, y, x + size - 1, y + size - 1), fill=colour, outline=FAINT)
        draw_text(draw, x + size + gap, y + size / 2, name, size)
    return np.array(canvas)


def sheet(rows: Sequence[Sequence[np.ndarray | None]], titles: Sequence[str] = (),
          captions: Sequence[str | Sequence[str]] = (), height: int = 240) -> np.ndarray:
    """Rows of pictures of any sizes (None: an empty cell), each fitted into `height` x 1.5 `height` pixels.

    `titles` head the columns. `captions` are below the rows: a text for each row, or several, evenly spread over its
    columns. All are wrapped to fit.
    """
    size, gap = max(13, height // 16), max(8, height // 24)
    line = math.ceil(size * 1.35)
    cells = [[None if picture is None else _fit(picture, height, height * 3 // 2) for picture in row] for row in rows]
    columns = range(max([len(row) for row in cells] + [len(titles)], default=0))
    widths = [max([row[n].shape[1] for row in cells if n < len(row) and row[n] is not None] + [height // 2])
              for n in columns]
    lefts = [gap + sum(widths[:n]) + n * gap for n in columns]
    total = sum(widths) + (len(widths) + 1) * gap
    heads = [wrap(title, size, width) for title, width in zip(titles, widths)]
    notes = []                                             # for each row: (left, lines) of each of its captions
    for texts in [*captions, *[()] * (len(cells) - len(captions))]:
        texts = [texts] if isinstance(texts, str) else texts
        places = [lefts[n * len(lefts) // len(texts)] for n in range(len(texts))]
        notes.append([(left, wrap(text, size, right - left - gap))
                      for text, left, right in zip(texts, places, [*places[1:], total])])
    head = max((len(lines) for lines in heads), default=0) * line + gap
    highs = [height + gap + line * max((len(lines) for _, lines in row), default=0) for row in notes]
    canvas, draw = blank(head + sum(highs), total)
    for left, width, lines in zip(lefts, widths, heads):
        for n, text in enumerate(lines):
            draw_text(draw, left + width / 2, gap / 2 + (n + 0.5) * line, text, size, "mm")
    top = head
    for row, texts, high in zip(cells, notes, highs):
        for left, width, picture in zip(lefts, widths, row):
            if picture is not None:
                place = left + (width - picture.shape[1]) // 2, top + (height - picture.shape[0]) // 2
                canvas.paste(Image.fromarray(picture), place)
        for left, lines in texts:
            for n, text in enumerate(lines):
                draw_text(draw, left, top + height + (n + 0.5) * line, text, size, colour=FAINT)
        top += high
    return np.array(canvas)


def _fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    scale = min(height / picture.shape[0], width / picture.shape[1])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)


# ----------------------------------------------------------------------------------------------------------------------
# files: a name appears only when the file is complete

def save_png(path: str | Path, rgb: np.ndarray):
    _save(path, Image.fromarray(np.ascontiguousarray(rgb)), format="PNG")


def save_jpeg(path: str | Path, rgb: np.ndarray):
    """For overlays of photos: a fifth of a PNG's size, a tenth of its time; no chroma subsampling, lines stay sharp."""
    _save(path, Image.fromarray(np.ascontiguousarray(rgb)), format="JPEG", quality=92, subsampling=0)


def save_palette_png(path: str | Path, label: np.ndarray, palette: Palette, text: dict[str, str] | None = None):
    """An indexed PNG; `text`: its metadata."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    table = np.full((256, 3), IGNORE_GREY, np.uint8)
    table[:len(palette)] = palette
    picture = Image.fromarray(np.ascontiguousarray(label))
    picture.putpalette(table.tobytes())
    _save(path, picture, format="PNG", pnginfo=info)


def _save(path: str | Path, picture: Image.Image, **options):
    content = io.BytesIO()                                 # Pillow does not notice a JPEG that a full disk cut off
    with atomic_write(path) as part:
        picture.save(content, **options)
        part.write_bytes(content.getvalue())
