"""Posed human figures for `synthetic.py`, as tubes ready to be painted. The paper has no such thing; it is ours.

A figure is a skeleton in three dimensions, turned and projected, so left and right are the person's: seen from the
front the left arm is on the picture's right, from behind on its left. A tube is a table with one cross-section a row,
(x, y, ax, ay, bx, by): a centre and the two half-axes of an ellipse, in the picture's plane.
"""

import math

import numpy as np

# Both bones of a limb, each as ranges of (lift, turn) in degrees. Lift: from hanging (0) to upright (180).
# Turn: sideways (0), forward (90), inward (180), backward (-90).
ARMS = (((4, 18), (0, 80), (2, 30), (40, 110)),            # hanging
        ((4, 18), (0, 80), (2, 30), (40, 110)),
        ((10, 40), (20, 90), (60, 110), (70, 150)),        # bent before the body
        ((30, 50), (-30, 10), (35, 65), (150, 190)),       # hand on the hip
        ((60, 100), (0, 40), (50, 120), (0, 60)),          # stretched out
        ((115, 160), (0, 60), (130, 178), (0, 180)),       # raised
        ((60, 100), (-10, 30), (140, 178), (0, 180)),      # waving
        ((45, 90), (50, 100), (60, 110), (60, 110)),       # reaching forward
        ((8, 25), (-70, -20), (20, 45), (-150, -110)))     # behind the back
STAND = (0, 7), (0, 60), (0, 6), (-90, 0)
FORE = (12, 34), (80, 95), (0, 12), (-90, -80)             # a walker's leg in front
HIND = (6, 24), (-100, -85), (22, 50), (-95, -85)          # and behind
WIDE = (12, 26), (0, 20), (4, 18), (0, 10)
SIT = (74, 92), (62, 88), (0, 16), (70, 110)
SQUAT = (70, 96), (40, 75), (12, 32), (-110, -90)
LIFT = (40, 90), (75, 100), (0, 25), (-100, -80)
STANCES = ((STAND, STAND),) * 6 + ((FORE, HIND),) * 6 + ((WIDE, WIDE),) * 2 + ((SIT, SIT),) * 3 \
    + ((SQUAT, SQUAT), (STAND, LIFT), (STAND, FORE))

STEPS = np.linspace(0, 1, 7)


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


def cut(table: np.ndarray, start: float, end: float, wide: float = 1.0, flare: float = 1.0) -> np.ndarray:
    """The part of a tube between two fractional rows: `wide` times as wide, and at its end `flare` times that."""
    end = min(end, len(table) - 1)
    at = np.array([start, *range(math.floor(start) + 1, math.ceil(end)), end])
    low = np.minimum(at.astype(int), len(table) - 2)
    part = table[low] + (table[low + 1] - table[low]) * (at - low)[:, None]
    part[:, 2:] *= (wide + np.arange(len(part)) * (wide * (flare - 1) / (len(part) - 1)))[:, None]
    return part


def bone(side: int, lift: float, turn: float) -> np.ndarray:
    """A unit vector; see the tables of poses."""
    lift, turn = math.radians(lift), math.radians(turn)
    return np.array([side * math.sin(lift) * math.cos(turn), -math.cos(lift), math.sin(lift) * math.sin(turn)])


def rotation(yaw: float, nod: float, lean: float) -> np.ndarray:
    """Turn about the upright axis, then nod forward, then lean; in degrees. Rows: to the right, up, to the viewer."""
    (c, s), (cn, sn), (cl, sl) = ((math.cos(math.radians(a)), math.sin(math.radians(a))) for a in (yaw, nod, lean))
    turned = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return np.array([[cl, -sl, 0], [sl, cl, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cn, -sn], [0, sn, cn]]) @ turned


def rings(matrix: np.ndarray, centres, wide, deep=None) -> np.ndarray:
    """A tube from centres in the person's frame: round ones, or (`deep`) flat on the person's own axes."""
    table = np.zeros((len(centres), 6))
    table[:, :2] = np.array(centres) @ matrix[:2].T
    if deep is None:
        table[:, 2] = table[:, 5] = wide
    else:
        table[:, 2:4], table[:, 4:6] = np.outer(wide, matrix[:2, 0]), np.outer(deep, matrix[:2, 2])
    table[:, 1::2] *= -1                                   # pictures count downwards
    return table


