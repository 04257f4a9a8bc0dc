"""Data sets (§4.1): label sets, folder layouts, reading, the training loader.

    python datasets.py --cfg configs/cihp.yaml             # checks a data set on disk, see check_data.py

    pairs = open_split(cfg, "train")                       # len(pairs), pairs.read(i), pairs.name(i)
    for image, label, names in train_loader(cfg, pairs):   # uint8 (b, 3, h, w), uint8 (b, h, w), without end

A fault in the data raises `DataError` with one line that names the file and what to do. Photos are RGB uint8 (H, W, 3),
labels uint8 (H, W): the class number, or 255 for pixels that do not count.
"""

import itertools
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from augment import IGNORE, augment, flip_label
from config import Config, ConfigError

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class DataError(ValueError):
    """A data set or a file that cannot be used; the message is one line for the user."""


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
    return LABEL_SETS["lip" if cfg.dataset == "synthetic" else cfg.dataset]


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
# where the files lie

def _unpacked(folders: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(f"{folder}{name}" for folder in folders)


_LIP = ("", "LIP/", "images/", "segmentations/", "data/", "images_labels/", "TrainVal_images/", "TrainVal_images/TrainVal_images/",
        "TrainVal_parsing_annotations/", "TrainVal_parsing_annotations/TrainVal_parsing_annotations/")
_CIHP = ("", "instance-level_human_parsing/", "instance-level_human_parsing/instance-level_human_parsing/", "CIHP/",
         "CIHP/instance-level_human_parsing/")
_PPP = ("", "pascal_person_part/", "pascal_person_part/pascal_person_part/", "VOCdevkit/VOC2010/",
        "VOCdevkit/VOC2012/", "VOC2010/", "VOC2012/", "pascal/")

# Below data_root, the official place first; {split} is train or val, {Split} Training or Validation.
LAYOUTS = {
    "lip": (_unpacked(_LIP, "{split}_images") + ("{Split}/Images",),
            _unpacked(_LIP, "{split}_segmentations") + ("{Split}/Category_ids",),
            _unpacked(_LIP, "{split}_id.txt") + ("{Split}/{split}_id.txt",)),
    "cihp": (_unpacked(_CIHP, "{Split}/Images") + ("{split}_images", "Images", "CIHP_4w/Images"),
             _unpacked(_CIHP, "{Split}/Category_ids") + ("{split}_segmentations", "Category_ids", "CIHP_4w/Category_ids"),
             _unpacked(_CIHP, "{Split}/{split}_id.txt") + _unpacked(_CIHP, "{split}_id.txt")
             + ("lists/{split}_id.txt", "CIHP_4w/lists/{split}_id.txt")),
    "ppp": (_unpacked(_PPP, "JPEGImages") + ("{split}_images",),
            _unpacked(_PPP, "pascal_person_part_gt") + _unpacked(_PPP, "SegmentationPart") + ("{split}_segmentations",),
            tuple(f"{folder}{name}" for name in ("{split}_id.txt", "{split}.txt") for folder in
                  _unpacked(_PPP, "pascal_person_part_trainval_list/") + ("pascal/list/", "list/", ""))),
}


@dataclass(frozen=True)
class Place:
    """The folders of one split."""
    images: Path
    labels: Path
    listing: Path | None                                   # None: every photo of the folder


def find_split(cfg: Config, split: str) -> Place:
    """The place of a split on disk; what is missing is reported with all the places looked at."""
    root = Path(cfg.data_root).expanduser()
    if not cfg.data_root:
        raise DataError(f"data_root is not set: give the folder of the {cfg.dataset} data set (in the config, or data_root=...)")
    if not root.is_dir():
        raise DataError(f"data_root {root}: no such folder")
    if cfg.dataset == "custom":
        images, labels, listing = ((cfg.train_images, cfg.train_labels, cfg.train_list) if split == "train" else
                                   (cfg.val_images, cfg.val_labels, cfg.val_list))
        kinds = (images,), (labels,), (listing,) if listing else ()
    else:
        words = {"split": split, "Split": {"train": "Training", "val": "Validation"}[split]}
        kinds = tuple(tuple(path.format(**words) for path in kind) for kind in LAYOUTS[cfg.dataset])
    images = _first(root, kinds[0], f"{split} photos")
    labels = _first(root, kinds[1], f"{split} labels")
    shared = cfg.dataset != "custom" and images.name in ("JPEGImages", "Images") and images.parent.name != words["Split"]
    if not kinds[2] or (cfg.dataset != "custom" and not shared and not any((root / path).is_file() for path in kinds[2])):
        return Place(images, labels, None)
    return Place(images, labels, _first(root, kinds[2], f"list of {split} names", is_list=True))


def _first(root: Path, places: tuple[str, ...], what: str, is_list: bool = False) -> Path:
    for base in (root, root / root.name):                  # archives often unpack into a folder of their own name
        for place in places:
            path = base / place
            if path.is_file() if is_list else path.is_dir():
                return path
    hint = ""
    if any((root / place).parent.joinpath("Categories").is_dir() for place in places):
        hint = "; Categories holds colour pictures for people, the class numbers are in Category_ids"
    raise DataError(f"{root}: no {what}, looked for {', '.join(dict.fromkeys(places))} (also below {root.name}/){hint}")


def match_files(place: Place) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(name, photo file, label file) of a split in its order, and every fault of names in words."""
    photos, faults = _by_stem(place.images, PHOTO_ENDINGS)
    labels, more = _by_stem(place.labels, (".png",))
    faults += more
    names = sorted(photos)
    if place.listing is not None:
        names, more = _read_list(place.listing)
        faults += more
    pairs = []
    for name in names:
        where = f"{place.listing} names it, but " if place.listing else ""
        if name not in photos:
            faults.append(f"{place.images / name}: {where}there is no photo of this name")
        elif name not in labels:
            faults.append(f"{place.labels / name}.png: {where}there is no label of this name")
        else:
            pairs.append((name, photos[name], labels[name]))
    if place.listing is None:
        faults += [f"{place.labels / labels[name]}: no photo belongs to this label" for name in sorted(labels.keys() - photos.keys())]
    if not names:
        faults.append(f"{place.listing or place.images}: empty, there is nothing to read")
    return pairs, faults


def _by_stem(folder: Path, endings: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """File names by their stem. Hidden files (.DS_Store, ._x.jpg) do not count, endings may be in capitals."""
    found, faults = {}, []
    try:
        files = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    for file in files:
        stem, ending = Path(file).stem, Path(file).suffix.lower()
        if file.startswith(".") or ending not in endings:
            continue
        if stem in found:
            faults.append(f"{folder / file}: {found[stem]} has the same name, one of them must go")
        found[stem] = file
    return found, faults


def _read_list(path: Path) -> tuple[list[str], list[str]]:
    """Names of a list, one a line: bare, with an ending, or a photo's and a label's path side by side."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of names ({error})") from None
    names, faults = {}, []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        first = line.split()[0]
        name = Path(first if Path(first).suffix.lower() in PHOTO_ENDINGS else line.strip()).name
        name = Path(name).stem if Path(name).suffix.lower() in PHOTO_ENDINGS else name
        if name in names:
            faults.append(f"{path}, line {number}: {name} stands there twice (first in line {names[name]})")
        names.setdefault(name, number)
    return list(names), faults


