"""SAM's image encoder (ViT-L, random weights): this project beside segment-anything and transformers.

    python benchmarks/bench_encoders.py                    480 px, fp32 and bf16 autocast, with peak memory
    python benchmarks/bench_encoders.py --sizes 1024 --rounds 3
    python benchmarks/bench_encoders.py --backward         forward and backward to the image through frozen weights
    python benchmarks/bench_encoders.py --curve            cost against size and batch, to benchmarks/encoders.png

One process and one set of weights for all three; the peers are built for the size, without their necks, and get
position tables that already fit. The runs alternate, so that noise hits all alike, and every output (of layers 6 12 18
24, with --backward the gradient too) is compared with segment-anything's in fp32. Times per image: wall clock, median
and quartiles, and processor time divided by the number of threads, which says more on a machine that does other things
too; ratios are medians over the rounds. Peak memory is measured in a fresh process per case. CLIP: bench_clip.py.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")        # processor time then counts work, not threads that wait

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401                        torchvision beside a CPU-only torch, for the peers
from test_sam_vit import LARGE, MEAN, STD, build, error, hugging_face, official, random_state  # noqa: E402

from pictures import save_png  # noqa: E402
from plots import curves  # noqa: E402
from sam_vit import SAMViT, expand_relative  # noqa: E402

NAMES = ("this project", "segment-anything", "transformers")
PEER_LIMIT = 1024                                          # above, their N x N arrays need more than many machines have


def weights(device: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = SAMViT()
    return {name: tensor.to(device) for name, tensor in random_state(model).items()}


def encoder(name: str, state: dict[str, torch.Tensor], size: int):
    """A function of an image in [0, 1] that returns the outputs of layers 6 12 18 24, (B, h, w, C) each."""
    if name == "this project":
        return build(state, **LARGE).to(state["pos_embed"].device)
    grid = size // 16
    fitted = dict(state)
    for key, table in state.items():                       # row i, column 0 of the expanded table is distance i, ...
        if "rel_pos" in key and len(table) != 27:
            full = expand_relative(table, grid)
            fitted[key] = torch.cat([full[0].flip(0), full[1:, 0]])
    make = official if name == "segment-anything" else hugging_face
    model, blocks = make(fitted, grid, grid, **{**LARGE, "grid": grid})
    model.requires_grad_(False)
    outs = []
    for block in list(blocks)[5::6]:
        block.register_forward_hook(lambda module, args, out: outs.append(out[0] if isinstance(out, tuple) else out))
    mean, std = MEAN.to(state["pos_embed"].device), STD.to(state["pos_embed"].device)

    def run(image):
        outs.clear()
        model((image - mean) / std)
        return list(outs)

    return run


def step(run, image: torch.Tensor, mode: str, backward: bool) -> list[torch.Tensor]:
    """One run; with `backward` the gradient of the image is the last output."""
    image = image.detach().requires_grad_(backward)
    with torch.autocast(image.device.type, torch.bfloat16, enabled=mode == "bf16"), torch.set_grad_enabled(backward):
        outs = run(image)
    if backward:
        outs.append(torch.autograd.grad(sum(out.float().mean() for out in outs), image)[0])
    if image.is_cuda:
        torch.cuda.synchronize()
    return outs


def measure(runs: dict, image: torch.Tensor, mode: str, backward: bool, rounds: int) -> dict[str, list[tuple]]:
    """Seconds per image, (wall clock, processor / threads), of every round after the first; who begins changes."""
    times, scale = {name: [] for name in runs}, 1 / len(image)
    for n in range(rounds + 1):
        for name in list(runs)[n % len(runs):] + list(runs)[:n % len(runs)]:
            wall, busy = time.perf_counter(), time.process_time()
            step(runs[name], image, mode, backward)
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
            if n:
                times[name].append((wall * scale, busy * scale / torch.get_num_threads()))
    return times


def peak_memory(name: str, args: argparse.Namespace, size: int, mode: str) -> tuple[float, float]:
    """MiB at the peak of a run in a fresh process: in all, and above what it held before."""
    command = [sys.executable, __file__, "--memory-of", name, "--sizes", str(size), "--modes", mode, "--batch",
               str(args.batch), "--threads", str(args.threads), "--device", args.device]
    done = subprocess.run(command + ["--backward"] * args.backward, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {name} at {size} px: {done.stderr.strip().splitlines()[-1]}")
    return tuple(float(number) for number in done.stdout.split())


def report_memory(args: argparse.Namespace):
    """The child's side of `peak_memory`."""
    size, mode = args.sizes[0], args.modes[0]
    run = encoder(args.memory_of, weights(args.device), size)
    if args.device == "cpu":
        before = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        Path("/proc/self/clear_refs").write_text("5")      # the peak starts anew
    else:
        before = torch.cuda.memory_allocated() / 2 ** 20
        torch.cuda.reset_peak_memory_stats()
    step(run, torch.rand(args.batch, 3, size, size, device=args.device), mode, args.backward)
    if args.device == "cpu":
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    else:
        peak = torch.cuda.max_memory_allocated() / 2 ** 20
    print(peak, peak - before)