class Figure:
    """A posed skeleton, projected to tubes. Of each pair, index 0 is the person's left.

    In the person's own frame x points to their left, y up, z forward; the unit is about the person's height.
    Rows of the torso: 0 neck, 1 collar, 2 shoulders, 3 chest, 4 waist, 5 hips, 6 crotch; of an arm: shoulder, elbow,
    forearm, wrist; of a leg: hip, knee, calf, ankle.
    """

    def __init__(self, d: Dice):
        self.woman, self.girth, self.size = d(), d(0.9, 1.25), d(1.15, 1.38)
        yaw = (180 if d.chance(0.3) else 0) + (80 if d.chance(0.08) else 40) * (d(-1, 1) + d(-1, 1)) / 2
        bend = d(30, 60) if d.chance(0.05) else d(-4, 12)
        self.view = rotation(yaw, d(4, 16), d(-6, 6))
        self.upper = self.view @ rotation(d(-10, 10), bend, d(-6, 6))
        self.head = self.upper @ rotation(d(-25, 25), d(-12, 12) - 0.5 * bend, d(-10, 10))
        self.facing = math.degrees(math.atan2(self.upper[2, 2], self.upper[2, 0]))   # section angle towards the viewer
        stance = d.pick(STANCES)[::d.pick((1, -1))]
        arms = (ARMS[0], ARMS[0]) if d.chance(0.2) else (d.pick(ARMS), d.pick(ARMS))
        self.arm, self.hand, self.leg, self.foot, self.sole, self.joints = [], [], [], [], [], []
        self.arm_depth, self.leg_depth, self.knee_depth, self.toe_depth = [], [], [], []
        self._spine()
        for side, arm, leg in zip((1, -1), arms, stance):
            self._arm(d, side, [bone(side, d(*arm[i]), d(*arm[i + 1])) for i in (0, 2)])
            self._leg(d, side, [bone(side, d(*leg[i]), d(*leg[i + 1])) for i in (0, 2)])

    def _spine(self):
        g, w = self.girth, self.woman
        wide = np.array([0.034, 0.06, 0.096, 0.094 - 0.006 * w, 0.086 - 0.022 * w, 0.088 + 0.01 * w, 0.07]) * g
        deep = np.array([0.034, 0.042, 0.052, 0.062, 0.054, 0.064, 0.05]) * g * g
        spine = [(0, y, 0) for y in (0.315, 0.292, 0.265, 0.205, 0.11, 0.01, -0.06)]
        self.torso = np.concatenate([rings(self.upper, spine[:5], wide[:5], deep[:5]),
                                     rings(self.view, spine[5:], wide[5:], deep[5:])])
        self.skull = rings(self.upper, [(0, 0.315 + 0.085 * self.size, 0.012)], 0.071 * self.size)
        self.skull[0, 5] = 0.094 * self.size
        self.neck = rings(self.upper, [(0, 0.285, -0.005), (0, 0.36, 0.005)], [0.036 * g, 0.034 * g])

    def _arm(self, d: Dice, side: int, bones: list):
        g = self.girth * (1 - 0.12 * self.woman)
        shoulder = np.array([side * (0.12 - 0.012 * self.woman) * (0.7 + 0.3 * self.girth), 0.262, 0])
        elbow, along = shoulder + 0.158 * bones[0], bones[1]
        wrist, palm = elbow + 0.142 * along, elbow + 0.18 * along
        out = np.array([-0.3 * side, 0.1, 1.0])            # thumbs of hanging arms point forward
        out -= along * (along @ out)
        out /= np.linalg.norm(out)
        tips = [palm + along * d(0.015, 0.042) + out * k for k in (-0.018, 0.0, 0.018)]
        thumb = palm + out * 0.034 + along * 0.012
        self.arm.append(rings(self.upper, [shoulder, elbow, elbow + 0.05 * along, wrist],
                              np.array([0.044, 0.038, 0.038, 0.030]) * g))
        self.hand.append(rings(self.upper, [wrist, palm, tips[0], palm, tips[1], palm, tips[2], palm, thumb],
                               [0.028, 0.036, 0.015, 0.036, 0.015, 0.036, 0.015, 0.030, 0.016]))
        self.arm_depth.append(self.upper[2] @ (elbow + wrist * 2 - 3 * shoulder * (0, 0.8, 0)) / 3)

    def _leg(self, d: Dice, side: int, bones: list):
        hip, shin = np.array([side * 0.05 * self.girth, -0.03, 0]), 0.215 * bones[1]
        knee = hip + 0.225 * bones[0]
        ankle = knee + shin
        out, tilt = math.radians(d(8, 34)), 0.7 * math.atan2(-shin[2], -shin[1])
        tilt = tilt if tilt > 0.2 else 0.0                 # a trailing foot stands on its toes
        toe = np.array([side * math.sin(out), -math.sin(tilt), math.cos(out) * math.cos(tilt)])
        down = np.array([0, -math.cos(tilt), -math.sin(tilt)])
        heel = ankle - toe * 0.024 + down * 0.03
        ball, tip = ankle + toe * 0.075 + down * 0.036, ankle + toe * 0.115 + down * 0.038
        self.joints.append(np.array([hip, knee, knee + 0.32 * shin, ankle]))
        self.leg.append(rings(self.view, self.joints[-1], np.array([0.060, 0.046, 0.047, 0.033]) * self.girth))
        self.foot.append(rings(self.view, [tip, ball, ankle + down * 0.004, heel, ball],
                               [0.027, 0.037, 0.034, 0.031, 0.037]))
        self.sole.append(rings(self.view, np.array([heel, ball, tip]) + down * 0.019, [0.015, 0.016, 0.013]))
        self.leg_depth.append(self.view[2] @ (knee + ankle))
        self.toe_depth.append(self.view[2] @ toe)
        self.knee_depth.append(self.view[2] @ (knee - hip))

    def place(self, scale: float, shift: np.ndarray):
        """From units to pixels."""
        self.scale, self.shift = scale, shift
        for table in (self.torso, self.skull, self.neck, *self.arm, *self.hand, *self.leg, *self.foot, *self.sole):
            table *= scale
            table[:, :2] += shift

    def box(self) -> np.ndarray:
        """Left, top, right, bottom."""
        every = np.concatenate([self.torso, self.skull, *self.hand, *self.leg, *self.foot])
        reach = np.abs(every[:, 2:4]) + np.abs(every[:, 4:])
        return np.concatenate([(every[:, :2] - reach).min(0), (every[:, :2] + reach).max(0)])

    def on_head(self, points, clamp: bool = True) -> np.ndarray:
        """Points given on the unit sphere of the head (left, up, forward), in pixels; hidden ones go to its outline."""
        p = np.asarray(points, float) @ self.head.T
        if clamp:
            hidden = p[:, 2] < 0
            p[hidden, :2] /= np.sqrt((p[hidden, :2] ** 2).sum(1, keepdims=True)) + 1e-6
        jaw = 1 - 0.2 * np.clip(-p[:, 1], 0, 1)
        return self.skull[0, :2] + np.stack([p[:, 0] * jaw * self.skull[0, 2], -p[:, 1] * self.skull[0, 5]], 1)

    def visible(self, start: float, end: float) -> np.ndarray | None:
        """What the viewer sees of the angles start..end of a torso section: points of the unit circle, or None."""
        turns = 360 * round((self.facing - (start + end) / 2) / 360)
        low, high = max(start + turns, self.facing - 88), min(end + turns, self.facing + 88)
        if high - low < 3:
            return None
        angles = np.radians(low + (high - low) * STEPS)
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    def hem(self, t: float, flare: float) -> np.ndarray:
        """A cross-section around both legs, at the fractional row `t`, in pixels."""
        left, right = (cut(joints, t, t + 1e-3)[0] for joints in self.joints)
        half = np.abs(left - right) / 2 + 0.05 * flare
        table = rings(self.view, [(left + right) / 2], [half[0]], [half[2]]) * self.scale
        table[:, :2] += self.shift
        return table
