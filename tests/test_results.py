"""predict.py: its input files, results that are skipped or never replaced; the Python API."""

import io
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_predict import MAPS, contents, files, save
from tiny import photo, read, throw

from errors import UserError
from files.atomic import MARK
from files.inputs import list_inputs
from files.labels import LABEL_SETS
from predict import Parser
from viz import pictures


def found(*arguments: str) -> list[str]:
    inputs = list_inputs([*arguments])
    return [one.name for one in inputs.photos] + inputs.missing


def test_inputs_are_found_once_by_folder_pattern_and_name(here: Path):
    for name in ("p/a.jpg", "p/deep/b.PNG", "p/walk.mp4", "q/c.jpg", "p/.git/d.jpg", "p/x.txt", "7", "we[i]rd.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    assert found("p") == ["a", "deep/b"] and found("p", "q", "p/../p") == ["a", "deep/b", "c"]
    assert found("p/a.jpg", "p/../p/a.jpg", "q/c.jpg") == ["a", "c"] and found("**/*.jpg") == ["a", "c", "we[i]rd"]
    assert found("we[i]rd.jpg", "7") == ["we[i]rd", "7"]
    assert [line.split(":")[0] for line in found("gone.jpg", "gone*")] == ["gone.jpg", "gone*"]


@pytest.mark.parametrize("first, second, arguments", [
    ("p/a.jpg", "q/a.jpg", ["p/a.jpg", "q/a.jpg"]), ("p/a.jpg", "q/A.jpg", ["*/*.jpg"]), ("p/a.jpg", "p/a.png", ["p"]),
    ("p/x/a.jpg", "x/a.jpg", ["p", "."])])
def test_two_inputs_with_the_same_result_name_are_refused(here: Path, first: str, second: str, arguments: list[str]):
    for name in (first, second):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        list_inputs(arguments)
    assert first in str(error.value) and second in str(error.value)


def test_ignored_files_are_counted(parse, here: Path, monkeypatch, capsys):
    for name in ("x.png", "@eaDir/x.png", "sub/$Recycle.Bin/y.png", "sub/y.png"):
        save(name)
    assert found("**/*.png") == ["y", "x"]                 # sub/y.png, x.png
    assert parse("x.png", "sub", "--probs") == 0 and files("predictions/labels") == ["x.png", "y.png"]
    assert parse(".", "--tta", "--out", "sub/tta") == 0 and files("sub/tta/labels") == ["sub/y.png", "x.png"]
    os.symlink("predictions", "link")
    os.mkfifo("pipe.jpg")
    os.symlink("nowhere", "gone.png")
    os.symlink("/dev/null", "null.png")
    Path("README").touch()
    capsys.readouterr()
    assert parse(".", "pipe.jpg", "sub/*", "predictions/labels/*", "--out", "all") == 1
    printed = capsys.readouterr()
    assert files("all/labels") == ["sub/y.png", "x.png"] and "gone.png: a link to nowhere" in printed.err
    assert "1 found twice" in printed.out                  # sub/y.png, by the pattern too
    for words in (r"named pipe or device \(pipe.jpg\)", r"device \(./pipe.jpg\)", "@eaDir: ", "predictions: results",
                  "null.png",
                  r"folder \(sub/tta\)", "2 results of", "1 without ext"):
        assert re.search(f"ignored: .*{words}", printed.out), words
    assert parse("predictions/labels/x.png", "--out", "again") == 1      # also if given by name


def test_linked_folders_are_followed_once(here: Path, monkeypatch):
    for name in ("album/a.jpg", "album/sub/b.jpg", "elsewhere/c.jpg", "elsewhere/deep/d.jpg", "closed/e.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    for link, target in {"album/0 more": "../elsewhere", "elsewhere/deep/up": "../../album", "album/1 sub": "sub",
                         "album/self": ".", "album/gone": "nowhere", "way": "album",
                         "album/f.jpg": "../elsewhere/c.jpg"}.items():
        Path(link).symlink_to(target)
    for start in ("album", "way"):                         # f.jpg and 0 more/c.jpg are one file
        assert found(start) == ["a", "f", "sub/b", "0 more/deep/d"]
    monkeypatch.setattr(os, "scandir", lambda path: throw(PermissionError(13, "Permission denied", str(path))))
    assert found("closed") == ["closed: Permission denied"]


def test_results_of_another_file_are_not_replaced(parse, here: Path, capsys):
    """Of another call into the same folder; a photo that moved is the same one."""
    for folder in ("east", "west"):
        save(f"{folder}/front.png", photo(20, 30))
    assert parse("east", "--out", "out") == 0
    before = {name: Path("out", name).read_bytes() for name in files("out")}
    assert parse("west", "--out", "out") == 1
    printed = capsys.readouterr().err
    assert "east/front.png" in printed and "west/front.png" in printed
    assert {name: Path("out", name).read_bytes() for name in files("out")} == before
    Path("east").rename("moved")
    assert parse("moved", "--out", "out") == 0


def test_results_of_the_same_file_and_settings_are_skipped(parse, here: Path, capsys):
    def parsed(*arguments) -> int:
        capsys.readouterr()
        assert parse(*arguments, "--out", "out", "--skip-existing") == 0
        return int(re.search(r"(\d+) parsed in", capsys.readouterr().out)[1])

    save("west/front.png", photo(21, 30))
    assert [parsed("west"), parsed("west"), parsed("west/front.png")] == [1, 0, 0]
    assert [parsed("west", *options) for options in (["--tta"], ["--size", "96"], ["precision=bf16"], [])] == [1] * 4
    times = os.stat("west/front.png").st_mtime_ns
    save("west/front.png", photo(22, 30))
    os.utime("west/front.png", ns=(times, times))          # edited, but with the old time
    assert parsed("west") == 1 and read("out/labels/front.png").shape == (22, 30)
    os.utime("west/front.png", ns=(times, times + 1))
    assert [parsed("west", *more) for more in ([], ["--probs"], [], ["--probs"])] == [1, 1, 0, 0]
    for lost in ("overlays/front.jpg", "probs/front.npy"):
        Path("out", lost).unlink()
        assert parsed("west", "--probs") == 1 and Path("out", lost).exists()
    save("west/front.png", photo(20, 30))
    assert parsed("west") == 1 and files("out") == ["labels/front.png", "overlays/front.jpg"]
    shutil.copy(MAPS / "coarse.yaml", "map.yaml")
    for text in ("[255, 0, 0]", "[254, 0, 0]"):            # a map is known by its content
        Path("map.yaml").write_text(Path("map.yaml").read_text().replace("[255, 0, 0]", text))
        assert [parsed("west", "--map", "map.yaml"), parsed("west", "--map", "map.yaml")] == [1, 0]


@pytest.mark.parametrize("name, skip", [
    ("labels/x.png", []), ("labels/x.png", ["--skip-existing"]), ("probs/x.npy", []), ("overlays/x.jpg", [])])
def test_foreign_files_are_never_replaced(parse, here: Path, capsys, name: str, skip: list[str]):
    for photos in ("x.png", "y.png"):
        save(photos)
    assert parse("y.png", "--out", "out") == 0
    Path("out", name).parent.mkdir(parents=True, exist_ok=True)
    save("mine.png", np.full((20, 30), 5, np.uint8))
    mine = Path("mine.png").read_bytes()
    Path("out", name).write_bytes(mine)
    assert parse("x.png", "y.png", "--out", "out", "--probs", *skip) == 1
    assert Path("out", name).read_bytes() == mine and f"out/{name}: " in capsys.readouterr().err
    assert Path("out/probs/y.npy").exists()


@pytest.mark.parametrize("keeps_text", [False, True])
def test_labels_edited_by_hand_are_never_replaced(parse, here: Path, capsys, keeps_text: bool):
    save("x.png")
    assert parse("x.png", "--out", "out") == 0
    with Image.open("out/labels/x.png") as image:
        text, edited = PngInfo(), image.copy()
    for key, value in image.info.items():
        if keeps_text and isinstance(value, str):
            text.add_text(key, value)
    edited.putpixel((3, 4), 19 - edited.getpixel((3, 4)))
    edited.save("out/labels/x.png", pnginfo=text)
    if keeps_text:                                         # cut off by a copy
        Path("out/labels/x.png").write_bytes(Path("out/labels/x.png").read_bytes()[:-20])
        assert parse("x.png", "--out", "out", "--skip-existing") == 1
        capsys.readouterr()
    before = contents("out")
    for more in ([], ["--probs"], ["--tta"]):
        assert parse("x.png", "--out", "out", *more) == 1
        assert contents("out") == before and capsys.readouterr().err.count("changed since") == 1


def test_out_must_not_be_a_data_set(parse, here: Path):
    for split in ("train", "val"):
        save(f"mine/images/{split}/p0.jpg")
        save(f"mine/labels/{split}/p0.png", np.full((20, 30), 5, np.uint8))
    before = contents(".")
    for out in ("mine", "mine/labels", "mine/labels/val", "."):
        assert parse("mine/images", "--out", out, "--skip-existing") == 1
    assert contents(".") == before and not list(Path(".").rglob(MARK))


@pytest.mark.skipif(sys.platform == "win32", reason="has no file size limit")
@pytest.mark.parametrize("options, limit, name", [
    (["--probs"], 200_000, "probs/large.npy"), ([], 500, "labels/large.png"), ([], 20_000, "overlays/large.jpg")])
def test_a_full_disk_is_reported_per_file(parse, here: Path, capsys, options: list[str], limit: int, name: str):
    import resource
    save("large.png", photo(300, 200))
    Image.new("RGB", (1, 1)).save("small.png")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert parse("large.png", "small.png", "--out", "out", *options) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(f"large.png: out/{name} could not be written", capsys.readouterr().err)
    assert Path("out/labels/small.png").exists() == (limit > 500) and not Path("out", name).exists()
    assert not list(Path("out").rglob(".*part*"))


def test_an_interrupt_leaves_complete_files(parse, here: Path, monkeypatch, capsys):
    for n in range(5):
        save(f"in/{n}.png", photo(20, 30, n))
    work, calls = Parser._parse, []

    def interrupted(*args):
        calls.append(args)
        return work(*args) if len(calls) < 3 else throw(KeyboardInterrupt())

    monkeypatch.setattr(Parser, "_parse", interrupted)
    assert parse("in", "--out", "out", "--batch", "1") == 130
    assert files("out") == ["labels/0.png", "labels/1.png", "overlays/0.jpg", "overlays/1.jpg"]
    printed = capsys.readouterr()
    assert "2 parsed" in printed.out and "Ctrl-C" in printed.err


def test_results_of_other_settings_are_removed(parse, here: Path):
    save("x.png")
    assert parse("x.png", "--probs", "--map", MAPS / "coarse.yaml", "--out", "out") == 0
    with Image.open("out/labels/x.png") as image:          # as by an earlier version that wrote masks
        info = {key: value.replace("labels", "labels masks") if key == "Results" else value
                for key, value in image.info.items() if isinstance(value, str)}
        label = np.array(image)
    pictures.save_palette_png("out/labels/x.png", label, LABEL_SETS["lip"].palette, info)
    assert parse("x.png", "--out", "out") == 0
    assert files("out") == ["labels/x.png", "overlays/x.jpg"]


def test_a_photo_edited_while_it_is_parsed_is_not_skipped_later(parse, here: Path, monkeypatch, capsys):
    save("x.png")
    work = Parser._parse
    monkeypatch.setattr(Parser, "_parse", lambda *args: (save("x.png", photo(25, 30)), work(*args))[1])
    assert parse("x.png", "--out", "out") == 0
    monkeypatch.setattr(Parser, "_parse", work)
    assert parse("x.png", "--out", "out", "--skip-existing") == 0 and read("out/labels/x.png").shape == (25, 30)


def test_a_photo_may_be_a_path_bytes_a_file_an_image_or_an_array(parser: Parser, here: Path, monkeypatch):
    rgb, expected = Image.fromarray(photo(50, 70)), parser.parse(photo(50, 70))
    monkeypatch.setenv("HOME", str(here))
    exif = Image.Exif()
    exif[0x0112] = 8
    for name, image, more in (("x.png", rgb, {}), ("x.tga", rgb, {}),
                              ("turned.png", rgb.transpose(Image.Transpose.ROTATE_270), {"exif": exif})):
        image.save(name, **more)
    content, turned = Path("x.png").read_bytes(), Image.open("turned.png")
    for same in (here / "x.png", "x.tga", "~/x.png", Path("~/x.png"), content, bytearray(content), memoryview(content),
                 open("x.png", "rb"), io.BytesIO(content), rgb, Image.open("x.png"), rgb.convert("RGBA"), turned,
                 turned.convert("RGB"), photo(50, 70)[::-1][::-1]):
        assert (parser.parse(same) == expected).all()
    assert (parser.probabilities(turned).argmax(0) == expected).all()
    assert (parser.read("turned.png") == photo(50, 70)).all() and (parser.read(turned) == photo(50, 70)).all()
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(np.uint8(255) * (np.arange(70) < 40)[None].repeat(50, 0)))
    white = photo(50, 70)
    white[:, 40:] = 255
    assert (parser.parse(clear) == parser.parse(white)).all() and clear.mode == "RGBA"     # not changed in place
    Path("cut.png").write_bytes(content[:-200])
    for wrong, words in ((photo(5, 5)[..., 0], "RGB.*5, 5"), (Image.open("cut.png"), "cut off"),
                         (photo(5, 5) / 255, "float64"), ("no.png", "No such file"),
                         (Image.new("F", (5, 5)), "'s F"), (3, "not int"), ({"x.png"}, "not set"), (b"x", "photo"),
                         (np.zeros((0, 4, 3), np.uint8), "RGB")):
        for take in (parser.parse, parser.probabilities):
            with pytest.raises(UserError, match=words):
                take(wrong)


