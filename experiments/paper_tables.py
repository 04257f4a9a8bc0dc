"""Prints the paper's Tables 2 to 6 with this project's results; with --train, trains and scores what is missing.

    python experiments/paper_tables.py                             tables from the results.json files in runs/
    python experiments/paper_tables.py --train --gpus 4            trains and scores the missing rows first
    python experiments/paper_tables.py --train --rows clip sam srm full seed=1 --runs runs/seed1        Table 6 alone

`key=value` is passed to train.py. Interrupted runs are resumed, existing results are kept. Where best.pt was chosen on
the images that are scored, the table shows last.pt, then best.pt. Table 1, the IoU of each class, is printed
by evaluate.py.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from runner import ROOT

from config import user_path
from errors import UserError, run_program
from viz.reports import PUBLISHED

SCORES = "pixel_acc", "mean_acc", "miou"


class Row(NamedTuple):
    title: str
    config: str                                            # a file of configs/, and the folder of the run
    tta: bool
    paper: dict[str, float]


ROWS = {
    "clip": Row("CLIP", "ablation/clip", False, dict(zip(SCORES, (86.09, 68.01, 51.89)))),
    "sam": Row("SAM", "ablation/sam", False, dict(zip(SCORES, (87.20, 69.49, 54.61)))),
    "srm": Row("SAM + CLIP, SRM", "ablation/sam_clip_srm", False, dict(zip(SCORES, (89.27, 76.86, 61.85)))),
    "full": Row("SAM + CLIP, SRM, FTM", "lip", False, PUBLISHED["lip", False]),
    "lip": Row("LIP with TTA", "lip", True, PUBLISHED["lip", True]),
    "ppp": Row("PASCAL-Person-Part with TTA", "ppp", True, PUBLISHED["ppp", True]),
    "cihp": Row("CIHP with TTA", "cihp", True, PUBLISHED["cihp", True]),
}
TABLES = {"Table 6: LIP, single scale": ("clip", "sam", "srm", "full"), "Table 2: LIP": ("full", "lip"),
          "Table 4: PASCAL-Person-Part": ("ppp",), "Table 5: CIHP": ("cihp",)}


def results(row: Row, runs: Path) -> Path:
    return runs / row.config / ("evaluation_tta" if row.tta else "evaluation") / "results.json"


def read(row: Row, runs: Path) -> dict | None:
    path = results(row, runs)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def complete(row: Row, args: argparse.Namespace):
    """Trains a row, or resumes its training, and scores it."""
    run, overrides = args.runs / row.config, [*args.overrides, f"out={args.runs / row.config}"]
    for program, *options in (("train.py", "--cfg", f"{ROOT}/configs/{row.config}.yaml", "--resume", *overrides),
                              ("evaluate.py", "--checkpoint", str(run), *["--tta"] * row.tta)):
        print(f"\n{program} {' '.join(options)}", flush=True)
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.gpus)] if args.gpus > 1 else []
        if code := subprocess.run([sys.executable, *launcher, str(ROOT / program), *options]).returncode:
            raise UserError(f"{program} ended with exit code {code}")


def table_row(row: Row, runs: Path) -> str:
    """The paper's scores and ours; of last.pt, if best.pt was chosen on the scored images."""
    text = f"{row.title:30}" + "".join(f"{row.paper[key]:8.2f}" if key in row.paper else f"{'-':>8}" for key in SCORES)
    record = read(row, runs)
    if record is None:
        return text + "   not run"
    shown = record["last"] or record
    text += "  " + "".join(f"{100 * shown[key]:8.2f}" for key in SCORES)
    text += f"{100 * shown['miou'] - row.paper['miou']:+10.2f}   iteration {shown['iteration']}"
    return text + (f"; best.pt, chosen on these images: {100 * record['miou']:.2f}" if record["last"] else "")


def training_table(runs: Path) -> list[str]:
    costs = {row.config: record["training"] for row in ROWS.values() if (record := read(row, runs))}
    lines = [f"{config:30}{cost['hours']:.1f} hours on {cost['machine']}" for config, cost in costs.items()]
    return ["", "Table 3: training; the paper: 17 hours on 4 A5000", *(lines or ["not run"])]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train and score what has no results.json")
    parser.add_argument("--gpus", type=int, default=1, help="processes per training")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--runs", type=user_path, default=Path("runs"), help="folder of the runs (runs)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides for train.py")
    args = parser.parse_intermixed_args(argv)
    for name in args.rows if args.train else ():
        if not results(ROWS[name], args.runs).exists():
            complete(ROWS[name], args)
    head = "".join(f"{name:>8}" for name in ("pixel", "mean", "mIoU"))
    lines = [f"{'in percent':30}{head}  {head}{'mIoU':>10}", f"{'':30}{'paper':>24}  {'ours':>24}{'difference':>11}"]
    for title, names in TABLES.items():
        lines += ["", title, *(table_row(ROWS[name], args.runs) for name in names)]
    print("\n".join([*lines, *training_table(args.runs)]))


if __name__ == "__main__":
    run_program(main)