# ----------------------------------------------------------------------------------------------------------------------
# reading

def read_photo(path: str | Path) -> np.ndarray:
    """A photo as a viewer shows it: turned by its EXIF orientation."""
    image = _open(path, PHOTO_FORMATS)
    return _turned(_rgb(image), _orientation(image))


def read_label(path: str | Path, num_classes: int) -> np.ndarray:
    """An 8-bit index or palette PNG."""
    image = _open(path, ("PNG",))
    with open(path, "rb") as file:
        depth = file.read(25)[24]                          # Pillow stretches 1, 2 and 4-bit grey, which ruins numbers
    if image.mode not in ("L", "P") or (image.mode == "L" and depth != 8):
        kind = {"I;16": "16-bit grey", "I": "16-bit grey"}.get(image.mode, f"{depth}-bit {image.mode}")
        raise DataError(f"{path}: a {kind} picture, a label must be an 8-bit PNG of class numbers (grey or palette)")
    label = np.array(image)
    wrong = [v for v in np.flatnonzero(np.bincount(label.ravel(), minlength=256)) if num_classes <= v != IGNORE]
    if wrong:
        raise DataError(f"{path}: holds the value {wrong[0]}, the {num_classes} classes are 0 to {num_classes - 1} "
                        f"({IGNORE}: ignored)")
    return label


