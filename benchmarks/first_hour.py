"""The first hour on a GPU: one command whose last lines can be pasted into benchmarks/README.md.

    python benchmarks/first_hour.py                            one machine, all its cards; under an hour
    python benchmarks/first_hour.py --device cpu --small       the same parts on a small network, to see that they work

Parts: the machine; the tests of tests/gpu; bench_gpu.py; 200 iterations of configs/lip.yaml through the whole loader, on
drawn people with random weights, on one card and on all. Needs no weights and no data. Each part leaves a JSON file and
its output in --out: started again, what ended well is not done again. A part that fails is reported and the next begins.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench_gpu import RANDOM, SMALL  # noqa: E402
from files.atomic import write_text  # noqa: E402

ITERS = 200


class Failed(Exception):
    """Of a part: its last line."""


def call(argv: list[str], log: Path, **environment: str) -> str:
    """The output of a program, which is also shown and kept in `log`."""
    lines = []
    process = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, errors="replace")
    with open(log, "w", encoding="utf-8") as file:
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            lines.append(line)
    if process.wait():
        said = [line.strip() for line in lines if line.strip()]
        raise Failed(f"exit code {process.returncode}: {said[-1] if said else 'no output'} (all of it: {log})")
    return "".join(lines)


def nvidia_smi(query: str) -> str:
    return subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True,
                          check=True).stdout.splitlines()[0].strip()


# ------------------------------------------------------------------------------------------------------------ the parts

def machine(args: argparse.Namespace, folder: Path) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    found = {"commit": commit or "unknown", "python": platform.python_version(), "torch": torch.__version__,
             "cpus": os.cpu_count()}
    if args.device == "cpu":
        return found
    if not torch.cuda.is_available():
        raise Failed("torch sees no GPU")
    card = torch.cuda.get_device_properties(0)
    return found | {"card": card.name, "cards": torch.cuda.device_count(), "memory_gib": round(card.total_memory / 2**30, 1),
                    "driver": nvidia_smi("driver_version"), "power_limit": nvidia_smi("power.limit"),
                    "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                    "nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def tests(args: argparse.Namespace, folder: Path) -> dict:
    said = call([sys.executable, "-m", "pytest", "-q", "-rPs", "tests/gpu"], folder / "tests.txt",
                SCHNET_TEST_DEVICE=args.device)
    return {"summary": said.strip().splitlines()[-1].strip("= ")}


def bench(args: argparse.Namespace, folder: Path) -> dict:
    said = call([sys.executable, "benchmarks/bench_gpu.py", "--device", args.device, *["--small"] * args.small],
                folder / "bench.txt")
    return {"output": said}


def train(args: argparse.Namespace, folder: Path, cards: int = 1) -> dict:
    """Seconds per step without the first entry of the log (the loader starts), share of waiting, memory, losses."""
    run = folder / f"run_{cards}_{int(time.time())}"                     # a run is never overwritten
    every = ITERS // 10
    argv = ["train.py", "--cfg", "configs/lip.yaml", *RANDOM, "dataset=synthetic", "synthetic_train=400",
            "synthetic_val=16", f"iters={ITERS}", f"warmup_iters={every}", f"log_every={every}", f"eval_every={ITERS}",
            f"save_every={ITERS}", f"workers={max(1, min(16, os.cpu_count() // cards - 1))}", f"out={run}"]
    argv += [*SMALL, "precision=fp32", "batch_size=4", "synthetic_size=128", "workers=1"] if args.small else []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(cards)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    call([sys.executable, *(torchrun if cards > 1 else []), *argv], folder / f"train_{cards}.txt", **hidden)
    log = [entry for entry in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in entry]
    steps = log[-1]["iter"] - log[0]["iter"]
    return {"cards": cards, "seconds_per_step": round((log[-1]["seconds"] - log[0]["seconds"]) / steps, 3),
            "waiting": max(entry["waiting"] for entry in log[1:]), "gib": log[-1]["gib"],
            "losses": [round(entry["loss"], 3) for entry in log]}


def train_on_all(args: argparse.Namespace, folder: Path) -> dict:
    cards = torch.cuda.device_count() if args.device == "cuda" else 2
    return train(args, folder, cards) if cards > 1 else {"skipped": "one card"}


PARTS: dict[str, Callable] = {"machine": machine, "tests": tests, "bench": bench, "train": train, "train on all": train_on_all}


# ----------------------------------------------------------------------------------------------------------- the report

def markdown(done: dict[str, dict], args: argparse.Namespace) -> str:
    """What can be pasted: a table of the figures beside the aims, then bench_gpu.py's output."""
    def row(name: str, part: str, text: Callable[[dict], str], aim: str = "") -> str:
        result = done[part]
        if "error" in result:
            return f"| {name} | failed: {result['error']} | {aim} |"
        return f"| {name} | {result['skipped'] if 'skipped' in result else text(result)} | {aim} |"

    def trained(r: dict) -> str:
        losses = r["losses"]
        return (f"{r['seconds_per_step']} s, {100 * r['waiting']:.0f} % of it waiting for data at most, {r['gib']} GiB per card; "
                f"loss {losses[0]} to {losses[-1]}")

    lines = ["| `python benchmarks/first_hour.py`" + (" --device cpu --small" if args.small else "") + " | | aim |",
             "|---|---|---|",
             row("machine", "machine", lambda r: ", ".join(f"{key} {value}" for key, value in r.items() if key != "seconds")),
             row("`make test-gpu`", "tests", lambda r: r["summary"]),
             row(f"{ITERS} iterations of 16, one card", "train", trained, "0.18 s, no waiting"),
             row(f"{ITERS} iterations of 16, all cards", "train on all", trained)]
    if "output" in done["bench"]:
        lines += ["", "```text", done["bench"]["output"].rstrip(), "```"]
    else:
        lines.append(row("`bench_gpu.py`", "bench", str))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/first_hour"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a small network")
    args = parser.parse_args()
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    done = {}
    for name, part in PARTS.items():
        path = folder / f"{name.replace(' ', '_')}.json"
        if path.exists():
            done[name] = json.loads(path.read_text(encoding="utf-8"))
            print(f"== {name}: done before ({path})", flush=True)
            continue
        print(f"== {name}", flush=True)
        begun = time.monotonic()
        try:
            done[name] = part(args, folder) | {"seconds": round(time.monotonic() - begun)}
            write_text(path, json.dumps(done[name], indent=1))
        except (Failed, OSError, subprocess.SubprocessError, KeyError, IndexError, ValueError, RuntimeError) as error:
            done[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"== {name} FAILED: {error}", flush=True)
    report = markdown(done, args)
    write_text(folder / "first_hour.md", report + "\n")
    write_text(folder / "first_hour.json", json.dumps(done, indent=1))
    print(f"\n{report}\n\nin {folder}: first_hour.md, first_hour.json")
    return int(any("error" in result for result in done.values()))


if __name__ == "__main__":
    sys.exit(main())
