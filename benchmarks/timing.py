"""What the benchmarks share: things run in turn, so that noise hits all alike, their times in figures, peak memory."""

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

Times = dict[str, list[tuple[float, float]]]


class Figures(NamedTuple):
    """Seconds, and how many times the first one's: medians over the rounds, the ratios within each round."""
    low: float                                             # quartiles of the wall's clock
    median: float
    high: float
    cpu: float                                             # says more on a machine that does other things too
    ratio: float
    cpu_ratio: float


def alternate(runs: dict[str, Callable], rounds: int, warm: int = 1) -> Times:
    """Of each run (wall clock, processor time / threads) in seconds, in every round after `warm`; who begins changes."""
    names, times = list(runs), {name: [] for name in runs}
    for n in range(rounds + warm):
        for name in names[n % len(names):] + names[:n % len(names)]:
            wall, busy = time.perf_counter(), time.process_time()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
            if n >= warm:
                times[name].append((wall, busy / torch.get_num_threads()))
    return times


def figures(times: Times) -> dict[str, Figures]:
    """For each name; it is the first one's time that the ratios are of."""
    ours, result = next(iter(times.values())), {}
    for name, rounds in times.items():
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(rounds, ours, strict=True)) for i in (0, 1)]
        walls, busy = zip(*rounds)
        result[name] = Figures(*statistics.quantiles(walls, n=4), statistics.median(busy), *ratios)
    return result


def resident(what: str = "VmRSS") -> float:
    """MiB of this process; "VmHWM" is the peak since `forget_peak`."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")
