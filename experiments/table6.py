"""The paper's Table 6 in miniature: small foundations, frozen; SRM, FTM, adapter and head trained on top.

    python experiments/table6.py --rows clip sam srm full printed_torch --seeds 8       rows of ROWS, seeds 0 to 7
    python experiments/table6.py --quick                   a few steps per row, to check that all of it runs

foundations.py makes a CLIP and a SAM of drawn people, in files like the official ones. SCHNet loads them through
`clip_weights` and `sam_weights` with `freeze: true`, as it loads the official ones, in the four rows of the paper's
Table 6 (configs/ablation/ with small sizes), and learns other drawn people. The fourth row has four forms, for the two
residuals and the two initialisations of Eq. 6. Beside them are controls.

All runs of a seed begin with the same values where they have the same parts, see the same images in the same order and,
but for "from scratch", take the same number of steps. Those train every weight from random initialisation within the
CPU time of the row `full` of the same seed; their learning rate follows the time used.

Leaves in --out: table.txt, table6.csv (a line per run), differences.csv, a file for each run. A finished run is kept:
the same command continues with the missing ones.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import runner
import torch
from runner import ROOT, Job, final, spread
from timing import processor

import foundations
from config import Config, load_config, user_path
from errors import run_program
from files.atomic import mark_folder
from files.labels import label_set
from model import SCHNet, build_model

SMALL = [*foundations.DATA, "scale_range=[1.0, 1.0]", "photometric=false", "synthetic_train=3000", "ftm_tokens=16",
         "prior_dim=32", "deform_heads=4", "deform_points=2", "drop_path=0.0", "head_dim=48", "head_dropout=0.0",
         "aux_weight=0.0", "batch_size=4", "synthetic_val=500", "lr=3e-3", "betas=[0.9, 0.98]",
         "warmup_iters=25", "out="]


# ----------------------------------------------------------------------------------------------------------------------
# the rows

@dataclasses.dataclass(frozen=True)
class Row:
    title: str
    config: str                                            # of configs/, with the small sizes
    overrides: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()                            # the rows it is compared with
    weights: tuple[str, ...] = ("sam", "clip")             # foundations that are loaded; the others are random
    time_of: str = ""                                      # the row whose CPU time is its budget; "": cfg.iters steps


FULL, EQ_6 = "lip", ("ftm.first", "ftm.second", "ftm.third")
ROWS = {
    "clip": Row("CLIP", "ablation/clip"),
    "sam": Row("SAM", "ablation/sam", minus=("clip",)),
    "srm": Row("SAM + CLIP, SRM", "ablation/sam_clip_srm", minus=("sam", "clip")),
    # Eq. 6 with f'_i or with f_i (as printed) as its residual; its MLPs from zero or from torch's initialisation
    "full": Row("full, Eq. 6: f'_i, zero", FULL, ("ftm_residual=f'", "ftm_init=zero"), minus=("srm", "sam", "clip")),
    "full_torch": Row("full, Eq. 6: f'_i, torch", FULL, ("ftm_residual=f'", "ftm_init=torch"), minus=("full", "srm")),
    "printed": Row("full, Eq. 6: f_i, zero", FULL, ("ftm_residual=f", "ftm_init=zero"), minus=("full", "srm")),
    "printed_torch": Row("full, Eq. 6: f_i, torch", FULL, ("ftm_residual=f", "ftm_init=torch"),
                         minus=("full", "printed", "full_torch", "srm", "sam", "clip")),
    "random": Row("full, both encoders random", FULL, weights=(), minus=("full", "printed_torch")),
    "random_clip": Row("SRM, CLIP random", "ablation/sam_clip_srm", minus=("srm", "sam"), weights=("sam",)),
    "scratch": Row("from scratch, the same time", FULL, ("freeze=false",), minus=("full", "printed_torch"), weights=(),
                   time_of="full"),
}
TITLES = {name: row.title for name, row in ROWS.items()}
PAPER = {"clip": 51.89, "sam": 54.61, "srm": 61.85, "full": 62.98, "printed_torch": 62.98}      # mIoU on LIP, Table 6


def build(cfg: Config, classes: Sequence[str]) -> SCHNet:
    """The network of a row. What it shares with the full network has the same initial values in all rows of a seed."""
    full = build_model(dataclasses.replace(cfg, backbone="sam", srm=True, ftm=True, ftm_init="zero"), classes)
    model = build_model(cfg, classes)
    own = model.state_dict()
    model.load_state_dict(own | {name: tensor for name, tensor in full.state_dict().items()
                                 if name in own and own[name].shape == tensor.shape
                                 and not (cfg.ftm_init == "torch" and name.startswith(EQ_6))})
    return model


def small_config(name: str, made: Path, overrides: Sequence[str], weights: Sequence[str] = ("sam", "clip")) -> Config:
    """configs/NAME.yaml with small sizes and the foundations in `made` of the encoders `weights`."""
    files = {"sam": made / foundations.SAM_FILE, "clip": made / foundations.CLIP_FILE}
    given = [f"{encoder}_weights={path if encoder in weights else ''}" for encoder, path in files.items()]
    return load_config(ROOT / "configs" / f"{name}.yaml",
                       [*SMALL, *given, f"vocab={foundations.vocabulary()}", *overrides])


def settings(name: str, seed: int, args: argparse.Namespace) -> Config:
    """The config of a row."""
    row = ROWS[name]
    quick = ["warmup_iters=1", "synthetic_train=64", "synthetic_val=8"] if args.quick else []
    return small_config(row.config, args.out / "foundations", [
        *quick, f"iters={args.iters}", *row.overrides, *args.overrides, f"seed={seed}"], row.weights)


def train_rows(args: argparse.Namespace) -> list[dict]:
    """The records of all rows and seeds. Rows with a budget of time come after the rows that it is taken from."""
    def job(name: str, seed: int, seconds: float = math.inf) -> Job:
        return Job(name, settings(name, seed, args), seconds, build=build)

    first = [name for name in args.rows if not ROWS[name].time_of]
    timed = [name for name in args.rows if ROWS[name].time_of]
    first += [ROWS[name].time_of for name in timed if ROWS[name].time_of not in first]
    records = runner.run_jobs([job(name, seed) for seed in range(args.seeds) for name in first], args.out)
    used = {(record["name"], record["seed"]): record["looks"][-1]["seconds"] for record in records}
    return records + runner.run_jobs([
        job(name, seed, used[ROWS[name].time_of, seed]) for seed in range(args.seeds) for name in timed], args.out)


# ----------------------------------------------------------------------------------------------------------------------
# the report

def row_table(records: Sequence[dict]) -> list[str]:
    lines = ["in percent, mean +- standard deviation of n seeds; the paper: on LIP at full size",
             f"{'':39}{'paper mIoU':>10}  {'mIoU':>14}{'pixel acc.':>16}{'mean acc.':>17}{'n':>4}{'steps':>7}"
             f"{'CPU s':>7}{'trained':>9}"]
    for name in [name for name in ROWS if final(records, name)]:
        mine = [record for record in records if record["name"] == name]
        values = "   ".join(spread([*final(records, name, key).values()]) for key in ("miou", "pixel_acc", "mean_acc"))
        steps, seconds = (np.mean([record["looks"][-1][key] for record in mine]) for key in ("steps", "seconds"))
        paper = f"{PAPER[name]:.2f}" if name in PAPER else "-"
        lines.append(f"{TITLES[name]:39}{paper:>10}  {values}{len(mine):4}{steps:7.0f}{seconds:7.0f}"
                     f"{mine[0]['trained'] / 1e6:8.2f}M")
    return lines


def report(records: Sequence[dict], made: dict, args: argparse.Namespace):
    pairs = [(a, b) for a, row in ROWS.items() for b in row.minus]
    found = runner.differences(records, pairs)
    paper = {(a, b): PAPER[a] - PAPER[b] for a, b in pairs if a in PAPER and b in PAPER}
    lines = [f"{processor()}, torch {torch.__version__}, {runner.PROCESSES} processes of one thread",
             *["--quick: the numbers mean nothing"] * args.quick, foundations.summary(made), "", *row_table(records),
             "", *runner.difference_table(found, TITLES, paper)]
    runner.write_report(args.out, lines, found)
    runner.write_looks(args.out / "table6.csv", records, label_set(settings("full", 0, args)).classes)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trains seeds 0 to N - 1 (3)")
    parser.add_argument("--iters", type=int, help="training steps (500)")
    parser.add_argument("--out", type=user_path, help="folder of the results (runs/table6; --quick: runs/table6_quick)")
    parser.add_argument("--quick", action="store_true", help="6 steps, foundations of 5 steps")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, for all rows")
    args = parser.parse_intermixed_args(argv)
    args.iters = args.iters or (6 if args.quick else 500)
    args.out = (args.out or Path("runs/table6_quick" if args.quick else "runs/table6")).resolve()
    mark_folder(args.out)
    made = foundations.make(args.out / "foundations", quick=args.quick)
    report(train_rows(args), made, args)


if __name__ == "__main__":
    run_program(main)
