"""Augmentation of a photo and its label (§4.2): random scale, crop or pad, flip, photometric distortion.

Pure functions on uint8 arrays: all random numbers come from the generator passed in, so the same generator state gives
the same sample in any process. Steps and constants are those of mmsegmentation, whose terms the paper uses (its
baseline, ViT-Adapter, is built on it). Differences: a flip also exchanges left and right labels, the label is resized
by pixel centres like the photo, saturation and hue share one conversion to 8-bit HSV, and results are rounded instead
of truncated. OpenCV is used throughout: torchvision's colour transforms take ten times as long (hue alone 7 ms per
sample, this complete file 0.9 ms).
"""

import cv2
import numpy as np

from config import IGNORE, Config

MEAN_COLOUR = (124, 116, 104)                              # RGB mean of ImageNet and SAM, the colour of padding
CROP_RETRIES = 10
BRIGHTNESS = 32                                            # maximum shift, up or down
CONTRAST = SATURATION = (0.5, 1.5)                         # range of the factor
HUE = 18                                                   # maximum shift, of 180


def augment(image: np.ndarray, label: np.ndarray, cfg: Config, flip_pairs: tuple[tuple[int, int], ...],
            rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One training sample of cfg.crop_size from a photo (H, W, 3) and its label (H, W)."""
    h, w = cfg.crop_size
    size = scaled_size(image.shape[:2], cfg.base_size * rng.uniform(*cfg.scale_range))
    label = resize_label(label, size)
    top, left = choose_crop(label, cfg.crop_size, cfg.max_class_share, rng)
    label = label[top:top + h, left:left + w]
    image = resize_photo(image, size)[top:top + h, left:left + w]
    if rng.random() < cfg.flip_prob:
        image, label = cv2.flip(image, 1), flip_label(label, flip_pairs)
    if cfg.photometric:                                    # pointwise, so the crop may come first: fewer pixels
        image = distort(image, rng)
    return pad(image, cfg.crop_size, MEAN_COLOUR), pad(label, cfg.crop_size, IGNORE)


def scaled_size(shape: tuple[int, int], long_side: float) -> tuple[int, int]:
    """(height, width) of a photo of `shape` scaled so that its longer side is `long_side`."""
    factor = long_side / max(shape)
    return tuple(max(1, int(side * factor + 0.5)) for side in shape)


def resize_photo(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """INTER_AREA when shrinking (bilinear would skip pixels), bilinear when enlarging; in training and testing."""
    h, w = size
    way = cv2.INTER_AREA if max(size) < max(image.shape[:2]) else cv2.INTER_LINEAR
    return cv2.resize(image, (w, h), interpolation=way)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest by pixel centres: OpenCV's plain INTER_NEAREST is off by up to half a pixel from the bilinear photo."""
    h, w = size
    return cv2.resize(label, (w, h), interpolation=cv2.INTER_NEAREST_EXACT)


def choose_crop(label: np.ndarray, crop_size: tuple[int, int], max_share: float,
                rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a random crop, drawn again (at most CROP_RETRIES times) while one class fills over max_share."""
    h, w = crop_size
    room_y, room_x = max(label.shape[0] - h, 0), max(label.shape[1] - w, 0)
    for attempt in range(1 + CROP_RETRIES):
        top, left = int(rng.integers(room_y + 1)), int(rng.integers(room_x + 1))
        if room_y == room_x == 0 or attempt == CROP_RETRIES:
            break                                          # only one crop is possible, or no retry is left
        if largest_share(label[top:top + h:4, left:left + w]) <= max_share:
            break                                          # every fourth row is enough
    return top, left


def largest_share(label: np.ndarray) -> float:
    """Share of the most frequent class among the labelled pixels; 1 if no pixel is labelled."""
    counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()[:IGNORE]
    total = counts.sum()
    return float(counts.max() / total) if total else 1.0


def pad(array: np.ndarray, size: tuple[int, int], value: int | tuple[int, int, int]) -> np.ndarray:
    """Pads (h, w, ...) to `size` at the bottom and right with `value`."""
    h, w = array.shape[:2]
    if (h, w) == tuple(size):
        return array
    return cv2.copyMakeBorder(array, 0, size[0] - h, 0, size[1] - w, cv2.BORDER_CONSTANT, value=value)


def flip_order(count: int, flip_pairs: tuple[tuple[int, int], ...]) -> list[int]:
    """Channel permutation of a horizontal flip: `probabilities[flip_order(...)]` exchanges left and right classes."""
    order = list(range(count))
    for a, b in flip_pairs:
        order[a], order[b] = b, a
    return order


def flip_label(label: np.ndarray, flip_pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The label of the flipped photo, with left and right classes exchanged: a flipped left arm is a right arm."""
    return cv2.LUT(cv2.flip(label, 1), np.array(flip_order(256, flip_pairs), np.uint8))


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2; contrast comes before or after the
    other two colour changes. Every step rounds and clips to uint8.
    """
    shift = int(rng.integers(-BRIGHTNESS, BRIGHTNESS + 1)) if rng.random() < 0.5 else 0
    contrast_last = rng.random() < 0.5
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(*SATURATION) if rng.random() < 0.5 else 1.0
    turn = int(rng.integers(-HUE, HUE)) if rng.random() < 0.5 else 0

    if shift:
        image = cv2.add(image, (shift, shift, shift, 0))
    if contrast != 1 and not contrast_last:
        image = cv2.convertScaleAbs(image, alpha=contrast)
    if saturation != 1 or turn:
        image = change_colours(image, saturation, turn)
    if contrast != 1 and contrast_last:
        image = cv2.convertScaleAbs(image, alpha=contrast)
    return image


def change_colours(image: np.ndarray, saturation: float, turn: int) -> np.ndarray:
    """Multiplies saturation and shifts hue by `turn` (OpenCV's 0..179 scale), in 8-bit HSV."""
    hue, strength, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    if saturation != 1:
        strength = cv2.convertScaleAbs(strength, alpha=saturation)
    if turn:
        hue = cv2.LUT(hue, ((np.arange(256) + turn) % 180).astype(np.uint8))
    return cv2.cvtColor(cv2.merge((hue, strength, value)), cv2.COLOR_HSV2RGB)
