"""Augmentation against naive loops, CIHP's own mirrored labels and the documented ranges."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import augment
from config import Config
from datasets import LABEL_SETS

SAMPLES = Path(__file__).parents[2] / "shared/data/samples"
LEFT_RIGHT = ((14, 15), (16, 17), (18, 19))


class Script:
    """A random generator that returns the given values in order and records the range of each."""

    def __init__(self, *values):
        self.values, self.ranges = list(values), []

    def draw(self, low, high):
        self.ranges.append((low, high))
        return self.values.pop(0)

    def random(self):
        return self.draw(0, 1)

    def uniform(self, low, high):
        return self.draw(low, high)

    def integers(self, low, high=None):
        return self.draw(low, high) if high is not None else self.draw(0, low)


def photo(rng, h, w):
    return rng.integers(0, 256, (h, w, 3)).astype(np.uint8)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the real samples")
@pytest.mark.parametrize("split, name", [("Training", "0005008"), ("Training", "0012008"), ("Validation", "0002190"),
                                         ("Validation", "0026375")])
def test_flip_equals_cihps_own_mirrored_labels(split, name):
    folder = SAMPLES / "CIHP/instance-level_human_parsing" / split / "Category_ids"
    label = np.array(Image.open(folder / f"{name}.png"))
    theirs = np.array(Image.open(SAMPLES / f"flip/cihp_{name}_flipped_swapped.png"))
    pairs = LABEL_SETS["cihp"].flip_pairs
    assert np.array_equal(augment.flip_label(label, pairs), theirs)
    channels = np.eye(20, dtype=np.float32)[label].transpose(2, 0, 1)      # probabilities, for TTA
    swapped = channels[augment.flip_order(20, pairs)][:, :, ::-1]
    assert np.array_equal(swapped.argmax(0), theirs)


def test_flip_against_a_loop_and_twice():
    label = np.random.default_rng(0).integers(0, 256, (7, 11)).astype(np.uint8)
    swap = {14: 15, 15: 14, 16: 17, 17: 16, 18: 19, 19: 18}
    naive = np.array([[swap.get(int(v), int(v)) for v in row[::-1]] for row in label], np.uint8)
    assert np.array_equal(augment.flip_label(label, LEFT_RIGHT), naive)
    assert np.array_equal(augment.flip_label(augment.flip_label(label, LEFT_RIGHT), LEFT_RIGHT), label)


@pytest.mark.parametrize("size", [(24, 32), (40, 20), (8, 10), (20, 26)])
def test_label_is_read_at_pixel_centres(size):
    label = np.random.default_rng(1).integers(0, 20, (20, 26)).astype(np.uint8)
    (h, w), (big_h, big_w) = label.shape, size
    naive = [[label[int((y + 0.5) * h / big_h), int((x + 0.5) * w / big_w)] for x in range(big_w)]
             for y in range(big_h)]
    resized = augment.resize_label(label, size)
    assert np.array_equal(resized, naive)


def test_photo_is_enlarged_bilinearly():
    image, size = photo(np.random.default_rng(2), 8, 11), (19, 27)
    resized = augment.resize_photo(image, size)
    for y in range(size[0]):
        for x in range(size[1]):
            v = min(max((y + 0.5) * 8 / size[0] - 0.5, 0), 7)
            u = min(max((x + 0.5) * 11 / size[1] - 0.5, 0), 10)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, 7), min(left + 1, 10)
            a, b = v - top, u - left
            value = ((1 - a) * (1 - b) * image[top, left] + (1 - a) * b * image[top, right]
                     + a * (1 - b) * image[bottom, left].astype(float) + a * b * image[bottom, right])
            assert np.abs(resized[y, x] - value).max() <= 1.5


def test_photo_is_reduced_by_area_averaging():
    image = photo(np.random.default_rng(3), 320, 320)      # noise with a grey mean
    small = augment.resize_photo(image, (20, 20)).astype(float)
    assert np.abs(small - image.mean((0, 1))).max() < 40
    assert np.array_equal(augment.resize_photo(image, (320, 320)), image)


@pytest.mark.parametrize("shape, long_side, size", [((400, 300), 480, (480, 360)), ((300, 400), 240, (180, 240)),
                                                    ((1, 1000), 480, (1, 480)), ((7, 5), 10, (10, 7))])
def test_scaled_size_keeps_the_aspect(shape, long_side, size):
    assert augment.scaled_size(shape, long_side) == size


def test_crop_is_drawn_again_while_one_class_fills_it():
    label = np.zeros((64, 128), np.uint8)
    label[:, 64:] = 1                                      # only around the middle both are frequent
    cases = (0.75, (0, 32), (0, 0, 0, 10, 0, 32)), (1.0, (0, 0), (0, 0)), (0.75, (0, 0), (0, 0) * 11)
    for share, corner, draws in cases:
        script = Script(*draws)                            # at most ten more draws
        assert augment.choose_crop(label, (64, 64), share, script) == corner and not script.values
        assert set(script.ranges) == {(0, 1), (0, 65)}
    label[:], label[:4, :4], label[4:8, :4] = augment.IGNORE, 1, 2
    assert augment.largest_share(label) == 0.5             # ignored pixels do not count
    assert augment.largest_share(np.full((8, 8), augment.IGNORE, np.uint8)) == 1.0


@pytest.mark.parametrize("order", [0.0, 1.0])              # contrast before or after the colours
@pytest.mark.parametrize("shift, contrast", [(20, 1.37), (-32, 0.5), (32, 1.5), (-9, 1.01)])
def test_brightness_and_contrast_against_the_formula(order, shift, contrast):
    image = photo(np.random.default_rng(4), 33, 47)
    script = Script(0.0, shift, order, 0.0, contrast, 1.0, 1.0)
    brighter = np.clip(image.astype(float) + shift, 0, 255)
    assert np.abs(augment.distort(image, script) - np.clip(brighter * contrast, 0, 255)).max() <= 0.5 + 1e-4
    assert not script.values


def test_a_photo_without_distortion_is_unchanged():
    image = photo(np.random.default_rng(5), 33, 47)
    assert np.array_equal(augment.distort(image, Script(1.0, 1.0, 1.0, 1.0, 1.0)), image)


@pytest.mark.parametrize("factor, turn", [(0.6, None), (1.45, None), (None, -18), (None, 17), (0.7, 9), (1.3, -5)])
def test_saturation_and_hue_against_colorsys(factor, turn):
    image = photo(np.random.default_rng(6), 24, 24)
    drawn = [value for step in (factor, turn) for value in ((1.0,) if step is None else (0.0, step))]
    result = augment.distort(image, Script(1.0, 1.0, 1.0, *drawn))
    for pixel, changed in zip(image.reshape(-1, 3), result.reshape(-1, 3)):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        expected = colorsys.hsv_to_rgb((h + (turn or 0) / 180) % 1, min(1, s * (factor or 1)), v)
        assert np.abs(np.array(expected) * 255 - changed).max() <= 6       # 8-bit HSV: 2 degrees of hue per step


@pytest.mark.parametrize("flip", (True, False))
def test_scale_flip_padding_and_the_range_of_every_random_number(flip):
    image = np.zeros((100, 80, 3), np.uint8)
    image[:, 40:] = 200
    label = np.full((100, 80), 14, np.uint8)
    label[:, 40:] = 3
    yes, no = np.nextafter(0.5, 0), 0.5                    # every probability is 1/2
    script = Script(1.5, 0, 0, yes if flip else no, yes, 0, yes, yes, 1.0, yes, 1.0, yes, 0)
    cfg = Config(base_size=60, crop_size=(128, 128))
    out, numbers = augment.augment(image, label, cfg, LEFT_RIGHT, script)
    unit = (0, 1)
    assert script.ranges == [(0.5, 2.0), unit, unit, unit, unit, (-32, 33), unit, unit, (0.5, 1.5), unit, (0.5, 1.5),
                             unit, (-18, 18)]
    left, right = (3, 15) if flip else (14, 3)
    assert (numbers[:90, :36] == left).all() and (numbers[:90, 36:72] == right).all()
    assert (numbers[90:] == augment.IGNORE).all() and (numbers[:, 72:] == augment.IGNORE).all()
    assert (out[numbers == augment.IGNORE] == augment.MEAN_COLOUR).all()
    assert (out[0, 0] == (200 if flip else 0)).all() and (out[0, 71] == (0 if flip else 200)).all()
