"""Score a trained SCHNet (§4.4): one confusion matrix over the whole set, at the photos' own size.

    python evaluate.py                                   the newest run, single scale
    python evaluate.py --tta                             scales .75 1 1.25 1.5 and flips
    python evaluate.py --run runs/cihp data_root=/data/CIHP
    torchrun --nproc_per_node 4 evaluate.py --checkpoint runs/cihp --tta
                                                         sharded over processes, the same numbers to the last digit

Prints per-class IoU in the order of the paper's Table 1 (beside the paper's figures, for LIP), pixel accuracy, mean
accuracy and mIoU; leaves results.json, the confusion matrix, per-class bars and the best and worst images under
runs/<run>/evaluation[_tta]/.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import user_path
from datasets import DrawnSet, LabelSet, PairSet, fingerprint, label_set, open_split, sample_warning
from engine.processes import World, run_together
from engine.workers import read_ahead
from errors import UserError
from files import weights
from files.atomic import results_folder, write_text
from inference import add_run_options, load_run, predict_labels, tta_views
from model import SCHNet
from viz import reports

# ----------------------------------------------------------------------------------------------------------------------
# metrics

def confusion_matrix(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Counts (K, K) int64, rows ground truth, columns prediction; labels of K and above (255: ignore) are skipped."""
    pred, label = pred.flatten().long(), label.flatten().long()
    kept = label < num_classes
    pairs = label[kept] * num_classes + pred[kept]
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


def scores(matrix: Tensor) -> dict:
    """Fractions from a confusion matrix: pixel_acc, mean_acc, miou, and per class iou and acc (nan if absent).

    A class that is in neither ground truth nor prediction has no IoU and is left out of the means; on the validation sets of
    LIP, CIHP and PPP all classes occur, so that this agrees with dividing by K.
    """
    matrix = matrix.double()
    hit, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = hit / (truth + predicted - hit)                                    # 0 / 0 = nan
    acc = hit / truth
    return {"pixel_acc": (hit.sum() / matrix.sum()).item(), "mean_acc": acc.nanmean().item(),
            "miou": iou.nanmean().item(), "iou": iou.tolist(), "acc": acc.tolist()}


# ----------------------------------------------------------------------------------------------------------------------
# evaluation

def evaluate_split(model: SCHNet, pairs: PairSet | DrawnSet, num_classes: int, world: World,
                   scales: Sequence[float] = (1.0,), flip_pairs: Sequence[tuple[int, int]] | None = None, batch: int = 4,
                   progress: bool = False,
                   interrupted: Callable[[], bool] = lambda: False) -> tuple[Tensor, list[tuple[float, int]]]:
    """The confusion matrix (K, K) over a whole set and (mIoU, index) of each image, the same on every process.

    Images go through the network in the same batches of `batch` however many processes share the work, each batch on
    one of them: sharded evaluation is exact. Stops early when `interrupted()` is true.
    """
    was_training = model.training
    model.eval()
    chunks = [range(a, min(a + batch, len(pairs))) for a in range(0, len(pairs), batch)][world.rank::world.size]
    order = [i for chunk in chunks for i in chunk]
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    per_image = []
    samples = read_ahead(pairs.read, order, model.cfg.workers)
    with tqdm(total=len(order) * world.size, desc="evaluate", unit="image", disable=not progress, leave=False) as bar:
        for chunk in chunks:
            if interrupted():
                break
            indices, read = zip(*islice(samples, len(chunk)))
            images, labels = zip(*read)
            for i, pred, label in zip(indices, predict_labels(model, images, scales, flip_pairs), labels):
                counts = confusion_matrix(torch.from_numpy(pred), torch.from_numpy(label), num_classes)
                matrix += counts
                per_image.append((scores(counts)["miou"], i))
            bar.update(len(chunk) * world.size)
    model.train(was_training)
    parts = world.gather((matrix, per_image))
    matrix, per_image = sum(part[0] for part in parts), [item for part in parts for item in part[1]]
    return matrix, sorted(per_image, key=lambda item: item[1])


