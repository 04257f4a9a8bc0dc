"""predict.py: photos of every format, exact labels, mistakes, failures, several processes; see test_results.py, too."""

import re
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from tiny import Processes, photo, read, wait_until

import fast
import predict
from files.atomic import MARK
from files.labels import LABEL_SETS, load_class_map
from predict import Parser
from viz import pictures

MAPS = Path(predict.__file__).with_name("configs") / "maps"


def save(path: str | Path, image=None, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(20, 30) if image is None else image).save(path, **options)


def contents(folder: str | Path) -> dict[str, bytes]:
    """{path: bytes} of the files of a folder, hidden ones left out."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("[!.]*")) if p.is_file()}


def files(folder: str | Path) -> list[str]:
    return list(contents(folder))


FORMATS = {"jpg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "mpo": "MPO", "jp2": "JPEG2000", "tga": "TGA", "ppm": "PPM",
           "gif": "GIF", "tif": "TIFF", "pcx": "PCX", "sgi": "SGI", "bmp": "BMP", "webp": "WEBP", "png": "PNG"}
FORMATS |= {name.lower(): name for name in ("AVIF", "QOI") if name in Image.SAVE}         # not in the oldest Pillow
LOSSLESS = {"tga", "ppm", "tif", "pcx", "sgi", "bmp", "png"}


def test_photos_of_every_format_are_parsed_in_full_size_or_reported(parse, parser: Parser, here: Path, capsys):
    rgb, expected = Image.fromarray(photo(50, 70)), parser.parse(photo(50, 70))
    for suffix, name in FORMATS.items():
        more = {"save_all": True, "append_images": [Image.fromarray(photo(50, 70, 1))]} if suffix == "mpo" else {}
        save(f"in/{suffix}.{suffix}", photo(50, 70), format=name, **more)
    shutil.copy("in/jpg.jpg", "in/a jpeg named.tga")
    grey = np.tile(np.arange(70, dtype=np.uint16) * 900, (50, 1))
    save("in/deep.tiff", grey)
    exif = Image.Exif()
    exif[0x0112] = 6                                       # rotate to the right
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
    for name, words in {"empty.jpg": "not an image", "text.png": "JPEG, PNG", "cut.jpg": "damaged",
                        "phone.heic": "convert", "depth.tiff": "(Pillow's F)"}.items():
        assert words in reports[name]
    shutil.copy("in/jpg.jpg", "no suffix")                 # a file given by name needs no suffix
    assert parse("no suffix", "--out", "named") == 0 and (read("named/labels/no suffix.png") == labels["jpg"]).all()


@pytest.mark.parametrize("size, tta", [((50, 70), True), ((300, 20), False), ((1, 1), True), ((64, 64), False)])
def test_labels_are_the_argmax_of_the_networks_probabilities(small: Path, parse, here: Path, monkeypatch, size, tta):
    image, parser = photo(*size), Parser(small, tta=tta)
    save("x.png", image)
    expected = parser.probabilities(image)
    assert expected.shape == (20, *size)
    np.testing.assert_allclose(expected.sum(0), 1, atol=1e-5)
    monkeypatch.setattr(fast, "CPU_STRIP", 4 * 20 * size[1] * 7)         # strips of 7 rows, as for huge photos
    assert parse("x.png", "--out", "out", "--probs", *["--tta"] * tta) == 0
    label, best = read("out/labels/x.png"), np.sort(expected, 0)
    assert (label == expected.argmax(0))[best[-1] - best[-2] > 1e-5].all()
    assert (parser.parse(image) == label).mean() > 0.999
    probs = np.load("out/probs/x.npy")
    assert probs.dtype == np.float16
    np.testing.assert_allclose(probs, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["atr", "coarse"])
def test_all_results_use_the_class_map(small: Path, parse, here: Path, parser: Parser, name: str):
    image, path = photo(50, 70), MAPS / f"{name}.yaml"
    save("x.png", image)
    target, merge = load_class_map(path, LABEL_SETS["lip"])
    assert parse("x.png", "--map", path, "--out", "a", "--probs") == 0
    assert parse("x.png", "--map", path, "--out", "b") == 0
    expected = np.stack([parser.probabilities(image)[list(sources)].sum(0) for sources in merge])
    np.testing.assert_allclose(np.load("a/probs/x.npy"), expected, atol=1e-3)
    best, label = np.sort(expected, 0), read("a/labels/x.png")
    for found in (label, read("b/labels/x.png"), Parser(small, class_map=path).parse(image)):
        assert (found == expected.argmax(0))[best[-1] - best[-2] > 1e-5].all()
    with Image.open("a/labels/x.png") as picture:
        assert picture.getpalette()[:3 * len(merge)] == [v for colour in target.palette for v in colour]
    drawn = pictures.with_legend(pictures.overlay(image, label, target.palette), target.classes, target.palette,
                                 np.unique(label))
    assert np.abs(read("a/overlays/x.jpg").astype(int) - drawn).mean() < 3


def test_overrides_and_photos_may_be_mixed(parse, here: Path, monkeypatch, capsys):
    """An existing file named like an override is a photo."""
    parsers, init = [], Parser.__init__
    monkeypatch.setattr(Parser, "__init__", lambda self, *args: (init(self, *args), parsers.append(self))[0])
    for name in ("photo.png", "seed=1.png"):
        save(name)
    assert parse("precision=bf16", "photo.png", "base_size=160", "seed=1.png", "--size", "96") == 0
    assert files("predictions/labels") == ["photo.png", "seed=1.png"]
    cfg = parsers[0].model.cfg
    assert (cfg.precision, cfg.base_size) == ("bf16", 96)
    assert parse("precision=bf16") == 2 and "precision=bf16" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["x.png", "precison=bf16"], "'precison'.*'precision'"), (["x.png", "tta_scale=[1.0]"], "tta_scale"),
    (["x.png", "sam=vit_b"], "sam: .*'tests'"), (["x.png", "precision=int4"], "precision .*int4"),
    (["x.png", "--size=20000"], "base_size .*20000"), (["x.png", "--run", "nowhere"], "nowhere: no "),
    (["x.png", "--map", "no.yaml"], "no.yaml: no such class map"), (["x.png", "--device", "cuda:77"], "'cuda:77'"),
    (["nothing/"], "nothing: no such file"), (["."], r"no photo .*\."), (["x.png", "--out", "file"], "file: File"),
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


def test_a_failed_photo_does_not_stop_the_others(parse, here: Path, monkeypatch, capsys):
    """Out of memory, too many pixels, a folder in place of a result file; a bug keeps its traceback."""
    for n, name in enumerate("abcdefg"):
        save(f"in/{name}.png", photo(20 + n, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70_000)               # Pillow refuses twice as many
    Image.new("RGB", (140_001, 1)).save("in/large.png")
    save("in/panorama.png", np.zeros((1, 66_000, 3), np.uint8))          # longer than a JPEG can be
    for folder in ("labels/b.png", "overlays/d.jpg"):
        Path("out", folder, "full").mkdir(parents=True)
    Path("out", MARK).touch()
    work = Parser._parse

    def scarce(self, images):
        if any(len(image) == 22 for image in images):      # c
            raise MemoryError
        return work(self, images)

    monkeypatch.setattr(Parser, "_parse", scarce)
    assert parse("in", "--out", "out", "--batch", "1") == 1
    printed = capsys.readouterr()
    lines = printed.err.partition("5 not parsed:\n")[2].splitlines()
    failed = sorted(line.split(":")[0].strip() for line in lines)
    assert failed == [f"in/{name}.png" for name in ("b", "c", "d", "large", "panorama")]
    assert "4 parsed" in printed.out and "/." not in printed.err and not list(Path("out").rglob(".*part*"))
    assert all(Path("out", file).is_file() for n in "aefg" for file in (f"labels/{n}.png", f"overlays/{n}.jpg"))
    monkeypatch.setattr(pictures, "save_palette_png", Mock(side_effect=KeyError("a bug")))
    assert parse("in/a.png", "--out", "new") == 1 and "Traceback" in capsys.readouterr().err


def parse_in_a_process(argv: list[str]):
    sys.exit(predict.main(argv))


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of several sizes in several folders, and two files that are not photos."""
    folder = tmp_path_factory.mktemp("album")
    for n in range(33):
        save(folder / "abc"[n % 3] / f"{n}.png", photo(*((50, 70), (70, 50), (64, 64), (33, 90))[n % 4], n))
    for name in ("b/empty.png", "c/text.jpg"):
        (folder / name).touch()
    return folder


