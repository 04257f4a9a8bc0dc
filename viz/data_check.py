"""The check of a data set, before hours are spent on it: `python datasets.py --cfg configs/cihp.yaml`.

Reads every photo and label of both splits, in parallel. Says how many pairs there are (and what the paper has), their
sizes and how often each class occurs, and names every fault by its file; notes are worth knowing but stop nothing.
Leaves contact sheets for a person to judge: photos beside their labels, and samples as training sees them.
"""

import hashlib
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import IGNORE, Config
from errors import UserError
from files.images import PHOTO_SUFFIXES, orientation, read_label, read_photo, read_photo_of
from files.labels import LabelSet, label_warning
from viz import pictures

PAPER_COUNTS = {"lip": {"train": 30_462, "val": 10_000},          # §4.1: pairs of each split
         "cihp": {"train": 28_280, "val": 5_000},
         "ppp": {"train": 1_716, "val": 1_817}}
DRAWN = 200                                                # figures of the synthetic set: the same code draws them all
SHOWN = 12                                                 # samples on a contact sheet

Note = tuple[str, str]                                     # what there is to know, and the file


@dataclass
class Pair:
    """What was found out about one labelled photo."""
    photo: str
    faults: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)                         # width, height
    counts: np.ndarray | None = None                       # pixels with each value 0..255
    content: bytes = b""                                   # digest of the photo's pixels


@dataclass
class Split:
    name: str
    source: object                                         # PairSet or DrawnSet of datasets.py; None: not found
    faults: list[str]
    pairs: list[Pair] = field(default_factory=list)        # as in the source

    def good(self) -> list[int]:
        return [i for i, pair in enumerate(self.pairs) if not pair.faults]


def report(cfg: Config, labels: LabelSet, found: list[tuple], augmented: Callable, out: Path) -> int:
    """Prints the report, writes the contact sheets into `out`; the exit code is 1 if there is any fault.

    `found`: name, pairs and faults of each split; `augmented(pairs, i, slot)`: pair i as training sees it.
    """
    splits = [Split(*parts) for parts in found]
    inspect(splits, cfg.workers)
    faults = [fault for split in splits for fault in split.faults + [f for pair in split.pairs for f in pair.faults]]
    notes = [note for split in splits for pair in split.pairs for note in pair.notes]
    notes += side_notes(labels) + absent_notes(splits, labels) + passed_over(splits)
    faults += [fault for split in splits for fault in count_faults(cfg, split)] + class_faults(splits, labels)
    shared, repeated = duplicates(splits)
    if cfg.dataset == "custom":
        faults += [f"{photo}: the same photo as {other}, which is in train" for photo, other in shared]
    else:                                                  # a published split is used as it is
        notes += [("photos of val that are in train too", f"{photo} = {other}") for photo, other in shared]
    notes += [("photos that occur twice", f"{photo} = {other}") for photo, other in repeated]

    print("\n\n".join(summary(cfg, split) for split in splits))
    if any(split.good() for split in splits):
        print("\n" + frequencies(splits, labels))
    for what in dict.fromkeys(what for what, _ in notes):
        files = [file for kind, file in notes if kind == what]
        print(f"\nnote, {what}: {len(files)}\n  " + "\n  ".join(files[:5] + ["..."] * (len(files) > 5)))
    faults = list(dict.fromkeys(faults))                   # a folder that both splits want is one fault
    if faults:
        print(f"\nfaults: {len(faults)}\n  " + "\n  ".join(faults))
    for path in draw_sheets(labels, splits, augmented, out):
        print(f"\nlook at {path}", end="")
    print(f"\n{cfg.dataset}: " + {0: "no faults", 1: "1 fault"}.get(len(faults), f"{len(faults)} faults"))
    return 1 if faults else 0


# ---- every file, in parallel -----------------------------------------------------------------------------------------

def inspect(splits: list[Split], workers: int):
    """Fills in the pairs of all splits."""
    tasks, owners = [], []
    for split in splits:
        source = split.source
        if source is None:
            found = []
        elif source.place is None:
            found = [(inspect_drawn, (source, i)) for i in range(min(DRAWN, len(source)))]
        else:
            found = [(inspect_files, (*map(str, source.paths(i)), source.num_classes)) for i in range(len(source))]
        tasks += found
        owners += [split] * len(found)
    with tqdm(total=len(tasks), desc="reading", unit="pair", disable=None) as bar:    # None: no bar where nobody looks
        for split, pair in zip(owners, _run(tasks, workers)):
            split.pairs.append(pair)
            bar.update()


