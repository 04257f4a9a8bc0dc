"""Label sets, folder layouts, reading, the check of a data set with planted faults, and the training order."""

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import datasets
from config import Config, from_dict
from datasets import LABEL_SETS, BatchOrder, LabelSet, TrainSet, label_set, open_split, train_loader
from errors import UserError
from files.images import ORIENTATION, read_label, read_photo

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT.parent / "shared/data/samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the real samples")
CLASSES = ("background", "left hand", "right hand", "hat")


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))


def numbers(seed, size=(40, 30), classes=4):
    return Image.fromarray(np.random.default_rng(seed).integers(0, classes, (size[1], size[0])).astype(np.uint8))


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def make_custom(root, train=6, val=2):
    for split, count in (("train", train), ("val", val)):
        for n in range(count):
            seed = n + 100 * (split == "val")
            save(picture(seed), root / f"images/{split}/p{n}.jpg")
            save(numbers(seed), root / f"labels/{split}/p{n}.png")
    return root


def custom(root, **more):
    return from_dict({"dataset": "custom", "data_root": str(root), "classes": CLASSES, "flip_pairs": [[1, 2]],
                      "crop_size": 32, "base_size": 32, "batch_size": 4, "workers": 0, **more}, "test")


def chunk(kind, data, damage=0):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


def png(values, depth=8, before=b"", after=b""):
    """A PNG of grey (h, w), colour (h, w, 3) or both with alpha (h, w, 2 or 4), of `depth` bits; Pillow writes few of them.

    `before`, `after`: chunks around the pixels.
    """
    (h, w), kind = values.shape[:2], {1: 0, 3: 2, 2: 4, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    values = values.reshape(h, -1)
    if depth == 16:
        rows = values.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth:].reshape(h, -1)
        rows = np.packbits(bits, axis=1)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, kind, 0, 0, 0)) + before
            + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))) + after + chunk(b"IEND", b""))


def bmp(rgb, alpha, header):
    """A 32-bit BMP with a header of 40 (no alpha), 108 (V4, as the clipboard writes it) or 124 bytes (V5)."""
    bgra = np.dstack([rgb[..., ::-1], alpha])[::-1].astype(np.uint8).tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) if header > 40 else b""
    info = struct.pack("<IiiHHIIiiII", header, rgb.shape[1], rgb.shape[0], 1, 32, 3 if masks else 0, len(bgra), 0, 0, 0, 0)
    info = (info + masks).ljust(header, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(bgra), 0, 0, 14 + len(info)) + info + bgra


def run_check(cfg, tmp_path, capsys):
    code = datasets.check(cfg, tmp_path / "sheets")
    return code, capsys.readouterr().out


# ---- label sets ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, words", [
    ({}, "classes must be a list of names"),
    ({"classes": ["a", "a"]}, "a name stands there twice"),
    ({"classes": ["a", "b"], "palette": [[0, 0, 0]]}, "palette has 1 colours for 2 classes"),
    ({"classes": ["a", "b"], "palette": [[0, 0, 0], [0, 0, 256]]}, "colours are 0 to 255"),
    ({"classes": ["a", "b"], "flip_pairs": [[0, 2]]}, "a label outside the class list"),
    ({"classes": ["a", "b"], "flip_pairs": [[0, 1], [1, 0]]}, "a label stands there twice"),
])
def test_custom_label_sets_are_checked(values, words):
    with pytest.raises(UserError, match=words):
        label_set(from_dict({"dataset": "custom", **values}, source="test"))


def test_label_sets_are_the_official_ones():
    lip, cihp, ppp = (LABEL_SETS[name] for name in ("lip", "cihp", "ppp"))
    assert [len(s.classes) for s in (lip, cihp, ppp)] == [20, 20, 7]
    assert (lip.classes[10], cihp.classes[10]) == ("Jumpsuits", "Torso-skin")
    assert [a for a, b in zip(lip.classes, cihp.classes) if a != b] == ["Jumpsuits"]
    assert ppp.classes == ("Background", "Head", "Torso", "Upper-arms", "Lower-arms", "Upper-legs", "Lower-legs")
    for labels in (lip, cihp):
        sides = {tuple(labels.classes[k] for k in pair) for pair in labels.flip_pairs}
        assert sides == {("Left-arm", "Right-arm"), ("Left-leg", "Right-leg"), ("Left-shoe", "Right-shoe")}
    assert ppp.flip_pairs == () and datasets.label_set(Config(dataset="synthetic")).classes == lip.classes
    assert lip.palette[1] == (128, 0, 0) and lip.palette[19] == (255, 170, 0)


@pytest.mark.parametrize("broken, says", [
    (dict(classes=("a", "a")), "stands there twice"), (dict(palette=((0, 0, 0),)), "colours for"),
    (dict(palette=((0, 0, 0), (0, 0, 0))), "a colour stands there twice"), (dict(palette=((0, 0, 0), (0, 0, 256))), "0 to 255"),
    (dict(flip_pairs=((0, 1), (1, 0))), "twice"), (dict(flip_pairs=((0, 2),)), "outside the class list")])
def test_label_set_checks_itself(broken, says):
    with pytest.raises(UserError, match=says):
        LabelSet(**{"name": "x", "classes": ("a", "b"), "palette": ((0, 0, 0), (9, 9, 9)), "flip_pairs": (), **broken})


