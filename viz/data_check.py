"""The check of a data set, before hours are spent on it: `python datasets.py --cfg configs/cihp.yaml`.

Reads every photo and label of both splits, in parallel. Prints how many pairs there are (and what the paper has), their
sizes and how often each class occurs, and names every fault by its file; notes and warnings do not count as faults.
Leaves contact sheets: photos beside their labels, and samples as training sees them.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import IGNORE, Config
from errors import UserError
from files.atomic import results_folder
from files.images import PHOTO_SUFFIXES, read_label, read_photo, read_photo_of
from files.labels import LabelSet, LabelStats, label_fault, label_warning
from viz import pictures

PAPER_COUNTS = {"lip": {"train": 30_462, "val": 10_000},   # §4.1: pairs of each split
                "cihp": {"train": 28_280, "val": 5_000},
                "ppp": {"train": 1_716, "val": 1_817}}
SHOWN = 12                                                 # samples on a contact sheet

Note = tuple[str, str]                                     # kind, and the file


@dataclass
class Pair:
    """One labelled photo."""
    photo: str
    faults: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)                         # width, height
    stats: LabelStats | None = None
    content: bytes = b""                                   # digest of the photo's pixels


@dataclass
class Split:
    name: str
    source: object                                         # PairSet of datasets.py; None: not found
    faults: list[str]
    pairs: list[Pair] = field(default_factory=list)        # in the order of `source`

    def good(self) -> list[int]:
        return [i for i, pair in enumerate(self.pairs) if not pair.faults]

    def stats(self) -> LabelStats:
        """Of all labels together."""
        return sum((self.pairs[i].stats for i in self.good()), LabelStats(np.zeros(256, int), 0))


def report(cfg: Config, labels: LabelSet, found: list[tuple], augmented: Callable, out: Path) -> int:
    """Prints the report, writes the contact sheets into `out`; the exit code is 1 if there is any fault.

    `found`: name, pairs and faults of each split; `augmented(pairs, i, slot)`: pair i as training sees it.
    """
    results_folder(out)
    splits = [Split(*parts) for parts in found]
    inspect(splits, cfg.workers)
    known = [split for split in splits if split.good()]
    faults = [fault for split in splits for fault in split.faults + [f for pair in split.pairs for f in pair.faults]]
    faults += [fault for split in splits for fault in count_faults(cfg, split)]
    warnings = []
    for split in known:
        where, stats = split.source.place.labels, split.stats()
        fault, warning = label_fault(stats, labels.classes), label_warning(stats, labels.classes)
        faults += [f"{where}: {fault}"] if fault else []
        warnings += [f"{where}: {warning}"] if warning and not fault else []
    notes = [note for split in splits for pair in split.pairs for note in pair.notes]
    notes += side_notes(labels) + ignored_notes(splits)
    shared, repeated = duplicates(splits)
    if cfg.dataset == "custom":
        faults += [f"{photo}: the same photo as {other}, which is in train" for photo, other in shared]
    else:                                                  # a published split is used as it is
        notes += [("photos of val that are in train too", f"{photo} = {other}") for photo, other in shared]
    notes += [("photos that occur twice", f"{photo} = {other}") for photo, other in repeated]

    print("\n\n".join(summary(cfg, split) for split in splits))
    if known:
        print("\n" + frequencies(splits, labels))
    for kind in dict.fromkeys(kind for kind, _ in notes):
        files = [file for other, file in notes if other == kind]
        print(f"\nnote, {kind}: {len(files)}\n  " + "\n  ".join(files[:5] + ["..."] * (len(files) > 5)))
    faults = list(dict.fromkeys(faults))                   # a folder missing for both splits is one fault
    for kind, lines in (("warnings", warnings), ("faults", faults)):
        if lines:
            print(f"\n{kind}: {len(lines)}\n  " + "\n  ".join(lines))
    for path in draw_sheets(labels, splits, augmented, out):
        print(f"\nlook at {path}", end="")
    count = f"{len(faults) or 'no'} fault{'s' * (len(faults) != 1)}"
    print(f"\n{cfg.dataset}: {count}" + (f", {len(warnings)} warning{'s' * (len(warnings) != 1)}" if warnings else ""))
    return 1 if faults else 0


# ----------------------------------------------------------------------------------------------------------------------
# every file, in parallel

def inspect(splits: list[Split], workers: int):
    """Fills in the pairs of all splits."""
    for split in [split for split in splits if split.source is not None]:
        with ThreadPool(max(1, workers)) as pool:
            results = pool.imap(lambda i: inspect_files(split.source, i), range(len(split.source)))
            split.pairs += tqdm(results, split.name, len(split.source), unit="pair", disable=None)  # on a terminal only


def inspect_files(source, i: int) -> Pair:
    photo, label_path = map(str, source.paths(i))
    pair, label = Pair(photo), None
    try:
        label = read_label(label_path, source.num_classes)
    except UserError as error:
        pair.faults.append(str(error))
    try:
        rgb = read_photo(photo) if label is None else read_photo_of(label, photo, label_path)
    except UserError as error:
        pair.faults.append(str(error))
    if pair.faults:
        return pair
    pair.size, pair.stats = (rgb.shape[1], rgb.shape[0]), LabelStats.of(label)
    pair.content = hashlib.blake2b(rgb, digest_size=16).digest() + bytes(str(pair.size), "ascii")
    if np.count_nonzero(pair.stats.counts[1:IGNORE]) == 0:
        pair.notes.append(("labels that show nothing but label 0", pair.photo))
    return pair


# ----------------------------------------------------------------------------------------------------------------------
# faults and notes

def count_faults(cfg: Config, split: Split) -> list[str]:
    expected = PAPER_COUNTS.get(cfg.dataset, {}).get(split.name)
    if split.source is None or expected in (None, len(split.source)):
        return []
    where = split.source.place.listing or split.source.place.images
    return [f"{where}: {len(split.source):,} {split.name} pairs, the paper has {expected:,}"]


def duplicates(splits: list[Split]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(photo of val, the same photo in train) and (photo, the same photo in its own split), by their pixels."""
    shared, repeated, seen = [], [], {}
    for split in splits:
        for pair in [split.pairs[i] for i in split.good()]:
            where, first = seen.setdefault(pair.content, (split, pair))
            if first is not pair:
                (repeated if where is split else shared).append((pair.photo, first.photo))
    return shared, repeated


