"""files/layouts.py: where the photos, labels and lists of a data set are found and how they are paired."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_datasets import custom, make_custom
from test_images import numbers, picture, save, written

from config import Config
from datasets import open_split
from errors import UserError

SAMPLES = Path(__file__).parents[2] / "shared/data/samples"
NEST, PART, TRAIN = "instance-level_human_parsing", "pascal_person_part", "TrainVal_images"
NOTES, VOC = "TrainVal_parsing_annotations", "VOCdevkit/VOC2010"
LAYOUTS = [                                                # data set; photos, labels and list of the train split
    ("lip", "train_images", "train_segmentations", "train_id.txt"),
    ("lip", f"{TRAIN}/train_images", f"{NOTES}/train_segmentations", f"{TRAIN}/train_id.txt"),
    ("lip", f"{TRAIN}/{TRAIN}/train_images", f"{NOTES}/{NOTES}/train_segmentations", f"{TRAIN}/{TRAIN}/train_id.txt"),
    ("lip", "data/train_images", f"{NOTES}/train_segmentations", "data/train_id.txt"),
    ("lip", "top/train_images", "top/train_segmentations", "top/train_id.txt"),            # the root's name again
    ("cihp", f"{NEST}/Training/Images", f"{NEST}/Training/Category_ids", f"{NEST}/Training/train_id.txt"),
    ("cihp", f"{NEST}/{NEST}/Training/Images", f"{NEST}/{NEST}/Training/Category_ids", f"{NEST}/{NEST}/train_id.txt"),
    ("cihp", "CIHP_4w/Images", "CIHP_4w/Category_ids", "CIHP_4w/lists/train_id.txt"),
    ("ppp", "JPEGImages", f"{PART}/{PART}_gt", f"{PART}/{PART}_trainval_list/train_id.txt"),
    ("ppp", f"{VOC}/JPEGImages", f"{PART}/{PART}/{PART}_gt", f"{PART}/{PART}/{PART}_trainval_list/train.txt"),
    ("ppp", "pascal/JPEGImages", "pascal/SegmentationPart", "pascal/list/train_id.txt"),
    ("ppp", "train_images", "train_segmentations", None)]


@pytest.mark.parametrize("name, photos, labels, listing", LAYOUTS)
def test_published_layouts_are_found(tmp_path, name, photos, labels, listing):
    root = tmp_path / "top"
    order = ["2008_000002", "2008_000003", "2008_000009"]
    for n in order:
        save(picture(int(n[-1])), root / photos / f"{n}.jpg")
        save(numbers(int(n[-1]), classes=7), root / labels / f"{n}.png")
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


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the real samples")
@pytest.mark.parametrize("name, split, photo, values, shape", [
    ("lip", "val", "36_453991", [0, 2, 5, 13, 14, 15], (466, 311)),
    ("cihp", "train", "0005008", [0, 1, 2, 5, 7, *range(9, 19)], (313, 576)),
    ("ppp", "train", "2008_002176", [0, 1, 2, 3, 4, 5], (294, 500))])
def test_real_samples(name, split, photo, values, shape):
    root = SAMPLES / name.upper()
    pairs = open_split(Config(dataset=name, data_root=str(root)), split)
    image, label = pairs.read([pairs.name(k) for k in range(len(pairs))].index(photo))
    assert image.shape == (*shape, 3) and label.shape == shape and np.unique(label).tolist() == values
    assert np.array_equal(label, np.array(Image.open(next(root.glob(f"**/{photo}.png")))))


@pytest.mark.parametrize("name, present, says", [
    ("lip", ["train_segmentations"], ["train photos", "TrainVal_images/TrainVal_images/train_images", "train_images"]),
    ("cihp", ["Training/Images"], ["train labels", f"{NEST}/Training/Category_ids"]),
    ("ppp", ["JPEGImages", f"{PART}_gt"], ["train list of names", "list/train_id.txt"])])
def test_a_missing_folder_is_reported_with_all_places_searched(tmp_path, name, present, says):
    for folder in present:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError) as error:
        open_split(Config(dataset=name, data_root=str(tmp_path)), "train")
    assert all(text in str(error.value) for text in [str(tmp_path), *says]) and "\n" not in str(error.value)


def test_lists_and_unusual_file_names(tmp_path):
    root = make_custom(tmp_path / "real")
    (tmp_path / "link").symlink_to(root)
    save(picture(9), root / "images/train/my photo.v2.JPEG")
    save(numbers(9), root / "labels/train/my photo.v2.PNG")
    save(picture(10), root / "images/train/._p1.jpg")      # macOS writes such files
    lines = "\ufeffp3.jpg", "my photo.v2", "", "images/train/p1.jpg labels/train/p1.png", f"{root}/images/train/p4.jpg"
    written(root / "train.txt", "\r\n".join(lines).encode())
    for data_root in (root, tmp_path / "link"):
        pairs = open_split(custom(data_root, train_list="train.txt"), "train")
        assert [pairs.name(i) for i in range(len(pairs))] == ["p3", "my photo.v2", "p1", "p4"]
        assert np.array_equal(pairs.read(1)[1], numbers(9))