@pytest.mark.parametrize("count", [1, 2, 20, 255])
def test_made_colours_are_distinct(count):
    colours = np.array(datasets.distinct_colours(count), float)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 999 * np.eye(count)
    assert colours.shape == (count, 3) and apart.min() > (70 if count <= 20 else 25) and not colours[0].any()


# ---- layouts ---------------------------------------------------------------------------------------------------------

NEST = "instance-level_human_parsing"
LAYOUTS = [                                                # (data set, photos, labels, list) of the train split
    ("lip", "train_images", "train_segmentations", "train_id.txt"),
    ("lip", "TrainVal_images/train_images", "TrainVal_parsing_annotations/train_segmentations",
     "TrainVal_images/train_id.txt"),
    ("lip", "TrainVal_images/TrainVal_images/train_images",
     "TrainVal_parsing_annotations/TrainVal_parsing_annotations/train_segmentations",
     "TrainVal_images/TrainVal_images/train_id.txt"),
    ("lip", "data/train_images", "TrainVal_parsing_annotations/train_segmentations", "data/train_id.txt"),
    ("lip", "images/train_images", "segmentations/train_segmentations", None),
    ("lip", "Training/Images", "Training/Category_ids", None),
    ("lip", "top/train_images", "top/train_segmentations", "top/train_id.txt"),            # below its own name again
    ("cihp", f"{NEST}/Training/Images", f"{NEST}/Training/Category_ids", f"{NEST}/Training/train_id.txt"),
    ("cihp", f"{NEST}/{NEST}/Training/Images", f"{NEST}/{NEST}/Training/Category_ids", f"{NEST}/{NEST}/train_id.txt"),
    ("cihp", "Training/Images", "Training/Category_ids", "Training/train_id.txt"),
    ("cihp", "Training/Images", "Training/Category_ids", None),
    ("cihp", "train_images", "train_segmentations", "train_id.txt"),
    ("cihp", "CIHP_4w/Images", "CIHP_4w/Category_ids", "CIHP_4w/lists/train_id.txt"),
    ("ppp", "JPEGImages", "pascal_person_part/pascal_person_part_gt",
     "pascal_person_part/pascal_person_part_trainval_list/train_id.txt"),
    ("ppp", "VOCdevkit/VOC2010/JPEGImages", "pascal_person_part/pascal_person_part/pascal_person_part_gt",
     "pascal_person_part/pascal_person_part/pascal_person_part_trainval_list/train.txt"),
    ("ppp", "JPEGImages", "pascal_person_part_gt", "pascal_person_part_trainval_list/train_id.txt"),
    ("ppp", "pascal/JPEGImages", "pascal/SegmentationPart", "pascal/list/train_id.txt"),
    ("ppp", "train_images", "train_segmentations", "train_id.txt"),
]


@pytest.mark.parametrize("name, photos, labels, listing", LAYOUTS)
def test_layouts(tmp_path, name, photos, labels, listing):
    root = tmp_path / "top"
    for n in ("2008_000003", "2008_000002", "2008_000009"):
        save(picture(int(n[-1])), root / photos / f"{n}.jpg")
        save(numbers(int(n[-1]), classes=7), root / labels / f"{n}.png")
    order = ["2008_000002", "2008_000003", "2008_000009"]
    if listing:
        order = ["2008_000009", "2008_000002"]
        line = "/JPEGImages/{0}.jpg /pascal_person_part_gt/{0}.png" if listing.endswith("train.txt") else "{0}"
        (root / listing).parent.mkdir(parents=True, exist_ok=True)
        (root / listing).write_text("\r\n".join(line.format(n) for n in order) + "\n\n")
    pairs = open_split(Config(dataset=name, data_root=str(root)), "train")
    assert [pairs.name(i) for i in range(len(pairs))] == order
    for i, n in enumerate(order):
        image, label = pairs.read(i)
        assert image.shape == (30, 40, 3) and np.array_equal(label, numbers(int(n[-1]), classes=7))


@needs_samples
@pytest.mark.parametrize("name, folder, split, photo, values, shape", [
    ("lip", "LIP", "train", "77_471474", [0, 2, 5, 9, 14, 15, 18, 19], (120, 104)),
    ("lip", "LIP", "val", "36_453991", [0, 2, 5, 13, 14, 15], (466, 311)),
    ("cihp", "CIHP", "train", "0005008", [0, 1, 2, 5, 7, *range(9, 19)], (313, 576)),
    ("cihp", "CIHP", "val", "0002190", [0, 2, 5, 10, 13, 15], (200, 300)),
    ("ppp", "PPP", "train", "2008_002176", [0, 1, 2, 3, 4, 5], (294, 500)),
    ("ppp", "PPP", "val", "2008_007586", [0, 1, 2, 3, 4, 5], (375, 500))])
def test_genuine_samples(name, folder, split, photo, values, shape):
    pairs = open_split(Config(dataset=name, data_root=str(SAMPLES / folder)), split)
    i = [pairs.name(k) for k in range(len(pairs))].index(photo)
    image, label = pairs.read(i)
    stored, = (path for path in SAMPLES.glob(f"{folder}/**/{photo}.*") if path.suffix == ".png")
    assert image.shape == (*shape, 3) and label.shape == shape and np.unique(label).tolist() == values
    assert np.array_equal(label, np.array(Image.open(stored)))


