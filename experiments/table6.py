"""The paper's Table 6 in miniature: small foundations, frozen; SRM, FTM, adapter and head trained on top.

    python experiments/table6.py                           all rows but those on photos, three seeds: about two hours
    python experiments/table6.py --rows sam srm full --seeds 8 --iters 500 --out runs/srm    rows of ROWS, seeds 0 to 7
    python experiments/table6.py --photos FOLDER           also the rows on photos, labelled as in configs/custom.yaml
    python experiments/table6.py --quick                   a few steps per row, to check that all of it runs

foundations.py makes a CLIP and a SAM of drawn people, in files like the official ones. SCHNet loads them through
`clip_weights` and `sam_weights` with `freeze: true`, as it loads the official ones, in the four rows of the paper's
Table 6 (configs/ablation/ with small sizes), and learns other drawn people. Beside them are controls, other readings of
Eqs. 5 and 6, and other values of what the paper leaves open. The rows on photos adapt the same foundations to the
photos of --photos.

All runs of a seed see the same images in the same order and, but for "from scratch", take the same number of steps.
Those train every weight from random initialisation within a budget of CPU time: that of the full row of the same seed,
or that plus the time that making the foundations took; their learning rate follows the time used.

Leaves in --out: table.txt, table6.csv and photos.csv (a line per look), differences.csv, curves.png, a file for each
run. A finished run is kept: the same command continues with the missing ones.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import runner
import torch
from runner import ROOT, Job, final, spread
from timing import processor
from torch import Tensor

import foundations
from config import Config, load_config, user_path
from errors import UserError, run_program
from files.atomic import mark_folder, write_text
from files.labels import label_set
from train import Learner

SMALL = [*foundations.DATA, "scale_range=[1.0, 1.0]", "photometric=false", "synthetic_train=3000", "ftm_tokens=16",
         "prior_dim=32", "deform_heads=4", "deform_points=2", "drop_path=0.0", "head_dim=48", "head_dropout=0.0",
         "aux_weight=0.0", "batch_size=4", "lr=3e-3", "betas=[0.9, 0.98]", "warmup_iters=25", "out="]
PHOTOS = ("dataset=custom", "crop_size=[128, 96]", "scale_range=[0.75, 1.25]", "flip_pairs=[]",
          f"classes={list(load_config(ROOT / 'configs' / 'custom.yaml').classes)}")


# ----------------------------------------------------------------------------------------------------------------------
# changes of a learner that no setting makes

def shuffle_similarities(learner: Learner, pairs, count: int = 256):
    """SRM gets the class similarities of other images: those of `count` training images, drawn for each image."""
    model, rng = learner.model, torch.Generator().manual_seed(0)
    clip_features = model.clip_features
    images = [torch.from_numpy(pairs.read(i)[0]).permute(2, 0, 1) / 255 for i in range(min(count, len(pairs)))]
    with torch.no_grad():
        others = torch.cat([clip_features(image[None])[0] for image in images])          # (N, K)

    def shuffled(image: Tensor) -> tuple[Tensor, list[Tensor]]:
        return others[torch.randint(len(others), (len(image),), generator=rng)], clip_features(image)[1]

    model.clip_features = shuffled


def smaller_eps(learner: Learner, pairs):
    for group in learner.optimizer.param_groups:
        group["eps"] = 1e-15                               # AdamW's default is 1e-8


# ----------------------------------------------------------------------------------------------------------------------
# the rows

@dataclasses.dataclass(frozen=True)
class Row:
    title: str
    config: str                                            # of configs/, with the small sizes
    overrides: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()                            # the rows it is compared with
    weights: tuple[str, ...] = ("sam", "clip")             # foundations that are loaded; the others are random
    change: Callable[[Learner, object], None] | None = None
    time_of: str = ""                                      # the row whose CPU time is its budget; "": cfg.iters steps
    pretraining: bool = False                              # adds the time of the foundations to that budget


FULL, SCRATCH = "lip", ("freeze=false",)
ROWS = {
    "clip": Row("CLIP", "ablation/clip"),
    "sam": Row("SAM", "ablation/sam", minus=("clip",)),
    "srm": Row("SAM + CLIP, SRM", "ablation/sam_clip_srm", minus=("sam", "clip", "random_clip", "shuffled")),
    "full": Row("SAM + CLIP, SRM, FTM", FULL, minus=("srm", "sam", "clip", "scratch", "scratch_long", "random", "ftm")),

    "random": Row("full, both encoders random", FULL, weights=()),
    "random_clip": Row("SRM, CLIP random", "ablation/sam_clip_srm", minus=("sam",), weights=("sam",)),
    "shuffled": Row("SRM, f_sim of other images", "ablation/sam_clip_srm", minus=("sam",), change=shuffle_similarities),
    "ftm": Row("SAM, FTM without SRM", FULL, ("srm=false",), minus=("sam",)),
    "scratch": Row("from scratch, the same time", FULL, SCRATCH, weights=(), time_of="full"),
    "scratch_long": Row("from scratch, time of pretraining added", FULL, SCRATCH, weights=(), time_of="full",
                        pretraining=True),

    "printed": Row("full, f_i as Eq. 6's residual", FULL, ("ftm_residual=f",), minus=("full", "srm")),
    "printed_eps": Row("full, f_i and AdamW's eps 1e-15", FULL, ("ftm_residual=f",), minus=("printed",),
                       change=smaller_eps),
    "printed_torch": Row("full, f_i and Eq. 6 from torch's values", FULL, ("ftm_residual=f", "ftm_init=torch"),
                         minus=("full", "printed")),
    "scaled": Row("full, 1/sqrt(C) in Eq. 5", FULL, ("ftm_scale_logits=true",), minus=("full",)),
    "rho": Row("full, rho from 0.1", FULL, ("rho_init=0.1",), minus=("full",)),
    "scale": Row("full, sim_scale 1", FULL, ("sim_scale=1.0",), minus=("full",)),
    "sites": Row("full, srm_sites 4", FULL, ("srm_sites=4",), minus=("full",)),
    "rate": Row("full, lr 6e-4", FULL, ("lr=6e-4",), minus=("full",)),
    "patches": Row("full, patch_embed_lr_mult 0.1", FULL, ("patch_embed_lr_mult=0.1",), minus=("full",)),

    "photos": Row("photos: full, made on drawn people", FULL, PHOTOS, minus=("photos_random", "photos_scratch")),
    "photos_random": Row("photos: full, both encoders random", FULL, PHOTOS, weights=()),
    "photos_scratch": Row("photos: from scratch, the same time", FULL, (*PHOTOS, *SCRATCH), weights=(),
                          time_of="photos"),
}
TITLES = {name: row.title for name, row in ROWS.items()}
PAPER = {"clip": 51.89, "sam": 54.61, "srm": 61.85, "full": 62.98}       # mIoU on LIP, Table 6
PANELS = {"mIoU (%)": ("clip", "sam", "srm", "full", "random", "scratch"),
          "mIoU (%), frozen and from scratch": ("full", "random", "scratch", "scratch_long"),
          "mIoU (%), photos": ("photos", "photos_random", "photos_scratch")}


def on_photos(name: str) -> bool:
    return ROWS[name].overrides[:len(PHOTOS)] == PHOTOS


def settings(name: str, seed: int, args: argparse.Namespace) -> Config:
    """The config of a row with small sizes and its foundations."""
    row, made = ROWS[name], args.out / "foundations"
    files = {"sam": made / foundations.SAM_FILE, "clip": made / foundations.CLIP_FILE}
    weights = [f"{encoder}_weights={path if encoder in row.weights else ''}" for encoder, path in files.items()]
    quick = ["warmup_iters=1", "synthetic_train=64", "synthetic_val=8"] if args.quick else []
    return load_config(ROOT / "configs" / f"{row.config}.yaml", [
        *SMALL, *weights, f"vocab={foundations.vocabulary()}", *quick, f"iters={args.iters}", *row.overrides,
        *([f"data_root={args.photos}"] if on_photos(name) else []), *args.overrides, f"seed={seed}"])


def train_rows(args: argparse.Namespace, made: dict) -> list[dict]:
    """The records of all rows and seeds. Rows with a budget of time come after the rows that it is taken from."""
    def job(name: str, seed: int, seconds: float = math.inf) -> Job:
        return Job(name, settings(name, seed, args), seconds, change=ROWS[name].change)

    first = [name for name in args.rows if not ROWS[name].time_of]
    timed = [name for name in args.rows if ROWS[name].time_of]
    first += [ROWS[name].time_of for name in timed if ROWS[name].time_of not in first]
    records = runner.run_jobs([job(name, seed) for seed in args.seeds for name in first], args.out)
    used = {(record["name"], record["seed"]): record["looks"][-1]["seconds"] for record in records}
    pretraining = sum(one["seconds"] for one in made.values())
    return records + runner.run_jobs([
        job(name, seed, used[ROWS[name].time_of, seed] + pretraining * ROWS[name].pretraining)
        for seed in args.seeds for name in timed], args.out)


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


def time_table(records: Sequence[dict]) -> list[str]:
    """Lines: CPU time until each row has the final score of training from scratch."""
    lines = ["CPU seconds until the final mIoU of training from scratch for the same time, by seed (-: not reached)"]
    for name in [name for name in ROWS if final(records, name)]:
        goals = final(records, "photos_scratch" if on_photos(name) else "scratch")
        times = [time_to(record, goals[record["seed"]] / 100) for record in records
                 if record["name"] == name and record["seed"] in goals]
        if times:
            lines.append(f"{TITLES[name]:39}" + "".join(f"{t:8.0f}" if t < math.inf else f"{'-':>8}" for t in times))
    return lines if len(lines) > 1 else []


def time_to(record: dict, miou: float) -> float:
    """CPU seconds until a run's curve crosses a score; inf: never."""
    times, values = ([look[key] for look in record["looks"]] for key in ("seconds", "miou"))
    above = next((n for n, value in enumerate(values) if value >= miou), None)
    if not above:
        return math.inf if above is None else times[0]
    return float(np.interp(miou, values[above - 1:above + 1], times[above - 1:above + 1]))


