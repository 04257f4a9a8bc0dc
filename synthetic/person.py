"""Clothes, hair and faces on the figures of `skeleton.py`, painted with their labels. Ours, not the paper's.

As in LIP a sleeve has the garment's label, a bare arm the arm's, a beard is face, and a bare neck has no class.
"""

import functools

import numpy as np

from synthetic.canvas import (
    BACKGROUND,
    CIRCLE,
    COAT,
    DRESS,
    FACE,
    GLOVE,
    HAIR,
    HAT,
    JUMPSUITS,
    LEFT_ARM,
    LEFT_LEG,
    LEFT_SHOE,
    PANTS,
    PRINTS,
    SCARF,
    SKINS,
    SKIRT,
    SOCKS,
    SUNGLASSES,
    UPPER,
    Canvas,
    any_cloth,
    any_colour,
    jitter,
    tone,
)
from synthetic.skeleton import Dice, Figure, cut

HAIRS = ((28, 22, 20), (48, 32, 24), (84, 54, 32), (126, 84, 46), (186, 142, 78), (224, 196, 136), (150, 62, 30),
         (150, 148, 146))
LENSES = ((18, 18, 22), (40, 24, 20), (20, 30, 70), (90, 40, 30))


class Person:
    """A figure with clothes on. Lengths of clothes are fractional rows of the limb's or the torso's tube."""

    def __init__(self, cv: Canvas, fig: Figure, d: Dice):
        self.cv, self.fig, self.d = cv, fig, d
        size = fig.scale
        self.skin = jitter(d, d.pick(SKINS), 10), None
        self.hair = jitter(d, d.pick(HAIRS), 14), None
        kind, below = d(), SKIRT if d.chance(0.15 + 0.4 * fig.woman) else PANTS
        self.main = DRESS if kind < 0.1 + 0.16 * fig.woman else JUMPSUITS if kind > 0.83 else UPPER
        self.lower = below if self.main == UPPER else self.main
        self.legged = self.lower in (PANTS, JUMPSUITS)
        self.belted = self.main != UPPER or d.chance(0.5)
        prints = {UPPER: PRINTS, DRESS: ("", "dots", "dots", "fade"), JUMPSUITS: ("bands", "bands", "bands", "")}
        self.top = any_cloth(d, size, (self.skin,), kinds=prints[self.main], worn_as=self.main)
        self.bottom = any_cloth(d, size, (self.top, self.skin), *((0.1, ("pleats",)) if below == SKIRT else
                                                                  (0.6, ("", "", "worn", "stripes"))), below)
        coated, over = d.chance(0.22), (self.top, self.bottom)
        self.coat = any_cloth(d, size, over, 0.85, ("", "", "worn", "checks"), COAT) if coated else None
        near = (*over, self.coat or self.skin)
        self.scarf = any_cloth(d, size, near, 0, ("stripes",), SCARF) if d.chance(0.26) else None
        self.gloves = any_cloth(d, size, (*over, self.skin), 0.1, ("", "", "dots"), GLOVE) if d.chance(0.28) else None
        self.shoe = any_cloth(d, size, (self.bottom, self.skin), 0.5, ("",))
        unlike = (self.bottom, self.shoe, self.skin)
        self.sock = any_cloth(d, size, unlike, 0.2, ("", "stripes"), SOCKS) if d.chance(0.4) else None
        self.hat = d.pick(("cap", "brim", "beanie")) if d.chance(0.32) else ""
        self.felt = any_cloth(d, size, (self.hair, self.skin))
        self.trim = any_cloth(d, size, over, 0, ("",))     # belts, hems, bands, toe caps
        bare = (0, d(0.3, 0.45), d(0.3, 0.6), d(0.3, 0.6), d(0.5, 0.9), d(0.5, 0.9), d(1.3, 2.2), 3.0)
        self.sleeve = 3.0 if self.coat else d.pick(bare)
        self.trouser = d.pick((d(0.45, 0.8), d(0.45, 0.8), d(0.6, 0.95), d(1.3, 2.0), 3.0, 3.0, 3.0))
        self.fit, self.wide = d(1.08, 1.3), d(0.95, 1.5)
        self.sock_top = 3 - d(0.6, 1.6)
        if self.sock and self.legged:
            self.trouser = min(self.trouser, self.sock_top + d.pick((0.15, d(-0.9, -0.3))))
        self.boots = not self.sock and d.chance(0.12)
        self.hem, self.flare = d.pick((d(0.45, 0.8), d(0.6, 0.95), d(1.1, 2.0))), d(1.2, 2.0)
        self.coat_hem, self.gap = d(0.3, 1.3), d(10, 40) if d.chance(0.85) else -3
        self.length = d.pick(("short", "short", "short", "bob", "long", "bald") if fig.woman < 0.4 else
                             ("short", "bob", "bob", "long", "long", "long", "tail", "tail"))

    def paint(self):
        """All pieces, the far ones first."""
        fig = self.fig
        away = fig.head[2, 2] < 0
        bowed = fig.upper[2, 1] < -0.35                    # the head is bent away from the viewer
        above = max(fig.knee_depth) > 0.12 or self.belted and self.main == UPPER   # knees to the viewer, or tucked in
        layers = [(1 if above else -1, self._legs), (0, self._torso), (2, self._overall),
                  (-2 if away else 3, self._neck), (-3 if bowed else 4, self._head), (5 if away else -5, self._mane)]
        layers += [(6 + fig.arm_depth[side] if fig.arm_depth[side] > -0.03 else -4, functools.partial(self._arm, side))
                   for side in (0, 1)]
        for _, layer in sorted(layers, key=lambda layer: layer[0]):
            layer()

    def _patch(self, table: np.ndarray, start: float, end: float, cls: int, cloth: tuple, shade: bool = False):
        """What covers the angles start..end of the torso's surface, as far as the viewer sees it."""
        arc = self.fig.visible(start, end)
        if arc is not None:
            self.cv.tube(table, cls, cloth, arc, shade)

    def _legs(self):
        for side in sorted((0, 1), key=lambda side: self.fig.leg_depth[side]):
            self._leg(side)
        torso, cloth = self.fig.torso, self.bottom if self.main == UPPER else self.top
        if self.legged:
            self.cv.tube(cut(torso, 4.4, 6, 1.04), self.lower, cloth)
            self._patch(cut(torso, 5, 6), 87, 93, self.lower, tone(cloth, 0.5))
            for middle in (-128, -52):                     # back pockets
                self._patch(cut(torso, 5.1, 5.8, 1.04), middle - 18, middle + 18, self.lower, tone(cloth, 0.5))
        elif self.lower == SKIRT:
            self.cv.tube(np.concatenate([cut(torso, 4.4, 5), self.fig.hem(self.hem, self.flare)]), SKIRT, cloth)

    def _joint(self, frame: np.ndarray) -> tuple:
        """The skin of a knee or an elbow: kneecap and crook of the arm are bright, the other side lies in the shade."""
        return tone(self.skin, 1.3 if frame[2, 2] > 0 else 0.6)

    def _leg(self, side: int):
        fig, tube = self.fig, self.cv.tube
        leg, foot, cls, shoe = fig.leg[side], fig.foot[side], LEFT_LEG + side, LEFT_SHOE + side
        tube(leg, cls, self.skin)
        tube(cut(leg, 0.82, 1.18, 0.7), cls, self._joint(fig.view), shade=False)
        if self.sock:
            tube(cut(leg, self.sock_top, 3, 1.15), SOCKS, self.sock)
        tube(foot, shoe, self.shoe)
        if self.boots:
            tube(cut(leg, self.sock_top, 3, 1.25), shoe, self.shoe)
        tube(fig.sole[side], shoe, tone(self.shoe, 0.45 if sum(self.shoe[0]) > 330 else 2.4), shade=False)
        if fig.toe_depth[side] > 0.3:
            tube(cut(foot, 0, 0.4, 0.9), shoe, self.trim, shade=False)
        elif fig.toe_depth[side] < -0.3:
            tube(cut(foot, 2.4, 3, 0.6), shoe, tone(self.shoe, 0.5), shade=False)
        if self.legged:
            cloth = self.bottom if self.lower == PANTS else self.top
            tube(cut(leg, 0, self.trouser, self.fit, self.wide), self.lower, cloth)
            if fig.view[2, 2] > 0:                         # thighs are worn bright in front
                tube(cut(leg, 0.25, min(0.9, self.trouser), 0.6), self.lower, tone(cloth, 1.4), shade=False)

    def _torso(self):
        fig, d, cls = self.fig, self.d, self.main
        front = cut(fig.torso, 1, 4.7 if self.belted else 5.5)
        self.cv.tube(front, cls, self.top)
        style = "zip" if cls == JUMPSUITS else d.pick(("vee", "buttons", "print", "zip"))
        if style == "vee":
            self._patch(cut(fig.torso, 1, 2.4, 1, 0.1), 50, 130, BACKGROUND, self.skin)
        elif style == "print":
            self._patch(cut(fig.torso, 2.4, 3.6), 50, 130, cls, (any_colour(d), None))
        else:
            width = 5 if style == "zip" else 9
            self._patch(front, 90 - width, 90 + width, cls, tone(self.top, 0.5 if style == "zip" else 1.5))
        self._patch(cut(fig.torso, 1, 1.5, 1.05), 20, 160, cls, tone(self.top, 0.6))           # collar
        self._patch(cut(fig.torso, 1.3, 2.6, 1.02), -160, -20, cls, tone(self.top, 0.6))       # yoke behind

    def _overall(self):
        """What lies over torso and legs: belt, the bell of a dress, coat."""
        fig = self.fig
        if self.main == DRESS:
            bell = np.concatenate([cut(fig.torso, 4, 5), fig.hem(self.hem, self.flare)])
            self.cv.tube(bell, DRESS, self.top)
            self.cv.tube(cut(bell, 1.75, 2, 1.02), DRESS, self.trim, shade=False)
        if self.belted:
            belt = cut(fig.torso, 4.3, 4.7, 1.06)
            self._patch(belt, fig.facing - 88, fig.facing + 88, self.lower, self.trim)
        if self.coat:
            table = np.concatenate([cut(fig.torso, 0.8, 5, 1.1, 1.1), fig.hem(self.coat_hem, 1.6)])
            gap, dark = self.gap, tone(self.coat, 0.7)
            self._patch(table, -91, 90 - gap, COAT, self.coat, True)
            self._patch(table, 90 + gap, 271, COAT, self.coat, True)
            self._patch(table[:3], 76 - gap, 90 - gap, COAT, dark)         # lapels
            self._patch(table[:3], 90 + gap, 104 + gap, COAT, dark)
            self._patch(table[3:], -92, -88, COAT, dark)                   # the seam behind

    def _arm(self, side: int):
        arm, hand = self.fig.arm[side], self.fig.hand[side].copy()
        if self.fig.scale < 250:                           # fingers would be too thin to see
            hand = hand[[0, 1, 4, 7, 8]]
            hand[2, 2:] *= 1.7
        self.cv.tube(arm, LEFT_ARM + side, self.skin)
        self.cv.tube(cut(arm, 0.8, 1.2, 0.7), LEFT_ARM + side, self._joint(self.fig.upper), shade=False)
        if not self.gloves:
            self.cv.tube(hand, LEFT_ARM + side, self.skin)
        if self.sleeve:
            cloth, cls = (self.coat, COAT) if self.coat else (self.top, self.main)
            self.cv.tube(cut(arm, 0, self.sleeve, 1.25 if self.coat else 1.14, 1.1), cls, cloth)
        if self.gloves:
            hand[:, 2:] *= 1.25
            self.cv.tube(np.concatenate([cut(arm, 2.1, 3, 1.3), hand]), GLOVE, self.gloves)

    def _neck(self):
        self.cv.tube(self.fig.neck, BACKGROUND, self.skin)

    def _mane(self):
        """Hair that hangs: painted behind the body when the face is seen, over it from behind."""
        fig, (x, y, rx, _, _, ry) = self.fig, self.fig.skull[0]
        spine = fig.torso[3, :2] - fig.torso[0, :2]
        spine = spine / (np.hypot(*spine) + 1e-6)
        if self.length in ("bob", "long"):
            end = fig.on_head([(0, -0.2, -0.5)], False)[0] + spine * ry * (0.9 if self.length == "bob" else 1.9)
            table = [(x, y, rx * 1.12, 0, 0, ry * 0.7), (*end, rx * 1.15, 0, 0, ry * 0.3)]
        elif self.length == "tail":
            knot = fig.on_head([(0, 0.35, -1.15)], False)[0]
            table = [(*(knot + spine * ry * t), rx * r, 0, 0, rx * r) for t, r in ((0, 0.35), (0.8, 0.42), (1.6, 0.15))]
        else:
            return
        self.cv.tube(np.array(table), HAIR, self.hair)

    def _head(self):
        fig, fill = self.fig, self.cv.fill
        if self.scarf:
            self.cv.tube(cut(fig.torso, 0, 1.7, 1.7, 0.85), SCARF, self.scarf)
            middle = self.d.pick((70, 90, 110))
            self._patch(cut(fig.torso, 1, self.d(3.4, 4.6), 1.16), middle - 32, middle + 32, SCARF, self.scarf, True)
        skull, hair = fig.skull[0], self.length != "bald"
        grown = (1.08, 1.02) if hair else (1, 1)
        fill((skull[:2] + CIRCLE * skull[[2, 5]] * grown)[None], *((HAIR, self.hair) if hair else (FACE, self.skin)))
        if fig.head[2, 2] > -0.35:
            low = CIRCLE[:, 1] < 0                         # from the hairline to the chin
            x, y = CIRCLE[:, 0] * 0.88, np.where(low, 1.04 * CIRCLE[:, 1], 0.72 * CIRCLE[:, 1] - 0.12)
            fill(fig.on_head(np.stack([x, y, np.sqrt(np.clip(1 - x * x - y * y, 0, 1))], 1))[None], FACE, self.skin)
            self._face()
        for side in (1, -1):
            if side * fig.head[2, 0] > -0.25 and self.length in ("short", "bald", "tail"):
                ear = fig.on_head([(0.98 * side, 0, -0.08)], False)[0]
                fill((ear + CIRCLE * skull[2] * (0.2, 0.3))[None], FACE, tone(self.skin, 0.9))
        if self.hat:
            self._hat()

    def _spot(self, x: float, y: float, rx: float, ry: float, cls: int, colour: tuple):
        """An oval on the face, if it is seen."""
        xs, ys = x + rx * CIRCLE[:, 0], y + ry * CIRCLE[:, 1]
        points = np.stack([xs, ys, np.sqrt(np.clip(1 - xs * xs - ys * ys, 0.02, 1))], 1)
        if (points @ self.fig.head[2]).mean() > 0.12:
            self.cv.fill(self.fig.on_head(points)[None], cls, (colour, None), False)

    def _face(self):
        fig, d, hair = self.fig, self.d, tone(self.hair, 0.8)[0]
        lips = tone(((200, 84, 80), None), 0.4 + sum(self.skin[0]) / 1000)[0]
        if d.chance(0.25 * (1 - fig.woman)):               # a beard is Face in LIP
            self._spot(0, -0.62, 0.5, 0.36, FACE, hair)
        self._spot(0, -0.5, d(0.2, 0.34), d(0.06, 0.13), FACE, lips)
        nose = np.array([(0, 0.15, 0.98), (0.16, -0.22, 0.95), (-0.16, -0.22, 0.95), (0, -0.16, 1.2)])
        if nose[3] @ fig.head[2] > 0:
            self.cv.fill(fig.on_head(nose, False)[None], FACE, tone(self.skin, 0.8), False)
        for x in (-0.36, 0.36):
            self._spot(x, 0.1, 0.17, 0.1, FACE, (235, 232, 228))
            self._spot(x, 0.1, 0.09, 0.1, FACE, (40, 28, 24))
            self._spot(x, 0.28, 0.2, 0.04, FACE, hair)
        if d.chance(0.45):
            shade = d.pick(LENSES)
            for x, y, rx, ry in ((-0.43, 0.08, 0.4, 0.3), (0.43, 0.08, 0.4, 0.3), (0, 0.2, 0.95, 0.08)):
                self._spot(x, y, rx, ry, SUNGLASSES, shade)

    def _hat(self):
        fig, dark = self.fig, tone(self.felt, 0.8)

        def around(*rims):                                 # (height, radius) on the head
            return np.stack([fig.on_head(np.insert(CIRCLE * radius, 1, height, 1), False) for height, radius in rims])
        tall, wide = {"cap": (0.95, 0.72), "brim": (1.2, 0.75), "beanie": (1.1, 0.62)}[self.hat]
        self.cv.fill(around((0.36, 1.08), (0.75, 0.98), (tall, wide)), HAT, self.felt)
        if self.hat == "cap":
            peak = [(k * c, y, k * s) for k, y in ((1.1, 0.36), (1.75, 0.28)) for c, s in CIRCLE[1:6]]
            self.cv.fill(fig.on_head(peak, False)[None], HAT, dark)
        else:
            rim = ((0.33, 1.7), (0.42, 1.7)) if self.hat == "brim" else ((0.3, 1.12), (0.5, 1.12))
            self.cv.fill(around(*rim), HAT, dark)
