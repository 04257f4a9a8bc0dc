"""The network's parts at their real sizes, compared with other implementations. Random weights.

    python benchmarks/bench_parts.py                       all parts at 480 px, fp32 and bf16 autocast
    python benchmarks/bench_parts.py --part sam --size 1024 --rounds 2

sam      SAM's ViT-L, the outputs of layers 6 12 18 24: segment-anything, transformers (without their necks)
clip     CLIP's image tower, the class embedding and four taps: open_clip, transformers
head     UperNet's head, evaluation and training: transformers
loss     Lovasz-softmax and its gradient: the reference method, one sort per class

Runs alternate in one process with the same weights and inputs; all outputs and gradients are compared. Under autocast
our frozen weights are kept in bf16, as in training and prediction; the peers' stay in fp32. timing.py explains the
columns. Encoder memory: the peak of one run in a new process, minus what the process used before.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import peers
import torch
import torch.nn.functional as F
from timing import error, in_new_process, measure, options, print_machine, report, reset_peak, resident
from torch import Tensor

from clip_vit import CLIP
from errors import run_program
from layers import autocast, cast_frozen
from losses import lovasz_softmax
from sam_vit import SIZES, SAMViT
from test_clip_vit import random_state as clip_state
from test_sam_vit import build, random_state as sam_state
from uperhead import UPerHead

OURS = "this project"


class Case(NamedTuple):
    title: str
    runs: dict[str, Callable[[], list[Tensor]]]            # ours is the first
    errors: dict[str, float]
    allowed: float                                         # largest error of ours
    precision: str                                         # of the matrix products timed as a reference; "": none
    notes: dict[str, str] = {}                             # text of an extra column


# ----------------------------------------------------------------------------------------------------------------------
# encoders

ENCODERS = {"sam": tuple(peers.SAMS), "clip": tuple(peers.CLIPS)}        # the other libraries


def make_encoder(encoder: str, name: str, size: int, mode: str, device: str) -> Callable[[Tensor], list[Tensor]]:
    """An encoder for images of this size, under autocast if the mode is bf16."""
    if encoder == "sam":
        with torch.device("meta"):
            empty = SAMViT()
        state = sam_state(empty)
        model, run = (build(state, SIZES["vit_l"]),) * 2 if name == OURS else peers.sam(name, state, size)
    else:
        clip = CLIP().eval().requires_grad_(False)
        clip.load_state_dict(clip_state(clip))
        model, run = clip.visual, lambda image: peers.clip_outputs(clip.visual, image)
        if name != OURS:
            model, run = peers.CLIPS[name](clip.visual.state_dict(), size)
    model.to(device)
    if name == OURS:
        cast_frozen(model, mode)

    def run_in_mode(image: Tensor) -> list[Tensor]:
        with torch.inference_mode(), autocast(torch.device(device), mode):
            return run(image)
    return run_in_mode


def encoder_memory(encoder: str, name: str, size: int, batch: int, mode: str, threads: int) -> float:
    """Peak memory of a run on the CPU in MiB, minus the memory in use before it."""
    torch.set_num_threads(threads)
    run, image = make_encoder(encoder, name, size, mode, "cpu"), torch.rand(batch, 3, size, size)
    before = resident()
    reset_peak()
    run(image)
    return resident("VmHWM") - before


def encoder_cases(encoder: str, args: argparse.Namespace) -> Iterator[Case]:
    """Errors are relative to the first peer in fp32."""
    image = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    expected = make_encoder(encoder, ENCODERS[encoder][0], args.size, "fp32", args.device)(image)
    for mode in args.modes:
        names = OURS, *ENCODERS[encoder]
        models = {name: make_encoder(encoder, name, args.size, mode, args.device) for name in names}
        runs = {name: lambda model=model: model(image) for name, model in models.items()}
        sizes = args.size, args.batch, mode, args.threads
        notes = {} if args.device != "cpu" else {
            name: f"{in_new_process(encoder_memory, encoder, name, *sizes):6.0f} MiB" for name in names}
        yield Case(f"{encoder}, {mode}", runs, {name: error(run(), expected) for name, run in runs.items()},
                   {"fp32": 1e-5, "bf16": 0.05}[mode], mode, notes)


# ----------------------------------------------------------------------------------------------------------------------
# head

LAYOUTS = {OURS: torch.channels_last, "transformers": torch.contiguous_format}           # memory format of the features


def features(name: str, batch: int, size: int, device: str, train: bool) -> list[Tensor]:
    """Four maps of 1024 channels at strides 4 to 32."""
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(batch, 1024, size // stride, size // stride, generator=generator) for stride in (4, 8, 16, 32)]
    return [x.to(device, memory_format=LAYOUTS[name]).requires_grad_(train) for x in maps]


def head_outputs(head: torch.nn.Module, maps: list[Tensor], train: bool, mode: str) -> list[Tensor]:
    """[logits]; in training [logits, gradients of the four maps, gradients of the weights]."""
    with torch.set_grad_enabled(train), autocast(maps[0].device, mode):
        logits = head(maps)
    if not train:
        return [logits]
    return [logits, *torch.autograd.grad(logits.float().square().mean(), [*maps, *head.parameters()])]


def head_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Errors of the logits and of the features' gradients, relative to the peer in fp64 on a 96 px image."""
    ours = UPerHead(1024, 512, 20, dropout=0.0)
    nets = {OURS: ours.to(args.device), "transformers": peers.upernet(ours.state_dict()).to(args.device)}
    for train, batch in ((False, args.batch), (True, 2 * args.batch)):
        for net in nets.values():
            net.train(train)
        small = {name: features(name, max(batch, 4) if train else batch, 96, args.device, train) for name in nets}
        exact = copy.deepcopy(nets["transformers"]).double()
        expected = head_outputs(exact, [x.double() for x in small["transformers"]], train, "fp32")[:5]
        maps = {name: features(name, batch, args.size, args.device, train) for name in nets}
        for mode in args.modes:
            errors = {name: error(head_outputs(nets[name], small[name], train, mode)[:5], expected) for name in nets}
            runs = {name: lambda name=name: head_outputs(nets[name], maps[name], train, mode) for name in nets}
            # ReLU's slope jumps at zero: one input within rounding error of zero changes the gradients by 1e-3
            yield Case(f"{'forward + backward' if train else 'evaluation'}, batch {batch}, {mode}", runs, errors,
                       max(2 * errors["transformers"], 1e-2 if train else 1e-5), mode)


