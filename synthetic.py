"""The embedded data set: drawn people with exact labels in LIP's 20 classes. No paper behind it; it is ours.

    image, label = draw(seed, index, size=(160, 128))      # uint8 RGB (160, 128, 3), uint8 (160, 128)

A picture is a pure function of (seed, index, size). A figure is a skeleton in three dimensions, turned and projected, so
left and right are the person's: seen from the front the left arm is on the picture's right, from behind on its left.
Everything painted is a tube: a table of cross-sections, one a row, `(x, y, ax, ay, bx, by)` in pixels: a centre and the
two half-axes of an ellipse. Consecutive sections are filled by their convex hull, in the picture and, hard-edged, in a map
of piece numbers, from which the label is read at the end. As in LIP, a sleeve has the garment's label, a bare arm the
arm's, and a bare neck none. The neighbours of the figure, their shadows and what stands before them are background.
"""

import colorsys
import math

import cv2
import numpy as np

(BACKGROUND, HAT, HAIR, GLOVE, SUNGLASSES, UPPER, DRESS, COAT, SOCKS, PANTS, JUMPSUITS, SCARF, SKIRT, FACE,
 LEFT_ARM, RIGHT_ARM, LEFT_LEG, RIGHT_LEG, LEFT_SHOE, RIGHT_SHOE) = range(20)

SKINS = ((250, 214, 188), (236, 188, 150), (222, 164, 122), (190, 130, 92), (148, 96, 66), (106, 68, 48), (78, 50, 38))
HAIRS = ((28, 22, 20), (48, 32, 24), (84, 54, 32), (126, 84, 46), (186, 142, 78), (224, 196, 136), (150, 62, 30), (150, 148, 146))
NEUTRALS = ((30, 32, 38), (70, 70, 76), (150, 148, 144), (226, 222, 214), (188, 158, 118), (106, 78, 54), (38, 48, 82), (84, 92, 66))

# Bones as (lift, turn) of the upper and of the lower one, each a range in degrees. Lift: from hanging (0) to upright (180).
# Turn: sideways (0), forward (90), inward (180), backward (-90).
ARMS = {
    "hang": ((4, 18), (0, 80), (2, 30), (40, 110)),
    "bent": ((10, 40), (20, 90), (60, 110), (70, 150)),
    "hip": ((30, 50), (-30, 10), (35, 65), (150, 190)),
    "out": ((60, 100), (0, 40), (50, 120), (0, 60)),
    "raised": ((115, 160), (0, 60), (130, 178), (0, 180)),
    "wave": ((60, 100), (-10, 30), (140, 178), (0, 180)),
    "reach": ((45, 90), (50, 100), (60, 110), (60, 110)),
    "behind": ((8, 25), (-70, -20), (20, 45), (-150, -110)),
}
LEGS = {
    "stand": ((0, 7), (0, 60), (0, 6), (-90, 0)),
    "fore": ((12, 34), (80, 95), (0, 12), (-90, -80)),
    "hind": ((6, 24), (-100, -85), (22, 50), (-95, -85)),
    "wide": ((12, 26), (0, 20), (4, 18), (0, 10)),
    "sit": ((74, 92), (62, 88), (0, 16), (70, 110)),
    "squat": ((70, 96), (40, 75), (12, 32), (-110, -90)),
    "lift": ((40, 90), (75, 100), (0, 25), (-100, -80)),
}
STANCES = (("stand", "stand"),) * 6 + (("fore", "hind"),) * 6 + (("wide", "wide"),) * 2 + (("sit", "sit"),) * 3 \
    + (("squat", "squat"), ("stand", "lift"), ("stand", "fore"))

CIRCLE = np.radians(np.arange(0, 360, 30))


class Dice:
    """Random numbers in bulk: a call to a numpy Generator costs as much as the polygon it is for."""

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


