"""Augmentation against naive loops, CIHP's own mirrored labels and the documented distributions."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import augment
from config import Config
from datasets import LABEL_SETS, random_numbers

SAMPLES = Path(__file__).parents[2] / "shared/data/samples"
LEFT_RIGHT = ((14, 15), (16, 17), (18, 19))


class Script:
    """A random generator that returns the given values in order."""

    def __init__(self, *values):
        self.values = list(values)

    def random(self):
        return self.values.pop(0)

    def uniform(self, low, high):
        value = self.values.pop(0)
        assert low <= value <= high
        return value

    def integers(self, low, high=None):
        value = self.values.pop(0)
        assert (0 if high is None else low) <= value < (low if high is None else high)
        return value


def photo(rng, h, w):
    return rng.integers(0, 256, (h, w, 3)).astype(np.uint8)


# ---- flip

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


# ---- scale and crop

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
    label[:, 64:] = 1
    cases = (0.75, (0, 32), (0, 0, 0, 10, 0, 32)), (1.0, (0, 0), (0, 0)), (0.75, (0, 0), (0, 0) * 11)
    for share, corner, draws in cases:
        script = Script(*draws)                            # at most ten more draws
        assert augment.choose_crop(label, (64, 64), share, script) == corner and not script.values
    label[:], label[:4, :4], label[4:8, :4] = augment.IGNORE, 1, 2
    assert augment.largest_share(label) == 0.5             # ignored pixels do not count
    assert augment.largest_share(np.full((8, 8), augment.IGNORE, np.uint8)) == 1.0


# ---- photometric distortion

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


# ---- 2,000 draws

N = 2000


def not_uniform(values, low, high):
    """Kolmogorov-Smirnov: the distance to the uniform distribution in units of its 0.1 % bound."""
    values = np.sort((np.asarray(values) - low) / (high - low))
    steps = np.arange(len(values) + 1) / len(values)
    return max(np.abs(values - steps[1:]).max(), np.abs(values - steps[:-1]).max()) * np.sqrt(len(values)) / 1.95


def rate_is(share, expected, count=N):
    return abs(share - expected) < 3.3 * np.sqrt(expected * (1 - expected) / count)      # 0.1 %


def test_scale_flip_and_padding_of_2000_draws():
    cfg = Config(base_size=60, crop_size=(128, 128), photometric=False)    # every scaled photo fits
    image = np.zeros((100, 80, 3), np.uint8)
    image[:, 40:] = 200
    label = np.zeros((100, 80), np.uint8)
    label[:, :40], label[:, 40:] = 14, 3
    scales, flips = [], []
    for slot in range(N):
        out, numbers = augment.augment(image, label, cfg, LEFT_RIGHT, random_numbers("augment", 0, 0, slot))
        known = numbers != augment.IGNORE
        h, w = known.any(1).sum(), known.any(0).sum()
        assert known[:h, :w].all() and (out[~known] == augment.MEAN_COLOUR).all()        # bottom and right
        assert abs(w - 0.8 * h) <= 1
        scales.append(h / 60)
        flips.append(numbers[0, 0] == 3)
        left, right = (3, 15) if flips[-1] else (14, 3)
        assert numbers[0, 0] == left and numbers[0, w - 1] == right
        assert out[0, 0, 0] == (200 if flips[-1] else 0)
    assert not_uniform(np.array(scales) + np.random.default_rng(0).uniform(-0.5, 0.5, N) / 60, 0.5, 2.0) < 1
    assert 0.49 < min(scales) < 0.51 and 1.99 < max(scales) < 2.01
    assert rate_is(np.mean(flips), 0.5)
    assert rate_is(np.mean(np.array(scales) < 1), 1 / 3)


def test_place_of_the_crop_is_uniform():
    cfg = Config(base_size=96, scale_range=(2.0, 2.0), crop_size=(96, 96), photometric=False, flip_prob=0.0)
    y, x = np.mgrid[:192, :192]
    image = np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)
    label = np.random.default_rng(0).integers(0, 5, (192, 192)).astype(np.uint8)     # no class fills a crop: no retries
    corners = [augment.augment(image, label, cfg, (), random_numbers("augment", 0, 1, slot))[0][0, 0, :2]
               for slot in range(N)]
    top, left = np.array(corners, float).T
    noise = np.random.default_rng(1).uniform(0, 1, (2, N))
    assert not_uniform(top + noise[0], 0, 97) < 1 and not_uniform(left + noise[1], 0, 97) < 1
    assert abs(np.corrcoef(top, left)[0, 1]) < 3.3 / np.sqrt(N)


def test_colours_of_2000_draws():
    """Brightness, contrast, saturation and hue, measured on two greys and one colour."""
    image = np.array([[(40, 40, 40), (130, 130, 130), (130, 90, 90)]], np.uint8)
    shifts, contrasts, saturations, hues = [], [], [], []
    for slot in range(N):
        dark, light, colour = augment.distort(image, random_numbers("augment", 0, 2, slot))[0].astype(float)
        contrast = (light[0] - dark[0]) / 90
        shift = (light[0] + dark[0]) / 2 / contrast - 85
        contrasts.append(contrast)
        shifts.append(shift)
        h, s, _ = colorsys.rgb_to_hsv(*colour / 255)
        hues.append((h * 180 + 90) % 180 - 90)
        if abs(shift) < 0.6 and abs(contrast - 1) < 0.006:               # the others change a colour's saturation
            saturations.append(s / (40 / 130))
    contrasts, shifts, saturations, hues = map(np.array, (contrasts, shifts, saturations, hues))

    changed = contrasts[np.abs(contrasts - 1) > 0.02]
    assert rate_is(len(changed) / N, 0.5 * (1 - 0.04)) and not_uniform(changed, 0.495, 1.505) < 1.2
    assert 0.48 < changed.min() < 0.51 and 1.49 < changed.max() < 1.52
    exact = np.abs(contrasts - 1) < 0.006
    brighter = shifts[exact & (np.abs(shifts) > 1)]
    assert rate_is(len(brighter) / exact.sum(), 0.5 * 62 / 65, exact.sum())
    assert not_uniform(brighter, -32.5, 32.5) < 1.2 and 31 < -brighter.min() < 33 and 31 < brighter.max() < 33
    stronger = saturations[np.abs(saturations - 1) > 0.05]
    assert rate_is(len(stronger) / len(saturations), 0.5 * 0.9, len(saturations))
    assert not_uniform(stronger, 0.48, 1.52) < 1.2 and 0.47 < stronger.min() < 0.53 and 1.47 < stronger.max() < 1.53
    turned = hues[np.abs(hues) > 1.5]
    assert rate_is(len(turned) / N, 0.5 * 33 / 36) and -19.5 < hues.min() < -15 and 14 < hues.max() < 18.5
    assert not_uniform(turned, -18.5, 17.5) < 1.6                        # 8-bit hues are coarse
