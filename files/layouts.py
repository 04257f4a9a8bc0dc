"""Where the files of a data set lie (§4.1), and which photo belongs to which label.

The official layouts come first, then the ways in which people unpack and other projects arrange them.
"""

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from config import Config
from errors import UserError, reading
from files.images import PHOTO_SUFFIXES

LABEL_SUFFIXES = (".png",)
TWO_PATHS = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, PHOTO_SUFFIXES))}))\s+(.+)", re.IGNORECASE)   # of a line

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
    return Place(root, images, labels, listing)


def _candidates(cfg: Config, split: str) -> tuple[tuple[str, ...], ...]:
    """Where photos, labels and list may lie, below data_root."""
    if cfg.dataset == "custom":
        own = {"train": (cfg.train_images, cfg.train_labels, cfg.train_list),
               "val": (cfg.val_images, cfg.val_labels, cfg.val_list)}[split]
        return tuple((os.path.expanduser(place),) if place else () for place in own)
    words = {"split": split, "Split": {"train": "Training", "val": "Validation"}[split]}
    return tuple(tuple(place.format(**words) for place in places) for places in LAYOUTS[cfg.dataset])


def _first(root: Path, places: tuple[str, ...], exists) -> Path | None:
    for base in (root, root / root.name):                  # archives often unpack into a folder of their own name
        for place in places:
            for path in spellings(Path(os.path.normpath(base / place))):
                if exists(path):
                    return path
    return None


def _missing(root: Path, places: tuple[str, ...], what: str) -> str:
    beside = {(base / place).parent / "Categories" for base in (root, root / root.name) for place in places}
    hint = ""
    if any(map(os.path.isdir, beside)):
        hint = " (its Categories are colour pictures for people; the class numbers are in Category_ids)"
    return f"data_root {root}: no {what}{hint}; looked for {', '.join(places)}, and the same below {root.name}/"


def match_files(place: Place) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """(name, photo, label) of a split in its order, and in words every fault of the names."""
    pairs, faults = _listed(place) if place.listing else _unlisted(place)
    if not pairs and not faults:
        faults.append(f"{place.listing}: empty, there is nothing to read" if place.listing else
                      f"{place.images}: empty of photos; what lies in folders of its own must be named by a list")
    return pairs, faults


def _unlisted(place: Place) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """Every photo of the folder, with the label of its name."""
    if os.path.samefile(place.images, place.labels):
        return [], [f"{place.images}: photos and labels lie in one folder: move the labels into one of their own, or give "
                    "a list that names the photos with their endings"]
    photos, labels = _Folder(place.images, PHOTO_SUFFIXES), _Folder(place.labels, LABEL_SUFFIXES)
    faults = [f"{folder.path / other}: {first} has the same name, one of the two must go"
              for folder in (photos, labels) for first, *others in folder.files.values() for other in others]
    suffix = _common_suffix(photos.files, labels.files)
    if suffix:
        return [], faults + [f"{place.labels}: the labels are named NAME{suffix}.png: name them as their photos, or pair them "
                             f"with a list (train_list, val_list) of lines `NAME.jpg NAME{suffix}.png`"]
    faults += [f"{place.labels / name}.png: no such label{labels.hint(name)}"
               for name in photos.files if name not in labels.files]
    faults += [f"{place.labels / files[0]}: no photo for this label in {place.images}"
               for name, files in labels.files.items() if name not in photos.files]
    return [(name, place.images / files[0], place.labels / labels.files[name][0])
            for name, files in photos.files.items() if name in labels.files], faults


def _common_suffix(photos: dict, labels: dict) -> str:
    """What every label has behind the name of its photo: "_mask"; "" if they do not agree."""
    name = next((name for name in labels if name not in photos), "")
    photo = max((photo for photo in photos if name.startswith(photo)), key=len, default=name)
    suffix = name[len(photo):]
    return suffix if all(f"{photo}{suffix}" in labels for photo in photos) else ""


