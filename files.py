"""The files of a data set: where photos and labels lie (§4.1), how they are read, what is said when they cannot be.

Photos: JPEG, PNG, WebP, BMP in any colour mode, as RGB uint8 (H, W, 3). Labels: 8-bit PNG, grey or palette, whose
pixel values are class numbers, as uint8 (H, W). Pillow opens all of them. The pixels of a whole JPEG are decoded by
OpenCV, in two thirds of the time; OpenCV 4 would also return one that was cut off, grey from there on.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from config import Config

IGNORE = 255                                               # label of pixels that neither loss nor score counts
PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 1 << 28                                       # phones take 200 megapixels; tiny files can claim more
ORIENTATION = 0x0112                                       # EXIF tag: which way up the camera was held
MODES = {"1": "1-bit", "L": "grey", "LA": "grey and alpha", "I": "16-bit", "I;16": "16-bit", "RGB": "colour (RGB)",
         "RGBA": "colour (RGBA)"}


Image.core.set_blocks_max(1)                               # Pillow keeps a photo's memory for the next: without it, up
#                                                            to a third of the time of reading goes into fresh pages


class DataError(ValueError):
    """A data set or a file that cannot be used; the message is one line for the user."""


# ----------------------------------------------------------------------------------------------------------------------
# where the files lie

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
        raise DataError(f"data_root is not set: give the folder of the {cfg.dataset} data (data_root=/path/to/it)")
    root = Path(os.path.abspath(os.path.expanduser(cfg.data_root)))
    try:
        os.scandir(root).close()
    except OSError as error:
        raise DataError(f"data_root {root}: {error.strerror.lower()} "
                        "(data_root=/path/to/it says where the data is)") from None
    images_at, labels_at, lists_at = _candidates(cfg, split)
    images = _first(root, images_at, os.path.isdir)
    labels = _first(root, labels_at, os.path.isdir)
    listing = _first(root, lists_at, os.path.isfile)
    if images is None:
        raise DataError(_missing(root, images_at, f"{split} photos"))
    if labels is None:
        raise DataError(_missing(root, labels_at, f"{split} labels"))
    shared = images.name in ("Images", "JPEGImages") and images.parent.name not in ("Training", "Validation")
    if listing is None and (lists_at if cfg.dataset == "custom" else shared):    # shared: both splits in one folder
        raise DataError(_missing(root, lists_at, f"list of {split} names"))
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
        raise DataError(f"{folder}: the folder cannot be read ({error.strerror})") from None
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
        raise DataError(f"{path}: cannot be read as a list of names ({error})") from None
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


# ----------------------------------------------------------------------------------------------------------------------
# reading

def read_photo(path: str | Path) -> np.ndarray:
    """A photo as a viewer shows it: turned by its EXIF orientation."""
    rgb, image = _photo(path)
    return _turned(rgb, orientation(image))


def read_label(path: str | Path, num_classes: int) -> np.ndarray:
    """The class numbers of a label; a value that is neither a class nor 255 (ignore) is a fault."""
    image = _label(path)
    if image.mode not in ("L", "P") or (image.mode == "L" and _bit_depth(path) != 8):
        kind = f"{_bit_depth(path)}-bit" if image.mode == "L" else MODES.get(image.mode, image.mode)
        raise DataError(f"{path}: a {kind} picture; a label is an 8-bit grey or palette PNG of class numbers")
    label = np.array(image)
    if label.max() < num_classes:                          # a tenth of the time of what follows, and most often true
        return label
    strange = (label >= num_classes) & (label != IGNORE)
    if strange.any():
        values = np.unique(label[strange])
        raise DataError(f"{path}: holds {', '.join(map(str, values[:5]))}{', ...' if len(values) > 5 else ''} on "
                        f"{strange.mean():.2%} of its pixels; classes are 0 to {num_classes - 1}, {IGNORE} is ignored")
    return label


def read_photo_of(label: np.ndarray, path: str | Path, label_path: str | Path) -> np.ndarray:
    """The photo a label was drawn on: turned by its EXIF orientation only where that makes the sizes match."""
    rgb, image = _photo(path)
    if rgb.shape[:2] != label.shape:
        rgb = _turned(rgb, orientation(image))
    if rgb.shape[:2] != label.shape:
        raise DataError(f"{path}: {image.width} x {image.height} pixels, but its label {label_path} has "
                        f"{label.shape[1]} x {label.shape[0]}")
    return rgb


def orientation(image: Image.Image) -> int:
    """1 (as stored) to 8, see `_turned`."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:                                      # a damaged tag does not make the photo unusable
        return 1


def _photo(path: str | Path) -> tuple[np.ndarray, Image.Image]:
    """The pixels as stored, RGB, and the picture they are from, for its tags."""
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=PHOTO_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            rgb = _rgb_of_jpeg(image, data)
            return _rgb(image) if rgb is None else rgb, image
    except Exception as error:                             # damaged files make the decoders raise a dozen kinds
        raise DataError(f"{path}: {_what_is_wrong(Path(path), error, PHOTO_FORMATS)}") from None


def _label(path: str | Path) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
        return image
    except Exception as error:                             # as above
        raise DataError(f"{path}: {_what_is_wrong(Path(path), error, ('PNG',))}") from None


def _what_is_wrong(path: Path, error: Exception, formats: tuple[str, ...]) -> str:
    if isinstance(error, FileNotFoundError):
        return f"a link to {path.readlink()}, which does not exist" if os.path.islink(path) else "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a picture"
    if path.stat().st_size == 0:
        return "an empty file (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        advice = ", whatever its name says" if path.suffix.lower() in PHOTO_ENDINGS else ": convert it first"
        return f"not a picture in {', '.join(formats)} format{advice}"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels, make it smaller first ({' '.join(str(error).split())})"
    return f"damaged or cut off ({' '.join(str(error).split())})"


def _bit_depth(path: str | Path) -> int:
    """Of a PNG, from its header: Pillow stretches 1, 2 and 4-bit grey to 0..255, which ruins class numbers."""
    with open(path, "rb") as file:
        return file.read(25)[24]


def _rgb_of_jpeg(image: Image.Image, data: bytes) -> np.ndarray | None:
    """None if it is no JPEG in grey or colour, or its end marker is nowhere behind the start of its pixels."""
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return None
    at = 2
    while data[at:at + 1] == b"\xff" and data[at + 1:at + 2] != b"\xda":     # segments before them: EXIF, a thumbnail
        at += 2 + int.from_bytes(data[at + 2:at + 4], "big")
    if data.rfind(b"\xff\xd9", at) < 0:
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):                         # 16-bit grey, which Pillow's convert would clip at 255
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")                      # shown on white
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _turned(rgb: np.ndarray, way: int) -> np.ndarray:
    if way in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if way in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if way in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)
