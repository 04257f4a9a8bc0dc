"""evaluate.py, inference.py, viz/reports.py: metrics against torchmetrics, TTA against a naive loop."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import ALONE, SIZE, make_config, make_data, photo

import evaluate
import inference
import train
from config import Config, parse_overrides
from errors import UserError
from evaluate import confusion_matrix, evaluate_split, scores
from files.labels import LABEL_SETS
from files.weights import sha256
from inference import canvas, predict, predict_labels
from viz import reports

CFG = Config(crop_size=(64, 64), base_size=64, precision="fp32", workers=2)


class Sided(torch.nn.Module):
    """A 1x1 convolution; channels 1 and 2 depend on the side of the image, and a mirrored image swaps them exactly."""

    def __init__(self):
        super().__init__()
        self.conv, self.cfg = torch.nn.Conv2d(3, 4, 1), CFG
        torch.nn.init.normal_(self.conv.weight, std=4.0, generator=torch.Generator().manual_seed(0))

    def forward(self, image):
        logits = self.conv(image).clone()
        x = torch.linspace(-1, 1, image.shape[-1]).expand_as(logits[:, 1])
        logits[:, 1], logits[:, 2] = logits[:, 1] + 3 * x, logits[:, 1] - 3 * x
        return logits


def classes(*size, low=0, high=6, seed=0):
    return torch.randint(low, high, size, generator=torch.Generator().manual_seed(seed))


CASES = {"random": (classes(3, 20, 30), classes(3, 20, 30, seed=1)),
         "with ignore": (classes(40, 40), classes(40, 40, seed=1).where(classes(40, 40, seed=2) > 1, 255)),
         "class absent from the ground truth": (classes(40, 40), classes(40, 40, high=5, seed=1)),
         "class absent from both": (classes(40, 40, high=5), classes(40, 40, high=5, seed=1)),
         "one class": (torch.full((9, 9), 2), torch.full((9, 9), 2))}


@pytest.mark.parametrize("name", CASES)
def test_metrics_equal_torchmetrics(name):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex
    pred, label = CASES[name]
    matrix = confusion_matrix(pred.to(torch.uint8), label.to(torch.uint8), 6)
    assert torch.equal(matrix, MulticlassConfusionMatrix(6, ignore_index=255)(pred, label))
    ours, present, occurring = scores(matrix), matrix.sum(0) + matrix.sum(1) > 0, matrix.sum(1) > 0
    jaccard = MulticlassJaccardIndex(6, average="none", ignore_index=255)(pred, label)
    expected = jaccard.where(present, torch.nan).double()
    torch.testing.assert_close(torch.tensor(ours["iou"]).double(), expected, atol=1e-6, rtol=0, equal_nan=True)
    assert ours["miou"] == pytest.approx(jaccard[present].mean().item(), abs=1e-6)
    micro = MulticlassAccuracy(6, average="micro", ignore_index=255)(pred, label)
    assert ours["pixel_acc"] == pytest.approx(micro.item(), abs=1e-6)
    recall = MulticlassAccuracy(6, average="none", ignore_index=255)(pred, label)
    assert ours["mean_acc"] == pytest.approx(recall[occurring].mean().item(), abs=1e-6)


def test_scores_without_a_labelled_pixel():
    nothing = scores(confusion_matrix(torch.zeros(5, 5), torch.full((5, 5), 255), 4))
    assert all(math.isnan(nothing[key]) for key in ("pixel_acc", "mean_acc", "miou"))


def test_table_has_the_papers_order_and_scores():
    for row in reports.PUBLISHED.values():
        assert "iou" not in row or len(row["iou"]) == 20 and np.mean(row["iou"]) == pytest.approx(row["miou"], abs=0.01)
    result = {"iou": [0.9] + [0.5] * 19, "acc": [0.95] * 20, "pixel_acc": 0.9, "mean_acc": 0.8, "miou": 0.52}
    lines = reports.table(result, LABEL_SETS["lip"], tta=True).splitlines()
    assert lines[1].split() == ["Hat", "50.00", "95.00", "72.87", "73.53", "-23.53"]
    assert lines[20].split() == ["Background", "90.00", "95.00", "89.28", "89.71", "+0.29"]
    assert lines[-1].split() == ["mIoU", "52.00", "62.98", "64.25", "-12.25"]
    assert len({len(line) for line in lines}) == 1         # columns are aligned
    absent = {"acc": [math.nan] * 20, "iou": [math.nan] * 20}
    lines = reports.table(result | absent, LABEL_SETS["lip"], tta=False).splitlines()
    assert lines[1].split() == ["Hat", "-", "-", "72.87", "73.53", "-"]
    assert lines[-1].split() == ["mIoU", "52.00", "62.98", "64.25", "-10.98"]
    lines = reports.table({**result, "iou": [0.5] * 7, "acc": [0.5] * 7}, LABEL_SETS["ppp"], tta=True).splitlines()
    assert "paper" not in lines[0] and lines[-1].split() == ["mIoU", "52.00", "paper", "78.67", "(-26.67)"]


def test_best_and_worst_images():
    ranked = [(0.1 * n, n) for n in range(8)] + [(math.nan, 8)]
    chosen = reports.best_and_worst(ranked)
    assert [i for _, i in chosen] == [7, 6, 5, 2, 1, 0] and chosen[0][0].format("x") == "best: x, mIoU 70.0"
    assert [i for _, i in reports.best_and_worst(ranked[:4])] == [3, 2, 1, 0] and reports.best_and_worst([]) == []


@pytest.mark.parametrize("height, width", [(64, 64), (100, 50), (50, 100), (7, 200), (1, 1), (333, 250)])
def test_canvas_keeps_the_aspect_ratio_and_pads_as_in_training(height, width):
    for scale, side in ((0.75, 64), (1.0, 64), (1.25, 96), (1.5, 96)):
        padded, (h, w) = canvas(photo(height, width), CFG, scale)
        assert max(h, w) == round(64 * scale) and padded.shape == (side, side, 3)
        assert abs(h / w - height / width) <= 0.51 * (1 / w + h / w / w) or 1 in (h, w)
        assert (padded[h:] == inference.MEAN_COLOUR).all() and (padded[:, w:] == inference.MEAN_COLOUR).all()
    cfg = Config()                                         # the paper's
    assert [canvas(photo(40, 30), cfg, scale)[0].shape[0] for scale in cfg.tta_scales] == [384, 480, 608, 736]


def naive_tta(model, image, scales, flip_pairs):
    """One view at a time, as in §4.4."""
    height, width = image.shape[:2]
    views = []
    for scale in scales:
        for flip in (False, True):
            padded, (h, w) = canvas(image[:, ::-1] if flip else image, model.cfg, scale)
            x = torch.from_numpy(padded.copy()).permute(2, 0, 1)[None].float() / 255
            logits = model(x)[:, :, :h, :w]
            if flip:
                swapped = logits.clone()
                for a, b in flip_pairs:
                    swapped[:, a], swapped[:, b] = logits[:, b], logits[:, a]
                logits = swapped.flip(-1)
            views.append(F.interpolate(logits, (height, width), mode="bilinear", align_corners=False).softmax(1)[0])
    return torch.stack(views).mean(0)


@pytest.mark.parametrize("size", [(64, 64), (90, 60), (64, 128), (50, 123)])
def test_tta_equals_a_naive_loop_over_views(size):
    """The loop mirrors the photo before resizing, predict after it; bilinear and area resampling are symmetric."""
    model = Sided().eval()
    image = photo(*size)
    with torch.inference_mode():
        expected = naive_tta(model, image, (0.75, 1.0, 1.5), [(1, 2)])
    ours = predict(model, image, (0.75, 1.0, 1.5), [(1, 2)])
    assert (ours - expected).abs().max() < 0.02                          # the resized photo is rounded to uint8
    assert (ours - expected).abs().mean() < 1e-3
    assert torch.allclose(ours.sum(0), torch.ones(size), atol=1e-5)


def test_labels_of_a_batch_are_the_argmax():
    model, images = Sided().eval(), [photo(70, 64), photo(33, 90, 1), photo(1, 1, 2)]
    for ours, image in zip(predict_labels(model, images, (1.0, 1.5), [(1, 2)]), images):
        expected = predict(model, image, (1.0, 1.5), [(1, 2)]).argmax(0).numpy()
        assert ours.dtype == np.uint8 and ours.shape == image.shape[:2]
        assert (ours == expected).mean() > 0.999           # rounding depends on the batch size


class Pairs(list):
    def read(self, i):
        return self[i]

    def name(self, i: int) -> str:
        return str(i)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return Pairs((photo(48 + n, 64, n), rng.integers(0, 4, (48 + n, 64), np.uint8)) for n in range(7))


def test_evaluation_sums_over_images(pairs):
    model = Sided().train()
    matrix, per_image = evaluate_split(model, pairs, 4, ALONE, batch=3)
    assert model.training                                  # train mode is restored
    counts = [confusion_matrix(predict(model, image).argmax(0), torch.from_numpy(label), 4) for image, label in pairs]
    assert torch.equal(matrix, sum(counts)) and matrix.sum() == sum(label.size for _, label in pairs)
    assert per_image == [(pytest.approx(scores(one)["miou"]), n) for n, one in enumerate(counts)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    train.main(["--cfg", make_config(folder)])
    return folder / "run"


def test_mistakes_are_one_line_before_the_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate_split", lambda *_, **__: pytest.fail("evaluation has started"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    for argv, words in (([], "runs: no checkpoint"), (["--run", "runs/x"], "runs/x: no "),
                        (["--run", __file__], "checkpoint"),
                        (["--run", str(run), "--out", "mine/notes.txt/x"], "mine/notes.txt/x: Not a directory"),
                        (["--run", str(run), "--out", "mine"], "mine holds other files (notes.txt)")):
        with pytest.raises(SystemExit, match="1"):
            evaluate.main(argv)
        line, = capsys.readouterr().err.splitlines()
        assert words in line


def test_results_record_the_checkpoint_and_split_that_were_scored(run, tmp_path, monkeypatch):
    """Even if a run that is still training replaces best.pt meanwhile."""
    folder, real = tmp_path / "run", evaluate.evaluate_split
    shutil.copytree(run, folder)
    evaluate.main(["--run", str(folder), "--tta", "--split", "train"])

    def meanwhile(*args, **more):
        (folder / "best.pt").write_bytes(b"another")
        return real(*args, **more)

    monkeypatch.setattr(evaluate, "evaluate_split", meanwhile)
    evaluate.main(["--run", str(folder)])
    for name, split, flip in (("evaluation_tta_train", "train", True), ("evaluation", "val", False)):
        record = json.loads((folder / name / "results.json").read_text())
        assert (record["sha256"], record["split"], record["identity"]["flip"]) == (sha256(run / "best.pt"), split, flip)
        assert record["chosen_on_this_set"] == (split == "val") and record["iteration"] in (2, 4)
        assert {"commit", "torch", "device"} <= record.keys() and record["training"]["hours"] >= 0
        assert (record["last"] or {}).get("iteration") == (4 if split == "val" else None)


def test_scores_of_other_data_or_settings_are_never_replaced(run, tmp_path, capsys):
    def name(*overrides, run=None, **options) -> str:
        args = SimpleNamespace(run=run, overrides=overrides, **{"tta": False, "split": "val"} | options)
        return evaluate.results_name(args, replace(CFG, **parse_overrides(overrides)), CFG)

    (tmp_path / "last.pt").touch()
    assert name() == name("workers=1", "sam_weights=x") == name("tta_scales=[1.0]") == "evaluation"
    assert name("base_size=160") == "evaluation_base_size-160" and name("precision=bf16") == "evaluation_precision-bf16"
    assert name("data_root=/a/mine/") == "evaluation_data_root-mine" and name(tta=True) == "evaluation_tta"
    assert name("tta_scales=[1.0]", tta=True) == "evaluation_tta_tta_scales--1.0-"
    assert name(run=str(tmp_path / "last.pt"), split="train") == "evaluation_last_train"
    identity = {"data": "20 abc", "data_root": "/a/mine", "scales": (1.0, 1.5), "base_size": 160}
    for _ in range(2):                                     # a repeated evaluation may replace them
        evaluate.claim(tmp_path / "e", identity)
        evaluate.write_record(tmp_path / "e", {"identity": identity})
    for key, other in (("data_root", "/b/mine"), ("scales", (1.0,)), ("data", "21 abc")):
        with pytest.raises(UserError, match=rf"e/results.json .*\({key}\).*--out"):
            evaluate.claim(tmp_path / "e", identity | {key: other})
    (tmp_path / "e/results.json").write_text("{}")
    with pytest.raises(UserError, match="e/results.json"):
        evaluate.claim(tmp_path / "e", identity)

    make_data(tmp_path)
    shutil.copytree(tmp_path / "labels/val", tmp_path / "labels/other")
    argv = ["--run", str(run), f"data_root={tmp_path}", "--out", str(tmp_path / "scores")]
    evaluate.main(argv)
    Image.new("L", (SIZE, SIZE)).save(tmp_path / "labels/other/0.png")
    for labels, key in (("labels/other", "val_labels"), ("labels/val", "data")):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="1"):
            evaluate.main([*argv, f"val_labels={labels}"])
        assert key in capsys.readouterr().err
        shutil.copy(tmp_path / "labels/other/0.png", tmp_path / "labels/val")        # edited where it is


def test_a_full_disk_loses_no_scores(run, tmp_path, capsys, monkeypatch):
    full = UserError("results.json could not be written (No space left on device)")
    monkeypatch.setattr(evaluate, "write_text", Mock(side_effect=full))
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(["--run", str(run), "--out", str(tmp_path / "x")])
    printed = capsys.readouterr()
    assert "No space left" in printed.err and "pixel accuracy" in printed.out


def test_masks_of_0_and_255_are_warned_of(run, tmp_path, capsys):
    make_data(tmp_path)
    for label in tmp_path.glob("labels/val/*.png"):
        Image.fromarray(np.where(np.array(Image.open(label)) > 0, 255, 0).astype(np.uint8)).save(label)
    evaluate.main(["--run", str(run), f"data_root={tmp_path}", "--out", str(tmp_path / "out")])
    assert re.search(f"warning: {tmp_path}/labels/val.* 255", capsys.readouterr().out)


def test_a_run_is_not_scored_on_other_classes():
    """LIP and CIHP both have 20 classes, so their number does not reveal it."""
    model = Sided()
    model.cfg = replace(CFG, dataset="cihp", data_root="nowhere")
    with pytest.raises(UserError, match="10 is Torso-skin, not Jumpsuits"):
        evaluate.open_labelled(model, LABEL_SETS["lip"], Path("runs/lip/best.pt"), "val")
    with pytest.raises(UserError, match="20 in number"):
        cihp = LABEL_SETS["cihp"]
        few = replace(cihp, classes=cihp.classes[:7], palette=cihp.palette[:7], flip_pairs=())
        evaluate.open_labelled(model, few, Path("x.pt"), "val")
    model.cfg = replace(CFG, dataset="synthetic")
    assert len(evaluate.open_labelled(model, LABEL_SETS["lip"], Path("x.pt"), "val")) == CFG.synthetic_val
