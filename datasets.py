"""Data sets (§4.1): label sets, folder layouts, reading, the training loader.

    python datasets.py --cfg configs/cihp.yaml             # checks a data set on disk, see check_data.py

    pairs = open_split(cfg, "train")                       # len(pairs), pairs.read(i), pairs.name(i)
    for image, label, names in train_loader(cfg, pairs):   # uint8 (b, 3, h, w), uint8 (b, h, w), without end

A fault in the data raises `DataError` with one line that names the file and what to do. Photos are RGB uint8 (H, W, 3),
labels uint8 (H, W): the class number, or 255 for pixels that do not count. Folders and files: files.py; what is
done to a training sample: augment.py.
"""

import atexit
import itertools
import math
import multiprocessing
import signal
import sys
import warnings
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import synthetic
from augment import augment, flip_label
from config import Config, ConfigError
from files import IGNORE, DataError, Place, find_split, match_files, read_label, read_photo, read_photo_of

__all__ = ["BatchOrder", "DataError", "DrawnSet", "LABEL_SETS", "LabelSet", "PairSet", "TrainSet", "distinct_colours",
           "end_workers", "flip_label", "label_set", "open_split", "read_photo", "train_loader"]


# ----------------------------------------------------------------------------------------------------------------------
# label sets

@dataclass(frozen=True)
class LabelSet:
    name: str
    classes: tuple[str, ...]                               # label 0 first
    palette: tuple[tuple[int, int, int], ...]              # RGB
    flip_pairs: tuple[tuple[int, int], ...]                # labels that change places in a mirror

    def __post_init__(self):
        swapped = [label for pair in self.flip_pairs for label in pair]
        if not 1 <= len(self.classes) <= IGNORE or len(set(self.classes)) != len(self.classes):
            raise DataError(f"label set {self.name}: needs 1 to {IGNORE} classes of different names")
        if len(self.palette) != len(self.classes) or len(set(self.palette)) != len(self.palette):
            raise DataError(f"label set {self.name}: needs one colour per class, each another")
        if any(len(colour) != 3 or not all(0 <= v <= 255 for v in colour) for colour in self.palette):
            raise DataError(f"label set {self.name}: a colour is three numbers from 0 to 255")
        if len(set(swapped)) != len(swapped) or not all(0 <= label < len(self.classes) for label in swapped):
            raise DataError(f"label set {self.name}: flip_pairs name a label twice or one that is no class")


_LIP_CLASSES = ("Background", "Hat", "Hair", "Glove", "Sunglasses", "Upper-clothes", "Dress", "Coat", "Socks", "Pants",
                "Jumpsuits", "Scarf", "Skirt", "Face", "Left-arm", "Right-arm", "Left-leg", "Right-leg", "Left-shoe",
                "Right-shoe")
_CIHP_CLASSES = _LIP_CLASSES[:10] + ("Torso-skin",) + _LIP_CLASSES[11:]    # the one difference, often got wrong
_LIP_PALETTE = ((0, 0, 0), (128, 0, 0), (255, 0, 0), (0, 85, 0), (170, 0, 51), (255, 85, 0), (0, 0, 85), (0, 119, 221),
                (85, 85, 0), (0, 85, 85), (85, 51, 0), (52, 86, 128), (0, 128, 0), (0, 0, 255), (51, 170, 221),
                (0, 255, 255), (85, 255, 170), (170, 255, 85), (255, 255, 0), (255, 170, 0))    # of the sets' authors
_LEFT_RIGHT = ((14, 15), (16, 17), (18, 19))

LABEL_SETS = {
    "lip": LabelSet("lip", _LIP_CLASSES, _LIP_PALETTE, _LEFT_RIGHT),
    "cihp": LabelSet("cihp", _CIHP_CLASSES, _LIP_PALETTE, _LEFT_RIGHT),
    "ppp": LabelSet("ppp", ("Background", "Head", "Torso", "Upper-arms", "Lower-arms", "Upper-legs", "Lower-legs"),
                    ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)),
                    ()),                                   # the palette its PNGs carry; both sides share a label
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


# ----------------------------------------------------------------------------------------------------------------------
# splits

class PairSet:
    """The labelled photos of one split."""

    def __init__(self, place: Place, pairs: list[tuple[str, str, str]], num_classes: int):
        self.place, self.pairs, self.num_classes = place, pairs, num_classes

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        return self.pairs[i][0]

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        _, photo, label = self.pairs[i]
        photo, label = self.place.images / photo, self.place.labels / label
        numbers = read_label(label, self.num_classes)
        return read_photo_of(numbers, photo, label), numbers


