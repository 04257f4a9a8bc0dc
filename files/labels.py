"""Label sets: class names, colours and flip pairs of LIP, CIHP, PASCAL-Person-Part and the user's own; class maps.

    python predict.py photo.jpg --map configs/maps/atr.yaml

A class map converts label maps to another tool's classes by merging the network's. It is a list with one line for each
target class, label 0 first:

    - {name: Background, colour: [0, 0, 0], from: [Background]}
    - {name: Hair, colour: [255, 0, 0], from: [Hat, Hair]}
    - {name: Belt, colour: [0, 0, 85], from: []}           # a label of the tool that this network never predicts

Every class of the network must appear exactly once. Names unknown to the network are ignored if LIP, CIHP or
PASCAL-Person-Part has them, so that one file serves LIP's Jumpsuits and CIHP's Torso-skin; any other name is an error.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from config import IGNORE, Config, read_yaml, user_path
from errors import UserError

KEYS = ("name", "colour", "from")
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
    """Black, then each time the colour farthest (in CIELAB) from all chosen before."""
    levels = np.linspace(0, 1, 9, dtype=np.float32)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    chosen, distance = [0], np.linalg.norm(lab - lab[0], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return tuple(tuple(int(v) for v in colour) for colour in (rgb[chosen, 0] * 255).round())


def label_warning(counts: np.ndarray, classes: Sequence[str]) -> str:
    """A warning if labels look wrong, given how often the values 0..255 occur (256,); "" if they do not.

    Many tools write masks of two classes as 0 and 255, or background as 255 and the classes from 0.
    """
    seen, ignored = counts[:len(classes)] > 0, counts[IGNORE] / counts.sum()
    if seen.all() or (not ignored and seen.sum() > 1):
        return ""
    absent = [f"{k} {name}" for k, name in enumerate(classes) if not seen[k]]
    more = f", but {ignored:.2%} of the pixels are {IGNORE}, which is ignored and no class" if ignored else ""
    return f"no label shows {', '.join(absent)}{more}; classes are 0 to {len(classes) - 1}"


# ----------------------------------------------------------------------------------------------------------------------
# class maps

def load_class_map(path: str | Path, labels: LabelSet) -> tuple[LabelSet, Merge]:
    """The target label set of a class map, and for each of its classes the labels of the network that it merges."""
    path = user_path(path)
    targets = _read_targets(path)
    for target in targets:
        for name in target["from"]:
            if not any(name in known.classes for known in (labels, *LABEL_SETS.values())):
                near = difflib.get_close_matches(name, labels.classes, n=1)
                raise UserError(f"{path}: {target['name']} takes {name!r}, which is not a class of {labels.name}"
                                + (f"; did you mean {near[0]!r}?" if near else ""))
    taken = [name for target in targets for name in target["from"]]
    for name in labels.classes:
        if taken.count(name) != 1:
            raise UserError(f"{path}: {name} of {labels.name} appears {taken.count(name)} times; each class of the network "
                            "must appear exactly once")
    merge = tuple(tuple(labels.classes.index(name) for name in target["from"] if name in labels.classes)
                  for target in targets)
    names, palette = (tuple(target[key] for target in targets) for key in ("name", "colour"))
    return LabelSet(str(path), names, tuple(map(tuple, palette)), ()), merge         # flips are averaged before


def _read_targets(path: Path) -> list[dict]:
    targets = read_yaml(path, "class map", "configs/maps")
    if not isinstance(targets, list) or not targets:
        raise UserError(f"{path}: a class map is a list of `- {{name: ..., colour: [r, g, b], from: [...]}}` lines")
    for label, target in enumerate(targets):
        _check_target(target, f"{path}: label {label}")
    return targets


def _check_target(target, where: str):
    if not isinstance(target, dict) or sorted(map(str, target)) != sorted(KEYS):
        raise UserError(f"{where} must have {', '.join(KEYS)} and nothing else, not {target!r}")
    name, colour, sources = (target[key] for key in KEYS)
    if not isinstance(name, str):
        raise UserError(f"{where}: name must be text, not {name!r} (quotes make it text)")
    if not isinstance(colour, list) or len(colour) != 3 or not all(type(v) is int for v in colour):
        raise UserError(f"{where}: colour must be three numbers from 0 to 255, not {colour!r}")
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise UserError(f"{where}: from must be a list of class names, not {sources!r}")
