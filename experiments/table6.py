"""The paper's Table 6 in miniature: small frozen encoders; SRM, FTM, adapter and head are trained.

    python experiments/table6.py --rows clip sam srm full printed_torch --seeds 8       five rows, seeds 0 to 7
    python experiments/table6.py --quick                   a few steps per row, to test this script

foundations.py trains a CLIP and a SAM on drawn people. SCHNet loads them like the official files, frozen, and is
trained on other drawings. The rows are those of the paper's Table 6 (configs/ablation/ with small sizes), the fourth in
four variants for the two residuals and the two initialisations of Eq. 6, and controls.

Runs of one seed initialise the parts they share to the same values and see the same images in the same order. All take
the same number of steps, except the "from scratch" and "long" rows. From scratch, every weight is trained for the CPU
time of `printed_torch`, at three learning rates; in the long rows, for that time and what both encoders took.

Writes to --out: table.txt, table6.csv (a line per run), differences.csv and a file per run. Finished runs are kept: the
same command trains the missing ones.
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
    config: str                                            # a file of configs/; SMALL is added
    overrides: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()                            # rows to compare with
    weights: tuple[str, ...] = ("sam", "clip")             # encoders that are loaded; the others are random
    time_of: str = ""                                      # row whose CPU time is the budget; "": cfg.iters steps
    long: bool = False                                     # the budget includes the training of the encoders


FULL, EQ_6 = "lip", ("ftm.first", "ftm.second", "ftm.third")
ROWS = {
    "clip": Row("CLIP", "ablation/clip"),
    "sam": Row("SAM", "ablation/sam", minus=("clip",)),
    "srm": Row("SAM + CLIP, SRM", "ablation/sam_clip_srm", minus=("sam", "clip")),
    # the residual of Eq. 6: f'_i, or f_i as printed; its last MLP initialised to zero, or by torch
    "full": Row("full, Eq. 6: f'_i, zero", FULL, ("ftm_residual=f'", "ftm_init=zero"), minus=("srm", "sam", "clip")),
    "full_torch": Row("full, Eq. 6: f'_i, torch", FULL, ("ftm_residual=f'", "ftm_init=torch"), minus=("full", "srm")),
    "printed": Row("full, Eq. 6: f_i, zero", FULL, ("ftm_residual=f", "ftm_init=zero"), minus=("full", "srm")),
    "printed_torch": Row("full, Eq. 6: f_i, torch", FULL, ("ftm_residual=f", "ftm_init=torch"),
                         minus=("full", "printed", "full_torch", "srm", "sam", "clip")),
    "random": Row("full, both encoders random", FULL, weights=(), minus=("full", "printed_torch")),
    "random_clip": Row("SRM, CLIP random", "ablation/sam_clip_srm", minus=("srm", "sam"), weights=("sam",)),
    **{f"scratch_{lr}": Row(f"from scratch, lr {lr}", FULL, ("freeze=false", f"lr={lr}"), minus=("printed_torch",),
                            weights=(), time_of="printed_torch") for lr in ("1e-3", "3e-3", "1e-2")},
    "long": Row("full, long", FULL, minus=("printed_torch",), time_of="printed_torch", long=True),
    "scratch_long": Row("from scratch, long", FULL, ("freeze=false",), minus=("printed_torch", "long"), weights=(),
                        time_of="printed_torch", long=True),
}
TITLES = {name: row.title for name, row in ROWS.items()}
PAPER = {"clip": 51.89, "sam": 54.61, "srm": 61.85, "full": 62.98, "printed_torch": 62.98}      # mIoU on LIP, Table 6


def build(cfg: Config, classes: Sequence[str]) -> SCHNet:
    """The network of a row; parts of the full network have the same initial values in all rows of a seed."""
    full = build_model(dataclasses.replace(cfg, backbone="sam", srm=True, ftm=True, ftm_init="zero"), classes)
    model = build_model(cfg, classes)
    own = model.state_dict()
    model.load_state_dict(own | {name: tensor for name, tensor in full.state_dict().items()
                                 if name in own and own[name].shape == tensor.shape
                                 and not (cfg.ftm_init == "torch" and name.startswith(EQ_6))})
    return model


def small_config(name: str, folder: Path, overrides: Sequence[str], weights: Sequence[str] = ("sam", "clip")) -> Config:
    """configs/NAME.yaml with small sizes; the encoders named in `weights` are loaded from `folder`."""
    files = {"sam": folder / foundations.SAM_FILE, "clip": folder / foundations.CLIP_FILE}
    given = [f"{encoder}_weights={path if encoder in weights else ''}" for encoder, path in files.items()]
    return load_config(ROOT / "configs" / f"{name}.yaml",
                       [*SMALL, *given, f"vocab={foundations.vocabulary()}", *overrides])


def settings(name: str, seed: int, args: argparse.Namespace) -> Config:
    """The config of a row."""
    row = ROWS[name]
    quick = ["warmup_iters=1", "synthetic_train=64", "synthetic_val=8"] if args.quick else []
    return small_config(row.config, args.out / "foundations", [
        *quick, f"iters={args.iters}", *row.overrides, *args.overrides, f"seed={seed}"], row.weights)


def train_rows(args: argparse.Namespace, encoders: dict) -> list[dict]:
    """Trains all rows and seeds, those with a time budget last; returns their records."""
    def job(name: str, seed: int, seconds: float = math.inf) -> Job:
        return Job(name, settings(name, seed, args), seconds, build=build)

    first = [name for name in args.rows if not ROWS[name].time_of]
    timed = [name for name in args.rows if ROWS[name].time_of]
    first += [ROWS[name].time_of for name in timed if ROWS[name].time_of not in first]
    records = runner.run_jobs([job(name, seed) for seed in range(args.seeds) for name in first], args.out)
    used = {(record["name"], record["seed"]): record["looks"][-1]["seconds"] for record in records}
    more = sum(encoder["seconds"] for encoder in encoders.values())
    return records + runner.run_jobs([
        job(name, seed, used[ROWS[name].time_of, seed] + more * ROWS[name].long)
        for seed in range(args.seeds) for name in timed], args.out)


# ----------------------------------------------------------------------------------------------------------------------
# the report

def row_table(records: Sequence[dict]) -> list[str]:
    lines = ["percent, mean +- standard deviation over n seeds; the paper: LIP, full size",
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


def report(records: Sequence[dict], encoders: dict, args: argparse.Namespace):
    pairs = [(a, b) for a, row in ROWS.items() for b in row.minus]
    differences = runner.differences(records, pairs)
    paper = {(a, b): PAPER[a] - PAPER[b] for a, b in pairs if a in PAPER and b in PAPER}
    lines = [f"{processor()}, torch {torch.__version__}, {runner.PROCESSES} processes of one thread",
             *["--quick: the numbers mean nothing"] * args.quick, foundations.summary(encoders), "",
             *row_table(records), "", *runner.difference_table(differences, TITLES, paper)]
    runner.write_report(args.out, lines, differences)
    runner.write_looks(args.out / "table6.csv", records, label_set(settings("full", 0, args)).classes)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trains seeds 0 to N - 1 (3)")
    parser.add_argument("--iters", type=int, help="training steps (500)")
    parser.add_argument("--out", type=user_path, help="folder of the results (runs/table6; --quick: runs/table6_quick)")
    parser.add_argument("--quick", action="store_true", help="6 steps, encoders of 5 steps")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, for all rows")
    args = parser.parse_intermixed_args(argv)
    args.iters = args.iters or (6 if args.quick else 500)
    args.out = (args.out or Path("runs/table6_quick" if args.quick else "runs/table6")).resolve()
    mark_folder(args.out)
    encoders = foundations.make(args.out / "foundations", quick=args.quick)
    report(train_rows(args, encoders), encoders, args)


if __name__ == "__main__":
    run_program(main)
