"""Parse your own photos with a trained SCHNet.

    python predict.py photo.jpg                          # the newest run
    python predict.py photos/ "more/*.jpg" --run runs/lip --tta --out parsed
    torchrun --nproc_per_node 8 predict.py photos/ --out parsed --skip-existing
                                                         # split across processes, one GPU each; skips finished files

Writes labels/NAME.png (pixel values are classes), overlays/NAME.jpg and with --probs probs/NAME.npy below --out:
see files/results.py. With --map configs/maps/atr.yaml (or tryon, viton_hd, coarse, or your own) all of them use another
label set. Config overrides may be mixed with the inputs: precision=bf16, sam_weights=PATH of a moved file.

Or from Python, for photos of any size; see `Parser`:

    parser = Parser("runs/lip")
    label = parser.parse("photo.jpg")                    # (H, W) uint8
    print([parser.classes[k] for k in np.unique(label)])
"""

import argparse
import glob
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import inference
from config import IGNORE, user_path
from engine.parsing import LESS_MEMORY, Job, Report, printable
from engine.processes import World, run_together
from errors import UserError
from files.atomic import results_folder
from files.images import ALL_FORMATS, read_photo
from files.inputs import Input, list_inputs
from files.labels import load_class_map
from files.results import Results
from viz import pictures

BATCH = 4                                                  # photos parsed at a time

Photo = str | Path | Image.Image | np.ndarray | bytes | BinaryIO         # a path, an image, RGB (H, W, 3) uint8, a file


class Parser:
    """A trained network and everything needed to run it on photos.

        parser = Parser("runs/lip")
        photo = parser.read("photo.jpg")                               # (H, W, 3) uint8, turned by its EXIF orientation
        label = parser.parse(photo)                                      # (H, W) uint8
        chosen = [parser.classes.index(name) for name in ("Upper-clothes", "Coat", "Dress")]
        photo[np.isin(label, chosen)] = 255

    `run`: a folder or checkpoint, None for the newest run. `tta`: average over scales and flips. `size`: the long side
    of a photo as the network sees it. `class_map`: a file that merges the network's classes (files/labels.py);
    `labels`, `classes` and `palette` are those of the results. `overrides` of the run's config: ["precision=bf16"]. A
    `UserError` reports what is wrong with a run or a photo.

    A photo is a path, the bytes of a file, an open file, a PIL image or an RGB array; label maps have its pixels as
    `read` returns them: as a viewer shows them, turned by the EXIF orientation that a file or a PIL image has.

    Threads may share a Parser: a lock lets one at a time through the network, photos are read outside it.
    """

    def __init__(self, run: str | Path | None = None, tta: bool = False, size: int | None = None,
                 device: str | torch.device = "", class_map: str | Path | None = None, overrides: Sequence[str] = ()):
        overrides = [*([overrides] if isinstance(overrides, str) else overrides)]
        overrides += [] if size is None else [f"base_size={size}"]
        self.model, self.labels, self.path = inference.load_run(run, overrides, device)
        self.tta, self.merge, self.batch = tta, None, BATCH
        self.views = inference.tta_views(self.model.cfg, self.labels.flip_pairs, tta)
        status = self.path.stat()
        settings = [self.path.resolve(), status.st_size, status.st_mtime_ns, f"tta={tta}", *sorted(overrides)]
        if class_map is not None:
            self.labels, self.merge = load_class_map(class_map, self.labels)
            settings += ["map:", *self.labels.classes, *self.labels.palette, *self.merge]
        self.settings = " ".join(map(str, settings))
        self.classes, self.palette = self.labels.classes, self.labels.palette
        self.lock = threading.Lock()

    @staticmethod
    def read(photo: Photo) -> np.ndarray:
        """The pixels of a photo, RGB (H, W, 3) uint8, that label maps belong to."""
        if isinstance(photo, Image.Image):
            return read_photo(photo)
        if isinstance(photo, str | Path):
            return read_photo(user_path(photo), ALL_FORMATS)
        photo = photo.read() if hasattr(photo, "read") else photo
        if isinstance(photo, bytes | bytearray | memoryview):
            return read_photo(bytes(photo), ALL_FORMATS)
        if not isinstance(photo, np.ndarray):
            raise UserError(f"a photo must be a path, a file, a PIL image or an RGB array, not {type(photo).__name__}")
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
            raise UserError(f"a photo must be RGB, (H, W, 3) uint8, not {photo.shape} {photo.dtype}")
        return np.ascontiguousarray(photo)

    @overload
    def parse(self, photo: Photo) -> np.ndarray: ...
    @overload
    def parse(self, photo: list[Photo] | tuple[Photo, ...]) -> list[np.ndarray]: ...

    def parse(self, photo):
        """The label map (H, W) uint8 of a photo; of a list of photos, whose sizes may differ, a list of them."""
        if not isinstance(photo, list | tuple):
            return self._parse([self.read(photo)])[0]
        labels = []
        for start in range(0, len(photo), self.batch):
            labels += self._parse([self.read(one) for one in photo[start:start + self.batch]])
        return labels

    @overload
    def probabilities(self, photo: Photo) -> np.ndarray: ...
    @overload
    def probabilities(self, photo: list[Photo] | tuple[Photo, ...]) -> list[np.ndarray]: ...

    def probabilities(self, photo):
        """Class probabilities (K, H, W) float32 of a photo, or of each photo of a list."""
        if isinstance(photo, list | tuple):
            return [self.probabilities(one) for one in photo]
        image = self.read(photo)
        with self.lock:
            return inference.predict(self.model, image, *self.views, self.merge).cpu().numpy()

    def overlay(self, photo: Photo, label: np.ndarray, shown: Iterable[int] | None = None) -> np.ndarray:
        """The photo under its label map, with a legend of the classes that occur (or of those `shown`)."""
        image, label = self.read(photo), np.asarray(label)
        if image.shape[:2] != label.shape:
            raise UserError(f"the label map has {label.shape} pixels, its photo {image.shape[:2]}")
        given, label = label, label.astype(np.uint8)
        present = np.unique(label).tolist()
        if (given != label).any() or not {*present} <= {*range(len(self.classes)), IGNORE}:
            raise UserError(f"the label map has other values than 0 to {len(self.classes) - 1} and {IGNORE}")
        shown = present if shown is None else shown
        return pictures.with_legend(pictures.overlay(image, label, self.palette), self.classes, self.palette, shown)

    def _parse(self, images: list[np.ndarray]) -> list[np.ndarray]:
        with self.lock:
            return inference.predict_labels(self.model, images, *self.views, self.merge)