class DrawnSet:
    """The synthetic data set: figures drawn when first asked for. All runs are scored on the same ones.

    Drawing costs more than reading a small JPEG, so what was drawn is kept in memory, up to KEPT_BYTES per process.
    """

    KEPT_BYTES = 512 << 20

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
        pair = synthetic.draw(self.seed, i, self.size)
        if (len(self.drawn) + 1) * 4 * math.prod(self.size) <= self.KEPT_BYTES:
            self.drawn[i] = pair
        return pair


def open_split(cfg: Config, split: str) -> PairSet | DrawnSet:
    """The "train" or "val" split of a configuration's data set."""
    if cfg.dataset == "synthetic":
        return DrawnSet(cfg, split)
    place = find_split(cfg, split)
    pairs, faults = match_files(place)
    if faults:
        more = f" (and {len(faults) - 1} more: python datasets.py lists them all)" if len(faults) > 1 else ""
        raise DataError(faults[0] + more)
    return PairSet(place, pairs, len(label_set(cfg).classes))


# ----------------------------------------------------------------------------------------------------------------------
# training: samples without end, the same for any number of processes and workers

class BatchOrder:
    """Which sample stands where: endless micro-batches, lists of (index, iteration, slot), fixed by the seed.

    Batch `iteration` takes positions iteration * batch_size + slot of an endless row of shuffled epochs. A rank takes a
    run of its slots, each accumulation step a part of that: together always the same batch in the same order.
    """

    def __init__(self, count: int, cfg: Config, rank: int = 0, world: int = 1, start_iter: int = 0):
        parts = world * cfg.accum_steps
        if cfg.batch_size % parts:
            raise ConfigError(f"batch_size ({cfg.batch_size}) must be a multiple of processes x accum_steps "
                              f"({world} x {cfg.accum_steps})")
        self.count, self.seed, self.batch_size, self.start_iter = count, cfg.seed, cfg.batch_size, start_iter
        self.micro = cfg.batch_size // parts
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


class TrainSet(Dataset):
    """Augmented micro-batches: a list of (index, iteration, slot) gives uint8 (b, 3, h, w), uint8 (b, h, w), names."""

    def __init__(self, pairs: PairSet | DrawnSet, cfg: Config):
        self.pairs, self.cfg, self.flip_pairs = pairs, cfg, label_set(cfg).flip_pairs

    def sample(self, index: int, iteration: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
        rng = random_numbers("augment", self.cfg.seed, iteration, slot)
        return augment(*self.pairs.read(index), self.cfg, self.flip_pairs, rng)

    def __getitem__(self, keys: list[tuple[int, int, int]]):
        images = torch.empty(len(keys), 3, *self.cfg.crop_size, dtype=torch.uint8)
        labels = torch.empty(len(keys), *self.cfg.crop_size, dtype=torch.uint8)
        try:
            for image, label, key in zip(images, labels, keys):
                rgb, numbers = self.sample(*key)
                cv2.split(rgb, list(image.numpy()))        # written into `image`, in half the time of a transpose
                label.copy_(torch.from_numpy(numbers))
        except DataError as error:                         # handed over as a value: raised in a worker, it would reach
            return error                                   # the user inside that worker's traceback
        return images, labels, [self.pairs.name(index) for index, _, _ in keys]


def train_loader(cfg: Config, pairs: PairSet | DrawnSet, rank: int = 0, world: int = 1, start_iter: int = 0):
    """Endless micro-batches (image uint8 (b, 3, h, w), label uint8 (b, h, w), names) of this process."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")    # how many workers is the user's choice
    loader = DataLoader(
        TrainSet(pairs, cfg), batch_size=None, sampler=BatchOrder(len(pairs), cfg, rank, world, start_iter),
        num_workers=cfg.workers, pin_memory=torch.cuda.is_available(), worker_init_fn=_start_worker,
        generator=torch.Generator())                       # its own: the run's random state must not depend on loaders
    return _raise_faults(loader)


def _raise_faults(loader: DataLoader):
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if loader.num_workers:                                 # torch's handler raises in whatever the main process is at
        signal.signal(signal.SIGCHLD, handler)             # when a worker dies; without it, waiting for a batch does
    while True:
        try:
            batch = next(batches)
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            other = isinstance(error, RuntimeError) and "DataLoader worker (" not in str(error)
            if loader.num_workers == 0 or other or str(error).startswith("Caught"):         # a bug keeps its traceback
                raise
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise DataError("a loader process was ended by the system, usually for want of memory (or of shared "
                            f"memory, /dev/shm): try fewer workers ({reason})") from None
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _start_worker(_):
    cv2.setNumThreads(0)                                   # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # both are sent to all processes: the main one decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)          # what is still done, and ends its workers


@atexit.register
def end_workers():
    """End the loader processes that are left; Python's own way is SIGTERM, and it would wait for that to work."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


if __name__ == "__main__":
    import check_data                                      # imports this file in turn, so only when it is the program
    sys.exit(check_data.main(sys.argv[1:]))
