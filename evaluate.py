"""Score a trained SCHNet (§4.4): one confusion matrix over the complete set, at the photos' own size.

    python evaluate.py                                   the newest run, single scale
    python evaluate.py --tta                             scales .75 1 1.25 1.5 and flips
    python evaluate.py --run runs/cihp data_root=/data/CIHP
    torchrun --nproc_per_node 4 evaluate.py --checkpoint runs/cihp --tta
                                                         sharded over processes, the same numbers to the last digit

Prints per-class IoU in the order of the paper's Table 1 (for LIP beside the paper's numbers), pixel accuracy, mean
accuracy and mIoU; leaves results.json, the confusion matrix and the best and worst images under
runs/<run>/evaluation..., with what differs from the plain evaluation in its name. The best checkpoint was chosen by its
score on the validation set: where that set is scored, last.pt is scored too.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import OVERRIDABLE, Config, from_dict, parse_overrides, user_path
from datasets import DrawnSet, LabelSet, PairSet, label_set, open_split, sample_warning
from engine import checkpoint
from engine.processes import World, device_name, run_together
from engine.workers import read_ahead
from errors import UserError
from files import weights
from files.atomic import results_folder, write_text
from inference import add_run_options, load_content, predict_labels, tta_views
from model import SCHNet
from viz import reports

RESULTS = "results.json"
NO_EFFECT = {"workers", "sam_weights", "clip_weights", "clip_activation", "vocab"}         # on the scores

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

    A class that is in neither ground truth nor prediction has no IoU and is left out of the means; on the validation
    sets of LIP, CIHP and PPP all classes occur, so that this agrees with dividing by K.
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
                   scales: Sequence[float] = (1.0,), flip_pairs: Sequence[tuple[int, int]] | None = None,
                   batch: int = 4, progress: bool = False,
                   interrupted: Callable[[], bool] = lambda: False) -> tuple[Tensor, list[tuple[float, int]]]:
    """The confusion matrix (K, K) over a complete set and (mIoU, index) of each image, the same on every process.

    Images go through the network in the same batches of `batch` however many processes share the work, each batch on
    one of them: sharded evaluation is exact. Stops early when `interrupted()` is true.
    """
    was_training = model.training
    model.eval()
    chunks = [range(a, min(a + batch, len(pairs))) for a in range(0, len(pairs), batch)][world.rank::world.size]
    order = [i for chunk in chunks for i in chunk]
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    per_image = []
    samples = read_ahead(pairs.read, order, model.cfg.workers, pairs.name, interrupted)
    bar = tqdm(total=len(order) * world.size, desc="evaluate", unit="image", disable=not progress, leave=False)
    with contextlib.closing(samples), bar:
        for chunk in chunks:
            read = [*islice(samples, len(chunk))]
            if interrupted():
                break
            indices, images, labels = zip(*((i, *pair) for i, pair in read))
            for i, pred, label in zip(indices, predict_labels(model, images, scales, flip_pairs), labels):
                counts = confusion_matrix(torch.from_numpy(pred), torch.from_numpy(label), num_classes)
                matrix += counts
                per_image.append((scores(counts)["miou"], i))
            bar.update(len(chunk) * world.size)
    model.train(was_training)
    matrices, items = zip(*world.gather((matrix, per_image)))
    return sum(matrices), sorted(sum(items, []), key=lambda item: item[1])


# ----------------------------------------------------------------------------------------------------------------------
# the program

def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, batch=4)
    parser.add_argument("--split", choices=("val", "train"), default="val")
    parser.add_argument("--out", type=user_path, help="folder of the results; evaluation... in the run's if not given")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run's config")
    return parser.parse_intermixed_args(argv)


def open_labelled(model: SCHNet, labels: LabelSet, path: Path, split: str) -> PairSet | DrawnSet:
    """The photos to score a run on. Their classes must be the run's: LIP and CIHP both have 20, but not the same."""
    theirs = label_set(model.cfg).classes
    if theirs != labels.classes:
        pairs = zip(theirs, labels.classes)
        other = next((f"{k} is {a}, not {b}" for k, (a, b) in enumerate(pairs) if a != b), f"{len(theirs)} in number")
        raise UserError(f"the classes of {model.cfg.dataset} are not those {path} was trained on: {other}")
    return open_split(model.cfg, split)


def results_name(args: argparse.Namespace, cfg: Config, trained: Config) -> str:
    """The name of the results' folder: "evaluation" and what differs from the plain evaluation of a run."""
    changed = [key for key in OVERRIDABLE - NO_EFFECT if getattr(cfg, key) != getattr(trained, key)]
    if "precision" not in parse_overrides(args.overrides):               # fp32 on a CPU was not the user's choice
        changed = [key for key in changed if key != "precision"]
    words = [f"_{key}-{os.path.basename(str(getattr(cfg, key)).rstrip('/'))}" for key in sorted(changed)
             if args.tta or key != "tta_scales"]
    file = f"_{Path(args.run).stem}" if args.run and Path(args.run).is_file() else ""
    name = "evaluation" + file + "_tta" * args.tta + "_train" * (args.split == "train") + "".join(words)
    return re.sub(r"[^\w.-]+", "-", name)[:200]


