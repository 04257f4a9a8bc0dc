"""Reading photos and labels, with clear errors.

Photos: JPEG, PNG, WebP, BMP in any colour mode (to be parsed: many more formats), as RGB uint8 (H, W, 3). Labels: 8-bit
PNG, grey or palette, whose pixel values are class numbers, as uint8 (H, W). Pillow decodes all of them: OpenCV takes
two thirds of the time for a JPEG, but returns one that was cut off as if it were complete, and knows no palette's
numbers.
"""

import errno
import io
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, PngImagePlugin

from config import IGNORE
from errors import UserError

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")              # of a data set
Image.init()
MORE_FORMATS = ("AVIF", "GIF", "JPEG2000", "PCX", "PPM", "PSD", "QOI", "SGI", "TIFF", "TGA")
ALL_FORMATS = PHOTO_FORMATS + tuple(name for name in MORE_FORMATS if name in Image.OPEN)     # of what is to be parsed
ALL_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in (*ALL_FORMATS, "MPO")}
MAX_PIXELS = 1 << 28                                       # phones take 200 megapixels; tiny files can claim more

# System errors that may pass, as of a file server that is away, and the seconds until each further try.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.EHOSTDOWN, errno.ENOTCONN}
RETRY_AFTER = (1, 3, 10)
REDUCED, BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, DNG_VERSION = 254, 258, 259, 262, 50706    # tags of a TIFF
OLD_JPEG, WHITE_IS_ZERO = 6, 0                             # values of two of them; Canon's previews are old-style JPEG
T = TypeVar("T")
Source = str | Path | bytes | Image.Image                  # a path, the bytes of a file, an image that was opened

TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}                                   # EXIF orientation: Pillow's name of the turn
# How a PNG stores its pixels, in Pillow's words (raw modes).
LABEL_KINDS = ("L", "P", "P;1", "P;2", "P;4")

# Pillow's limits against small files that fill the memory are for the whole process.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2                   # it refuses twice as many, and would warn from here on
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY           # image generators keep a workflow in one


def read_photo(source: Source, formats: tuple[str, ...] = PHOTO_FORMATS) -> np.ndarray:
    """A photo as a viewer shows it: transparent pixels in white, turned by its EXIF orientation; the first frame of an
    animation.
    """
    return _decoded(source, formats, lambda image: _rgb(image, turn=True))


def read_label(path: str | Path, num_classes: int) -> np.ndarray:
    """The class numbers of a label; a value that is neither a class nor 255 (ignore) is a fault."""
    def decode(image: Image.Image) -> tuple[str, np.ndarray]:
        return _kind(image), np.array(image)

    kind, label = _decoded(path, ("PNG",), decode)
    if kind not in LABEL_KINDS:                            # Pillow rescales low-bit grey, destroying class numbers
        raise UserError(f"{path}: has {kind} pixels; a label is an 8-bit grey or palette PNG of class numbers "
                        "(docs/data.md converts colours)")
    if label.max() < num_classes:                          # fast path
        return label
    wrong = (label >= num_classes) & (label != IGNORE)
    if wrong.any():
        values = np.unique(label[wrong])
        raise UserError(f"{path}: holds {', '.join(map(str, values[:5]))}{', ...' if len(values) > 5 else ''} on "
                        f"{wrong.mean():.2%} of its pixels; classes are 0 to {num_classes - 1}, {IGNORE} is ignored")
    return label


def read_photo_of(label: np.ndarray, path: str | Path, label_path: str | Path) -> np.ndarray:
    """The photo of a label, turned by its EXIF orientation only where that makes the sizes match."""
    rgb = _decoded(path, PHOTO_FORMATS, lambda image: _rgb(image, turn=image.size[::-1] != label.shape))
    if rgb.shape[:2] != label.shape:
        raise UserError(f"{path}: {rgb.shape[1]} x {rgb.shape[0]} pixels, but its label {label_path} has "
                        f"{label.shape[1]} x {label.shape[0]}")
    return rgb


def _decoded(source: Source, formats: tuple[str, ...], decode: Callable[[Image.Image], T]) -> T:
    """`decode` of an opened image. A fault of the file is a `UserError`; one that may pass is retried."""
    name = source if isinstance(source, str | Path) else "the photo"
    for delay in (*RETRY_AFTER, None):
        try:
            if isinstance(source, Image.Image):
                return decode(source)
            with _open(source) as file, Image.open(file, formats=formats) as image:
                return decode(image)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except Exception as error:                         # decoders raise many exception types on damaged files
            if delay is None or getattr(error, "errno", None) not in TRANSIENT:
                raise UserError(f"{name}: {_fault(error, formats)}") from None
            time.sleep(delay)


def _open(source: str | Path | bytes) -> io.BufferedIOBase:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _fault(error: Exception, formats: tuple[str, ...]) -> str:
    """Why an image could not be read."""
    if isinstance(error, MemoryError):
        return "does not fit in memory"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image in {', '.join(formats)} format, or damaged in its first bytes: convert it first"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels, make it smaller first ({error})"
    return f"damaged or cut off ({' '.join((str(error) or type(error).__name__).split())})"


def _kind(image: Image.Image) -> str:
    """How an opened PNG that is not yet decoded stores its pixels; "" for a picture that is in the memory."""
    tile = getattr(image, "tile", None)
    return tile[0][3] if tile else ""


def _rgb(image: Image.Image, turn: bool) -> np.ndarray:
    """The pixels in 8 bits, as stored or turned by the EXIF orientation; transparent ones are white."""
    tags = getattr(image, "tag_v2", {})                    # of a TIFF
    if tags.get(REDUCED, 0) & 1 or tags.get(COMPRESSION) == OLD_JPEG or DNG_VERSION in tags:
        raise UserError("a camera's raw file, of which only a thumbnail could be read: convert it first")
    kind, clear = _kind(image), image.info.get("transparency")          # a value as it is stored, or alpha of a palette
    way = image.getexif().get(0x0112)                      # ImageOps.exif_transpose fails for any damaged tag
    image = image.transpose(Image.Transpose[TURNS[way]]) if turn and way in TURNS else image
    if kind == "I;16B" or image.mode.startswith("I;16"):   # grey of more than 8 bits, which Pillow would clip at 255
        values, bits = np.asarray(image), tags.get(BITS_PER_SAMPLE, (16,))[0]
        grey = np.where(values == clear, 255, values >> (bits - 8)).astype(np.uint8)
        grey = 255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey              # Pillow inverts 8 bits only
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F", "LAB"):
        raise UserError(f"unsupported pixel format (Pillow's {image.mode}): convert it to 8-bit RGB")
    image.load()
    if image.mode in ("RGBA", "LA") or clear is not None and kind != "RGB;16B":             # whose key Pillow misreads
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):   # all transparent: clipboard tools leave alpha at 0
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
