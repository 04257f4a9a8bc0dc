"""How photos and labels are read, and what is said when they cannot be.

Photos: JPEG, PNG, WebP, BMP in any colour mode, as RGB uint8 (H, W, 3). Labels: 8-bit PNG, grey or palette, whose
pixel values are class numbers, as uint8 (H, W). Pillow decodes all of them: OpenCV takes two thirds of the time for a
JPEG, but returns one that was cut off as if it were whole, and knows no palette's numbers.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from config import IGNORE
from engine.errors import UserError

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 1 << 28                                       # phones take 200 megapixels; tiny files can claim more
MAX_TEXT = 1 << 28                                         # bytes; image generators keep their whole workflow in a PNG
ORIENTATION = 0x0112                                       # EXIF tag: which way up the camera was held

# How a PNG stores its pixels, in Pillow's words (raw modes).
LABEL_KINDS = ("L", "P", "P;1", "P;2", "P;4")
OTHER_KINDS = {"1": "1-bit", "L;2": "2-bit", "L;4": "4-bit", "I;16B": "16-bit", "LA": "grey and alpha",
               "LA;16B": "16-bit grey and alpha", "RGB": "colour (RGB)", "RGB;16B": "16-bit colour (RGB)",
               "RGBA": "colour (RGBA)", "RGBA;16B": "16-bit colour (RGBA)"}
TO_8_BITS = {"L;2": (85, 1), "L;4": (17, 1), "I;16B": (1, 256), "RGB;16B": (1, 256)}     # times, divided by
MUCH_IGNORED = 0.1                                         # of all pixels; outlines that nobody knows take a few percent


def read_photo(path: str | Path) -> np.ndarray:
    """A photo as a viewer shows it: turned by its EXIF orientation."""
    with _opened(path, PHOTO_FORMATS) as image:
        return _turned(_rgb(image), _orientation(image))


def read_label(path: str | Path, num_classes: int) -> np.ndarray:
    """The class numbers of a label; a value that is neither a class nor 255 (ignore) is a fault."""
    with _opened(path, ("PNG",)) as image:
        kind = _kind(image)
        label = np.array(image)
    if kind not in LABEL_KINDS:                            # Pillow stretches grey of few bits: no class numbers any more
        raise UserError(f"{path}: a {OTHER_KINDS.get(kind, kind)} picture; a label is an 8-bit grey or palette PNG of "
                        "class numbers")
    if label.max() < num_classes:                          # a tenth of the time of what follows, and most often true
        return label
    strange = (label >= num_classes) & (label != IGNORE)
    if strange.any():
        values = np.unique(label[strange])
        raise UserError(f"{path}: holds {', '.join(map(str, values[:5]))}{', ...' if len(values) > 5 else ''} on "
                        f"{strange.mean():.2%} of its pixels; classes are 0 to {num_classes - 1}, {IGNORE} is ignored")
    return label


def read_photo_of(label: np.ndarray, path: str | Path, label_path: str | Path) -> np.ndarray:
    """The photo a label was drawn on: turned by its EXIF orientation only where that makes the sizes match."""
    with _opened(path, PHOTO_FORMATS) as image:
        rgb = _rgb(image)
        if rgb.shape[:2] != label.shape:
            rgb = _turned(rgb, _orientation(image))
    if rgb.shape[:2] != label.shape:
        raise UserError(f"{path}: {image.width} x {image.height} pixels, but its label {label_path} has "
                        f"{label.shape[1]} x {label.shape[0]}")
    return rgb


def orientation(path: str | Path) -> int:
    """Of a photo, by its EXIF tag: 1 (as stored) to 8, see `_turned`."""
    with _opened(path, PHOTO_FORMATS) as image:
        return _orientation(image)


def doubt(counts: np.ndarray, classes: Sequence[str]) -> str:
    """What is strange about labels in which the values 0..255 occur `counts` times (256,), in words; "" if nothing is.

    Many tools write masks of two classes as 0 and 255, or background as 255 and the classes from 0.
    """
    seen, ignored = counts[:len(classes)] > 0, counts[IGNORE] / max(counts.sum(), 1)
    absent = [f"{k} {name}" for k, name in enumerate(classes) if not seen[k]]
    if len(classes) < 2 or seen.all() or seen.sum() > 1 and ignored < MUCH_IGNORED:
        return ""
    hint = f", and {ignored:.1%} of the pixels are {IGNORE}, which is ignored: classes are 0 to {len(classes) - 1}"
    return f"no label shows {', '.join(absent)}" + (hint if ignored else "")


class _Limits:
    """Pillow's limits are global. While a picture is read here, by however many threads, they are these; then they are
    what they were before, for whoever else uses Pillow in this process."""

    OURS = ((Image, "MAX_IMAGE_PIXELS", None),             # `_opened` has a limit of its own
            (PngImagePlugin, "MAX_TEXT_CHUNK", MAX_TEXT), (PngImagePlugin, "MAX_TEXT_MEMORY", MAX_TEXT))

    def __init__(self):
        self.lock, self.readers, self.theirs = threading.Lock(), 0, ()

    def __enter__(self):
        with self.lock:
            if not self.readers:
                self.theirs = [(module, name, getattr(module, name)) for module, name, _ in self.OURS]
                self._set(self.OURS)
            self.readers += 1

    def __exit__(self, *_):
        with self.lock:
            self.readers -= 1
            if not self.readers:
                self._set(self.theirs)

    @staticmethod
    def _set(limits):
        for module, name, value in limits:
            setattr(module, name, value)


_LIMITS = _Limits()


@contextlib.contextmanager
def _opened(path: str | Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """The picture of a file, not yet decoded. What is wrong with it, here or in the block, is a `UserError`."""
    try:
        with _LIMITS, Image.open(path, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}: {image.width} x {image.height} pixels are too many, make it smaller first")
            yield image
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: does not fit into the memory") from None
    except Exception as error:                             # damaged files make the decoder raise a dozen kinds
        raise UserError(f"{path}: {_what_is_wrong(Path(path), error, formats)}") from None


def _what_is_wrong(path: Path, error: Exception, formats: tuple[str, ...]) -> str:
    if isinstance(error, FileNotFoundError):
        return f"a link to {path.readlink()}, which does not exist" if os.path.islink(path) else "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a picture"
    if path.stat().st_size == 0:
        return "an empty file (0 bytes)"
    reason = _refusal(path, formats) if isinstance(error, Image.UnidentifiedImageError) else str(error)
    if not reason:
        advice = ", whatever its name says" if path.suffix.lower() in PHOTO_ENDINGS else ": convert it first"
        return f"not a picture in {', '.join(formats)} format{advice}"
    return f"damaged or cut off ({' '.join(reason.split())})"


def _refusal(path: Path, formats: tuple[str, ...]) -> str:
    """Why Pillow, which calls all such files unidentified, does not open one that begins as these do; "": none does."""
    with _LIMITS, open(path, "rb") as file:
        for decoder, accepts in (Image.OPEN[name] for name in formats):
            file.seek(0)
            if accepts(file.read(16)):
                file.seek(0)
                try:
                    decoder(file, "")
                except Exception as error:                 # as above
                    return str(error) or type(error).__name__
    return ""


def _kind(image: Image.Image) -> str:
    """How an opened PNG that is not yet decoded stores its pixels."""
    return image.tile[0][3] if image.tile else ""


def _rgb(image: Image.Image) -> np.ndarray:
    """The pixels as stored; what is transparent is white."""
    scale = TO_8_BITS.get(_kind(image))
    image.load()
    clear = image.info.get("transparency")                 # a colour in the file's own depth, or alpha of a palette
    if clear is not None and scale:
        clear = (np.array(clear) * scale[0] // scale[1]).tolist()
    if image.mode.startswith("I"):                         # 16-bit grey, which Pillow's convert would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if clear is not None:
        image.info["transparency"] = tuple(clear) if isinstance(clear, list) else clear
    if image.mode in ("RGBA", "LA", "PA") or clear is not None:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):   # transparent everywhere: the clipboard leaves alpha unused
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:                                      # a damaged tag does not make the photo unusable
        return 1


def _turned(rgb: np.ndarray, way: int) -> np.ndarray:
    if way in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if way in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if way in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)
