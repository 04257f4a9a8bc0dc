"""Colours, cloths, and the canvas on which `person.py` and `synthetic.py` paint picture and label. Ours, not the paper's.

Everything painted is a tube: the convex hulls of consecutive cross-sections are filled in the picture and, hard-edged,
in a map of piece numbers that carries the label, in LIP's classes. A cloth is a colour and a pattern, or None.
"""

import colorsys
import math

import cv2
import numpy as np

from synthetic.skeleton import Dice

(BACKGROUND, HAT, HAIR, GLOVE, SUNGLASSES, UPPER, DRESS, COAT, SOCKS, PANTS, JUMPSUITS, SCARF, SKIRT, FACE,
 LEFT_ARM, RIGHT_ARM, LEFT_LEG, RIGHT_LEG, LEFT_SHOE, RIGHT_SHOE) = range(20)

SKINS = ((250, 214, 188), (236, 188, 150), (222, 164, 122), (190, 130, 92), (148, 96, 66), (106, 68, 48), (78, 50, 38))
NEUTRALS = ((30, 32, 38), (70, 70, 76), (150, 148, 144), (226, 222, 214), (188, 158, 118), (106, 78, 54), (38, 48, 82),
            (84, 92, 66))

CIRCLE = np.array([(math.cos(a * math.pi / 6), math.sin(a * math.pi / 6)) for a in range(12)])
PRINTS = ("", "", "", "stripes", "checks", "dots", "fade", "worn")
# Colours that clothes have more often than not, as ranges of hue, saturation and value: denim, work wear, white socks.
HABITS = {
    DRESS: ((0.85, 1.0), (0.4, 0.9), (0.6, 0.95)), JUMPSUITS: ((0.05, 0.12), (0.6, 0.95), (0.6, 0.95)),
    PANTS: ((0.58, 0.66), (0.35, 0.75), (0.25, 0.6)), SKIRT: ((0.7, 0.82), (0.3, 0.9), (0.4, 0.9)),
    COAT: ((0.06, 0.1), (0.1, 0.35), (0.2, 0.6)), SCARF: ((0.15, 0.4), (0.6, 0.95), (0.7, 0.95)),
    GLOVE: ((0.45, 0.52), (0.6, 0.95), (0.5, 0.9)), SOCKS: ((0.0, 1.0), (0.0, 0.15), (0.85, 0.98)),
}
SHADES, SHADES_SMALL = ((np.reshape(sizes, (-1, 1, 1, 1)), lights) for sizes, lights in (
    ((1, 0.8, 0.55), (0.78, 0.92, 1.06)), ((1, 0.65), (0.78, 1.04))))       # a piece's layers: size and light
GRAIN = np.random.default_rng(0).random((64, 64), np.float32) * 0.45   # of worn cloth


def jitter(d: Dice, colour: tuple, amount: float) -> tuple:
    return tuple(min(250.0, max(6.0, c + d(-amount, amount))) for c in colour)


def any_colour(d: Dice, neutral: float = 0.35) -> tuple:
    if d.chance(neutral):
        return jitter(d, d.pick(NEUTRALS), 14)
    return hsv_colour(d(), d(0.25, 0.9), d(0.3, 0.95))


def hsv_colour(hue: float, saturation: float, value: float) -> tuple:
    return tuple(255 * c for c in colorsys.hsv_to_rgb(hue, saturation, value))


def any_cloth(d: Dice, scale: float, unlike: tuple = (), neutral: float = 0.35, kinds: tuple = PRINTS,
              worn_as: int = BACKGROUND) -> tuple:
    """A cloth whose colour differs clearly from those of the cloths `unlike`; `scale`: pixels per body height.

    Three in four have the colour that is usual for what they are `worn_as`.
    """
    habit = HABITS.get(worn_as) if d.chance(0.75) else None
    for _ in range(8):
        colour = hsv_colour(*(d(*span) for span in habit)) if habit else any_colour(d, neutral)
        if all(sum(abs(a - b) for a, b in zip(colour, other[0])) > 130 for other in unlike):
            break
    kind = d.pick(kinds)
    if not kind:
        return colour, None
    other = tone((colour, None), 0.45)[0] if kind == "pleats" else any_colour(d)
    turn = {"pleats": math.pi / 2, "bands": 0.0}.get(kind, d.pick((0.0, 0.0, d(-1, 1))))
    return colour, (kind, other, max(3.0, scale * d(0.025, 0.06) * (2.2 if kind == "bands" else 1)), turn)


