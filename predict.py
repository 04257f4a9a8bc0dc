"""Parse your own photos and videos with a trained SCHNet.

    python predict.py photo.jpg                          # the newest run
    python predict.py photos/ "more/*.jpg" clip.mp4 --run runs/lip --tta --out parsed
    python predict.py 0                                  # a webcam, until q or Ctrl-C
    torchrun --nproc_per_node 8 predict.py photos/ --out parsed --skip-existing
                                                         # shared out, each process its own GPU; only what is missing

    labels/NAME.png      the label map at the photo's size: pixel values are classes, viewers show the palette's colours
    overlays/NAME.jpg    the photo under its label map, with a legend (a video: NAME.mp4, without sound)
    masks/NAME/*.png     --masks: one black and white picture for each class
    probs/NAME.npy       --probs: probabilities (classes, H, W) in float16
    labels/NAME.mp4/*    --frames: the label map of each frame of the video NAME.mp4, 000001.png and on

With --map configs/maps/atr.yaml (or tryon, viton_hd, coarse, or your own) all of these are in another numbering.
Knobs of the run's config may stand between the photos: precision=bf16 on a CPU, sam_weights=PATH of a moved file.

Or from Python, for a photo (a path, a PIL image or an RGB array) of any size; see `Parser`:

    parser = Parser("runs/lip")
    label = parser.parse("photo.jpg")                    # (H, W) uint8, 255 classes at most
    print([parser.classes[k] for k in np.unique(label)])
"""

import argparse
import contextlib
import glob
import itertools
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import classmap
import inference
from config import user_path
from errors import UserError, in_one_line
from engine.processes import World, run_together
from files.images import ALL_ENDINGS, ALL_FORMATS, NotAPicture, as_shown, read_photo
from files.walk import walk
from files.atomic import usable_folder, atomic_write
from viz import pictures, video

VIDEO_ENDINGS = frozenset(".3g2 .3gp .asf .avi .divx .f4v .flv .m2ts .m2v .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf "
                          ".ogv .ts .vob .webm .wmv".split())
ENDINGS = ALL_ENDINGS | VIDEO_ENDINGS | {".heic", ".heif"}               # in a folder; the last two cannot be read, and
#                                                                          that is said
ENDING = {"labels": ".png", "overlays": ".jpg", "masks": ".png", "probs": ".npy"}    # in the folders of the results
BATCH = 4                                                  # photos parsed at a time
BATCH_PIXELS = 32 << 20                                    # of photos parsed at a time: very large ones stay in bounds
THREADS = 4                                                # they read and write files while the network works
LESS_MEMORY = "a smaller --batch or --size, or --device cpu"


Photo = str | Path | Image.Image | np.ndarray              # a path, a PIL image, or RGB (H, W, 3) uint8; of any size


