"""datasets.py, viz/data_check.py: the data check, planted faults, labels that look wrong, training batches."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_images import numbers, picture, save, written

import datasets
from config import Config, from_dict
from datasets import BatchOrder, TrainSet, label_set, open_split, sample_warning, train_loader
from engine import workers
from errors import UserError
from files.images import read_photo
from synthetic.draw import draw

ROOT = Path(__file__).parents[1]
CCP = ROOT.parent / "shared/data/ccp"
CLASSES = ("background", "left hand", "right hand", "hat")


def make_custom(root, train=6, val=2):
    """Random photos and labels in the folders of `dataset: custom`; returns `root`."""
    for split, count in (("train", train), ("val", val)):
        for n in range(count):
            seed = n + 100 * (split == "val")
            save(picture(seed), root / f"images/{split}/p{n}.jpg")
            save(numbers(seed), root / f"labels/{split}/p{n}.png")
    return root


def custom(root, **more):
    return from_dict({"dataset": "custom", "data_root": str(root), "classes": CLASSES, "flip_pairs": [[1, 2]],
                      "crop_size": 32, "base_size": 32, "batch_size": 4, "workers": 0, **more}, "test")


def run_check(cfg, tmp_path, capsys):
    return datasets.check_data(cfg, tmp_path / "sheets"), capsys.readouterr().out


def test_check_of_an_intact_data_set(tmp_path, capsys):
    root = make_custom(tmp_path)
    save(picture(9), root / "images/train/more/p9.jpg")
    (root / "images/train/p7.gif").write_bytes(b"GIF89a")
    (root / "images/train/.DS_Store").write_bytes(b"")
    code, text = run_check(custom(root, flip_pairs=()), tmp_path, capsys)
    assert code == 0 and "no faults" in text and "train: 6 pairs" in text and "val: 2 pairs" in text
    truth = np.concatenate([np.array(numbers(n)).ravel() for n in range(6)])
    assert re.search(rf"3 hat +{np.mean(truth == 3):.3%} +6 ", text)
    for name in ("train", "val", "augmented"):
        colours = set(map(tuple, np.array(Image.open(tmp_path / f"sheets/{name}.png")).reshape(-1, 3)))
        assert set(label_set(custom(root)).palette) <= colours
    assert re.search(r"flip_pairs .*\n  \[1, 2\] left hand, right hand", text)
    assert re.search(r"not read.*: 2\n  .*train/more\n  .*train/p7.gif\n", text)


def test_check_compares_counts_with_the_paper_and_finds_val_photos_in_train(tmp_path, capsys):
    for split, word in (("train", "Training"), ("val", "Validation")):
        save(picture(len(word)), tmp_path / f"{word}/Images/0000001.jpg")
        save(numbers(1), tmp_path / f"{word}/Category_ids/0000001.png")
        (tmp_path / f"{word}/{split}_id.txt").write_text("0000001\n")
    code, text = run_check(Config(dataset="cihp", data_root=str(tmp_path), workers=0), tmp_path, capsys)
    assert code == 1 and re.search("1 train pairs.* 28,280", text) and re.search("1 val pairs.* 5,000", text)
    root = make_custom(tmp_path / "mine")
    Image.open(root / "images/train/p4.jpg").save(root / "images/val/p0.png")      # another name and format
    (root / "images/val/p0.jpg").unlink()
    code, text = run_check(custom(root), tmp_path / "mine", capsys)
    assert code == 1 and re.search(r"images/val/p0\.png: .*images/train/p4\.jpg", text)


@pytest.mark.parametrize("train, val, faults", [
    ("border", "border, no hat", []), ("all", "no hat", []), ("masks", "masks", ["train", "val"]),
    ("border", "masks", ["val"])])
def test_masks_of_0_and_255_are_faults_rare_classes_are_not(tmp_path, capsys, train, val, faults):
    """255 often marks the border between classes."""
    root = make_custom(tmp_path)
    for split, how in (("train", train), ("val", val)):
        for path in (root / "labels" / split).iterdir():
            label = np.array(Image.open(path))
            label[:1 if "border" in how else 0] = 255
            label[label == (3 if "no hat" in how else 256)] = 0
            Image.fromarray(np.uint8(255) * (label > 0) if how == "masks" else label).save(path)
    code, text = run_check(custom(root), tmp_path, capsys)
    found = re.findall(r"  .*labels/(\w+): .* 255", text)
    assert found == faults and code == (1 if faults else 0)
    for split in ("train", "val"):
        warning = sample_warning(open_split(custom(root), split), CLASSES)
        assert split not in faults or f"labels/{split}" in warning and " 255" in warning


@pytest.mark.parametrize("way", (0, 4, 6))
def test_exif_orientation(tmp_path, capsys, way):
    exif = Image.Exif()
    exif[0x0112] = way                                     # some cameras write 0, which is undefined
    root = make_custom(tmp_path)
    picture(0).save(root / "images/train/p0.jpg", exif=exif)
    stored = Image.open(root / "images/train/p0.jpg")
    stored, shown = np.array(stored), np.array(ImageOps.exif_transpose(stored))
    assert np.array_equal(read_photo(root / "images/train/p0.jpg"), shown)
    for drawn_on in (shown, stored):                       # training follows the label's size
        save(numbers(0, drawn_on.shape[1::-1]), root / "labels/train/p0.png")
        image, label = open_split(custom(root), "train").read(0)
        assert np.array_equal(image, drawn_on if stored.shape != shown.shape else stored)
    assert run_check(custom(root), tmp_path, capsys)[0] == 0


WRONG = {"": lambda label: label,
         "interpolation": lambda label: np.array(Image.fromarray(label).resize((96, 192), Image.BILINEAR)),
         "Human_ids": lambda label: np.unique(label, return_inverse=True)[1].reshape(label.shape).astype(np.uint8),
         "3 of 20": lambda label: np.choose(label % 3, np.array([0, 5, 9], np.uint8)),
         "255": lambda label: np.uint8(255) * (label > 0)}


@pytest.mark.parametrize("words", WRONG)
def test_labels_that_look_wrong_are_warned_of(tmp_path, capsys, words):
    """By the check, and from a sample when training or evaluation starts."""
    for split, count in (("train", 12), ("val", 9)):
        for n in range(count):
            label = WRONG[words](draw(count, n, (128, 64))[1])
            save(Image.fromarray(label), tmp_path / f"labels/{split}/{n}.png")
            save(picture(n + 100 * count, label.shape[::-1]), tmp_path / f"images/{split}/{n}.png")
    cfg = custom(tmp_path, classes=datasets.LABEL_SETS["lip"].classes)
    warnings = [sample_warning(open_split(cfg, split), cfg.classes) for split in ("train", "val")]
    assert all(words in text and bool(words) == bool(text) for text in warnings)
    code, text = run_check(cfg, tmp_path, capsys)
    kind = "faults" if words == "255" else "warnings"
    assert code == (words == "255") and bool(words) == bool(re.search(f"{kind}: 2\n  .*labels/train: .*{words}", text))


@pytest.mark.skipif(not CCP.is_dir(), reason="needs the real photos")
def test_ccps_labels_give_no_warning():
    """They use 255 for ignored pixels and have no class 10."""
    cfg = custom(CCP, classes=(CCP / "classes.txt").read_text().split(), flip_pairs=())
    assert all(sample_warning(open_split(cfg, split), cfg.classes) == "" for split in ("train", "val"))


PHOTO, LABEL = "images/train/p1.jpg", "labels/train/p1.png"
RGB, GREY = picture(1), np.array(numbers(1))


def label_is(image, **options):
    return lambda root: image.save(root / LABEL, **options)


def bytes_are(path, change):
    return lambda root: (root / path).write_bytes(change((root / path).read_bytes()))


def listed(text, also=lambda root: None):
    return lambda root: ((root / "t.txt").write_bytes(text.encode(errors="surrogateescape")), also(root))


FAULTS = {                                                 # {name: (change, words of its message)}
    "missing label": (lambda r: (r / LABEL).unlink(), LABEL, "no such label"),
    "missing photo": (lambda r: (r / PHOTO).unlink(), LABEL, "no photo"),
    "size mismatch": (label_is(numbers(1, (41, 30))), PHOTO, "40 x 30", "41 x 30"),
    "value beyond the classes": (label_is(numbers(1, classes=5)), LABEL, "holds 4 on", "0 to 3"),
    "RGB label": (label_is(RGB), LABEL, "RGB pixels"),
    "truncated JPEG": (bytes_are(PHOTO, lambda b: b[:len(b) // 2]), PHOTO, "damaged or cut off"),
    "broken link": (lambda r: ((r / PHOTO).unlink(), (r / PHOTO).symlink_to("nowhere")), PHOTO, "No such file"),
    "two photos of one name": (lambda r: save(RGB, r / "images/train/p1.png"), "images/train/p1.png", "same name"),
    "photos and labels in one folder": (
        lambda r: [p.rename(r / "images/train" / p.name) for p in r.glob("labels/train/*")], "images/train", "folder"),
    "list: not there": (lambda r: None, "train list of names", "t.txt"),
    "list: empty": (listed("\n\n"), "t.txt", "empty"),
    "list: no such photo": (listed("p0\np9\n"), "line 2", "no photo p9"),
    "list: photo of another split": (listed("p0\nimages/val/p1.jpg\n"), "line 2", "images/val/p1.jpg", "images/train"),
    "list: photo without label": (listed("p0\np1.jpg", lambda r: (r / LABEL).unlink()), "line 2", "no label p1.png"),
    "list: either of two photos": (listed("p0\np1\n", lambda r: save(RGB, r / "images/train/p1.png")),
                                   "line 2", "p1.jpg or", "p1.png"),
    "list: class behind a photo": (listed("p0.jpg 1\n", lambda r: save(numbers(1), r / "labels/train/1.png")),
                                   "line 1", "no photo p0.jpg 1"),
    "list: duplicate": (listed("p0\np1\np0.jpg\n"), "line 3", "p0 ", "line 1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_named_and_stop_training_in_one_line(name, tmp_path, capsys):
    plant, *says = FAULTS[name]
    more = {"train_list": "t.txt"} if name.startswith("list") else {}
    more |= {"train_labels": "images/train"} if name == "photos and labels in one folder" else {}
    cfg = custom(make_custom(tmp_path / "data"), **more)
    plant(tmp_path / "data")
    code, text = run_check(cfg, tmp_path, capsys)
    with pytest.raises(UserError) as error:
        list(itertools.islice(train_loader(cfg, open_split(cfg, "train")), 3))         # more than an epoch
    faults = [line for line in text.split("\nfaults: ")[1].splitlines() if all(word in line for word in says)]
    assert code == 1 and len(faults) == 1
    assert all(word in str(error.value) for word in says) and "\n" not in str(error.value)


def test_the_command(tmp_path, capsys):
    root = make_custom(tmp_path / "data")
    cfg = written(tmp_path / "mine.yaml", f"dataset: custom\ndata_root: {root}\nclasses: {list(CLASSES)}\n"
                  "crop_size: 64\nbase_size: 64\nworkers: 2\n".encode())
    FAULTS["truncated JPEG"][0](root)
    done = subprocess.run([sys.executable, ROOT / "datasets.py", "--cfg", cfg, f"out={tmp_path}/mine"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "p1.jpg: damaged or cut off" in done.stdout
    assert re.search(r"0 background +\d+\.\d+% +5 ", done.stdout)       # intact pairs are counted
    assert {"augmented.png", "train.png", "val.png"} <= {path.name for path in (tmp_path / "mine_data").iterdir()}
    assert datasets.main(["--cfg", "configs/cihp.yaml", "data_root=/nowhere"]) == 1
    assert "/nowhere" in capsys.readouterr().out


def batches(cfg, count, start=0, world=1):
    """`count` complete batches: the micro-batches of all ranks and accumulation steps, concatenated."""
    pairs = open_split(cfg, "train")
    loaders = [train_loader(cfg, pairs, rank, world, start) for rank in range(world)]
    result = []
    for _ in range(count):
        images, labels, names = zip(*[next(loader) for loader in loaders for _ in range(cfg.accum_steps)])
        result.append((torch.cat(images), torch.cat(labels), sum(names, [])))
    for loader in loaders:
        loader.close()
    return result


def same(a, b):
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers, world, accum, start", [
    (4, 1, 1, 0), (0, 4, 1, 0), (2, 2, 2, 0), (0, 1, 4, 0), (1, 2, 1, 3)])
def test_batches_are_bit_identical_for_any_split(tmp_path, workers, world, accum, start):
    root = make_custom(tmp_path, train=7)
    reference = batches(custom(root, batch_size=8), 5)
    assert [(x.dtype, x.shape) for x in reference[0][:2]] == [(torch.uint8, (8, 3, 32, 32)), (torch.uint8, (8, 32, 32))]
    state = torch.get_rng_state(), np.random.get_state()[1]
    other = batches(custom(root, batch_size=8, workers=workers, accum_steps=accum), 5 - start, start, world)
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])
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
def test_epochs_are_shuffled_and_complete(count):
    keys = [key for batch in itertools.islice(BatchOrder(count, Config(batch_size=4)), 4 * count) for key in batch]
    epochs = np.array([index for index, _, _ in keys]).reshape(16, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all() and len(set(map(tuple, epochs))) > 4
    assert [(iteration, slot) for _, iteration, slot in keys] == [divmod(p, 4) for p in range(16 * count)]


def test_a_bad_photo_is_one_line(tmp_path):
    root = make_custom(tmp_path)
    (root / PHOTO).write_bytes(b"")
    cfg = custom(root, workers=2)
    with pytest.raises(UserError) as error:
        list(itertools.islice(train_loader(cfg, open_split(cfg, "train")), 3))
    assert str(error.value).startswith(f"{root / PHOTO}: not an image")


def test_a_process_ends_while_its_threads_read():
    """Python would end threads inside OpenCV with a signal."""
    program = ("import contextlib, config, datasets\ncfg = config.Config(workers=4, synthetic_size=(480, 480))\n"
               "with contextlib.closing(datasets.train_loader(cfg, datasets.open_split(cfg, 'train'))) as batches:\n"
               "    next(batches)\n    raise KeyError('a bug')\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'a bug'\n")


def test_a_stalled_disk_is_one_line_with_the_names(tmp_path, monkeypatch):
    root = make_custom(tmp_path)
    for path in root.rglob("images/train/*.jpg"):
        path.unlink(), os.mkfifo(path)
    monkeypatch.setattr(workers, "STALLED", 1)
    cfg = custom(root, workers=1)
    with pytest.raises(UserError, match=r"\Ap\d, p\d.* 1 s\Z"):
        next(train_loader(cfg, open_split(cfg, "train")))
    pairs = open_split(cfg, "train")                       # in evaluation, read by threads
    with pytest.raises(UserError, match=r"p\d: .* 1 s"):
        next(workers.read_ahead(pairs.read, range(3), 2, pairs.name))
    assert not list(workers.read_ahead(pairs.read, range(3), 2, interrupted=lambda: True))