def compare(args: argparse.Namespace, state: dict[str, torch.Tensor]) -> bool:
    """The table; False if an output is not what it should be."""
    allowed, fine = {"fp32": 1e-5, "bf16": 5e-2}, True
    print(f"{'px':>4} {'mode':5}{'':18}{'wall s':>8}{'quartiles':>15}{'cpu s':>8}{'time / ours: wall':>19}{'cpu':>6}"
          f"{'error':>9}{'peak MiB':>10}{'run':>7}")
    for size in args.sizes:
        runs = {name: encoder(name, state, size) for name in NAMES}
        image = torch.rand(args.batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(args.device)
        reference = step(runs["segment-anything"], image, "fp32", args.backward)
        for mode in args.modes:
            errors = {name: error(step(run, image, mode, args.backward), reference) for name, run in runs.items()}
            times = measure(runs, image, mode, args.backward, args.rounds)
            for name, rounds in times.items():
                low, median, high = statistics.quantiles([wall for wall, _ in rounds], n=4)
                cpu = statistics.median(busy for _, busy in rounds)
                wall_ratio, cpu_ratio = (statistics.median(a[i] / b[i] for a, b in zip(rounds, times["this project"]))
                                         for i in (0, 1))
                peak, own = peak_memory(name, args, size, mode) if args.memory else (float("nan"),) * 2
                print(f"{size:4} {mode:5}{name:18}{median:8.2f}{low:7.2f}-{high:6.2f}{cpu:9.2f}{wall_ratio:19.2f}"
                      f"{cpu_ratio:6.2f}{errors[name]:9.0e}{peak:10.0f}{own:7.0f}", flush=True)
                fine &= errors[name] <= allowed[mode]
    return fine


def draw_curve(args: argparse.Namespace, state: dict[str, torch.Tensor]):
    """Seconds, and peak memory of a run, against the side of the image and against the batch."""
    panels = {}
    cases = {"size": [(size, 1) for size in (320, 480, 640, 800, 960, 1120, 1280)],
             "batch": [(480, batch) for batch in (1, 2, 4, 8)]}
    for what, points in cases.items():
        for mode in args.modes:
            seconds, memory = {}, {}
            for size, args.batch in points:
                runs = {name: encoder(name, state, size) for name in NAMES if name == NAMES[0] or size <= PEER_LIMIT}
                image = torch.rand(args.batch, 3, size, size, device=args.device)
                times = measure(runs, image, mode, args.backward, args.rounds)
                for name, rounds in times.items():
                    x = size if what == "size" else args.batch
                    busy = statistics.median(cpu if args.device == "cpu" else wall for wall, cpu in rounds)
                    seconds.setdefault(name, ([], []))
                    memory.setdefault(name, ([], []))
                    for series, value in ((seconds, busy), (memory, peak_memory(name, args, size, mode)[1])):
                        series[name][0].append(x)
                        series[name][1].append(value)
                    mib = memory[name][1][-1]
                    print(f"{what} {x} {mode} {name}: {busy:.2f} s per image, {mib:.0f} MiB", flush=True)
            panels[f"{mode}, s per image against {what}"] = seconds
            panels[f"{mode}, MiB of a run against {what}"] = memory
    save_png(ROOT / "benchmarks" / "encoders.png", curves(panels, "side of the image in pixels; images in the batch"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[480])
    parser.add_argument("--modes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    for name, value in (("batch", 1), ("threads", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backward", action="store_true", help="also the gradient of the image")
    parser.add_argument("--curve", action="store_true", help="cost against size and batch instead of the table")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the processes for memory")
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return report_memory(args) or 0
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, batch {args.batch}, {args.rounds} rounds"
          + ", with backward" * args.backward)
    state = weights(args.device)
    if args.curve:
        return draw_curve(args, state) or 0
    return 0 if compare(args, state) else 1


if __name__ == "__main__":
    sys.exit(main())
