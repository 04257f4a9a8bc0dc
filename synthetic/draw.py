"""Drawn people with exact labels in LIP's 20 classes: data for the demo and the tests, not from the paper.

    image, label = draw(seed, index, size=(160, 128))      # uint8 RGB (160, 128, 3), uint8 (160, 128)
    python -m synthetic.draw --out drawings --count 6      # PNG files to look at or to parse

A drawing is a pure function of (seed, index, size), the same in every process. A person is a skeleton in three
dimensions, turned and projected, so that left and right are the person's: seen from the front the left arm is on the
image's right. Limbs and clothes are chains of discs, whose hulls are filled in the image and in the label.
"""

import argparse
import colorsys
import math
from pathlib import Path

import cv2
import numpy as np

from config import user_path

(BACKGROUND, HAT, HAIR, GLOVE, SUNGLASSES, UPPER, DRESS, COAT, SOCKS, PANTS, JUMPSUITS, SCARF, SKIRT, FACE,
 LEFT_ARM, RIGHT_ARM, LEFT_LEG, RIGHT_LEG, LEFT_SHOE, RIGHT_SHOE) = range(20)

SKINS = ((250, 214, 188), (236, 188, 150), (222, 164, 122), (190, 130, 92), (148, 96, 66), (106, 68, 48), (78, 50, 38))
HAIRS = ((28, 22, 20), (48, 32, 24), (84, 54, 32), (126, 84, 46), (186, 142, 78), (224, 196, 136), (150, 62, 30))
ANY = ((0, 1), (0.2, 0.9), (0.3, 0.95))
# Usual colours of clothes, as ranges of hue, saturation and value; three in four have them.
COLOURS = {
    DRESS: ((0.85, 1), (0.4, 0.9), (0.6, 0.95)), JUMPSUITS: ((0.05, 0.12), (0.6, 0.95), (0.6, 0.95)),
    PANTS: ((0.58, 0.66), (0.35, 0.75), (0.25, 0.6)), SKIRT: ((0.7, 0.82), (0.3, 0.9), (0.4, 0.9)),
    COAT: ((0.06, 0.1), (0.1, 0.35), (0.2, 0.6)), SCARF: ((0.15, 0.4), (0.6, 0.95), (0.7, 0.95)),
    GLOVE: ((0.45, 0.52), (0.6, 0.95), (0.5, 0.9)), SOCKS: ((0, 1), (0, 0.15), (0.85, 0.98)),
}
PATTERNS = {DRESS: "dots", JUMPSUITS: "bands", SKIRT: "pleats", SCARF: "stripes"}      # half of them have it

# Ranges of (lift, turn) of both bones of a limb, in degrees. Lift: hanging (0) to upright (180). Turn: sideways (0),
# forward (90), inward (180), backward (-90).
ARMS = (((4, 18), (0, 80), (2, 30), (40, 110)), ((4, 18), (0, 80), (2, 30), (40, 110)),      # hanging
        ((10, 40), (20, 90), (60, 110), (70, 150)),        # bent before the body
        ((30, 50), (-30, 10), (35, 65), (150, 190)),       # hand on the hip
        ((60, 100), (0, 40), (50, 120), (0, 60)),          # stretched out
        ((115, 160), (0, 60), (130, 178), (0, 180)))       # raised
STAND = (0, 7), (0, 60), (0, 6), (-90, 0)
WIDE = (12, 26), (0, 20), (4, 18), (0, 10)
STEP = (12, 34), (80, 95), (0, 12), (-90, -80)             # a walker's leg in front
BACK = (6, 24), (-100, -85), (22, 50), (-95, -85)          # and behind
SIT = (74, 92), (62, 88), (0, 16), (70, 110)
STANCES = (STAND, STAND), (STAND, STAND), (STEP, BACK), (BACK, STEP), (WIDE, WIDE), (SIT, SIT)

CIRCLE = np.array([(math.cos(a * math.pi / 8), math.sin(a * math.pi / 8)) for a in range(16)])


