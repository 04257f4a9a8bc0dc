"""Score a trained SCHNet (§4.4): one confusion matrix over the whole set, at the photos' own size.

    python evaluate.py                                   the newest run, single scale
    python evaluate.py --tta                             scales .75 1 1.25 1.5 and flips
    python evaluate.py --run runs/cihp data_root=/data/CIHP
    torchrun --nproc_per_node 4 evaluate.py --checkpoint runs/cihp --tta
                                                         shared out over processes, the same numbers to the last digit

Prints per-class IoU in the order of the paper's Table 1 (beside the paper's figures, for LIP), pixel accuracy, mean
accuracy and mIoU; leaves results.json, the confusion matrix, per-class bars and the best and worst images under
runs/<run>/evaluation[_tta]/.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import reports
import weights
from augment import MEAN_COLOUR, flip_order
from checkpoint import CheckpointError
from config import Config, ConfigError, parse_overrides
from datasets import DataError, LabelSet, label_set, open_split
from model import SCHNet
from weights import WeightsError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
CPU_STRIP, GPU_STRIP = 2 << 20, 256 << 20          # bytes: probabilities are made in strips of rows, so that no photo
#                                                    is too large; in a CPU's cache they also take a third of the time
ERRORS = (CheckpointError, ConfigError, DataError, WeightsError)   # what a user can mend: one line, exit code 1


# ----------------------------------------------------------------------------------------------------------------------
# metrics

def confusion_matrix(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Counts (K, K) int64, rows truth, columns prediction; labels of K and above (255: ignore) are skipped."""
    pred, label = pred.flatten().long(), label.flatten().long()
    kept = label < num_classes
    pairs = label[kept] * num_classes + pred[kept]
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


def scores(matrix: Tensor) -> dict:
    """Fractions from a confusion matrix: pixel_acc, mean_acc, miou, and per class iou and acc (nan: it occurs nowhere).

    A class that is in neither truth nor prediction has no IoU and is left out of the means; on the validation sets of
    LIP, CIHP and PPP all classes occur, so that this agrees with dividing by K.
    """
    matrix = matrix.double()
    hit, truth, found = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = hit / (truth + found - hit)                                    # 0 / 0 = nan
    acc = hit / truth
    return {"pixel_acc": (hit.sum() / matrix.sum()).item(), "mean_acc": acc.nanmean().item(),
            "miou": iou.nanmean().item(), "iou": iou.tolist(), "acc": acc.tolist()}


# ----------------------------------------------------------------------------------------------------------------------
# prediction