def test_lists_of_photos_of_mixed_sizes(small: Path, parser: Parser, here: Path):
    sizes = (50, 70), (1, 1), (300, 20), (64, 64), (20, 90), (50, 70)
    photos = [photo(*size, seed) for seed, size in enumerate(sizes)]
    save("1.png", photos[1])
    mixed, always = [photos[0], "1.png", Image.fromarray(photos[2]), *photos[3:]], Parser(small, tta=True)
    for labels in (parser.parse(mixed), parser.parse(tuple(mixed))):
        assert [label.shape for label in labels] == [*sizes]
        assert all((label == parser.parse(image)).mean() > 0.999 for label, image in zip(labels, photos))
    plain, averaged = parser.probabilities(mixed), always.probabilities(tuple(mixed))
    assert [len(shares) for shares in plain] == [20] * 6 and np.abs(plain[0] - averaged[0]).max() > 0.01
    assert (always.parse(photos[0]) == averaged[0].argmax(0)).mean() > 0.999 and parser.parse([]) == []


def test_threads_may_share_a_parser(parser: Parser, monkeypatch):
    images = [photo(40 + n, 60, n) for n in range(16)]
    expected = [parser.parse(image) for image in images]
    inside, most, forward = [], [], parser.model.forward

    def watched(image):
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.002)
        return forward(image), inside.pop()

    monkeypatch.setattr(parser.model, "forward", lambda image: watched(image)[0])
    with ThreadPoolExecutor(8) as pool:
        labels = list(pool.map(parser.parse, images))
    assert max(most) == 1 and len(most) == 16
    assert all((label == wanted).all() for label, wanted in zip(labels, expected))


