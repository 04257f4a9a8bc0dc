"""How photos and labels are read, and what is said when they cannot be.

Photos: JPEG, PNG, WebP, BMP in any colour mode (to be parsed: many more formats), as RGB uint8 (H, W, 3). Labels: 8-bit
PNG, grey or palette, whose pixel values are class numbers, as uint8 (H, W). Pillow decodes all of them: OpenCV takes two
thirds of the time for a JPEG, but returns one that was cut off as if it were whole, and knows no palette's numbers.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from config import IGNORE
from errors import UserError

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")              # of a data set
Image.init()
MORE_FORMATS = ("AVIF", "GIF", "JPEG2000", "PCX", "PPM", "PSD", "QOI", "SGI", "TIFF", "TGA")
ALL_FORMATS = PHOTO_FORMATS + tuple(name for name in MORE_FORMATS if name in Image.OPEN)     # of what is to be parsed
ALL_ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in (*ALL_FORMATS, "MPO")}
MAX_PIXELS = 1 << 28                                       # phones take 200 megapixels; tiny files can claim more
ORIENTATION = 0x0112                                       # EXIF tag: which way up the camera was held

# How a PNG stores its pixels, in Pillow's words (raw modes).
LABEL_KINDS = ("L", "P", "P;1", "P;2", "P;4")
OTHER_KINDS = {"1": "1-bit", "L;2": "2-bit", "L;4": "4-bit", "I;16B": "16-bit", "LA": "grey and alpha",
               "LA;16B": "16-bit grey and alpha", "RGB": "colour (RGB)", "RGB;16B": "16-bit colour (RGB)",
               "RGBA": "colour (RGBA)", "RGBA;16B": "16-bit colour (RGBA)"}
TO_8_BITS = {"1": 255, "L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}        # what Pillow multiplies their values by

# Pillow's limits against small files that unpack into all of the memory hold for a whole process, its threads and forks.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2                   # it refuses twice as many, and would warn from here on
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY           # image generators keep a whole workflow in one


class NotAPicture(UserError):
    """A file in another format than those asked for, or no picture at all."""


def read_photo(path: str | Path, formats: tuple[str, ...] = PHOTO_FORMATS) -> np.ndarray:
    """A photo as a viewer shows it: turned by its EXIF orientation; of a moving picture the first frame."""
    with _opened(path, formats) as image:
        return as_shown(image)


def as_shown(image: Image.Image) -> np.ndarray:
    """The pixels of a picture as a viewer shows it: what is transparent in white, turned by its EXIF orientation."""
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


@contextlib.contextmanager
def _opened(path: str | Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """The picture of a file, not yet decoded. What is wrong with it, here or in the block, is a `UserError`."""
    try:
        with Image.open(path, formats=formats) as image:
            yield image
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:                             # damaged files make the decoder raise a dozen kinds
        kind, reason = UserError, _what_is_wrong(Path(path), error, formats)
        if not reason:
            advice = ", whatever its name says" if Path(path).suffix.lower() in PHOTO_ENDINGS else ": convert it first"
            kind, reason = NotAPicture, f"not a picture in {', '.join(formats)} format{advice}"
        raise kind(f"{path}: {reason}") from None


def _what_is_wrong(path: Path, error: Exception, formats: tuple[str, ...]) -> str:
    """Why a file could not be read; "": it is in none of these formats."""
    if isinstance(error, FileNotFoundError):
        return f"a link to {path.readlink()}, which does not exist" if os.path.islink(path) else "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a picture"
    if path.stat().st_size == 0:
        return "an empty file (0 bytes)"
    if isinstance(error, MemoryError):
        return "does not fit into the memory"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels, make it smaller first ({error})"
    if isinstance(error, Image.UnidentifiedImageError):
        reason = _refusal(path, formats)
    else:
        reason = str(error) or type(error).__name__
    return reason and f"damaged or cut off ({' '.join(reason.split())})"


def _refusal(path: Path, formats: tuple[str, ...]) -> str:
    """Why a file that begins like one of these is not opened, in its decoder's words: `Image.open` has none. "": no such
    file."""
    with open(path, "rb") as file:
        for decoder, begins in (Image.OPEN[name] for name in formats):
            file.seek(0)
            if begins and begins(file.read(16)):           # TGA begins with nothing of its own
                file.seek(0)
                try:
                    decoder(file, "")
                except Exception as error:                 # as above
                    return str(error) or type(error).__name__
    return ""


def _kind(image: Image.Image) -> str:
    """How an opened PNG that is not yet decoded stores its pixels; "" for a picture that is in the memory."""
    tile = getattr(image, "tile", None)
    return tile[0][3] if tile else ""


def _rgb(image: Image.Image) -> np.ndarray:
    """The pixels as stored, of 8 bits; what is transparent is white."""
    kind, clear = _kind(image), image.info.get("transparency")           # a value as it is stored, or alpha of a palette
    if kind == "I;16B" or image.mode.startswith("I;16"):   # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(image)
        grey = np.where(values == clear, 255, values >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F", "LAB"):
        raise UserError(f"pixels of a kind (Pillow's {image.mode}) without one way to be shown: convert it to 8-bit RGB")
    image.load()
    if clear is not None and kind in TO_8_BITS:
        clear = np.minimum(np.array(clear) * TO_8_BITS[kind], 255).astype(int).tolist()
        image.info["transparency"] = tuple(clear) if isinstance(clear, list) else clear
    if image.mode in ("RGBA", "LA") or clear is not None:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):   # all transparent: what writes a clipboard leaves alpha unused
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        way = image.getexif().get(ORIENTATION, 1)
        return way if way in range(1, 9) else 1            # some cameras write 0
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