def read_pair(photo: str | Path, label: str | Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A labelled photo, turned by its EXIF orientation only where that makes it match its label."""
    numbers = read_label(label, num_classes)
    image = _open(photo, PHOTO_FORMATS)
    rgb = _rgb(image)
    if rgb.shape[:2] != numbers.shape:
        rgb = _turned(rgb, _orientation(image))
    if rgb.shape[:2] != numbers.shape:
        raise DataError(f"{photo}: {image.width} x {image.height} pixels, but its label {label} has "
                        f"{numbers.shape[1]} x {numbers.shape[0]}")
    return rgb, numbers


def _open(path: str | Path, formats: tuple[str, ...]) -> Image.Image:
    path = Path(path)
    try:
        with Image.open(path, formats=formats) as image:
            image.load()
        return image
    except Exception as error:                             # Pillow's decoders raise a dozen kinds on damaged files
        raise DataError(f"{path}: {_what_is_wrong(path, error, formats)}") from None


def _what_is_wrong(path: Path, error: Exception, formats: tuple[str, ...]) -> str:
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which does not exist"
    if not path.exists():
        return "no such file"
    if path.is_dir():
        return "a folder, not a picture"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if path.stat().st_size == 0:
        return "an empty file (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a picture in {' or '.join(formats)} format, whatever its name says"
    return f"damaged or cut off ({' '.join(str(error).split())})"


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):                         # 16-bit grey, which Pillow would clip at 255
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")                      # on white, as most viewers show it
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:                                      # a damaged tag does not make the photo unusable
        return 1


def _turned(rgb: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)


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
        return read_pair(self.place.images / photo, self.place.labels / label, self.num_classes)


class DrawnSet:
    """The synthetic data set: figures drawn when asked for. All runs are scored on the same ones."""

    def __init__(self, cfg: Config, split: str):
        self.count = cfg.synthetic_train if split == "train" else cfg.synthetic_val
        self.seed = cfg.seed if split == "train" else 2**31 - 1
        self.size = cfg.synthetic_size

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{i:06d}"

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        import synthetic
        return synthetic.draw(self.seed, i, self.size)


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
    """Which sample stands where: endless, fixed by the seed, (index, iteration, slot) triples in micro-batches.

    Batch `iteration` takes the positions iteration * batch_size + slot of an endless row of shuffled epochs. Rank r takes
    a block of slots, one micro-batch of it per accumulation step; together they are always the same batch.
    """

    def __init__(self, count: int, cfg: Config, rank: int = 0, world: int = 1, start_iter: int = 0):
        parts = world * cfg.accum_steps
        if cfg.batch_size % parts:
            raise ConfigError(f"batch_size ({cfg.batch_size}) must be a multiple of processes x accum_steps "
                              f"({world} x {cfg.accum_steps})")
        self.count, self.seed, self.batch, self.start_iter = count, cfg.seed, cfg.batch_size, start_iter
        self.micro = cfg.batch_size // parts
        self.steps = range(rank * cfg.accum_steps, (rank + 1) * cfg.accum_steps)
        self.epoch, self.order = -1, np.empty(0, int)

    def __iter__(self):
        for iteration in itertools.count(self.start_iter):
            for step in self.steps:
                slots = range(step * self.micro, (step + 1) * self.micro)
                yield [(self.index(iteration * self.batch + slot), iteration, slot) for slot in slots]

    def index(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, generator("order", self.seed, epoch).permutation(self.count)
        return int(self.order[place])


def generator(purpose: str, *key: int) -> np.random.Generator:
    """Random numbers that depend on the key alone; the purpose keeps (seed, epoch) and (seed, iteration, 0) apart."""
    return np.random.default_rng((sum(purpose.encode()), *key))


class TrainSet(Dataset):
    """Augmented samples by (index, iteration, slot)."""

    def __init__(self, pairs: PairSet | DrawnSet, cfg: Config):
        self.pairs, self.cfg, self.flip_pairs = pairs, cfg, label_set(cfg).flip_pairs

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, str]:
        index, iteration, slot = key
        image, label = self.pairs.read(index)
        image, label = augment(image, label, self.cfg, self.flip_pairs,
                               generator("augment", self.cfg.seed, iteration, slot))
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), torch.from_numpy(label), self.pairs.name(index)


class _Reported(Dataset):
    """Hands a DataError over as a value: raised in a worker it would reach the user as that worker's traceback."""

    def __init__(self, samples: TrainSet):
        self.samples = samples

    def __getitems__(self, keys: list[tuple[int, int, int]]):
        try:
            images, labels, names = zip(*(self.samples[key] for key in keys))
            return torch.stack(images), torch.stack(labels), list(names)
        except DataError as error:
            return error


def train_loader(cfg: Config, pairs: PairSet | DrawnSet, rank: int = 0, world: int = 1, start_iter: int = 0):
    """Endless micro-batches (image uint8 (b, 3, h, w), label uint8 (b, h, w), names) of this process."""
    order = BatchOrder(len(pairs), cfg, rank, world, start_iter)
    warnings.filterwarnings("ignore", message="This DataLoader will create")    # `workers` is the user's choice
    loader = DataLoader(
        _Reported(TrainSet(pairs, cfg)), batch_sampler=order, num_workers=cfg.workers, collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(), worker_init_fn=_start_worker,
        generator=torch.Generator())                       # its own: the run's random state must not depend on loaders
    return _raise_faults(loader)


def _raise_faults(loader: DataLoader):
    try:
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError("a loader process was ended by the system, usually for want of memory (or of shared memory, "
                        f"/dev/shm): try fewer workers ({' '.join(str(error).split())})") from None


def _as_it_is(batch):
    return batch


def _start_worker(_):
    cv2.setNumThreads(0)                                   # workers are the parallelism; OpenCV's threads would fight
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C ends the main process, which ends the workers


if __name__ == "__main__":
    import check_data                                      # imports this file in turn, so only when it is the program
    sys.exit(check_data.main(sys.argv[1:]))
