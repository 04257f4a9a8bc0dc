"""The embedded data set: drawn people with exact labels in LIP's 20 classes. The paper has no such thing; it is ours.

    image, label = draw(seed, index, size=(160, 128))      # uint8 RGB (160, 128, 3), uint8 (160, 128)
    python -m synthetic.draw --out figures --count 6            # some of them as PNG files, to look at or to parse

A picture is a pure function of (seed, index, size): nothing is stored, and no byte depends on the process or on threads
(of OpenCV only polygons, and the resizing and blur of 8-bit pictures, which are exact). `skeleton.py` poses the people,
`person.py` dresses them, `canvas.py` paints; here is what surrounds them.
"""

import argparse
import math
from pathlib import Path

import cv2
import numpy as np

from config import user_path
from synthetic.canvas import BACKGROUND, SKINS, Canvas, any_cloth, any_colour, jitter
from synthetic.person import Person
from synthetic.skeleton import Dice, Figure


def backdrop(d: Dice, rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Soft or hard fields of colour."""
    grid = rng.integers(0, 256, (int(d(2, 8)), int(d(2, 7)), 3), np.uint8)
    tints = np.array([any_colour(d) for _ in range(2)])[rng.integers(0, 2, len(grid))]
    soft = d(0.05, 0.5)
    grid = (grid * soft + tints[:, None] * (1 - soft)).astype(np.uint8)
    return cv2.resize(grid, (w, h), interpolation=cv2.INTER_NEAREST if d.chance(0.2) else cv2.INTER_LINEAR_EXACT)


def box(cv: Canvas, d: Dice, x: float, y: float, width: float, height: float, cloth: tuple | None = None):
    corners = np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)])
    cv.fill(corners[None], BACKGROUND, cloth or any_cloth(d, 200), d.chance(0.3))


def clutter(cv: Canvas, d: Dice, h: int, w: int):
    """Floor, boxes, poles, tables, foliage, stones and limbs of nobody."""
    unit = max(h, w)
    if d.chance(0.6):
        box(cv, d, 0, h * d(0.5, 0.9), w, h)
    for _ in range(int(d(1, 6))):
        x, y = d(-0.1, 1) * w, d(-0.1, 1) * h
        d.pick((_crate, _crate, _pole, _table, _limb, _stone, _bush, _bush))(cv, d, x, y, unit)


def out_of_focus(image: np.ndarray, d: Dice) -> np.ndarray:
    """What lies behind the people, as a lens sees it that is focused on them: blurred and hazy."""
    sigma = max(image.shape) / 64
    size = 2 * math.ceil(2 * sigma) + 1
    return cv2.convertScaleAbs(cv2.GaussianBlur(image, (size, size), sigma), alpha=0.5, beta=d(30, 100))


def _crate(cv: Canvas, d: Dice, x: float, y: float, unit: float):
    box(cv, d, x, y, unit * d(0.05, 0.4), unit * d(0.05, 0.5))


def _pole(cv: Canvas, d: Dice, x: float, y: float, unit: float):
    box(cv, d, x, y - unit * 0.5, unit * d(0.01, 0.06), unit * d(0.3, 1.2))


def _table(cv: Canvas, d: Dice, x: float, y: float, unit: float):
    wide, tall, cloth = unit * d(0.15, 0.4), unit * d(0.1, 0.3), any_cloth(d, unit)
    for left, width, height in ((0, 1, 0.15), (0, 0.1, 1), (0.9, 0.1, 1)):
        box(cv, d, x + left * wide, y, width * wide, height * tall, cloth)


def _limb(cv: Canvas, d: Dice, x: float, y: float, unit: float):
    angle, length, r = d(0, 6.3), unit * d(0.1, 0.3), unit * d(0.015, 0.04)
    table = [(x, y, r, 0, 0, r), (x + length * math.cos(angle), y + length * math.sin(angle), r * 0.7, 0, 0, r * 0.7)]
    cv.tube(np.array(table), BACKGROUND, (jitter(d, d.pick(SKINS), 20), None))


def _stone(cv: Canvas, d: Dice, x: float, y: float, unit: float):
    cv.tube(np.array([(x, y, unit * d(0.03, 0.1), 0, 0, unit * d(0.03, 0.1))]), BACKGROUND, (any_colour(d), None))


def _bush(cv: Canvas, d: Dice, x: float, y: float, unit: float):
    green, r = (d(20, 110), d(70, 150), d(20, 70)), unit * d(0.02, 0.05)
    for _ in range(6):
        ends = [(x + unit * d(-0.14, 0.14), y + unit * d(-0.14, 0.14), r, 0, 0, r * d(0.6, 1.1)) for _ in range(2)]
        cv.tube(np.array(ends), BACKGROUND, (jitter(d, green, 25), None))


def pose(d: Dice, h: int, w: int, alone: bool) -> Figure:
    """A figure with its place in the picture; one in eight is too big for it."""
    fig = Figure(d)
    x0, y0, x1, y1 = fig.box()
    full = d(0.88, 1.02) if alone else d(0.65, 0.95)
    scale = min(h * full / (y1 - y0), w * (full + 0.05) / (x1 - x0), h * 1.5)
    if d.chance(0.12):
        scale *= d(1.15, 1.8)
    spare = np.array([w - (x1 - x0) * scale, h - (y1 - y0) * scale])
    x, y = spare * (d(-0.05, 1.05), d() if spare[1] > 0 else d.pick((0, 0, 1))) - np.array([x0, y0]) * scale
    middle = fig.torso[3, 0] * scale                       # the chest stays in the picture
    fig.place(scale, np.array([min(max(x, 0.18 * w - middle), 0.82 * w - middle), y]))
    return fig


def expose(image: np.ndarray, pieces: np.ndarray, d: Dice, rng: np.random.Generator) -> np.ndarray:
    """Dark seams between pieces, light that falls off, a colour cast, noise and blur."""
    h, w = pieces.shape
    gain = np.linspace(-1, 1, h, dtype=np.float32)[:, None] * np.float32(d(-0.2, 0.2)) + np.float32(d(0.75, 1.2)) \
        + np.linspace(-1, 1, w, dtype=np.float32) * np.float32(d(-0.2, 0.2))
    seam = np.float32(d(0.75, 1.0))
    gain[1:][pieces[1:] != pieces[:-1]] *= seam
    gain[:, 1:][pieces[:, 1:] != pieces[:, :-1]] *= seam
    cast = np.tile(np.array([d(0.88, 1.12) for _ in range(3)], np.float32), w)
    noise = np.frombuffer(rng.bytes(image.size), np.int8).reshape(h, 3 * w)
    grain, lift = np.float32(d(0.01, 0.1)), np.float32(d(-15, 15))
    flat = image.reshape(h, 3 * w)
    for y in range(0, h, 32):                              # in bands: larger temporaries cost a page fault a piece
        rows = slice(y, y + 32)
        band = np.repeat(gain[rows], 3, 1) * cast * flat[rows] + noise[rows] * grain + lift
        flat[rows] = np.clip(band, 0, 255)
    sigma = d(0.3, 0.9) * max(h, w) / 160
    size = 2 * math.ceil(1.5 * sigma) + 1
    return cv2.GaussianBlur(image, (size, size), sigma)


def draw(seed: int, index: int, size: tuple[int, int] = (480, 480)) -> tuple[np.ndarray, np.ndarray]:
    """Picture number `index` of the stream `seed`: image uint8 (h, w, 3) RGB, label uint8 (h, w) of LIP's classes."""
    h, w = size
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    d = Dice(rng)
    cv = Canvas(backdrop(d, rng, h, w), d)
    clutter(cv, d, h, w)
    cv.image[:] = out_of_focus(cv.image, d)
    cv.pieces[:] = 0                                       # and it has no seams
    count = d.pick((1,) * 17 + (2, 2, 3))
    figures = [pose(d, h, w, count == 1) for _ in range(count)]
    for fig in sorted(figures, key=lambda fig: max(table[:, 1].max() for table in fig.foot)):
        Person(cv, fig, d).paint()
    if d.chance(0.1):                                      # something stands in front
        pole = d.chance(0.5)
        box(cv, d, d(0, 0.8) * w, -1 if pole else d(0.5, 0.9) * h, w * (d(0.03, 0.09) if pole else d(0.2, 0.6)), 2 * h)
    label = np.take(np.array(cv.classes, np.uint8), cv.pieces)
    return expose(cv.image, cv.pieces, d, rng), label


def main():
    parser = argparse.ArgumentParser(description="Draw people into PNG files.")
    parser.add_argument("--out", type=user_path, default=Path("figures"), help="folder of the files")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seed", type=int, default=2**31 - 2, help="training takes 0, validation 2147483647")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 360), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args()
    if min(args.size) < 1 or args.seed < 0:
        parser.error("--size must be two numbers of pixels, --seed not negative")
    args.out.mkdir(parents=True, exist_ok=True)
    for index in range(args.count):
        image, _ = draw(args.seed, index, tuple(args.size))
        cv2.imwrite(str(args.out / f"figure_{index:03d}.png"), image[..., ::-1])
    print(f"{args.count} pictures in {args.out}")


if __name__ == "__main__":
    main()
