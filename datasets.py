"""Data sets (§4.1): splits, the training loader, the check of a data set on disk.

    python datasets.py --cfg configs/cihp.yaml             # counts, sizes, every fault by file, sheets to look at

    pairs = open_split(cfg, "train")                       # len(pairs), pairs.read(i), pairs.name(i)
    for image, label, names in train_loader(cfg, pairs):   # uint8 (b, 3, h, w), uint8 (b, h, w), endless

Photos are RGB uint8 (H, W, 3), labels uint8 (H, W): the class number, or 255 for pixels that do not count. Label sets,
file layouts and readers: files/; augmentation: augment.py.
"""

import argparse
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from augment import augment
from config import Config, load_config, user_path
from engine.workers import read_ahead
from errors import UserError, run_program
from files.images import read_label, read_photo_of
from files.labels import LABEL_SETS, LabelSet, LabelStats, label_fault, label_set, label_warning
from files.layouts import Place, find_split, match_files
from synthetic.draw import draw

__all__ = ["LABEL_SETS", "LabelSet", "label_set"]          # from files/labels.py

# ----------------------------------------------------------------------------------------------------------------------
# splits

class Samples:
    """The base of PairSet and DrawnSet."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Number and hash of the names and file sizes in order: where it is equal, index i is the same sample."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            sizes = [os.path.getsize(path) for path in self.paths(i)] if self.place else []
            digest.update(os.fsencode(self.name(i)) + f" {sizes}\n".encode())
        return f"{len(self)} {digest.hexdigest()}"


class PairSet(Samples):
    """The labelled photos of one split."""

    def __init__(self, place: Place, pairs: list[tuple[str, Path, Path]], num_classes: int):
        self.place, self.pairs, self.num_classes = place, pairs, num_classes

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        return self.pairs[i][0]

    def paths(self, i: int) -> tuple[Path, Path]:
        """Paths of the photo and of its label."""
        return self.pairs[i][1:]

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        photo_path, label_path = self.paths(i)
        label = read_label(label_path, self.num_classes)
        return read_photo_of(label, photo_path, label_path), label


class DrawnSet(Samples):
    """The synthetic data set: people drawn on first use. All runs are scored on the same ones.

    Drawing costs more than reading a small JPEG, so drawings are kept in memory, up to KEPT_BYTES per process.
    """

    KEPT_BYTES = 512 << 20
    place = None                                           # not on disk

    def __init__(self, cfg: Config, split: str):
        self.drawn = {}
        self.count = cfg.synthetic_train if split == "train" else cfg.synthetic_val
        self.seed = cfg.seed if split == "train" else 2**31 - 1
        self.size = cfg.synthetic_size

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{i:06d}"

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if i in self.drawn:
            return self.drawn[i]
        pair = draw(self.seed, i, self.size)
        if (len(self.drawn) + 1) * 4 * math.prod(self.size) <= self.KEPT_BYTES:
            self.drawn[i] = pair
        return pair


def open_split(cfg: Config, split: str) -> PairSet | DrawnSet:
    """The "train" or "val" split of a configuration's data set."""
    if cfg.dataset == "synthetic":
        return DrawnSet(cfg, split)
    _, pairs, faults = find_pairs(cfg, split)
    if faults:
        more = f" (and {len(faults) - 1} more: python datasets.py --cfg ... lists them all)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
    return pairs


def sample_warning(pairs: PairSet | DrawnSet, classes: Sequence[str], count: int = 100) -> str:
    """A warning if the labels of a split look wrong, judged from `count` of them; "" if they do not."""
    if pairs.place is None:                                # drawn
        return ""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, count).round().astype(int))
    first, *others = (LabelStats.of(read_label(pairs.paths(i)[1], len(classes))) for i in chosen)
    stats = sum(others, first)
    warning = label_fault(stats, classes) or label_warning(stats, classes)
    return warning and f"{pairs.place.labels}, {len(chosen)} labels: {warning} (details: python datasets.py --cfg ...)"


# ----------------------------------------------------------------------------------------------------------------------
# training: endless samples, the same for any number of processes and workers