class Parser:
    """A trained network with what is needed around it.

        parser = Parser("runs/lip")
        label = parser.parse("photo.jpg")                                # (H, W) uint8
        chosen = [parser.classes.index(name) for name in ("Upper-clothes", "Coat", "Dress")]
        mask = np.isin(label, chosen)                                    # (H, W) bool
        Image.fromarray(mask).save("upper.png")

    `run`: a folder or checkpoint, None for the newest run. `tta`: average over scales and flips. `size`: the long side of
    a photo as the network sees it. `class_map`: a file that merges the network's classes into others (classmap.py);
    `labels`, `classes` and `palette` are those of the results. `overrides` of the run's config: ["precision=bf16"].
    A `UserError` says what is wrong with a run or a photo.

    Threads may share a Parser: a lock lets one at a time through the network, photos are read outside it.
    """

    def __init__(self, run: str | Path | None = None, tta: bool = False, size: int | None = None,
                 device: str | torch.device = "", class_map: str | Path | None = None, overrides: Sequence[str] = ()):
        if size is not None and size not in range(32, 16_385):
            raise UserError(f"size must be a whole number of pixels between 32 and 16,384, not {size}")
        overrides = [*overrides] if size is None else [*overrides, f"base_size={size}"]
        self.model, self.labels, self.path = inference.load_run(run, overrides, device)
        self.tta, self.flip_pairs, self.merge = tta, self.labels.flip_pairs, None
        if class_map is not None:
            self.labels, self.merge = classmap.load(class_map, self.labels)
        self.classes, self.palette = self.labels.classes, self.labels.palette
        self.lock = threading.Lock()

    def parse(self, photo: Photo | list[Photo], tta: bool | None = None) -> np.ndarray | list[np.ndarray]:
        """The label map (H, W) uint8 of a photo; of a list of photos, whose sizes may differ, a list of them.

        `tta`: otherwise than the Parser was made for.
        """
        if not isinstance(photo, list):
            return self.parse_batch([_pixels(photo)], tta)[0]
        labels = []
        for start in range(0, len(photo), BATCH):
            labels += self.parse_batch([_pixels(one) for one in photo[start:start + BATCH]], tta)
        return labels

    def parse_batch(self, images: list[np.ndarray], tta: bool | None = None) -> list[np.ndarray]:
        """The label maps of RGB photos (H, W, 3) uint8 of any sizes, in one go."""
        with self.lock:
            return inference.predict_labels(self.model, images, *self._views(tta), self.merge)

    def probabilities(self, photo: Photo, tta: bool | None = None) -> np.ndarray:
        """Class probabilities (K, H, W) float32 of a photo."""
        image = _pixels(photo)
        with self.lock:
            return inference.predict(self.model, image, *self._views(tta), self.merge).cpu().numpy()

    def _views(self, tta: bool | None) -> tuple:
        """The scales and flips of a photo."""
        return (self.model.cfg.tta_scales, self.flip_pairs) if (self.tta if tta is None else tta) else ((1.0,), None)

    def overlay(self, image: np.ndarray, label: np.ndarray, shown: Iterable[int] | None = None) -> np.ndarray:
        """The photo under its label map, with a legend of the classes that occur (or of those `shown`)."""
        shown = pictures.present(label) if shown is None else shown
        return pictures.with_legend(pictures.overlay(image, label, self.palette), self.classes, self.palette, shown)

    @torch.inference_mode()
    def save_probabilities(self, path: Path, image: np.ndarray) -> np.ndarray:
        """Write the probabilities as .npy strip by strip, so that no photo is too large. Returns the label map."""
        height, width = image.shape[:2]
        with self.lock:
            logits = inference.views(self.model, [image], *self._views(None))[0]
        label = np.empty((height, width), np.uint8)
        with atomic_write(path) as part:
            file = np.lib.format.open_memmap(part, "w+", np.float16, (len(self.classes), height, width))
            for top, probabilities, labels in inference.strips(logits, (height, width), self.merge):
                label[top:top + len(labels)] = labels.cpu().numpy()
                file[:, top:top + len(labels)] = probabilities.cpu().numpy()
            file.flush()
        return label


def _pixels(photo: Photo) -> np.ndarray:
    if isinstance(photo, Image.Image):
        return as_shown(photo)
    if isinstance(photo, str | Path):
        return read_photo(photo, ALL_FORMATS)
    if not isinstance(photo, np.ndarray):
        raise UserError(f"a photo must be a path, a PIL image or an RGB array, not {type(photo).__name__}")
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
        raise UserError(f"a photo must be RGB, (H, W, 3) uint8, not {photo.shape} {photo.dtype}")
    return np.ascontiguousarray(photo)


# ----------------------------------------------------------------------------------------------------------------------
# what to parse, and what to call it

@dataclass(frozen=True)
class Job:
    path: str
    name: str                                              # of its outputs: a relative path without an ending


@dataclass
class Report:
    """What came of the work so far. Several threads write to it."""
    parsed: list[str] = field(default_factory=list)        # names
    failed: list[str] = field(default_factory=list)        # one line each: file and reason

    @contextlib.contextmanager
    def work_on(self, *jobs: Job):
        """Around what is done for these files: if it fails that is noted, and others may do better. A bug is raised."""
        try:
            yield
        except Exception as error:
            line = in_one_line(error, LESS_MEMORY)
            if not line:
                raise
            self.failed += [line if line.startswith(f"{job.path}: ") else f"{job.path}: {line}" for job in jobs]


def collect(inputs: list[str], out: Path, report: Report) -> tuple[list[Job], list[Job], list[int]]:
    """The photos, videos and webcams that the arguments mean, each file once. What is missing goes into the report."""
    found: dict[str, tuple[str, str]] = {}                 # real path: path as given, name
    results = {os.path.realpath(out / kind) for kind in ENDING}
    cameras, others = [], Counter()
    folders = sum(os.path.isdir(text) for text in inputs)
    for text in inputs:
        if text.isdecimal() and not os.path.exists(text):
            cameras.append(int(text))
        elif os.path.isdir(text):
            start = os.path.basename(os.path.realpath(text)) if folders > 1 else ""
            for real, path, inside in _below(text, results, others, report):
                found.setdefault(real, (path, os.path.join(start, inside)))
        else:
            for path in _named(text, report):
                real = os.path.realpath(path)
                if any(real.startswith(os.path.join(folder, "")) for folder in results):
                    raise UserError(f"{path}: lies where the results go and might be overwritten; choose another --out")
                found.setdefault(real, (path, os.path.basename(path)))
    if others:
        print(f"passed over, by their endings no photos or videos: {_counts(others)}")
    photos, videos = [], []
    for job in _name(list(found.values())):
        (videos if _ending(job.path) in VIDEO_ENDINGS else photos).append(job)
    return photos, videos, cameras


