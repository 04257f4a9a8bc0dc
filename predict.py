"""Parse your own photos and videos with a trained SCHNet.

    python predict.py photo.jpg                          # the newest run
    python predict.py photos/ "more/*.jpg" clip.mp4 --run runs/lip --tta --out parsed
    python predict.py 0                                  # a webcam, until q or Ctrl-C

    labels/NAME.png      the label map at the photo's size: pixel values are classes, viewers show the palette's colours
    overlays/NAME.jpg    the photo under its label map, with a legend (a video: NAME.mp4, without sound)
    masks/NAME/*.png     --masks: one black and white picture for each class
    probs/NAME.npy       --probs: probabilities (classes, H, W) in float16

Or from Python, for a photo (a path, or an RGB array) of any size:

    parser = Parser("runs/lip")
    label = parser.parse("photo.jpg")                    # (H, W) uint8, 255 classes at most
    print([parser.classes[k] for k in np.unique(label)])
"""

import argparse
import glob
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import inference
from config import user_path
from engine.errors import UserError
from files.images import PHOTO_ENDINGS, read_photo
from files.whole import whole
from viz import pictures, video

OTHER_PHOTO_ENDINGS = (".avif", ".gif", ".heic", ".heif", ".jfif", ".tif", ".tiff")  # tried: none is lost in silence
VIDEO_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
KINDS = ("labels", "overlays", "masks", "probs")           # folders of the results
BATCH_PIXELS = 32 << 20                                    # photos held at a time: very large ones stay in bounds
THREADS = 4                                                # they read and write files while the network works


class Parser:
    """A trained network with what is needed around it. `run`: a folder or checkpoint, None for the newest run."""

    def __init__(self, run: str | Path | None = None, tta: bool = False, size: int | None = None, device: str = ""):
        overrides = [] if size is None else [f"base_size={size}"]
        self.model, self.labels, self.path = inference.load_run(run, overrides, device)
        self.classes, self.palette = self.labels.classes, self.labels.palette
        self.scales, self.flip_pairs = ((1.0,), None)
        if tta:
            self.scales, self.flip_pairs = self.model.cfg.tta_scales, self.labels.flip_pairs

    def parse(self, photo: str | Path | np.ndarray) -> np.ndarray:
        """The label map (H, W) uint8 of a photo."""
        return self.parse_batch([_pixels(photo)])[0]

    def parse_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """The label maps of RGB photos (H, W, 3) uint8 of any sizes, in one go."""
        return inference.predict_labels(self.model, images, self.scales, self.flip_pairs)

    def probabilities(self, photo: str | Path | np.ndarray) -> np.ndarray:
        """Class probabilities (K, H, W) float32 of a photo."""
        return inference.predict(self.model, _pixels(photo), self.scales, self.flip_pairs).cpu().numpy()

    def overlay(self, image: np.ndarray, label: np.ndarray, shown: Iterable[int] | None = None) -> np.ndarray:
        """The photo under its label map, with a legend of the classes that occur (or of those `shown`)."""
        shown = pictures.present(label) if shown is None else shown
        return pictures.with_legend(pictures.overlay(image, label, self.palette), self.classes, self.palette, shown)

    @torch.inference_mode()
    def save_probabilities(self, path: Path, image: np.ndarray) -> np.ndarray:
        """Write the probabilities as .npy strip by strip, so that no photo is too large. Returns the label map."""
        height, width = image.shape[:2]
        logits = inference.views(self.model, [image], self.scales, self.flip_pairs)[0]
        label = np.empty((height, width), np.uint8)
        with whole(path) as part:
            file = np.lib.format.open_memmap(part, "w+", np.float16, (len(self.classes), height, width))
            for top, probabilities, labels in inference.strips(logits, (height, width)):
                label[top:top + len(labels)] = labels.cpu().numpy()
                file[:, top:top + len(labels)] = probabilities.cpu().numpy()
            file.flush()
        return label


def _pixels(photo: str | Path | np.ndarray) -> np.ndarray:
    if not isinstance(photo, np.ndarray):
        return read_photo(photo)
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise UserError(f"a photo must be RGB, (H, W, 3) uint8, not {photo.shape} {photo.dtype}")
    return np.ascontiguousarray(photo)


# ----------------------------------------------------------------------------------------------------------------------
# what to parse, and what to call it

