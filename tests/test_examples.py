"""examples/make_labels.py, examples/look_inside.py, viz/compare.py: the programs that others do not import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import Config, to_yaml
from errors import UserError
from examples import look_inside
from viz import compare, plots

PROGRAM = Path(look_inside.__file__).with_name("make_labels.py")
CLASSES = ("Background", "Hair", "Coat")
SQUARE, TRIANGLE = [[2, 3], [9, 3], [9, 12], [2, 12]], [[4, 5], [8, 5], [4, 9]]


def make_labels(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_polygons_become_label_maps(tmp_path: Path, kind: str):
    shapes = [("Coat", SQUARE), ("Hair", TRIANGLE)]        # the later polygon is on top
    if kind == "coco":
        source = tmp_path / "instances.json"
        source.write_text(json.dumps({
            "categories": [{"id": 7, "name": "Coat"}, {"id": 3, "name": "Hair"}],
            "images": [{"id": 1, "file_name": "a/x.jpg", "width": 16, "height": 20}],
            "annotations": [{"image_id": 1, "category_id": {"Coat": 7, "Hair": 3}[name],
                             "segmentation": [sum(points, [])]}
                            for name, points in shapes]}))
    else:
        source = tmp_path / "json"
        source.mkdir()
        (source / "x.json").write_text(json.dumps({"imageWidth": 16, "imageHeight": 20, "shapes": [
            {"label": name, "points": points} for name, points in shapes]}))
    assert make_labels(kind, source, tmp_path / "labels", *CLASSES).returncode == 0
    label = np.array(Image.open(tmp_path / "labels/x.png"))
    assert label.shape == (20, 16) and (label[6, 5], label[11, 8], label[0, 0]) == (1, 2, 0)
    assert (label > 0).sum() == 8 * 10                     # the polygon and its outline
    done = make_labels(kind, source, tmp_path / "others", "Background", "Coat")
    assert done.returncode == 1 and "'Hair'" in done.stderr


def test_colour_masks_become_label_maps_and_labels_are_never_replaced(tmp_path: Path):
    truth = np.random.default_rng(0).integers(0, 4, (20, 30))
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 119, 221), (9, 9, 9)], np.uint8)
    (tmp_path / "masks").mkdir()
    Image.fromarray(colours[truth]).save(tmp_path / "masks/x.png")
    arguments = "colours", tmp_path / "masks", tmp_path / "labels", "Background=0,0,0", "Hair=255,0,0", "Coat=0,119,221"
    assert make_labels(*arguments).returncode == 0
    assert np.array_equal(np.array(Image.open(tmp_path / "labels/x.png")), np.where(truth == 3, 255, truth))
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "labels/x.png")
    before = (tmp_path / "labels/x.png").read_bytes()
    done = make_labels(*arguments)
    assert done.returncode == 1 and "labels/x.png" in done.stderr and (tmp_path / "labels/x.png").read_bytes() == before


def test_look_inside_draws_the_networks_maps(small: Path, tmp_path: Path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(tmp_path / "x.png")
    look_inside.main([str(tmp_path / "x.png"), "--run", str(small), "--out", str(tmp_path / "inside.png")])
    picture = np.array(Image.open(tmp_path / "inside.png"))
    assert "inside.png" in capsys.readouterr().out and picture.shape[1] > picture.shape[0] > 600
    parser = look_inside.Parser(small)
    padded, _ = look_inside.canvas(parser.read(tmp_path / "x.png"), parser.model.cfg, 1.0)
    image = look_inside.torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255
    for p in parser.model.parameters():
        if not p.any():                                    # a module initialised to zero would change nothing
            look_inside.torch.nn.init.normal_(p, std=0.1)
    f_sim, sites = look_inside.record(parser.model, image)
    assert f_sim.shape == (20,) and f_sim.sum() == pytest.approx(1, abs=1e-4)
    assert len(sites) == parser.model.cfg.srm_sites
    assert all((maps["block"] != maps["FTM"]).any() and (maps["FTM"] != maps["SRM"]).any() for maps in sites[1:])


def make_run(folder: Path, miou: list[float], **settings):
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(Config(**settings)))
    lines = [{"iter": 10 * n, "loss": 1 / n, "miou": score} for n, score in enumerate(miou, 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_that_differ_only_in_the_seed_share_a_row(tmp_path: Path, capsys):
    for seed, score in ((0, 0.5), (1, 0.6)):
        make_run(tmp_path / f"a{seed}", [0.1, score], seed=seed)
        (tmp_path / f"a{seed}/evaluation").mkdir()
        (tmp_path / f"a{seed}/evaluation/results.json").write_text(json.dumps(
            {"miou": score, "mean_acc": 0.7, "pixel_acc": 0.8, "iteration": 20, "training": {"hours": 2}}))
    make_run(tmp_path / "b", [0.3, 0.2], lr=1e-3)
    names = [str(tmp_path / name) for name in ("a0", "a1", "b")]
    compare.main([*names, "--out", str(tmp_path / "new/compare.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("  ")[0] == "a0 (2 seeds)" and "55.00 +- 7.07" in lines[1] and "2.00 +- 0.00" in lines[1]
    colours = np.array(Image.open(tmp_path / "new/compare.png")).reshape(-1, 3)
    assert all((colours == colour).all(1).any() for colour in plots.SERIES[:2])
    with pytest.raises(UserError, match="nothing: .*config.yaml"):
        compare.main([str(tmp_path / "nothing")])
