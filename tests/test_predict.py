"""predict.py and video.py: all kinds of files, names of outputs, exact results, honest reports."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import Processes, small_run, wait_until

import classmap
import inference
import predict
from datasets import LABEL_SETS
from engine import processes
from errors import UserError
from predict import Parser, Report, collect
from viz import pictures, video

PHOTOS = Path(__file__).parents[1] / "../shared/data/photos"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("runs") / "small")


def parse(argv: list[str]) -> int:
    """The program's exit code."""
    try:
        return predict.main(argv)
    except SystemExit as left:
        return left.code


@pytest.fixture(scope="module")
def parser(run: Path) -> Parser:
    return Parser(run)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (6, 5, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def odd_files(folder: Path) -> dict[str, tuple[int, int]]:
    """The kinds of files people have. Returns the (height, width) a viewer shows, by the name of the results."""
    folder.mkdir()
    rgb = Image.fromarray(photo(50, 70))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    rgb.save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[:len(whole) // 2])
    rgb.convert("L").save(folder / "grey.png")
    rgb.convert("RGBA").save(folder / "rgba.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(photo(50, 70)[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.png", exif=exif)
    Image.new("RGB", (1, 1), "red").save(folder / "one pixel.png")
    Image.new("RGB", (8000, 40), "green").save(folder / "long.JPG")
    rgb.save(folder / "Ünï çødé 人.webp")
    rgb.save(folder / "same.jpg")
    rgb.save(folder / "same.png")
    (folder / ".hidden.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no photo, and not called one")
    plain = ("whole", "grey", "rgba", "cmyk", "deep", "Ünï çødé 人", "same_jpg", "same_png")
    return {name: (50, 70) for name in plain} | {"turned": (70, 50), "one pixel": (1, 1), "long": (40, 8000)}


def test_odd_files_are_parsed_at_their_size_or_reported(run: Path, tmp_path: Path, capsys):
    sizes = odd_files(tmp_path / "in")
    out = tmp_path / "out"
    assert parse([str(tmp_path / "in"), "--run", str(run), "--out", str(out), "--batch", "3"]) == 1
    assert files(out / "labels") == sorted(f"{name}.png" for name in sizes)
    assert files(out / "overlays") == sorted(f"{name}.jpg" for name in sizes)
    for name, size in sizes.items():
        label = read(out / "labels" / f"{name}.png")
        assert label.shape == size and label.max() < 20, name
        with Image.open(out / "overlays" / f"{name}.jpg") as image:
            assert image.height >= size[0] and image.width >= size[1]
    with Image.open(out / "labels" / "whole.png") as image:
        assert image.mode == "P" and image.getpalette()[:60] == [v for c in LABEL_SETS["lip"].palette for v in c]
    printed = capsys.readouterr()
    assert "11 parsed" in printed.out and "3 not parsed" in printed.err
    reports = {line.split(":")[0].split("/")[-1].strip(): line for line in printed.err.splitlines() if "/in/" in line}
    assert set(reports) == {"empty.jpg", "text.png", "truncated.jpg"}
    assert "empty" in reports["empty.jpg"] and "not a picture" in reports["text.png"]
    assert "cut off" in reports["truncated.jpg"]
    assert "same.jpg is called same_jpg" in printed.out


def test_colour_modes_and_orientation_change_nothing_else(run: Path, tmp_path: Path, parser: Parser):
    odd_files(tmp_path / "in")
    label = parser.parse(tmp_path / "in" / "same.png")
    assert len(np.unique(label)) > 3                       # the network sees something to get wrong
    assert (parser.parse(tmp_path / "in" / "rgba.png") == label).all()
    assert (parser.parse(photo(50, 70)) == label).all()
    turned = parser.parse(np.ascontiguousarray(np.rot90(photo(50, 70), -1)))     # orientation 6: turn to the right
    assert (parser.parse(tmp_path / "in" / "turned.png") == turned).all()


@pytest.mark.parametrize("size", [(50, 70), (300, 20), (1, 1), (64, 64)])
@pytest.mark.parametrize("tta", [False, True])
def test_labels_are_the_argmax_of_the_networks_probabilities(run: Path, tmp_path: Path, monkeypatch, size, tta):
    image = photo(*size)
    Image.fromarray(image).save(tmp_path / "x.png")
    parser = Parser(run, tta=tta)
    expected = parser.probabilities(image)
    assert expected.shape == (20, *size)
    np.testing.assert_allclose(expected.sum(0), 1, atol=1e-5)
    monkeypatch.setattr(inference, "CPU_STRIP", 4 * 20 * size[1] * 7)           # strips of 7 rows, as a huge photo has
    arguments = [str(tmp_path / "x.png"), "--run", str(run), "--out", str(tmp_path / "out"), "--masks", "--probs"]
    assert parse(arguments + ["--tta"] * tta) == 0
    label = read(tmp_path / "out/labels/x.png")
    best = np.sort(expected, 0)
    assert (label == expected.argmax(0))[best[-1] - best[-2] > 1e-5].all()
    assert (parser.parse(image) == label).mean() > 0.999
    probs = np.load(tmp_path / "out/probs/x.npy")
    assert probs.dtype == np.float16
    np.testing.assert_allclose(probs, expected, atol=1e-3)
    masks = np.stack([read(path) for path in sorted((tmp_path / "out/masks/x").iterdir())])
    assert masks.shape == (20, *size) and (masks.argmax(0) == label).all() and (np.sort(masks, 0)[-2] == 0).all()
    assert files(tmp_path / "out/masks/x")[5] == "05_Upper-clothes.png"


@pytest.mark.parametrize("name", ["atr", "tryon", "viton_hd", "coarse"])
def test_all_results_follow_a_class_map(run: Path, tmp_path: Path, parser: Parser, name: str):
    image, path = photo(50, 70), Path(predict.__file__).with_name("configs") / "maps" / f"{name}.yaml"
    Image.fromarray(image).save(tmp_path / "x.png")
    clip(tmp_path / "v.avi", 3)
    target, merge = classmap.load(path, LABEL_SETS["lip"])
    arguments = [str(tmp_path / "x.png"), "--run", str(run), "--map", str(path)]
    assert parse([*arguments, "--out", str(tmp_path / "a"), "--probs", "--masks"]) == 0
    assert parse([*arguments, str(tmp_path / "v.avi"), "--out", str(tmp_path / "b"), "--frames"]) == 0
    plain = parser.probabilities(image)
    expected = np.stack([plain[list(found)].sum(0) for found in merge])
    np.testing.assert_allclose(np.load(tmp_path / "a/probs/x.npy"), expected, atol=1e-3)
    best = np.sort(expected, 0)
    clear = best[-1] - best[-2] > 1e-5
    if name == "coarse":                                   # renamed labels would be wrong somewhere
        assert (expected.argmax(0) != np.array(inverse(merge))[plain.argmax(0)]).any()
    for label in (read(tmp_path / "a/labels/x.png"), read(tmp_path / "b/labels/x.png"),
                  Parser(run, class_map=path).parse(image)):
        assert (label == expected.argmax(0))[clear].all()
    with Image.open(tmp_path / "a/labels/x.png") as picture:
        assert picture.getpalette()[:3 * len(merge)] == [v for colour in target.palette for v in colour]
    masks = np.stack([read(file) for file in sorted((tmp_path / "a/masks/x").iterdir())])
    assert len(masks) == len(merge) and (masks.argmax(0) == read(tmp_path / "a/labels/x.png")).all()
    frames = [read(file) for file in sorted((tmp_path / "b/labels/v.avi").iterdir())]
    assert len(frames) == 3 and max(frame.max() for frame in frames) < len(merge)
    label = read(tmp_path / "a/labels/x.png")
    drawn = pictures.with_legend(pictures.overlay(image, label, target.palette), target.classes, target.palette,
                                 pictures.present(label))
    assert np.abs(read(tmp_path / "a/overlays/x.jpg").astype(int) - drawn).mean() < 3


def inverse(merge: classmap.Merge) -> list[int]:
    """For each of the network's labels the target that takes it."""
    return [next(t for t, found in enumerate(merge) if k in found) for k in range(20)]


def test_size_is_the_long_side_the_network_sees(run: Path, monkeypatch):
    seen = []
    parser = Parser(run, size=160)
    forward = parser.model.forward
    monkeypatch.setattr(parser.model, "forward", lambda image: (seen.append(image.shape), forward(image))[1])
    parser.parse(photo(50, 100))
    assert seen == [(1, 3, 96, 160)]


def test_knobs_stand_between_the_photos(run: Path, tmp_path: Path, monkeypatch, parser: Parser, capsys):
    """They are overrides of the run's config, but where a file has such a name."""
    seen = []
    init = Parser.__init__
    monkeypatch.setattr(Parser, "__init__", lambda self, *args: (init(self, *args), seen.append(self))[0])
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "seed=1.png"):
        Image.fromarray(photo(40, 50)).save(name)
    assert parse(["precision=bf16", "photo.png", "--run", str(run), "base_size=160", "seed=1.png", "--size", "96"]) == 0
    assert files(tmp_path / "predictions") == [f"{kind}/{name}{ending}" for kind, ending in (
        ("labels", ".png"), ("overlays", ".jpg")) for name in ("photo", "seed=1")]
    cfg = seen[0].model.cfg
    assert (cfg.precision, cfg.base_size, parser.model.cfg.precision) == ("bf16", 96, "fp32")
    capsys.readouterr()
    assert parse(["photo.png", "--run", str(run), "precision=int4"]) == 1
    assert "precision must be one of" in capsys.readouterr().err
    assert parse(["precision=bf16", "--run", str(run)]) == 2
    assert "required: INPUT" in capsys.readouterr().err


def test_a_panorama_longer_than_a_jpeg_can_be(run: Path, tmp_path: Path):
    Image.fromarray(np.tile(photo(20, 100), (1, 660, 1))).save(tmp_path / "x.png")
    assert parse([str(tmp_path / "x.png"), "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    assert read(tmp_path / "out/labels/x.png").shape == (20, 66_000)
    assert read(tmp_path / "out/overlays/x.jpg").shape[1] == 65_500


@pytest.mark.parametrize("mistake, words", [
    ("precison=bf16", "override 'precison=bf16': unknown key 'precison', did you mean 'precision'?"),
    ("tta_scale=[1.0]", "unknown key 'tta_scale'"), ("out=there", "which cannot be changed any more"),
    ("--size=20000", "size must be a whole number of pixels between 32 and 16,384, not 20000")])
def test_a_knob_that_does_not_exist_is_said_before_the_work(run: Path, tmp_path: Path, capsys, mistake: str, words: str):
    Image.fromarray(photo(40, 50)).save(tmp_path / "a.png")
    assert parse([str(tmp_path / "a.png"), mistake, "--run", str(run), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not files(tmp_path / "out")


@pytest.mark.parametrize("wrong, words", [(3, "not int"), (("a.jpg",), "not tuple"), (np.zeros((0, 4, 3), np.uint8), "RGB")])
def test_what_is_no_photo(parser: Parser, wrong, words: str):
    for take in (parser.parse, parser.probabilities):
        with pytest.raises(UserError, match=f"a photo must be .*{words}"):
            take(wrong)


def test_names_never_collide(tmp_path: Path):
    rng = random.Random(0)
    for _ in range(50):
        parts = ("", "b/", "B/"), ("a", "A", "a_jpg", "a_2"), (".jpg", ".JPG", ".png", ".mp4")
        names = ["".join(map(rng.choice, parts)) for _ in range(12)]
        jobs = predict._name([(name, name) for name in names])
        assert len({job.name.lower() for job in jobs}) == len(names)
        assert [job.path for job in jobs] == names
    names = ["a.jpg", "b.tar.jpg", "c/a.jpg"]
    assert [job.name for job in predict._name([(n, n) for n in names])] == ["a", "b.tar", "c/a"]


def test_inputs_are_found_once_in_folders_globs_and_by_name(tmp_path: Path, monkeypatch):
    for name in ("p/a.jpg", "p/deep/b.PNG", "p/clip.mp4", "q/a.jpg", "p/.git/c.jpg", "p/x.txt", "7", "we[i]rd.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    out = Path("out")

    def names(*inputs: str) -> list[str]:
        report = Report()
        photos, videos, cameras = collect(list(inputs), out, report)
        return [job.name for job in photos + videos] + cameras + report.failed

    assert names("p") == ["a", "deep/b", "clip"]
    assert names("p", "q") == ["p/a", "p/deep/b", "q/a", "p/clip"]
    assert names("p/a.jpg", "q/a.jpg", "p/../p/a.jpg") == ["a_jpg", "a_jpg_2"]
    assert names("**/*.jpg") == ["a_jpg", "a_jpg_2", "we[i]rd"]
    assert names("we[i]rd.jpg", "3", "7") == ["we[i]rd", "7", 3]
    assert names("gone.jpg", "gone*") == ["gone.jpg: no such file or folder", "gone*: matches no file"]
    shutil.copytree("p", "out/labels")
    assert names(".") == ["we[i]rd", "p/a", "p/deep/b", "q/a", "p/clip"]
    with pytest.raises(UserError, match="choose another --out"):
        names("out/labels/a.jpg")


def test_results_beside_the_photos_are_not_parsed_again(run: Path, tmp_path: Path):
    Image.fromarray(photo(20, 30)).save(tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()
    for _ in range(2):
        assert parse([str(tmp_path), "--run", str(run), "--out", str(tmp_path)]) == 0
    assert files(tmp_path) == ["labels/x.png", "overlays/x.jpg", "x.png"]
    assert (tmp_path / "x.png").read_bytes() == before


def test_interrupt_leaves_whole_files_and_says_so(run: Path, tmp_path: Path, monkeypatch, capsys):
    for n in range(5):
        Image.fromarray(photo(20, 30, n)).save(tmp_path / f"{n}.png")
    work, calls = Parser.parse_batch, []

    def interrupted(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(self, images)

    monkeypatch.setattr(Parser, "parse_batch", interrupted)
    out = tmp_path / "out"
    assert parse([str(tmp_path), "--run", str(run), "--out", str(out), "--batch", "1"]) == 130
    assert files(out) == ["labels/0.png", "labels/1.png", "overlays/0.jpg", "overlays/1.jpg"]
    printed = capsys.readouterr()
    assert "2 parsed" in printed.out and "stopped" in printed.err


def test_too_many_pixels_and_other_formats_are_one_line_each(run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)                # Pillow refuses twice as many
    Image.new("RGB", (10, 10)).save(tmp_path / "fits.png")
    Image.new("RGB", (10_001, 1)).save(tmp_path / "large.png")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    assert parse([str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out")]) == 1
    report = capsys.readouterr().err.partition("2 not parsed:")[2]
    assert "large.png: too many pixels, make it smaller first (Image size (10001 pixels) exceeds limit" in report
    assert "phone.heic: not a picture in JPEG, PNG, WEBP, BMP, " in report and ": convert it first" in report
    assert files(tmp_path / "out") == ["labels/fits.png", "overlays/fits.jpg"]


def test_what_cannot_be_written_is_that_photos_failure(run: Path, tmp_path: Path, capsys):
    """Whatever is in the way, whichever output it is; the others are done, and nothing hidden is named or left."""
    for name in "abcdefgh":
        Image.fromarray(photo(20, 30)).save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    for folder in ("labels/b.png", "overlays/d.jpg", "masks/e/00_Background.png", "probs/f.npy"):
        (out / folder / "full").mkdir(parents=True)
    (out / "masks/h").write_text("a file where a folder is to be")
    arguments = [str(tmp_path), "--run", str(run), "--out", str(out), "--masks", "--probs", "--batch", "2"]
    assert parse(arguments) == 1
    printed = capsys.readouterr()
    assert "3 parsed" in printed.out and "5 not parsed" in printed.err
    lines = printed.err.partition("5 not parsed:\n")[2].splitlines()
    assert sorted(line.split(":")[0].strip() for line in lines) == [str(tmp_path / f"{n}.png") for n in "bdefh"]
    assert all(str(out) in line for line in lines) and "/." not in printed.err
    assert {name for name in files(out) if "/." in name} == set()
    for name in "acg":
        assert len(list((out / "masks" / name).iterdir())) == 20 and (out / "labels" / f"{name}.png").is_file()


def test_a_full_disk_is_told_for_each_photo(run: Path, tmp_path: Path, monkeypatch, capsys):
    for name in "ab":
        Image.fromarray(photo(20, 30)).save(tmp_path / f"{name}.png")

    def full(picture, path, **_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    assert parse([str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().err
    for name in "ab":
        label = tmp_path / f"out/labels/{name}.png"
        assert f"{tmp_path}/{name}.png: {label} could not be written (No space left" in printed


def test_a_folder_that_takes_no_files_is_told_before_the_work(run: Path, tmp_path: Path, capsys):
    Image.fromarray(photo(20, 30)).save(tmp_path / "x.png")
    (tmp_path / "out").write_text("a file")
    assert parse([str(tmp_path / "x.png"), "--run", str(run), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {tmp_path}/out takes no files (File exists)\n" and not printed.out


def test_a_photo_too_large_for_the_memory_is_its_own_failure(run: Path, tmp_path: Path, monkeypatch, capsys):
    for size in (20, 30, 40):
        Image.fromarray(photo(size, size)).save(tmp_path / f"{size}.png")
    work = Parser.parse_batch

    def scarce(self, images):
        if any(len(image) == 30 for image in images):
            raise MemoryError
        return work(self, images)

    monkeypatch.setattr(Parser, "parse_batch", scarce)
    arguments = [str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out"), "--batch", "1"]
    assert parse(arguments) == 1
    printed = capsys.readouterr()
    assert "30.png: out of memory: try a smaller --batch or --size" in printed.err and "2 parsed" in printed.out
    assert files(tmp_path / "out/labels") == ["20.png", "40.png"]


def test_a_bug_keeps_its_traceback(run: Path, tmp_path: Path, monkeypatch):
    Image.fromarray(photo(20, 30)).save(tmp_path / "x.png")
    monkeypatch.setattr(pictures, "save_palette_png", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        parse([str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out")])


FORMATS = {"jpe": "JPEG", "jfif": "JPEG", "mpo": "MPO", "jp2": "JPEG2000", "tga": "TGA", "ppm": "PPM", "gif": "GIF",
           "tif": "TIFF", "pcx": "PCX", "sgi": "SGI", "bmp": "BMP", "webp": "WEBP", "avif": "AVIF", "qoi": "QOI"}
LOSSLESS = {"tga", "ppm", "tif", "pcx", "sgi", "bmp"}


def test_a_photo_is_parsed_in_whatever_format_it_is(run: Path, tmp_path: Path, parser: Parser):
    rgb, expected, written = Image.fromarray(photo(50, 70)), parser.parse(photo(50, 70)), []
    for ending, name in FORMATS.items():
        if ending not in ("avif", "qoi") or name in Image.SAVE:          # newer than the oldest Pillow
            more = {"save_all": True, "append_images": [Image.fromarray(photo(50, 70, 1))]} if ending == "mpo" else {}
            rgb.save(tmp_path / f"{ending}.{ending}", format=name, **more)
            written.append(ending)
    grey = np.tile(np.arange(70, dtype=np.uint16) * 900, (50, 1))
    Image.fromarray(grey).save(tmp_path / "deep.tiff")
    shutil.copy(tmp_path / "jpe.jpe", tmp_path / "is a jpeg.tga")
    assert parse([str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out/labels") == sorted(f"{name}.png" for name in (*written, "deep", "is a jpeg"))
    for ending in written:
        found = read(tmp_path / f"out/labels/{ending}.png")
        assert found.shape == (50, 70) and (found == expected).mean() > (0.999 if ending in LOSSLESS else 0.9), ending
    deep = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert (read(tmp_path / "out/labels/deep.png") == parser.parse(deep)).mean() > 0.999
    shutil.copy(tmp_path / "jpe.jpe", tmp_path / "no ending")            # by its name: whatever it is called
    assert parse([str(tmp_path / "no ending"), "--run", str(run), "--out", str(tmp_path / "named")]) == 0
    assert (read(tmp_path / "named/labels/no ending.png") == read(tmp_path / "out/labels/jpe.png")).all()


def test_pixels_without_one_way_to_show_them_are_refused(run: Path, tmp_path: Path, capsys):
    Image.fromarray(np.linspace(-1, 9, 30, dtype=np.float32).reshape(5, 6)).save(tmp_path / "depth.tiff")
    assert parse([str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out")]) == 1
    assert "depth.tiff: pixels of a kind (Pillow's F) without one way to be shown" in capsys.readouterr().err


def test_what_is_passed_over_is_said(run: Path, tmp_path: Path, capsys):
    Image.fromarray(photo(20, 30)).save(tmp_path / "x.png")
    for name in ("a.txt", "b.txt", "raw.CR2", "README", ".hidden"):
        (tmp_path / name).write_text("x")
    assert parse([str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    said = "passed over, by their endings no photos or videos: 2 .txt, 1 without an ending, 1 .cr2"
    assert said in capsys.readouterr().out


def test_linked_folders_are_followed_once(tmp_path: Path, monkeypatch):
    for name in ("album/a.jpg", "album/sub/b.jpg", "elsewhere/c.jpg", "elsewhere/deep/d.jpg", "out/labels/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for link, target in {"album/0 more": "../elsewhere", "elsewhere/deep/up": "../../album", "album/1 sub": "sub",
                         "album/self": ".", "album/gone": "nowhere", "album/results": "../out/labels", "way": "album",
                         "album/f.jpg": "../elsewhere/c.jpg"}.items():
        Path(link).symlink_to(target)
    report = Report()
    expected = ["a", "f", "sub/b", "0 more/deep/d"]        # f.jpg and 0 more/c.jpg are one file
    for start in ("album", "way"):
        assert [job.name for job in collect([start], Path("out"), report)[0]] == expected
    assert len(collect(["."], Path("out"), report)[0]) == 4 and not report.failed


def test_a_folder_without_permission_is_reported(tmp_path: Path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir, report = os.scandir, Report()

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    collect([str(tmp_path)], tmp_path / "out", report)
    assert report.failed == [f"{tmp_path}/closed: Permission denied"]


@pytest.mark.parametrize("arguments, words", [
    (["nothing/"], "nothing: no such file or folder"), (["."], "no photo or video in ."),
    (["photo.png", "--run", "nowhere"], "nowhere: no such run"), (["photo.png"], "holds no run yet"),
    (["photo.png", "--run", "RUN", "--map", "no.yaml"], "no.yaml: no such class map"),
    (["photo.png", "--run", "RUN", "--device", "warp"], "device 'warp' cannot be used"),
    (["photo.png", "--run", "RUN", "--device", "cuda:77"], "device 'cuda:77' cannot be used")])
def test_mistakes_are_one_line(run: Path, tmp_path: Path, monkeypatch, capsys, arguments: list[str], words: str):
    if arguments[0].endswith(".png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    assert parse([str(run) if argument == "RUN" else argument for argument in arguments]) == 1
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.startswith("error:")
    assert printed.err.count("\n") == 1 and not printed.out


def test_the_program_ends_with_the_honest_code(run: Path, tmp_path: Path):
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    command = [sys.executable, predict.__file__, str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "bad.png" in done.stderr
    assert files(tmp_path / "out") == ["labels/good.png", "overlays/good.jpg"]


# ---- from Python

def test_a_photo_may_be_a_path_a_picture_or_an_array(run: Path, tmp_path: Path, parser: Parser):
    rgb = Image.fromarray(photo(50, 70))
    expected = parser.parse(photo(50, 70))
    rgb.save(tmp_path / "x.png")
    rgb.save(tmp_path / "x.tga")
    exif = Image.Exif()
    exif[0x0112] = 8
    rgb.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png", exif=exif)
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(np.uint8(255) * (np.arange(70) < 40)[None].repeat(50, 0)))
    white = photo(50, 70)
    white[:, 40:] = 255
    for same in (tmp_path / "x.png", str(tmp_path / "x.tga"), rgb, Image.open(tmp_path / "x.png"), rgb.convert("RGBA"),
                 Image.open(tmp_path / "turned.png"), photo(50, 70)[::-1][::-1]):
        assert (parser.parse(same) == expected).all()
        np.testing.assert_array_equal(parser.probabilities(same).argmax(0) == expected, True)
    assert (parser.parse(clear) == parser.parse(white)).all() and clear.mode == "RGBA"   # it is the caller's: as it was
    deep = Image.fromarray((np.arange(3500, dtype=np.uint16) * 18).reshape(50, 70))
    grey = (np.asarray(deep) >> 8).astype(np.uint8)
    assert (parser.parse(deep) == parser.parse(np.stack([grey] * 3, -1))).all()
    for wrong, words in ((photo(5, 5)[..., 0], "must be RGB"), (photo(5, 5) / 255, "must be RGB"),
                         (tmp_path / "no.png", "no such file"), (Image.new("F", (5, 5)), "without one way to be shown")):
        with pytest.raises(UserError, match=words):
            parser.parse(wrong)


def test_a_list_of_photos_of_mixed_sizes(run: Path, tmp_path: Path, parser: Parser):
    photos = [photo(*size, seed) for seed, size in enumerate([(50, 70), (1, 1), (300, 20), (64, 64), (20, 90), (50, 70)])]
    Image.fromarray(photos[1]).save(tmp_path / "1.png")
    mixed = [photos[0], tmp_path / "1.png", Image.fromarray(photos[2]), *photos[3:]]
    for labels in (parser.parse(mixed), parser.parse(mixed, tta=False)):
        assert [label.shape for label in labels] == [image.shape[:2] for image in photos]
        assert all((label == parser.parse(image)).mean() > 0.999 for label, image in zip(labels, photos))
    assert parser.parse([]) == []


def test_tta_by_photo(run: Path, parser: Parser):
    image, always = photo(50, 70), Parser(run, tta=True)
    plain, averaged = parser.probabilities(image), always.probabilities(image)
    assert np.abs(plain - averaged).max() > 0.01
    np.testing.assert_array_equal(parser.probabilities(image, tta=True), averaged)
    np.testing.assert_array_equal(always.probabilities(image, tta=False), plain)
    assert (parser.parse(image, tta=True) == always.parse(image)).all()
    assert (always.parse([image], tta=False)[0] == parser.parse(image)).all()


def test_threads_may_share_a_parser(run: Path, parser: Parser, monkeypatch):
    """One at a time goes through the network, and each gets what it would get alone."""
    images = [photo(40 + n, 60, n) for n in range(24)]
    expected = [parser.parse(image) for image in images]
    inside, most, forward = [], [], parser.model.forward

    def watched(image):
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.002)
        logits = forward(image)
        inside.pop()
        return logits

    monkeypatch.setattr(parser.model, "forward", watched)
    with ThreadPoolExecutor(8) as pool:
        labels = list(pool.map(parser.parse, images))
        shares = list(pool.map(parser.probabilities, images[:8]))
    assert max(most) == 1 and len(most) == 32
    assert all((label == wanted).all() for label, wanted in zip(labels, expected))
    assert all((share.argmax(0) == wanted).all() for share, wanted in zip(shares, expected))


def test_the_example_of_the_docstring(run: Path, tmp_path: Path, monkeypatch):
    lines = [line[8:] for line in Parser.__doc__.splitlines() if line.startswith(" " * 8)]
    assert len(lines) == 5
    Image.fromarray(photo(50, 70)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {"Parser": Parser, "np": np, "Image": Image}
    exec("\n".join(lines).replace("runs/lip", str(run)), names)
    assert names["label"].shape == names["mask"].shape == (50, 70)
    label, chosen = names["label"], [5, 7, 6]
    assert (read(tmp_path / "upper.png") == (label == chosen[0]) | (label == chosen[1]) | (label == chosen[2])).all()


@pytest.mark.parametrize("before", ["import datasets", "import evaluate", ""])
def test_the_names_of_hugging_face(tmp_path: Path, before: str):
    """Whether theirs are imported before, or only stand first in the path."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/__init__.py").write_text("")
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/__init__.py").write_text("import datasets")    # as the real one does
    root = str(Path(predict.__file__).parent)
    program = f"import sys\nsys.path[:0] = [{str(tmp_path)!r}]\n{before}\nsys.path.insert({0 if before else 1}, {root!r})\n"
    done = subprocess.run([sys.executable, "-c", program + "import predict"], capture_output=True, text=True, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: SCHNet's datasets.py cannot be imported beside")
    assert str(tmp_path / "datasets") in last and "use SCHNet in a process that does not import them" in last


# ---- many processes

def parse_in_a_process(argv: list[str]):
    sys.exit(predict.main(argv))


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of several sizes in several folders, some too large for a batch, two that are none, and a video."""
    folder = tmp_path_factory.mktemp("album")
    for n in range(33):
        (folder / "abc"[n % 3]).mkdir(exist_ok=True)
        size = ((50, 70), (70, 50), (64, 64), (33, 90))[n % 4]
        Image.fromarray(photo(*size, n)).save(folder / "abc"[n % 3] / f"{n}.png")
    (folder / "b" / "empty.png").write_bytes(b"")
    (folder / "c" / "text.jpg").write_text("not a picture")
    clip(folder / "c" / "walk.avi", 4)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder) if "/." not in name}


@pytest.fixture(scope="module")
def alone(run: Path, album: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of one process, by name."""
    folder = tmp_path_factory.mktemp("alone")
    with Processes(folder, parse_in_a_process, arguments(run, album, folder / "out")) as one:
        assert one.wait() == [1], one.said()
        assert "34 parsed" in one.said() and "2 not parsed" in one.said()
    return contents(folder / "out")


def arguments(run: Path, album: Path, out: Path, *more: str) -> list[str]:
    return [str(album), "--checkpoint", str(run), "--out", str(out), "--batch", "3", "--frames", "--masks", *more]


@pytest.mark.parametrize("count", [2, 3])
def test_many_processes_write_what_one_writes(run: Path, album: Path, tmp_path: Path, alone: dict, count: int):
    with Processes(tmp_path, parse_in_a_process, arguments(run, album, tmp_path / "out"), count=count) as all_of_them:
        assert all_of_them.wait() == [1] * count           # as alone
        said = [all_of_them.said(rank) for rank in range(count)]
    assert contents(tmp_path / "out") == alone
    assert said[0].count("34 parsed in") == said[0].count("2 not parsed:") == 1
    assert all(text.count("empty.png") == text.count("text.jpg") == (not rank) for rank, text in enumerate(said))
    assert "photo" not in "".join(said[1:]).replace(str(album), "") and "Traceback" not in "".join(said)


def test_every_photo_is_parsed_once(run: Path, album: Path, tmp_path: Path, alone: dict[str, bytes]):
    """By one of the processes: the parts do not overlap, and are of about the same size."""
    names = []
    for rank in range(3):
        args = predict.arguments(arguments(run, album, tmp_path / str(rank)))
        report, world = Report(), SimpleNamespace(rank=rank, size=3, main=rank == 0)
        predict.work(Parser(run), *collect(args.inputs, args.out, report)[:2], [], set(), args, world, report)
        names.append(report.parsed)
    expected = [name[7:-4] for name in alone if re.fullmatch(r"labels/./\d+.png", name)]
    assert sorted(sum(names, [])) == sorted([*expected, "c/walk"])
    assert max(map(len, names)) - min(map(len, names)) <= 4


@pytest.mark.parametrize("more", [[], ["--probs"]])
def test_what_is_there_is_left_out(run: Path, album: Path, tmp_path: Path, alone: dict, capsys, more: list[str]):
    out = tmp_path / "out"
    argv = arguments(run, album, out, "--skip-existing", *more)
    torch.set_num_threads(1)
    assert parse(argv) == 1
    first = contents(out)
    assert {name: first[name] for name in alone} == alone
    lost = ["labels/a/0.png", "overlays/b/4.jpg", "masks/c/8/07_Coat.png", "overlays/c/walk.mp4"]
    lost += ["probs/a/21.npy"] if more else []
    for name in lost:
        (out / name).unlink()
    before = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    capsys.readouterr()
    assert parse(argv) == 1                                # the two that are no pictures are tried again
    said = capsys.readouterr()
    assert f"; {34 - len(lost)} left out, they have their results" in said.out and f"{len(lost)} parsed" in said.out
    assert contents(out) == first
    written = {name for name, time in before.items() if (out / name).stat().st_mtime_ns != time}
    assert {"/".join(name.split("/")[1:3]).rsplit(".", 1)[0] for name in written} == {
        "a/0", "b/4", "c/8", "c/walk", *(["a/21"] if more else [])}
    (out / "labels/c/walk.avi/000002.png").unlink()        # the overlay is whole, the label maps are not
    assert parse(argv) == 1 and contents(out) == first


def test_killed_and_gone_on_with_is_as_never_stopped(run: Path, album: Path, tmp_path: Path, alone: dict[str, bytes]):
    """Three times, by different numbers of processes."""
    out = tmp_path / "out"
    for n, count in enumerate((2, 1, 3)):
        argv, already = arguments(run, album, out, "--skip-existing"), len(list(out.glob("labels/?/*.png")))
        with Processes(tmp_path, parse_in_a_process, argv, count=count) as some:
            wait_until(lambda: len(list(out.glob("labels/?/*.png"))) > already + 3 or some.all[0].exitcode is not None)
            for rank in range(count):
                some.send(signal.SIGKILL, rank)
            some.wait()
        assert contents(out).items() < alone.items(), n    # what is there is whole, and it is not all
    with Processes(tmp_path, parse_in_a_process, argv, count=2) as both:
        assert both.wait() == [1, 1]
        assert re.search(r"; \d+ left out", both.said()) and both.said(1) == ""
    assert contents(out) == alone


def slow_in_the_first(argv: list[str]):
    """Process 0 works on while the other is killed."""
    if os.environ["RANK"] == "0":
        parse_batch = Parser.parse_batch
        Parser.parse_batch = lambda *args: (time.sleep(1), parse_batch(*args))[1]
    processes.GRACE = 1.0
    sys.exit(predict.main(argv))


def test_a_process_that_dies_ends_the_run_with_a_word(run: Path, album: Path, tmp_path: Path):
    out = tmp_path / "out"
    with Processes(tmp_path, slow_in_the_first, arguments(run, album, out), count=2) as both:
        wait_until(lambda: len(list(out.glob("labels/?/*.png"))) > 3)
        both.send(signal.SIGKILL, 1)
        assert both.wait(60) == [1, -9]
        assert "another process of this run has ended" in both.said() and "Traceback" not in both.said()


@pytest.mark.parametrize("mistake, words", [
    (["--checkpoint", "nowhere"], "nowhere: no such run"), (["--map", "no.yaml"], "no.yaml: no such class map"),
    (["--device", "warp"], "device 'warp' cannot be used")])
def test_a_mistake_is_told_once(run: Path, album: Path, tmp_path: Path, mistake: list[str], words: str):
    with Processes(tmp_path, parse_in_a_process, [*arguments(run, album, tmp_path / "out"), *mistake], count=2) as both:
        assert both.wait() == [1, 1]
        assert (both.said(0) + both.said(1)).count("error") == 1 and words in both.said(0)


def test_torchrun_starts_it(run: Path, album: Path, tmp_path: Path, alone: dict[str, bytes]):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", predict.__file__,
               *arguments(run, album, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and contents(tmp_path / "out") == alone
    assert done.stdout.count("34 parsed in") == 1 and done.stderr.count("2 not parsed:") == 1


def test_torchrun_lets_the_options_through():
    """It refuses what might be short for one of its own, as --run is for --run-path on Python 3.11."""
    from torch.distributed.run import parse_args
    mine = ("x --checkpoint runs/x --out y --map m --skip-existing --tta --size 64 --masks --probs --frames --batch 2 "
            "--device cpu z").split()
    assert parse_args(["--nproc_per_node", "4", "predict.py", *mine]).training_script_args == mine
    args = predict.arguments(mine)
    assert (args.run, args.inputs, args.skip_existing, args.batch) == ("runs/x", ["x", "z"], True, 2)


def test_many_files_take_few_bytes_each(tmp_path: Path):
    """Of listing and naming them; a thousand folders of twenty photos."""
    for n in range(1000):
        (tmp_path / "in" / f"{n:04d}").mkdir(parents=True)
        for k in range(20):
            (tmp_path / "in" / f"{n:04d}" / f"{k:02d}.jpg").touch()
    tracemalloc.start()
    photos, _, _ = collect([str(tmp_path / "in")], tmp_path / "out", Report())
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(photos) == 20_000 and photos[21].name == "0001/01"
    assert held / 20_000 < 500 and most / 20_000 < 1500


# ---- video

def clip(path: Path, count: int = 7, size: tuple[int, int] = (50, 61), code: str = "MJPG", rate: float = 12):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), rate, size[::-1])
    assert writer.isOpened()
    for n in range(count):
        writer.write(cv2.cvtColor(photo(*size, seed=n), cv2.COLOR_RGB2BGR))
    writer.release()


def opened(path: Path) -> tuple[int, float, tuple[int, int]]:
    """Frames, rate and size of a video."""
    capture, frames = cv2.VideoCapture(str(path)), []
    rate = capture.get(cv2.CAP_PROP_FPS)
    while (read := capture.read())[0]:
        frames.append(read[1])
    return len(frames), rate, frames[0].shape[:2]


def test_a_video_and_its_stills_have_results_of_their_own(run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clip(Path("walk.avi"))
    Path("walk").mkdir()
    for n in range(1, 4):
        Image.fromarray(photo(70, 90, n)).save(f"walk/{n:06d}.png")
    assert parse([".", "--run", str(run), "--frames"]) == 0
    labels = Path("predictions/labels")
    assert [read(labels / f"walk/{n:06d}.png").shape for n in range(1, 4)] == 3 * [(70, 90)]
    assert len(files(labels / "walk.avi")) == 7 and len(files(labels)) == 10


def test_a_photo_is_not_done_because_a_video_of_its_name_is(run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clip(Path("a.avi"))
    Image.fromarray(photo(70, 90)).save("a.png")
    assert parse(["a.avi", "--run", str(run)]) == 0
    for n, said in ((1, "1 parsed"), (2, "1 left out")):
        assert parse(["a.png", "--run", str(run), "--skip-existing"]) == 0
        assert said in capsys.readouterr().out and files(Path("predictions/labels")) == ["a.png"]


def test_a_colon_in_a_name_is_no_protocol(run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip(Path("x.avi"))
    Path("x.avi").rename("a:b.avi")
    assert parse(["a:b.avi", "--run", str(run), "--out", "p:1"]) == 0
    assert opened(Path("p:1/overlays/a:b.mp4").absolute())[0] == 7


def test_a_video_keeps_its_length_and_rate(run: Path, tmp_path: Path, parser: Parser):
    clip(tmp_path / "walk.avi")
    out = tmp_path / "out"
    assert parse([str(tmp_path), "--run", str(run), "--out", str(out), "--frames", "--batch", "3"]) == 0
    count, rate, (height, width) = opened(out / "overlays/walk.mp4")
    assert (count, round(rate, 3)) == (7, 12) and height % 2 == width % 2 == 0 and height >= 50 and width >= 61
    assert files(out / "labels/walk.avi") == [f"{n:06d}.png" for n in range(1, 8)]
    capture = cv2.VideoCapture(str(tmp_path / "walk.avi"))
    for n in range(1, 8):
        frame = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
        assert (read(out / f"labels/walk.avi/{n:06d}.png") == parser.parse(frame)).mean() > 0.99
    assert files(out / "overlays") == ["walk.mp4"]


VIDEOS = {"ts": "mpg2", "mts": "mp4v", "m2ts": "mpg2", "3gp": "mp4v", "flv": "FLV1", "mkv": "mp4v", "webm": "VP80",
          "mov": "mp4v", "wmv": "WMV2", "vob": "mpg2", "m4v": "mp4v"}


def test_a_video_is_parsed_in_whatever_container_it_is(run: Path, tmp_path: Path):
    for ending, code in VIDEOS.items():
        clip(tmp_path / f"in {ending}.{ending}", 6, (48, 64), code)
    clip(tmp_path / "really.avi", 5, (48, 64))
    (tmp_path / "really.avi").rename(tmp_path / "a video.jpg")
    assert parse([str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out"), "--size", "32"]) == 0
    names = [*(f"in {ending}" for ending in VIDEOS), "a video"]
    assert files(tmp_path / "out") == sorted(f"overlays/{name}.mp4" for name in names)
    for ending in VIDEOS:
        count, rate, _ = opened(tmp_path / f"out/overlays/in {ending}.mp4")
        assert count == 6 and rate == pytest.approx(12, rel=2e-3), ending    # some round times to milliseconds
    assert opened(tmp_path / "out/overlays/a video.mp4")[:2] == (5, 12)


def declared_as(path: Path, rate: float):
    """Change what a .mkv says of its rate, the Matroska element DefaultDuration; the frames keep their times."""
    content = bytearray(path.read_bytes())
    at = content.index(b"\x23\xe3\x83")
    size = content[at + 3] & 0x7f
    content[at + 4:at + 4 + size] = int(1e9 / rate).to_bytes(size, "big")
    path.write_bytes(content)


@pytest.mark.parametrize("real, declared", [(5, 60), (5, 1000), (0.2, 25), (12, 240), (25, 5)])
def test_the_rate_is_that_of_the_frames_times(run: Path, tmp_path: Path, real: float, declared: float):
    clip(tmp_path / "x.mkv", 40, (48, 64), "mp4v", real)
    declared_as(tmp_path / "x.mkv", declared)
    assert opened(tmp_path / "x.mkv")[1] == pytest.approx(declared, rel=1e-4)         # a player is told so
    assert parse([str(tmp_path / "x.mkv"), "--run", str(run), "--out", str(tmp_path), "--size", "32"]) == 0
    count, rate, _ = opened(tmp_path / "overlays/x.mp4")
    assert count == 40 and rate == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("rate", [24000 / 1001, 25, 30000 / 1001, 59.94, 119.88, 12.5, 0.5])
@pytest.mark.parametrize("ending", ["avi", "mkv", "mp4"])
def test_a_rate_that_is_declared_rightly_is_kept(run: Path, tmp_path: Path, rate: float, ending: str):
    clip(tmp_path / f"x.{ending}", 25, (48, 64), "MJPG" if ending == "avi" else "mp4v", rate)
    declared = opened(tmp_path / f"x.{ending}")[1]
    assert video._rate(video._look_through(tmp_path / f"x.{ending}")[0], declared) == declared
    assert video._writable(declared) == pytest.approx(declared, abs=1e-3)


def test_frames_at_varying_times_take_as_long_in_all():
    times = [0, 100, 200, 300, 1300, 2300, 3300]           # milliseconds, as recorders of screens write them
    assert video._rate(times, 1000.0) == pytest.approx(6 / 3.3)
    assert video._rate([*times, 0.0], 1000.0) == pytest.approx(6 / 3.3)               # the last one has no time
    assert video._rate([40.0], 50.0) == 50 and video._rate([0.0, 0.0], 0.0) == 25
    film = [n * 1001 / 30 for n in range(20_000)]          # eleven minutes, in which 30 would lose 0.7 seconds
    assert video._rate(film, 30.0) == pytest.approx(30000 / 1001) and video._rate(film, 30000 / 1001) == 30000 / 1001


def test_every_rate_can_be_written(tmp_path: Path):
    for rate in (1e-4, 0.0333, 0.3333, 7.77777, 23.976, 65.5359, 71.23456, 217.3942, 655.351, 999.99, 1e5):
        clip(tmp_path / "x.mp4", 3, (48, 64), "mp4v", video._writable(rate))
        assert opened(tmp_path / "x.mp4")[1] == pytest.approx(min(max(rate, 0.01), 1000), rel=1e-3, abs=1e-3)


def trimmed(path: Path):
    """Halve the duration in an .mp4's edit list, as programs do that trim without encoding anew."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12                       # behind type, version and flags, number of entries
    content[at:at + 4] = (int.from_bytes(content[at:at + 4], "big") // 2).to_bytes(4, "big")
    path.write_bytes(content)


def test_a_trimmed_video_is_whole(run: Path, tmp_path: Path):
    clip(tmp_path / "x.mp4", 48, (48, 64), "mp4v")
    trimmed(tmp_path / "x.mp4")
    assert cv2.VideoCapture(str(tmp_path / "x.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 48
    assert parse([str(tmp_path / "x.mp4"), "--run", str(run), "--out", str(tmp_path), "--size", "32"]) == 0
    assert opened(tmp_path / "overlays/x.mp4")[:2] == (24, 12)


def streamable(path: Path):
    """Move what an .mp4 says of its frames to its beginning, as files for the web have it."""
    content, boxes, at = path.read_bytes(), {}, 0
    while at < len(content):
        size = int.from_bytes(content[at:at + 4], "big")
        boxes[content[at + 4:at + 8]] = bytearray(content[at:at + size])
        at += size
    moov = boxes.pop(b"moov")
    at = moov.index(b"stco") + 12                          # where the chunks are
    for place in range(at, at + 4 * int.from_bytes(moov[at - 4:at], "big"), 4):
        moov[place:place + 4] = (int.from_bytes(moov[place:place + 4], "big") + len(moov)).to_bytes(4, "big")
    path.write_bytes(boxes.pop(b"ftyp") + moov + b"".join(boxes.values()))


@pytest.mark.parametrize("name, code", [("x.avi", "MJPG"), ("x.mkv", "mp4v"), ("x.webm", "VP80"), ("x.mp4", "mp4v"),
                                        ("x.ts", "mpg2"), ("x.flv", "FLV1")])
def test_a_video_that_is_cut_off_is_parsed_as_far_as_it_goes(run: Path, tmp_path: Path, capsys, name, code):
    clip(tmp_path / name, 48, (48, 64), code)
    if name == "x.mp4":
        streamable(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    arguments = [str(tmp_path / name), "--run", str(run), "--out", str(tmp_path), "--size", "32"]
    assert parse(arguments) == 0 and opened(tmp_path / "overlays/x.mp4")[0] == 48
    (tmp_path / name).write_bytes(data[:len(data) * 6 // 10])
    assert parse(arguments) == 1
    line = capsys.readouterr().err.partition("1 not parsed:")[2].strip()
    count = opened(tmp_path / "overlays/x.mp4")[0]
    assert 20 < count < 40 and line.startswith(f"{tmp_path / name}: damaged or cut off (")
    assert line.endswith(f"); the {count} frames that could be read were parsed") and "\n" not in line


def test_damaged_videos_are_reported(run: Path, tmp_path: Path, capsys):
    clip(tmp_path / "whole.avi", 20)
    clip(tmp_path / "headless.mp4", 20, code="mp4v")
    data = (tmp_path / "headless.mp4").read_bytes()
    (tmp_path / "headless.mp4").write_bytes(data[:len(data) // 2])
    (tmp_path / "noise.mp4").write_bytes(b"no video at all" * 99)
    (tmp_path / "empty.mkv").write_bytes(b"")
    assert parse([str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out")]) == 1
    report = capsys.readouterr().err.partition("3 not parsed:")[2]
    for name in ("noise.mp4", "headless.mp4", "empty.mkv"):
        assert f"{tmp_path / name}: no frame could be read (" in report
    assert "moov atom not found" in report and "whole" not in report
    assert files(tmp_path / "out") == ["overlays/whole.mp4"]


def test_a_video_that_brings_the_decoder_down_is_reported(run: Path, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "viz").mkdir()
    (tmp_path / "viz/frame_times.py").write_text("import os; os.abort()")
    monkeypatch.setattr(video, "__file__", str(tmp_path / "viz/video.py"))
    clip(tmp_path / "x.avi")
    assert parse([str(tmp_path / "x.avi"), "--run", str(run), "--out", str(tmp_path / "out")]) == 1
    assert "x.avi: the decoder breaks down on it (exit code " in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of a file's size")
def test_a_disk_that_fills_up_under_a_video_is_reported(run: Path, tmp_path: Path, capsys):
    """The writer says nothing of it."""
    import resource
    clip(tmp_path / "x.avi", 30)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert parse([str(tmp_path / "x.avi"), "--run", str(run), "--out", str(tmp_path / "out")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"x.avi: {tmp_path}/out/overlays/x.mp4 could not be written whole" in capsys.readouterr().err
    assert files(tmp_path / "out") == []


def test_an_interrupted_video_leaves_nothing(parser: Parser, tmp_path: Path, monkeypatch):
    clip(tmp_path / "walk.avi")
    work, calls = parser.overlay, []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return work(*args)

    monkeypatch.setattr(parser, "overlay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        video.parse_video(parser, tmp_path / "walk.avi", tmp_path / "out.mp4")
    assert files(tmp_path) == ["walk.avi"]


def test_a_webcam_is_recorded_until_ctrl_c(run: Path, tmp_path: Path, monkeypatch):
    class Camera:
        def __init__(self, source):
            assert source == 0
            monkeypatch.undo()                             # what is written is looked at with OpenCV's own
            self.count = 0

        def get(self, key):
            return 30.0

        def read(self):
            self.count += 1
            if self.count == 6:
                raise KeyboardInterrupt
            return True, photo(50, 60, self.count)

        def release(self):
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    out = tmp_path / "out"
    assert parse(["0", "--run", str(run), "--out", str(out)]) == 0
    assert files(out) == ["overlays/webcam_0.mp4"] and opened(out / "overlays/webcam_0.mp4")[0] == 4


def test_no_webcam_is_reported(run: Path, tmp_path: Path, capsys):
    assert parse(["97", "--run", str(run), "--out", str(tmp_path)]) == 1
    assert "webcam 97: no frame could be read" in capsys.readouterr().err


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos for trials are not here")
def test_real_photos(run: Path, tmp_path: Path):
    assert parse([str(PHOTOS), "--run", str(run), "--out", str(tmp_path)]) == 0
    for path in PHOTOS.iterdir():
        with Image.open(path) as image:
            assert read(tmp_path / "labels" / f"{path.stem}.png").shape == (image.height, image.width)
