"""Where the files of a data set lie (§4.1), and which photo belongs to which label.

The official layouts come first, then the ways in which people unpack and other projects arrange them.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from config import Config
from engine.errors import UserError
from files.images import PHOTO_ENDINGS


def _below(folders: str, *names: str) -> tuple[str, ...]:
    """Every name below every one of the folders, "." for the data root itself."""
    return tuple(f"{folder}/{name}".removeprefix("./") for name in names for folder in folders.split())


_LIP = ". LIP data images_labels TrainVal_images TrainVal_images/TrainVal_images"
_LIP_LABELS = (". LIP images_labels "
               "TrainVal_parsing_annotations TrainVal_parsing_annotations/TrainVal_parsing_annotations")
_CIHP = ". instance-level_human_parsing instance-level_human_parsing/instance-level_human_parsing CIHP CIHP_4w"
_PPP = ". pascal_person_part pascal_person_part/pascal_person_part pascal"
_VOC = "VOCdevkit/VOC2010 VOCdevkit/VOC2012 VOC2010 VOC2012"

# Below data_root: photos, labels, list of names. The official place comes first, then the common ways to unpack it and
# the folders of SCHP, Graphonomy, CDGNet, M2FP, Hulk and Sapiens. {split}: train, val; {Split}: Training, Validation.
LAYOUTS = {
    "lip": (_below(_LIP, "{split}_images", "images/{split}_images", "{Split}/Images"),
            _below(_LIP_LABELS, "{split}_segmentations", "segmentations/{split}_segmentations", "{Split}/Category_ids"),
            _below(_LIP, "{split}_id.txt", "{Split}/{split}_id.txt")),
    "cihp": (_below(_CIHP, "{Split}/Images", "{split}_images", "Images"),
             _below(_CIHP, "{Split}/Category_ids", "{split}_segmentations", "Category_ids"),
             _below(_CIHP, "{Split}/{split}_id.txt", "{split}_id.txt", "lists/{split}_id.txt")),
    "ppp": (_below(f"{_PPP} {_VOC}", "JPEGImages") + ("{split}_images",),      # "val" is the papers' test set
            _below(_PPP, "pascal_person_part_gt", "SegmentationPart") + ("{split}_segmentations",),
            _below(_PPP, "pascal_person_part_trainval_list/{split}_id.txt",
                   "pascal_person_part_trainval_list/{split}.txt", "list/{split}_id.txt", "{split}_id.txt")),
}


@dataclass(frozen=True)
class Place:
    """The folders of one split."""
    images: Path
    labels: Path
    listing: Path | None                                   # None: every photo of the folder


def find_split(cfg: Config, split: str) -> Place:
    """The place of a split on disk; what is missing is reported with all the places looked at."""
    if not cfg.data_root:
        raise UserError(f"data_root is not set: give the folder of the {cfg.dataset} data (data_root=/path/to/it)")
    root = Path(os.path.abspath(cfg.data_root))
    try:
        os.scandir(root).close()
    except OSError as error:
        raise UserError(f"data_root {root}: {error.strerror.lower()} "
                        "(data_root=/path/to/it says where the data is)") from None
    images_at, labels_at, lists_at = _candidates(cfg, split)
    images = _first(root, images_at, os.path.isdir)
    labels = _first(root, labels_at, os.path.isdir)
    listing = _first(root, lists_at, os.path.isfile)
    if images is None:
        raise UserError(_missing(root, images_at, f"{split} photos"))
    if labels is None:
        raise UserError(_missing(root, labels_at, f"{split} labels"))
    shared = images.name in ("Images", "JPEGImages") and images.parent.name not in ("Training", "Validation")
    if listing is None and (lists_at if cfg.dataset == "custom" else shared):    # shared: both splits in one folder
        raise UserError(_missing(root, lists_at, f"list of {split} names"))
    return Place(images, labels, listing)


def _candidates(cfg: Config, split: str) -> tuple[tuple[str, ...], ...]:
    """Where photos, labels and list may lie, below data_root."""
    if cfg.dataset == "custom":
        own = {"train": (cfg.train_images, cfg.train_labels, cfg.train_list),
               "val": (cfg.val_images, cfg.val_labels, cfg.val_list)}[split]
        return tuple((place,) if place else () for place in own)
    words = {"split": split, "Split": {"train": "Training", "val": "Validation"}[split]}
    return tuple(tuple(place.format(**words) for place in places) for places in LAYOUTS[cfg.dataset])


def _first(root: Path, places: tuple[str, ...], exists) -> Path | None:
    for base in (root, root / root.name):                  # archives often unpack into a folder of their own name
        for place in places:
            if exists(base / place):
                return base / place
    return None


def _missing(root: Path, places: tuple[str, ...], what: str) -> str:
    beside = {(base / place).parent / "Categories" for base in (root, root / root.name) for place in places}
    hint = ""
    if any(map(os.path.isdir, beside)):
        hint = " (its Categories are colour pictures for people; the class numbers are in Category_ids)"
    return f"data_root {root}: no {what}{hint}; looked for {', '.join(places)}, and the same below {root.name}/"


def match_files(place: Place) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(name, photo file, label file) of a split in its order, and in words every fault of the names."""
    faults = []
    photos = _by_stem(place.images, PHOTO_ENDINGS, faults)
    labels = _by_stem(place.labels, (".png",), faults)
    names = _read_list(place.listing, faults) if place.listing else sorted(photos)
    named = f"{place.listing} names it, but " if place.listing else ""
    pairs = []
    for name in names:
        if name not in photos:
            faults.append(f"{place.images / name}: {named}there is no such photo{_close(name, photos)}")
        if name not in labels:
            faults.append(f"{place.labels / name}.png: {named}there is no such label"
                          + (_close(name, labels) or _not_png(place.labels, name)))
        if name in photos and name in labels:
            pairs.append((name, photos[name], labels[name]))
    if not place.listing:
        faults += [f"{place.labels / labels[name]}: there is no photo to this label in {place.images}"
                   for name in sorted(labels.keys() - photos.keys())]
    if not names:
        faults.append(f"{place.listing or place.images}: empty, there is nothing to read")
    return pairs, faults