# ----------------------------------------------------------------------------------------------------------------------
# the program

def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=os.path.expanduser, metavar="INPUT",
                        help="photo, folder or pattern; key=value: overrides of the run's config")
    inference.add_run_options(parser, BATCH)
    parser.add_argument("--out", type=user_path, default=Path("predictions"),
                        help="folder of the results, new or of an earlier call (predictions)")
    parser.add_argument("--map", type=user_path, metavar="FILE",
                        help="merge the classes into another label set: a file of configs/maps, or your own")
    parser.add_argument("--skip-existing", action="store_true",
                        help="skip files whose results were made from the same file, run and options")
    parser.add_argument("--size", type=int, help="long side of a photo as the network sees it; the run's if not given")
    parser.add_argument("--probs", action="store_true", help="also the probabilities, as .npy")
    args = parser.parse_intermixed_args(argv)
    args.overrides = [text for text in args.inputs
                      if re.match("[a-z_]+=", text) and not glob.glob(text) and not os.path.lexists(text)]
    args.inputs = [text for text in args.inputs if text not in args.overrides]
    if not args.inputs:
        parser.error(f"no INPUT: {', '.join(args.overrides)} names no file")
    return args


def run(args: argparse.Namespace, world: World, report: Report):
    start = time.monotonic()
    with world.all_or_none():
        inputs = list_inputs(args.inputs) if world.main else None
        if world.main:
            ignored = ", ".join(f"{count} {what}" for what, count in inputs.ignored.most_common())
            if not inputs.photos:
                raise UserError("; ".join(inputs.missing) or f"no photo in {', '.join(args.inputs)}" + (
                    f" (ignored: {ignored})" if ignored else ""))
            results_folder(args.out)
    inputs = world.broadcast(inputs)
    with world.all_or_none():
        parser = Parser(args.run, args.tta, args.size, world.device, args.map, args.overrides)
        kinds = ["labels", "overlays", *["probs"] * args.probs]
        results = Results(args.out, parser.classes, parser.settings, kinds)
        done = set()
        if args.skip_existing and world.main:
            done |= {found for found in inputs.photos if results.is_done(found.path, found.name)}
    done = world.broadcast(done)
    if world.main:
        report.failed += inputs.missing
        if ignored:
            world.print0(f"ignored: {printable(ignored)}")
    world.print0(f"{parser.path}: {len(parser.classes)} classes of {parser.labels.name}"
                 + (", with TTA" if args.tta else "") + (f"; {len(done)} already done" if done else ""))
    parser.batch = args.batch
    try:
        work(Job(parser, results, report), inputs.photos, done, world)
    finally:                                               # of Ctrl-C too
        if world.size == 1:
            report.print(time.monotonic() - start, args.out)
    if world.size > 1:
        parts = world.gather((report.parsed, report.failed))
        report.parsed, report.failed = [list(itertools.chain.from_iterable(part)) for part in zip(*parts)]
        if world.main:
            report.print(time.monotonic() - start, args.out)
        world.gather(None)                                 # torchrun ends all when one exits: wait for the report


def work(job: Job, photos: list[Input], done: set[Input], world: World):
    """This process's shard: complete batches, so that they are the same for any number of processes."""
    batch = job.parser.batch
    batches = [photos[start:start + batch] for start in range(0, len(photos), batch)]
    batches = [batch for batch in batches if not done.issuperset(batch)][world.rank::world.size]
    count = sum(found not in done for batch in batches for found in batch) * world.size
    with tqdm(total=count, unit="photo", disable=not (world.main and count)) as bar:
        job.run(batches, done, lambda: bar.update(world.size))


def main(argv: list[str] | None = None) -> int:
    args, report = arguments(argv), Report()
    run_together(lambda world: run(args, world, report), args.device, LESS_MEMORY, timeout=timedelta(days=30))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
