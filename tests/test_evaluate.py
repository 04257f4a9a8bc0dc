"""evaluate.py, reports.py: metrics against torchmetrics and counting loops, TTA against a naive loop over views."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import inference
import train
from augment import flip_order
from config import Config
from datasets import LABEL_SETS
from errors import UserError
from evaluate import confusion_matrix, evaluate_split, scores
from files.weights import sha256
from inference import canvas, predict, predict_labels, probabilities
from tiny import make_config
from viz import reports

CFG = Config(crop_size=(64, 64), base_size=64, precision="fp32", workers=2)


class Pointwise(torch.nn.Module):
    """A network that is flip-equivariant by construction: 1x1 convolutions. Channels 1 and 2 are left and right: with
    `tied` they are equal, so a mirrored photo gives the mirrored result with the two exchanged."""

    def __init__(self, num_classes=4, tied=True):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, num_classes, 1)
        self.cfg = CFG
        torch.nn.init.normal_(self.conv.weight, std=4.0, generator=torch.Generator().manual_seed(0))
        if tied:
            with torch.no_grad():
                self.conv.weight[2], self.conv.bias[2] = self.conv.weight[1], self.conv.bias[1]

    def forward(self, image):
        return self.conv(image)


class Sided(Pointwise):
    """Left and right by the side of the image: a mirror exchanges channels 1 and 2 exactly."""

    def forward(self, image):
        logits = self.conv(image).clone()
        x = torch.linspace(-1, 1, image.shape[-1]).expand_as(logits[:, 1])
        logits[:, 1], logits[:, 2] = logits[:, 1] + 3 * x, logits[:, 1] - 3 * x
        return logits


def photo(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


# ---- metrics

CASES = {
    "random": lambda g: (torch.randint(0, 6, (3, 20, 30), generator=g), torch.randint(0, 6, (3, 20, 30), generator=g)),
    "with ignore": lambda g: (torch.randint(0, 6, (40, 40), generator=g),
                              torch.where(torch.rand(40, 40, generator=g) < 0.3, 255,
                                          torch.randint(0, 6, (40, 40), generator=g))),
    "class absent from the ground truth": lambda g: (torch.randint(0, 6, (40, 40), generator=g),
                                                     torch.randint(0, 5, (40, 40), generator=g)),
    "class absent from both": lambda g: (torch.randint(0, 5, (40, 40), generator=g),
                                         torch.randint(0, 5, (40, 40), generator=g)),
    "one class": lambda g: (torch.full((9, 9), 2), torch.full((9, 9), 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_metrics_equal_torchmetrics(name):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex
    pred, label = CASES[name](torch.Generator().manual_seed(0))
    matrix = confusion_matrix(pred.to(torch.uint8), label.to(torch.uint8), 6)
    theirs = MulticlassConfusionMatrix(6, ignore_index=255)(pred, label)
    assert torch.equal(matrix, theirs)
    ours = scores(matrix)
    present = [k for k in range(6) if matrix[k].sum() + matrix[:, k].sum() > 0]
    jaccard = MulticlassJaccardIndex(6, average="none", ignore_index=255)(pred, label)
    for k in range(6):
        expected = pytest.approx(jaccard[k].item(), abs=1e-6)
        assert math.isnan(ours["iou"][k]) if k not in present else ours["iou"][k] == expected
    assert ours["miou"] == pytest.approx(jaccard[present].mean().item(), abs=1e-6)
    micro = MulticlassAccuracy(6, average="micro", ignore_index=255)(pred, label)
    assert ours["pixel_acc"] == pytest.approx(micro.item(), abs=1e-6)
    recall = MulticlassAccuracy(6, average="none", ignore_index=255)(pred, label)
    occurring = [k for k in range(6) if matrix[k].sum() > 0]
    assert ours["mean_acc"] == pytest.approx(recall[occurring].mean().item(), abs=1e-6)


def test_confusion_matrix_by_counting():
    g = torch.Generator().manual_seed(1)
    pred, label = torch.randint(0, 3, (50,), generator=g), torch.randint(0, 4, (50,), generator=g)
    label[label == 3] = 255
    expected = [[sum(int(p == c and t == r) for p, t in zip(pred, label)) for c in range(3)] for r in range(3)]
    assert confusion_matrix(pred, label, 3).tolist() == expected


def test_everything_ignored_has_no_score():
    result = scores(confusion_matrix(torch.zeros(5, 5), torch.full((5, 5), 255), 4))
    assert all(math.isnan(result[key]) for key in ("pixel_acc", "mean_acc", "miou"))


def test_the_papers_rows_average_to_its_miou():
    for (data, tta), row in reports.PUBLISHED.items():
        if "iou" in row:
            assert len(row["iou"]) == 20 and np.mean(row["iou"]) == pytest.approx(row["miou"], abs=0.01), (data, tta)


def test_table_has_the_papers_order_and_difference():
    result = {"iou": [0.9] + [0.5] * 19, "acc": [0.95] * 20, "pixel_acc": 0.9, "mean_acc": 0.8, "miou": 0.52}
    lines = reports.table(result, LABEL_SETS["lip"], tta=True).splitlines()
    assert lines[1].split() == ["Hat", "50.00", "95.00", "72.87", "73.53", "-23.53"]
    assert lines[20].split() == ["Background", "90.00", "95.00", "89.28", "89.71", "+0.29"]
    assert lines[-1].split() == ["mIoU", "52.00", "62.98", "64.25", "-12.25"]
    assert len({len(line) for line in lines}) == 1         # columns stand below each other
    single = reports.table(result | {"acc": [math.nan] * 20, "iou": [math.nan] * 20}, LABEL_SETS["lip"], tta=False)
    assert single.splitlines()[1].split() == ["Hat", "-", "-", "72.87", "73.53", "-"]
    assert single.splitlines()[-2].split() == ["mIoU", "52.00", "62.98", "64.25", "-10.98"]
    lines = reports.table({**result, "iou": [0.5] * 7, "acc": [0.5] * 7}, LABEL_SETS["ppp"], tta=True).splitlines()
    assert "paper" not in lines[0] and lines[-1].split() == ["mIoU", "52.00", "paper", "78.67", "(-26.67)"]


def test_best_and_worst_images():
    ranked = [(0.1 * n, n) for n in range(8)] + [(math.nan, 8)]
    chosen = reports.best_and_worst(ranked)
    assert [i for _, i in chosen] == [7, 6, 5, 2, 1, 0] and chosen[0][0].format("x") == "best: x, mIoU 70.0"
    assert chosen[-1][0] == "worst: {}, mIoU 0.0"
    assert [i for _, i in reports.best_and_worst(ranked[:4])] == [3, 2, 1, 0] and reports.best_and_worst([]) == []


# ---- prediction

@pytest.mark.parametrize("height, width", [(64, 64), (100, 50), (50, 100), (7, 200), (1, 1), (333, 250)])
def test_canvas_keeps_the_aspect_and_pads_as_training(height, width):
    for scale, side in ((0.75, 64), (1.0, 64), (1.25, 96), (1.5, 96)):
        padded, (h, w) = canvas(photo(height, width), CFG, scale)
        assert max(h, w) == round(64 * scale) and padded.shape == (side, side, 3)
        assert abs(h / w - height / width) <= 0.51 * (1 / w + h / w / w) or 1 in (h, w)
        assert (padded[h:] == inference.MEAN_COLOUR).all() and (padded[:, w:] == inference.MEAN_COLOUR).all()


def test_canvas_sides_of_the_paper():
    cfg = Config()
    assert [canvas(photo(40, 30), cfg, s)[0].shape[0] for s in cfg.tta_scales] == [384, 480, 608, 736]


def test_rows_are_the_bilinear_resize():
    logits = torch.randn(5, 13, 17, generator=torch.Generator().manual_seed(0))
    for size in ((40, 50), (13, 17), (9, 11), (1, 1)):
        expected = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].softmax(0)
        torch.testing.assert_close(probabilities([logits], size, 0, size[0]), expected, atol=1e-6, rtol=1e-5)
        strips = [probabilities([logits], size, top, min(top + 3, size[0])) for top in range(0, size[0], 3)]
        strips = torch.cat(strips, 1)
        torch.testing.assert_close(strips, expected, atol=1e-6, rtol=1e-5)


def naive_tta(model, image, scales, flip_pairs):
    """One view after the other, each for itself, as §4.4 says it."""
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
    """The mirrored view of the naive loop mirrors the photo before it is resized; ours after: they agree where resizing
    is symmetric, which bilinear and area resampling are."""
    model = Sided(tied=False).eval()
    image = photo(*size)
    with torch.inference_mode():
        expected = naive_tta(model, image, (0.75, 1.0, 1.5), [(1, 2)])
    ours = predict(model, image, (0.75, 1.0, 1.5), [(1, 2)])
    assert (ours - expected).abs().max() < 0.02                          # uint8 rounding in the resized photo
    assert (ours - expected).abs().mean() < 1e-3
    assert torch.allclose(ours.sum(0), torch.ones(size), atol=1e-5)


def test_flip_changes_nothing_for_an_equivariant_network():
    model, image = Pointwise().eval(), photo(70, 64)
    torch.testing.assert_close(predict(model, image, (1.0,), [(1, 2)]), predict(model, image), atol=1e-5, rtol=1e-4)


def test_left_and_right_change_places_in_a_mirror():
    """Where left and right depend on the side, the right swap changes (next to) nothing, a wrong one ruins it."""
    model, image = Sided().eval(), photo(64, 64)
    plain = predict(model, image)
    assert (predict(model, image, (1.0,), [(1, 2)]) - plain).abs().max() < 1e-4
    for wrong in ([], [(0, 1)], [(2, 3)]):
        assert (predict(model, image, (1.0,), wrong) - plain).abs().max() > 0.1, wrong


def test_flip_order_of_lip():
    order = flip_order(20, LABEL_SETS["lip"].flip_pairs)
    assert order == [*range(14), 15, 14, 17, 16, 19, 18] and [order[k] for k in order] == list(range(20))


def test_labels_in_strips_are_the_argmax(monkeypatch):
    model, images = Sided(tied=False).eval(), [photo(70, 64), photo(33, 90, 1), photo(1, 1, 2)]
    expected = [predict(model, image, (1.0, 1.5), [(1, 2)]).argmax(0).numpy() for image in images]
    monkeypatch.setattr(inference, "CPU_STRIP", 4 * 64 * 4 * 5)         # five rows at a time
    for ours, theirs, image in zip(predict_labels(model, images, (1.0, 1.5), [(1, 2)]), expected, images):
        assert ours.dtype == np.uint8 and ours.shape == image.shape[:2]
        assert (ours == theirs).mean() > 0.999                           # a batch of three rounds unlike a batch of one


# ---- evaluation

class Pairs(list):
    def read(self, i):
        return self[i]


def test_evaluation_sums_over_images():
    rng = np.random.default_rng(0)
    pairs = Pairs((photo(48 + n, 64, n), rng.integers(0, 4, (48 + n, 64), np.uint8)) for n in range(7))
    model = Pointwise(tied=False).train()
    matrix, per_image = evaluate_split(model, pairs, 4, batch=3)
    assert model.training                                                # as it was
    expected = sum(confusion_matrix(predict(model, image).argmax(0), torch.from_numpy(label), 4)
                   for image, label in pairs)
    assert torch.equal(matrix, expected) and matrix.sum() == sum(label.size for _, label in pairs)
    assert [i for _, i in per_image] == list(range(7))
    first = confusion_matrix(predict(model, pairs[0][0]).argmax(0), torch.from_numpy(pairs[0][1]), 4)
    assert per_image[0][0] == pytest.approx(scores(first)["miou"])


@pytest.mark.parametrize("world", [2, 3])
def test_the_shards_together_are_the_whole(world):
    """What the processes of a sharded evaluation count adds up to the whole, batch for batch (7 divides by none)."""
    rng = np.random.default_rng(0)
    pairs = Pairs((photo(48 + n, 64, n), rng.integers(0, 4, (48 + n, 64), np.uint8)) for n in range(7))
    model = Pointwise(tied=False).eval()
    whole, _ = evaluate_split(model, pairs, 4, batch=2)

    class Alone:                                                         # each shard by itself
        size = world

        def __init__(self, rank):
            self.rank = rank

        def gather(self, value):
            return [value]

    shards = [evaluate_split(model, pairs, 4, batch=2, world=Alone(rank)) for rank in range(world)]
    assert torch.equal(sum(matrix for matrix, _ in shards), whole)
    assert sorted(i for _, part in shards for _, i in part) == list(range(7))


def test_a_missing_run_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, words in (([], "holds no run yet"), (["--run", "runs/x"], "no such run"),
                        (["--run", str(Path(__file__))], "not a checkpoint")):
        with pytest.raises(SystemExit) as end:
            evaluate.main(argv)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 1 and len(lines) == 1 and words in lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    train.main(["--cfg", make_config(folder)])
    return folder / "run"


def test_a_folder_that_takes_no_files_is_said_before_the_work(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate, "evaluate_split", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--run", str(run), "--out", str(tmp_path / "file" / "x")])
    assert end.value.code == 1 and f"error: {tmp_path}/file/x takes no files (" in capsys.readouterr().err


def test_the_record_is_of_the_checkpoint_that_was_scored(run, tmp_path, monkeypatch):
    """A run that is still trained replaces its best.pt meanwhile."""
    folder, real = tmp_path / "run", evaluate.evaluate_split
    shutil.copytree(run, folder)
    expected = sha256(folder / "best.pt")

    def meanwhile(*args, **more):
        (folder / "best.pt").write_bytes(b"another")
        return real(*args, **more)

    monkeypatch.setattr(evaluate, "evaluate_split", meanwhile)
    evaluate.main(["--run", str(folder)])
    assert json.loads((folder / "evaluation/results.json").read_text())["sha256"] == expected


def test_each_split_has_its_results(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for argv in ([], ["--split", "train"], ["--tta"], ["--tta", "--split", "train"]):
        evaluate.main(["--run", str(tmp_path / "run"), *argv])
    found = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "run").glob("*/results.json")}
    assert {name: (record["split"], record["flip"]) for name, record in found.items()} == {
        "evaluation": ("val", False), "evaluation_train": ("train", False), "evaluation_tta": ("val", True),
        "evaluation_tta_train": ("train", True)}


def test_the_table_is_printed_before_anything_is_written(run, tmp_path, capsys, monkeypatch):
    def full(path, text):
        raise UserError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(evaluate, "write_text", full)
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--run", str(run), "--out", str(tmp_path / "x")])
    said = capsys.readouterr()
    assert end.value.code == 1 and "No space left" in said.err and "pixel accuracy" in said.out


def test_masks_of_0_and_255_are_warned_of_in_training_and_in_evaluation(tmp_path, capsys):
    """255 is ignored: such a network is perfect, at one class."""
    path = make_config(tmp_path)
    for label in (tmp_path / "data/labels").rglob("*.png"):
        Image.fromarray(np.where(np.array(Image.open(label)) > 0, 255, 0).astype(np.uint8)).save(label)
    train.main(["--cfg", path, "classes=[ground, person]", "flip_pairs=[]"])
    said = capsys.readouterr().out
    for split in ("train", "val"):
        assert re.search(rf"warning: .*labels/{split}: .*no label shows 1 person, but .* of the pixels are 255", said)
    evaluate.main(["--run", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "warning: " in said and "no label shows 1 person" in said and "the labels show ground alone" in said, said


def test_names_that_the_terminal_cannot_show_end_nothing(tmp_path):
    """Class names in Chinese and a file name that is no UTF-8, on a console of code page 1252."""
    path = make_config(tmp_path)
    for folder, ending in (("images", "png"), ("labels", "png")):
        file = tmp_path / "data" / folder / "val" / f"0.{ending}"
        file.rename(file.with_name(os.fsdecode(b"p\xe4.png")))
    names = "classes=[背景, 上衣, 裤子]"
    run = f"--run={tmp_path / 'run'}"
    for argv in (["datasets.py", "--cfg", path, names, f"--out={tmp_path / 'sheets'}"], ["train.py", "--cfg", path, names],
                 ["evaluate.py", run], ["predict.py", run, str(tmp_path / "data/images/val"), f"--out={tmp_path / 'parsed'}"]):
        done = subprocess.run([sys.executable, *argv], cwd=Path(__file__).parents[1], capture_output=True,
                              env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"})
        assert done.returncode == 0, done.stderr.decode("cp1252")


def test_a_run_is_not_scored_on_other_classes():
    """LIP and CIHP both have 20 classes, so that nothing else would notice."""
    model = Pointwise()
    model.cfg = replace(CFG, dataset="cihp", data_root="nowhere")
    with pytest.raises(UserError, match="10 is Torso-skin, not Jumpsuits"):
        evaluate.open_labelled(model, LABEL_SETS["lip"], Path("runs/lip/best.pt"), "val")
    with pytest.raises(UserError, match="20 in number"):
        cihp = LABEL_SETS["cihp"]
        few = replace(cihp, classes=cihp.classes[:7], palette=cihp.palette[:7], flip_pairs=())
        evaluate.open_labelled(model, few, Path("x.pt"), "val")
    model.cfg = replace(CFG, dataset="synthetic")
    assert len(evaluate.open_labelled(model, LABEL_SETS["lip"], Path("x.pt"), "val")) == CFG.synthetic_val


def test_torchrun_lets_the_options_through():
    """It refuses what might be short for one of its own, as --run is for --run-path on Python 3.11."""
    from torch.distributed.run import parse_args
    mine = "--checkpoint runs/x --tta --split train --batch 2 --device cpu --out y a=b".split()
    assert parse_args(["--nproc_per_node", "4", "evaluate.py", *mine]).training_script_args == mine
    args = evaluate.arguments(mine)
    assert (args.run, args.tta, args.split, args.batch, args.overrides) == ("runs/x", True, "train", 2, ["a=b"])
