"""Parse a video or a webcam frame by frame into an .mp4 of overlays with a legend, without sound.

OpenCV's FFmpeg decodes and encodes. Each frame is parsed for itself, so that a label may flicker where the network is
unsure. What a container says of its rate and number of frames is often an estimate: a file is gone through once before,
for the frames' own times and for what the decoder finds wrong.
"""

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from errors import UserError
from files.atomic import atomic_write
from viz import pictures


def is_video(path: str | Path) -> bool:
    """Whether OpenCV reads more than one picture from a file: one alone may be a part of a photo (of a .heic)."""
    capture = _open(path)
    try:
        return capture.grab() and capture.grab()
    finally:
        capture.release()


def parse_video(parser, source: Path | int, target: Path, labels: Path | None = None, batch: int = 4,
                progress: bool = True) -> int:
    """Parse the file or webcam `source` into `target`, an .mp4; with the folder `labels`, also into label maps.

    Returns the number of frames. A webcam runs until q is pressed in its window (where there is a display) or Ctrl-C.
    A file in which the decoder finds faults is parsed as far as it can be read, and then a `UserError`.
    """
    live = isinstance(source, int)
    name = f"webcam {source}" if live else str(source)
    times, fault = ([], "") if live else _look_through(source)
    capture = _open(source)
    pairs = _parse(parser, capture, 1 if live else batch)
    try:
        rate = 0.0 if live else _rate(times, capture.get(cv2.CAP_PROP_FPS))
        if live:
            pairs, rate = _measure(pairs)
        with atomic_write(target) as part, tqdm(pairs, total=len(times) or None, unit="frame", desc=Path(name).name,
                                         disable=not progress) as bar:
            count = _write(bar, parser, part, _writable(rate), labels, live)
            if not count:
                raise UserError(f"{name}: no frame could be read" + (f" ({fault})" if fault else ""))
            if frames(part) != count:                      # the writer does not say it
                raise UserError(f"{target} could not be written whole: is there room on the disk?")
    finally:
        capture.release()
    if fault:
        raise UserError(f"{name}: damaged or cut off ({fault}); the {count} frames that could be read were parsed")
    return count


def _open(source: str | Path | int) -> cv2.VideoCapture:
    """A file or a webcam. What is wrong with it is said by this program, once, and not by OpenCV too.
    Whole paths, here and below: FFmpeg takes a: of a:b.mp4 for a protocol."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read when OpenCV first opens a video
    (cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2).setLogLevel(0)         # OpenCV 5, OpenCV 4; 0: silent
    if isinstance(source, int):
        return cv2.VideoCapture(source)
    return cv2.VideoCapture(os.path.abspath(source), cv2.CAP_FFMPEG)     # others take x1.hdr, x2.hdr, ... for a video


def _look_through(path: Path) -> tuple[list[float], str]:
    """The times of a video's frames in milliseconds, and what the decoder finds wrong with the file, in its words."""
    command = [sys.executable, Path(__file__).with_name("frame_times.py"), os.path.abspath(path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"{path}: the decoder breaks down on it (exit code {done.returncode}), not a video or damaged")
    times = [float(line) for line in done.stderr.splitlines() if re.fullmatch(r"[\d.e+-]+", line)]
    said = re.search(r"\[OPENCV:FFMPEG:\d+\] *(.*)", done.stdout + done.stderr)
    return times, said[1] if said else "" if times else "not a video or damaged"


def _rate(times: list[float], declared: float) -> float:
    """Frames a second by the frames' times; the declared rate where it says the same, for times are rounded."""
    last = int(np.argmax(times)) if times else 0           # some containers have no time for the very last frame
    seconds = (times[last] - times[0]) / 1000 if last else 0.0
    if seconds <= 0:                                       # one frame, or none of them has a time
        return declared if 1 <= declared <= 240 else 25.0
    return declared if abs(declared * seconds - last) < 0.5 else last / seconds


def _parse(parser, capture: cv2.VideoCapture, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(frame, label) of every frame, parsed `batch` at a time."""
    while True:
        frames = []
        while len(frames) < batch:
            good, frame = capture.read()
            if not good:
                break
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        if not frames:
            return
        yield from zip(frames, parser.parse_batch(frames))


def _measure(pairs: Iterator) -> tuple[Iterator, float]:
    """How many frames a second can be parsed, so that a recording plays at the speed of life. The first warms up."""
    next(pairs, None)
    start = time.monotonic()
    first = list(itertools.islice(pairs, 1))
    return itertools.chain(first, pairs), 1 / (time.monotonic() - start)


def _write(pairs, parser, path: Path, rate: float, labels: Path | None, live: bool) -> int:
    """Write overlays (and label maps) as they come; returns how many."""
    writer, count, window = None, 0, live and _has_display()
    try:
        for frame, label in pairs:
            picture = _even(parser.overlay(frame, label, range(len(parser.classes))))
            if writer is None:
                size = picture.shape[1], picture.shape[0]
                code = cv2.VideoWriter_fourcc(*"mp4v")
                writer = cv2.VideoWriter(os.path.abspath(path), cv2.CAP_FFMPEG, code, rate, size)
                if not writer.isOpened():
                    raise UserError(f"{path.parent}: this OpenCV cannot write a {size[0]} x {size[1]} video there")
            bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
            writer.write(bgr)
            count += 1
            if labels is not None:
                labels.mkdir(parents=True, exist_ok=True)
                pictures.save_palette_png(labels / f"{count:06d}.png", label, parser.palette)
            if window:
                cv2.imshow("SCHNet: q ends", bgr)
                if cv2.waitKey(1) & 0xFF == ord("q"):
                    break
    except KeyboardInterrupt:
        if not live:                                       # a webcam without a window ends so, a file is half parsed
            raise
    finally:
        if writer is not None:
            writer.release()
    return count


def frames(path: str | Path) -> int:
    """What a video written here says of its number of frames."""
    capture = _open(path)
    try:
        return int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        capture.release()


def _writable(rate: float) -> float:
    """The nearest rate that can be written: OpenCV makes a fraction of it, to 0.001, of which MPEG-4 takes 16 bits."""
    rate = min(max(rate, 0.01), 1000.0)
    digits = next(n for n in (3, 2, 1) if rate * 10 ** n < 1 << 16)
    return round(rate, digits)


def _even(picture: np.ndarray) -> np.ndarray:
    """Encoders want even sides: a line of white at the bottom and right where they are odd."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)


def _has_display() -> bool:
    facts = [line.split() for line in cv2.getBuildInformation().splitlines() if line.strip().startswith("GUI:")]
    if ["GUI:", "NONE"] in facts or not facts:             # opencv-python-headless
        return False
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
