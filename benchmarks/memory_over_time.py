"""Does training grow? Memory, open files and threads over 2,000 iterations; loaders, validation and saves included.

    python benchmarks/memory_over_time.py [--iters 2000]   some minutes on two cores

Trains a small network on drawn people (the demo's kind of run, on smaller figures) and looks at its processes from
outside, in /proc, ten times from the first validation on. Fails if they grow by more than what pools need to settle:
1 % and 4 MiB from the first half's peak to the second half's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kill_and_resume import ROOT, SMALL, family  # noqa: E402


def look(pids: list[int]) -> tuple[float, int, int]:
    """Resident MiB without shared pages, open files, threads: the sum over the processes."""
    kib = files = threads = 0
    for pid in pids:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        kib += int(status["RssAnon"].split()[0])
        threads += int(status["Threads"])
        files += len(os.listdir(f"/proc/{pid}/fd"))
    return kib / 1024, files, threads


def watch(folder: Path, iters: int) -> list[tuple]:
    """(iteration, MiB, files, threads, loaders' MiB, loaders' files), ten times from the first validation on."""
    every = iters // 20
    command = [sys.executable, "train.py", f"out={folder}", *SMALL, f"iters={iters}", "log_every=10",
               f"eval_every={every}", f"save_every={every // 2}"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    seen, next_at = [], every
    print(f"{'iteration':>9} {'MiB':>8} {'files':>6} {'threads':>8} {'loaders, MiB':>13} {'files':>6}")
    try:
        while process.poll() is None:
            time.sleep(0.05)
            lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []
            at = json.loads(lines[-1])["iter"] if lines else 0
            if at >= next_at:
                main_process, *loaders = family(process.pid)
                seen.append((at, *look([main_process]), *look(loaders)[:2]))
                print("{:9} {:8.1f} {:6} {:8} {:13.1f} {:6}".format(*seen[-1]), flush=True)
                next_at += every * 2
    finally:
        process.kill()
    if process.wait():
        sys.exit(f"training failed ({process.returncode})")
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iters", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        seen = watch(Path(root) / "run", args.iters)
    half = len(seen) // 2
    grown = []
    for column, what in ((1, "MiB"), (2, "files"), (3, "threads"), (4, "loaders' MiB"), (5, "loaders' files")):
        before, after = (max(row[column] for row in part) for part in (seen[:half], seen[half:]))
        print(f"{what}: at most {before:.1f} in the first half, {after:.1f} in the second")
        if after > before * 1.01 + (4 if "MiB" in what else 0):
            grown.append(what)
    sys.exit(f"grown: {', '.join(grown)}" if grown else 0)


if __name__ == "__main__":
    main()
