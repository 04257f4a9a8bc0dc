"""A photo through the full-size SCHNet (random weights), beside the best peers' parts and the paper's baseline.

    python benchmarks/bench_inference.py                   480 px, fp32 and bf16 autocast
    python benchmarks/bench_inference.py --tta             the eight views of §4.4, beside each view alone
    python benchmarks/bench_inference.py --curve           cost against size and batch, to benchmarks/inference.png

Peers: SAM's encoder (segment-anything, transformers), CLIP's image tower with four taps (open_clip, transformers) and
UperNet's head (transformers): the sum of the fastest of each is a SCHNet without adapter, SRM and FTM. And the paper's
baseline, ViT-Adapter-L with UperNet, in its official form (baseline.py), to which the fastest CLIP is added. One
process, one set of weights, the runs alternate. Errors: relative, against this project in fp32: of the parts' outputs,
and of the whole network's logits, which with SCHNet's weights at its start are the baseline's. The columns: timing.py.
Memory: in a fresh process per case. Under autocast our frozen weights are kept in bf16, as in training and prediction.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from timing import Measured, begin, error, forget_peak, measure, options, report, resident

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from augment import flip_order  # noqa: E402
from config import load_config  # noqa: E402
from datasets import LABEL_SETS  # noqa: E402
from inference import predict, cast_frozen  # noqa: E402
from layers import resample_positions  # noqa: E402
from model import SCHNet, build_model  # noqa: E402
from viz.pictures import save_png  # noqa: E402
from viz.plots import curves  # noqa: E402

OURS, BASELINE = "SCHNet, this project", "ViT-Adapter-L + UperNet, official form"
LIP = LABEL_SETS["lip"]
SIZES, BATCHES = (320, 480, 640, 800, 1024, 1280), (1, 2, 4)


def schnet() -> SCHNet:
    """At its start, but for the injectors: their gamma is one, so that the pyramid reaches the encoder; and for rho, which
    is zero, so that FTM passes SAM's features and the peers compute the same."""
    torch.manual_seed(0)
    cfg = load_config(ROOT / "configs/lip.yaml", ["sam_weights=", "clip_weights=", "vocab=", "precision=fp32", "rho_init=0"])
    model = build_model(cfg, LIP.classes).eval()
    for injector in model.adapter.injectors:
        torch.nn.init.ones_(injector.gamma)
    return model


def autocast(mode: str):
    return torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16", cache_enabled=False)     # as if entered anew


# ----------------------------------------------------------------------------------------------------------------------
# the table