class Canvas:
    """The picture, and the map of piece numbers that carries the label."""

    def __init__(self, image: np.ndarray, dice: Dice):
        self.image, self.dice = image, dice
        self.pieces = np.zeros(image.shape[:2], np.uint16)
        self.classes = [BACKGROUND]
        angle = dice(-2.6, -0.5)                           # where the light comes from: above
        self.light = np.array([math.cos(angle), math.sin(angle)])

    def tube(self, table: np.ndarray, cls: int, cloth: tuple, phi: np.ndarray = CIRCLE, shade: bool = True):
        """Fill a tube, or the part of it that `phi` (angles in its cross-sections) covers."""
        axes = table[:, None, 2:4] * np.cos(phi)[:, None] + table[:, None, 4:6] * np.sin(phi)[:, None]
        self.fill(table[:, None, :2] + axes, cls, cloth, shade)

    def fill(self, sections: np.ndarray, cls: int, cloth: tuple, shade: bool = True):
        """Fill the hulls of consecutive point sets (k, n, 2), darker at the edge; then the cloth's pattern."""
        colour, pattern = cloth
        self.classes.append(cls)
        number = len(self.classes) - 1
        hulls = _hulls(sections)
        edge = [c * 0.78 for c in colour] if shade else colour
        for hull in hulls:
            cv2.fillConvexPoly(self.pieces, hull, number, cv2.LINE_8, 4)
            cv2.fillConvexPoly(self.image, hull, edge, cv2.LINE_AA, 4)
        if shade:
            centre = sections.mean(1, keepdims=True)
            radius = np.abs(sections - centre).max((1, 2), keepdims=True)
            inner = centre + (sections - centre) * 0.66 + radius * 0.2 * self.light
            for hull in _hulls(inner):
                cv2.fillConvexPoly(self.image, hull, [min(255.0, c * 1.04 + 4) for c in colour], cv2.LINE_AA, 4)
        if pattern is not None:
            self._print(np.concatenate(hulls)[:, 0] >> 4, number, sections, pattern)

    def _print(self, outline: np.ndarray, number: int, sections: np.ndarray, pattern: tuple):
        """Mix a second colour into the pixels of one piece, by a pattern laid along the piece's axis."""
        kind, other, period, turn = pattern
        x0, y0 = np.maximum(outline.min(0), 0)
        x1, y1 = np.maximum(outline.max(0) + 1, 0)
        ys, xs = np.nonzero(self.pieces[y0:y1, x0:x1] == number)
        ys, xs = ys + y0, xs + x0
        start, end = sections[0].mean(0), sections[-1].mean(0)
        angle = math.atan2(end[1] - start[1], end[0] - start[0]) + turn
        dx, dy = xs - start[0], ys - start[1]
        along, across = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
        if kind == "stripes":
            weight = (along % period < period * 0.45) * 0.9
        elif kind == "checks":
            weight = ((along % period < period * 0.5) * 0.45 + (across % period < period * 0.5) * 0.45)
        elif kind == "dots":
            weight = ((along % period - period / 2) ** 2 + (across % period - period / 2) ** 2 < period * period * 0.09) * 1.0
        elif kind == "fade":
            weight = np.clip(along / (8 * period), 0, 1)
        else:                                              # worn
            weight = ((xs * 7919 + ys * 104729 + (xs * ys) % 61 * 31) % 97) / 220
        old = self.image[ys, xs]
        self.image[ys, xs] = old + (np.asarray(other) - old) * weight[:, None]


def _hulls(sections: np.ndarray) -> list[np.ndarray]:
    points = np.rint(sections * 16).astype(np.int32)       # sixteenths of a pixel: the shift of 4 above
    if len(points) == 1:
        return [cv2.convexHull(points[0])]
    return [cv2.convexHull(points[i:i + 2].reshape(-1, 2)) for i in range(len(points) - 1)]


def sample(table: np.ndarray, *positions: float) -> np.ndarray:
    """Rows of a table at fractional indices."""
    t = np.clip(positions, 0, len(table) - 1)
    i = np.minimum(t.astype(int), len(table) - 2)
    f = (t - i)[:, None]
    return table[i] * (1 - f) + table[i + 1] * f


def grow(table: np.ndarray, factor) -> np.ndarray:
    """A tube with wider cross-sections; `factor` is a number or one a row."""
    wide = table.copy()
    wide[:, 2:] *= np.reshape(factor, (-1, 1))
    return wide


def stretch(table: np.ndarray, start: float, end: float, factor: float, flare: float = 1.0) -> np.ndarray:
    """The piece of a limb between two fractional indices, with the joints in between: a sleeve, a sock."""
    inner = [float(i) for i in range(len(table)) if start < i < end]
    rows = sample(table, start, *inner, end)
    return grow(rows, np.linspace(factor, factor * flare, len(rows)))


def bone(side: int, lift: float, turn: float, length: float) -> np.ndarray:
    lift, turn = math.radians(lift), math.radians(turn)
    return length * np.array([side * math.sin(lift) * math.cos(turn), -math.cos(lift), math.sin(lift) * math.sin(turn)])