def claim(folder: Path, identity: dict):
    """Makes the folder of the results; UserError if it holds scores of other data or settings."""
    results_folder(folder)
    if not (folder / RESULTS).exists():
        return
    try:
        held = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError):
        held = {}                                          # nothing is known of them
    different = [key for key in identity if held.get(key) != json.loads(json.dumps(identity[key]))]
    if different:
        raise UserError(f"{folder / RESULTS} holds other scores ({', '.join(different)}): choose --out")


def run(args: argparse.Namespace, world: World):
    with world.all_or_none():
        path = checkpoint.find(args.run)
        content = checkpoint.read(path)
        model, labels = load_content(content, path, args.overrides, world.device)
        progress, trained = content.get("progress", {}), from_dict(content["config"], str(path))
        sha256, pairs = weights.sha256(path), open_labelled(model, labels, path, args.split)
        scales, flip_pairs = tta_views(model.cfg, labels.flip_pairs, args.tta)
        folder = args.out or path.parent / results_name(args, model.cfg, trained)
        identity = {"run": str(path.parent.resolve()), "checkpoint": path.name, "data": pairs.fingerprint,
                    "split": args.split, "scales": scales, "flip": args.tta,
                    **{key: getattr(model.cfg, key) for key in sorted(OVERRIDABLE - NO_EFFECT - {"tta_scales"})},
                    "data_root": os.path.abspath(model.cfg.data_root) if pairs.place else ""}
        if world.main:
            claim(folder, identity)
            warning = sample_warning(pairs, labels.classes)
    world.check_same(sha256, "checkpoint")
    world.check_same(pairs.fingerprint, f"{args.split} split")
    labels = dataclasses.replace(labels, name=model.cfg.dataset)         # of the scored data, not of the training data
    how = f"scales {' '.join(map(str, scales))} and flips" if args.tta else "single scale"
    world.print0(f"{path}: {len(pairs)} images of {labels.name} {args.split}, {how}")
    if world.main and warning:
        world.print0(f"warning: {warning}")

    def score() -> tuple[Tensor, list[tuple[float, int]]]:
        return evaluate_split(model, pairs, len(labels.classes), world, scales, flip_pairs, args.batch,
                              progress=world.main)

    start = time.monotonic()
    matrix, per_image = score()
    seconds = (time.monotonic() - start) / len(pairs)
    result = scores(matrix)
    last = path.with_name(checkpoint.LAST)
    chosen = path.name == checkpoint.BEST and progress.get("val") == pairs.fingerprint
    record = {"identity": identity, "checkpoint": str(path), "sha256": sha256, "iteration": progress.get("iteration"),
              "chosen_on_this_set": chosen, "last": None, "images": len(pairs), "data": labels.name,
              "split": args.split,
              "training": {"hours": round(progress.get("seconds", 0) / 3600, 3), "machine": progress.get("machine")},
              "seconds_per_image": seconds, "processes": world.size, **versions(world.device), **_main_scores(result),
              "classes": {name: {"iou": iou, "acc": acc}
                          for name, iou, acc in zip(labels.classes, result["iou"], result["acc"])},
              "confusion": matrix.tolist(), "config": dataclasses.asdict(model.cfg)}
    if world.main:                                    # files first: a lost terminal loses nothing, nor does a full disk
        title = f"{path.parent.name} on {labels.name} {args.split}, {how}: mIoU {100 * result['miou']:.2f}"
        shown = [(caption.format(pairs.name(i)), *pairs.read(i)) for caption, i in reports.best_and_worst(per_image)]
        shown = [(*one, predict_labels(model, [one[1]], scales, flip_pairs)[0]) for one in shown]
        try:
            write_record(folder, record)
            drawn = reports.draw(folder, title, labels, matrix.numpy(), shown)
        finally:
            print(reports.table(result, labels, args.tta))
        print(f"{seconds:.3f} s per image; " + ", ".join(map(str, [folder / RESULTS, *drawn])))
    if chosen and last.exists():
        newest = checkpoint.read(last)
        iteration, best = newest["progress"]["iteration"], progress["iteration"]
        if iteration != best:
            checkpoint.load_state(model, newest["model"], last)
            result = scores(score()[0])
            world.print0(f"{path.name} (iteration {best}) was chosen on this very set; mIoU of {last.name} (iteration "
                         f"{iteration}): {100 * result['miou']:.2f}")
        if world.main:
            record["last"] = {"iteration": iteration, **_main_scores(result)}
            write_record(folder, record)


def write_record(folder: Path, record: dict):
    write_text(folder / RESULTS, json.dumps(json.loads(json.dumps(record), parse_constant=lambda _: None), indent=1))


def _main_scores(result: dict) -> dict:
    return {key: result[key] for key in ("pixel_acc", "mean_acc", "miou")}


def versions(device: torch.device) -> dict[str, str | None]:
    """Commit of this code, versions and device, for a record."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
                         capture_output=True, text=True)
    return {"commit": git.stdout.strip() or None, "python": platform.python_version(), "torch": torch.__version__,
            "device": device_name(device)}


def main(argv: list[str] | None = None):
    args = arguments(argv)
    run_together(lambda world: run(args, world), args.device, "a smaller --batch, or --device cpu")


if __name__ == "__main__":
    main()
