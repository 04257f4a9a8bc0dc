"""Deformable attention at the adapter's sizes, and the whole adapter: this project beside the reference form.

    python benchmarks/bench_adapter.py [--size 480] [--batch 1] [--threads 2] [--rounds 15] [--device cpu]

The reference form is Deformable DETR's in plain PyTorch, one grid_sample per level, as it stands in transformers.
Values are random, sampling points lie where the adapter has them at its start, plus noise of a cell: injector (h*w
queries, 3 levels) and extractor (5.25*h*w queries, 1 level), 16 heads of 32, 4 points, fp32. Then the adapter of 1024
channels without the transformer in it (prior, 4 injectors, 6 extractors, fusion), as it is and with the reference form
put in, in evaluation, fp32 and bf16 autocast. The runs alternate; outputs and gradients of both forms are compared in
the same run. The columns: timing.py.
"""

import argparse
import sys
from pathlib import Path

import torch
from timing import begin, error, measure, options, report

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401                        torchvision beside a CPU-only torch, for the peer
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention  # noqa: E402

import adapter  # noqa: E402

OURS, PEER = "this project", "grid_sample"


def reference_form(value, shapes, locations, weights):
    value, locations, weights = value.float(), locations.float(), weights.float()      # as the original kernel runs
    return MultiScaleDeformableAttention()(value, torch.tensor(shapes), shapes, None, locations, weights, 64)


FORMS = {OURS: adapter.ms_deform_attn, PEER: reference_form}


def problem(queries: list, shapes: list, batch: int, device: str):
    """value, locations, weights: 16 heads of 32, 4 points."""
    torch.manual_seed(0)
    star = adapter.MSDeformAttn(1024, len(shapes), 16, 4, 0.5)
    star.reset_parameters()
    offsets = star.sampling_offsets.bias.detach().view(1, 1, 16, len(shapes), 4, 2)
    reference = adapter.cell_centres(queries, "cpu", torch.float32).view(1, -1, 1, 1, 1, 2)
    offsets = offsets + torch.randn(batch, reference.shape[1], *offsets.shape[2:])
    locations = reference + offsets / torch.tensor([(w, h) for h, w in shapes]).view(-1, 1, 2)
    weights = torch.randn(*locations.shape[:3], 4 * len(shapes)).softmax(-1).view(locations.shape[:-1])
    value = torch.randn(batch, sum(h * w for h, w in shapes), 16, 32)
    return [x.to(device).requires_grad_() for x in (value, locations, weights)]


def forward(form, shapes, value, locations, weights):
    with torch.no_grad():
        return [form(value, shapes, locations, weights)]


def forward_backward(form, shapes, value, locations, weights):
    out = form(value, shapes, locations, weights)
    return [out, *torch.autograd.grad(out.square().sum(), (value, locations, weights))]


def whole(form, net, image, tokens, half):
    adapter.ms_deform_attn = form
    with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=half):
        c1, c = net.prior(image)
        x, outs = tokens, []
        for stage in range(4):
            x = net.inject(stage, x, c)
            c = net.extract(stage, x, c)
            outs.append(x)
        return net.fuse(c1, c, outs)


def cases(args: argparse.Namespace):
    """(name, precision, function, its arguments, allowed relative disagreement)"""
    h = w = args.size // 16
    pyramid = adapter.pyramid(h, w)
    for name, queries, shapes in (("injector", [(h, w)], pyramid), ("extractor", pyramid, [(h, w)])):
        inputs = (shapes, *problem(queries, shapes, args.batch, args.device))
        yield f"{name}, forward", "fp32", forward, inputs, 1e-5
        yield f"{name}, + backward", "fp32", forward_backward, inputs, 1e-2        # slopes jump where a sample changes cells
    torch.manual_seed(0)
    net = adapter.ViTAdapter(1024).to(args.device).eval()
    for injector in net.injectors:
        torch.nn.init.ones_(injector.gamma)
    image = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    tokens = torch.randn(args.batch, h, w, 1024, device=args.device)
    yield "adapter, fp32", "fp32", whole, (net, image, tokens, False), 1e-4
    yield "adapter, bf16", "bf16", whole, (net, image, tokens, True), 0.02


def main() -> int:
    args = options(__doc__, size=480, batch=1, threads=2, rounds=15, device="cpu").parse_args()
    begin(f"{args.batch} x {args.size} px", args.threads, args.device)
    ok = True
    for case, precision, run, inputs, allowed in cases(args):
        differs = error(run(FORMS[OURS], *inputs), run(FORMS[PEER], *inputs))
        runs = {name: lambda form=form: run(form, *inputs) for name, form in FORMS.items()}
        report(case, measure(runs, args.rounds, precision, args.device), f"{'differs':>10}",
               dict.fromkeys(runs, f"{differs:10.1e}"))
        ok &= differs <= allowed
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