class Dice:
    """Random numbers, generated in bulk: one call of a numpy Generator costs as much as drawing a polygon."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.values = rng, []

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self.values:
            self.values = self.rng.random(512).tolist()
        return low + (high - low) * self.values.pop()

    def chance(self, probability: float) -> bool:
        return self() < probability

    def pick(self, options):
        return options[int(self() * len(options))]

    def colour(self, hsv=ANY) -> np.ndarray:
        return 255 * np.array(colorsys.hsv_to_rgb(*(self(*span) for span in hsv)))

    def near(self, colour, amount: float = 12) -> np.ndarray:
        return np.clip(np.array(colour) + [self(-amount, amount) for _ in range(3)], 6, 250)


class Canvas:
    """An image (h, w, 3) and its label (h, w), painted together."""

    def __init__(self, image: np.ndarray):
        self.image, self.label = image, np.zeros(image.shape[:2], np.uint8)

    def chain(self, discs, cls: int, colour: np.ndarray, pattern: str = ""):
        """Paints the hulls of consecutive discs (x, y, radius); the light comes from above, on the left."""
        discs = np.array(discs, float)
        centres, radii = discs[:, None, :2], discs[:, 2, None, None]
        before = self.label.copy() if pattern else None
        self._fill(centres + CIRCLE * radii, cls, colour * 0.8)
        self._fill(CIRCLE * (0.65 * radii) + (centres - 0.12 * radii), None, colour * 1.05)
        if pattern:
            self._print(discs, cls, before, colour, pattern)

    def _fill(self, circles: np.ndarray, cls: int | None, colour: np.ndarray):
        """Fills the hulls of consecutive circles (n, 16, 2), or of one; `cls` None: in the image only."""
        colour = np.minimum(colour, 255).tolist()
        circles = (circles * 16).astype(np.int32)          # sixteenths of a pixel: the shift of 4 below
        for n in range(max(1, len(circles) - 1)):
            hull = cv2.convexHull(circles[n:n + 2].reshape(-1, 2))
            if cls is not None:
                cv2.fillConvexPoly(self.label, hull, cls, cv2.LINE_8, 4)
            cv2.fillConvexPoly(self.image, hull, colour, cv2.LINE_AA, 4)

    def _print(self, discs: np.ndarray, cls: int, before: np.ndarray, colour: np.ndarray, pattern: str):
        """Paints a darker or lighter pattern on a chain, along its axis."""
        radius = discs[:, 2].max() + 1
        x0, y0 = np.maximum(discs[:, :2].min(0) - radius, 0).astype(int)
        x1, y1 = np.maximum(discs[:, :2].max(0) + radius, 0).astype(int)
        box = slice(y0, max(y0, min(y1, len(self.label)))), slice(x0, max(x0, min(x1, self.label.shape[1])))
        y, x = np.mgrid[box].astype(np.float32)
        axis = discs[-1, :2] - discs[0, :2]
        axis = axis / (np.hypot(*axis) + 1e-6) / max(2.5, radius * 0.4)
        u = (x - x0) * axis[0] + (y - y0) * axis[1]        # along the axis
        v = (y - y0) * axis[0] - (x - x0) * axis[1]        # across
        u, v = u - np.floor(u), v - np.floor(v)
        mask = {"stripes": u < 0.5, "bands": u < 0.3, "pleats": v < 0.45,
                "dots": (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.1}[pattern]
        mask &= (self.label[box] == cls) & (before[box] != cls)
        self.image[box][mask] = np.clip(colour * (0.4 if colour.mean() > 110 else 2.2), 0, 255)


class Person:
    """A posed skeleton with clothes. Index 0 of each pair is the person's left.

    In the person's own frame x points to their left, y up, z forward; the unit is about the person's height.
    """

    def __init__(self, dice: Dice):
        self.dice, self.woman, self.girth = dice, dice(), dice(0.9, 1.2)
        yaw = math.radians((180 if dice.chance(0.3) else 0) + 40 * (dice(-1, 1) + dice(-1, 1)) / 2)
        lean = math.radians(dice(-6, 6))
        turn = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
        tilt = np.array([[math.cos(lean), -math.sin(lean), 0], [math.sin(lean), math.cos(lean), 0], [0, 0, 1]])
        self.view = tilt @ turn                            # rows: to the right, up, to the viewer
        self.front = self.view[2, 2] > 0
        stance = dice.pick(STANCES)
        self.arms, self.legs = [], []
        for side in (1, -1):
            shoulder = np.array([side * 0.105 * self.girth, 0.27, 0])
            hip = np.array([side * 0.048 * self.girth, -0.03, 0])
            elbow, wrist, _ = self._limb(shoulder, side, dice.pick(ARMS), (0.15, 0.13, 0.045))
            self.arms.append([shoulder, elbow, wrist, wrist + (wrist - elbow) * 0.35])
            knee, ankle, _ = self._limb(hip, side, stance[side < 0], (0.22, 0.21, 0))
            out = math.radians(dice(5, 30))
            toe = ankle + np.array([side * math.sin(out), -0.25, math.cos(out)]) * 0.09
            self.legs.append([hip, knee, ankle, toe])

    def _limb(self, start: np.ndarray, side: int, ranges: tuple, lengths: tuple) -> list[np.ndarray]:
        joints = [start]
        for n in (0, 2):
            lift, turn = math.radians(self.dice(*ranges[n])), math.radians(self.dice(*ranges[n + 1]))
            bone = np.array([side * math.sin(lift) * math.cos(turn), -math.cos(lift), math.sin(lift) * math.sin(turn)])
            joints.append(joints[-1] + bone * lengths[n // 2])
        return [*joints[1:], joints[-1]]

    def place(self, h: int, w: int, alone: bool):
        """Chooses the person's size and place in the image."""
        dice = self.dice
        points = np.array([*self.arms[0], *self.arms[1], *self.legs[0], *self.legs[1], (0, 0.5, 0)]) @ self.view.T
        low, high = points[:, :2].min(0) - 0.06, points[:, :2].max(0) + 0.04
        self.scale = min(h / (high[1] - low[1]), w / (high[0] - low[0])) * dice(0.85, 1) * (1 if alone else 0.8)
        self.scale *= dice(1.15, 1.7) if dice.chance(0.12) else 1        # some are too large for the image
        spare = np.array([w, h]) - (high - low) * self.scale
        shift = spare * [dice(), dice()] if spare[1] > 0 else spare * [dice(), 0]
        self.origin = np.array([shift[0] - low[0] * self.scale, shift[1] + high[1] * self.scale])

    def disc(self, point, radius: float) -> tuple[float, float, float]:
        """(x, y, radius) in pixels of a sphere in the person's frame."""
        x, y = (self.view @ np.asarray(point, float))[:2] * (self.scale, -self.scale) + self.origin
        return x, y, radius * self.scale

    def along(self, joints: list, start: float, end: float, radii: tuple, grow: float = 1.0) -> list[tuple]:
        """Discs of a limb between two fractional joints: 0 shoulder or hip, 1 elbow or knee, 2 wrist or ankle."""
        stops = [start, *[n for n in range(1, len(joints)) if start < n < end], end]
        discs = []
        for t in stops:
            n = min(int(t), len(joints) - 2)
            point = joints[n] + (joints[n + 1] - joints[n]) * (t - n)
            discs.append(self.disc(point, (radii[n] + (radii[n + 1] - radii[n]) * (t - n)) * grow * self.girth))
        return discs

    def dress(self):
        """Chooses clothes, hair and skin."""
        dice = self.dice
        self.skin, self.hair = dice.near(dice.pick(SKINS)), dice.near(dice.pick(HAIRS))
        kind = dice()
        self.main = DRESS if kind < 0.1 + 0.16 * self.woman else JUMPSUITS if kind > 0.83 else UPPER
        self.lower = self.main if self.main != UPPER else SKIRT if dice.chance(0.15 + 0.4 * self.woman) else PANTS
        worn = {self.main, self.lower} | {cls for cls, p in ((COAT, 0.22), (SCARF, 0.26), (GLOVE, 0.28), (SOCKS, 0.4),
                                                             (HAT, 0.32), (SUNGLASSES, 0.35)) if dice.chance(p)}
        self.worn = {cls: (dice.colour(COLOURS.get(cls, ANY) if dice.chance(0.75) else ANY),
                           PATTERNS.get(cls, "stripes" if cls == UPPER else "") if dice.chance(0.5) else "")
                     for cls in sorted(worn)}
        self.shoes = dice.colour()
        self.sleeve = 2.0 if COAT in worn else dice.pick((0, 0.5, 0.8, 2.0, 2.0))
        self.trouser = dice.pick((0.6, 1.5, 2.0, 2.0))
        self.sock = 2 - dice(0.3, 0.9)
        self.trouser = min(self.trouser, self.sock - 0.1) if SOCKS in worn else self.trouser
        self.hem = dice.pick((0.7, 0.95, 1.5))
        self.length = dice.pick(("short", "short", "long", "bald") if self.woman < 0.4 else ("short", "long", "long"))

    def paint(self, canvas: Canvas):
        """Paints all parts, the farthest first."""
        self.canvas = canvas
        layers = [(0.0, self._torso), (0.02, self._skirt), (0.04, self._coat), (0.3, self._head),
                  (0.4 if not self.front else -0.4, self._mane)]
        for side in (0, 1):
            depth = [float(self.view[2] @ np.mean(limb, 0)) for limb in (self.arms[side], self.legs[side])]
            layers.append((depth[0] + (0.1 if depth[0] > -0.02 else -0.2), lambda side=side: self._arm(side)))
            layers.append((depth[1] if depth[1] > 0.08 else depth[1] - 0.2, lambda side=side: self._leg(side)))
        for _, layer in sorted(layers, key=lambda layer: layer[0]):
            layer()

    def cloth(self, discs: list, cls: int, worn_as: int | None = None):
        self.canvas.chain(discs, cls, *self.worn[cls if worn_as is None else worn_as])

    def _arm(self, side: int):
        radii = (0.046, 0.038, 0.03, 0.032)
        self.canvas.chain(self.along(self.arms[side], 0, 3, radii), LEFT_ARM + side, self.skin)
        if self.sleeve:
            cls = COAT if COAT in self.worn else self.main
            self.cloth(self.along(self.arms[side], 0, self.sleeve, radii, 1.25), cls)
        if GLOVE in self.worn:
            self.cloth(self.along(self.arms[side], 1.7, 3, radii, 1.25), GLOVE)

    def _leg(self, side: int):
        radii, leg = (0.062, 0.048, 0.034, 0.03), self.legs[side]
        self.canvas.chain(self.along(leg, 0, 2, radii), LEFT_LEG + side, self.skin)
        if SOCKS in self.worn:
            self.cloth(self.along(leg, self.sock, 2, radii, 1.15), SOCKS)
        shoe = [self.disc(leg[2] + (0, -0.02, -0.02), 0.034), self.disc(leg[3], 0.032)]
        self.canvas.chain(shoe, LEFT_SHOE + side, self.shoes)
        if self.lower in (PANTS, JUMPSUITS):
            self.cloth(self.along(leg, 0, self.trouser, radii, 1.2), self.lower)

    def _torso(self):
        g = self.girth
        neck = [self.disc((0, y, 0), 0.034 * g) for y in (0.26, 0.36)]
        self.canvas.chain(neck, BACKGROUND, self.skin)
        wide = 0.075 - 0.012 * self.woman
        for x in (-0.035, 0.035):                          # two chains side by side
            discs = [self.disc((x, y, 0), r * g) for y, r in ((0.25, 0.06), (0.12, wide), (0.0, 0.065), (-0.05, 0.06))]
            self.cloth(discs[:3], self.main)
            if self.lower in (PANTS, JUMPSUITS):
                self.cloth(discs[2:], self.lower)

    def _skirt(self):
        if self.lower in (SKIRT, DRESS):
            bottom = [leg[min(1, int(self.hem))] + (leg[1 + int(self.hem)] - leg[int(self.hem)]) * (self.hem % 1)
                      for leg in self.legs]
            hips = [self.disc((x, 0.02, 0), 0.06 * self.girth) for x in (0.03, -0.03)]
            ends = [self.disc(point, 0.075 * self.girth) for point in bottom]
            for first, last in ((hips[0], ends[0]), (hips[1], ends[1]), (hips[0], ends[1]), (hips[1], ends[0])):
                self.cloth([first, last], self.lower)
            self.cloth([ends[0], ends[1]], self.lower)

    def _coat(self):
        if COAT in self.worn:
            gap = 0.05 if self.front else 0.0              # open in front
            for side, leg in zip((1, -1), self.legs):
                x = side * (0.045 + gap)
                self.cloth([self.disc((x, 0.25, 0.02), 0.055), self.disc((x, 0.05, 0.02), 0.055),
                            self.disc(leg[0] + (leg[1] - leg[0]) * 0.7 + (side * gap, 0, 0), 0.06)], COAT)

    def _mane(self):
        if self.length == "long":
            self.canvas.chain([self.disc((0, 0.42, -0.03), 0.085), self.disc((0, 0.3, -0.05), 0.08)], HAIR, self.hair)

    def _on_face(self, cls: int, colour: np.ndarray, *discs: tuple[float, float, float]):
        """Discs (x, y, radius) on the face, in units of the head's radius."""
        discs = [self.disc((x * 0.075, 0.415 + y * 0.075, 0.07), r * 0.075) for x, y, r in discs]
        self.canvas.chain(discs, cls, colour)

    def _head(self):
        if SCARF in self.worn:
            self.cloth([self.disc((-0.04, 0.29, 0.02), 0.04), self.disc((0.04, 0.29, 0.02), 0.04)], SCARF)
            self.cloth([self.disc((0.03, 0.28, 0.05), 0.03), self.disc((0.03, 0.12, 0.06), 0.035)], SCARF)
        bald = self.length == "bald"
        self.canvas.chain([self.disc((0, 0.4, 0), 0.07), self.disc((0, 0.435, 0), 0.075)], FACE if bald else HAIR,
                          self.skin if bald else self.hair)
        if self.front:
            dark = np.array((40, 28, 24))
            self._on_face(FACE, self.skin, (0, -0.45, 0.62), (0, 0.1, 0.75))
            self._on_face(FACE, np.array((180, 70, 70)), (-0.15, -0.55, 0.1), (0.15, -0.55, 0.1))
            for x in (-0.32, 0.32):
                self._on_face(FACE, dark, (x, 0.1, 0.13))
                if SUNGLASSES in self.worn:
                    self._on_face(SUNGLASSES, dark, (x - 0.12, 0.1, 0.22), (x + 0.12, 0.1, 0.22))
        if HAT in self.worn:
            self.cloth([self.disc((-0.035, 0.47, 0), 0.055), self.disc((0.035, 0.47, 0), 0.055)], HAT)
            brim = 0.13 if self.woman > 0.5 else 0.075
            self.cloth([self.disc((-brim, 0.455, 0.03), 0.018), self.disc((brim, 0.455, 0.03), 0.018)], HAT)


