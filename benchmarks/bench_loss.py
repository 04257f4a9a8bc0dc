"""Lovasz-softmax, forward and backward: this project beside the reference implementation's way.

    python benchmarks/bench_loss.py [--batch 4] [--classes 20] [--size 480] [--threads 2] [--rounds 7] [--device cpu]

The reference way, restated: over the classes present, one after the other, a descending sort of fp32 errors, the
Jaccard loss from cumulative sums, its differences, a dot product; gradients by autograd. Both see the same logits, of
a network at its start and of one that has learnt, and the runs alternate. Errors of value and gradient are against the
reference way in fp64 on half the size. Times: wall clock, median and quartiles; the last column is the median of the
ratios within a round.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import alternate, figures

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from losses import lovasz_softmax  # noqa: E402


def reference_way(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    probs = logits.softmax(1).movedim(1, -1).flatten(0, 2)                               # (N, K)
    labels = labels.flatten()
    probs, labels = probs[labels != 255], labels[labels != 255]
    losses = []
    for c in range(probs.shape[1]):
        truth = (labels == c).to(probs.dtype)
        if truth.sum() > 0:
            errors, order = (truth - probs[:, c]).abs().sort(descending=True)
            hits, misses = truth[order].cumsum(0), (1 - truth[order]).cumsum(0)
            jaccard = 1 - (truth.sum() - hits) / (truth.sum() + misses)
            losses.append(errors.dot(torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])))
    return torch.stack(losses).mean()


RUNS = {"this project": lovasz_softmax, "reference way": reference_way}


def problem(batch: int, classes: int, size: int, learnt: bool, device: str):
    """Blocks of labels, a void border, and logits that know nothing or nearly everything."""
    torch.manual_seed(0)
    labels = torch.randint(classes, (batch, 1, 15, 15)).float()
    labels = F.interpolate(labels, size=(size, size))[:, 0].to(torch.uint8)
    logits = torch.randn(batch, classes, size, size)
    if learnt:
        logits = 2 * logits + 8 * F.one_hot(labels.long(), classes).movedim(-1, 1)
    labels[:, :size // 24] = 255
    return logits.to(device), labels.to(device)


def value_and_slope(loss, logits: torch.Tensor, labels: torch.Tensor):
    logits = logits.detach().requires_grad_()
    value = loss(logits, labels)
    slope, = torch.autograd.grad(value, logits)
    return value.detach(), slope


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("batch", 4), ("classes", 20), ("size", 480), ("threads", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, "
          f"{args.batch} x {args.classes} x {args.size} x {args.size}, ms")
    print(f"{'':15}{'logits':8}{'median':>9}{'quartiles':>20}{'error':>10}{'of slope':>10}{'time / ours':>13}")
    ok = True
    for learnt in (False, True):
        logits, labels = problem(args.batch, args.classes, args.size // 2, learnt, args.device)
        exact = value_and_slope(reference_way, logits.double(), labels)
        found = {name: value_and_slope(run, logits, labels) for name, run in RUNS.items()}
        logits, labels = problem(args.batch, args.classes, args.size, learnt, args.device)
        times = alternate({name: lambda run=run: value_and_slope(run, logits, labels) for name, run in RUNS.items()},
                          args.rounds)
        for name, of in figures(times).items():
            value, slope = found[name]
            error, of_slope = abs(value - exact[0]).item(), ((slope - exact[1]).norm() / exact[1].norm()).item()
            print(f"{name:15}{'learnt' if learnt else 'random':8}{1e3 * of.median:9.0f}{1e3 * of.low:10.0f}"
                  f"{1e3 * of.high:10.0f}{error:10.1e}{of_slope:10.1e}{of.ratio:13.2f}")
            ok &= error < 1e-4 and of_slope < 1e-2
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