def _by_stem(folder: Path, endings: tuple[str, ...], faults: list[str]) -> dict[str, str]:
    """File names by their stem. Hidden files (.DS_Store, ._x.jpg) do not count, endings may be in capitals."""
    try:
        files = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({error.strerror})") from None
    found = {}
    for file in files:
        stem, ending = Path(file).stem, Path(file).suffix.lower()
        if file.startswith(".") or ending not in endings:
            continue
        if stem in found:
            faults.append(f"{folder / file}: {found[stem]} has the same name, one of the two must go")
        found[stem] = file
    return found


def _close(name: str, files: dict[str, str]) -> str:
    for stem in files:
        if stem.lower() == name.lower():
            return f" ({files[stem]} differs in capitals)"
    return ""


def _not_png(folder: Path, name: str) -> str:
    for ending in (*PHOTO_ENDINGS, ".gif", ".tif", ".tiff", ".npy", ".mat"):
        if os.path.exists(folder / f"{name}{ending}"):
            return f" ({name}{ending} is there, but a label is a PNG)"
    return ""


def _read_list(path: Path, faults: list[str]) -> list[str]:
    """The names of a list, one a line: bare, with an ending, or a photo's and a label's path side by side."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of names ({error})") from None
    names = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        first = line.split()[0]
        path_of_photo = Path(first if Path(first).suffix.lower() in PHOTO_ENDINGS else line.strip())
        name = path_of_photo.stem if path_of_photo.suffix.lower() in PHOTO_ENDINGS else path_of_photo.name
        if name in names:
            faults.append(f"{path}, line {number}: {name} stands there twice, first in line {names[name]}")
        names.setdefault(name, number)
    return list(names)