def test_the_example_of_the_docstring_and_overlays(small: Path, parser: Parser, here: Path):
    save("photo.jpg", photo(50, 70))
    original, label = parser.read("photo.jpg"), parser.parse("photo.jpg")
    lines = [line[8:] for line in Parser.__doc__.splitlines() if line.startswith(" " * 8)]
    names = {"Parser": Parser, "np": np}
    most = np.bincount(label.ravel()).argmax()
    exec("\n".join(lines).replace("runs/lip", str(small)).replace("Dress", parser.classes[most]), names)
    chosen = np.isin(label, [5, 7, most])
    assert len(lines) == 5 and (names["label"] == label).all() and not chosen.all()
    assert np.array_equal(names["photo"], np.where(chosen[..., None], 255, original))
    drawn = pictures.overlay(original, label, parser.palette)
    assert np.array_equal(parser.overlay("photo.jpg", label), pictures.with_legend(
        drawn, parser.classes, parser.palette, np.unique(label)))
    assert np.array_equal(parser.overlay(original, label.astype(int)), parser.overlay("photo.jpg", label))
    for wrong, words in ((label.T, "70.*50"), (label + 20, "19"), (label.astype(int) + 256, "19")):
        with pytest.raises(UserError, match=words):
            parser.overlay(original, wrong)
