"""Pictures and plots: colours, sizes, nothing cut off, files whole or absent."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from viz import pictures, plots

CLASSES = ("Background", "Hat", "Hair", "Upper-clothes")
PALETTE = ((0, 0, 0), (128, 0, 0), (255, 0, 0), (255, 85, 0))


def figure(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A grey photo, and a label map with a rectangle of class 2 in the middle."""
    label = np.zeros((height, width), np.uint8)
    label[height // 4:height * 3 // 4, width // 4:width * 3 // 4] = 2
    return np.full((height, width, 3), 100, np.uint8), label


def edge_is_empty(picture: np.ndarray, top: int = 0, left: int = 0) -> bool:
    """True if the last two rows and columns, right of `left` and below `top`, are paper: no text runs out of it."""
    return (picture[-2:, left:] == 255).all() and (picture[top:, -2:] == 255).all()


def colours(picture: np.ndarray) -> set[tuple[int, int, int]]:
    packed = np.unique(picture.reshape(-1, 3).astype(np.int32) @ [1 << 16, 1 << 8, 1])
    return {(int(v) >> 16, int(v) >> 8 & 255, int(v) & 255) for v in packed}


def test_colours_are_the_palettes_and_unknown_labels_are_hatched():
    label = np.array([[0, 1, 2, 3], [255, 4, 254, 0]], np.uint8)
    rgb = pictures.colourise(label, PALETTE)
    assert [tuple(v) for v in rgb[0]] == list(PALETTE)
    assert all(tuple(v) in pictures.HATCH for v in rgb[1, :3]) and tuple(rgb[1, 3]) == PALETTE[0]
    assert pictures.present(label) == [0, 1, 2, 3, 4, 254, 255]


def test_overlay_mixes_colour_and_photo_dims_black_classes_and_outlines():
    rgb = pictures.overlay(*figure(400, 400), PALETTE, alpha=0.6)
    assert np.abs(rgb[200, 200] - [0.4 * 100 + 0.6 * 255, 40, 40]).max() <= 1
    assert (np.abs(rgb[2, 2].astype(int) - 70) <= 1).all()
    assert (rgb[100, 100:300] == 255).all() and (rgb[100:300, 100] == 255).all()
    assert (rgb == 255).all(-1).sum() == 4 * 200 - 1       # one pixel wide, and nowhere else
    small = pictures.overlay(*figure(40, 40), PALETTE)
    assert np.abs(small[10, 20] - (0.4 * 255 + 0.6 * small[20, 20])).max() <= 1
    large = pictures.overlay(*figure(2400, 2400), PALETTE)
    assert (large[1200] == 255).all(-1).sum() == 2 * 4     # lines grow with the picture


def test_errors_are_red_and_ignored_pixels_hatched():
    image, label = figure(16, 16)
    prediction = label.copy()
    prediction[0, 0], label[15] = 1, 255
    prediction[15, 3] = 3
    rgb = pictures.errors(image, label, prediction)
    assert (rgb == pictures.WRONG).all(-1).sum() == 1 and tuple(rgb[0, 0]) == pictures.WRONG
    assert all(tuple(v) in pictures.HATCH for v in rgb[15])


@pytest.mark.parametrize("size", [(1, 1), (100, 60), (60, 400), (600, 80), (1500, 2000)])
@pytest.mark.parametrize("count", [1, 4, 40])
def test_legend_shows_every_class_and_is_never_cut_off(size: tuple[int, int], count: int):
    names = [f"{name}-{n}" for n in range(10) for name in CLASSES][:count]
    palette = [(40 + 5 * n, 200, n) for n in range(count)]
    picture = np.full((*size, 3), 77, np.uint8)
    result = pictures.with_legend(picture, names, palette)
    height, width = size
    assert (result[:height, :width] == 77).all()
    beside, below = result[:, width:], result[height:]
    assert not (beside.size and below.size) or min(size) < 500   # beside or below; a small picture may need both
    assert edge_is_empty(result, height if below.size else 0, width if beside.size else 0)
    assert colours(beside) | colours(below) >= set(palette)
    ink = (result[..., 1] < 60).sum()                      # neither the photo nor a swatch is so dark
    assert ink > 20 * count


def test_legend_lists_what_is_asked_for():
    image, label = figure(50, 50)
    label[0, 0] = 255
    full = pictures.with_legend(image, CLASSES, PALETTE)
    some = pictures.with_legend(image, CLASSES, PALETTE, shown=pictures.present(label))
    assert PALETTE[2] in colours(some) and PALETTE[1] not in colours(some) and set(pictures.HATCH) <= colours(some)
    assert full.shape != some.shape or (full != some).any()
    assert pictures.with_legend(image, CLASSES, PALETTE, shown=[]).shape == image.shape


def test_wrapped_lines_fit_and_keep_the_text():
    text = "a photo called " + "x" * 90 + " and more words, öäü"
    for width in (30, 77, 200):
        lines = pictures.wrap(text, 14, width)
        assert max(pictures.text_width(line, 14) for line in lines) <= width
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert pictures.wrap("", 14, 50) == [""] and pictures.wrap("W", 40, 1) == ["W"]


def test_letters_that_pillows_own_font_lacks_come_from_the_machines():
    """Accents, Cyrillic and Greek are in DejaVu, which most machines have."""
    try:
        other = ImageFont.truetype("DejaVuSans.ttf", 20)
    except OSError:
        pytest.skip("this machine has no DejaVu")
    assert not pictures._has_letters(ImageFont.load_default(20), "пальто")
    for text in ("пальто", "αβγ", "Überhemd ńřő"):
        assert pictures.text_width(text, 20) == math.ceil(other.getlength(text))
        drawn, expected = pictures.paper(40, 300), pictures.paper(40, 300)
        pictures.write(drawn[1], 4, 20, text, 20)
        expected[1].text((4, 20), text, fill=pictures.INK, font=other, anchor="lm")
        assert np.array_equal(drawn[0], expected[0])
    assert pictures.font("plain", 20).getname() == ImageFont.load_default(20).getname()


def test_a_name_without_any_font_is_drawn_as_boxes_and_said_once(monkeypatch, capsys):
    monkeypatch.setattr(pictures, "FONTS", ())
    pictures._font_with.cache_clear()
    pictures._say_once.cache_clear()
    for text in ("上衣", "裤子", "上衣"):
        assert pictures.text_width(text, 20) > 0
    pictures._font_with.cache_clear()
    assert capsys.readouterr().err.count("install the Noto fonts") == 1
    assert pictures.text_width("bad\udce4name", 14) == pictures.text_width("bad\\udce4name", 14)


def test_sheet_holds_pictures_of_all_sizes_and_long_texts():
    fills = [(10, 200, 30), (200, 10, 30), (30, 10, 200)]
    shapes = [(1, 1), (300, 20), (20, 900)]
    cells = [np.full((*shape, 3), fill, np.uint8) for shape, fill in zip(shapes, fills)]
    rows = [cells, [cells[2], None], []]
    titles = ["photo", "a title that is much longer than its column " * 2]
    captions = ["name " * 99, ["x" * 400, "", "y" * 80]]
    result = pictures.sheet(rows, titles, captions, 120)
    assert edge_is_empty(result) and (result[:, :2] == 255).all() and (result[:2] == 255).all()
    for fill in fills:
        assert (result == fill).all(-1).sum() > 400
    assert pictures.sheet([]).ndim == 3


def test_captions_stand_below_their_pictures():
    black = np.zeros((60, 60, 3), np.uint8)
    bare, noted = (pictures.sheet([[black] * 4], ["photo"] * 4, [texts], 60) for texts in (["", ""], ["", "here"]))
    _, columns = np.nonzero((bare != noted).any(-1))
    third = np.flatnonzero((bare == 0).all(-1).any(0))[2 * 60]
    assert bare.shape == noted.shape and columns.min() >= third and columns.max() < third + 60


def test_drawn_labels_show_where_dark_classes_end():
    label = np.zeros((300, 300), np.uint8)
    label[100:200, 100:200] = 1
    rgb = pictures.drawn_label(label, [(0, 0, 0), (0, 0, 85)])
    assert (rgb[150, 150] == (0, 0, 85)).all() and (rgb[50, 50] == 0).all()
    assert rgb[100, 150].min() > 200 and rgb[150, 200].min() > 200 and (rgb[150, 101:200] == (0, 0, 85)).all()


def test_axes_enclose_the_values_with_round_ticks():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low = float(rng.normal() * 10.0 ** rng.integers(-6, 6))
        high = low + float(rng.exponential() * 10.0 ** rng.integers(-6, 6)) + abs(low) * 1e-6
        first, last, ticks = plots._axis(low, high, 5)
        span = high - low
        assert first <= low + 1e-6 * span and last >= high - 1e-6 * span and 2 <= len(ticks) <= 8
        step = ticks[1] - ticks[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-3
    assert [plots._number(v) for v in (0, 6e-4, 1.5e-4, 60_000, 2500, 0.25, -1)] == [
        "0", "6e-4", "1.5e-4", "60k", "2500", "0.25", "-1"]


def test_curves_draw_every_series_and_survive_odd_values():
    x = np.arange(100)
    series = {f"series {n}": (x, n + np.sin(x / 9)) for n in range(5)}
    odd = {"nan": (x, np.where(x % 7, x, np.nan)), "inf": (x, np.where(x == 3, np.inf, 1.0)), "none": ([], [])}
    panels = {"many": series, "odd": odd, "empty": {}, "one": {"a": ([5], [2.0])}, "negative": {"a": (x, x - 50.0)}}
    picture = plots.curves(panels, smooth=("many",))
    assert edge_is_empty(picture) and picture.shape == (900, 960, 3)
    for colour in plots.SERIES[:5]:
        assert (picture[:300, :480] == colour).all(-1).sum() > 50
    assert plots.curves({}).shape == (300, 480, 3)
    assert plots.curves({"one panel": series}).shape == (300, 480, 3)


def test_a_rising_line_rises_where_the_axes_say():
    picture = plots.curves({"line": {"a": ([0, 100], [0.0, 50.0])}})
    y, x = np.nonzero((picture == plots.SERIES[0]).all(-1))
    assert np.corrcoef(x, y)[0, 1] < -0.999 and np.ptp(x) > 380 and np.ptp(y) > 180


def test_runs_of_one_kind_are_drawn_under_their_mean():
    rows, below, mean, above = (
        plots.curves({"line": {"a": ([0, 100], y), "range": ([0, 0], [0, 70])}})[80:250, 60:440]
        for y in ([[0.0, 50.0], [20.0, 70.0]], [0.0, 50.0], [10.0, 60.0], [20.0, 70.0]))
    colour = np.array(plots.SERIES[0])
    assert (rows[(mean == colour).all(-1)] == colour).all()
    for line in (below, above):
        faint = rows[(line == colour).all(-1)].astype(int)
        assert len(faint) > 300 and not (faint == colour).all(-1).any()
        assert (faint[:, 2] > faint[:, 0] + 20).mean() > 0.6


def test_running_mean_is_the_mean_of_its_neighbours():
    values = np.random.default_rng(0).normal(size=50)
    values[[0, 7, 8]] = np.nan
    smooth = plots._running_mean(values, 3)
    for n, v in enumerate(values):
        expected = np.nan if np.isnan(v) else np.nanmean(values[max(0, n - 3):n + 4])
        np.testing.assert_allclose(smooth[n], expected)


def test_bars_are_as_long_as_their_values():
    palette = ((10, 20, 30), (200, 0, 0), (0, 90, 0), (0, 0, 250))
    picture = plots.bars(CLASSES, [100, 50, math.nan, 0.0], [90, 60, 50, math.nan], palette, "IoU " * 60)
    assert edge_is_empty(picture)
    lengths = [np.ptp(np.nonzero((picture == colour).all(-1))[1]) if (picture == colour).all(-1).any() else 0
               for colour in palette]
    assert abs(lengths[0] - 2 * lengths[1]) <= 2 and abs(lengths[0] - 420) <= 2 and lengths[2] == 0


def test_confusion_matrix_shades_shares_of_the_truth():
    matrix = np.array([[90, 10, 0], [0, 5, 5], [0, 0, 0]])
    picture = plots.confusion_picture(matrix, CLASSES[:3], "title " * 40)
    assert edge_is_empty(picture)
    for share, cells in ((0.9, 1), (0.1, 1), (0.5, 2)):
        area = (picture == plots._shade(share)).all(-1).sum()
        assert cells * 800 < area <= cells * 35 * 35
    assert (picture == plots.GRID).all(-1).sum() == 3 * 35 * 35
    assert plots.confusion_picture(np.eye(60), [f"class {n}" for n in range(60)]).shape[0] > 60 * 36


def test_palette_png_keeps_labels_and_colours(tmp_path: Path):
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pictures.save_palette_png(tmp_path / "a.png", label, PALETTE)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P" and (np.asarray(image) == label).all()
        rgb = np.asarray(image.convert("RGB"))
    assert [tuple(v) for v in rgb[0, :4]] == list(PALETTE) and tuple(rgb[15, 15]) == pictures.HATCH[0]


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image, _ = figure(8, 8)
    pictures.save_png(tmp_path / "a.png", image)
    pictures.save_jpeg(tmp_path / "ä b.jpg", image)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == image).all()
    before = (tmp_path / "a.png").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2

    def fail(self, file, **options):
        Path(file).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        pictures.save_png(tmp_path / "a.png", image)
    with pytest.raises(KeyboardInterrupt):
        pictures.save_png(tmp_path / "new.png", image)
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "ä b.jpg"]