# ----------------------------------------------------------------------------------------------------------------------
# the program

def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, batch=4)
    parser.add_argument("--split", choices=("val", "train"), default="val")
    parser.add_argument("--out", type=user_path,
                        help="folder of the results; evaluation[_tta][_train] in the run's if not given")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run's config")
    return parser.parse_intermixed_args(argv)


def open_labelled(model: SCHNet, labels: LabelSet, path: Path, split: str):
    """The photos to score a run on. Their classes must be the run's: LIP and CIHP both have 20, but not the same."""
    theirs = label_set(model.cfg).classes
    if theirs != labels.classes:
        pairs = zip(theirs, labels.classes)
        other = next((f"{k} is {a}, not {b}" for k, (a, b) in enumerate(pairs) if a != b), f"{len(theirs)} in number")
        raise UserError(f"the classes of {model.cfg.dataset} are not those {path} was trained on: {other}")
    return open_split(model.cfg, split)


def run(args: argparse.Namespace, world: World):
    with world.all_or_none():
        model, labels, path = load_run(args.run, args.overrides, world.device)
        sha256 = weights.sha256(path)                                    # of the scored file: training may still be running
        pairs = open_labelled(model, labels, path, args.split)
        warning = sample_warning(pairs, labels.classes) if world.main else ""
        folder = args.out or path.parent / ("evaluation" + "_tta" * args.tta + "_train" * (args.split == "train"))
        if world.main:
            results_folder(folder)
    world.check_same(sha256, "checkpoint")
    world.check_same(fingerprint(pairs), f"{args.split} split")
    labels = dataclasses.replace(labels, name=model.cfg.dataset)         # what is scored, not what was trained on
    scales, flip_pairs = tta_views(model.cfg, labels.flip_pairs, args.tta)
    how = f"scales {' '.join(map(str, scales))} and flips" if args.tta else "single scale"
    world.print0(f"{path}: {len(pairs)} images of {labels.name} {args.split}, {how}"
              + (f"\nwarning: {warning}" if warning else ""))
    start = time.monotonic()
    matrix, per_image = evaluate_split(model, pairs, len(labels.classes), world, scales, flip_pairs, args.batch,
                                       progress=world.main)
    seconds = (time.monotonic() - start) / len(pairs)
    if not world.main:
        return
    result = scores(matrix)
    print(reports.table(result, labels, args.tta))
    classes = zip(labels.classes, result["iou"], result["acc"])
    record = {"checkpoint": str(path), "sha256": sha256, "data": labels.name, "split": args.split,
              "images": len(pairs), "scales": scales, "flip": args.tta, "seconds_per_image": seconds,
              "processes": world.size, **{key: result[key] for key in ("pixel_acc", "mean_acc", "miou")},
              "classes": {name: {"iou": iou, "acc": acc} for name, iou, acc in classes},
              "confusion": matrix.tolist(), "config": dataclasses.asdict(model.cfg)}
    write_text(folder / "results.json", json.dumps(reports.without_nan(record), indent=1))
    shown = []
    for caption, i in reports.best_and_worst(per_image):
        image, label = pairs.read(i)
        found = predict_labels(model, [image], scales, flip_pairs)[0]
        shown.append((caption.format(pairs.name(i)), image, label, found))
    title = f"{path.parent.name} on {labels.name} {args.split}, {how}: mIoU {100 * result['miou']:.2f}"
    drawn = reports.draw(folder, title, labels, args.tta, result, matrix.numpy(), shown)
    print(f"{seconds:.3f} s per image; " + ", ".join(map(str, [folder / "results.json", *drawn])))


def main(argv: list[str] | None = None):
    args = arguments(argv)
    run_together(lambda world: run(args, world), args.device, "a smaller --batch, or --device cpu")


if __name__ == "__main__":
    main()
