"""viz/pictures.py, viz/plots.py: colours, sizes, no text cut off."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from files.labels import IGNORE_GREY
from viz import pictures, plots

CLASSES = ("Background", "Hat", "Hair", "Upper-clothes")
PALETTE = ((0, 0, 0), (128, 0, 0), (255, 0, 0), (255, 85, 0))


def drawing(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A grey photo and a label map with a rectangle of class 2 in the middle."""
    label = np.zeros((height, width), np.uint8)
    label[height // 4:height * 3 // 4, width // 4:width * 3 // 4] = 2
    return np.full((height, width, 3), 100, np.uint8), label


def edge_is_empty(picture: np.ndarray, top: int = 0, left: int = 0) -> bool:
    """Whether the last two rows (right of `left`) and columns (below `top`) are blank, so that no text is cut off."""
    return (picture[-2:, left:] == 255).all() and (picture[top:, -2:] == 255).all()


def colours(picture: np.ndarray) -> set[tuple[int, int, int]]:
    return {colour for _, colour in Image.fromarray(picture).getcolors(1 << 16)} if picture.size else set()


def where(picture: np.ndarray, colour) -> np.ndarray:  # (H, W)
    return (picture == colour).all(-1)


def test_labels_have_the_palettes_colours_and_unknown_labels_are_grey():
    label = np.array([[0, 1, 2, 3], [255, 4, 254, 0]], np.uint8)
    rgb = pictures.colourise(label, PALETTE)
    assert [tuple(v) for v in rgb[0]] == list(PALETTE)
    assert (rgb[1, :3] == IGNORE_GREY).all() and tuple(rgb[1, 3]) == PALETTE[0]
    image, label = drawing(16, 16)
    label[15], prediction = 255, label.copy()
    prediction[0, 0], prediction[15, 3] = 1, 3
    rgb = pictures.errors(image, label, prediction)
    assert where(rgb, pictures.WRONG).nonzero() == (0, 0) and (rgb[15] == IGNORE_GREY).all()


def test_overlay_blends_colours_and_draws_outlines():
    rgb = pictures.overlay(*drawing(400, 400), PALETTE, alpha=0.6)
    assert np.abs(rgb[200, 200] - [0.4 * 100 + 0.6 * 255, 40, 40]).max() <= 1
    assert (np.abs(rgb[2, 2].astype(int) - 70) <= 1).all()
    lines = where(rgb, 255)
    assert lines[100, 100:300].all() and lines[100:300, 100].all() and lines.sum() == 4 * 200 - 1    # 1 pixel wide
    small = pictures.overlay(*drawing(40, 40), PALETTE)
    assert np.abs(small[10, 20] - (0.4 * 255 + 0.6 * small[20, 20])).max() <= 1
    assert where(pictures.overlay(*drawing(2400, 2400), PALETTE), 255)[1200].sum() == 2 * 4  # lines scale with the size
    dark = pictures.drawn_label(drawing(400, 400)[1], [(0, 0, 0), (9, 9, 9), (0, 0, 85)])
    assert (dark[200, 101:299] == (0, 0, 85)).all() and (dark[50, 50] == 0).all()
    assert dark[100, 200].min() > 200 and dark[200, 300].min() > 200


@pytest.mark.parametrize("size", [(1, 1), (100, 60), (60, 400), (600, 80), (1500, 2000)])
@pytest.mark.parametrize("count", [1, 4, 40])
def test_legend_shows_every_class_and_is_never_cut_off(size: tuple[int, int], count: int):
    names, palette = [f"{CLASSES[n % 4]}-{n}" for n in range(count)], [(40 + 5 * n, 200, n) for n in range(count)]
    result = pictures.with_legend(np.full((*size, 3), 77, np.uint8), names, palette)
    height, width = size
    beside, below = result[:, width:], result[height:]
    assert (result[:height, :width] == 77).all()
    assert not (beside.size and below.size) or min(size) < 500           # only a small picture may need both
    assert edge_is_empty(result, height if below.size else 0, width if beside.size else 0)
    assert colours(beside) | colours(below) >= set(palette)
    assert (result[..., 1] < 60).sum() > 20 * count        # text: nothing else is so dark


def test_legend_lists_the_labels_shown():
    image, label = drawing(50, 50)
    label[0, 0] = 255
    some = colours(pictures.with_legend(image, CLASSES, PALETTE, shown=np.unique(label)))
    assert some >= {PALETTE[2], (IGNORE_GREY,) * 3} and PALETTE[1] not in some
    assert PALETTE[1] in colours(pictures.with_legend(image, CLASSES, PALETTE))
    assert pictures.with_legend(image, CLASSES, PALETTE, shown=[]).shape == image.shape


def test_a_sheet_fits_cells_of_all_sizes_and_long_texts():
    fills = {(1, 1): (10, 200, 30), (300, 20): (200, 10, 30), (20, 900): (30, 10, 200)}
    cells = [np.full((*shape, 3), fill, np.uint8) for shape, fill in fills.items()]
    captions = ["name " * 40, ["x" * 99, "", "y" * 40]]
    result = pictures.sheet([cells, [cells[2], None], []], ["photo", "longer than its column " * 2], captions, 120)
    assert edge_is_empty(result) and (result[:, :2] == 255).all() and (result[:2] == 255).all()
    assert all(where(result, fill).sum() > 400 for fill in fills.values())
    assert pictures.sheet([]).ndim == 3


def test_curves_draw_every_series_and_accept_nan_and_inf():
    x = np.arange(100)
    series = {f"series {n}": (x, n + np.sin(x / 9)) for n in range(5)}
    odd = {"nan": (x, np.where(x % 7, x, np.nan)), "inf": (x, np.where(x == 3, np.inf, 1.0)), "none": ([], [])}
    panels = {"many": series, "odd": odd, "empty": {}, "one": {"a": ([5], [2.0])}, "negative": {"a": (x, x - 50.0)}}
    picture = plots.curves(panels)
    assert edge_is_empty(picture) and picture.shape == (900, 960, 3)
    assert all(where(picture[:300, :480], colour).sum() > 50 for colour in plots.SERIES[:5])
    assert plots.curves({}).shape == plots.curves({"one panel": series}).shape == (300, 480, 3)
    y, x = np.nonzero(where(plots.curves({"line": {"a": ([0, 100], [0.0, 50.0])}}), plots.SERIES[0]))
    assert np.corrcoef(x, y)[0, 1] < -0.999 and np.ptp(x) > 380 and np.ptp(y) > 180      # higher values are higher


def test_confusion_matrix_is_shaded_by_recall():
    picture = plots.confusion_picture(np.array([[90, 10, 0], [0, 5, 5], [0, 0, 0]]), CLASSES[:3], "title " * 40)
    assert edge_is_empty(picture) and where(picture, plots.GRID).sum() == 3 * 35 * 35
    for share, cells in ((0.9, 1), (0.1, 1), (0.5, 2)):
        assert cells * 800 < where(picture, plots._shade(share)).sum() <= cells * 35 * 35
    assert plots.confusion_picture(np.eye(60), [f"class {n}" for n in range(60)]).shape[0] > 60 * 36


def test_palette_png_keeps_labels_colours_and_text(tmp_path: Path):
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pictures.save_palette_png(tmp_path / "a.png", label, PALETTE, {"Source": "ä b.jpg"})
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P" and (np.asarray(image) == label).all() and image.info["Source"] == "ä b.jpg"
        colour = image.convert("RGB").getpixel
    assert [colour((n, 0)) for n in range(4)] == list(PALETTE) and colour((15, 15)) == (IGNORE_GREY,) * 3