def _named(text: str, report: Report) -> list[str]:
    """The files that an argument means which is no folder: a path or a pattern."""
    files = [text] if os.path.exists(text) or not glob.has_magic(text) else sorted(glob.glob(text, recursive=True))
    if not files:
        report.failed.append(f"{text}: matches no file")
    report.failed += [f"{os.path.normpath(path)}: no such file or folder" for path in files if not os.path.exists(path)]
    return [path for path in files if os.path.isfile(path)]              # a pattern also matches folders


def _below(folder: str, results: set[str], others: Counter, report: Report) -> Iterator[tuple[str, str, str]]:
    """(real path, path, path inside the folder) of the photos and videos below it, in order.

    Hidden files and what is in the same --out are left out; other files are counted by their endings in `others`.
    """
    def unreadable(error: OSError):
        report.failed.append(f"{error.filename}: {error.strerror}")

    for where, real, names in walk(folder, results.__contains__, unreadable):
        inside = os.path.relpath(where, folder) if where != folder else ""
        for name in names:
            path = os.path.join(where, name)
            if _ending(name) in ENDINGS and not name.startswith("."):
                real_path = os.path.realpath(path) if os.path.islink(path) else os.path.join(real, name)
                yield real_path, path, os.path.join(inside, name)
            elif not name.startswith("."):
                others[_ending(name) or "without an ending"] += 1


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _counts(others: Counter) -> str:
    return ", ".join(f"{count} {ending}" for ending, count in others.most_common())


def _name(files: list[tuple[str, str]]) -> list[Job]:
    """Names that differ even where capitals do not count. Files that differ in their ending keep it: a_jpg, a_png."""
    stems = [os.path.splitext(name)[0] for _, name in files]
    often = Counter(stem.lower() for stem in stems)
    taken, jobs = set(), []
    for (path, _), stem in zip(files, stems):
        wanted = stem if often[stem.lower()] == 1 else f"{stem}_{os.path.splitext(path)[1][1:]}"
        name, n = wanted, 2
        while name.lower() in taken:
            name, n = f"{wanted}_{n}", n + 1
        taken.add(name.lower())
        jobs.append(Job(path, name))
    return jobs


# ----------------------------------------------------------------------------------------------------------------------
# photos