@pytest.mark.parametrize("name, missing, says", [
    ("lip", "train_images", ["no train photos", "TrainVal_images/TrainVal_images/train_images", "train_images"]),
    ("cihp", "Training/Category_ids", ["no train labels", "instance-level_human_parsing/Training/Category_ids"]),
    ("ppp", "pascal_person_part_trainval_list", ["no list of train names", "list/train_id.txt"])])
def test_what_is_missing_is_told_with_all_places(tmp_path, name, missing, says):
    place = {"lip": LAYOUTS[0], "cihp": LAYOUTS[9], "ppp": LAYOUTS[15]}[name]
    for folder in place[1:3]:
        if folder != missing:
            (tmp_path / folder).mkdir(parents=True)
    if name == "cihp":
        (tmp_path / "Training/Categories").mkdir()
        says = [*says, "Categories are colour pictures"]
    with pytest.raises(UserError) as error:
        open_split(Config(dataset=name, data_root=str(tmp_path)), "train")
    assert all(text in str(error.value) for text in [str(tmp_path), *says]) and "\n" not in str(error.value)


# ---- reading ---------------------------------------------------------------------------------------------------------

def as_mode(mode, lossy):
    rgb = picture(5)
    if lossy:
        rgb = rgb.resize((3, 3)).resize((40, 30), Image.BICUBIC)
    grey = np.array(rgb.convert("L"))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 256 + 77), np.repeat(grey[..., None], 3, 2)
    if mode in ("L", "1"):
        return rgb.convert(mode), np.repeat(np.array(rgb.convert(mode).convert("L"))[..., None], 3, 2)
    if mode in ("RGBA", "LA"):
        image = rgb.convert(mode)
        image.putalpha(Image.fromarray(np.where(np.arange(40) < 20, 255, 0).astype(np.uint8)[None].repeat(30, 0)))
        base = np.array(rgb if mode == "RGBA" else rgb.convert("L").convert("RGB"))
        base[:, 20:] = 255                                 # what is transparent is white
        return image, base
    image = rgb.convert(mode)
    return image, np.array(image.convert("RGB"))


@pytest.mark.parametrize("mode, ending, tolerance", [
    ("RGB", "png", 0), ("L", "png", 0), ("1", "png", 0), ("P", "png", 0), ("RGBA", "png", 0), ("LA", "png", 0),
    ("I;16", "png", 0), ("RGB", "bmp", 0), ("L", "bmp", 0), ("RGB", "jpg", 9), ("L", "jpg", 9), ("CMYK", "jpg", 9),
    ("RGB", "webp", 9)])
def test_photo_modes(tmp_path, mode, ending, tolerance):
    image, expected = as_mode(mode, tolerance > 0)
    image.save(tmp_path / f"x.{ending}", **({} if tolerance == 0 else {"quality": 100}))
    rgb = read_photo(tmp_path / f"x.{ending}")
    assert rgb.shape == (30, 40, 3) and rgb.dtype == np.uint8 and rgb.flags.writeable
    assert np.abs(rgb.astype(int) - expected).max() <= tolerance


def written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_every_depth_with_what_is_transparent_in_white(tmp_path, depth, channels):
    if channels > 1 and depth < 8:
        return                                             # there is no such PNG
    values = np.random.default_rng(0).integers(0, 2**depth, (30, 40, channels))
    colour = values[..., :-1 + channels % 2 or None]
    as_8_bits = colour >> 8 if depth == 16 else colour * 255 // (2**depth - 1)
    if channels % 2:                                       # no alpha: one colour is transparent
        clear = (values == values[3, 3]).all(-1)
        before = chunk(b"tRNS", values[3, 3].astype(">u2").tobytes())
    else:
        clear = np.arange(30 * 40).reshape(30, 40) % 3 == 0
        values[..., -1] = np.where(clear, 0, 2**depth - 1)
        before = b""
    assert clear.any() and not clear.all()
    values = values.squeeze()
    stored = written(tmp_path / "x.png", png(values, depth, before))
    assert np.array_equal(read_photo(stored), np.broadcast_to(np.where(clear[..., None], 255, as_8_bits), (30, 40, 3)))
    if channels == 1:
        bare = written(tmp_path / "y.png", png(values, depth))
        assert np.array_equal(read_photo(bare), np.broadcast_to(as_8_bits, (30, 40, 3)))


def test_16_bit_grey_is_transparent_in_one_of_its_65536_values_only(tmp_path):
    values = np.array([[0x1234, 0x1235, 0x1200]])
    stored = written(tmp_path / "x.png", png(values, 16, chunk(b"tRNS", b"\x12\x34")))
    assert read_photo(stored)[0, :, 0].tolist() == [255, 0x12, 0x12]


@pytest.mark.parametrize("header", [40, 108, 124])
@pytest.mark.parametrize("alpha", ["unused", "full", "some"])
def test_32_bit_bmp(tmp_path, header, alpha):
    """What writes the clipboard leaves alpha at 0 throughout: it cannot mean that nothing is there."""
    rgb = np.array(picture(3))
    given = {"unused": np.zeros((30, 40)), "full": np.full((30, 40), 255), "some": np.arange(1200).reshape(30, 40) % 2 * 255}
    shown = np.where(given[alpha][..., None] > 0, rgb, 255) if alpha == "some" and header > 40 else rgb
    assert np.array_equal(read_photo(written(tmp_path / "x.bmp", bmp(rgb, given[alpha], header))), shown)


