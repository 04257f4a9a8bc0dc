"""Does a run that is killed repeatedly end bit for bit like an uninterrupted one?

    python benchmarks/kill_and_resume.py                   20 kills: 10 with one process, 10 with two; some minutes

A small network is trained on drawn people, with loader processes, once without interruption and once with SIGKILL for
all of its processes: at random moments, during random writes (a temporary file has just appeared), and during the
start. After each kill it is resumed. In 24 of the 80 steps an image, a loss or a gradient is not finite, so that they
are skipped. Then weights, optimizer, best network and log of the two are compared bit by bit; only times may differ.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import full_size
import torch
from timing import ROOT, options

import train
from engine import checkpoint
from errors import UserError, run_program
from files.atomic import LEFTOVERS
from tiny import differences, logged, with_faults

FAULTS = {it: ("image", "loss", "gradient")[it % 3] for it in range(80) if it % 10 in (3, 6, 7)}
SMALL = [*full_size.RANDOM, *full_size.SMALL, "synthetic_size=[64, 64]", "synthetic_train=500", "synthetic_val=11",
         "crop_size=64", "base_size=64", "workers=2", "iters=80", "batch_size=4", "loss_group=2", "warmup_iters=10",
         "log_every=3", "save_every=2", "eval_every=16"]


def start(processes: int, folder: Path) -> subprocess.Popen:
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launch, __file__, "--train", f"out={folder}", *SMALL, "--resume"]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def process_tree(pid: int) -> list[int]:
    """A process, its children, their children, ..."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(member for child in children for member in process_tree(int(child)))]


def kill(process: subprocess.Popen):
    for pid in process_tree(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for_moment(process: subprocess.Popen, folder: Path, seconds: float, write: str):
    """Waits `seconds`, then until a file of the pattern `write` exists ("": no longer), or until the process ends."""
    end = time.monotonic() + seconds
    while process.poll() is None and (time.monotonic() < end or write and not list(folder.glob(write))):
        time.sleep(0.0005)


def compare(uninterrupted: Path, killed: Path) -> list[str]:
    found = [] if logged(uninterrupted) == logged(killed) else ["log.jsonl"]
    for name in (checkpoint.LAST, checkpoint.BEST):
        found += differences(*(checkpoint.read(folder / name) for folder in (uninterrupted, killed)), name)
    return found


def kill_repeatedly(processes: int, wanted: int, rng: random.Random, root: Path) -> list[str]:
    """The places at which runs that were killed `wanted` times in total differ from an uninterrupted one."""
    uninterrupted, killed = root / f"uninterrupted{processes}", root / f"killed{processes}"
    begin = time.monotonic()
    finish(start(processes, uninterrupted))
    training = json.loads((uninterrupted / "log.jsonl").read_text().splitlines()[-1])["seconds"]
    starting = time.monotonic() - begin - training
    skipped = sum("skipped" in entry for entry in logged(uninterrupted))
    print(f"{processes} process{'es' * (processes > 1)}: 80 iterations in {training:.0f} s, {skipped} of {len(FAULTS)} "
          f"faulty ones skipped, {starting:.0f} s to start", flush=True)
    kills, runs, writes, wrong = 0, 1, 0, [] if skipped == len(FAULTS) else ["skipped steps"]
    while kills < wanted:
        process = start(processes, killed)
        during_start = kills % 5 == 2
        write = "" if during_start else (".last-*.part*", "", LEFTOVERS, "")[kills % 4]
        seconds = rng.uniform(0.5, 1) * starting if during_start else starting + rng.uniform(0, 2) * training / wanted
        wait_for_moment(process, killed, seconds, write)
        if process.poll() is not None:                     # it was done before: the next kills are of another run
            finish(process)
            wrong += compare(uninterrupted, killed)
            killed, runs = root / f"killed{processes}.{runs}", runs + 1
            continue
        kill(process)
        kills += 1
        parts = sorted(path.name for path in killed.glob(LEFTOVERS))
        writes += bool(parts)
        saved = any((killed / name).exists() for name in (checkpoint.LAST, checkpoint.PREVIOUS))
        at = checkpoint.read_last(killed)[0]["progress"]["iteration"] if saved else 0
        during = f", during the write of {' '.join(parts)}" if parts else ""
        print(f"  kill {kills}: iteration {at} is saved{during}", flush=True)
    finish(start(processes, killed))
    wrong += compare(uninterrupted, killed)
    result = f"DIFFERENT: {wrong}" if wrong else "weights, optimizer, best network, log: equal to the last bit"
    print(f"  {kills} kills, {writes} of them during a write, {runs} runs compared: {result}", flush=True)
    return wrong


def finish(process: subprocess.Popen):
    """Waits until the run ends by itself."""
    output = process.communicate()[0]
    if process.returncode:
        raise UserError(f"training failed: {output.strip().splitlines()[-1]}")


def main(argv: list[str] | None = None) -> int:
    args = options(__doc__, kills=10, seed=0).parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        wrong = [place for count in (1, 2) for place in kill_repeatedly(count, args.kills, rng, Path(root))]
    return 1 if wrong else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--train"]:                       # train.py with faults
        train.Learner.gradient = with_faults(train.Learner.gradient, FAULTS)
        train.main(sys.argv[2:])
    else:
        run_program(main)