def parse_photos(parser: Parser, batches: list[list[Job]], done: set[str], args: argparse.Namespace, report: Report,
                 bar: Callable[[int], object]) -> list[Job]:
    """Parse and write; threads read ahead and write behind. Returns those that are no pictures but videos.

    How a label comes out can depend, in the last bits, on what else is in the batch. So batches are always the same ones,
    whoever parses them: photos of a batch that are `done` go through the network too, but are not written again.
    """
    videos, writing = [], []

    def finish():
        for future in writing:
            future.result()
        bar(len(writing))
        writing.clear()

    reading = inference.read_ahead(_read, itertools.chain.from_iterable(batches), THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for group in itertools.chain.from_iterable(_groups(itertools.islice(reading, len(b))) for b in batches):
                faults = [(job, fault) for job, fault in group if isinstance(fault, UserError) and job.name not in done]
                for job, fault in faults:
                    if isinstance(fault, NotAPicture) and video.is_video(job.path):
                        videos.append(job)
                    else:
                        report.failed.append(str(fault))
                bar(len(faults))
                parsed = _parse(parser, [pair for pair in group if isinstance(pair[1], np.ndarray)], done, args, report)
                finish()                                   # the group before, written while this one was parsed
                writing += [pool.submit(_write, parser, *one, args, report) for one in parsed]
        finally:
            finish()
    return videos


def _read(job: Job) -> np.ndarray | UserError:
    """The photo's pixels or its fault."""
    try:
        return read_photo(job.path, ALL_FORMATS)
    except UserError as error:
        return error


def _groups(batch: Iterable[tuple[Job, np.ndarray | UserError]]) -> Iterator[list]:
    """A batch in parts of at most `BATCH_PIXELS` pixels (one photo may have more)."""
    group, pixels = [], 0
    for job, image in batch:
        size = image.shape[0] * image.shape[1] if isinstance(image, np.ndarray) else 0
        if group and pixels + size > BATCH_PIXELS:
            yield group
            group, pixels = [], 0
        group.append((job, image))
        pixels += size
    if group:
        yield group


def _parse(parser: Parser, group: list[tuple[Job, np.ndarray]], done: set[str], args: argparse.Namespace,
           report: Report) -> list[tuple[Job, np.ndarray, np.ndarray]]:
    """(job, photo, label map) of those that are to be parsed and could be."""
    wanted, parsed = [(job, image) for job, image in group if job.name not in done], []
    if args.probs:
        for job, image in wanted:
            with report.work_on(job):
                path = _with_folder(_path(args.out, "probs", job.name))
                parsed.append((job, image, parser.save_probabilities(path, image)))
    elif wanted:
        with report.work_on(*(job for job, _ in wanted)):
            labels = parser.parse_batch([image for _, image in group])
            parsed = [(job, image, label) for (job, image), label in zip(group, labels) if job.name not in done]
    return parsed


def _write(parser: Parser, job: Job, image: np.ndarray, label: np.ndarray, args: argparse.Namespace, report: Report):
    with report.work_on(job):
        for k, path in enumerate(_masks(parser, job, args)):
            pictures.save_png(_with_folder(path), np.uint8(255) * (label == k))
        pictures.save_palette_png(_with_folder(_path(args.out, "labels", job.name)), label, parser.palette)
        pictures.save_jpeg(_with_folder(_path(args.out, "overlays", job.name)), parser.overlay(image, label))
        report.parsed.append(job.name)


# ----------------------------------------------------------------------------------------------------------------------
# where the results are

def _path(out: Path, kind: str, name: str, ending: str = "") -> str:
    return f"{out}/{kind}/{name}{ending or ENDING[kind]}"


def _masks(parser: Parser, job: Job, args: argparse.Namespace) -> list[str]:
    titles = [re.sub(r"[^\w-]+", "_", title) for title in parser.classes] if args.masks else []
    return [_path(args.out, "masks", f"{job.name}/{k:02d}_{title}") for k, title in enumerate(titles)]


def _frames(job: Job, args: argparse.Namespace) -> Path:
    """The folder of a video's label maps. Its ending keeps it apart from a folder of photos, which may be its stills."""
    return Path(_path(args.out, "labels", job.name, os.path.splitext(job.path)[1] or ".frames"))


def _with_folder(path: str) -> Path:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return Path(path)


def photo_is_done(parser: Parser, job: Job, args: argparse.Namespace) -> bool:
    """Whether all that is wanted of a photo is there: a result has its name only when it is whole."""
    kinds = ("labels", "overlays", "probs") if args.probs else ("labels", "overlays")
    paths = itertools.chain((_path(args.out, kind, job.name) for kind in kinds), _masks(parser, job, args))
    # or it has turned out to be a video
    return all(map(os.path.exists, paths)) or video_is_done(job, args) and video.is_video(job.path)


def video_is_done(job: Job, args: argparse.Namespace) -> bool:
    path, labels = _path(args.out, "overlays", job.name, ".mp4"), _frames(job, args)
    return os.path.exists(path) and (not args.frames or len(list(labels.glob("[0-9]*.png"))) == video.frames(path))


# ----------------------------------------------------------------------------------------------------------------------
# the program

def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=os.path.expanduser, metavar="INPUT",
                        help="photo, video, folder, glob, number of a webcam; key=value: of the run's config")
    parser.add_argument("--run", "--checkpoint", help="folder of a run, or a checkpoint; the newest run if not given. "
                        "Under torchrun, which has options that begin with --run, only --checkpoint")
    parser.add_argument("--out", type=user_path, default=Path("predictions"),
                        help="folder of the results (predictions)")
    parser.add_argument("--map", type=user_path, metavar="FILE",
                        help="merge the classes into others: a file of configs/maps, or your own")
    parser.add_argument("--skip-existing", action="store_true",
                        help="leave out what has all its results, of whatever run, map and size they are. Photos that "
                        "share a batch with one that has not go through the network again, so that all comes out as in one "
                        "go; with --batch 1 there are none")
    parser.add_argument("--tta", action="store_true", help="average over scales and flips: slower, a little better")
    parser.add_argument("--size", type=int, help="long side of a photo as the network sees it; the run's if not given")
    parser.add_argument("--masks", action="store_true", help="photos: also a black and white picture for each class")
    parser.add_argument("--probs", action="store_true", help="photos: also the probabilities, as .npy")
    parser.add_argument("--frames", action="store_true", help="videos: also the label map of each frame")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"photos at a time per process ({BATCH})")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; the GPU if there is one")
    args = parser.parse_intermixed_args(argv)
    args.overrides = [text for text in args.inputs if _is_override(text)]
    args.inputs = [text for text in args.inputs if text not in args.overrides]
    if not args.inputs:
        parser.error("the following arguments are required: INPUT")
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    return args