@pytest.mark.parametrize("kind, head", [(b"zTXt", b"workflow\0\0"), (b"iTXt", b"workflow\0\1\0\0\0")])
@pytest.mark.parametrize("place", ["before", "after"])
def test_png_with_megabytes_of_compressed_text(tmp_path, kind, head, place):
    text = np.random.default_rng(0).integers(32, 127, 2_000_000).astype(np.uint8).tobytes()
    rgb = np.array(picture(3))
    content = png(rgb, **{place: chunk(kind, head + zlib.compress(text))})
    assert np.array_equal(read_photo(written(tmp_path / "x.png", content)), rgb)


@pytest.mark.parametrize("read, name", [(read_photo, "photo"), (lambda path: read_label(path, 4), "label")])
def test_what_the_decoder_refuses_is_refused_with_its_reason(tmp_path, read, name):
    for content, says in [
            (png(GREY, before=chunk(b"pHYs", bytes(9), damage=1)), "bad header checksum in b'pHYs'"),
            (png(GREY)[:40], "cut off"), (b"\x89PNG\r\n\x1a\n", "cut off"),
            (png(GREY, before=chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(70 << 20)))), "[Dd]ata [Tt]oo [Ll]arge")]:
        with pytest.raises(UserError, match=says) as error:
            read(written(tmp_path / f"{name}.png", content))
        assert str(error.value).startswith(f"{tmp_path / name}.png: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_photo, lambda path: read_label(path, 4)])
def test_the_limit_of_pixels_is_the_same_for_all_who_read(tmp_path, read):
    """The one of phones, beyond Pillow's own, is not reached; nothing of such size is decoded here."""
    def claiming(side):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        return png(GREY)[:8] + header + chunk(b"IDAT", zlib.compress(bytes(99)))

    with warnings.catch_warnings(record=True) as warned, pytest.raises(UserError, match="cut off.*truncated"):
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)         # as on import
        read(written(tmp_path / "x.png", claiming(14_200)))                                # 202 megapixels
    assert not warned
    with pytest.raises(UserError, match="x.png: too many pixels, make it smaller first"):
        read(written(tmp_path / "x.png", claiming(16_400)))                                # 269 megapixels


@pytest.mark.parametrize("way", range(1, 9))
def test_exif_orientation(tmp_path, way):
    exif = Image.Exif()
    exif[ORIENTATION] = way
    root = make_custom(tmp_path)
    picture(0).save(root / "images/train/p0.jpg", exif=exif)
    stored = np.array(Image.open(root / "images/train/p0.jpg"))
    shown = np.array(ImageOps.exif_transpose(Image.open(root / "images/train/p0.jpg")))
    assert np.array_equal(read_photo(root / "images/train/p0.jpg"), shown)
    for drawn_on in (stored, shown):                       # training follows the label's size
        save(numbers(0, drawn_on.shape[1::-1]), root / "labels/train/p0.png")
        image, label = open_split(custom(root), "train").read(0)
        assert np.array_equal(image, drawn_on if stored.shape != shown.shape else stored)


def test_palette_labels_are_read_as_numbers(tmp_path):
    root = make_custom(tmp_path)
    label = numbers(0)
    for bits in (2, 8):
        image = label.copy()
        image.putpalette([200, 9, 9, 3, 200, 3, 0, 0, 255, 1, 2, 3])
        image.save(root / "labels/train/p0.png", bits=bits)
        assert np.array_equal(open_split(custom(root), "train").read(0)[1], label)


def test_split_list_and_odd_names(tmp_path):
    root = make_custom(tmp_path)
    save(picture(9), root / "images/train/my photo.v2.JPEG")
    save(numbers(9), root / "labels/train/my photo.v2.PNG")
    save(picture(10), root / "images/train/._p1.jpg")      # what macOS leaves behind
    lines = ["\ufeffp3.jpg", "my photo.v2", "", "images/train/p1.jpg labels/train/p1.png", ""]
    (root / "train.txt").write_bytes("\r\n".join(lines).encode())
    pairs = open_split(custom(root, train_list="train.txt"), "train")
    assert [pairs.name(i) for i in range(len(pairs))] == ["p3", "my photo.v2", "p1"]
    assert np.array_equal(pairs.read(1)[1], numbers(9))


# ---- the check -------------------------------------------------------------------------------------------------------

def test_check_of_a_good_set(tmp_path, capsys):
    code, text = run_check(custom(make_custom(tmp_path)), tmp_path, capsys)
    assert code == 0 and "no faults" in text and "train: 6 pairs" in text and "val: 2 pairs" in text
    truth = np.concatenate([np.array(numbers(n)).ravel() for n in range(6)])
    assert re.search(rf"3 hat +{np.mean(truth == 3):.3%} +6 ", text)
    palette = datasets.label_set(custom(tmp_path)).palette
    for name in ("train", "val", "augmented"):
        colours = set(map(tuple, np.array(Image.open(tmp_path / f"sheets/{name}.png")).reshape(-1, 3)))
        assert set(palette) <= colours