def _listed(place: Place) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """What a list names, in its order; a line that names no photo, no label, or several is a fault.

    A line is the path of a photo, or of a photo and its label: below the split's folder of photos (of labels), the next
    folder above that up to data_root, or the list's own, the first of them that has it. A photo alone has the label of
    its own path.
    """
    try:
        with reading(place.listing, "list of names"):
            lines = place.listing.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{place.listing}: is not a list of names ({error})") from None
    photos, labels = _Files(place, place.images, PHOTO_SUFFIXES), _Files(place, place.labels, LABEL_SUFFIXES)
    pairs, faults, first = [], [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = _pair(line.strip().replace("\\", "/"), photos, labels)
            if first.setdefault(pair[0], number) != number:
                raise _Unclear(f"{pair[0]} stands there twice, first in line {first[pair[0]]}")
            pairs.append(pair)
        except _Unclear as error:
            faults.append(f"{place.listing}, line {number}: {error}")
    return pairs, faults


class _Unclear(Exception):
    """A line of a list that does not say which photo and which label it means."""


def _pair(line: str, photos: "_Files", labels: "_Files") -> tuple[str, Path, Path]:
    both = TWO_PATHS.fullmatch(line)
    if both and photos.find(line):                         # the blank is one of the photo's name
        both = None
    photo = photos.one(both[1] if both else line)
    if both and Path(both[2]).suffix.lower() not in LABEL_SUFFIXES:       # a number behind a photo is its class, say
        raise _Unclear(f"{both[2]} names no label: they end in {' '.join(LABEL_SUFFIXES)}")
    below = next((folder for folder in (photos.below, photos.below.resolve()) if photo.is_relative_to(folder)), None)
    name = photo.relative_to(below or photo.anchor).with_suffix("").as_posix()
    if both:
        label = labels.one(both[2])
    elif below:
        label = labels.one(f"{name}.png", here=True)
    else:
        raise _Unclear(f"{photo} is not below {photos.below}: name its label behind it")
    if label == photo:
        raise _Unclear(f"{photo} would be photo and label at once")
    return name, photo, label


class _Folder:
    """The files of a folder that have one of the endings, in any capitals. Hidden ones (.DS_Store, ._x.jpg) do not count.

    Names are compared in Unicode's composed form: a Mac stores an accent as a sign of its own.
    """

    def __init__(self, path: Path, endings: tuple[str, ...]):
        self.path, self.endings = path, endings
        self.files: dict[str, list[str]] = {}              # by their names without ending
        self.near: dict[str, str] = {}                     # all, whatever the ending, in small letters
        with reading(path, "folder"):
            names = sorted(os.listdir(path))
        for file in names:
            name, ending = os.path.splitext(composed(file))
            self.near.setdefault(name.lower(), file)
            if ending.lower() in endings and not file.startswith("."):
                self.files.setdefault(name, []).append(file)

    def find(self, name: str) -> list[Path]:
        """The file of this name; else those that have it but for their endings."""
        stem, ending = os.path.splitext(composed(name))
        whole = [file for file in self.files.get(stem, ()) if os.path.splitext(file)[1].lower() == ending.lower()]
        return [self.path / file for file in whole or self.files.get(stem + ending, ())]

    def hint(self, name: str) -> str:
        """What there is instead of a file that there is not."""
        name = composed(name).lower()
        file = self.near.get(name) or self.near.get(os.path.splitext(name)[0])
        if file is None:
            return ""
        if os.path.splitext(file)[1].lower() not in self.endings:
            return f" ({file} is there, but not as {' '.join(self.endings)})"
        return f" ({file} is there, look at capitals and ending)"


class _Files:
    """Finds the files that the lines of a list name; every folder is read once."""

    def __init__(self, place: Place, below: Path, endings: tuple[str, ...]):
        above = [folder for folder in below.parents if folder.is_relative_to(place.root)]
        self.below, self.places = below, (below, *above, place.listing.parent)
        self.endings, self.folders = endings, {}

    def at(self, path: Path) -> list[Path]:
        """The files of this path, with or without its ending."""
        path = Path(os.path.normpath(path))
        if path.parent not in self.folders:
            there = next(filter(os.path.isdir, spellings(path.parent)), None)
            self.folders[path.parent] = there and _Folder(there, self.endings)
        folder = self.folders[path.parent]
        return folder.find(path.name) if folder else []

    def find(self, text: str) -> list[Path]:
        """The files that a path in a list means. One that begins with / may mean data_root: PASCAL-Person-Part's do."""
        paths = [Path(text)] if text.startswith("/") else []
        return next(filter(None, map(self.at, [*paths, *(place / text.lstrip("/") for place in self.places)])), [])

    def one(self, text: str, here: bool = False) -> Path:
        """The only file that a path means; `here`: below the split's folder."""
        found = self.at(self.below / text) if here else self.find(text)
        if len(found) > 1:
            raise _Unclear(f"{text} may be {' or '.join(map(str, found))}: give its ending, or rename one")
        if not found:
            kind = "label" if self.endings == LABEL_SUFFIXES else "photo"
            folder = self.folders.get((self.below / text).parent)
            raise _Unclear(f"there is no {kind} {text} in {self.below}"
                           + ("" if here else " or above it") + (folder.hint(Path(text).name) if folder else ""))
        return found[0]


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def spellings(path: Path) -> list[Path]:
    """The same path with accents as they are, as part of their letters, as signs of their own."""
    return [path, *(Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))]