def _is_override(text: str) -> bool:
    """Whether an argument is key=value, and names no file."""
    return bool(re.match("[a-z_]+=", text)) and not glob.glob(text) and not os.path.exists(text)


def look(args: argparse.Namespace, report: Report) -> tuple[list[Job], list[Job], list[int]]:
    """Photos, videos, webcams; what there is to say about them is said before the work."""
    photos, videos, cameras = collect(args.inputs, args.out, report)
    if not photos and not videos and not cameras:
        raise UserError("; ".join(report.failed) or f"no photo or video in {', '.join(args.inputs)}")
    usable_folder(args.out)
    renamed = [job for job in itertools.chain(photos, videos)
               if os.path.basename(job.name) != os.path.splitext(os.path.basename(job.path))[0]]
    for job in renamed[:10]:
        print(f"{job.path} is called {job.name} in the results: another input has its name")
    if len(renamed) > 10:
        print(f"... and so are {len(renamed) - 10} more")
    if (videos or cameras) and (args.masks or args.probs):
        print("--masks and --probs are for photos: videos get overlays, and label maps with --frames")
    return photos, videos, cameras


def run(args: argparse.Namespace, world: World, report: Report):
    start = time.monotonic()
    with world.all_or_none():
        found = look(args, report) if world.main else None
    photos, videos, cameras = world.broadcast(found)
    with world.all_or_none():
        parser = Parser(args.run, args.tta, args.size, world.device, args.map, args.overrides)
        done = set()
        if args.skip_existing and world.main:
            done = {job.name for job in photos if photo_is_done(parser, job, args)}
            done |= {job.name for job in videos if video_is_done(job, args)}
    done = world.broadcast(done)
    world.print0(f"{parser.path}: {len(parser.classes)} classes of {parser.labels.name}"
              + (", with TTA" if args.tta else "")
              + (f"; {len(done)} left out, they have their results" if done else ""))
    try:
        work(parser, photos, videos, cameras, done, args, world, report)
    except KeyboardInterrupt:
        if world.size == 1:
            tell(args, report, start)
        raise
    parts = world.gather((report.parsed, report.failed), patient=True)
    report.parsed, report.failed = [list(itertools.chain.from_iterable(part)) for part in zip(*parts)]
    if world.main:
        tell(args, report, start)
    world.gather(None)                                     # torchrun ends all when one leaves: not before that is told


def work(parser: Parser, photos: list[Job], videos: list[Job], cameras: list[int], done: set[str],
         args: argparse.Namespace, world: World, report: Report):
    """This process's share: whole batches, so that they are the same for any number of processes, and whole videos."""
    batches = [photos[a:a + args.batch] for a in range(0, len(photos), args.batch)]
    batches = [batch for batch in batches if any(job.name not in done for job in batch)][world.rank::world.size]
    videos = [job for job in videos if job.name not in done][world.rank::world.size]
    count = sum(job.name not in done for batch in batches for job in batch) * world.size
    with tqdm(total=count, unit="photo", disable=not (world.main and count)) as bar:
        videos += parse_photos(parser, batches, done, args, report, lambda more: bar.update(more * world.size))
    sources = [(job, job.path) for job in videos]
    if world.main:
        sources += [(Job(f"webcam {n}", f"webcam_{n}"), n) for n in cameras]
    for job, source in sources:
        with report.work_on(job):
            target = _with_folder(_path(args.out, "overlays", job.name, ".mp4"))
            labels = _frames(job, args) if args.frames else None
            video.parse_video(parser, source, target, labels, args.batch, progress=world.main)
            report.parsed.append(job.name)


def tell(args: argparse.Namespace, report: Report, start: float):
    seconds = time.monotonic() - start
    print(f"{len(report.parsed)} parsed in {seconds:.1f} s" + (f", in {args.out}" if report.parsed else ""), flush=True)
    if report.failed:
        print(f"{len(report.failed)} not parsed:\n  " + "\n  ".join(report.failed), file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    args, report = arguments(argv), Report()
    run_together(lambda world: run(args, world, report), args.device, LESS_MEMORY)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
