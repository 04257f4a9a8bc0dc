"""Timing for the benchmarks: runs alternate, so that noise affects all of them, with the machine's best matrix product.

Seconds and their ratios are comparable on one machine only. The share is comparable between machines: the operations
per second of a run, counted by flops.py, over those of the fastest large matrix product in the same precision, timed in
the same rounds. `Summary` describes the columns.

Import this module, or one that imports it, before the repository's modules: it puts their folders on sys.path.
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from flops import count

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from engine.processes import device_name, pick_device  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPUINFO = Path("/proc/cpuinfo")
CPU_FIELDS = (("model name", "CPU architecture"), ("vendor_id", "CPU implementer"), ("cpu family", "CPU variant"),
              ("model", "CPU part"), ("flags", "Features"))    # their names on x86 and on Arm
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


# ----------------------------------------------------------------------------------------------------------------------
# the machine

def processor(device: str = "cpu") -> str:
    """A CPU's name, vendor, family, model and instruction sets; a GPU's name."""
    if torch.device(device).type == "cuda" or not CPUINFO.exists():
        return device_name(torch.device(device))
    lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines)
    name, vendor, family, model, flags = (facts.get(x86, facts.get(arm, "?")) for x86, arm in CPU_FIELDS)
    sets = " ".join(name for name in INSTRUCTIONS if name in flags.split())
    return f"{name} ({vendor} family {family} model {model}: {sets})"


def products(precision: str, device: str) -> dict[str, Callable]:
    """Candidates for the machine's fastest matrix product: square ones, and the linear layers of SAM's MLP on the
    tokens of one image (on a GPU: of 16), each as a linear layer (MKL) and as a 1x1 convolution (oneDNN)."""
    large = torch.device(device).type == "cuda"

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device).to(DTYPES[precision])

    found = {}
    for n in (4096, 8192) if large else (1024, 2048):
        found[f"{n} x {n} x {n}"] = lambda a=matrix(n, n), b=matrix(n, n): a @ b
    rows = 14400 if large else 900
    for width, out in ((1024, 4096), (4096, 1024)):
        x, weight = matrix(rows, width), matrix(out, width)
        tokens, kernel = x.view(1, 1, rows, width).permute(0, 3, 1, 2), weight[:, :, None, None]
        found[f"{rows} x {width} x {out}, linear"] = lambda x=x, weight=weight: F.linear(x, weight)
        # Dilation has no effect on a 1x1 kernel, but keeps a single thread from using MKL.
        found[f"{rows} x {width} x {out}, 1x1 convolution"] = (
            lambda tokens=tokens, kernel=kernel: F.conv2d(tokens, kernel, dilation=2))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# runs

class Summary(NamedTuple):
    """Medians over the rounds: milliseconds, ratios to the first run, shares; both within each round."""
    low: float                                             # quartiles of the wall time
    median: float
    high: float
    cpu: float                                             # processor time: more reliable on a shared machine
    ratio: float
    cpu_ratio: float
    gflop: float
    share: float                                           # of the best matrix product's operations per second


class Measured(NamedTuple):
    times: dict[str, list[tuple[float, float]]]            # per round: wall time, processor time / threads; seconds
    flops: dict[str, int]
    best: str                                              # the fastest matrix product
    rates: list[float]                                     # its operations per second in each round

    def summary(self) -> dict[str, Summary]:
        """A Summary for each run."""
        ours, result = next(iter(self.times.values())), {}
        for name, rounds in self.times.items():
            ratios = [statistics.median(a[i] / b[i] for a, b in zip(rounds, ours, strict=True)) for i in (0, 1)]
            walls, busy = 1e3 * np.array(rounds).T
            shares = [self.flops[name] / wall / rate for (wall, _), rate in zip(rounds, self.rates)] or [float("nan")]
            result[name] = Summary(*np.quantile(walls, (0.25, 0.5, 0.75)), np.median(busy), *ratios,
                                   self.flops[name] / 1e9, statistics.median(shares))
        return result


def measure(runs: dict[str, Callable], rounds: int, precision: str = "", device: str = "cpu") -> Measured:
    """Calls each run once, to warm up and to count its operations, then all of them in every round, in rotating order.

    Each round ends with matrix products in `precision`; "": none, for code without matrix products.
    """
    references = products(precision, device) if precision else {}
    flops = {name: count(run)[1] for name, run in {**runs, **references}.items()}
    names, times = list(runs), {name: [] for name in flops}
    for n in range(rounds):
        for name in [*names[n % len(names):], *names[:n % len(names)], *references]:
            wall, busy = time.perf_counter(), time.process_time()
            {**runs, **references}[name]()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
            times[name].append((wall, busy / torch.get_num_threads()))
    rates = {name: [flops[name] / wall for wall, _ in times.pop(name)] for name in references}
    best = max(rates, key=lambda name: statistics.median(rates[name]), default="")
    return Measured(times, flops, best, rates.get(best, []))


def error(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative error of a tensor."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(outputs, expected, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# options and output

def options(doc: str, **defaults: int | str) -> argparse.ArgumentParser:
    """A parser with one option per keyword, of the type of its default; --help prints the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    return parser


def print_machine(text: str, threads: int, device: str = "cpu"):
    """Sets the number of threads; prints the first lines of a benchmark's output."""
    torch.set_num_threads(threads)
    print(f"{processor(str(pick_device(device)))}, {threads} threads, torch {torch.__version__}\n{text}", flush=True)


def report(title: str, measured: Measured, columns: str = "", notes: dict[str, str] | None = None):
    """Prints the table of one case. `notes`: the text of each row below the extra `columns`."""
    counted = f"{'GFLOP':>10}{'share':>7}" if measured.rates else ""
    print(f"{title:38}{'ms':>9}{'quartiles':>19}{'cpu ms':>9}{'time / ours':>13}{'cpu':>6}{counted}{columns}")
    for name, row in measured.summary().items():
        counted = f"{row.gflop:10.2f}{row.share:7.0%}" if measured.rates else ""
        print(f"{name:38}{row.median:9.1f}{row.low:10.1f}{row.high:9.1f}{row.cpu:9.1f}{row.ratio:13.2f}{row.cpu_ratio:6.2f}"
              f"{counted}{notes[name] if notes else ''}")
    if measured.rates:
        print(f"  share of {statistics.median(measured.rates) / 1e9:,.0f} GFLOP/s, {measured.best}")
    print(flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# memory

def resident(field: str = "VmRSS") -> float:
    """Resident memory of this process in MiB; with "VmHWM" its peak since `reset_peak`."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def in_new_process(function: Callable, *args):
    """Calls a module-level function in a new process, which reuses no memory of earlier runs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