def test_check_counts_against_the_paper(tmp_path, capsys):
    for split, word in (("train", "Training"), ("val", "Validation")):
        save(picture(len(word)), tmp_path / f"{word}/Images/0000001.jpg")
        save(numbers(1), tmp_path / f"{word}/Category_ids/0000001.png")
        (tmp_path / f"{word}/{split}_id.txt").write_text("0000001\n")
    code, text = run_check(Config(dataset="cihp", data_root=str(tmp_path), workers=0), tmp_path, capsys)
    assert code == 1 and "1 train pairs, the paper has 28,280" in text and "1 val pairs, the paper has 5,000" in text


def test_check_finds_photos_of_val_in_train_by_content(tmp_path, capsys):
    root = make_custom(tmp_path)
    Image.open(root / "images/train/p4.jpg").save(root / "images/val/p0.png")      # other name, other format
    (root / "images/val/p0.jpg").unlink()
    code, text = run_check(custom(root), tmp_path, capsys)
    assert code == 1 and re.search(r"images/val/p0\.png: the same photo as .*images/train/p4\.jpg", text)


def test_check_notes_stop_nothing(tmp_path, capsys):
    root = make_custom(tmp_path)
    (root / "images/train/p1.jpg").rename(root / "images/train/p1.JPG")
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    picture(0).save(root / "images/train/p0.jpg", exif=exif)
    code, text = run_check(custom(root, flip_pairs=()), tmp_path, capsys)
    assert code == 0 and "no faults" in text
    assert re.search(r"endings in capitals.*: 1\n  .*p1\.JPG", text) and re.search(r"EXIF.*: 1\n  .*p0\.jpg", text)
    assert re.search(r"flip_pairs does not name.*\n  \[1, 2\] left hand, right hand", text)


def relabel(root, split, change):
    for path in (root / "labels" / split).glob("*.png"):
        Image.fromarray(change(np.array(Image.open(path)).astype(np.uint8))).save(path)


@pytest.mark.parametrize("train, val, faults", [
    ("border", "border and no hat", []),                   # a class that is rare; 255 is the border in both
    ("border and no hat", "border", ["train"]), ("all", "border and no hat", ["val"]),
    ("masks", "masks", ["train", "val"]), ("border", "masks", ["val"]), ("all", "no hat", [])])
def test_a_class_that_never_occurs_while_255_does(tmp_path, capsys, train, val, faults):
    def change(label, how):
        if "no hat" in how:
            label[label == 3] = 0
        if "border" in how:
            label[0] = 255
        return np.where(label > 0, 255, 0).astype(np.uint8) if how == "masks" else label

    root = make_custom(tmp_path)
    relabel(root, "train", lambda label: change(label, train))
    relabel(root, "val", lambda label: change(label, val))
    code, text = run_check(custom(root), tmp_path, capsys)
    assert re.findall(r"  .*labels/(\w+): no label shows ", text) == faults and code == (1 if faults else 0)
    for split, how in (("train", train), ("val", val)):
        if "no hat" in how:
            assert re.search(rf"classes that no photo of {split} shows: 1\n  3 hat", text)


def test_what_is_passed_over_is_noted(tmp_path, capsys):
    root = make_custom(tmp_path)
    save(picture(9), root / "images/train/more/p9.jpg")
    (root / "images/train/p7.gif").write_bytes(b"GIF89a")
    (root / "images/train/.DS_Store").write_bytes(b"")
    code, text = run_check(custom(root), tmp_path, capsys)
    assert code == 0 and re.search(r"beside the photos, not read.*: 2\n  .*train/more\n  .*train/p7.gif\n", text)


def test_a_number_behind_a_photo_is_no_label(tmp_path):
    """As lists for classification have it: 1 is not labels/1.png."""
    root = make_custom(tmp_path)
    (root / "labels/train/p1.png").rename(root / "labels/train/1.png")
    (root / "train.txt").write_text("p0.jpg 1\n")
    with pytest.raises(UserError, match="train.txt, line 1: 1 names no label: they end in .png"):
        open_split(custom(root, train_list="train.txt"), "train")


def test_a_list_of_whole_paths_and_a_data_root_that_is_a_link(tmp_path):
    root = make_custom(tmp_path / "real")
    (tmp_path / "link").symlink_to(root)
    (root / "train.txt").write_text("".join(f"{root / 'images/train'}/p{n}.jpg\n" for n in (3, 1)))
    pairs = open_split(custom(tmp_path / "link", train_list="train.txt"), "train")
    assert [pairs.name(i) for i in range(2)] == ["p3", "p1"] and np.array_equal(pairs.read(0)[1], numbers(3))


def test_an_orientation_of_0_is_none(tmp_path, capsys):
    root = make_custom(tmp_path)
    exif = Image.Exif()
    exif[ORIENTATION] = 0
    picture(0).save(root / "images/train/p0.jpg", exif=exif)
    code, text = run_check(custom(root), tmp_path, capsys)
    assert code == 0 and "EXIF" not in text


def test_a_reader_that_has_seen_enough(tmp_path):
    """`datasets.py | head -1` is no traceback."""
    command = [sys.executable, "datasets.py", "--out", str(tmp_path / "out"), "synthetic_size=32", "workers=0"]
    program = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    assert "Error" not in program.stderr.read() and program.wait() == 141


def swap_bytes(path, change):
    path.write_bytes(change(path.read_bytes()))


def replace(path, image, **options):
    path.unlink()
    image.save(path, **options)


