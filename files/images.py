"""How photos and labels are read, and what is said when they cannot be.

Photos: JPEG, PNG, WebP, BMP in any colour mode, as RGB uint8 (H, W, 3). Labels: 8-bit PNG, grey or palette, whose
pixel values are class numbers, as uint8 (H, W). Pillow opens all of them. The pixels of a whole JPEG are decoded by
OpenCV, in two thirds of the time; OpenCV 4 would also return one that was cut off, grey from there on.
"""

import io
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from config import IGNORE
from engine.errors import UserError

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 1 << 28                                       # phones take 200 megapixels; tiny files can claim more
ORIENTATION = 0x0112                                       # EXIF tag: which way up the camera was held
MODES = {"1": "1-bit", "L": "grey", "LA": "grey and alpha", "I": "16-bit", "I;16": "16-bit", "RGB": "colour (RGB)",
         "RGBA": "colour (RGBA)"}


def read_photo(path: str | Path) -> np.ndarray:
    """A photo as a viewer shows it: turned by its EXIF orientation."""
    rgb, image = _photo(path)
    return _turned(rgb, orientation(image))


def read_label(path: str | Path, num_classes: int) -> np.ndarray:
    """The class numbers of a label; a value that is neither a class nor 255 (ignore) is a fault."""
    image = _label(path)
    if image.mode not in ("L", "P") or (image.mode == "L" and _bit_depth(path) != 8):
        kind = f"{_bit_depth(path)}-bit" if image.mode == "L" else MODES.get(image.mode, image.mode)
        raise UserError(f"{path}: a {kind} picture; a label is an 8-bit grey or palette PNG of class numbers")
    label = np.array(image)
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
    rgb, image = _photo(path)
    if rgb.shape[:2] != label.shape:
        rgb = _turned(rgb, orientation(image))
    if rgb.shape[:2] != label.shape:
        raise UserError(f"{path}: {image.width} x {image.height} pixels, but its label {label_path} has "
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
        raise UserError(f"{path}: {_what_is_wrong(Path(path), error, PHOTO_FORMATS)}") from None


def _label(path: str | Path) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
        return image
    except Exception as error:                             # as above
        raise UserError(f"{path}: {_what_is_wrong(Path(path), error, ('PNG',))}") from None


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
