"""SAM's image encoder (ViT-L, random weights): this project beside segment-anything and transformers.

    python benchmarks/bench_encoders.py                    480 px, fp32 and bf16 autocast, with peak memory
    python benchmarks/bench_encoders.py --sizes 1024 --rounds 3
    python benchmarks/bench_encoders.py --backward         forward and backward to the image through frozen weights

One process and one set of weights for all three; the peers are built for the size, without their necks, and get
position tables that already fit. The runs alternate, so that noise hits all alike, and every output (of layers 6 12 18
24, with --backward the gradient too) is compared with segment-anything's in fp32. Peak memory is measured in a fresh
process per case. The columns: timing.py. CLIP: bench_clip.py.

Under autocast our frozen weights are kept in bf16, as in training and prediction; the peers keep fp32, as they come,
and round them at each use, unless --kept.
"""

import argparse
import subprocess
import sys

import torch
from peers import SAMS, sam
from timing import begin, error, forget_peak, measure, options, report, resident

from inference import cast_frozen
from sam_vit import SAMViT
from test_sam_vit import LARGE, build, random_state

OURS = "this project"
NAMES = (OURS, *SAMS)


def weights(device: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = SAMViT()
    return {name: tensor.to(device) for name, tensor in random_state(model).items()}


def encoder(name: str, state: dict[str, torch.Tensor], size: int, mode: str, kept: bool):
    """A function of an image in [0, 1] that returns the outputs of layers 6 12 18 24, (B, h, w, C) each."""
    if name == OURS:
        model = build(state, **LARGE).to(state["pos_embed"].device)
        cast_frozen(model, mode)
        return model
    model, run = sam(name, state, size)
    if kept:
        cast_frozen(model, mode)
    return run


def step(run, image: torch.Tensor, mode: str, backward: bool) -> list[torch.Tensor]:
    """One run; with `backward` the gradient of the image is the last output."""
    image = image.detach().requires_grad_(backward)
    with torch.autocast(image.device.type, torch.bfloat16, enabled=mode == "bf16"), torch.set_grad_enabled(backward):
        outs = run(image)
    if backward:
        outs.append(torch.autograd.grad(sum(out.float().mean() for out in outs), image)[0])
    return outs


def peak_memory(name: str, args: argparse.Namespace, size: int, mode: str) -> tuple[float, float]:
    """MiB at the peak of a run in a fresh process: the total, and above what it held before."""
    command = [sys.executable, __file__, "--memory-of", name, "--sizes", str(size), "--modes", mode, "--batch",
               str(args.batch), "--threads", str(args.threads), "--device", args.device]
    command += ["--backward"] * args.backward + ["--kept"] * args.kept
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {name} at {size} px: {done.stderr.strip().splitlines()[-1]}")
    return tuple(float(number) for number in done.stdout.split())


def report_memory(args: argparse.Namespace):
    """The child's side of `peak_memory`."""
    size, mode = args.sizes[0], args.modes[0]
    state = weights(args.device)
    run = encoder(args.memory_of, state, size, mode if args.kept else "fp32", args.kept)
    del state
    if args.memory_of == OURS:                             # only now: what it leaves behind is free for the next layer
        cast_frozen(run, mode)
    if args.device == "cpu":
        before = resident()
        forget_peak()
    else:
        before = torch.cuda.memory_allocated() / 2 ** 20
        torch.cuda.reset_peak_memory_stats()
    step(run, torch.rand(args.batch, 3, size, size, device=args.device), mode, args.backward)
    peak = resident("VmHWM") if args.device == "cpu" else torch.cuda.max_memory_allocated() / 2 ** 20
    print(peak, peak - before)


def compare(args: argparse.Namespace, state: dict[str, torch.Tensor]) -> bool:
    """The table; False if an output is not what it should be."""
    allowed, fine = {"fp32": 1e-5, "bf16": 5e-2}, True
    for size in args.sizes:
        image = torch.rand(args.batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(args.device)
        reference = step(encoder("segment-anything", state, size, "fp32", False), image, "fp32", args.backward)
        for mode in args.modes:
            nets = {name: encoder(name, state, size, mode, args.kept) for name in NAMES}
            errors = {name: error(step(net, image, mode, args.backward), reference) for name, net in nets.items()}
            runs = {name: lambda net=net: step(net, image, mode, args.backward) for name, net in nets.items()}
            measured = measure(runs, args.rounds, mode, args.device)
            notes = {name: f"{errors[name]:9.0e}" for name in nets}
            if args.memory:
                notes = {name: "{}{:10.0f}{:7.0f}".format(note, *peak_memory(name, args, size, mode))
                         for name, note in notes.items()}
            columns = f"{'error':>9}" + f"{'peak MiB':>10}{'run':>7}" * args.memory
            report(f"{args.batch} x {size} px, {mode}", measured, columns, notes)
            fine &= max(errors.values()) <= allowed[mode]
    return fine


def main() -> int:
    parser = options(__doc__, batch=1, threads=2, rounds=5, device="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[480])
    parser.add_argument("--modes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--backward", action="store_true", help="also the gradient of the image")
    parser.add_argument("--kept", action="store_true", help="the peers' frozen weights are kept in bf16, as ours are")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the processes for memory")
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        torch.set_num_threads(args.threads)
        return report_memory(args) or 0
    begin(f"{args.rounds} rounds" + ", with backward" * args.backward + ", peers' weights kept in bf16" * args.kept,
          args.threads, args.device)
    return 0 if compare(args, weights(args.device)) else 1


if __name__ == "__main__":
    sys.exit(main())