def arguments(small: Path, album: Path, out: Path, *more: str) -> list[str]:
    return [str(album), "--checkpoint", str(small), "--out", str(out), "--batch", "3", "--probs", *more]


@pytest.fixture(scope="module")
def alone(small: Path, album: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with Processes(folder, parse_in_a_process, arguments(small, album, folder / "out")) as one:
        assert one.wait() == [1] and "33 parsed" in one.printed() and "2 not parsed" in one.printed()
    return contents(folder / "out")


def test_three_processes_write_the_same_files_as_one(small: Path, album: Path, tmp_path: Path, alone: dict):
    with Processes(tmp_path, parse_in_a_process, arguments(small, album, tmp_path / "out"), count=3) as three:
        assert three.wait() == [1] * 3                     # 1: two files were not parsed
        printed = [three.printed(rank) for rank in range(3)]
    assert contents(tmp_path / "out") == alone
    assert printed[0].count("33 parsed in") == printed[0].count("2 not parsed:") == 1 and printed[1:] == ["", ""]
    assert printed[0].count("empty.png") == printed[0].count("text.jpg") == 1


def test_killed_and_resumed_gives_the_same_files(small: Path, album: Path, tmp_path: Path, alone: dict[str, bytes]):
    out = tmp_path / "out"
    argv = arguments(small, album, out, "--skip-existing")
    for count in (2, 1):
        already = len(list(out.glob("labels/?/*.png")))
        with Processes(tmp_path, parse_in_a_process, argv, count=count) as some:
            wait_until(lambda: len(list(out.glob("labels/?/*.png"))) > already + 3 or some.all[0].exitcode is not None)
            for rank in range(count):
                some.send(signal.SIGKILL, rank)
            some.wait()
        assert contents(out).items() < alone.items()       # some of the files, all complete
    with Processes(tmp_path, parse_in_a_process, argv, count=2) as both:
        assert both.wait() == [1, 1]
        assert re.search(r"; \d+ already done", both.printed()) and both.printed(1) == ""
    assert contents(out) == alone


def test_a_mistake_is_reported_once(small: Path, album: Path, tmp_path: Path):
    argv = [*arguments(small, album, tmp_path / "out"), "--device", "warp"]
    with Processes(tmp_path, parse_in_a_process, argv, count=2) as both:
        assert both.wait() == [1, 1]
        assert (both.printed(0) + both.printed(1)).count("error") == 1 and "device 'warp'" in both.printed(0)
