"""Data sets (§4.1): label sets, splits, the training loader, the check of a data set on disk.

    python datasets.py --cfg configs/cihp.yaml             # counts, sizes, every fault by file, sheets to look at

    pairs = open_split(cfg, "train")                       # len(pairs), pairs.read(i), pairs.name(i)
    for image, label, names in train_loader(cfg, pairs):   # uint8 (b, 3, h, w), uint8 (b, h, w), without end

Photos are RGB uint8 (H, W, 3), labels uint8 (H, W): the class number, or 255 for pixels that do not count. Where the
files lie and how they are read: files/; what is done to a training sample: augment.py.
"""

import argparse
import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from augment import augment
from config import IGNORE, Config, load_config, user_path
from engine.errors import UserError, run_program
from engine.workers import start_worker, watched
from files.images import doubt, read_label, read_photo_of
from files.layouts import Place, find_split, match_files
from synthetic.draw import draw

# ----------------------------------------------------------------------------------------------------------------------
# label sets

@dataclass(frozen=True)
class LabelSet:
    name: str
    classes: tuple[str, ...]                               # label 0 first
    palette: tuple[tuple[int, int, int], ...]              # RGB
    flip_pairs: tuple[tuple[int, int], ...]                # labels that change places in a mirror

    def __post_init__(self):
        def need(ok: bool, message: str):
            if not ok:
                raise UserError(f"data set {self.name}: {message}")

        count, swapped = len(self.classes), [label for pair in self.flip_pairs for label in pair]
        need(count > 0, "classes must be a list of names, label 0 first")
        need(count <= IGNORE, f"classes: at most {IGNORE}, label {IGNORE} means ignore")
        need(len(set(self.classes)) == count, "classes: a name stands there twice")
        need(len(self.palette) == count, f"palette has {len(self.palette)} colours for {count} classes")
        need(len(set(self.palette)) == count, "palette: a colour stands there twice")
        need(all(0 <= v <= 255 for colour in self.palette for v in colour), "palette: colours are 0 to 255")
        need(len(set(swapped)) == len(swapped), "flip_pairs: a label stands there twice")
        need(all(0 <= label < count for label in swapped), "flip_pairs: a label outside the class list")


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

    def __init__(self, place: Place, pairs: list[tuple[str, Path, Path]], num_classes: int):
        self.place, self.pairs, self.num_classes = place, pairs, num_classes

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        return self.pairs[i][0]

    def paths(self, i: int) -> tuple[Path, Path]:
        """Of the photo and of its label."""
        return self.pairs[i][1:]

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        photo, label = self.paths(i)
        numbers = read_label(label, self.num_classes)
        return read_photo_of(numbers, photo, label), numbers


class DrawnSet:
    """The synthetic data set: figures drawn when first asked for. All runs are scored on the same ones.

    Drawing costs more than reading a small JPEG, so what was drawn is kept in memory, up to KEPT_BYTES per process.
    """

    KEPT_BYTES = 512 << 20
    place = None                                           # it lies in no folder

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
    place = find_split(cfg, split)
    pairs, faults = match_files(place)
    if faults:
        more = f" (and {len(faults) - 1} more: python datasets.py lists them all)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
    return PairSet(place, pairs, len(label_set(cfg).classes))


def fingerprint(pairs: PairSet | DrawnSet) -> str:
    """Of the names of a split, in their order: where it is the same, the same numbers mean the same samples."""
    digest = hashlib.sha256()
    for i in range(len(pairs)):
        digest.update(os.fsencode(pairs.name(i)) + b"\n")
    return f"{len(pairs)} {digest.hexdigest()}"


def doubtful_labels(pairs: PairSet | DrawnSet, classes: Sequence[str], looked_at: int = 100) -> str:
    """What is strange about the labels of a split, judged by some of them; "" if nothing is."""
    if pairs.place is None:                                # drawn
        return ""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, looked_at).round().astype(int))
    counts = sum(np.bincount(read_label(pairs.paths(i)[1], len(classes)).ravel(), minlength=256) for i in chosen)
    strange = doubt(counts, classes)
    return strange and f"{pairs.place.labels}: in {len(chosen)} labels looked at, {strange}; python datasets.py says more"


# ----------------------------------------------------------------------------------------------------------------------
# training: samples without end, the same for any number of processes and workers

class BatchOrder:
    """Which sample stands where: endless micro-batches, lists of (index, iteration, slot), fixed by the seed.

    Batch `iteration` takes positions iteration * batch_size + slot of an endless row of shuffled epochs. However many
    processes and accumulation steps share it, it is the same batch in the same order; here 8 images on 2 x 2:

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
        except UserError as error:                         # handed over as a value: raised in a worker, it would reach
            return error                                   # the user inside that worker's traceback
        return images, labels, [self.pairs.name(index) for index, _, _ in keys]


def train_loader(cfg: Config, pairs: PairSet | DrawnSet, rank: int = 0, world: int = 1, start_iter: int = 0):
    """Endless micro-batches (image uint8 (b, 3, h, w), label uint8 (b, h, w), names) of this process."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")    # how many workers is the user's choice
    loader = DataLoader(
        TrainSet(pairs, cfg), batch_size=None, sampler=BatchOrder(len(pairs), cfg, rank, world, start_iter),
        num_workers=cfg.workers, pin_memory=torch.cuda.is_available(), worker_init_fn=start_worker,
        generator=torch.Generator())                       # its own: the run's random state must not depend on loaders
    return watched(loader)


# ----------------------------------------------------------------------------------------------------------------------
# the check of a data set

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a data set before training on it.")
    parser.add_argument("--cfg", help="a file of configs/; without it, the drawn data set")
    parser.add_argument("--out", type=user_path, help="folder of the contact sheets (<folder of the run>_data)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config")
    args = parser.parse_intermixed_args(argv)
    cfg = load_config(args.cfg, args.overrides)
    return check(cfg, args.out or Path(f"{Path(cfg.out or f'runs/{cfg.dataset}')}_data"))


def check(cfg: Config, out: Path) -> int:
    """Look at every file of both splits, report, leave contact sheets in `out`; 1 if there is any fault."""
    from files.check import report  # and with it all that draws: training needs none of it

    splits = [look_for(cfg, name) for name in ("train", "val")]
    return report(cfg, label_set(cfg), splits, lambda source, i, slot: TrainSet(source, cfg).sample(i, 0, slot), out)


def look_for(cfg: Config, name: str) -> tuple[str, PairSet | DrawnSet | None, list[str]]:
    """The name of a split, the split with all pairs that are there (None: it is not found), and the faults so far."""
    if cfg.dataset == "synthetic":
        return name, DrawnSet(cfg, name), []
    try:
        place = find_split(cfg, name)
        pairs, faults = match_files(place)
    except UserError as error:
        return name, None, [str(error)]
    return name, PairSet(place, pairs, len(label_set(cfg).classes)), faults


if __name__ == "__main__":
    run_program(main, less_memory="workers=1")
