"""predict.py: every kind of file, exact labels, inputs and records of results, Python API, many processes."""

import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_video import clip, opened, photo, read
from tiny import Processes, wait_until

import fast
import predict
from errors import UserError
from files.atomic import MARK
from files.inputs import list_inputs
from files.labels import LABEL_SETS, load_class_map
from predict import Parser
from viz import pictures

MAPS = Path(predict.__file__).with_name("configs") / "maps"
PHOTOS = Path(predict.__file__).parents[1] / "shared/data/photos"


@pytest.fixture(scope="module")
def parser(small: Path) -> Parser:
    return Parser(small)


def save(path: str | Path, image=None, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(20, 30) if image is None else image).save(path, **options)


def contents(folder: str | Path) -> dict[str, bytes]:
    """{path: bytes} of the files of a folder, hidden ones left out."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("[!.]*")) if p.is_file()}


def files(folder: str | Path) -> list[str]:
    return list(contents(folder))


# ---- photos

FORMATS = {"jpg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "mpo": "MPO", "jp2": "JPEG2000", "tga": "TGA", "ppm": "PPM",
           "gif": "GIF", "tif": "TIFF", "pcx": "PCX", "sgi": "SGI", "bmp": "BMP", "webp": "WEBP", "png": "PNG"}
FORMATS |= {name.lower(): name for name in ("AVIF", "QOI") if name in Image.SAVE}         # newer than the oldest Pillow
LOSSLESS = {"tga", "ppm", "tif", "pcx", "sgi", "bmp", "png"}


def test_photos_of_every_format_are_parsed_at_their_size_or_reported(parse, parser: Parser, here: Path, capsys):
    rgb, expected = Image.fromarray(photo(50, 70)), parser.parse(photo(50, 70))
    for suffix, name in FORMATS.items():
        more = {"save_all": True, "append_images": [Image.fromarray(photo(50, 70, 1))]} if suffix == "mpo" else {}
        save(f"in/{suffix}.{suffix}", photo(50, 70), format=name, **more)
    shutil.copy("in/jpg.jpg", "in/a jpeg named.tga")
    grey = np.tile(np.arange(70, dtype=np.uint16) * 900, (50, 1))
    save("in/deep.tiff", grey)
    exif = Image.Exif()
    exif[0x0112] = 6                                       # turn to the right
    save("in/Ünï çødé 人.PNG", photo(50, 70), exif=exif)
    for name, mode in (("grey.png", "L"), ("rgba.png", "RGBA"), ("cmyk.jpeg", "CMYK")):
        rgb.convert(mode).save(f"in/{name}")
    for name, size in (("one pixel.png", (1, 1)), ("long.JPG", (8000, 40))):
        Image.new("RGB", size).save(f"in/{name}")
    for name, content in (("empty.jpg", b""), ("text.png", b"text"), ("phone.heic", b"\0\0\0\x18ftypheic" + bytes(99)),
                          ("cut.jpg", Path("in/jpg.jpg").read_bytes()[:400]), (".hidden.jpg", b""), ("notes.txt", b"")):
        Path(f"in/{name}").write_bytes(content)
    save("in/depth.tiff", np.linspace(-1, 9, 30, dtype=np.float32).reshape(5, 6))
    assert parse("in", "--out", "out", "--batch", "3") == 1
    shapes = dict.fromkeys([*FORMATS, "a jpeg named", "deep", "grey", "rgba", "cmyk"], (50, 70))
    shapes |= {"Ünï çødé 人": (70, 50), "one pixel": (1, 1), "long": (40, 8000)}
    labels = {name: read(f"out/labels/{name}.png") for name in shapes}
    assert files("out") == sorted(f"{kind}.{suffix}" for name in shapes for kind, suffix in (
        (f"labels/{name}", "png"), (f"overlays/{name}", "jpg")))
    assert {name: label.shape for name, label in labels.items()} == shapes
    for suffix in FORMATS:
        assert (labels[suffix] == expected).mean() > (0.999 if suffix in LOSSLESS else 0.9), suffix
    assert (labels["rgba"] == expected).mean() > 0.999 and (labels["a jpeg named"] == labels["jpg"]).all()
    turned = parser.parse(np.ascontiguousarray(np.rot90(photo(50, 70), -1)))
    assert (labels["Ünï çødé 人"] == turned).mean() > 0.999
    deep = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert (labels["deep"] == parser.parse(deep)).mean() > 0.999
    with Image.open("out/labels/png.png") as image:
        assert image.mode == "P" and image.getpalette()[:60] == [v for c in LABEL_SETS["lip"].palette for v in c]
    printed = capsys.readouterr()
    assert f"{len(shapes)} parsed" in printed.out and "1 .txt" in printed.out
    reports = dict(re.findall(r"  in/(\S+): (.*)", printed.err.partition("5 not parsed:")[2]))
    assert set(reports) == {"empty.jpg", "text.png", "cut.jpg", "phone.heic", "depth.tiff"}
    for name, words in {"empty.jpg": "0 bytes", "text.png": "JPEG, PNG", "cut.jpg": "cut off", "phone.heic": "convert",
                        "depth.tiff": "(Pillow's F)"}.items():
        assert words in reports[name]
    shutil.copy("in/jpg.jpg", "no suffix")                 # named itself: whatever its name is
    assert parse("no suffix", "--out", "named") == 0 and (read("named/labels/no suffix.png") == labels["jpg"]).all()


def tiff(values: np.ndarray, bits: int, **tags: int) -> bytes:
    """An uncompressed grey TIFF; `tags`: more tags by number, t254=1."""
    data, (height, width) = values.astype("<u2").tobytes(), values.shape
    if bits == 12:
        every = np.unpackbits(values.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., 4:]
        data = np.packbits(every.reshape(height, -1), axis=1).tobytes()
    known = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    known |= {int(tag[1:]): value for tag, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(known.items()))
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(known)) + entries + bytes(4)


def test_grey_of_12_bits_and_raw_files_of_cameras(here: Path, parser: Parser):
    values = np.tile(np.arange(60, dtype=np.uint16) * 68, (30, 1))
    for bits in (12, 16):
        Path("x.tif").write_bytes(tiff(values << (bits - 12), bits))
        assert np.array_equal(parser.read("x.tif")[..., 1], values >> 4), bits
    for name, tags in (("thumbnail.nef", {"t254": 1}), ("camera.dng", {"t50706": 0x0401})):
        Path(name).write_bytes(tiff(values, 16, **tags))
        with pytest.raises(UserError, match=f"{name}: .*raw"):
            parser.read(name)
    pages = [Image.fromarray(photo(30, 40)), Image.fromarray(photo(15, 20))]               # a thumbnail as second page
    pages[0].save("pages.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(parser.read("pages.tif"), photo(30, 40))


@pytest.mark.parametrize("size, tta", [((50, 70), True), ((300, 20), False), ((1, 1), True), ((64, 64), False)])
def test_labels_are_the_argmax_of_the_networks_probabilities(small: Path, parse, here: Path, monkeypatch, size, tta):
    image, parser = photo(*size), Parser(small, tta=tta)
    save("x.png", image)
    expected = parser.probabilities(image)
    assert expected.shape == (20, *size)
    np.testing.assert_allclose(expected.sum(0), 1, atol=1e-5)
    monkeypatch.setattr(fast, "CPU_STRIP", 4 * 20 * size[1] * 7)         # strips of 7 rows, as huge photos have
    assert parse("x.png", "--out", "out", "--masks", "--probs", *["--tta"] * tta) == 0
    label, best = read("out/labels/x.png"), np.sort(expected, 0)
    assert (label == expected.argmax(0))[best[-1] - best[-2] > 1e-5].all()
    assert (parser.parse(image) == label).mean() > 0.999
    probs = np.load("out/probs/x.npy")
    assert probs.dtype == np.float16
    np.testing.assert_allclose(probs, expected, atol=1e-3)
    masks = np.stack([read(path) for path in sorted(Path("out/masks/x").iterdir())])
    assert masks.shape == (20, *size) and (masks.argmax(0) == label).all() and (np.sort(masks, 0)[-2] == 0).all()
    assert files("out/masks/x")[5] == "05_Upper-clothes.png"


@pytest.mark.parametrize("name", ["atr", "coarse"])
def test_all_results_follow_a_class_map(small: Path, parse, here: Path, parser: Parser, name: str):
    image, path = photo(50, 70), MAPS / f"{name}.yaml"
    save("x.png", image)
    clip("v.avi", 3)
    target, merge = load_class_map(path, LABEL_SETS["lip"])
    assert parse("x.png", "--map", path, "--out", "a", "--probs", "--masks") == 0
    assert parse("x.png", "v.avi", "--map", path, "--out", "b", "--frames") == 0
    expected = np.stack([parser.probabilities(image)[list(sources)].sum(0) for sources in merge])
    np.testing.assert_allclose(np.load("a/probs/x.npy"), expected, atol=1e-3)
    best, label = np.sort(expected, 0), read("a/labels/x.png")
    for found in (label, read("b/labels/x.png"), Parser(small, class_map=path).parse(image)):
        assert (found == expected.argmax(0))[best[-1] - best[-2] > 1e-5].all()
    with Image.open("a/labels/x.png") as picture:
        assert picture.getpalette()[:3 * len(merge)] == [v for colour in target.palette for v in colour]
    masks = np.stack([read(file) for file in sorted(Path("a/masks/x").iterdir())])
    assert len(masks) == len(merge) and (masks.argmax(0) == label).all()
    frames = [read(file) for file in sorted(Path("b/labels/v.avi").iterdir())]
    assert len(frames) == 3 and max(frame.max() for frame in frames) < len(merge)
    drawn = pictures.with_legend(pictures.overlay(image, label, target.palette), target.classes, target.palette,
                                 pictures.present(label))
    assert np.abs(read("a/overlays/x.jpg").astype(int) - drawn).mean() < 3


def test_overrides_may_be_between_the_photos(parse, here: Path, monkeypatch, capsys):
    """A file of such a name is a photo."""
    parsers, init = [], Parser.__init__
    monkeypatch.setattr(Parser, "__init__", lambda self, *args: (init(self, *args), parsers.append(self))[0])
    for name in ("photo.png", "seed=1.png"):
        save(name)
    assert parse("precision=bf16", "photo.png", "base_size=160", "seed=1.png", "--size", "96") == 0
    assert files("predictions/labels") == ["photo.png", "seed=1.png"]
    model, shapes = parsers[0].model, []
    assert (model.cfg.precision, model.cfg.base_size) == ("bf16", 96)
    model.register_forward_pre_hook(lambda _, images: shapes.append(images[0].shape))
    parsers[0].parse(photo(50, 100))
    assert shapes == [(1, 3, 64, 96)]                      # the long side is 96
    assert parse("precision=bf16") == 2 and "precision=bf16" in capsys.readouterr().err


def test_a_panorama_longer_than_a_jpeg_can_be(parse, here: Path):
    save("x.png", np.tile(photo(20, 100), (1, 660, 1)))
    assert parse("x.png", "--out", "out") == 0
    assert read("out/labels/x.png").shape == (20, 66_000) and read("out/overlays/x.jpg").shape[1] == 65_500


@pytest.mark.parametrize("arguments, words", [
    (["x.png", "precison=bf16"], "'precison'.*'precision'"), (["x.png", "tta_scale=[1.0]"], "tta_scale"),
    (["x.png", "sam=vit_b"], "sam: .*'tests'"), (["x.png", "precision=int4"], "precision .*int4"),
    (["x.png", "--size=20000"], "size .*16,384.*20000"), (["x.png", "--run", "nowhere"], "nowhere: no such run"),
    (["x.png", "--map", "no.yaml"], "no.yaml: no such class map"), (["x.png", "--device", "cuda:77"], "'cuda:77'"),
    (["nothing/"], "nothing: no such file"), (["."], r"no photo .*\."), (["x.png", "--out", "file"], "file is not "),
    (["x.png", "--out", "mine"], r"mine .*\(notes.txt\).* --out")])
def test_mistakes_are_one_line_before_the_work(parse, here: Path, capsys, arguments: list[str], words: str):
    if arguments[0] == "x.png":
        save("x.png")
    Path("file").touch()
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    assert parse(*arguments) == 1
    printed = capsys.readouterr()
    assert re.fullmatch(f"error: .*{words}.*\n", printed.err) and not printed.out and not files("predictions")


def test_a_fault_of_one_photo_stops_no_other(parse, here: Path, monkeypatch, capsys):
    """Out of memory, too many pixels, something in the way of one of its results; a bug keeps its traceback."""
    for n, name in enumerate("abcdefg"):
        save(f"in/{name}.png", photo(20 + n, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)                 # Pillow refuses twice as many
    Image.new("RGB", (10_001, 1)).save("in/large.png")
    for folder in ("labels/b.png", "overlays/d.jpg", "masks/e/00_Background.png"):
        Path("out", folder, "full").mkdir(parents=True)
    Path("out/masks/f").touch()
    Path("out", MARK).touch()
    work = Parser._parse

    def scarce(self, images, tta):
        if any(len(image) == 22 for image in images):      # c
            raise MemoryError
        return work(self, images, tta)

    monkeypatch.setattr(Parser, "_parse", scarce)
    assert parse("in", "--out", "out", "--masks", "--batch", "1") == 1
    printed = capsys.readouterr()
    lines = printed.err.partition("6 not parsed:\n")[2].splitlines()
    assert sorted(line.split(":")[0].strip() for line in lines) == [f"in/{n}.png" for n in [*"bcdef", "large"]]
    assert "2 parsed" in printed.out and "/." not in printed.err and not list(Path("out").rglob(".*part*"))
    assert all(len(files(f"out/masks/{name}")) == 20 and Path(f"out/labels/{name}.png").is_file() for name in "ag")
    monkeypatch.setattr(pictures, "save_palette_png", Mock(side_effect=KeyError("a bug")))
    assert parse("in/a.png", "--out", "new") == 1 and "Traceback" in capsys.readouterr().err


# ---- inputs

def found(*arguments: str) -> list[str]:
    inputs = list_inputs([*arguments])
    return [one.name for one in inputs.photos + inputs.videos] + inputs.missing


def test_inputs_are_found_once_by_folder_pattern_and_name(here: Path):
    for name in ("p/a.jpg", "p/deep/b.PNG", "p/clip.mp4", "q/c.jpg", "p/.git/d.jpg", "p/x.txt", "7", "we[i]rd.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    assert found("p") == ["a", "deep/b", "clip"] and found("p", "q", "p/../p") == ["a", "deep/b", "c", "clip"]
    assert found("p/a.jpg", "p/../p/a.jpg", "q/c.jpg") == ["a", "c"] and found("**/*.jpg") == ["a", "c", "we[i]rd"]
    assert found("we[i]rd.jpg", "7") == ["we[i]rd", "7"]
    assert [line.split(":")[0] for line in found("gone.jpg", "gone*")] == ["gone.jpg", "gone*"]


@pytest.mark.parametrize("first, second, arguments", [
    ("p/a.jpg", "q/a.jpg", ["p/a.jpg", "q/a.jpg"]), ("p/a.jpg", "q/a.jpg", ["p", "q"]),
    ("p/a.jpg", "q/A.jpg", ["*/*.jpg"]), ("p/a.jpg", "p/a.png", ["p"]),
    ("p/x/a.mp4", "q/x/a.avi", ["p", "q"]), ("p/x/a.jpg", "x/a.jpg", ["p", "."])])
def test_two_files_that_would_get_one_name_are_refused(here: Path, first: str, second: str, arguments: list[str]):
    for name in (first, second):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        list_inputs(arguments)
    assert first in str(error.value) and second in str(error.value)


def test_what_is_not_parsed_is_counted(parse, here: Path, monkeypatch, capsys):
    """Results of other calls, system folders, pipes, folders matched by a pattern, files that are not photos."""
    for name in ("x.png", "@eaDir/x.png", "sub/$RECYCLE.BIN/y.png", "sub/y.png"):
        save(name)
    assert parse("x.png", "sub", "--masks") == 0 and files("predictions/labels") == ["x.png", "y.png"]
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
    for words in (r"named pipe \(pipe.jpg\)", r"named pipe \(./pipe.jpg\)", "@eaDir: ", "predictions: results",
                  "null.png", r"folder \(sub/tta\)", "2 results of", "1 without ext"):
        assert re.search(f"ignored: .*{words}", printed.out), words
    assert parse("predictions/labels/x.png", "--out", "again") == 1      # by its name, too


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
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scandir(path) if "closed" not in str(path) else raise_(
        PermissionError(13, "Permission denied", str(path))))
    assert found("closed") == ["closed: Permission denied"]


def raise_(error: Exception):
    raise error


def test_many_files_take_few_bytes_each(tmp_path: Path):
    for n in range(60):
        (tmp_path / f"{n:04d}").mkdir(parents=True)
        for k in range(20):
            (tmp_path / f"{n:04d}/{k:02d}.jpg").touch()
    tracemalloc.start()
    photos = list_inputs([str(tmp_path)]).photos
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(photos) == 1200 and photos[21].name == "0001/01" and held / 1200 < 600 and most / 1200 < 1500


# ---- results and their records

def test_done_is_what_was_made_from_the_same_file_with_the_same_settings(parse, here: Path, capsys):
    def parsed(*arguments) -> int:
        capsys.readouterr()
        assert parse(*arguments, "--out", "out", "--skip-existing") == 0
        return int(re.search(r"(\d+) parsed in", capsys.readouterr().out)[1])

    save("east/front.png", photo(20, 30))
    save("west/front.png", photo(21, 30))
    assert [parsed("east"), parsed("east"), parsed("west"), parsed("west/front.png")] == [1, 0, 1, 0]
    assert read("out/labels/front.png").shape == (21, 30)
    assert [parsed("west", *options) for options in (["--tta"], ["--size", "96"], ["precision=bf16"], [])] == [1] * 4
    times = os.stat("west/front.png").st_mtime_ns
    save("west/front.png", photo(22, 30))
    os.utime("west/front.png", ns=(times, times))          # edited, but as old as before
    assert parsed("west") == 1 and read("out/labels/front.png").shape == (22, 30)
    os.utime("west/front.png", ns=(times, times + 1))
    assert [parsed("west", *more) for more in ([], ["--masks"], ["--probs"], ["--masks", "--probs"])] == [1, 1, 1, 0]
    for lost in ("overlays/front.jpg", "masks/front/07_Coat.png", "probs/front.npy"):
        Path("out", lost).unlink()
        assert parsed("west", "--masks", "--probs") == 1 and Path("out", lost).exists()
    assert parsed("east") == 1 and files("out") == ["labels/front.png", "overlays/front.jpg"]           # none of west's
    clip("v.avi", 3)
    assert [parsed("v.avi"), parsed("v.avi"), parsed("v.avi", "--frames"), parsed("v.avi", "--frames")] == [1, 0, 1, 0]
    Path("out/labels/v.avi/000002.png").unlink()
    assert parsed("v.avi", "--frames") == 1 and len(files("out/labels/v.avi")) == 3
    clip("v.avi", 3, (60, 70))                             # as many frames, of another video
    assert [parsed("v.avi"), parsed("v.avi", "--frames")] == [1, 1]
    assert read("out/labels/v.avi/000001.png").shape == (60, 70) and opened("out/overlays/v.mp4")[0] == 3
    shutil.copy(MAPS / "coarse.yaml", "map.yaml")
    for text in ("[255, 0, 0]", "[254, 0, 0]"):            # its content counts, not its name
        Path("map.yaml").write_text(Path("map.yaml").read_text().replace("[255, 0, 0]", text))
        assert [parsed("west", "--map", "map.yaml"), parsed("west", "--map", "map.yaml")] == [1, 0]


@pytest.mark.parametrize("skip", [[], ["--skip-existing"]])
@pytest.mark.parametrize("name", ["labels/x.png", "masks/x/05_Upper-clothes.png", "probs/x.npy", "overlays/x.jpg",
                                  "overlays/v.mp4", "labels/v.avi/000001.png"])
def test_what_was_not_written_here_is_never_replaced(parse, here: Path, capsys, name: str, skip: list[str]):
    for photos in ("x.png", "y.png"):
        save(photos)
    clip("v.avi", 2)
    assert parse("y.png", "--out", "out") == 0
    Path("out", name).parent.mkdir(parents=True, exist_ok=True)
    save("mine.png", np.full((20, 30), 5, np.uint8))
    mine = Path("mine.png").read_bytes()
    Path("out", name).write_bytes(mine)
    assert parse("x.png", "v.avi", "y.png", "--out", "out", "--masks", "--probs", "--frames", *skip) == 1
    assert Path("out", name).read_bytes() == mine and f"out/{name}: " in capsys.readouterr().err
    assert len(list(Path("out").glob("masks/y/*"))) == 20


@pytest.mark.parametrize("keeps_text", [False, True])
def test_label_maps_edited_by_hand_are_never_replaced(parse, here: Path, capsys, keeps_text: bool):
    save("x.png")
    clip("v.avi", 2)
    assert parse("x.png", "v.avi", "--out", "out", "--frames") == 0
    for name in ("out/labels/x.png", "out/labels/v.avi/000002.png"):
        with Image.open(name) as image:
            text, edited = PngInfo(), image.copy()
        for key, value in image.info.items():
            if keeps_text and isinstance(value, str):
                text.add_text(key, value)
        edited.putpixel((3, 4), 19 - edited.getpixel((3, 4)))
        edited.save(name, pnginfo=text)
    before = contents("out")
    for more in ([], ["--masks"], ["--tta"]):
        assert parse("x.png", "v.avi", "--out", "out", "--frames", *more) == 1
        assert contents("out") == before and capsys.readouterr().err.count("changed since") == 2


def test_a_data_set_is_no_folder_for_results(parse, here: Path):
    for split in ("train", "val"):
        save(f"mine/images/{split}/p0.jpg")
        save(f"mine/labels/{split}/p0.png", np.full((20, 30), 5, np.uint8))
    before = contents(".")
    for out in ("mine", "mine/labels", "mine/labels/val", "."):
        for skip in ([], ["--skip-existing"]):
            assert parse("mine/images", "--out", out, *skip) == 1
    assert contents(".") == before and not list(Path(".").rglob(MARK))


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of a file's size")
@pytest.mark.parametrize("options, limit, name", [
    (["--probs"], 200_000, "probs/large.npy"), ([], 500, "labels/large.png"), ([], 20_000, "overlays/v.mp4")])
def test_a_full_disk_is_reported_for_each_file(parse, here: Path, capsys, options: list[str], limit: int, name: str):
    import resource
    source = "v.avi" if "v.mp4" in name else "large.png"
    save("large.png", photo(300, 200)) if source == "large.png" else clip("v.avi", 30)
    Image.new("RGB", (1, 1)).save("small.png")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert parse(source, "small.png", "--out", "out", *options) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(f"{source}: out/{name} could not be written", capsys.readouterr().err)
    assert Path("out/labels/small.png").exists() == (limit > 500) and not Path("out", name).exists()
    assert not list(Path("out").rglob(".*part*"))


def test_an_interrupt_leaves_complete_files(parse, here: Path, monkeypatch, capsys):
    for n in range(5):
        save(f"in/{n}.png", photo(20, 30, n))
    work, calls = Parser._parse, []

    def interrupted(*args):
        calls.append(args)
        return work(*args) if len(calls) < 3 else raise_(KeyboardInterrupt())

    monkeypatch.setattr(Parser, "_parse", interrupted)
    assert parse("in", "--out", "out", "--batch", "1") == 130
    assert files("out") == ["labels/0.png", "labels/1.png", "overlays/0.jpg", "overlays/1.jpg"]
    printed = capsys.readouterr()
    assert "2 parsed" in printed.out and "Ctrl-C" in printed.err
    clip("v.avi")
    calls.clear()
    assert parse("v.avi", "--out", "video", "--batch", "2") == 130 and files("video") == []


@pytest.mark.parametrize("first, second, left", [
    (["x.png", "--masks", "--map", MAPS / "coarse.yaml"], ["x.png"], 0), (["v.avi", "--frames"], ["v.avi", "--tta"], 0),
    (["x.png", "--masks", "--map", MAPS / "coarse.yaml"], ["x.png", "--masks"], 20)])
def test_no_results_of_other_settings_are_left(parse, here: Path, first: list, second: list, left: int):
    save("x.png")
    clip("v.avi", 3)
    assert parse(*first, "--out", "out") == parse(*second, "--out", "out") == 0
    assert len(files("out/masks/x") + files("out/labels/v.avi")) == left


def test_a_photo_edited_while_it_is_parsed_is_not_done(parse, here: Path, monkeypatch, capsys):
    save("x.png")
    work = Parser._parse
    monkeypatch.setattr(Parser, "_parse", lambda *args: (save("x.png", photo(25, 30)), work(*args))[1])
    assert parse("x.png", "--out", "out") == 0
    monkeypatch.setattr(Parser, "_parse", work)
    assert parse("x.png", "--out", "out", "--skip-existing") == 0 and read("out/labels/x.png").shape == (25, 30)


# ---- from Python

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
    assert (parser.parse(clear) == parser.parse(white)).all() and clear.mode == "RGBA"     # the caller's is unchanged
    for wrong, words in ((photo(5, 5)[..., 0], "RGB.*5, 5"), (photo(5, 5) / 255, "float64"), ("no.png", "no such file"),
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
    for labels in (parser.parse(mixed), parser.parse(tuple(mixed)), always.parse(mixed, tta=False)):
        assert [label.shape for label in labels] == [*sizes]
        assert all((label == parser.parse(image)).mean() > 0.999 for label, image in zip(labels, photos))
    plain, averaged = parser.probabilities(mixed), always.probabilities(tuple(mixed))
    assert [len(shares) for shares in plain] == [20] * 6 and np.abs(plain[0] - averaged[0]).max() > 0.01
    assert np.array_equal(parser.probabilities(photos[0], tta=True), averaged[0])
    assert np.array_equal(always.probabilities(photos[0], tta=False), plain[0])
    assert (parser.parse(photos[0], tta=True) == always.parse(photos[0])).all() and parser.parse([]) == []


def test_threads_may_share_a_parser(parser: Parser, monkeypatch):
    """One at a time goes through the network, and each gets what it would get alone."""
    images = [photo(40 + n, 60, n) for n in range(24)]
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
        shares = list(pool.map(parser.probabilities, images[:8]))
    assert max(most) == 1 and len(most) == 32
    labels += [probabilities.argmax(0) for probabilities in shares]
    assert all((label == wanted).all() for label, wanted in zip(labels, expected + expected))


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
        drawn, parser.classes, parser.palette, pictures.present(label)))
    with pytest.raises(UserError, match="70.*50"):
        parser.overlay(original, label.T)


# ---- many processes

def parse_in_a_process(argv: list[str]):
    sys.exit(predict.main(argv))


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of several sizes in several folders, two that are none, and a video."""
    folder = tmp_path_factory.mktemp("album")
    for n in range(33):
        save(folder / "abc"[n % 3] / f"{n}.png", photo(*((50, 70), (70, 50), (64, 64), (33, 90))[n % 4], n))
    for name in ("b/empty.png", "c/text.jpg"):
        (folder / name).touch()
    clip(folder / "c/walk.avi", 4)
    return folder


