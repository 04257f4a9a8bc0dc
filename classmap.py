"""Label maps in another numbering: the classes of the tool behind, each the sum of some of the network's own.

    python predict.py photo.jpg --map configs/maps/atr.yaml

The file is a list with one line for each target class, label 0 first:

    - {name: Background, colour: [0, 0, 0], from: [Background]}
    - {name: Hair, colour: [255, 0, 0], from: [Hat, Hair]}
    - {name: Belt, colour: [0, 0, 85], from: []}           # a number that the tool knows and this network never gives

Every class of the network must be named exactly once. A name that the network does not have is passed over if LIP, CIHP
or PASCAL-Person-Part has it, so that one file serves LIP's Jumpsuits and CIHP's Torso-skin; any other name is an error.
"""

import difflib
from pathlib import Path

from config import read_yaml, user_path
from datasets import LABEL_SETS, LabelSet
from engine.errors import UserError

KEYS = ("name", "colour", "from")
Merge = tuple[tuple[int, ...], ...]                        # for each target class the network's labels that make it


def load(path: str | Path, labels: LabelSet) -> tuple[LabelSet, Merge]:
    """The target label set, and for each of its classes the labels of the network that make it."""
    path = user_path(path)
    targets = _read(path)
    for target in targets:
        for name in target["from"]:
            if not any(name in known.classes for known in (labels, *LABEL_SETS.values())):
                near = difflib.get_close_matches(name, labels.classes, n=1)
                raise UserError(f"{path}: {target['name']} takes {name!r}, which is no class of {labels.name}"
                                + (f"; did you mean {near[0]!r}?" if near else ""))
    taken = [name for target in targets for name in target["from"]]
    for name in labels.classes:
        if taken.count(name) != 1:
            fault = f"is taken {taken.count(name)} times" if name in taken else "is taken by no class"
            raise UserError(f"{path}: {name} of {labels.name} {fault}; each class of the network must stand there once")
    merge = tuple(tuple(labels.classes.index(name) for name in target["from"] if name in labels.classes)
                  for target in targets)
    names, palette = (tuple(target[key] for target in targets) for key in ("name", "colour"))
    return LabelSet(str(path), names, tuple(map(tuple, palette)), ()), merge         # flips are averaged before


def _read(path: Path) -> list[dict]:
    targets = read_yaml(path, "class map", "configs/maps")
    if not isinstance(targets, list) or not targets:
        raise UserError(f"{path}: a class map is a list of `- {{name: ..., colour: [r, g, b], from: [...]}}` lines")
    for label, target in enumerate(targets):
        _check(target, f"{path}: label {label}")
    for key in ("name", "colour"):
        values = [target[key] for target in targets]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: the {key} {twice!r} stands there twice")
    return targets


def _check(target, where: str):
    """That one line of the file has what it needs."""
    if not isinstance(target, dict) or sorted(map(str, target)) != sorted(KEYS):
        raise UserError(f"{where} must have {', '.join(KEYS)} and nothing else, not {target!r}")
    name, colour, sources = (target[key] for key in KEYS)
    if not isinstance(name, str):
        raise UserError(f"{where}: name must be text, not {name!r} (quotes make it text)")
    if not isinstance(colour, list) or len(colour) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in colour):
        raise UserError(f"{where}: colour must be three numbers from 0 to 255, not {colour!r}")
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise UserError(f"{where}: from must be a list of class names, not {sources!r}")
