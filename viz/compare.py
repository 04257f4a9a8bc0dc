"""Compare runs: their curves in one picture, their scores in one table, mean and deviation over seeds.

    python -m viz.compare runs/a runs/b                    # runs/compare.png, and the results.json of both
    python -m viz.compare runs/lip_s0 runs/lip_s1 runs/lip_s2

Runs whose settings differ in the seed alone are one row: mean and standard deviation over them.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from config import load_config, user_path
from errors import UserError, run_program
from viz import pictures, plots, training


def group(runs: list[Path]) -> dict[str, list[Path]]:
    """{name: runs}: those whose config differs in seed and folder alone are together."""
    groups: dict[tuple, list[Path]] = {}
    for run in runs:
        settings = vars(load_config(run / "config.yaml")) | {"seed": 0, "out": ""}
        groups.setdefault(tuple(settings.items()), []).append(run)
    return {some[0].name + (f" ({len(some)} seeds)" if len(some) > 1 else ""): some for some in groups.values()}


def table(groups: dict[str, list[Path]]) -> str:
    """A line for each group and evaluation: mIoU, mean and pixel accuracy, iteration, hours."""
    rows = [("run", "evaluation", "mIoU", "mean acc.", "pixel acc.", "iteration", "hours")]
    for name, runs in groups.items():
        kinds = sorted({path.parent.name for run in runs for path in run.glob("evaluation*/results.json")})
        for kind in kinds:
            paths = [run / kind / "results.json" for run in runs if (run / kind / "results.json").exists()]
            found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            rows.append((name, kind + (f", {len(found)} of {len(runs)} runs" if len(found) < len(runs) else ""),
                         *(spread([100 * result[key] for result in found])
                           for key in ("miou", "mean_acc", "pixel_acc")),
                         ", ".join(sorted({str(result.get("iteration")) for result in found})),
                         spread([result.get("training", {}).get("hours") or math.nan for result in found])))
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def spread(values: list[float]) -> str:
    """72.27, or 72.27 +- 0.31 (standard deviation)."""
    mean = statistics.fmean(values)
    return f"{mean:.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def curves(groups: dict[str, list[Path]]):
    """Loss and validation mIoU of every group; of several seeds the mean, each seed pale."""
    panels = {}
    logs = {name: [training.read_log(run / "log.jsonl") for run in runs] for name, runs in groups.items()}
    for title, key, factor in (("loss", "loss", 1), ("validation mIoU, %", "miou", 100)):
        series = {}
        for name, entries in logs.items():
            points = [{e["iter"]: factor * e[key] for e in log if e.get(key) is not None} for log in entries]
            shared = sorted(set.intersection(*map(set, points)))         # iterations that all seeds have
            if shared:
                values = [[seed[it] for it in shared] for seed in points]
                series[name] = shared, values if len(values) > 1 else values[0]
        panels[title] = series
    return plots.curves(panels, size=(360, 640))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=user_path, default=Path("runs/compare.png"), help="the picture")
    args = parser.parse_args(argv)
    for run in args.runs:
        if not (run / "config.yaml").exists():
            raise UserError(f"{run}: is not the folder of a run (no config.yaml)")
    groups = group(args.runs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_png(args.out, curves(groups))
    print(table(groups) + f"\n\ncurves: {args.out}")


if __name__ == "__main__":
    run_program(main)