# ----------------------------------------------------------------------------------------------------------------------
# the image around them

def backdrop(dice: Dice, rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """A blurred background of soft colours and shapes."""
    grid = rng.integers(0, 256, (int(dice(2, 8)), int(dice(2, 7)), 3), np.uint8)
    canvas = Canvas(cv2.resize(grid // 2 + 40, (w, h), interpolation=cv2.INTER_LINEAR_EXACT))
    for _ in range(int(dice(1, 7))):
        size, (x, y) = max(h, w) * dice(0.02, 0.12), (dice(0, w), dice(0, h))
        ends = [(x, y, size), (x + max(h, w) * dice(-0.3, 0.3), y + max(h, w) * dice(-0.3, 0.3), size * dice(0.3, 1))]
        canvas.chain(ends, BACKGROUND, dice.near(dice.pick(SKINS)) if dice.chance(0.3) else dice.colour())
    sigma = max(h, w) / 64
    return cv2.convertScaleAbs(cv2.GaussianBlur(canvas.image, (0, 0), sigma), alpha=0.6, beta=dice(20, 80))


def expose(image: np.ndarray, dice: Dice, rng: np.random.Generator) -> np.ndarray:
    """Adds uneven light, a colour cast and noise."""
    h, w = image.shape[:2]
    light = np.linspace(-1, 1, h)[:, None] * dice(-0.2, 0.2) + np.linspace(-1, 1, w) * dice(-0.2, 0.2) + dice(0.75, 1.2)
    cast = np.array([dice(0.9, 1.1) for _ in range(3)], np.float32)
    noise = np.frombuffer(rng.bytes(image.size), np.int8).reshape(image.shape) * np.float32(dice(0.01, 0.08))
    return np.clip(image * (light.astype(np.float32)[..., None] * cast) + noise, 0, 255).astype(np.uint8)


def draw(seed: int, index: int, size: tuple[int, int] = (480, 480)) -> tuple[np.ndarray, np.ndarray]:
    """Drawing number `index` of the stream `seed`: image uint8 (h, w, 3) RGB, label uint8 (h, w) of LIP's classes."""
    h, w = size
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    dice = Dice(rng)
    canvas = Canvas(backdrop(dice, rng, h, w))
    count = 2 if dice.chance(0.12) else 1
    for _ in range(count):
        person = Person(dice)
        person.place(h, w, count == 1)
        person.dress()
        person.paint(canvas)
    return expose(canvas.image, dice, rng), canvas.label


def main():
    parser = argparse.ArgumentParser(description="Draw people into PNG files.")
    parser.add_argument("--out", type=user_path, default=Path("drawings"), help="folder of the files")
    parser.add_argument("--count", type=int, default=6)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for index in range(args.count):
        image, _ = draw(2**31 - 2, index, (480, 360))         # training takes seed 0, validation 2**31 - 1
        cv2.imwrite(str(args.out / f"drawing_{index:03d}.png"), image[..., ::-1])
    print(f"{args.count} drawings in {args.out}")


if __name__ == "__main__":
    main()
