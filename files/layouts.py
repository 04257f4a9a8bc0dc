"""Where the files of a data set are (§4.1), and which photo belongs to which label.

The official layouts come first, then the ways in which people unpack and other projects arrange them.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from config import Config
from errors import UserError, reading
from files.images import PHOTO_SUFFIXES

LABEL_SUFFIXES = (".png",)
TWO_PATHS = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, PHOTO_SUFFIXES))}))\s+(.+\.png)", re.IGNORECASE)

def _below(folders: str, *names: str) -> tuple[str, ...]:
    """Every name below every one of the folders, "." for the data root itself."""
    return tuple(f"{folder}/{name}".removeprefix("./") for name in names for folder in folders.split())


_LIP = ". LIP data images_labels TrainVal_images TrainVal_images/TrainVal_images"
_LIP_LABELS = (". LIP images_labels "
               "TrainVal_parsing_annotations TrainVal_parsing_annotations/TrainVal_parsing_annotations")
_CIHP = ". instance-level_human_parsing instance-level_human_parsing/instance-level_human_parsing CIHP CIHP_4w"
_PPP = ". pascal_person_part pascal_person_part/pascal_person_part pascal"
_VOC = "VOCdevkit/VOC2010 VOCdevkit/VOC2012 VOC2010 VOC2012"

# Below data_root: photos, labels, list of names. The official place comes first, then common ways to unpack it and the
# folders of SCHP, Graphonomy, CDGNet, M2FP, Hulk and Sapiens. {split}: train, val; {Split}: Training, Validation.
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
    root: Path                                             # data_root
    images: Path
    labels: Path
    listing: Path | None                                   # None: every photo of the folder


def find_split(cfg: Config, split: str) -> Place:
    """The place of a split on disk; what is missing is reported with all the places looked at."""
    if not cfg.data_root:
        raise UserError(f"data_root is not set: give the folder of the {cfg.dataset} data (data_root=/path/to/it)")
    root = Path(os.path.abspath(cfg.data_root))
    with reading(f"data_root {root}", "folder", ": set it with data_root=/path/to/it"):
        os.scandir(root).close()
    kinds = ("photos", "labels", "list of names")
    places = _candidates(cfg, split)
    images, labels, listing = (_first(root, some, exists)
                               for some, exists in zip(places, (os.path.isdir, os.path.isdir, os.path.isfile)))
    shared = images and images.name in ("Images", "JPEGImages") and images.parent.name not in ("Training", "Validation")
    needs_list = places[2] if cfg.dataset == "custom" else shared        # shared: both splits in one folder
    for kind, some, path in zip(kinds, places, (images, labels, listing)):
        if path is None and (kind != kinds[2] or needs_list):
            raise UserError(f"data_root {root}: no {split} {kind}; looked for {', '.join(some)}, and the same below "
                            f"{root.name}/")
    return Place(root, images, labels, listing)


def _candidates(cfg: Config, split: str) -> tuple[tuple[str, ...], ...]:
    """Where photos, labels and list may be, below data_root."""
    if cfg.dataset == "custom":
        own = {"train": (cfg.train_images, cfg.train_labels, cfg.train_list),
               "val": (cfg.val_images, cfg.val_labels, cfg.val_list)}[split]
        return tuple((os.path.expanduser(place),) if place else () for place in own)
    words = {"split": split, "Split": {"train": "Training", "val": "Validation"}[split]}
    return tuple(tuple(place.format(**words) for place in places) for places in LAYOUTS[cfg.dataset])


def _first(root: Path, places: tuple[str, ...], exists) -> Path | None:
    bases = (root, root / root.name)                       # archives often unpack into a folder of the same name
    return next(filter(exists, (Path(os.path.normpath(base / place)) for base in bases for place in places)), None)


def match_files(place: Place) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """(name, photo, label) of a split in its order, and in words every fault of the names."""
    pairs, faults = _listed(place) if place.listing else _unlisted(place)
    if not pairs and not faults:
        faults.append(f"{place.listing}: an empty list" if place.listing else
                      f"{place.images}: no photos in it; those in folders below it must be named by a list")
    return pairs, faults


def _unlisted(place: Place) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """Every photo of the folder, with the label of its name."""
    if os.path.samefile(place.images, place.labels):
        return [], [f"{place.images}: has photos and labels: move the labels into another folder, or give a "
                    "list that names the photos with their extensions"]
    photos, labels = _files(place.images, PHOTO_SUFFIXES), _files(place.labels, LABEL_SUFFIXES)
    faults = [f"{folder / other}: {first} has the same name; remove one of them"
              for folder, files in ((place.images, photos), (place.labels, labels))
              for first, *others in files.values() for other in others]
    suffix = _common_suffix(photos, labels)
    if suffix:
        return [], faults + [f"{place.labels}: the labels are named NAME{suffix}.png: name them as their photos, or "
                             f"pair them with a list (train_list, val_list) of lines `NAME.jpg NAME{suffix}.png`"]
    faults += [f"{place.labels / name}.png: no such label" for name in photos if name not in labels]
    faults += [f"{place.labels / files[0]}: no photo for this label in {place.images}"
               for name, files in labels.items() if name not in photos]
    return [(name, place.images / files[0], place.labels / labels[name][0])
            for name, files in photos.items() if name in labels], faults


def _common_suffix(photos: dict, labels: dict) -> str:
    """What every label has behind the name of its photo: "_mask"; "" if they do not agree."""
    name = next((name for name in labels if name not in photos), "")
    photo = max((photo for photo in photos if name.startswith(photo)), key=len, default=name)
    suffix = name[len(photo):]
    return suffix if all(f"{photo}{suffix}" in labels for photo in photos) else ""


def _listed(place: Place) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """The pairs that a list names, in its order; a line that names no photo, no label, or several is a fault.

    A line is the path of a photo, or of a photo and its label: below the split's folder of photos (of labels), the next
    folder above that up to data_root, or the list's own, the first of them that has it. A photo alone is paired with
    the label of the same path.
    """
    with reading(place.listing, "list of names"):
        lines = place.listing.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    photos, labels = _Finder(place, place.images, PHOTO_SUFFIXES), _Finder(place, place.labels, LABEL_SUFFIXES)
    pairs, faults, first = [], [], {}
    for number, line in enumerate(lines, 1):
        try:
            pair = _pair(line.strip().replace("\\", "/"), photos, labels) if line.strip() else None
            if pair and first.setdefault(pair[0], number) != number:
                raise UserError(f"{pair[0]} was listed in line {first[pair[0]]} already")
            pairs += [pair] if pair else []
        except UserError as error:
            faults.append(f"{place.listing}, line {number}: {error}")
    return pairs, faults


def _pair(line: str, photos: "_Finder", labels: "_Finder") -> tuple[str, Path, Path]:
    both = None if photos.find(line) else TWO_PATHS.fullmatch(line)      # a name may have a blank
    photo = photos.only(line if both is None else both[1])
    folders = (photos.below, photos.below.resolve())
    below = next((folder for folder in folders if photo.is_relative_to(folder)), photo.anchor)
    if not both and below == photo.anchor:
        raise UserError(f"{photo} is not in {photos.below}: name its label too, as in `PHOTO LABEL`")
    name = photo.relative_to(below).with_suffix("").as_posix()
    return name, photo, labels.only(both[2]) if both else labels.only(f"{name}.png", above=False)


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[str]]:
    """{name without extension: files} of a folder, of these extensions in any case; hidden files (._x.jpg) do not
    count."""
    files: dict[str, list[str]] = {}
    with reading(folder, "folder"):
        names = sorted(os.listdir(folder))
    for file in names:
        name, suffix = os.path.splitext(file)
        if suffix.lower() in suffixes and not file.startswith("."):
            files.setdefault(name, []).append(file)
    return files


class _Finder:
    """Finds the files that the lines of a list name; every folder is read once."""

    def __init__(self, place: Place, below: Path, suffixes: tuple[str, ...]):
        above = [folder for folder in below.parents if folder.is_relative_to(place.root)]
        self.below, self.places = below, (below, *above, place.listing.parent)
        self.suffixes, self.folders = suffixes, {}

    def at(self, path: Path) -> list[Path]:
        """The files of this path; else those that have it but for their extensions."""
        path = Path(os.path.normpath(path))
        if path.parent not in self.folders:
            self.folders[path.parent] = _files(path.parent, self.suffixes) if path.parent.is_dir() else {}
        files, (stem, suffix) = self.folders[path.parent], os.path.splitext(path.name)
        same = [file for file in files.get(stem, ()) if os.path.splitext(file)[1].lower() == suffix.lower()]
        return [path.parent / file for file in same or files.get(stem + suffix, ())]

    def find(self, text: str) -> list[Path]:
        """The files that a path in a list means. One that begins with / may mean data_root: PASCAL-Person-Part's do."""
        paths = [Path(text)] if text.startswith("/") else []
        return next(filter(None, map(self.at, [*paths, *(place / text.lstrip("/") for place in self.places)])), [])

    def only(self, text: str, above: bool = True) -> Path:
        """The only file that a path means, below the split's folder or `above` it."""
        found = self.find(text) if above else self.at(self.below / text)
        if len(found) > 1:
            raise UserError(f"{text} may be {' or '.join(map(str, found))}: give its extension, or rename one")
        if not found:
            kind = "label" if self.suffixes == LABEL_SUFFIXES else "photo"
            raise UserError(f"no {kind} {text} in {self.below}" + " or above it" * above
                            + f" ({', '.join(self.suffixes)})")
        return found[0]