@dataclass
class Report:
    """What came of the work so far."""
    parsed: list[str] = field(default_factory=list)        # names; written to by several threads
    failed: list[str] = field(default_factory=list)        # one line each: file and reason


@dataclass(frozen=True)
class Job:
    path: Path
    name: str                                              # of its outputs: a relative path without an ending


def collect(inputs: list[str], out: Path, report: Report) -> tuple[list[Job], list[Job], list[int]]:
    """The photos, videos and webcams that the arguments mean, each file once. What is missing goes into the report."""
    found: dict[Path, tuple[Path, str]] = {}               # resolved: as given, name
    cameras = []
    folders = sum(Path(text).is_dir() for text in inputs)
    for text in inputs:
        path = Path(text)
        if text.isdecimal() and not path.exists():
            cameras.append(int(text))
        elif path.is_dir():
            for file in _walk(path, out):
                inside = file.relative_to(path)
                found.setdefault(file.resolve(), (file, str(path.resolve().name / inside if folders > 1 else inside)))
        else:
            files = [text] if path.exists() or not glob.has_magic(text) else sorted(glob.glob(text, recursive=True))
            if not files:
                report.failed.append(f"{text}: matches no file")
            for file in map(Path, files):
                if file.is_file():
                    found.setdefault(file.resolve(), (file, file.name))
                elif not file.is_dir():                    # a glob also matches folders
                    report.failed.append(f"{file}: no such file or folder")
    results = [(out / kind).resolve() for kind in KINDS]
    for file, (path, _) in found.items():
        if any(folder in file.parents for folder in results):
            raise UserError(f"{path}: lies where the results go and might be overwritten; choose another --out")
    jobs = _name(list(found.values()))
    videos = [job for job in jobs if job.path.suffix.lower() in VIDEO_ENDINGS]
    return [job for job in jobs if job not in videos], videos, cameras


def _walk(folder: Path, out: Path) -> Iterator[Path]:
    """Photos and videos below a folder in order, without hidden files and without what this program wrote before."""
    results = [(out / kind).resolve() for kind in KINDS]
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".")
                            and (Path(root) / name).resolve() not in results)
        for name in sorted(files):
            ending = Path(name).suffix.lower()
            if not name.startswith(".") and ending in (*PHOTO_ENDINGS, *OTHER_PHOTO_ENDINGS, *VIDEO_ENDINGS):
                yield Path(root) / name


def _name(files: list[tuple[Path, str]]) -> list[Job]:
    """Names that differ even where capitals do not count. Files that differ in their ending keep it: a_jpg, a_png."""
    stems = [str(Path(name).with_suffix("")) for _, name in files]
    often = Counter(stem.lower() for stem in stems)
    taken, jobs = set(), []
    for (path, _), stem in zip(files, stems):
        wanted = stem if often[stem.lower()] == 1 else f"{stem}_{path.suffix[1:]}"
        name, n = wanted, 2
        while name.lower() in taken:
            name, n = f"{wanted}_{n}", n + 1
        taken.add(name.lower())
        jobs.append(Job(path, name))
    return jobs


# ----------------------------------------------------------------------------------------------------------------------
# photos

def parse_photos(parser: Parser, jobs: list[Job], out: Path, batch: int, masks: bool, probs: bool, report: Report):
    """Parse and write; threads read ahead and write behind."""
    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(jobs), unit="photo", disable=not jobs) as bar:
        for chunk in _batches(inference.read_ahead(_read, jobs, THREADS), batch):
            good = []
            for job, image in chunk:
                if isinstance(image, UserError):
                    report.failed.append(str(image))
                else:
                    good.append((job, image))
            if probs:
                labels = [parser.save_probabilities(_place(out, "probs", job.name, ".npy"), image)
                          for job, image in good]
            else:
                labels = parser.parse_batch([image for _, image in good])
            writing = [pool.submit(_write, parser, out, job.name, image, label, masks, report)
                       for (job, image), label in zip(good, labels)]
            for future in writing:
                future.result()
            bar.update(len(chunk))


def _read(job: Job) -> np.ndarray | UserError:
    """The photo's pixels or its fault."""
    try:
        return read_photo(job.path)
    except UserError as error:
        return error