def _run(tasks: list[tuple[Callable, tuple]], workers: int):
    if workers == 0:
        yield from map(_call, tasks)
        return
    ignore = (signal.SIGINT, signal.SIG_IGN)               # Ctrl-C is answered by the main process alone
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore) as pool:
        try:
            yield from pool.map(_call, tasks, chunksize=8)
        except BrokenProcessPool:
            raise MemoryError from None                    # the system ended a process: usually for want of memory


def _call(task: tuple[Callable, tuple]) -> Pair:
    function, arguments = task
    return function(*arguments)


def inspect_files(photo: str, label_path: str, num_classes: int) -> Pair:
    pair = Pair(photo)
    label = rgb = None
    try:
        label = read_label(label_path, num_classes)
    except UserError as error:
        pair.faults.append(str(error))
    try:
        rgb = read_photo(photo) if label is None else read_photo_of(label, photo, label_path)
    except UserError as error:
        pair.faults.append(str(error))
    if pair.faults:
        return pair
    pair.notes += [("endings in capitals, which other programs may not find", path) for path in (photo, label_path)
                   if Path(path).suffix != Path(path).suffix.lower()]
    way = orientation(photo)
    if way in (2, 3, 4) or (way != 1 and label.shape[0] == label.shape[1]):
        pair.notes.append(("photos with an EXIF orientation that the label's size cannot tell, read as stored", photo))
    return _measured(pair, rgb, label)


def inspect_drawn(source, i: int) -> Pair:
    return _measured(Pair(source.name(i)), *source.read(i))


def _measured(pair: Pair, rgb: np.ndarray, label: np.ndarray) -> Pair:
    pair.size = (rgb.shape[1], rgb.shape[0])
    pair.counts = np.bincount(label.ravel(), minlength=256)
    pair.content = hashlib.blake2b(rgb, digest_size=16).digest() + bytes(str(pair.size), "ascii")
    if np.count_nonzero(pair.counts[1:IGNORE]) == 0:
        pair.notes.append(("labels that show nothing but label 0", pair.photo))
    return pair


# ---- what it means ---------------------------------------------------------------------------------------------------

def count_faults(cfg: Config, split: Split) -> list[str]:
    expected = PAPER_COUNTS.get(cfg.dataset, {}).get(split.name)
    if split.source is None or expected in (None, len(split.source)):
        return []
    where = split.source.place.listing or split.source.place.images
    return [f"{where}: {len(split.source):,} {split.name} pairs, the paper has {expected:,}"]


def class_faults(splits: list[Split], labels: LabelSet) -> list[str]:
    """Classes that never occur while 255 does. Rare in val, and no fault, is one that train shows beside its own 255."""
    faults, usual = [], False
    for split in splits:
        counts, place = pixel_counts(split), split.source and split.source.place
        warning = label_warning(counts, labels.classes) if split.good() else ""
        several = np.count_nonzero(counts[:len(labels.classes)]) > 1
        if warning and not (usual and several):
            faults.append(f"{place.labels if place else split.name}: {warning}")
        usual = not warning and counts[IGNORE] > 0
    return faults


def pixel_counts(split: Split) -> np.ndarray:
    """Pixels of the whole split with each value 0..255."""
    return sum((split.pairs[i].counts for i in split.good()), np.zeros(256, int))


