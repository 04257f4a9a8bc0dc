"""Lovasz-softmax, forward and backward: this project beside the reference implementation's way.

    python benchmarks/bench_loss.py [--batch 4] [--classes 20] [--size 480] [--threads 2] [--rounds 7] [--device cpu]

The reference way, restated: over the classes present, one after the other, a descending sort of fp32 errors, the
Jaccard loss from cumulative sums, its differences, a dot product; gradients by autograd. Both see the same logits, of
a network at its start and of one that has learnt, and the runs alternate. Errors of value and gradient are against the
reference way in fp64 on half the size. The columns: timing.py; a loss is not made of matrix products, so it has no share.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import begin, error, measure, options, report

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
    return [value.detach(), *torch.autograd.grad(value, logits)]


def main() -> int:
    args = options(__doc__, batch=4, classes=20, size=480, threads=2, rounds=7, device="cpu").parse_args()
    begin(f"{args.batch} x {args.classes} x {args.size} x {args.size}", args.threads, args.device)
    ok = True
    for learnt in (False, True):
        logits, labels = problem(args.batch, args.classes, args.size // 2, learnt, args.device)
        exact = value_and_slope(reference_way, logits.double(), labels)
        found = {name: value_and_slope(run, logits, labels) for name, run in RUNS.items()}
        logits, labels = problem(args.batch, args.classes, args.size, learnt, args.device)
        errors = {name: (error([value], exact[:1]), error([slope], exact[1:])) for name, (value, slope) in found.items()}
        runs = {name: lambda run=run: value_and_slope(run, logits, labels) for name, run in RUNS.items()}
        report("logits that have learnt" if learnt else "random logits",
               measure(runs, args.rounds, device=args.device), f"{'error':>10}{'of slope':>10}",
               {name: f"{of_value:10.1e}{of_slope:10.1e}" for name, (of_value, of_slope) in errors.items()})
        ok &= all(of_value < 1e-4 and of_slope < 1e-2 for of_value, of_slope in errors.values())
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