def arguments(small: Path, album: Path, out: Path, *more: str) -> list[str]:
    return [str(album), "--checkpoint", str(small), "--out", str(out), "--batch", "3", "--frames", "--masks", *more]


@pytest.fixture(scope="module")
def alone(small: Path, album: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with Processes(folder, parse_in_a_process, arguments(small, album, folder / "out")) as one:
        assert one.wait() == [1] and "34 parsed" in one.said() and "2 not parsed" in one.said()
    return contents(folder / "out")


def test_many_processes_write_what_one_writes(small: Path, album: Path, tmp_path: Path, alone: dict):
    with Processes(tmp_path, parse_in_a_process, arguments(small, album, tmp_path / "out"), count=3) as three:
        assert three.wait() == [1] * 3                     # as alone
        said = [three.said(rank) for rank in range(3)]
    assert contents(tmp_path / "out") == alone
    assert said[0].count("34 parsed in") == said[0].count("2 not parsed:") == 1 and said[1:] == ["", ""]
    assert said[0].count("empty.png") == said[0].count("text.jpg") == 1


def test_killed_and_resumed_is_as_never_stopped(small: Path, album: Path, tmp_path: Path, alone: dict[str, bytes]):
    out = tmp_path / "out"
    argv = arguments(small, album, out, "--skip-existing")
    for count in (2, 1):
        already = len(list(out.glob("labels/?/*.png")))
        with Processes(tmp_path, parse_in_a_process, argv, count=count) as some:
            wait_until(lambda: len(list(out.glob("labels/?/*.png"))) > already + 3 or some.all[0].exitcode is not None)
            for rank in range(count):
                some.send(signal.SIGKILL, rank)
            some.wait()
        assert contents(out).items() < alone.items()       # complete files, but not all
    with Processes(tmp_path, parse_in_a_process, argv, count=2) as both:
        assert both.wait() == [1, 1]
        assert re.search(r"; \d+ already done", both.said()) and both.said(1) == ""
    assert contents(out) == alone


@pytest.mark.parametrize("mistake, words", [(["--checkpoint", "nowhere"], "nowhere: no such run"), (
    ["--device", "warp"], "device 'warp'"), (["--out", "/dev/null"], "/dev/null")])
def test_a_mistake_is_reported_once(small: Path, album: Path, tmp_path: Path, mistake: list[str], words: str):
    argv = [*arguments(small, album, tmp_path / "out"), *mistake]
    with Processes(tmp_path, parse_in_a_process, argv, count=2) as both:
        assert both.wait() == [1, 1]
        assert (both.said(0) + both.said(1)).count("error") == 1 and words in both.said(0)


def test_torchrun_starts_it(small: Path, album: Path, tmp_path: Path, alone: dict[str, bytes]):
    program = tmp_path / "program.py"
    program.write_text("import tiny, predict, sys\nsys.exit(predict.main())")           # tiny has the network's sizes
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program,
               *arguments(small, album, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and contents(tmp_path / "out") == alone
    assert done.stdout.count("34 parsed in") == 1 and done.stderr.count("2 not parsed:") == 1


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the real photos")
def test_real_photos(parse, here: Path):
    assert parse(PHOTOS, "--out", "out") == 0
    for path in PHOTOS.iterdir():
        with Image.open(path) as image:
            assert read(f"out/labels/{path.stem}.png").shape == (image.height, image.width)
