"""Runs an experiment: one training run per job, one JSON file per finished job, paired statistics.

PROCESSES jobs train at a time, each in a process of one thread. A job is scored at its end, or at several looks spread
evenly over its training. Time is the CPU time of the process for batches and steps, without scoring, so that it does
not depend on other load. Finished jobs are kept: the same command trains the missing ones. A file that was made with
other settings is an error.

Import this module before the repository's: it puts their folders on sys.path.
"""

import csv
import dataclasses
import json
import math
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from config import Config, to_yaml  # noqa: E402
from datasets import train_loader  # noqa: E402
from engine.processes import World  # noqa: E402
from errors import UserError, run_program  # noqa: E402
from evaluate import evaluate_split, scores  # noqa: E402
from files.atomic import write_text  # noqa: E402
from files.weights import sha256  # noqa: E402
from model import build_model  # noqa: E402
from train import Learner, open_data  # noqa: E402

PROCESSES = 2
KEYS = ("seconds", "steps", "loss", "miou", "mean_acc", "pixel_acc")     # of a look; then the IoU of each class
PATHS = ("sam_weights", "clip_weights", "vocab", "data_root")            # not compared; weight files by their hash
# Student's t for 95 % intervals with 1, 2, ... degrees of freedom; beyond 30 the last one, which is slightly too wide.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


# ----------------------------------------------------------------------------------------------------------------------
# one job

def split_scores(learner: Learner, pairs, num_classes: int) -> dict:
    """The scores over a complete split."""
    return scores(evaluate_split(learner.model, pairs, num_classes, learner.world)[0])


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run. Its functions must be module-level: the job is pickled for its process."""
    name: str                                              # of the row it belongs to
    cfg: Config                                            # including the seed
    seconds: float = math.inf                              # CPU time budget; inf: cfg.iters steps
    looks: int = 1                                         # evaluations, the last at the end
    build: Callable[[Config, Sequence[str]], nn.Module] = build_model
    change: Callable[[Learner, object], None] | None = None              # adapts the learner, given the training split
    score: Callable[[Learner, object, int], dict] = split_scores         # scores the validation split

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}_seed{self.cfg.seed}.json"


def read_record(job: Job, folder: Path) -> dict | None:
    """The record of a finished job, None if there is none. UserError if it was made with other settings."""
    path = job.path(folder)
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if any(record[key] != value for key, value in _settings(job).items()):
        raise UserError(f"{path}: was made with other settings; choose another --out")
    return record


def _settings(job: Job) -> dict:
    """The settings that a record must match: the config without paths, hashes of the weight files, the budget."""
    files = {key: sha256(getattr(job.cfg, key)) for key in PATHS[:2] if getattr(job.cfg, key)}
    cfg = dataclasses.replace(job.cfg, **dict.fromkeys(PATHS, ""))
    budget = round(job.seconds, 3) if job.seconds < math.inf else None
    return {"config": to_yaml(cfg), "files": files, "budget": budget}


def train(job: Job, folder: Path):
    """Trains a job, prints a line per look, writes the record."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cfg, world = job.cfg, World("cpu")
    labels, train_pairs, val_pairs = open_data(cfg, world)
    torch.manual_seed(cfg.seed)
    learner = Learner(job.build(cfg, labels.classes), cfg, world)
    if job.change:
        job.change(learner, train_pairs)
    batches, steps, seconds, losses, looks = train_loader(cfg, train_pairs), 0, 0.0, [], []
    timed = job.seconds < math.inf
    while len(looks) < job.looks:
        start = time.process_time()
        iteration = int(cfg.iters * seconds / job.seconds) if timed else steps   # of the schedule
        values, taken = learner.step([next(batches)], iteration)
        seconds, steps = seconds + time.process_time() - start, steps + 1
        losses += [values["loss"]] * taken
        share = seconds / job.seconds if timed else steps / cfg.iters
        if share >= (len(looks) + 1) / job.looks:
            result = job.score(learner, val_pairs, len(labels.classes))
            looks.append({"seconds": seconds, "steps": steps, "loss": float(np.mean(losses or math.nan))} | result)
            losses = []
            print(f"{job.name}, seed {cfg.seed}: {steps} steps, {seconds:.0f} s, loss {looks[-1]['loss']:.3f}, "
                  f"mIoU {100 * result['miou']:.2f}", flush=True)
        if not multiprocessing.parent_process().is_alive():              # killed: it cannot terminate this process
            sys.exit(1)
    sizes = [(p.numel(), p.requires_grad) for p in learner.model.parameters()]
    write_text(job.path(folder), json.dumps({
        "name": job.name, "seed": cfg.seed, **_settings(job), "parameters": sum(size for size, _ in sizes),
        "trained": sum(size for size, trained in sizes if trained), "looks": looks}))


# ----------------------------------------------------------------------------------------------------------------------
# all jobs