def report(records: Sequence[dict], made: dict, args: argparse.Namespace):
    pairs = [(a, b) for a, row in ROWS.items() for b in row.minus]
    found = runner.differences(records, pairs)
    paper = {(a, b): PAPER[a] - PAPER[b] for a, b in pairs if a in PAPER and b in PAPER}
    lines = [f"{processor()}, torch {torch.__version__}, {runner.PROCESSES} processes of one thread",
             *["--quick: the numbers mean nothing"] * args.quick, foundations.summary(made), "", *row_table(records),
             "", *runner.difference_table(found, TITLES, paper), "", *time_table(records)]
    text = "\n".join(lines).rstrip() + "\n"
    write_text(args.out / "table.txt", text)
    runner.write_differences(args.out / "differences.csv", found)
    for file, photos in (("table6.csv", False), ("photos.csv", True)):
        some = [record for record in records if on_photos(record["name"]) == photos]
        if some:
            runner.write_looks(args.out / file, some, label_set(settings(some[0]["name"], 0, args)).classes)
    runner.draw(args.out / "curves.png", records, PANELS, TITLES)
    print(text, end="")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=runner.seeds, default=range(3), metavar="N", help="seeds 0 to N - 1 (3)")
    parser.add_argument("--iters", type=int, help="training steps (500)")
    parser.add_argument("--out", type=user_path, help="folder of the results (runs/table6; --quick: runs/table6_quick)")
    parser.add_argument("--photos", type=user_path, help="folder of a data set with the classes of configs/custom.yaml")
    parser.add_argument("--quick", action="store_true", help="6 steps, foundations of 5 steps")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, for all rows")
    args = parser.parse_intermixed_args(argv)
    args.rows = args.rows or [name for name in ROWS if args.photos or not on_photos(name)]
    args.iters = args.iters or (6 if args.quick else 500)
    args.out = (args.out or Path("runs/table6_quick" if args.quick else "runs/table6")).resolve()
    if any(map(on_photos, args.rows)):
        if args.photos is None:
            raise UserError("the rows on photos need --photos FOLDER")
        args.photos = args.photos.resolve()
    mark_folder(args.out)
    made = foundations.make(args.out / "foundations", quick=args.quick)
    report(train_rows(args, made), made, args)


if __name__ == "__main__":
    run_program(main)