def tone(cloth: tuple, factor: float) -> tuple:
    r, g, b = cloth[0]
    return (min(255.0, r * factor), min(255.0, g * factor), min(255.0, b * factor)), None


class Canvas:
    """The picture, and the map of piece numbers that carries the label."""

    def __init__(self, image: np.ndarray, dice: Dice):
        self.image, self.pieces, self.classes = image, np.zeros(image.shape[:2], np.uint16), [BACKGROUND]
        self.pixels = image.view("V3")[..., 0]             # a pixel as one value: masks on it are 30 times as fast
        angle = math.pi * dice(-0.83, -0.17)               # the light comes from above
        self.light = np.array([math.cos(angle), math.sin(angle)])

    def tube(self, table: np.ndarray, cls: int, cloth: tuple, arc: np.ndarray = CIRCLE, shade: bool = True):
        """Fill a tube, or the part of it that `arc` covers: points (n, 2) of the unit circle."""
        self.fill(table[:, None, :2] + arc @ table[:, 2:].reshape(-1, 2, 2), cls, cloth, shade)

    def fill(self, sections: np.ndarray, cls: int, cloth: tuple, shade: bool = True):
        """Fill the hulls of consecutive point sets (k, n, 2), lighter inside; then the cloth's pattern."""
        number = len(self.classes)
        self.classes.append(cls)
        layers, lights = sections[None], (1.0,)
        if shade:
            centre = np.add.reduce(sections, 1, keepdims=True) / sections.shape[1]
            out = sections - centre
            radius = np.hypot(out[:, :1, :1], out[:, :1, 1:])
            sizes, lights = SHADES if radius[0, 0, 0] > 8 else SHADES_SMALL
            layers = centre + out * sizes + self.light * radius * (0.5 - sizes / 2)
        for light, points in zip(lights, (layers * 16).astype(np.int32)):      # sixteenths: the shift of 4 below
            colour = tone(cloth, light)[0]
            for i in range(max(1, len(points) - 1)):
                hull = cv2.convexHull(points[i:i + 2].reshape(-1, 2))
                if light is lights[0]:
                    cv2.fillConvexPoly(self.pieces, hull, number, cv2.LINE_8, 4)
                cv2.fillConvexPoly(self.image, hull, colour, cv2.LINE_AA, 4)
        if cloth[1] is not None:
            self._print(number, sections, *cloth[1])

    def _print(self, number: int, sections: np.ndarray, kind: str, other: tuple, period: float, turn: float):
        """Mix a second colour into the pixels of one piece, by a pattern laid along the piece's axis."""
        x0, y0 = np.maximum(sections.min((0, 1)) - 2, 0).astype(int)
        x1, y1 = np.maximum(sections.max((0, 1)) + 3, 0).astype(int)
        pixels, inside = self.pixels[y0:y1, x0:x1], self.pieces[y0:y1, x0:x1] == number
        (sx, sy), (ex, ey) = sections[0].mean(0), sections[-1].mean(0)
        angle = math.atan2(ey - sy, ex - sx) + turn
        c, s = math.cos(angle) / period, math.sin(angle) / period
        xs = np.arange(inside.shape[1], dtype=np.float32) + np.float32(x0 - sx)
        ys = np.arange(inside.shape[0], dtype=np.float32)[:, None] + np.float32(y0 - sy)
        along, across = xs * c + ys * s, ys * c - xs * s
        u, v = along - np.floor(along), across - np.floor(across)
        if kind in ("stripes", "pleats"):
            weight = (u < 0.45) * np.float32(0.9)
        elif kind == "bands":
            weight = (u < 0.22) * np.float32(0.9)
        elif kind == "checks":
            weight = ((u < 0.5) * np.float32(1) + (v < 0.5)) * np.float32(0.45)
        elif kind == "dots":
            weight = ((u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.1) * np.float32(1)
        elif kind == "fade":
            weight = np.clip(along / 8, 0, 1)
        else:
            weight = GRAIN[np.arange(y0, y0 + len(ys))[:, None] & 63, np.arange(x0, x0 + len(xs)) & 63]
        inside &= weight > 0
        old = pixels[inside].view(np.uint8).reshape(-1, 3)
        new = old + (np.array(other, np.float32) - old) * weight[inside][:, None]
        pixels[inside] = new.astype(np.uint8).view("V3")[:, 0]