def duplicates(splits: list[Split]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(photo of val, the same photo in train) and (photo, the same photo in its own split), by their pixels."""
    shared, repeated, train = [], [], {}
    for split in splits:
        own = {}
        for pair in [split.pairs[i] for i in split.good()]:
            if pair.content in own:
                repeated.append((pair.photo, own[pair.content]))
            elif pair.content in train:
                shared.append((pair.photo, train[pair.content]))
            own.setdefault(pair.content, pair.photo)
        train = train or own
    return shared, repeated


def side_notes(labels: LabelSet) -> list[Note]:
    """Classes that are named as two sides of one thing, but do not change places in a mirror."""
    pairs = {frozenset(pair) for pair in labels.flip_pairs}
    lower = [name.lower() for name in labels.classes]
    sides = [(k, lower.index(name.replace("left", "right"))) for k, name in enumerate(lower)
             if "left" in name and name.replace("left", "right") in lower]
    return [("left and right classes that flip_pairs does not name: mirrored samples teach the wrong side",
             f"[{a}, {b}] {labels.classes[a]}, {labels.classes[b]}")
            for a, b in sides if frozenset((a, b)) not in pairs]


def absent_notes(splits: list[Split], labels: LabelSet) -> list[Note]:
    notes = []
    for split in splits:
        counts = pixel_counts(split)
        notes += [(f"classes that no photo of {split.name} shows", f"{k} {name}")
                  for k, name in enumerate(labels.classes) if split.good() and not counts[k]]
    return notes


def passed_over(splits: list[Split]) -> list[Note]:
    """What lies among the photos of a split without a list, and is not read."""
    places = [split.source.place for split in splits if split.source is not None and split.source.place is not None]
    return [("beside the photos, not read: folders, which only a list can name, and files with other endings", str(path))
            for place in places if not place.listing for path in sorted(place.images.iterdir())
            if not path.name.startswith(".") and (path.is_dir() or path.suffix.lower() not in PHOTO_SUFFIXES)]


def summary(cfg: Config, split: Split) -> str:
    if split.source is None:
        return f"{split.name}: not found"
    expected = PAPER_COUNTS.get(cfg.dataset, {}).get(split.name)
    lines = [f"{split.name}: {len(split.source):,} pairs" + (f" (the paper: {expected:,})" if expected else "")]
    place = split.source.place
    if place is not None:
        lines += [f"  photos {place.images}", f"  labels {place.labels}", f"  list   {place.listing or 'none'}"]
    else:
        lines += [f"  drawn when asked for; {len(split.pairs)} of them looked at"]
    sizes = np.array([split.pairs[i].size for i in split.good()])
    if len(sizes):
        low, middle, high = (" x ".join(f"{v:.0f}" for v in f(sizes, axis=0)) for f in (np.min, np.median, np.max))
        lines += [f"  sizes  {low} to {high} pixels (width x height), median {middle}"]
    return "\n".join(lines)


def frequencies(splits: list[Split], labels: LabelSet) -> str:
    """The table of classes: their share of all pixels, and the number of photos they occur on."""
    columns, heads = [], []
    for split in splits:
        counts = np.array([split.pairs[i].counts for i in split.good()]).reshape(-1, 256)
        counts = np.concatenate([counts[:, :len(labels.classes)], counts[:, IGNORE:]], axis=1)
        shares, photos = counts.sum(0) / max(counts.sum(), 1), (counts > 0).sum(0)
        columns.append([f"{share:>10.3%} {count:>8,}" for share, count in zip(shares, photos)])
        heads.append(f"{split.name:>10} {'photos':>8}")
    names = [f"{k:>3} {name}" for k, name in enumerate(labels.classes)] + [f"{IGNORE} ignored"]
    width = max(map(len, names))
    rows = [("class", *heads), *zip(names, *columns)]
    return "\n".join(f"{row[0]:<{width}} {' '.join(row[1:])}" for row in rows)


# ---- contact sheets --------------------------------------------------------------------------------------------------

def draw_sheets(labels: LabelSet, splits: list[Split], augmented: Callable, out: Path) -> list[Path]:
    written = []
    for split in splits:
        good = split.good()
        chosen = [good[k] for k in np.linspace(0, len(good) - 1, min(SHOWN, len(good))).round().astype(int)]
        samples = [(split.source.name(i), *split.source.read(i)) for i in chosen]
        written += _sheet(samples, labels, out / f"{split.name}.png")
        if split.name == "train" and chosen:
            samples = [(split.source.name(i), *augmented(split.source, i, slot)) for slot, i in enumerate(chosen)]
            written += _sheet(samples, labels, out / "augmented.png")
    return written


def _sheet(samples: list[tuple[str, np.ndarray, np.ndarray]], labels: LabelSet, path: Path) -> list[Path]:
    if not samples:
        return []
    cells = [(rgb, pictures.drawn_label(label, labels.palette)) for _, rgb, label in samples]
    wide = min(3, len(samples))                            # so many samples a row, each as photo and label
    groups = range(0, len(samples), wide)
    sheet = pictures.sheet(
        [[picture for cell in cells[k:k + wide] for picture in cell] for k in groups],
        titles=["photo", "label"] * wide,
        captions=[([name for name, _, _ in samples[k:k + wide]] + [""] * wide)[:wide] for k in groups])
    shown = np.unique(np.concatenate([np.unique(label) for _, _, label in samples]))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_png(path, pictures.with_legend(sheet, labels.classes, labels.palette, shown, size=16))
    return [path]