def parts(model: SCHNet, image: torch.Tensor) -> dict:
    """name -> (function of nothing, whose outputs must be those of this function in fp32)."""
    import peers
    import baseline
    size = image.shape[-1]
    maps = [torch.randn(1, 1024, size // s, size // s) for s in (4, 8, 16, 32)]
    runs = {OURS: (lambda: [model(image)], None)}
    for name in peers.SAMS:
        run = peers.sam(name, model.sam.state_dict(), size)[1]
        runs[f"SAM, {name}"] = (lambda run=run: run(image), lambda: model.sam(image))
    for name, make in peers.CLIPS.items():
        run = make(model.clip.state_dict(), size)[1]
        runs[f"CLIP, {name}"] = (lambda run=run: run(image), lambda: clip_outputs(model, image))
    head = peers.upernet(model.head.state_dict()).eval()
    runs["UperNet, transformers"] = (lambda: [head(maps)], lambda: [model.head(maps)])
    positions = resample_positions(model.sam.pos_embed[0], size // 16, size // 16)[None]
    whole, normalized = baseline.from_schnet(model.state_dict(), 20, positions), model.sam.normalize(image)
    runs[BASELINE] = (lambda: [whole(normalized)], runs[OURS][0])
    return runs


def clip_outputs(model: SCHNet, image: torch.Tensor) -> list[torch.Tensor]:
    f_cls, taps = model.clip(image)
    return [f_cls, *(tap.flatten(1, 2) for tap in taps)]


def compare(size: int, modes: list[str], rounds: int) -> bool:
    """The table; False if an output is not what it should be."""
    fine, model = True, schnet()
    image = torch.rand(1, 3, size, size)
    runs = parts(model, image)
    wanted = {name: (check or run)() for name, (run, check) in runs.items()}
    for mode in modes:
        with autocast(mode):
            cast_frozen(model, mode)
            errors = {name: error(run(), wanted[name]) for name, (run, _) in runs.items()}
            measured = measure({name: run for name, (run, _) in runs.items()}, rounds, mode)
        found = measured.figures()
        fastest = [min((name for name in runs if name.startswith(part)), key=lambda name: found[name].median)
                   for part in ("SAM", "CLIP", "UperNet")]
        add(measured, f"{' + '.join(name.split(', ')[0] for name in fastest)}, fastest peers", fastest)
        add(measured, f"{BASELINE.split(', ')[0]} + CLIP", [BASELINE, fastest[1]])
        report(f"{size} px, {mode}", measured, f"{'error':>9}",
               {name: f"{errors[name]:9.0e}" if name in errors else "" for name in measured.times})
        fine &= max(errors.values()) <= {"fp32": 1e-4, "bf16": 0.1}[mode]
    return fine


def add(measured: Measured, name: str, parts: list[str]):
    """What several runs take together."""
    measured.times[name] = [tuple(map(sum, zip(*of_round))) for of_round in zip(*(measured.times[part] for part in parts))]
    measured.flops[name] = sum(measured.flops[part] for part in parts)


# ----------------------------------------------------------------------------------------------------------------------
# eight views

def augmented(modes: list[str], rounds: int) -> bool:
    """Test-time augmentation beside each of its views alone; the mean of these must be its result."""
    photo = (np.random.default_rng(0).random((480, 480, 3)) * 255).astype(np.uint8)
    mirrored, fine = np.ascontiguousarray(photo[:, ::-1]), True
    scales, order = (0.75, 1.0, 1.25, 1.5), flip_order(20, LIP.flip_pairs)
    model = schnet()
    for mode in modes:
        model.cfg = dataclasses.replace(model.cfg, precision=mode)
        cast_frozen(model, mode)
        found, runs = {}, {}

        def keep(name, *args):
            found[name] = predict(model, *args)

        runs["all"] = lambda: keep("all", photo, scales, LIP.flip_pairs)
        for scale in scales:
            runs[f"{scale}"] = lambda scale=scale: keep(f"{scale}", photo, (scale,))
            runs[f"{scale} mirrored"] = lambda scale=scale: keep(f"{scale} mirrored", mirrored, (scale,))
        measured = measure(runs, rounds, mode)
        report(f"eight views, {mode}", measured)
        times = measured.times
        mean = sum(found[f"{s}"] + found[f"{s} mirrored"].flip(-1)[order] for s in scales) / 8
        differs = error([found["all"]], [mean])
        ratio = [statistics.median(sum(times[name][n][i] for name in runs if name != "all") / times["all"][n][i]
                                   for n in range(rounds)) for i in (0, 1)]
        print(f"sum of the views / all: wall {ratio[0]:.3f}, cpu {ratio[1]:.3f}; differs {differs:.0e}\n", flush=True)
        fine &= differs <= {"fp32": 1e-4, "bf16": 1e-2}[mode]
    return fine


# ----------------------------------------------------------------------------------------------------------------------
# curves

@torch.inference_mode()
def one_point(size: int, batch: int, mode: str, rounds: int):
    """A child's work: MiB at the peak of the first run above what was held before; per image seconds of the others by
    the wall's clock and the processor's, GFLOP, and their share."""
    model, image = schnet(), torch.rand(batch, 3, size, size)
    cast_frozen(model, mode)
    forget_peak()
    before = resident()
    with autocast(mode):
        model(image)
        memory = resident("VmHWM") - before
        of = measure({OURS: lambda: model(image)}, rounds, mode).figures()[OURS]
    print(memory, of.median / 1e3 / batch, of.cpu / 1e3 / batch, of.gflop / batch, of.share)


def draw_curve(modes: list[str], rounds: int, threads: int):
    """Seconds and peak memory against the number of tokens and against the batch."""
    found = {}
    print(f"{'mode':5}{'px':>6}{'batch':>7}{'tokens':>8}{'wall s / image':>16}{'cpu':>7}{'ms / token':>12}"
          f"{'GFLOP / image':>15}{'share':>7}{'MiB of a run':>14}{'KiB / token':>13}")
    for mode in modes:
        for size, batch in [(size, 1) for size in SIZES] + [(480, batch) for batch in BATCHES if batch > 1]:
            command = [sys.executable, __file__, "--point", str(size), str(batch), "--modes", mode,
                       "--rounds", str(rounds), "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"error: {size} px, batch {batch}: {done.stderr.strip().splitlines()[-1]}")
            memory, wall, busy, gflop, share = map(float, done.stdout.split())
            tokens = (size // 16) ** 2
            found[mode, size, batch] = busy, memory
            print(f"{mode:5}{size:6}{batch:7}{tokens:8}{wall:16.2f}{busy:7.2f}{1e3 * busy / tokens:12.2f}{gflop:15.2f}"
                  f"{share:7.0%}{memory:14.0f}{1024 * memory / tokens / batch:13.0f}", flush=True)
    rows = []
    for xlabel, points in (("tokens: sides of 320, 480, 640, 800, 1024, 1280 px", [(size, 1) for size in SIZES]),
                           ("images of 480 px in a batch", [(480, batch) for batch in BATCHES])):
        x = [batch if "batch" in xlabel else (size // 16) ** 2 for size, batch in points]
        panels = {title: {mode: (x, [found[mode, *point][i] for point in points]) for mode in modes}
                  for i, title in enumerate(("s per image (processor / threads)", "MiB of a run, above the weights"))}
        rows.append(curves(panels, xlabel))
    save_png(ROOT / "benchmarks" / "inference.png", np.vstack(rows))


@torch.inference_mode()
def main() -> int:
    parser = options(__doc__, size=480, threads=2, rounds=5)
    parser.add_argument("--modes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--tta", action="store_true", help="test-time augmentation instead of the table")
    parser.add_argument("--curve", action="store_true", help="cost against size and batch instead of the table")
    parser.add_argument("--point", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.modes.sort(reverse=True)                          # bf16 last: its frozen weights are rounded for good
    if args.point:
        torch.set_num_threads(args.threads)
        return one_point(*args.point, args.modes[0], args.rounds) or 0
    begin(f"{args.rounds} rounds", args.threads)
    if args.curve:
        return draw_curve(args.modes, args.rounds, args.threads) or 0
    return 0 if (augmented(args.modes, args.rounds) if args.tta else compare(args.size, args.modes, args.rounds)) else 1


if __name__ == "__main__":
    sys.exit(main())
