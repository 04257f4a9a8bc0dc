"""Does a run that is killed again and again end as if nothing had happened? To the last bit?

    python benchmarks/kill_and_resume.py                   20 kills: 10 with one process, 10 with two; some minutes

A small network is trained on drawn people, with loader processes, once in peace and once with SIGKILL for all of its
processes: at random moments, in the middle of random writes (a temporary file has just appeared), and while it starts.
After each kill it goes on with --resume. In 24 of the 80 steps an image, a loss or a gradient is not finite, so that
they are skipped. Then weights, optimiser, best network and log of the two are compared bit by bit; only times may differ.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train  # noqa: E402
from tiny import differences, logged, with_faults  # noqa: E402

FAULTS = {it: ("image", "loss", "gradient")[it % 3] for it in range(80) if it % 10 in (3, 6, 7)}

SMALL = [
    "synthetic_size=[64, 64]", "synthetic_train=500", "synthetic_val=11", "crop_size=64", "base_size=64", "workers=2",
    "sam_dim=32", "sam_heads=2", "sam_window=3", "sam_grid=4", "clip_dim=32", "clip_grid=4", "clip_embed=16",
    "text_dim=16", "text_depth=1", "ftm_tokens=8", "prior_dim=16", "deform_heads=2", "deform_points=2", "head_dim=16",
    "aux_dim=16", "iters=80", "batch_size=4", "loss_group=2", "warmup_iters=10", "log_every=3", "save_every=2",
    "eval_every=16"]


def start(processes: int, folder: Path) -> subprocess.Popen:
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    resume = ["--resume"] if any((folder / name).exists() for name in ("last.pt", "previous.pt")) else []
    command = [sys.executable, *launch, __file__, "--train", f"out={folder}", *SMALL, *resume]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def family(pid: int) -> list[int]:
    """A process, its children, their children, ..."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def kill(process: subprocess.Popen):
    for pid in family(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def stamp(folder: Path) -> int:
    try:
        return (folder / "last.pt").stat().st_mtime_ns
    except FileNotFoundError:                              # none yet, or it has just become previous.pt
        return 0


def wait_for_moment(process: subprocess.Popen, folder: Path, saves: float, write: str):
    """So many new checkpoints, 3.4: three and 0.4 of the time between two; and then until such a file is written."""
    times, last = [time.monotonic()], stamp(folder)
    while process.poll() is None and len(times) <= saves:
        time.sleep(0.002)
        now = stamp(folder)
        if now not in (0, last):
            last = now
            times.append(time.monotonic())
    end = times[-1] + saves % 1 * (times[-1] - times[-2] if len(times) > 2 else 0.1)
    while process.poll() is None and (time.monotonic() < end or write and not list(folder.glob(write))):
        time.sleep(0.0005)


def wait_in_the_start(process: subprocess.Popen, seconds: float):
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def compare(peace: Path, war: Path) -> list[str]:
    found = [] if logged(peace) == logged(war) else ["log.jsonl"]
    for name in ("last.pt", "best.pt"):
        found += differences(*(torch.load(folder / name, weights_only=True) for folder in (peace, war)), name)
    return found


def kill_again_and_again(processes: int, wanted: int, dice: random.Random, root: Path) -> list[str]:
    """The places at which runs that were killed a total of `wanted` times differ from one that was not."""
    peace, war = root / f"peace{processes}", root / f"war{processes}"
    begun = time.monotonic()
    finish(start(processes, peace))
    training = json.loads((peace / "log.jsonl").read_text().splitlines()[-1])["seconds"]
    starting = time.monotonic() - begun - training
    skipped = sum("skipped" in entry for entry in logged(peace))
    print(f"{processes} process{'es' * (processes > 1)}: 80 iterations in {training:.0f} s, {skipped} of them skipped, "
          f"{starting:.0f} s to start", flush=True)
    if skipped != len(FAULTS):
        sys.exit(f"{len(FAULTS)} steps should have been skipped")
    kills, runs, writes, wrong = 0, 1, 0, []
    while kills < wanted:
        process = start(processes, war)
        if kills % 5 == 2:
            wait_in_the_start(process, dice.uniform(0.5, 1) * starting)
        else:
            write = (".last-*.part*", "", ".*.part*", "")[kills % 4]
            wait_for_moment(process, war, dice.uniform(1, 2 * 40 / wanted - 1), write)
        if process.poll() is not None:                     # it was done first: kill it some more in another folder
            finish(process)
            wrong += compare(peace, war)
            war, runs = root / f"war{processes}.{runs}", runs + 1
            continue
        kill(process)
        kills += 1
        parts = sorted(path.name for path in war.glob(".*.part*"))
        writes += bool(parts)
        whole = next((name for name in ("last.pt", "previous.pt") if (war / name).exists()), None)
        at = torch.load(war / whole, weights_only=True)["progress"]["iteration"] if whole else 0
        print(f"  kill {kills}: {whole or 'no checkpoint'} holds iteration {at}"
              + (f", in the middle of {' '.join(parts)}" if parts else ""), flush=True)
    finish(start(processes, war))
    wrong += compare(peace, war)
    result = f"DIFFERENT: {wrong}" if wrong else "weights, optimiser, best network, log: equal to the last bit"
    print(f"  {kills} kills, {writes} of them in the middle of a write, {runs} runs compared: {result}", flush=True)
    return wrong


def finish(process: subprocess.Popen):
    """Let it train to the end."""
    output = process.communicate()[0]
    if process.returncode:
        sys.exit(f"it did not go on:\n{output}")


def main():
    if sys.argv[1:2] == ["--train"]:                       # train.py, with faults
        train.forward_backward = with_faults(train.forward_backward, FAULTS)
        return train.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="for each number of processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        wrong = [place for count in (1, 2) for place in kill_again_and_again(count, args.kills, dice, Path(root))]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
