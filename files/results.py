"""Where the results of predict.py go, and the record that says which file they were made from.

    labels/NAME.png      the label map at the photo's size; its metadata hold the record
    overlays/NAME.jpg    the photo under its label map (a video: NAME.mp4, with the record behind its last byte)
    masks/NAME/*.png     with --masks: a black and white picture for each class
    probs/NAME.npy       with --probs: probabilities (classes, H, W) in float16
    labels/NAME.mp4/*    with --frames: the label map of each frame of the video NAME.mp4, with the record in each

A file that has no record is never replaced, nor is a label map whose pixels were changed since. A photo's label map is
written before its other results, so that it vouches for them.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from errors import UserError

KINDS = {"labels": ".png", "overlays": ".jpg", "masks": ".png", "probs": ".npy"}       # folder and extension
SOFTWARE = "SCHNet predict.py"
BOX = 8                                                    # bytes before the record in an .mp4: a box of the kind "free"


class Results:
    """The results of one call: `kinds` of KINDS for each photo, by a network that `settings` describes in one line."""

    def __init__(self, out: Path, classes: Sequence[str], settings: str, kinds: Sequence[str] = ("labels", "overlays"),
                 frames: bool = False):
        self.out, self.settings, self.kinds, self.frames = out, settings, kinds, frames
        self.titles = [f"{k:02d}_" + re.sub(r"[^\w-]+", "_", name) for k, name in enumerate(classes)]

    # ---- photos

    def path(self, kind: str, name: str) -> Path:
        return self.out / kind / f"{name}{KINDS[kind]}"

    def paths(self, kind: str, name: str) -> list[Path]:
        """The files of a kind: one, or a mask for each class."""
        if kind == "masks":
            return [self.path(kind, f"{name}/{title}") for title in self.titles]
        return [self.path(kind, name)]

    def record(self, source: str, label: np.ndarray, kept: Sequence[str] = ()) -> dict[str, str]:
        """The metadata of a label map made from the file `source`; `kept`: see `claim_photo`."""
        return self._origin(source) | {"Source size": f"{label.shape[1]} x {label.shape[0]}",
                                       "Results": " ".join([*self.kinds, *kept]), "Pixels": _digest(label)}

    def _origin(self, source: str) -> dict[str, str]:
        """What tells a file, and what was done to it, from others: without opening it."""
        status = os.stat(source)
        path = os.fsencode(os.path.abspath(source)).decode(errors="backslashreplace")
        return {"Software": SOFTWARE, "Source": path, "Source bytes": str(status.st_size),
                "Source modified": str(status.st_mtime_ns), "Settings": self.settings}

    def photo_is_done(self, source: str, name: str) -> bool:
        """Whether all results of a photo are there, made from this very file with these settings."""
        record = read_record(self.path("labels", name))
        return (self._same_origin(record, source) and set(self.kinds) <= set(record["Results"].split())
                and all(path.exists() for kind in self.kinds for path in self.paths(kind, name)))

    def _same_origin(self, record: dict[str, str], source: str) -> bool:
        return self._origin(source).items() <= record.items()

    def claim_photo(self, source: str, name: str) -> list[str]:
        """Removes the earlier results of a photo. UserError, and nothing is removed, if a file in the way has no record.

        Kept are results of other kinds that were made from the same file with the same settings; their kinds are returned.
        """
        label = self.path("labels", name)
        record = read_record(label) if _unchanged(label) else {}
        old = record.get("Results", "").split()
        for kind in self.kinds:
            for path in self.paths(kind, name):
                if kind not in old and os.path.lexists(path):
                    raise _foreign(path)
        kept = [kind for kind in old if kind not in self.kinds and self._same_origin(record, source)]
        for kind in set(old) - {"labels", *kept}:
            for path in self.paths(kind, name):
                path.unlink(missing_ok=True)
        for kind in self.kinds:
            self.paths(kind, name)[0].parent.mkdir(parents=True, exist_ok=True)
        return kept

    # ---- videos

    def video_path(self, name: str) -> Path:
        return self.out / "overlays" / f"{name}.mp4"

    def frame_folder(self, source: str, name: str) -> Path:
        """Its extension tells it from a folder of photos, which may be the video's stills."""
        return self.out / "labels" / f"{name}{os.path.splitext(source)[1] or '.frames'}"

    def video_is_done(self, source: str, name: str) -> bool:
        record = read_mp4_record(self.video_path(name))
        if not self._same_origin(record, source):
            return False
        frames = list(self.frame_folder(source, name).glob("[0-9]*.png")) if self.frames else []
        return not self.frames or (len(frames) == int(record["Frames"])
                                   and all(self._same_origin(read_record(frame), source) for frame in frames))

    def claim_video(self, source: str, name: str):
        """As `claim_photo`, for a video."""
        overlay, folder = self.video_path(name), self.frame_folder(source, name)
        if os.path.lexists(overlay) and not read_mp4_record(overlay):
            raise _foreign(overlay)
        frames = sorted(folder.glob("*.png")) if self.frames else []
        for frame in frames:
            if not _unchanged(frame):
                raise _foreign(frame)
        for path in (overlay, *frames):
            path.unlink(missing_ok=True)
        overlay.parent.mkdir(parents=True, exist_ok=True)
        if self.frames:
            folder.mkdir(parents=True, exist_ok=True)

    def video_record(self, source: str, frames: int) -> dict[str, str]:
        return self._origin(source) | {"Frames": str(frames)}


def _foreign(path: Path) -> UserError:
    return UserError(f"{path}: was not written by predict.py, or was changed since: it is left as it is")


def _digest(label: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(label), digest_size=16).hexdigest()


def read_record(path: Path) -> dict[str, str]:
    """The record in a label map's metadata; {} if there is none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = {key: value for key, value in image.info.items() if isinstance(value, str)}
    except Exception:                                      # missing, or not a PNG: decoders raise many exception types
        return {}
    return text if text.get("Software") == SOFTWARE and "Source" in text else {}


def _unchanged(path: Path) -> bool:
    """Whether a label map has a record, and the pixels it was written with."""
    record = read_record(path)
    if not record:
        return False
    with Image.open(path) as image:
        return record.get("Pixels") == _digest(np.asarray(image))


def append_mp4_record(path: Path, record: dict[str, str]):
    """Players skip a box of the kind "free"."""
    data = json.dumps(record).encode()
    with open(path, "ab") as file:
        file.write(struct.pack(">I4s", BOX + len(data), b"free") + data)


def read_mp4_record(path: Path) -> dict[str, str]:
    """The record behind the last byte of an overlay video; {} if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - (1 << 16)))
            end = file.read()
        return json.loads(end[end.rindex(b'free{"Software"') + 4:])
    except (OSError, ValueError):
        return {}
