"""predict.py over many photos: the cost of listing, the gain of a second process, the network's share of the time.

    python benchmarks/bench_predict.py --run runs/demo                 # listing, processes, the network's share
    python benchmarks/bench_predict.py --run runs/demo --full-size     # also the share of the full-size network

Listing: --files photos of 8 x 8 pixels; seconds and peak memory until the first result is written, and seconds to find
with --skip-existing that all results are there. Processes: --people drawings of 256 x 128 in --rounds rounds, by one
process of all cores and by as many processes of one core, in turn, start included. Share: the seconds of the network,
its softmax at the photo's size and the maximum, over those of all of the parsing: the rest is reading, drawing,
writing.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import full_size
import numpy as np
from PIL import Image
from timing import ROOT, options, print_machine, resident

import inference
import predict
from engine.parsing import Job, Report
from errors import run_program
from files.inputs import list_inputs
from files.labels import label_set
from files.results import Results
from synthetic.draw import draw
from viz.pictures import save_palette_png

CORES = len(os.sched_getaffinity(0))


def start(run: str, photos: Path, out: Path, *more: str, processes: int = 1) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(torchrun if processes > 1 else [sys.executable]), ROOT / "predict.py", photos, "--checkpoint", run,
               "--out", out, "--device", "cpu", *more]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(CORES // processes)},
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def drawings(folder: Path, count: int, size: tuple[int, int] = (256, 128)) -> Path:
    folder.mkdir()
    for n in range(count):
        Image.fromarray(draw(7, n, size)[0]).save(folder / f"{n:05}.jpg", quality=92)
    return folder


def listing(parser: predict.Parser, run: str, folder: Path, count: int):
    """Times the start of a call on `count` photos, and a call that finds all of them parsed."""
    photos, out = folder / "many", folder / "parsed"
    one = (drawings(folder / "one", 1, (8, 8)) / "00000.jpg").read_bytes()
    for n in range(count):
        path = photos / f"{n // 1000:03}" / f"{n:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(one)
    begin = time.monotonic()
    process = start(run, photos, out)
    while process.poll() is None and not any(out.glob("labels/*/*.png")):
        time.sleep(0.05)
    first = time.monotonic() - begin
    process.kill()
    peak = os.wait4(process.pid, 0)[2].ru_maxrss / 1024
    write_results(parser, photos, out)
    begin = time.monotonic()
    assert f"{count} already done" in start(run, photos, out, "--skip-existing").communicate()[0]
    skipping = time.monotonic() - begin
    begin = time.monotonic()
    start(run, folder / "one", folder / "parsed_one").communicate()
    print(f"{count:,} files: {first:.1f} s and {peak:.0f} MiB until the first is parsed; {skipping:.1f} s to find all "
          f"of them done; {time.monotonic() - begin:.1f} s for one photo alone", flush=True)


def write_results(parser: predict.Parser, photos: Path, out: Path):
    """Results as predict.py would leave them, without running the network."""
    label, results = np.zeros((8, 8), np.uint8), Results(out, parser.classes, parser.settings)
    for found in list_inputs([str(photos)]).photos:
        paths = {kind: results.path(kind, found.name) for kind in results.kinds}
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        save_palette_png(paths["labels"], label, parser.palette, results.record(found.path, label))
        paths["overlays"].touch()


def processes(run: str, folder: Path, count: int, rounds: int):
    photos, times = drawings(folder / "people", count), {1: [], CORES: []}
    for n in range(rounds):
        for number in times:
            out, begin = folder / f"by {number}, {n}", time.monotonic()
            assert start(run, photos, out, "--batch", "4", processes=number).wait() == 0
            times[number].append(time.monotonic() - begin)
    ratios = [one / many for one, many in zip(*times.values())]
    print(f"{count} drawings: one process {statistics.median(times[1]):.1f} s, {CORES} processes "
          f"{statistics.median(times[CORES]):.1f} s: {statistics.median(ratios):.2f} times as fast "
          f"({min(ratios):.2f} .. {max(ratios):.2f} in {rounds} rounds)", flush=True)


def share(name: str, parser: predict.Parser, photos: Path, out: Path):
    """Prints the network's share of the wall time."""
    inside, parse = [], parser.parse

    def timed(images):
        begin = time.monotonic()
        labels = parse(images)
        inside.append(time.monotonic() - begin)
        return labels

    parser.parse, report, inputs = timed, Report(), list_inputs([str(photos)]).photos
    batches = [inputs[n:n + parser.batch] for n in range(0, len(inputs), parser.batch)]
    begin = time.monotonic()
    Job(parser, Results(out, parser.classes, parser.settings), report).photos(batches, set(), lambda more: None)
    wall = time.monotonic() - begin
    print(f"{name}: the network has {sum(inside) / wall:.1%} of {wall:.1f} s for {len(report.parsed)} photos; "
          f"{resident('VmHWM'):.0f} MiB", flush=True)


def full_size_parser(precision: str) -> predict.Parser:
    """A Parser of configs/lip.yaml with random weights."""
    cfg = full_size.lip_config(f"precision={precision}")
    run = full_size.network(cfg).eval(), label_set(cfg), Path(__file__)
    with mock.patch.object(inference, "load_run", lambda *_: run):
        return predict.Parser()


def main(argv: list[str] | None = None):
    parser = options(__doc__, run="runs/demo", files=100_000, people=400, rounds=3)
    parser.add_argument("--full-size", action="store_true", help="also the share of the full-size network")
    args = parser.parse_args(argv)
    print_machine(args.run, CORES)
    network = predict.Parser(args.run, device="cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listing(network, args.run, folder, args.files)
        processes(args.run, folder, args.people, args.rounds)
        share("the run's network", network, folder / "people", folder / "share")
        if args.full_size:
            photos = drawings(folder / "photos", 8, (1024, 768))
            for precision in ("fp32", "bf16"):
                share(f"full size, {precision}", full_size_parser(precision), photos, folder / precision)


if __name__ == "__main__":
    run_program(main)