def autocast(device: torch.device, precision: str):
    dtype = DTYPES[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def store_frozen(model: nn.Module, precision: str):
    """Keep frozen linear layers' weights as `autocast` would round them at every use: the same results to the last bit,
    half the memory of the weights, and no second copy of them for the backward pass. For use under that autocast only."""
    if DTYPES[precision] is not None:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and parameter.ndim == 2 and name.endswith("weight"):      # in_proj_weight too
                parameter.data = parameter.data.to(DTYPES[precision])


def canvas(image: np.ndarray, cfg: Config, scale: float) -> tuple[np.ndarray, tuple[int, int]]:
    """The photo (H, W, 3) as the network sees it at `scale`, and the photo's size in it.

    Its long side is base_size * scale; at the bottom and right it is padded to what training saw, in multiples of 32
    (480: 384, 480, 608, 736).
    """
    height, width = image.shape[:2]
    factor = cfg.base_size * scale / max(height, width)
    h, w = max(1, round(height * factor)), max(1, round(width * factor))
    small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    sides = [-(-max(side, round(crop * scale)) // 32) * 32 for side, crop in zip((h, w), cfg.crop_size)]
    padded = cv2.copyMakeBorder(small, 0, sides[0] - h, 0, sides[1] - w, cv2.BORDER_CONSTANT, value=MEAN_COLOUR)
    return padded, (h, w)


def views(model: nn.Module, images: list[np.ndarray], scales: Sequence[float],
          flip_pairs: Sequence[tuple[int, int]] | None) -> list[list[Tensor]]:
    """Per image a list of logits (K, h, w): one for each scale and, unless `flip_pairs` is None, one mirrored back."""
    device = next(model.parameters()).device
    result = [[] for _ in images]
    for scale in scales:
        groups: dict[tuple, list] = {}
        for n, image in enumerate(images):
            padded, size = canvas(image, model.cfg, scale)
            groups.setdefault(padded.shape, []).append((n, padded, size))
        for group in groups.values():
            batch = torch.from_numpy(np.stack([padded for _, padded, _ in group])).to(device)
            batch = batch.permute(0, 3, 1, 2).float() / 255              # (B, 3, H, W)
            with autocast(device, model.cfg.precision):
                logits = [model(batch)]
                if flip_pairs is not None:
                    flipped = model(torch.stack([_mirror(x, size[1]) for x, (_, _, size) in zip(batch, group)]))
                    logits.append(flipped[:, flip_order(flipped.shape[1], flip_pairs)])
            for k, (n, _, (h, w)) in enumerate(group):
                result[n].append(logits[0][k, :, :h, :w].float())
                if flip_pairs is not None:
                    result[n].append(logits[1][k, :, :h, :w].float().flip(-1))
    return result


def _mirror(image: Tensor, width: int) -> Tensor:
    """The photo mirrored within its own width; the padding stays on the right."""
    return torch.cat([image[..., :width].flip(-1), image[..., width:]], -1)


def probabilities(logits: list[Tensor], size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """(K, bottom - top, W), these rows of the photo: softmax at its own size (bilinear), averaged over the views."""
    total = 0
    for view in logits:
        h = view.shape[1]
        y = ((torch.arange(top, bottom, device=view.device) + 0.5) * (h / size[0]) - 0.5).clamp(0, h - 1)
        above = y.floor().long()
        weight = (y - above)[:, None]
        rows = torch.lerp(view[:, above], view[:, (above + 1).clamp(max=h - 1)], weight)     # (K, rows, w)
        rows = F.interpolate(rows[None], (bottom - top, size[1]), mode="bilinear", align_corners=False)[0]
        total = total + rows.softmax(0)
    return total / len(logits)


def strips(logits: list[Tensor], size: tuple[int, int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(top row, probabilities (K, rows, W), labels uint8 (rows, W)) of a photo of any size, from the top down."""
    height, width = size
    limit = CPU_STRIP if logits[0].device.type == "cpu" else GPU_STRIP
    rows = max(1, limit // (4 * width * logits[0].shape[0]))
    for top in range(0, height, rows):
        strip = probabilities(logits, size, top, min(top + rows, height))
        yield top, strip, strip.max(0).indices.to(torch.uint8)           # on a CPU argmax(0) takes four times as long


@torch.inference_mode()
def predict(model: nn.Module, image: np.ndarray, scales: Sequence[float] = (1.0,),
            flip_pairs: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """Class probabilities (K, H, W) of an RGB photo (H, W, 3) uint8, at its own size.

    `scales` and `flip_pairs` (None: no flip; (): a flip without left and right) are §4.4's test-time augmentation.
    """
    logits = views(model, [image], scales, flip_pairs)[0]
    result = logits[0].new_empty(len(logits[0]), *image.shape[:2])
    for top, strip, _ in strips(logits, image.shape[:2]):
        result[:, top:top + strip.shape[1]] = strip
    return result


@torch.inference_mode()
def predict_labels(model: nn.Module, images: list[np.ndarray], scales: Sequence[float] = (1.0,),
                   flip_pairs: Sequence[tuple[int, int]] | None = None) -> list[np.ndarray]:
    """Label maps (H, W) uint8 of RGB photos of any sizes, in bounded memory."""
    result = []
    for image, logits in zip(images, views(model, images, scales, flip_pairs)):
        label = np.empty(image.shape[:2], np.uint8)        # filled in: kept, the small parts would tear up the memory
        for top, _, part in strips(logits, label.shape):
            label[top:top + len(part)] = part.cpu().numpy()
        result.append(label)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# evaluation

def _read_ahead(pairs, order: list[int], threads: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(index, image, label) in this order; files are decoded by threads while the network works."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        indices = iter(order)
        waiting = [(i, pool.submit(pairs.read, i)) for i in islice(indices, 2 * threads + 2)]
        while waiting:
            i, future = waiting.pop(0)
            waiting += [(j, pool.submit(pairs.read, j)) for j in islice(indices, 1)]
            yield i, *future.result()


def evaluate_split(model: SCHNet, pairs, num_classes: int, scales: Sequence[float] = (1.0,),
                   flip_pairs: Sequence[tuple[int, int]] | None = None, batch: int = 4, rank: int = 0, world: int = 1,
                   group=None, progress: bool = False,
                   interrupted: Callable[[], bool] = lambda: False) -> tuple[Tensor, list[tuple[float, int]]]:
    """The confusion matrix (K, K) over a whole set and (mIoU, index) of each image, the same on every process.

    Images go through the network in the same batches of `batch` however many processes share the work, each batch on
    one of them: sharded evaluation is exact. When `interrupted()` becomes true the rest is left out.
    """
    was_training = model.training
    model.eval()
    chunks = [range(a, min(a + batch, len(pairs))) for a in range(0, len(pairs), batch)][rank::world]
    order = [i for chunk in chunks for i in chunk]
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    per_image = []
    samples = _read_ahead(pairs, order, model.cfg.workers)
    with tqdm(total=len(order) * world, desc="evaluate", unit="image", disable=not progress, leave=False) as bar:
        for chunk in chunks:
            if interrupted():
                break
            indices, images, labels = zip(*islice(samples, len(chunk)))
            for i, pred, label in zip(indices, predict_labels(model, list(images), scales, flip_pairs), labels):
                counts = confusion_matrix(torch.from_numpy(pred), torch.from_numpy(label), num_classes)
                matrix += counts
                per_image.append((scores(counts)["miou"], i))
            bar.update(len(chunk) * world)
    model.train(was_training)
    if world > 1:
        dist.all_reduce(matrix, group=group)
        gathered = [None] * world
        dist.all_gather_object(gathered, per_image, group=group)
        per_image = [item for part in gathered for item in part]
    return matrix, sorted(per_image, key=lambda item: item[1])


def load_run(run: str | Path | None = None, overrides: Sequence[str] = (),
             device: str = "") -> tuple[SCHNet, LabelSet, Path]:
    """A trained network ready for `predict`, its label set, and the checkpoint it came from. `run` None: the newest run.

    On a CPU the network runs in fp32 unless `precision=bf16` is among the overrides: few CPUs have bf16 units.
    """
    path = checkpoint.find(run)
    target = pick_device(device)
    if target.type == "cpu" and "precision" not in parse_overrides(overrides):
        overrides = [*overrides, "precision=fp32"]
    model, labels = checkpoint.restore(checkpoint.read(path), path, overrides)
    store_frozen(model, model.cfg.precision)
    return model.to(target), labels, path


def pick_device(name: str = "") -> torch.device:
    """The device called `name`; "": this process's GPU, or the CPU where there is none."""
    if name:
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------------------
# the program

def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", "--checkpoint", help="folder of a run, or a checkpoint; the newest run if not given. "
                        "Under torchrun, which has options that begin with --run, only --checkpoint")
    parser.add_argument("--tta", action="store_true", help="average over scales and flips (§4.4)")
    parser.add_argument("--split", choices=("val", "train"), default="val")
    parser.add_argument("--batch", type=int, default=4, help="photos at a time per process (4)")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; the GPU if there is one")
    parser.add_argument("--out", type=Path, help="folder of the results; evaluation[_tta] in the run's if not given")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run's config")
    args = parser.parse_intermixed_args(argv)
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    return args


def open_labelled(model: SCHNet, labels: LabelSet, path: Path, split: str):
    """The photos to score a run on. Their classes must be the run's: LIP and CIHP both have 20, but not the same."""
    theirs = label_set(model.cfg).classes
    if theirs != labels.classes:
        pairs = zip(theirs, labels.classes)
        other = next((f"{k} is {a}, not {b}" for k, (a, b) in enumerate(pairs) if a != b), f"{len(theirs)} in number")
        raise ConfigError(f"the classes of {model.cfg.dataset} are not those {path} was trained on: {other}")
    return open_split(model.cfg, split)


def main(argv: list[str] | None = None):
    args = arguments(argv)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    model, labels, path = load_run(args.run, args.overrides, args.device)
    pairs = open_labelled(model, labels, path, args.split)
    labels = dataclasses.replace(labels, name=model.cfg.dataset)         # what is scored, not what was trained on
    scales, flip_pairs = (model.cfg.tta_scales, labels.flip_pairs) if args.tta else ((1.0,), None)
    how = f"scales {' '.join(map(str, scales))} and flips" if args.tta else "single scale"
    if rank == 0:
        print(f"{path}: {len(pairs)} images of {labels.name} {args.split}, {how}")
    if world > 1:
        dist.init_process_group("gloo")                                  # only counts travel
    start = time.monotonic()
    matrix, per_image = evaluate_split(model, pairs, len(labels.classes), scales, flip_pairs, args.batch, rank, world,
                                       progress=rank == 0)
    seconds = (time.monotonic() - start) / len(pairs)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    result = scores(matrix)
    folder = args.out or path.parent / ("evaluation_tta" if args.tta else "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    classes = zip(labels.classes, result["iou"], result["acc"])
    record = {"checkpoint": str(path), "sha256": weights.sha256(path), "data": labels.name, "split": args.split,
              "images": len(pairs), "scales": scales, "flip": args.tta, "seconds_per_image": seconds,
              "processes": world, **{key: result[key] for key in ("pixel_acc", "mean_acc", "miou")},
              "classes": {name: {"iou": iou, "acc": acc} for name, iou, acc in classes},
              "confusion": matrix.tolist(), "config": dataclasses.asdict(model.cfg)}
    checkpoint.write_text(folder / "results.json", json.dumps(reports.without_nan(record), indent=1))
    shown = []
    for caption, i in reports.best_and_worst(per_image):
        image, label = pairs.read(i)
        found = predict_labels(model, [image], scales, flip_pairs)[0]
        shown.append((caption.format(pairs.name(i)), image, label, found))
    title = f"{path.parent.name} on {labels.name} {args.split}, {how}: mIoU {100 * result['miou']:.2f}"
    drawn = reports.draw(folder, title, labels, args.tta, result, matrix.numpy(), shown)
    print(reports.table(result, labels, args.tta))
    print(f"{seconds:.3f} s per image; " + ", ".join(map(str, [folder / "results.json", *drawn])))


if __name__ == "__main__":
    try:
        main()
    except ERRORS as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: try a smaller --batch, or --device cpu")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'evaluate'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)
