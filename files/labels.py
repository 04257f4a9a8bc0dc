"""Label sets: class names, colours and flip pairs of LIP, CIHP, PASCAL-Person-Part and the user's own; class maps.

    python predict.py photo.jpg --map configs/maps/atr.yaml

A class map converts label maps to another tool's classes by merging the network's. It is a list with one line for each
target class, label 0 first:

    - {name: Background, colour: [0, 0, 0], from: [Background]}
    - {name: Hair, colour: [255, 0, 0], from: [Hat, Hair]}
    - {name: Belt, colour: [0, 0, 85], from: []}           # a label of the tool that this network never predicts

Every class of the network must appear exactly once. Other names are ignored, so that one file serves LIP's Jumpsuits
and CIHP's Torso-skin.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import cv2
import numpy as np

from config import IGNORE, Config, read_yaml, user_path
from errors import UserError

TARGET = "{name: TEXT, colour: [r, g, b], from: [CLASS, ...]}"
IGNORE_GREY = 172                                          # of ignored pixels; no class has a colour near it
Merge = tuple[tuple[int, ...], ...]                        # for each target class the network's labels it merges


@dataclass(frozen=True)
class LabelSet:
    name: str
    classes: tuple[str, ...]                               # label 0 first
    palette: tuple[tuple[int, int, int], ...]              # RGB
    flip_pairs: tuple[tuple[int, int], ...]                # labels swapped by a horizontal flip

    def __post_init__(self):
        def need(ok: bool, message: str):
            if not ok:
                raise UserError(f"data set {self.name}: {message}")

        count, swapped = len(self.classes), [label for pair in self.flip_pairs for label in pair]
        need(count > 0, "classes must be a list of names, label 0 first")
        need(count <= IGNORE, f"classes: at most {IGNORE}, label {IGNORE} means ignore")
        need(len(set(self.classes)) == count, "classes: duplicate name")
        need(len(self.palette) == count, f"palette has {len(self.palette)} colours for {count} classes")
        need(len(set(self.palette)) == count, "palette: duplicate colour")
        need(all(0 <= v <= 255 for colour in self.palette for v in colour), "palette: colours are 0 to 255")
        need(len(set(swapped)) == len(swapped), "flip_pairs: duplicate label")
        need(all(0 <= label < count for label in swapped), "flip_pairs: a label outside the class list")


_LIP_CLASSES = ("Background", "Hat", "Hair", "Glove", "Sunglasses", "Upper-clothes", "Dress", "Coat", "Socks", "Pants",
                "Jumpsuits", "Scarf", "Skirt", "Face", "Left-arm", "Right-arm", "Left-leg", "Right-leg", "Left-shoe",
                "Right-shoe")
_CIHP_CLASSES = _LIP_CLASSES[:10] + ("Torso-skin",) + _LIP_CLASSES[11:]    # the one difference, often got wrong
_LIP_PALETTE = ((0, 0, 0), (128, 0, 0), (255, 0, 0), (0, 85, 0), (170, 0, 51), (255, 85, 0), (0, 0, 85), (0, 119, 221),
                (85, 85, 0), (0, 85, 85), (85, 51, 0), (52, 86, 128), (0, 128, 0), (0, 0, 255), (51, 170, 221),
                (0, 255, 255), (85, 255, 170), (170, 255, 85), (255, 255, 0), (255, 170, 0))    # by the sets' authors
_LEFT_RIGHT = ((14, 15), (16, 17), (18, 19))

LABEL_SETS = {
    "lip": LabelSet("lip", _LIP_CLASSES, _LIP_PALETTE, _LEFT_RIGHT),
    "cihp": LabelSet("cihp", _CIHP_CLASSES, _LIP_PALETTE, _LEFT_RIGHT),
    "ppp": LabelSet("ppp", ("Background", "Head", "Torso", "Upper-arms", "Lower-arms", "Upper-legs", "Lower-legs"),
                    ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)),
                    ()),                                   # the palette of its PNGs; both sides share a label
}


def label_set(cfg: Config) -> LabelSet:
    """The classes of a configuration."""
    if cfg.dataset == "custom":
        return LabelSet("custom", cfg.classes, cfg.palette or distinct_colours(len(cfg.classes)), cfg.flip_pairs)
    if cfg.dataset == "synthetic":
        return replace(LABEL_SETS["lip"], name="synthetic")              # LIP's classes, but no photo of LIP
    return LABEL_SETS[cfg.dataset]


def distinct_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """Black, then always the colour farthest (in CIELAB) from the colours before and the grey of ignored pixels."""
    levels = np.linspace(0, 1, 9, dtype=np.float32)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    grey = cv2.cvtColor(np.full((1, 1, 3), IGNORE_GREY / 255, np.float32), cv2.COLOR_RGB2LAB)[0]
    chosen, distance = [0], np.linalg.norm(lab[:, None] - np.concatenate([lab[:1], grey]), axis=2).min(1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return tuple(tuple(int(v) for v in colour) for colour in (rgb[chosen, 0] * 255).round())


# ----------------------------------------------------------------------------------------------------------------------
# labels that look wrong

@dataclass
class LabelStats:
    """Statistics of some label maps; they add up."""
    counts: np.ndarray                                     # (256,): pixels with each value
    labels: int = 1
    numbered: int = 0                                      # labels with the values 1, 2, ..., n and no gap
    edges: int = 0                                         # places where the value left differs from the value right
    between: int = 0                                       # of these, with a value between the two

    @classmethod
    def of(cls, label: np.ndarray) -> "LabelStats":
        counts = np.bincount(label.ravel(), minlength=256)
        values = np.flatnonzero(counts[1:IGNORE]) + 1
        valid = np.where(label == IGNORE, 0, label).astype(np.int16)
        left, middle, right = valid[:, :-2], valid[:, 1:-1], valid[:, 2:]
        low, high = np.minimum(left, right), np.maximum(left, right)
        return cls(counts, 1, int(len(values) > 0 and values[-1] == len(values)), int((low != high).sum()),
                   int(((low < middle) & (middle < high)).sum()))

    def __add__(self, other: "LabelStats") -> "LabelStats":
        return LabelStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def label_fault(stats: LabelStats, classes: Sequence[str]) -> str:
    """The fault of labels that look like masks of 0 and 255, or show a single class; "" if there is none."""
    counts, ignored = stats.counts[:len(classes)], stats.counts[IGNORE]
    seen = np.flatnonzero(counts)
    masks = len(seen) < len(classes) and ignored > np.sort(counts)[-2:].min()
    if len(classes) < 2 or len(seen) > 1 and not masks:
        return ""
    shown = ", ".join(f"{k} {classes[k]}" for k in seen[:5])
    return (f"only {shown or 'no class'} occurs" if len(seen) < 2 else f"{shown}{', ...' * (len(seen) > 5)} occur") + (
        f", but {ignored / stats.counts.sum():.2%} of the pixels are {IGNORE}, which means ignore" if ignored else
        "") + f"; classes are 0 to {len(classes) - 1}"


def label_warning(stats: LabelStats, classes: Sequence[str]) -> str:
    """A warning if labels may not be what they should be; "" if they look right."""
    seen = np.count_nonzero(stats.counts[:len(classes)])
    if len(classes) > 2 and stats.edges and stats.between > 0.08 * stats.edges:
        return (f"{stats.between / stats.edges:.0%} of the edges between two classes show a class between them: were "
                "the labels resized with interpolation? Use nearest neighbour")
    if len(classes) >= 8 and stats.labels >= 8 and stats.numbered > 0.9 * stats.labels:
        return "each label holds the values 1, 2, ... without a gap: are they numbers of persons (Human_ids)?"
    if len(classes) >= 6 and 2 * seen < len(classes):
        return f"only {seen} of {len(classes)} classes occur: are these the right labels?"
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# class maps

def load_class_map(path: str | Path, labels: LabelSet) -> tuple[LabelSet, Merge]:
    """The target label set of a class map, and for each of its classes the labels of the network that it merges."""
    path = user_path(path)
    targets = _read_targets(path)
    taken = [name for target in targets for name in target["from"]]
    for name in labels.classes:
        if taken.count(name) != 1:
            raise UserError(f"{path}: {name} of {labels.name} appears {taken.count(name)} times; each class of the "
                            "network must appear exactly once")
    merge = tuple(tuple(labels.classes.index(name) for name in target["from"] if name in labels.classes)
                  for target in targets)
    names, palette = (tuple(target[key] for target in targets) for key in ("name", "colour"))
    return LabelSet(str(path), names, tuple(map(tuple, palette)), ()), merge         # flips are averaged before


def _read_targets(path: Path) -> list[dict]:
    targets = read_yaml(path, "class map", "configs/maps")
    if not isinstance(targets, list) or not targets:
        raise UserError(f"{path}: a class map is a list of lines {TARGET}")
    for label, target in enumerate(targets):
        match target:
            case {"name": str(), "colour": [int(), int(), int()], "from": [*_], **rest} if not rest:
                continue
        raise UserError(f"{path}: label {label} must be {TARGET}, not {target!r}")
    return targets