def rotation(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """Turn about the upright axis, then nod forward, then lean; in degrees. Rows: to the right, up, to the viewer."""
    (c, s), (cp, sp), (cr, sr) = ((math.cos(math.radians(a)), math.sin(math.radians(a))) for a in (yaw, pitch, roll))
    turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    lean = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return lean @ nod @ turn


class Figure:
    """A posed skeleton, projected: its tubes in pixels. Index 0 of a pair is the person's left.

    In the person's own frame x points to their left, y up, z forward; the unit is about the person's height.
    Torso rows: 0 neck, 1 collar, 2 shoulders, 3 chest, 4 waist, 5 hips, 6 crotch. Arms: shoulder, elbow, forearm, wrist.
    Legs: hip, knee, calf, ankle.
    """

    def __init__(self, dice: Dice):
        d = self.dice = dice
        self.woman = d()                                   # body shape, 0 to 1; hair and skirts follow it loosely
        self.girth = d(0.86, 1.22)
        turned = 180.0 if d.chance(0.42) else 0.0
        spread = 85 if d.chance(0.12) else 48
        self.yaw = turned + spread * (d(-1, 1) + d(-1, 1)) / 2
        lean = d(35, 75) if d.chance(0.07) else d(-4, 14)
        view = rotation(self.yaw, d(2, 16), d(-7, 7))
        upper = view @ rotation(d(-12, 12), lean, d(-7, 7))
        head = upper @ rotation(d(-35, 35), d(-12, 14) - 0.5 * lean, d(-12, 12))
        self.view, self.upper, self.head = view, upper, head
        self.size = d(0.92, 1.12)                          # of the head
        self._spine()
        stance = d.pick(STANCES)
        stance = stance[::-1] if d.chance(0.5) else stance
        arms = ("hang", "hang") if d.chance(0.25) else (d.pick(tuple(ARMS)), d.pick(tuple(ARMS)))
        self.sitting = stance[0] == "sit"
        self.arm, self.hand, self.thumb, self.leg, self.foot, self.sole = [], [], [], [], [], []
        self.arm_depth, self.leg_depth, self.knee_depth, self.thigh = [], [], [], []
        for side, arm, leg in zip((1, -1), arms, stance):
            self._arm(side, [d(*r) for r in ARMS[arm]])
            self._leg(side, [d(*r) for r in LEGS[leg]])
        z, x = upper[2, 2], upper[2, 0]
        self.facing = math.degrees(math.atan2(z, x))       # the angle of a torso section that points to the viewer

    def _tube(self, matrix: np.ndarray, joints, radii) -> np.ndarray:
        table = np.zeros((len(joints), 6))
        table[:, :2] = (np.array(joints) @ matrix[:2].T) * (1, -1)
        table[:, 2] = table[:, 5] = radii
        return table

    def _rings(self, matrix: np.ndarray, centres, rx, rz) -> np.ndarray:
        flip = np.array([1, -1])
        return np.concatenate([np.array(centres) @ matrix[:2].T * flip, np.outer(rx, matrix[:2, 0] * flip),
                               np.outer(rz, matrix[:2, 2] * flip)], 1)

    def _spine(self):
        g, w = self.girth, self.woman
        self.shoulder = (0.108 + 0.012 * (1 - w)) * (0.7 + 0.3 * g)
        rx = np.array([0.034, 0.058, 0.094, 0.094 - 0.006 * w, 0.086 - 0.022 * w, 0.088 + 0.01 * w, 0.07]) * g
        rz = np.array([0.034, 0.042, 0.052, 0.062, 0.054, 0.064, 0.05]) * g * g
        ys = np.array([0.315, 0.292, 0.265, 0.205, 0.11, 0.01, -0.06])
        spine = np.stack([ys * 0, ys, ys * 0], 1)
        self.torso = np.concatenate([self._rings(self.upper, spine[:5], rx[:5], rz[:5]),
                                     self._rings(self.view, spine[5:], rx[5:], rz[5:])])
        self.chest_depth = self.upper[2] @ spine[3]
        self.head_radius = np.array([0.071, 0.094]) * self.size
        centre = np.array([0, 0.315 + 0.085 * self.size, 0.012])
        self.skull = (self.upper @ centre)[:2] * (1, -1)
        self.head_depth = self.upper[2] @ centre
        self.neck = self._tube(self.upper, [(0, 0.28, -0.005), tuple(centre * (1, 0.9, 0))], [0.036 * g, 0.034 * g])

    def _arm(self, side: int, pose: list):
        g = self.girth * (1 - 0.12 * self.woman)
        shoulder = np.array([side * self.shoulder, 0.262, 0])
        elbow = shoulder + bone(side, pose[0], pose[1], 0.158)
        forearm = bone(side, pose[2], pose[3], 0.142)
        wrist = elbow + forearm
        palm, tip = wrist + forearm * 0.27, wrist + forearm * 0.5
        thumb = palm + forearm * 0.1 + np.array([-side * 0.02, 0, 0.016])
        self.arm.append(self._tube(self.upper, [shoulder, elbow, elbow + forearm * 0.35, wrist],
                                   np.array([0.036, 0.027, 0.028, 0.02]) * g))
        self.hand.append(self._tube(self.upper, [wrist, palm, tip], [0.02, 0.028, 0.015]))
        self.thumb.append(self._tube(self.upper, [palm, thumb], [0.014, 0.009]))
        self.arm_depth.append(self.upper[2] @ (elbow + wrist * 2) / 3 - self.chest_depth)

    def _leg(self, side: int, pose: list):
        g, d = self.girth, self.dice
        hip = np.array([side * 0.05 * g, -0.03, 0])
        knee = hip + bone(side, pose[0], pose[1], 0.225)
        shin = bone(side, pose[2], pose[3], 0.215)
        ankle = knee + shin
        out, tilt = math.radians(d(4, 28)), 0.7 * math.atan2(-shin[2], -shin[1])
        tilt = tilt if tilt > 0.2 else 0.0                 # a trailing foot stands on its toes
        toe = np.array([side * math.sin(out), -math.sin(tilt), math.cos(out) * math.cos(tilt)])
        down = np.array([0, -math.cos(tilt), -math.sin(tilt)])
        heel, ball, tip = ankle - toe * 0.024 + down * 0.03, ankle + toe * 0.075 + down * 0.036, ankle + toe * 0.115 + down * 0.038
        self.leg.append(self._tube(self.view, [hip, knee, knee + shin * 0.32, ankle],
                                   np.array([0.056, 0.038, 0.039, 0.024]) * g))
        self.foot.append(self._tube(self.view, [tip, ball, ankle + down * 0.004, heel, ball], [0.02, 0.029, 0.028, 0.025, 0.029]))
        self.sole.append(self._tube(self.view, np.array([heel, ball, tip]) + down * 0.019, [0.012, 0.013, 0.01]))
        self.leg_depth.append(self.view[2] @ (knee + ankle))
        self.knee_depth.append(self.view[2] @ (knee - hip))
        self.thigh.append(np.array([hip, knee, knee + shin * 0.32, ankle]))

    def hem(self, t: float, flare: float) -> np.ndarray:
        """A cross-section around both legs at the fractional index `t` of their joints."""
        left, right = sample(self.thigh[0], t)[0], sample(self.thigh[1], t)[0]
        half = np.abs(left - right) / 2
        return self._rings(self.view, [(left + right) / 2], [half[0] + 0.05 * flare], [half[2] + 0.05 * flare])

    def place(self, scale: float, shift: np.ndarray):
        """From units to pixels; afterwards every table can be painted."""
        self.scale, self.shift = scale, shift
        for group in ([self.torso, self.neck], self.arm, self.hand, self.thumb, self.leg, self.foot, self.sole):
            for table in group:
                table *= scale
                table[:, :2] += shift
        self.skull = self.skull * scale + shift
        self.head_radius = self.head_radius * scale

    def box(self) -> np.ndarray:
        """Left, top, right, bottom of the joints and the head."""
        points = np.concatenate([self.torso, *self.arm, *self.hand, *self.leg, *self.foot])[:, :2]
        low, high = points.min(0), points.max(0)
        return np.array([min(low[0], self.skull[0]) - 0.06, min(low[1], self.skull[1] - self.head_radius[1] * 1.1),
                         max(high[0], self.skull[0]) + 0.06, high[1] + 0.03])

    def on_head(self, points, clamp: bool = True) -> np.ndarray:
        """Points given on the unit sphere of the head (left, up, forward), in pixels; hidden ones go to the outline."""
        p = np.asarray(points, float) @ self.head.T
        if clamp:
            hidden = p[:, 2] < 0
            p[hidden, :2] /= np.linalg.norm(p[hidden, :2], axis=1, keepdims=True) + 1e-6
        jaw = 1 - 0.2 * np.clip(-p[:, 1], 0, 1)
        return self.skull + np.stack([p[:, 0] * jaw, -p[:, 1]], 1) * self.head_radius

    def visible(self, start: float, end: float) -> np.ndarray | None:
        """The part of the angles start..end of a torso section that the viewer sees, or None."""
        turns = 360 * round((self.facing - (start + end) / 2) / 360)
        low, high = max(start + turns, self.facing - 88), min(end + turns, self.facing + 88)
        return np.radians(np.linspace(low, high, 7)) if high - low > 3 else None


class Outfit:
    """What a figure wears; lengths are fractional indices of the limb or torso joints."""

    def __init__(self, dice: Dice, fig: Figure):
        d, s = dice, fig.scale
        self.skin = (_jitter(d, d.pick(SKINS), 10), None)
        self.hair = (_jitter(d, d.pick(HAIRS), 14), None)
        self.upper = _cloth(d, s)
        self.lower = _cloth(d, s, self.upper)
        self.coat = _cloth(d, s, self.upper, self.lower, neutral=0.6) if d.chance(0.27) else None
        self.scarf = _cloth(d, s, self.coat or self.upper) if d.chance(0.22) else None
        self.hat = d.pick(("cap", "brim", "beanie")) if d.chance(0.3) else ""
        self.hat_cloth, self.shoe = _cloth(d, s), _cloth(d, s, self.lower, neutral=0.5, plain=0.9)
        self.gloves = _cloth(d, s, self.coat or self.upper, plain=0.8) if d.chance(0.26) else None
        self.glasses = d.chance(0.36)
        self.kind = "dress" if d.chance(0.12 + 0.14 * fig.woman) else "jumpsuit" if d.chance(0.18) else "two"
        self.skirt = self.kind == "two" and d.chance(0.12 + 0.36 * fig.woman)
        self.hem = d.pick((d(0.45, 0.8), d(0.7, 1.15), d(1.1, 2.2)))       # of a skirt or dress
        self.flare = d(1.1, 1.9)
        self.tucked = d.chance(0.45)
        self.sleeve = d.pick((0.0, d(0.3, 0.45), d(0.5, 0.85), d(0.5, 0.85), d(1.3, 2.2), 3.0, 3.0))
        self.leg = d.pick((d(0.5, 1.0), d(0.6, 0.95), d(1.5, 2.3), d(2.2, 2.6), 3.0, 3.0))
        self.fit, self.wide = d(1.06, 1.3), d(0.95, 1.7)
        self.covered = not (self.skirt or self.kind == "dress")
        self.sock = d(0.45, 2.0) if d.chance(0.5) else 0.0
        self.sock_cloth = _cloth(d, s, self.lower, self.shoe)
        if self.sock and self.covered:
            self.leg = min(self.leg, 2.5)
        self.length = d.pick(("short", "short", "short", "bob", "long", "bald")) if fig.woman < 0.4 else \
            d.pick(("short", "bob", "bob", "long", "long", "long", "tail", "tail"))
        self.open = d(6, 40) if d.chance(0.8) else 0.5     # half angle of the gap in front of a coat
        self.coat_hem = d(0.25, 1.3)


def _jitter(d: Dice, colour, amount: float) -> tuple:
    return tuple(min(250.0, max(6.0, c + d(-amount, amount))) for c in colour)


def _colour(d: Dice, neutral: float) -> tuple:
    if d.chance(neutral):
        return _jitter(d, d.pick(NEUTRALS), 14)
    return tuple(255 * c for c in colorsys.hsv_to_rgb(d(), d(0.3, 0.95), d(0.3, 0.95)))


def _cloth(d: Dice, scale: float, *unlike: tuple | None, neutral: float = 0.3, plain: float = 0.5) -> tuple:
    """A colour, and a pattern or None; the colour differs clearly from that of the cloths `unlike`."""
    for _ in range(8):
        colour = _colour(d, neutral)
        if all(sum(abs(a - b) for a, b in zip(colour, cloth[0])) > 110 for cloth in unlike if cloth):
            break
    if d.chance(plain):
        return colour, None
    kind = d.pick(("stripes", "stripes", "checks", "dots", "fade", "worn"))
    turn = d.pick((0.0, 0.0, math.pi / 2, d(-1, 1)))
    return colour, (kind, _colour(d, 0.4), max(3.0, scale * d(0.025, 0.06)), turn)


def _tone(cloth: tuple, factor: float) -> tuple:
    return tuple(min(255.0, c * factor) for c in cloth[0]), None


def _paint_leg(cv: Canvas, fig: Figure, wear: Outfit, side: int):
    leg, foot = fig.leg[side], fig.foot[side]
    cv.tube(leg, LEFT_LEG + side, wear.skin)
    if wear.sock:
        cv.tube(stretch(leg, 3 - wear.sock, 3, 1.12), SOCKS, wear.sock_cloth)
    cv.tube(foot, LEFT_SHOE + side, wear.shoe)
    cv.tube(fig.sole[side], LEFT_SHOE + side, _tone(wear.shoe, 0.45 if sum(wear.shoe[0]) > 330 else 2.4), shade=False)
    if wear.covered:
        cv.tube(stretch(leg, 0, wear.leg, wear.fit, wear.wide), JUMPSUITS if wear.kind == "jumpsuit" else PANTS,
                wear.upper if wear.kind == "jumpsuit" else wear.lower)


def _paint_arm(cv: Canvas, fig: Figure, wear: Outfit, side: int):
    arm = fig.arm[side]
    cls = {"dress": DRESS, "jumpsuit": JUMPSUITS, "two": UPPER}[wear.kind]
    cv.tube(arm, LEFT_ARM + side, wear.skin)
    hand, cloth = (GLOVE, wear.gloves) if wear.gloves else (LEFT_ARM + side, wear.skin)
    scale = 1.15 if wear.gloves else 1.0
    cv.tube(grow(fig.thumb[side], scale), hand, cloth)
    cv.tube(grow(fig.hand[side], scale), hand, cloth)
    sleeve = 3.0 if wear.coat else wear.sleeve
    if sleeve:
        cv.tube(stretch(arm, 0, sleeve, 1.25 if wear.coat else 1.14, 1.1), COAT if wear.coat else cls, wear.coat or wear.upper)
    if wear.gloves:
        cv.tube(stretch(arm, 2.45, 3, 1.25, 1.1), GLOVE, cloth)


def _paint_lower(cv: Canvas, fig: Figure, wear: Outfit):
    order = sorted((0, 1), key=lambda side: fig.leg_depth[side])
    for side in order:
        _paint_leg(cv, fig, wear, side)
    cls, cloth = (JUMPSUITS, wear.upper) if wear.kind == "jumpsuit" else (SKIRT, wear.lower) if wear.skirt else (PANTS, wear.lower)
    if wear.covered:
        pelvis = grow(sample(fig.torso, 4.4, 5, 6), (1.02, 1.04, 1.0))
        cv.tube(pelvis, cls, cloth)
        if wear.kind == "two":
            _paint_seat(cv, fig, cls, cloth)
    elif wear.kind == "two":
        _paint_bell(cv, fig, wear, SKIRT, wear.lower, 4.4)


def _paint_bell(cv: Canvas, fig: Figure, wear: Outfit, cls: int, cloth: tuple, top: float):
    """A skirt, also a dress's: from the torso down around both legs."""
    cv.tube(np.concatenate([sample(fig.torso, top, 5) * 1.0, _hem(fig, wear.hem, wear.flare)]), cls, cloth)


def _hem(fig: Figure, t: float, flare: float) -> np.ndarray:
    table = fig.hem(t, flare) * fig.scale
    table[:, :2] += fig.shift
    return table


def _patch(cv: Canvas, fig: Figure, table: np.ndarray, start: float, end: float, cls: int, cloth: tuple):
    """Something on the surface of a tube between two angles: only what faces the viewer is painted."""
    phi = fig.visible(start, end)
    if phi is not None:
        cv.tube(table, cls, cloth, phi, shade=False)


def _paint_seat(cv: Canvas, fig: Figure, cls: int, cloth: tuple):
    dark = _tone(cloth, 0.6)
    _patch(cv, fig, sample(fig.torso, 5, 6), 88, 92, cls, dark)
    for middle in (-128, -52):                             # back pockets
        _patch(cv, fig, grow(sample(fig.torso, 5.1, 5.8), 1.02), middle - 18, middle + 18, cls, dark)


def _paint_torso(cv: Canvas, fig: Figure, wear: Outfit):
    cls = {"dress": DRESS, "jumpsuit": JUMPSUITS, "two": UPPER}[wear.kind]
    hem = 4.7 if wear.tucked or wear.kind != "two" else 5.5
    cv.tube(sample(fig.torso, 1, 2, 3, 4, hem), cls, wear.upper)
    d, dark = fig.dice, _tone(wear.upper, 0.6)
    style = d.pick(("vee", "buttons", "print", "zip", ""))
    if style == "vee":
        phi = fig.visible(60, 120)
        if phi is not None:
            top, tip = sample(fig.torso, 1, 2.4)
            cv.fill(np.concatenate([_points(top, phi), _points(tip, np.radians([90.0]))])[None], BACKGROUND, wear.skin, False)
    elif style == "print":
        _patch(cv, fig, sample(fig.torso, 2.5, 3.4), 55, 125, cls, (_colour(d, 0.3), None))
    elif style:
        width = 4 if style == "zip" else 7
        _patch(cv, fig, sample(fig.torso, 1, 2, 3, 4, hem), 90 - width, 90 + width, cls, dark if style == "zip" else _tone(wear.upper, 1.25))
    _patch(cv, fig, grow(sample(fig.torso, 1, 1.35), 1.05), 20, 160, cls, dark)
    if wear.kind != "two" or wear.tucked:
        _patch(cv, fig, grow(sample(fig.torso, 4.3, 4.7), 1.05), fig.facing - 88, fig.facing + 88,
               cls if wear.kind != "two" else SKIRT if wear.skirt else PANTS, _tone(wear.lower, 0.7))


def _points(row: np.ndarray, phi: np.ndarray) -> np.ndarray:
    return row[:2] + np.outer(np.cos(phi), row[2:4]) + np.outer(np.sin(phi), row[4:])


def _paint_coat(cv: Canvas, fig: Figure, wear: Outfit):
    table = np.concatenate([grow(sample(fig.torso, 0.8, 2, 3, 4, 5), (1.1, 1.1, 1.14, 1.2, 1.2)), grow(_hem(fig, wear.coat_hem, 1.4), 1.1)])
    gap = wear.open
    for start, end in ((-91, 90 - gap), (90 + gap, 271)):
        phi = fig.visible(start, end)
        if phi is not None:
            cv.tube(table, COAT, wear.coat, phi)
    for start, end in ((90 - gap - 14, 90 - gap), (90 + gap, 90 + gap + 14)):
        _patch(cv, fig, table[:3], start, end, COAT, _tone(wear.coat, 0.7))
    _patch(cv, fig, grow(table[3:], 1.01), -92, -88, COAT, _tone(wear.coat, 0.7))


def _paint_scarf(cv: Canvas, fig: Figure, wear: Outfit):
    ring = grow(sample(fig.torso, 0, 0.5, 1.1), (1.35, 1.6, 1.2))
    cv.tube(ring, SCARF, wear.scarf)
    middle = fig.dice.pick((70, 110, 90))
    _patch(cv, fig, grow(sample(fig.torso, 1, 2, 3, fig.dice(3.2, 4.4)), 1.16), middle - 16, middle + 16, SCARF, wear.scarf)


def _ring(height: float, radius: float, start: float = 0, end: float = 330, n: int = 12) -> np.ndarray:
    t = np.radians(np.linspace(start, end, n))
    return np.stack([np.cos(t) * radius, np.full(n, height), np.sin(t) * radius], 1)


def _paint_hair_mass(cv: Canvas, fig: Figure, wear: Outfit):
    """Hair that hangs: painted behind the body when the face is seen, over it from behind."""
    rx, ry = fig.head_radius
    if wear.length in ("bob", "long"):
        drop = ry * (1.1 if wear.length == "bob" else 2.4)
        top = np.array([*fig.skull, rx * 1.12, 0, 0, ry * 0.7])
        back = fig.on_head([(0, -0.2, -0.5)], False)[0]
        down = (fig.torso[3, :2] - fig.torso[0, :2]) / np.linalg.norm(fig.torso[3, :2] - fig.torso[0, :2] + 1e-6)
        bottom = np.array([*(back + down * drop * 0.8), rx * 1.15, 0, 0, ry * 0.3])
        cv.tube(np.stack([top, bottom]), HAIR, wear.hair)
    elif wear.length == "tail":
        knot = fig.on_head([(0, 0.35, -1.15)], False)[0]
        end = knot + (0, ry * 1.5)
        cv.tube(np.array([[*knot, rx * 0.35, 0, 0, rx * 0.35], [*(knot * 0.5 + end * 0.5), rx * 0.42, 0, 0, rx * 0.4],
                          [*end, rx * 0.15, 0, 0, rx * 0.15]]), HAIR, wear.hair)


def _paint_head(cv: Canvas, fig: Figure, wear: Outfit):
    skin, front = wear.skin, fig.head[2, 2]
    bald = wear.length == "bald"
    outline = np.stack([np.cos(CIRCLE), np.sin(CIRCLE)], 1)
    if bald:
        cv.fill(fig.on_head(np.stack([outline[:, 0], outline[:, 1], outline[:, 0] * 0], 1) @ fig.head)[None], FACE, skin)
    else:
        cv.fill((fig.skull + (0, -0.06 * fig.head_radius[1]) + outline * fig.head_radius * (1.08, 1.02))[None], HAIR, wear.hair)
    if front > -0.35:
        t = np.radians(np.arange(0, 360, 20))
        low = np.cos(t) < 0
        x, y = np.sin(t) * 0.88, np.where(low, 1.04, 0.72) * np.cos(t) - 0.12 * ~low
        z = np.sqrt(np.clip(1 - x * x - y * y, 0, 1))
        cv.fill(fig.on_head(np.stack([x, y, z], 1))[None], FACE, skin)
        _paint_face(cv, fig, wear)
    for side in (1, -1):
        ear = np.array([(side, 0.0, -0.08)])
        if (ear @ fig.head.T)[0, 2] > -0.25 and wear.length in ("short", "bald", "tail"):
            r = fig.head_radius[0] * 0.2
            cv.fill((fig.on_head(ear * 0.98, False)[0] + outline * (r, r * 1.5))[None], FACE, _tone(skin, 0.9))
    if wear.hat:
        _paint_hat(cv, fig, wear)


def _paint_face(cv: Canvas, fig: Figure, wear: Outfit):
    skin, d = wear.skin, fig.dice
    def spot(points, cls, colour):
        p = np.array(points, float)
        if (p @ fig.head.T)[:, 2].mean() > 0.12:
            cv.fill(fig.on_head(p)[None], cls, (colour, None), False)
    def oval(x, y, rx, ry):
        a = x + rx * np.cos(CIRCLE), y + ry * np.sin(CIRCLE)
        return np.stack([*a, np.sqrt(np.clip(1 - a[0] ** 2 - a[1] ** 2, 0.02, 1))], 1)
    if d.chance(0.2 * (1 - fig.woman)):                    # a beard is Face in LIP
        spot(oval(0, -0.62, 0.5, 0.36), FACE, wear.hair[0])
    spot(oval(0, -0.5, d(0.2, 0.34), d(0.06, 0.13)), FACE, _tone(((190, 80, 80), None), 0.4 + sum(skin[0]) / 1000)[0])
    nose = _tone(skin, 0.8)[0]
    p = np.array([(0, 0.15, 0.98), (0.16, -0.22, 0.95), (-0.16, -0.22, 0.95), (0, -0.16, 1.2)])
    if (p @ fig.head.T)[3, 2] > 0:
        cv.fill(fig.on_head(p, False)[None], FACE, (nose, None), False)
    for x in (-0.36, 0.36):
        spot(oval(x, 0.1, 0.17, 0.1), FACE, (235, 232, 228))
        spot(oval(x, 0.1, 0.09, 0.1), FACE, (40, 28, 24))
        spot(oval(x, 0.28, 0.2, 0.04), FACE, _tone(wear.hair, 0.7)[0])
    if wear.glasses:
        shade = d.pick(((18, 18, 22), (40, 24, 20), (20, 30, 70), (90, 40, 30)))
        for x in (-0.4, 0.4):
            spot(oval(x, 0.1, 0.34, 0.24), SUNGLASSES, shade)
        spot([(-0.9, 0.24, 0.3), (0.9, 0.24, 0.3), (0.2, 0.16, 0.97), (-0.2, 0.16, 0.97)], SUNGLASSES, shade)


def _paint_hat(cv: Canvas, fig: Figure, wear: Outfit):
    cloth = wear.hat_cloth
    tall, wide = {"cap": (0.95, 0.72), "brim": (1.2, 0.75), "beanie": (1.1, 0.62)}[wear.hat]
    crown = [_ring(0.36, 1.08), _ring(0.75, 0.98), _ring(tall, wide)]
    cv.fill(np.stack([fig.on_head(r, False) for r in crown]), HAT, cloth)
    if wear.hat == "brim":
        cv.fill(np.stack([fig.on_head(_ring(y, 1.7), False) for y in (0.33, 0.42)]), HAT, _tone(cloth, 0.85))
    elif wear.hat == "cap":
        peak = np.concatenate([_ring(0.36, 1.1, 30, 150), _ring(0.28, 1.75, 55, 125)])
        cv.fill(fig.on_head(peak, False)[None], HAT, _tone(cloth, 0.8))
    else:
        cv.fill(np.stack([fig.on_head(_ring(y, 1.12), False) for y in (0.3, 0.5)]), HAT, _tone(cloth, 0.8))


def paint_figure(cv: Canvas, fig: Figure):
    """All pieces of one figure, far ones first."""
    wear = Outfit(fig.dice, fig)
    behind = [fig.arm_depth[s] < -0.03 for s in (0, 1)]
    back = fig.head[2, 2] < 0
    head_far = fig.head_depth < fig.chest_depth - 0.06
    seated = max(fig.knee_depth) > 0.12
    def head():
        if not back:
            pass
        cv.tube(fig.neck, BACKGROUND, wear.skin)
        if wear.scarf:
            _paint_scarf(cv, fig, wear)
        _paint_head(cv, fig, wear)
    if not back:
        _paint_hair_mass(cv, fig, wear)
    for side in (0, 1):
        if behind[side]:
            _paint_arm(cv, fig, wear, side)
    if head_far:
        head()
    if not seated and not (wear.kind == "two" and wear.tucked):
        _paint_lower(cv, fig, wear)
        _paint_torso(cv, fig, wear)
    else:
        _paint_torso(cv, fig, wear)
        _paint_lower(cv, fig, wear)
    if wear.kind == "dress":
        _paint_bell(cv, fig, wear, DRESS, wear.upper, 4)
    if wear.coat:
        _paint_coat(cv, fig, wear)
    if not head_far:
        head()
    if back:
        _paint_hair_mass(cv, fig, wear)
    for side in (0, 1):
        if not behind[side]:
            _paint_arm(cv, fig, wear, side)


def background(d: Dice, rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """A scene without people: fields of colour, boxes, poles, foliage, limbs of nobody."""
    grid = rng.integers(0, 256, (int(d(2, 8)), int(d(2, 7)), 3), np.uint8)
    tint = np.array([_colour(d, 0.4) for _ in range(2)])
    soft = d(0.1, 0.6)
    grid = (grid * soft + tint[rng.integers(0, 2, grid.shape[0])][:, None] * (1 - soft)).astype(np.uint8)
    mode = cv2.INTER_NEAREST if d.chance(0.2) else cv2.INTER_LINEAR_EXACT
    image = cv2.resize(grid, (w, h), interpolation=mode)
    unit = max(h, w)
    def poly(points, colour):
        cv2.fillConvexPoly(image, cv2.convexHull(np.rint(np.array(points) * 16).astype(np.int32)), colour, cv2.LINE_AA, 4)
    def box(x, y, bw, bh, colour):
        poly([(x, y), (x + bw, y), (x + bw, y + bh), (x, y + bh)], colour)
    if d.chance(0.6):
        box(0, h * d(0.5, 0.9), w, h, _colour(d, 0.5))     # floor
    for _ in range(int(d(2, 12))):
        x, y, colour, kind = d(-0.1, 1) * w, d(-0.1, 1) * h, _colour(d, 0.4), d.pick("bbpplloof")
        if kind == "b":
            box(x, y, unit * d(0.05, 0.4), unit * d(0.05, 0.5), colour)
        elif kind == "p":
            box(x, d(-0.5, 0.3) * h, unit * d(0.01, 0.06), unit * d(0.3, 1.2), colour)
        elif kind == "l":                                  # like a limb
            a, length, r = d(0, 6.3), unit * d(0.1, 0.35), unit * d(0.015, 0.04)
            skin = _jitter(d, d.pick(SKINS), 20) if d.chance(0.5) else colour
            c, s = math.cos(a), math.sin(a)
            poly([(x - s * r, y + c * r), (x + s * r, y - c * r), (x + c * length + s * r * 0.6, y + s * length - c * r * 0.6),
                  (x + c * length - s * r * 0.6, y + s * length + c * r * 0.6)], skin)
        elif kind == "o":
            r = unit * d(0.02, 0.12)
            poly(np.stack([x + r * np.cos(CIRCLE), y + r * d(0.6, 1.5) * np.sin(CIRCLE)], 1), colour)
        else:
            for _ in range(25):
                r = unit * d(0.01, 0.035)
                green = _jitter(d, (60, 100, 40), 35)
                poly(np.stack([x + unit * d(-0.15, 0.15) + r * np.cos(CIRCLE), y + unit * d(-0.15, 0.15) + r * np.sin(CIRCLE)], 1), green)
    return image


def draw(seed: int, index: int, size: tuple[int, int] = (480, 480)) -> tuple[np.ndarray, np.ndarray]:
    """Picture number `index` of the stream `seed`: image uint8 (h, w, 3) RGB, label uint8 (h, w) of LIP's classes."""
    h, w = size
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    d = Dice(rng)
    image = background(d, rng, h, w)
    cv = Canvas(image, d)
    count = d.pick((1,) * 15 + (2,) * 3 + (3,) * 2)
    figures = []
    for _ in range(count):
        fig = Figure(d)
        x0, y0, x1, y1 = fig.box()
        fill = d(0.78, 0.99) if count == 1 else d(0.55, 0.9)
        scale = min(h * fill / (y1 - y0), w * (fill + 0.04) / (x1 - x0), h * 1.5)
        if d.chance(0.16):
            scale *= d(1.15, 1.9)
        free = np.array([w - (x1 - x0) * scale, h - (y1 - y0) * scale])
        at = free * (d(-0.05, 1.05), d(0, 1))
        if free[1] < 0:
            at[1] = free[1] * d.pick((0.0, 0.0, 1.0))
        fig.place(scale, at - np.array([x0, y0]) * scale)
        figures.append(fig)
    for fig in sorted(figures, key=lambda f: max(t[:, 1].max() for t in f.foot)):
        paint_figure(cv, fig)
    if d.chance(0.15):
        _occlude(cv, d, h, w)
    label = np.array(cv.classes, np.uint8)[cv.pieces]
    return _expose(image, cv.pieces, d, rng), label


def _occlude(cv: Canvas, d: Dice, h: int, w: int):
    x, y = d(0.1, 0.8) * w, d(0.45, 0.9) * h
    width, height = (d(0.03, 0.09) * w, 2 * h) if d.chance(0.5) else (d(0.2, 0.6) * w, d(0.2, 0.5) * h)
    y = -1 if height > h else y
    corners = np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)])
    cv.fill(corners[None], BACKGROUND, _cloth(d, h * 1.0), d.chance(0.5))


def _expose(image: np.ndarray, pieces: np.ndarray, d: Dice, rng: np.random.Generator) -> np.ndarray:
    """Dark seams between pieces, a light that falls off, a colour cast, blur and noise."""
    h, w = pieces.shape
    gain = d(0.75, 1.2) + d(-0.3, 0.3) * np.linspace(-1, 1, h, dtype=np.float32)[:, None] \
        + d(-0.3, 0.3) * np.linspace(-1, 1, w, dtype=np.float32)
    seam = d(0.75, 1.0)
    gain[1:][pieces[1:] != pieces[:-1]] *= seam
    gain[:, 1:][pieces[:, 1:] != pieces[:, :-1]] *= seam
    cast = np.array([d(0.88, 1.12) for _ in range(3)], np.float32)
    out = image * gain[..., None]
    out *= cast
    out += d(-15, 15)
    noise = np.frombuffer(rng.bytes(image.size), np.int8).reshape(image.shape)
    out += noise * np.float32(d(0.01, 0.14))
    np.clip(out, 0, 255, out=out)
    blur = d(0.3, 0.9) * max(h, w) / 160
    return cv2.GaussianBlur(out.astype(np.uint8), (0, 0), blur)
