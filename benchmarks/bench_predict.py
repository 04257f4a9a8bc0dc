"""predict.py over many photos: what listing costs, what a second process brings, how much of the time is the network's.

    python benchmarks/bench_predict.py --run runs/demo                 # listing, processes, the network's share
    python benchmarks/bench_predict.py --run runs/demo --full-size     # the share of the full-size network too

Listing: --files photos of 8 x 8 pixels, hard links of one; seconds and memory (of the process, peak) until the first
result is written, and with --skip-existing when all are. Processes: --figures drawn people of 256 x 128 in --rounds rounds,
by one process of all cores and by as many processes of one core, in turn, started and ended included. Share: the seconds
of the network, its softmax at the photo's size and the maximum, over all of `parse_photos`: what is not hidden behind it
is reading, drawing and writing.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from timing import begin, resident

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import inference  # noqa: E402
import predict  # noqa: E402
from config import load_config  # noqa: E402
from datasets import label_set  # noqa: E402
from model import build_model  # noqa: E402
from synthetic.draw import draw  # noqa: E402

CORES = len(os.sched_getaffinity(0))


def start(run: str, photos: Path, out: Path, *more: str, processes: int = 1) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(torchrun if processes > 1 else [sys.executable]), ROOT / "predict.py", photos, "--checkpoint", run,
               "--out", out, "--device", "cpu", *more]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(CORES // processes)},
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def figures(folder: Path, count: int, size: tuple[int, int] = (256, 128)) -> Path:
    folder.mkdir()
    for n in range(count):
        Image.fromarray(draw(7, n, size)[0]).save(folder / f"{n:05}.jpg", quality=92)
    return folder


def copies(source: Path, folder: Path, count: int):
    """`count` files in folders of a thousand; a folder's others are hard links to its first (ext4 allows 65,000)."""
    for n in range(count):
        target = folder / f"{n // 1000:03}" / f"{n:06}{source.suffix}"
        if n % 1000 == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            first = target
            if first != source:
                first.write_bytes(source.read_bytes())
        elif not target.exists():
            os.link(first, target)


def listing(run: str, folder: Path, count: int):
    """Until the first result is there, and until it is known that all are."""
    photos, out = folder / "many", folder / "parsed"
    one = figures(folder / "one", 1, (8, 8)) / "00000.jpg"
    copies(one, photos, count)
    begun, peak = time.monotonic(), 0
    process = start(run, photos, out)
    while process.poll() is None and not any(out.glob("labels/*/*.png")):
        peak = max(peak, memory(process.pid))
        time.sleep(0.05)
    first = time.monotonic() - begun
    process.kill()
    process.wait()
    for kind, ending in (("labels", ".png"), ("overlays", ".jpg")):
        copies(next(out.glob(f"{kind}/*/*{ending}")), out / kind, count)
    begun = time.monotonic()
    said = start(run, photos, out, "--skip-existing").communicate()[0]
    assert f"{count} left out" in said and "0 parsed" in said, said
    print(f"{count:,} files: {first:.1f} s and {peak:.0f} MiB until the first is parsed; "
          f"{time.monotonic() - begun:.1f} s to find all of them done (both with {alone(run, folder):.1f} s of start)")


def alone(run: str, folder: Path) -> float:
    begun = time.monotonic()
    start(run, folder / "one", folder / "parsed_one").communicate()
    return time.monotonic() - begun


def memory(pid: int) -> float:
    """MiB that a process holds now."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0


def processes(run: str, folder: Path, count: int, rounds: int):
    photos, times = figures(folder / "figures", count), {1: [], CORES: []}
    for n in range(rounds):
        for number in times:
            out, begun = folder / f"by {number}, {n}", time.monotonic()
            assert start(run, photos, out, "--batch", "4", processes=number).wait() == 0
            times[number].append(time.monotonic() - begun)
    ratios = [one / many for one, many in zip(*times.values())]
    print(f"{count} figures: one process {statistics.median(times[1]):.1f} s, {CORES} processes "
          f"{statistics.median(times[CORES]):.1f} s: {statistics.median(ratios):.2f} times as fast "
          f"({min(ratios):.2f} .. {max(ratios):.2f} in {rounds} rounds)")


def share(name: str, parser: predict.Parser, photos: Path, out: Path):
    """The network's part of the wall's clock."""
    inside, parse_batch = [], parser.parse_batch

    def timed(*args):
        begun = time.monotonic()
        result = parse_batch(*args)
        inside.append(time.monotonic() - begun)
        return result

    parser.parse_batch = timed
    args, report = predict.arguments([str(photos), "--out", str(out)]), predict.Report()
    jobs = predict.collect(args.inputs, args.out, report)[0]
    batches = [jobs[n:n + args.batch] for n in range(0, len(jobs), args.batch)]
    begun = time.monotonic()
    predict.parse_photos(parser, batches, set(), args, report, lambda more: None)
    wall = time.monotonic() - begun
    print(f"{name}: the network has {sum(inside) / wall:.1%} of {wall:.1f} s for {len(report.parsed)} photos; "
          f"{resident('VmHWM'):.0f} MiB")


def full_size(precision: str) -> predict.Parser:
    """configs/lip.yaml with random weights, as a Parser has it."""
    cfg = load_config(ROOT / "configs" / "lip.yaml", ["sam_weights=", "clip_weights=", "vocab=", f"precision={precision}"])
    labels = label_set(cfg)
    torch.manual_seed(0)
    model = build_model(cfg, labels.classes).eval()
    inference.cast_frozen(model, precision)
    load_run, inference.load_run = inference.load_run, lambda *_: (model, labels, Path("random weights"))
    try:
        return predict.Parser()
    finally:
        inference.load_run = load_run


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", default="runs/demo")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--figures", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full-size", action="store_true")
    args = parser.parse_args()
    begin("", CORES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listing(args.run, folder, args.files)
        processes(args.run, folder, args.figures, args.rounds)
        share("the run's network", predict.Parser(args.run, device="cpu"), folder / "figures", folder / "share")
        if args.full_size:
            photos = folder / "photos"
            figures(photos, 8, (1024, 768))
            for precision in ("fp32", "bf16"):
                share(f"full size, {precision}", full_size(precision), photos, folder / precision)


if __name__ == "__main__":
    main()