def side_notes(labels: LabelSet) -> list[Note]:
    """Classes that are named as two sides of one thing, but are not swapped by a flip."""
    pairs = {frozenset(pair) for pair in labels.flip_pairs}
    lower = [name.lower() for name in labels.classes]
    sides = [(k, lower.index(name.replace("left", "right"))) for k, name in enumerate(lower)
             if "left" in name and name.replace("left", "right") in lower]
    return [("left and right classes that flip_pairs does not name: flipped samples teach the wrong side",
             f"[{a}, {b}] {labels.classes[a]}, {labels.classes[b]}")
            for a, b in sides if frozenset((a, b)) not in pairs]


def ignored_notes(splits: list[Split]) -> list[Note]:
    """Files next to the photos of a split without a list that are not read."""
    places = [split.source.place for split in splits if split.source is not None]
    return [("beside the photos, not read: folders, which only a list can name, and files with other extensions",
             str(path))
            for place in places if not place.listing for path in sorted(place.images.iterdir())
            if not path.name.startswith(".") and (path.is_dir() or path.suffix.lower() not in PHOTO_SUFFIXES)]


# ----------------------------------------------------------------------------------------------------------------------
# what is printed and drawn

def summary(cfg: Config, split: Split) -> str:
    if split.source is None:
        return f"{split.name}: not found"
    expected = PAPER_COUNTS.get(cfg.dataset, {}).get(split.name)
    lines = [f"{split.name}: {len(split.source):,} pairs" + (f" (the paper: {expected:,})" if expected else "")]
    place = split.source.place
    lines += [f"  photos {place.images}", f"  labels {place.labels}", f"  list   {place.listing or 'none'}"]
    sizes = np.array([split.pairs[i].size for i in split.good()])
    if len(sizes):
        low, middle, high = (" x ".join(f"{v:.0f}" for v in f(sizes, axis=0)) for f in (np.min, np.median, np.max))
        lines += [f"  sizes  {low} to {high} pixels (width x height), median {middle}"]
    return "\n".join(lines)


def frequencies(splits: list[Split], labels: LabelSet) -> str:
    """The table of classes: their share of all pixels, and the number of photos they occur on."""
    columns, heads = [], []
    for split in splits:
        counts = np.array([split.pairs[i].stats.counts for i in split.good()]).reshape(-1, 256)
        counts = np.concatenate([counts[:, :len(labels.classes)], counts[:, IGNORE:]], axis=1)
        shares, photos = counts.sum(0) / max(counts.sum(), 1), (counts > 0).sum(0)
        columns.append([f"{share:>10.3%} {count:>8,}" for share, count in zip(shares, photos)])
        heads.append(f"{split.name:>10} {'photos':>8}")
    names = [f"{k:>3} {name}" for k, name in enumerate(labels.classes)] + [f"{IGNORE} ignored"]
    width = max(map(len, names))
    rows = [("class", *heads), *zip(names, *columns)]
    return "\n".join(f"{row[0]:<{width}} {' '.join(row[1:])}" for row in rows)


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
    wide = min(3, len(samples))                            # samples per row, each as photo and label
    groups = range(0, len(samples), wide)
    sheet = pictures.sheet(
        [[picture for cell in cells[k:k + wide] for picture in cell] for k in groups],
        titles=["photo", "label"] * wide,
        captions=[([name for name, _, _ in samples[k:k + wide]] + [""] * wide)[:wide] for k in groups])
    shown = np.unique(np.concatenate([np.unique(label) for _, _, label in samples]))
    pictures.save_png(path, pictures.with_legend(sheet, labels.classes, labels.palette, shown, size=16))
    return [path]
