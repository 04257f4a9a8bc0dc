"""Reading and writing videos with OpenCV's FFmpeg: frames as RGB arrays with square pixels, an .mp4 without sound.

A container's frame rate and frame count are often estimates: a file is decoded once in advance, for the timestamps of
its frames and for the errors that the decoder reports.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from errors import UserError


class Reader:
    """The frames of a video file, RGB uint8 (H, W, 3). `fault`: the first error that its decoder reports, or ""."""

    def __init__(self, path: str | Path):
        self.path = path
        times, self.fault, changes = _look_through(path)
        self.count = len(times)
        capture = _open(path)
        self.rate = frame_rate(times, capture.get(cv2.CAP_PROP_FPS))
        height, width = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        wide, high = capture.get(cv2.CAP_PROP_SAR_NUM) or 1, capture.get(cv2.CAP_PROP_SAR_DEN) or 1
        capture.release()
        if changes:                                        # OpenCV would squeeze all frames into the first size
            raise UserError(f"{path}: the size or aspect of its frames changes from {width}x{height}: split it there")
        self.stored = height, width                        # pixels that are not square are stretched, never shrunk
        self.shown = (height, round(width * wide / high)) if wide >= high else (round(height * high / wide), width)

    def __iter__(self) -> Iterator[np.ndarray]:
        capture = _open(self.path)
        while True:
            good, frame = capture.read()
            if not good:
                return
            if self.shown != self.stored:
                frame = cv2.resize(frame, self.shown[::-1], interpolation=cv2.INTER_LINEAR)
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def as_stored(self, label: np.ndarray) -> np.ndarray:
        """A label map (H, W) of a frame at the size in which the file stores its frames."""
        if self.shown == self.stored:
            return label
        return cv2.resize(label, self.stored[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


class Writer:
    """Writes RGB frames of one size. The encoder is opened with the first; `error` says why it could not be."""

    def __init__(self, path: Path, rate: float):
        self.path, self.rate, self.writer, self.count, self.error = path, _writable(rate), None, 0, ""

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_):
        if self.writer is not None:
            self.writer.release()

    def write(self, frame: np.ndarray):
        height, width = frame.shape[:2]                   # encoders want even sides: a line of white where they are odd
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)
        if self.writer is None:
            size = frame.shape[1], frame.shape[0]
            self.writer = cv2.VideoWriter(os.path.abspath(self.path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"),
                                          self.rate, size)
            if not self.writer.isOpened():
                self.error = f"OpenCV cannot write a video of {size[0]} x {size[1]} pixels"
        self.writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self.count += 1


def is_video(path: str | Path) -> bool:
    """Whether OpenCV reads more than one frame from a file: a single one may be part of a photo (of a .heic)."""
    capture = _open(path)
    return capture.grab() and capture.grab()


def count_frames(path: str | Path) -> int:
    """The number of frames of a video written here, by its header."""
    return int(_open(path).get(cv2.CAP_PROP_FRAME_COUNT))


def frame_rate(times: list[float], declared: float) -> float:
    """Frames per second from the frames' timestamps in ms; the declared rate where it agrees, as timestamps are
    rounded.

    Only rising steps count: in a file of several recordings the timestamps restart.
    """
    steps = [after - before for before, after in zip(times, times[1:]) if after > before]
    if not steps:                                          # one frame, or no timestamps
        return declared if 1 <= declared <= 240 else 25.0
    seconds = sum(steps) / 1000
    return declared if abs(declared * seconds - len(steps)) < 0.5 else len(steps) / seconds


def _open(path: str | Path) -> cv2.VideoCapture:
    """OpenCV's own error output is silenced. Absolute paths here and above: FFmpeg would read "a:" in a:b.mp4 as a
    protocol.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read when OpenCV first opens a video
    (cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2).setLogLevel(0)         # OpenCV 5, OpenCV 4; 0: silent
    return cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)    # other backends read x1.hdr, x2.hdr as a sequence


def _look_through(path: str | Path) -> tuple[list[float], str, bool]:
    """Timestamps of the frames in ms, the decoder's first error or "", whether the frames' format changes."""
    command = [sys.executable, Path(__file__).with_name("frame_times.py"), os.path.abspath(path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"{path}: the decoder crashed (exit code {done.returncode}): not a video, or damaged")
    times = [float(line) for line in done.stderr.splitlines() if re.fullmatch(r"[\d.e+-]+", line)]
    messages = re.findall(r"\[OPENCV:FFMPEG:(\d+)\] *(.*)", done.stdout + done.stderr)
    errors = [text for level, text in messages if int(level) <= 16]
    opening, _, decoding = (done.stdout + done.stderr).partition("Statistics:")
    changes = decoding.count("get_format()") > opening.count("get_format()")               # the decoder restarts
    return times, errors[0] if errors else "" if times else "not a video or damaged", changes


def _writable(rate: float) -> float:
    """The nearest rate that can be written: OpenCV makes a fraction of it, to 0.001, of which MPEG-4 takes 16 bits."""
    rate = min(max(rate, 0.01), 1000.0)
    digits = next(n for n in (3, 2, 1) if rate * 10 ** n < 1 << 16)
    return round(rate, digits)
