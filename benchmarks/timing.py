"""Timing for the benchmarks: alternating runs, so that noise affects all alike, and the machine's best matrix product.

Seconds belong to one machine, and so do ratios of seconds. What can be compared between machines is the share: the
operations per second of a run, as counted by flops.py, over those of the fastest of some large matrix products in the
same precision, timed in the same rounds.

Scripts import this module, or one that does, before the repository's modules: it puts their folders on sys.path.
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
              ("model", "CPU part"), ("flags", "Features"))    # on x86, on Arm
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


# ----------------------------------------------------------------------------------------------------------------------
# the machine

def processor(device: str = "cpu") -> str:
    """Name, vendor, family, model and instruction sets; a GPU's name."""
    if torch.device(device).type == "cuda" or not CPUINFO.exists():
        return device_name(torch.device(device))
    lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines)
    name, vendor, family, model, flags = (facts.get(x86, facts.get(arm, "?")) for x86, arm in CPU_FIELDS)
    sets = " ".join(name for name in INSTRUCTIONS if name in flags.split())
    return f"{name} ({vendor} family {family} model {model}: {sets})"


def products(precision: str, device: str) -> dict[str, Callable]:
    """Candidates for the machine's fastest matrix product: squares, and the linear layers of SAM's MLP on one image's
    tokens (on a GPU: of 16 images), each as matrix product (MKL) and as convolution (oneDNN)."""
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
    """Medians over the rounds: milliseconds; ratios to the first run and shares, taken within each round."""
    low: float                                             # quartiles of the wall time
    median: float
    high: float
    cpu: float                                             # more reliable on a machine with other work
    ratio: float
    cpu_ratio: float
    gflop: float
    share: float                                           # of `rates`


class Measured(NamedTuple):
    times: dict[str, list[tuple[float, float]]]            # per round: wall time, processor time / threads; seconds
    flops: dict[str, int]
    best: str                                              # the fastest matrix product
    rates: list[float]                                     # its operations per second in each round

    def summary(self) -> dict[str, Summary]:
        """The summary of each run; ratios are to the first run's time."""
        ours, result = next(iter(self.times.values())), {}
        for name, rounds in self.times.items():
            ratios = [statistics.median(a[i] / b[i] for a, b in zip(rounds, ours, strict=True)) for i in (0, 1)]
            walls, busy = 1e3 * np.array(rounds).T
            shares = [self.flops[name] / wall / rate for (wall, _), rate in zip(rounds, self.rates)] or [float("nan")]
            result[name] = Summary(*np.quantile(walls, (0.25, 0.5, 0.75)), np.median(busy), *ratios,
                                   self.flops[name] / 1e9, statistics.median(shares))
        return result


def measure(runs: dict[str, Callable], rounds: int, precision: str = "", device: str = "cpu") -> Measured:
    """Runs each once, to warm up and to count operations, then all in turn in every round; the first one rotates.

    Each round ends with matrix products of the `precision`; "": none, for code that is not made of them.
    """
    beside = products(precision, device) if precision else {}
    flops = {name: count(run)[1] for name, run in {**runs, **beside}.items()}
    names, times = list(runs), {name: [] for name in flops}
    for n in range(rounds):
        for name in [*names[n % len(names):], *names[:n % len(names)], *beside]:
            wall, busy = time.perf_counter(), time.process_time()
            {**runs, **beside}[name]()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
            times[name].append((wall, busy / torch.get_num_threads()))
    rates = {name: [flops[name] / wall for wall, _ in times.pop(name)] for name in beside}
    best = max(rates, key=lambda name: statistics.median(rates[name]), default="")
    return Measured(times, flops, best, rates.get(best, []))


def error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest of the relative errors."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# the scripts

def options(doc: str, **defaults: int | str) -> argparse.ArgumentParser:
    """A parser with an option for each of `defaults`, of its type; --help shows the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    return parser


def print_machine(text: str, threads: int, device: str = "cpu"):
    """Sets the number of threads; prints the first lines of a benchmark's output."""
    torch.set_num_threads(threads)
    print(f"{processor(str(pick_device(device)))}, {threads} threads, torch {torch.__version__}\n{text}", flush=True)


def report(title: str, measured: Measured, columns: str = "", notes: dict[str, str] | None = None):
    """Prints the table of one case; `notes`: the further `columns` of each row."""
    counted = f"{'GFLOP':>10}{'share':>7}" if measured.rates else ""
    print(f"{title:38}{'ms':>9}{'quartiles':>19}{'cpu ms':>9}{'time / ours':>13}{'cpu':>6}{counted}{columns}")
    for name, of in measured.summary().items():
        counted = f"{of.gflop:10.2f}{of.share:7.0%}" if measured.rates else ""
        print(f"{name:38}{of.median:9.1f}{of.low:10.1f}{of.high:9.1f}{of.cpu:9.1f}{of.ratio:13.2f}{of.cpu_ratio:6.2f}"
              f"{counted}{notes[name] if notes else ''}")
    if measured.rates:
        print(f"  share of {statistics.median(measured.rates) / 1e9:,.0f} GFLOP/s, {measured.best}")
    print(flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# memory

def resident(what: str = "VmRSS") -> float:
    """Resident MiB of this process; "VmHWM": the peak since `reset_peak`."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def in_new_process(function: Callable, *args):
    """The result of a module-level function, computed in a fresh process: memory is not reused from earlier runs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