# ----------------------------------------------------------------------------------------------------------------------
# loss

def sort_per_class(logits: Tensor, labels: Tensor) -> Tensor:
    """The reference method: for each class present, sort the errors in descending order and take cumulative sums."""
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


LOSSES = {OURS: lovasz_softmax, "one sort per class": sort_per_class}


def loss_inputs(images: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Blocks of labels with an ignored border, and logits like those of a trained network."""
    labels = torch.randint(20, (images, 1, 15, 15)).float()
    labels = F.interpolate(labels, size=(size, size))[:, 0].to(torch.uint8)
    logits = 2 * torch.randn(images, 20, size, size) + 8 * F.one_hot(labels.long(), 20).movedim(-1, 1)
    labels[:, :size // 24] = 255
    return logits.to(device), labels.to(device)


def loss_and_gradient(loss, logits: Tensor, labels: Tensor) -> list[Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, labels)
    return [value.detach(), *torch.autograd.grad(value, logits)]


def loss_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Errors of the gradient, and in an extra column of the loss, relative to the peer in fp64 at half the size."""
    logits, labels = loss_inputs(4 * args.batch, args.size // 2, args.device)
    exact = loss_and_gradient(sort_per_class, logits.double(), labels)
    results = {name: loss_and_gradient(loss, logits, labels) for name, loss in LOSSES.items()}
    inputs = loss_inputs(4 * args.batch, args.size, args.device)
    yield Case("Lovasz-softmax", {name: lambda loss=loss: loss_and_gradient(loss, *inputs)
                                  for name, loss in LOSSES.items()},
               {name: error(outputs[1:], exact[1:]) for name, outputs in results.items()}, 1e-2, "",
               {name: f"{error(outputs[:1], exact[:1]):10.1e}" for name, outputs in results.items()})


PARTS = {"sam": lambda args: encoder_cases("sam", args), "clip": lambda args: encoder_cases("clip", args),
         "head": head_cases, "loss": loss_cases}


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, size=480, batch=1, threads=2, rounds=7, device="cpu")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--modes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    args = parser.parse_args(argv)
    print_machine(f"{args.batch} x {args.size} px", args.threads, args.device)
    failed = []
    for part in args.part:
        torch.manual_seed(0)
        for case in PARTS[part](args):
            notes = {name: f"{case.errors[name]:10.1e}{case.notes.get(name, '')}" for name in case.runs}
            report(case.title, measure(case.runs, args.rounds, case.precision, args.device), f"{'error':>10}", notes)
            failed += [case.title] * (not case.errors[OURS] <= case.allowed)
    for title in failed:
        print(f"error too large: {title}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_program(main)
