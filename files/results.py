"""Where the results of predict.py go, and the record that says which file they were made from.

    labels/NAME.png      the label map at the photo's size; its metadata hold the record
    overlays/NAME.jpg    the photo under its label map
    probs/NAME.npy       with --probs: probabilities (classes, H, W) in float16

A file that has no record is never replaced, nor is a label map whose pixels were changed since, nor a result of another
file that still exists. A photo's label map is written first: its metadata are the record of all its results.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from errors import UserError

KINDS = {"labels": ".png", "overlays": ".jpg", "probs": ".npy"}       # folder and extension
SOFTWARE = "SCHNet predict.py"

Record = dict[str, str]


class Results:
    """The results of one call: `kinds` of KINDS for each photo, by a network that `settings` describes in one line."""

    def __init__(self, out: Path, classes: Sequence[str], settings: str, kinds: Sequence[str] = ("labels", "overlays")):
        self.out, self.classes, self.settings, self.kinds = out, classes, settings, kinds

    def origin(self, source: str) -> Record:
        """The part of a record that is known before the file `source` is opened: which file, and what is done to it."""
        status = os.stat(source)
        path = os.fsencode(os.path.abspath(source)).decode(errors="backslashreplace")
        return {"Software": SOFTWARE, "Source": path, "Source bytes": str(status.st_size),
                "Source modified": str(status.st_mtime_ns), "Settings": self.settings,
                "Classes": json.dumps(self.classes)}

    def path(self, kind: str, name: str) -> Path:
        return self.out / kind / f"{name}{KINDS[kind]}"

    def record(self, origin: Record, label: np.ndarray, kept: Sequence[str] = ()) -> Record:
        """The metadata of a label map; `kept`: see `claim`."""
        return origin | {"Source size": f"{label.shape[1]} x {label.shape[0]}",
                         "Results": " ".join([*self.kinds, *kept]), "Pixels": _digest(label)}

    def is_done(self, source: str, name: str) -> bool:
        """Whether all results of a photo are there, made from this very file with these settings."""
        record = read_record(self.path("labels", name))
        return (self.origin(source).items() <= record.items() and set(self.kinds) <= set(record["Results"].split())
                and all(self.path(kind, name).exists() for kind in self.kinds))

    def claim(self, origin: Record, name: str) -> list[str]:
        """Removes the earlier results of a photo. UserError, and nothing is removed, if a file in the way has no record
        or was made from another file.

        Kept are results of other kinds that were made from the same file with the same settings; their kinds are
        returned.
        """
        record = _own_record(self.path("labels", name))
        _check_source(self.path("labels", name), record, origin)
        old = [kind for kind in record.get("Results", "").split() if kind in KINDS]
        for kind in self.kinds:
            path = self.path(kind, name)
            if kind not in old and os.path.lexists(path):
                raise UserError(f"{path}: was not written by predict.py, or was changed since: it is left as it is")
            path.parent.mkdir(parents=True, exist_ok=True)
        kept = [kind for kind in old if kind not in self.kinds and origin.items() <= record.items()]
        for kind in set(old) - {"labels", *kept}:
            self.path(kind, name).unlink(missing_ok=True)
        return kept


def _check_source(path: Path, record: Record, origin: Record):
    """UserError if a result was made from another file, which still exists: a file that moved is parsed again."""
    old, new = record.get("Source", ""), origin["Source"]
    if old != new and os.path.exists(old) and not os.path.samefile(old, new):
        raise UserError(f"{path} was made from {old}, not from {new}: choose another --out")


def _digest(label: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(label), digest_size=16).hexdigest()


def read_record(path: Path) -> Record:
    """The record in a label map's metadata; {} if there is none, or the file is damaged."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = {key: value for key, value in image.info.items() if isinstance(value, str)}
            image.verify()                                 # of a file that was cut off, too, the record can be read
    except Exception:                                      # missing, or not a PNG: decoders raise many exception types
        return {}
    return text if text.get("Software") == SOFTWARE and "Classes" in text else {}


def _own_record(path: Path) -> Record:
    """The record of a label map that is as it was written; {} for any other file."""
    record = read_record(path)
    if not record:
        return {}
    with Image.open(path) as image:
        return record if record.get("Pixels") == _digest(np.asarray(image)) else {}