def run_jobs(jobs: Sequence[Job], folder: Path) -> list[dict]:
    """Trains the missing jobs; returns the records of all. On an error or Ctrl-C, running jobs end without a record."""
    jobs = list(dict.fromkeys(jobs))
    missing = [job for job in jobs if read_record(job, folder) is None]
    if missing:
        print(f"{len(missing)} of {len(jobs)} jobs to train, {min(PROCESSES, len(missing))} at a time", flush=True)
    running: dict[int, tuple[multiprocessing.Process, Job]] = {}
    try:
        while missing or running:
            while missing and len(running) < PROCESSES:
                process = _start(missing[0], folder)
                running[process.sentinel] = process, missing.pop(0)
            for sentinel in wait(list(running)):
                process, job = running.pop(sentinel)
                process.join()
                if process.exitcode < 0:
                    raise UserError(f"{job.name}, seed {job.cfg.seed}: its process was killed by signal "
                                    f"{-process.exitcode} (9: usually out of memory)")
                if process.exitcode:                       # it printed its error
                    sys.exit(process.exitcode)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()
    return [read_record(job, folder) for job in jobs]


def _start(job: Job, folder: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(job, folder), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)               # inherited: run_jobs terminates it on Ctrl-C
    process.start()
    signal.signal(signal.SIGINT, handler)
    return process


def _work(job: Job, folder: Path):
    tqdm.set_lock(threading.RLock())                       # the default is a semaphore, which a kill leaks
    run_program(lambda: train(job, folder))


# ----------------------------------------------------------------------------------------------------------------------
# statistics

class Difference(NamedTuple):
    """Paired differences of two rows, seed by seed, with the 95 % interval of their mean."""
    each: list[float]
    mean: float
    low: float                                             # nan for a single seed
    high: float

    @property
    def verdict(self) -> str:
        return "decided" if self.low > 0 or self.high < 0 else "not decided"


def difference(each: Sequence[float]) -> Difference:
    """Mean and interval of paired differences: Student's t over the seeds."""
    mean, count = float(np.mean(each)), len(each)
    if count < 2:
        return Difference(list(each), mean, math.nan, math.nan)
    half = T95[min(count - 1, len(T95)) - 1] * float(np.std(each, ddof=1)) / math.sqrt(count)
    return Difference(list(each), mean, mean - half, mean + half)


def final(records: Sequence[dict], name: str, key: str = "miou") -> dict[int, float]:
    """{seed: score in percent at the last look} of a row."""
    return {record["seed"]: 100 * record["looks"][-1][key] for record in records if record["name"] == name}


def differences(records: Sequence[dict], pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Difference]:
    """The difference of each pair of rows over their common seeds; pairs without any are left out."""
    result = {}
    for a, b in pairs:
        first, second = final(records, a), final(records, b)
        if common := sorted(first.keys() & second.keys()):
            result[a, b] = difference([first[seed] - second[seed] for seed in common])
    return result


def difference_table(deltas: dict[tuple[str, str], Difference], titles: dict[str, str],
                     published: dict[tuple[str, str], float] | None = None) -> list[str]:
    """A table as lines of text, with the number of differences that chance alone would decide."""
    published = published or {}
    width = max(len(title) for title in titles.values())
    lines = [f"{'difference of mIoU, in points':{2 * width + 3}}{'paper':>7}{'mean':>8}   95 % interval    n  "
             f"{'':13}each seed"]
    for (a, b), delta in deltas.items():
        paper = f"{published[a, b]:+.2f}" if (a, b) in published else "-"
        interval = "-" if math.isnan(delta.low) else f"{delta.low:+.2f} .. {delta.high:+.2f}"
        each = " ".join(f"{value:+.2f}" for value in delta.each)
        lines.append(f"{titles[a]:{width}} - {titles[b]:{width}}{paper:>7}{delta.mean:+8.2f}{interval:>18}"
                     f"{len(delta.each):4}  {delta.verdict:13}{each}")
    return [*lines, "paired intervals, Student's t over the seeds; decided: zero is outside. Of "
                    f"{len(deltas)} differences without any effect, {len(deltas) / 20:.1f} would be decided by chance"]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation (n - 1)."""
    deviation = f" +- {np.std(values, ddof=1):4.2f}" if len(values) > 1 else " " * 8
    return f"{np.mean(values):7.2f}{deviation}"


# ----------------------------------------------------------------------------------------------------------------------
# files

def write_looks(path: Path, records: Sequence[dict], classes: Sequence[str]):
    """Writes a CSV file with a line per look: scores and the IoU of each class."""
    lines = [["row", "seed", *KEYS, *classes]]
    for record in records:
        for look in record["looks"]:
            values = [*(look[key] for key in KEYS), *look["iou"]]
            lines.append([record["name"], record["seed"], *(f"{value:.5g}" for value in values)])
    _write_csv(path, lines)


def write_report(folder: Path, text: Sequence[str], deltas: dict[tuple[str, str], Difference]):
    """Writes the lines of `text` to table.txt and the differences to differences.csv; prints the lines."""
    write_text(folder / "table.txt", "\n".join(text) + "\n")
    print("\n".join(text))
    lines = [["row", "minus", "seeds", "mean", "low", "high", "verdict", "each"]]
    for pair, delta in deltas.items():
        mean, low, high, *each = (f"{value:.4f}" for value in (delta.mean, delta.low, delta.high, *delta.each))
        lines.append([*pair, len(each), mean, low, high, delta.verdict, " ".join(each)])
    _write_csv(folder / "differences.csv", lines)


def _write_csv(path: Path, lines: list[list]):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