class BatchOrder:
    """Which sample comes when: endless micro-batches, lists of (index, iteration, slot), fixed by the seed.

    Batch `iteration` takes positions iteration * batch_size + slot of an endless sequence of shuffled epochs. However
    many processes and accumulation steps share it, it is the same batch in the same order; here 8 images on 2 x 2:

        slot         0   1   2   3   4   5   6   7
        rank         0   0   0   0   1   1   1   1
        micro-batch  0   0   1   1   0   0   1   1
    """

    def __init__(self, count: int, cfg: Config, rank: int = 0, world: int = 1, start_iter: int = 0):
        self.count, self.seed, self.batch_size, self.start_iter = count, cfg.seed, cfg.batch_size, start_iter
        self.micro = cfg.batch_size // (world * cfg.accum_steps)         # train.check_batch refuses a remainder
        self.steps = range(rank * cfg.accum_steps, (rank + 1) * cfg.accum_steps)
        self.epoch, self.order = -1, np.empty(0, int)

    def __iter__(self):
        for iteration in itertools.count(self.start_iter):
            for step in self.steps:
                slots = range(step * self.micro, (step + 1) * self.micro)
                yield [(self.index(iteration * self.batch_size + slot), iteration, slot) for slot in slots]

    def index(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, random_numbers("order", self.seed, epoch).permutation(self.count)
        return int(self.order[place])


def random_numbers(purpose: str, *key: int) -> np.random.Generator:
    """A generator that depends on the key alone. The purpose keeps (seed, epoch) and (seed, iteration, 0) apart."""
    return np.random.default_rng((int.from_bytes(purpose.encode(), "big"), *key))


class TrainSet:
    """Augmented samples."""

    def __init__(self, pairs: PairSet | DrawnSet, cfg: Config):
        self.pairs, self.cfg, self.flip_pairs = pairs, cfg, label_set(cfg).flip_pairs

    def sample(self, index: int, iteration: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
        rng = random_numbers("augment", self.cfg.seed, iteration, slot)
        return augment(*self.pairs.read(index), self.cfg, self.flip_pairs, rng)

    def names(self, keys: list[tuple[int, int, int]]) -> list[str]:
        return [self.pairs.name(index) for index, _, _ in keys]

    def batch(self, keys: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, list[str]]:
        """The samples of (index, iteration, slot): image uint8 (b, 3, h, w), label uint8 (b, h, w), names."""
        pinned = torch.cuda.is_available()                 # copied to a GPU without waiting
        image = torch.empty(len(keys), 3, *self.cfg.crop_size, dtype=torch.uint8, pin_memory=pinned)
        label = torch.empty(len(keys), *self.cfg.crop_size, dtype=torch.uint8, pin_memory=pinned)
        for planes, numbers, key in zip(image.numpy(), label.numpy(), keys):
            rgb, numbers[:] = self.sample(*key)
            cv2.split(rgb, list(planes))                   # written into `image`, in half the time of a transpose
        return image, label, self.names(keys)


def train_loader(cfg: Config, pairs: PairSet | DrawnSet, rank: int = 0, world: int = 1,
                 start_iter: int = 0) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Endless micro-batches of this process, see `TrainSet.batch`.

    Threads are enough: one makes 570 samples a second, an H200 takes 31 (benchmarks/README.md).
    """
    cv2.setNumThreads(0)                                   # the threads are the parallelism
    samples, order = TrainSet(pairs, cfg), BatchOrder(len(pairs), cfg, rank, world, start_iter)
    for _, batch in read_ahead(samples.batch, order, cfg.workers, lambda keys: ", ".join(samples.names(keys))):
        yield batch


# ----------------------------------------------------------------------------------------------------------------------
# the check of a data set

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a data set before training on it.")
    parser.add_argument("--cfg", required=True, help="a file of configs/")
    parser.add_argument("--out", type=user_path, help="folder of the contact sheets (<folder of the run>_data)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config")
    args = parser.parse_intermixed_args(argv)
    cfg = load_config(args.cfg, args.overrides)
    if cfg.dataset == "synthetic":
        parser.error("drawn people have no files to check")
    return check_data(cfg, args.out or Path(f"{Path(cfg.out or f'runs/{cfg.dataset}')}_data"))


def check_data(cfg: Config, out: Path) -> int:
    """Reads every file of both splits, prints a report, writes contact sheets into `out`; 1 if there is any fault."""
    from viz.data_check import report  # imports the drawing code, which training does not need

    splits = [find_pairs(cfg, name) for name in ("train", "val")]
    return report(cfg, label_set(cfg), splits, lambda source, i, slot: TrainSet(source, cfg).sample(i, 0, slot), out)


def find_pairs(cfg: Config, name: str) -> tuple[str, PairSet | None, list[str]]:
    """The name of a split, the split with all pairs that were found (None: no folder was), and the faults so far."""
    try:
        place = find_split(cfg, name)
        pairs, faults = match_files(place)
    except UserError as error:
        return name, None, [str(error)]
    return name, PairSet(place, pairs, len(label_set(cfg).classes)), faults


if __name__ == "__main__":
    run_program(main, less_memory="workers=1")
