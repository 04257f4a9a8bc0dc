"""A photo through the full-size SCHNet (random weights), beside the parts that the fastest peers have.

    python benchmarks/bench_inference.py                   480 px, fp32 and bf16 autocast

Peers: SAM's encoder (segment-anything, transformers), CLIP's image tower with four taps (open_clip, transformers) and
UperNet's head (transformers); the sum of the fastest of each is a SCHNet without adapter, SRM and FTM. One process, one
set of weights, runs alternate. Errors: of the outputs, relative, against this project in fp32. The columns: timing.py.
Under autocast this project's frozen weights are kept in bf16, as in training and prediction.
"""

import full_size
import peers
import torch
from timing import Measured, error, measure, options, print_machine, report

from errors import run_program
from layers import cast_frozen
from model import SCHNet

OURS = "SCHNet, this project"
ALLOWED = {"fp32": 1e-4, "bf16": 0.1}


def parts(model: SCHNet, image: torch.Tensor) -> dict:
    """{name: (a run, the run whose outputs in fp32 it must equal)}."""
    size = image.shape[-1]
    maps = [torch.randn(1, 1024, size // s, size // s) for s in (4, 8, 16, 32)]
    runs = {OURS: (lambda: [model(image)],) * 2}
    for name in peers.SAMS:
        run = peers.sam(name, model.sam.state_dict(), size)[1]
        runs[f"SAM, {name}"] = (lambda run=run: run(image), lambda: model.sam(image))
    for name, make in peers.CLIPS.items():
        run = make(model.clip.state_dict(), size)[1]
        runs[f"CLIP, {name}"] = (lambda run=run: run(image), lambda: peers.clip_outputs(model.clip, image))
    head = peers.upernet(model.head.state_dict()).eval()
    runs["UperNet, transformers"] = (lambda: [head(maps)], lambda: [model.head(maps)])
    return runs


def add_sum(measured: Measured, name: str, parts: list[str]):
    """Adds a row for several runs together."""
    rounds = zip(*(measured.times[part] for part in parts))
    measured.times[name] = [tuple(map(sum, zip(*of_round))) for of_round in rounds]
    measured.flops[name] = sum(measured.flops[part] for part in parts)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, size=480, threads=2, rounds=5)
    parser.add_argument("--modes", nargs="+", choices=ALLOWED, default=list(ALLOWED))
    args = parser.parse_args(argv)
    print_machine(f"{args.rounds} rounds", args.threads)
    ok, model = True, full_size.network(full_size.lip_config("precision=fp32")).eval()
    image = torch.rand(1, 3, args.size, args.size)
    runs = parts(model, image)
    wanted = {name: reference() for name, (_, reference) in runs.items()}
    for mode in sorted(args.modes, reverse=True):          # bf16 last: it rounds the frozen weights
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16", cache_enabled=False):   # nothing is reused
            cast_frozen(model, mode)
            errors = {name: error(run(), wanted[name]) for name, (run, _) in runs.items()}
            measured = measure({name: run for name, (run, _) in runs.items()}, args.rounds, mode)
        summary = measured.summary()
        fastest = [min((name for name in runs if name.startswith(part)), key=lambda name: summary[name].median)
                   for part in ("SAM", "CLIP", "UperNet")]
        add_sum(measured, "SAM + CLIP + UperNet, fastest peers", fastest)
        report(f"{args.size} px, {mode}", measured, f"{'error':>9}",
               {name: f"{errors[name]:9.0e}" if name in errors else "" for name in measured.times})
        ok &= max(errors.values()) <= ALLOWED[mode]
    return 0 if ok else 1


if __name__ == "__main__":
    run_program(main)