def _batches(items: Iterable[tuple[Job, np.ndarray | UserError]], limit: int) -> Iterator[list]:
    """Groups of at most `limit` photos and `BATCH_PIXELS` pixels (one photo may have more)."""
    group, pixels = [], 0
    for job, image in items:
        size = 0 if isinstance(image, UserError) else image.shape[0] * image.shape[1]
        if group and (len(group) == limit or pixels + size > BATCH_PIXELS):
            yield group
            group, pixels = [], 0
        group.append((job, image))
        pixels += size
    if group:
        yield group


def _write(parser: Parser, out: Path, name: str, image: np.ndarray, label: np.ndarray, masks: bool,
           report: Report):
    pictures.save_palette_png(_place(out, "labels", name, ".png"), label, parser.palette)
    pictures.save_jpeg(_place(out, "overlays", name, ".jpg"), parser.overlay(image, label))
    for k, title in enumerate(parser.classes if masks else ()):
        title = re.sub(r"[^\w-]+", "_", title)
        pictures.save_png(_place(out, "masks", f"{name}/{k:02d}_{title}", ".png"), np.uint8(255) * (label == k))
    report.parsed.append(name)


def _place(out: Path, kind: str, name: str, ending: str) -> Path:
    path = out / kind / f"{name}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# the program

def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=os.path.expanduser, metavar="INPUT",
                        help="photo, video, folder, glob, or number of a webcam")
    parser.add_argument("--run", help="folder of a run, or a checkpoint; the newest run if not given")
    parser.add_argument("--out", type=user_path, default=Path("predictions"),
                        help="folder of the results (predictions)")
    parser.add_argument("--tta", action="store_true", help="average over scales and flips: slower, a little better")
    parser.add_argument("--size", type=int, help="long side of a photo as the network sees it; the run's if not given")
    parser.add_argument("--masks", action="store_true", help="photos: also a black and white picture for each class")
    parser.add_argument("--probs", action="store_true", help="photos: also the probabilities, as .npy")
    parser.add_argument("--frames", action="store_true", help="videos: also the label map of each frame")
    parser.add_argument("--batch", type=int, default=4, help="photos at a time (4)")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; the GPU if there is one")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    if args.size is not None and args.size < 32:
        parser.error("--size must be at least 32")
    return args


def run(args: argparse.Namespace, report: Report):
    photos, videos, cameras = collect(args.inputs, args.out, report)
    if not photos and not videos and not cameras:
        raise UserError("; ".join(report.failed) or f"no photo or video in {', '.join(args.inputs)}")
    parser = Parser(args.run, args.tta, args.size, args.device)
    print(f"{parser.path}: {len(parser.classes)} classes of {parser.labels.name}" + (", with TTA" if args.tta else ""))
    for job in photos + videos:
        if Path(job.name).name != job.path.stem:
            print(f"{job.path} is called {job.name} in the results: another input has its name")
    if (videos or cameras) and (args.masks or args.probs):
        print("--masks and --probs are for photos: videos get overlays, and label maps with --frames")
    parse_photos(parser, photos, args.out, args.batch, args.masks, args.probs, report)
    for source, name in [(job.path, job.name) for job in videos] + [(n, f"webcam_{n}") for n in cameras]:
        labels = args.out / "labels" / name if args.frames else None
        try:
            video.parse_video(parser, source, _place(args.out, "overlays", name, ".mp4"), labels, args.batch)
            report.parsed.append(name)
        except UserError as error:
            report.failed.append(str(error))


def main(argv: list[str] | None = None) -> int:
    args, report, stopped = arguments(argv), Report(), False
    start = time.monotonic()
    try:
        run(args, report)
    except KeyboardInterrupt:
        stopped = True
    except torch.OutOfMemoryError:
        report.failed.append("out of GPU memory: try a smaller --batch or --size, or --device cpu")
    except OSError as error:
        report.failed.append(f"{error.filename or args.out}: {error.strerror or error}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    print(f"{len(report.parsed)} parsed in {seconds:.1f} s" + (f", in {args.out}" if report.parsed else ""))
    if report.failed:
        print(f"{len(report.failed)} not parsed:\n  " + "\n  ".join(report.failed), file=sys.stderr)
    if stopped:
        print("stopped: what is written is whole, the rest was not parsed", file=sys.stderr)
    return 130 if stopped else 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