def relink(path):
    path.unlink()
    path.symlink_to("nowhere.jpg")


PHOTO, LABEL = "images/train/p1.jpg", "labels/train/p1.png"
RGB, GREY = picture(1), np.array(numbers(1))
FAULTS = {                                                 # what is planted, what the message says, more config
    "missing label": (lambda r: (r / LABEL).unlink(), [LABEL, "no such label"], {}),
    "missing photo": (lambda r: (r / PHOTO).unlink(), [LABEL, "no photo"], {}),
    "size mismatch": (lambda r: replace(r / LABEL, numbers(1, (41, 30))), [PHOTO, "40 x 30", "41 x 30"], {}),
    "value beyond the classes": (lambda r: replace(r / LABEL, numbers(1, classes=5)),
                                 [LABEL, "holds 4 on", "0 to 3"], {}),
    "value 254": (lambda r: replace(r / LABEL, Image.fromarray(np.where(GREY == 3, 254, GREY).astype(np.uint8))),
                  [LABEL, "holds 254"], {}),
    "RGB label": (lambda r: replace(r / LABEL, RGB), [LABEL, "colour (RGB)"], {}),
    "RGBA label": (lambda r: replace(r / LABEL, RGB.convert("RGBA")), [LABEL, "colour (RGBA)"], {}),
    "16-bit label": (lambda r: replace(r / LABEL, Image.fromarray(GREY.astype(np.uint16))), [LABEL, "16-bit"], {}),
    "4-bit grey label": (lambda r: (r / LABEL).write_bytes(png(GREY, 4)), [LABEL, "4-bit"], {}),
    "1-bit label": (lambda r: replace(r / LABEL, RGB.convert("1")), [LABEL, "1-bit"], {}),
    "JPEG named .png": (lambda r: replace(r / LABEL, numbers(1), format="JPEG"), [LABEL, "not a picture in PNG"], {}),
    "label only as JPEG": (lambda r: (r / LABEL).rename((r / LABEL).with_suffix(".jpg")),
                           [LABEL, "no such label (p1.jpg is there, but not as .png)"], {}),
    "truncated JPEG": (lambda r: swap_bytes(r / PHOTO, lambda b: b[:len(b) // 2]), [PHOTO, "damaged or cut off"], {}),
    "truncated PNG": (lambda r: swap_bytes(r / LABEL, lambda b: b[:len(b) // 2]), [LABEL, "damaged or cut off"], {}),
    "PNG with a flipped byte": (lambda r: swap_bytes(r / LABEL, lambda b: b[:60] + bytes([b[60] ^ 255]) + b[61:]),
                                [LABEL, "damaged"], {}),
    "zero-byte PNG": (lambda r: (r / LABEL).write_bytes(b""), [LABEL, "0 bytes"], {}),
    "zero-byte photo": (lambda r: (r / PHOTO).write_bytes(b""), [PHOTO, "0 bytes"], {}),
    "text named .jpg": (lambda r: (r / PHOTO).write_text("<html>404"), [PHOTO, "not a picture in JPEG"], {}),
    "GIF named .jpg": (lambda r: RGB.save(r / PHOTO, format="GIF"), [PHOTO, "not a picture in JPEG"], {}),
    "folder named .jpg": (lambda r: ((r / PHOTO).unlink(), (r / PHOTO).mkdir()), [PHOTO, "a folder"], {}),
    "link to nowhere": (lambda r: relink(r / PHOTO), [PHOTO, "a link to nowhere.jpg"], {}),
    "two photos of one name": (lambda r: save(RGB, r / "images/train/p1.png"),
                               ["images/train/p1.png", "same name"], {}),
    "list names a missing id": (lambda r: (r / "t.txt").write_text("p0\np9\n"),
                                ["t.txt, line 2", "no photo p9"], {"train_list": "t.txt"}),
    "list in other capitals": (lambda r: (r / "t.txt").write_text("p0\nP1\n"),
                               ["t.txt, line 2", "no photo P1", "(p1.jpg is there, look at capitals"],
                               {"train_list": "t.txt"}),
    "list in another ending": (lambda r: (r / "t.txt").write_text("p0\np1.png\n"),
                               ["t.txt, line 2", "no photo p1.png", "(p1.jpg is there"], {"train_list": "t.txt"}),
    "list of another split's photos": (lambda r: (r / "t.txt").write_text("p0\nimages/val/p1.jpg\n"),
                                       ["t.txt, line 2", "images/val/p1.jpg is not below", "images/train: name its label"],
                                       {"train_list": "t.txt"}),
    "list names a folder that is not there": (lambda r: (r / "t.txt").write_text("p0\na/p1.jpg\n"),
                                              ["t.txt, line 2", "no photo a/p1.jpg"], {"train_list": "t.txt"}),
    "list names a label that is not there": (
        lambda r: (r / "t.txt").write_text("p0\nimages/train/p1.jpg labels/test/p1.png\n"),
        ["t.txt, line 2", "no label labels/test/p1.png"], {"train_list": "t.txt"}),
    "list names a photo whose label is not there": (lambda r: ((r / "t.txt").write_text("p0\np1.jpg"), (r / LABEL).unlink()),
                                                    ["t.txt, line 2", "no label p1.png"], {"train_list": "t.txt"}),
    "list leaves open which photo": (lambda r: ((r / "t.txt").write_text("p0\np1\n"), save(RGB, r / "images/train/p1.png")),
                                     ["t.txt, line 2", "p1 may be", "p1.jpg or", "p1.png: give"], {"train_list": "t.txt"}),
    "list names a photo as its label": (lambda r: (save(numbers(1), r / "images/train/q.png"),
                                                   (r / "t.txt").write_text("p0\nq.png images/train/q.png\n")),
                                        ["t.txt, line 2", "q.png would be photo and label"], {"train_list": "t.txt"}),
    "list with another column": (lambda r: (r / "t.txt").write_text("p0\np1 1\n"), ["t.txt, line 2", "no photo p1 1"],
                                 {"train_list": "t.txt"}),
    "names that differ in their accents' form": (
        lambda r: [save(RGB, r / f"images/train/{name}.jpg") for name in ("\u00e9", "e\u0301")]
        + [save(numbers(1), r / "labels/train/\u00e9.png")], ["images/train/\u00e9.jpg", "same name"], {}),
    "photos and labels in one folder": (
        lambda r: [p.rename(r / "images/train" / p.name) for p in (r / "labels/train").iterdir()],
        ["images/train: photos and labels lie in one folder", "move the labels", "give a list"],
        {"train_labels": "images/train"}),
    "duplicate id": (lambda r: (r / "t.txt").write_text("p0\np1\np0.jpg\n"),
                     ["t.txt, line 3", "p0 stands there twice, first in line 1"], {"train_list": "t.txt"}),
    "binary list": (lambda r: (r / "t.txt").write_bytes(b"\xff\xfe\x00p"),
                    ["t.txt", "list of names"], {"train_list": "t.txt"}),
    "empty list": (lambda r: (r / "t.txt").write_text("\n\n"), ["t.txt", "empty"], {"train_list": "t.txt"}),
    "list that is not there": (lambda r: None, ["no list of train names", "t.txt"], {"train_list": "t.txt"}),
    "empty split": (lambda r: [p.unlink() for k in ("images", "labels") for p in (r / k / "train").iterdir()],
                    ["images/train", "empty"], {}),
    "folder that is not there": (lambda r: (r / "labels/train").rename(r / "labels/Train"),
                                 ["no train labels", "looked for labels/train"], {}),
    "data root that is not there": (lambda r: r.rename(r.with_name("gone")), ["data_root", "no such file"], {}),
    "unreadable folder": (lambda r: (r / "images/train").chmod(0), ["images/train", "cannot be read"], {}),
    "unreadable data root": (lambda r: r.chmod(0), ["data_root", "permission denied"], {}),
    "unreadable photo": (lambda r: (r / PHOTO).chmod(0), [PHOTO, "no permission"], {}),
}
@contextlib.contextmanager
def no_superuser():
    """Permissions do not bind the superuser, whom containers often run tests as."""
    if os.geteuid():
        yield
        return
    from concurrent.futures import ProcessPoolExecutor  # noqa: F401

    import check  # noqa: F401
    "".encode("utf-8-sig")                                 # Python itself may lie where only the superuser can read
    Image.init()
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def planted(request):
    """The configuration of a data set with one fault, what must be said of it, and a folder anybody may write into."""
    with tempfile.TemporaryDirectory() as folder:          # pytest's own folders are closed to all but their owner
        Path(folder).chmod(0o777)
        root = make_custom(Path(folder) / "data")
        plant, says, more = FAULTS[request.param]
        plant(root)
        yield custom(root, **more), says, Path(folder)
        for path in (root, root / "images/train"):         # the superuser may be the only one who can clear up
            if path.exists():
                path.chmod(0o755)


@pytest.mark.parametrize("planted", FAULTS, indirect=True)
def test_planted_faults_are_named_and_stop_training_in_one_line(planted, capsys):
    cfg, says, tmp_path = planted
    with no_superuser():
        code, text = run_check(cfg, tmp_path, capsys)
        with pytest.raises(UserError) as error:
            for _ in itertools.islice(train_loader(cfg, open_split(cfg, "train")), 3):     # more than one epoch
                pass
    faults = [line for line in text.split("\nfaults: ")[1].splitlines() if all(word in line for word in says)]
    assert code == 1 and len(faults) == 1
    message = str(error.value)
    assert all(word in message for word in says) and "\n" not in message


def test_a_healthy_pair_beside_a_fault_is_still_counted(tmp_path, capsys):
    root = make_custom(tmp_path)
    (root / LABEL).write_bytes(b"")
    (root / "images/train/p3.jpg").write_bytes(b"")
    replace(root / "labels/val/p0.png", RGB)
    code, text = run_check(custom(root, workers=2), tmp_path, capsys)
    assert code == 1 and "faults: 3" in text and re.search(r"0 background +\d+\.\d+% +4 ", text)


@pytest.mark.parametrize("fault", [None, "truncated JPEG"])
def test_the_command(tmp_path, fault):
    root = make_custom(tmp_path / "data")
    if fault:
        FAULTS[fault][0](root)
    cfg = tmp_path / "mine.yaml"
    cfg.write_text(f"dataset: custom\ndata_root: {root}\nclasses: [background, left hand, right hand, hat]\n"
                   "flip_pairs: [[1, 2]]\ncrop_size: 64\nbase_size: 64\nworkers: 2\n")
    done = subprocess.run([sys.executable, ROOT / "datasets.py", "--cfg", cfg, f"out={tmp_path}/mine", "batch_size=2"],
                          capture_output=True, text=True)
    assert done.returncode == (1 if fault else 0) and "Traceback" not in done.stderr
    assert ("p1.jpg: damaged or cut off" in done.stdout) == bool(fault)
    assert sorted(path.name for path in (tmp_path / "mine_data").iterdir()) == ["augmented.png", "train.png", "val.png"]


def test_the_command_says_what_is_wrong_with_its_arguments(capsys):
    assert datasets.main(["dataset=cihp", "data_root=/nowhere"]) == 1
    assert "no such file" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean 'dataset'"):
        datasets.main(["datset=cihp"])


# ---- the order of training -------------------------------------------------------------------------------------------

def batches(cfg, count, start=0, world=1):
    """`count` whole batches: the micro-batches of all ranks and accumulation steps side by side."""
    pairs = open_split(cfg, "train")
    loaders = [train_loader(cfg, pairs, rank, world, start) for rank in range(world)]
    result = []
    for _ in range(count):
        parts = [next(loader) for loader in loaders for _ in range(cfg.accum_steps)]
        images, labels, names = zip(*parts)
        result.append((torch.cat(images), torch.cat(labels), sum(names, [])))
    for loader in loaders:
        loader.close()
    return result


def same(a, b):
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers, world, accum, start", [(1, 1, 1, 0), (2, 1, 1, 0), (4, 1, 1, 0), (0, 2, 1, 0),
                                                          (0, 4, 1, 0), (2, 2, 2, 0), (0, 1, 4, 0), (1, 2, 1, 3)])
def test_same_batches_bit_for_bit(tmp_path, workers, world, accum, start):
    root = make_custom(tmp_path, train=7)
    reference = batches(custom(root, batch_size=8), 5)
    assert reference[0][0].dtype == reference[0][1].dtype == torch.uint8
    assert reference[0][0].shape == (8, 3, 32, 32) and reference[0][1].shape == (8, 32, 32)
    other = batches(custom(root, batch_size=8, workers=workers, accum_steps=accum), 5 - start, start, world)
    assert same(reference[start:], other)
    assert not same(reference, batches(custom(root, batch_size=8, seed=1), 5))


def test_batches_hold_the_augmented_samples(tmp_path):
    cfg = custom(make_custom(tmp_path))
    pairs = open_split(cfg, "train")
    samples, (images, labels, names) = TrainSet(pairs, cfg), next(train_loader(cfg, pairs))
    for slot, (index, iteration, _) in enumerate(next(iter(BatchOrder(len(pairs), cfg)))):
        image, label = samples.sample(index, iteration, slot)
        assert np.array_equal(images[slot].permute(1, 2, 0), image) and np.array_equal(labels[slot], label)
        assert names[slot] == pairs.name(index)


@pytest.mark.parametrize("count", [3, 10, 16])
def test_epochs_are_shuffled_and_whole(count):
    cfg = Config(batch_size=4)
    keys = [key for batch in itertools.islice(BatchOrder(count, cfg), 4 * count) for key in batch]
    epochs = np.array([index for index, _, _ in keys]).reshape(16, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all() and len(set(map(tuple, epochs))) > 4
    assert [(iteration, slot) for _, iteration, slot in keys] == [divmod(p, 4) for p in range(16 * count)]


def test_loader_leaves_the_random_state_alone(tmp_path):
    cfg = custom(make_custom(tmp_path), workers=1)
    pairs = open_split(cfg, "train")
    before = torch.get_rng_state(), np.random.get_state()[1]
    next(train_loader(cfg, pairs))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_a_fault_in_a_worker_is_one_line(tmp_path):
    root = make_custom(tmp_path)
    (root / PHOTO).write_bytes(b"")
    cfg = custom(root, workers=2)
    with pytest.raises(UserError) as error:
        for _ in itertools.islice(train_loader(cfg, open_split(cfg, "train")), 3):
            pass
    assert str(error.value) == f"{root / PHOTO}: an empty file (0 bytes)"


def test_a_killed_worker_is_one_line(tmp_path):
    cfg = custom(make_custom(tmp_path), workers=1)
    others = set(multiprocessing.active_children())
    loader = train_loader(cfg, open_split(cfg, "train"))
    next(loader)
    worker, = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.5)                                        # the main process is busy: nothing may be raised here
    with pytest.raises(UserError, match="fewer workers") as error:
        for _ in itertools.islice(loader, 100):
            pass
    assert "\n" not in str(error.value)


def test_ctrl_c_is_not_answered_by_the_workers(tmp_path):
    root = make_custom(tmp_path)
    script = ("import test_datasets, time\ncfg = test_datasets.custom({!r}, workers=2)\n"
              "loader = test_datasets.train_loader(cfg, test_datasets.open_split(cfg, 'train'))\n"
              "try:\n    next(loader)\n    print('ready', flush=True)\n    time.sleep(60)\n"
              "finally:\n    from engine.workers import end_workers; end_workers()\n").format(str(root))
    child = subprocess.Popen([sys.executable, "-c", script], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             start_new_session=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert errors.count("Traceback") == 1 and "KeyboardInterrupt" in errors and "_worker_loop" not in errors
