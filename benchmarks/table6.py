"""The paper's Table 6 in miniature: small foundations, frozen; SRM, FTM, adapter and head trained on top.

    python benchmarks/table6.py                            everything below: some two hours on two CPU cores
    python benchmarks/table6.py --rows sam full --seeds 0  some rows, some seeds
    python benchmarks/table6.py --quick                    a few steps of each row: does it all run? Figures mean nothing

foundations.py makes a CLIP and a SAM of drawn people, in files of the official names. SCHNet takes them through
`clip_weights` and `sam_weights` with `freeze: true`, as it takes the real ones, in the four rows of the paper's Table 6
(configs/ablation/ with small sizes), and learns other drawn people. Beside them stand controls, which tell what causes
what, other readings of Eqs. 5 and 6, and other values of what the paper leaves open.

The last rows ask whether the foundations, made on drawn people, are of use on photos: the same ones, frozen, adapted to
the street photos of --photos (labelled as in configs/custom.yaml). Without that folder they are left out.

All runs of a seed see the same pictures in the same order and all but "from scratch" take the same number of steps.
Those train every weight from random ones, and have the CPU time that the full row of their seed took: alone, or with the
time that making the foundations took added; their learning rate follows the time used. The clock is the process's own
CPU time, batches included and scoring not: it does not depend on who else runs.

A run that is finished is kept: the same command goes on with what is missing. It leaves in --out: table.txt, table6.csv,
photos.csv, curves.png, and a file for each run.
"""

import argparse
import csv
import dataclasses
import json
import math
import multiprocessing
import queue
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import foundations
import numpy as np
import torch
from timing import processor
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import Config, load_config, to_yaml, user_path  # noqa: E402
from datasets import label_set, open_split, train_loader  # noqa: E402
from errors import UserError, run_program  # noqa: E402
from evaluate import evaluate_split, scores  # noqa: E402
from files.weights import sha256  # noqa: E402
from files.atomic import write_text  # noqa: E402
from model import SCHNet, build_model  # noqa: E402
from train import forward_backward, param_groups  # noqa: E402
from viz import pictures, plots  # noqa: E402

SMALL = [*foundations.DATA, "scale_range=[1.0, 1.0]", "photometric=false", "synthetic_train=3000", "clip_taps=[0, 1, 2, 3]",
         "clip_heads=2", "text_heads=1", "ftm_tokens=16", "prior_dim=32", "deform_heads=4", "deform_points=2",
         "drop_path=0.0", "head_dim=48", "head_dropout=0.0", "aux_weight=0.0", "batch_size=4", "lr=3e-3",
         "betas=[0.9, 0.98]", "iters=500", "warmup_iters=25", "out="]
QUICK = ["iters=6", "warmup_iters=1", "synthetic_train=64", "synthetic_val=8"]
PHOTOS = ("dataset=custom", "crop_size=[128, 96]", "scale_range=[0.75, 1.25]", "flip_pairs=[]",
          f"classes={list(load_config(ROOT / 'configs' / 'custom.yaml').classes)}")
LOOKS = 5                                                  # scored after each fifth of a run
EPS = 1e-8                                                 # AdamW's


@dataclasses.dataclass(frozen=True)
class Row:
    title: str
    config: str                                            # of configs/ablation/
    changes: tuple[str, ...] = ()
    frozen: str = "sam clip"                               # foundations that are loaded; the others are random
    shuffled: bool = False                                 # SRM gets the class similarities of other pictures
    eps: float = EPS
    time_of: str = ""                                      # a row whose CPU seconds it gets; "": cfg.iters steps
    long: bool = False                                     # and the foundations' seconds too


ROWS = {
    "clip": Row("CLIP", "clip"),
    "sam": Row("SAM", "sam"),
    "srm": Row("SAM + CLIP, SRM", "sam_clip_srm"),
    "full": Row("SAM + CLIP, SRM, FTM", "full"),
    "random": Row("full, both encoders random", "full", frozen=""),
    "random_clip": Row("SRM, CLIP random", "sam_clip_srm", frozen="sam"),
    "shuffled": Row("SRM, f_sim of other pictures", "sam_clip_srm", shuffled=True),
    "ftm": Row("SAM, FTM without SRM", "full", ("srm=false",)),
    "scratch": Row("from scratch, the same time", "full", ("freeze=false",), frozen="", time_of="full"),
    "scratch_long": Row("from scratch, time of pretraining added", "full", ("freeze=false",), frozen="", time_of="full",
                        long=True),
    "printed": Row("full, f_i as Eq. 6's residual", "full", ("ftm_residual=f",)),
    "printed_eps": Row("full, f_i and AdamW's eps 1e-15", "full", ("ftm_residual=f",), eps=1e-15),
    "scaled": Row("full, 1/sqrt(C) in Eq. 5", "full", ("ftm_scale_logits=true",)),
    "rho": Row("full, rho from 0.1", "full", ("rho_init=0.1",)),
    "scale": Row("full, sim_scale 1", "full", ("sim_scale=1.0",)),
    "sites": Row("full, srm_sites 4", "full", ("srm_sites=4",)),
    "rate": Row("full, lr 6e-4", "full", ("lr=6e-4",)),
    "patches": Row("full, patch_embed_lr_mult 0.1", "full", ("patch_embed_lr_mult=0.1",)),
    "photos": Row("photos: full, made on drawn people", "full", PHOTOS),
    "photos_random": Row("photos: full, both encoders random", "full", PHOTOS, frozen=""),
    "photos_scratch": Row("photos: from scratch, the same time", "full", (*PHOTOS, "freeze=false"), frozen="",
                          time_of="photos"),
}
PAPER = {"clip": (86.09, 68.01, 51.89), "sam": (87.20, 69.49, 54.61), "srm": (89.27, 76.86, 61.85),
         "full": (89.54, 78.12, 62.98)}                    # pixel accuracy, mean accuracy, mIoU: LIP, Table 6
PAIRS = (("sam", "clip"), ("srm", "sam"), ("full", "srm"), ("full", "scratch"), ("full", "scratch_long"),
         ("full", "random"), ("srm", "random_clip"), ("srm", "shuffled"), ("ftm", "sam"), ("full", "ftm"),
         ("full", "printed"), ("printed", "srm"), ("printed_eps", "printed"), ("scaled", "full"), ("rho", "full"),
         ("scale", "full"), ("sites", "full"), ("rate", "full"), ("patches", "full"), ("photos", "photos_random"),
         ("photos", "photos_scratch"))
CURVES = {"mIoU (%)": ("clip", "sam", "srm", "full", "random", "scratch"),
          "mIoU (%), frozen and from scratch": ("full", "random", "scratch", "scratch_long"),
          "mIoU (%), photos": ("photos", "photos_random", "photos_scratch")}


# ------------------------------------------------------------------------------------------------------------- one run

@dataclasses.dataclass(frozen=True)
class Job:
    row: str
    seed: int

    def path(self, args: argparse.Namespace) -> Path:
        return args.out / f"{self.row}_seed{self.seed}.json"


def on_photos(row: str) -> bool:
    return "dataset=custom" in ROWS[row].changes


def settings(job: Job, args: argparse.Namespace) -> Config:
    """The row's config with small sizes, and its foundations; without one, the sizes that foundations.py gives it."""
    row, made = ROWS[job.row], args.out / "foundations"
    files = {"sam": made / "sam.pth", "clip": made / "clip.pt"}
    weights = [f"{name}_weights={path if name in row.frozen else ''}" for name, path in files.items()]
    return load_config(ROOT / "configs" / "ablation" / f"{row.config}.yaml", [
        *foundations.SIZES, *SMALL, *weights, f"vocab={foundations.vocabulary()}", *(QUICK if args.quick else []),
        *row.changes, *([f"data_root={args.photos}"] if on_photos(job.row) else []), *args.overrides, f"seed={job.seed}"])


def shuffle_similarities(model: SCHNet, pairs, count: int = 256):
    """From now on SRM gets the class similarities of other pictures, some of `count`, drawn anew for each picture."""
    images = [torch.from_numpy(pairs.read(i)[0]).permute(2, 0, 1) / 255 for i in range(min(count, len(pairs)))]
    semantics, rng = model.clip_features, torch.Generator().manual_seed(0)
    with torch.no_grad():
        others = torch.cat([semantics(image[None])[0] for image in images])              # (N, K)

    def shuffled(image: Tensor) -> tuple[Tensor, list[Tensor]]:
        return others[torch.randint(len(others), (len(image),), generator=rng)], semantics(image)[1]

    model.clip_features = shuffled


def budget(job: Job, args: argparse.Namespace) -> float:
    """Seconds of CPU time that a run may use; none, where it counts steps."""
    row = ROWS[job.row]
    if not row.time_of:
        return math.inf
    seconds = record(Job(row.time_of, job.seed), args)["looks"][-1]["seconds"]
    made = [json.loads((args.out / "foundations" / f"{name}.json").read_text()) for name in ("clip", "sam")]
    return seconds + (sum(one["seconds"] for one in made) if row.long else 0)


def train_one(job: Job, args: argparse.Namespace):
    """A process: one run, scored LOOKS times; it leaves the record."""
    cfg, row, allowed = settings(job, args), ROWS[job.row], budget(job, args)
    classes, train, val = label_set(cfg).classes, open_split(cfg, "train"), open_split(cfg, "val")
    torch.manual_seed(job.seed)
    model = build_model(cfg, classes).train()
    if row.shuffled:
        shuffle_similarities(model, train)
    optimizer = torch.optim.AdamW(param_groups(model), lr=cfg.lr, betas=cfg.betas, eps=row.eps, fused=True)
    scaler, batches = torch.amp.GradScaler("cpu", enabled=False), train_loader(cfg, train)
    seconds, steps, losses, looks = 0.0, 0, [], []
    while len(looks) < LOOKS:
        begun = time.process_time()
        done = steps if allowed == math.inf else int(cfg.iters * seconds / allowed)      # the schedule's place
        losses.append(forward_backward(model, optimizer, scaler, [next(batches)], cfg, torch.device("cpu"), done)["loss"])
        optimizer.step()
        seconds, steps = seconds + time.process_time() - begun, steps + 1
        share = steps / cfg.iters if allowed == math.inf else seconds / allowed
        if share >= (len(looks) + 1) / LOOKS:
            found = scores(evaluate_split(model, val, len(classes))[0])
            looks.append({"seconds": seconds, "steps": steps, "loss": float(np.mean(losses))} | found)
            losses = []
            args.news.put(f"{row.title}, seed {job.seed}: {steps} steps, {seconds:.0f} s, loss {looks[-1]['loss']:.3f}, "
                          f"mIoU {100 * found['miou']:.2f}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    write_text(job.path(args), json.dumps(dataclasses.asdict(job) | facts(job, args) | {
        "trained": trained, "all": sum(p.numel() for p in model.parameters()), "looks": looks}))


def facts(job: Job, args: argparse.Namespace) -> dict:
    """What a record must have been made with, to be a result of today's command."""
    cfg = settings(job, args)
    files = {name: sha256(path) for name in ("sam_weights", "clip_weights") if (path := getattr(cfg, name))}
    where = "" if on_photos(job.row) else cfg.data_root                                   # no paths of a machine
    plain = dataclasses.replace(cfg, sam_weights="", clip_weights="", vocab="", data_root=where)
    return {"config": to_yaml(plain), "files": files, "eps": ROWS[job.row].eps}


def record(job: Job, args: argparse.Namespace) -> dict | None:
    """The finished run, or None; other settings than today's are an error, not a result."""
    if not job.path(args).exists():
        return None
    found = json.loads(job.path(args).read_text())
    if any(found[key] != value for key, value in facts(job, args).items()):
        raise UserError(f"{job.path(args)}: was made with other settings: choose another --out")
    return found


# ----------------------------------------------------------------------------------------------------------- all runs

def start_process(news):
    """In each process: one thread, Ctrl-C ends it without a word, and the way back to the bar."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    tqdm.set_lock(threading.RLock())                                     # its own is a semaphore, which would be left
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    start_process.news = news


def work(job: Job, args: argparse.Namespace):
    args.news = start_process.news
    train_one(job, args)


def run_all(jobs: list[Job], args: argparse.Namespace):
    """What is missing of `jobs`, some processes side by side, with one bar."""
    missing = [job for job in jobs if record(job, args) is None]
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    with (ProcessPoolExecutor(args.processes, context, start_process, (news,)) as pool,
          tqdm(total=LOOKS * len(jobs), initial=LOOKS * (len(jobs) - len(missing)), unit="look",
               mininterval=0.5 if sys.stderr.isatty() else 30) as bar):
        futures = [pool.submit(work, job, args) for job in missing]
        try:
            while not all(future.done() for future in futures) or not news.empty():
                if failed := next((f for f in futures if f.done() and f.exception()), None):
                    raise failed.exception()
                try:
                    bar.write(news.get(timeout=1), file=sys.stderr)
                    bar.update()
                except queue.Empty:
                    pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ------------------------------------------------------------------------------------------------------------- reports

def ends(runs: dict[Job, dict], row: str, key: str = "miou") -> dict[int, float]:
    """{seed: the last look's value in percent}."""
    return {job.seed: 100 * run["looks"][-1][key] for job, run in runs.items() if job.row == row}


def spread(values: list[float]) -> str:
    """Mean and standard deviation (n - 1)."""
    return f"{np.mean(values):7.2f} +- {np.std(values, ddof=1):4.2f}" if len(values) > 1 else f"{values[0]:7.2f}        "


def reached(run: dict, miou: float) -> float:
    """CPU seconds until a run's curve crosses a score; inf: never."""
    times, values = ([look[key] for look in run["looks"]] for key in ("seconds", "miou"))
    above = next((n for n, value in enumerate(values) if value >= miou), None)
    if not above:
        return math.inf if above is None else times[0]
    return float(np.interp(miou, values[above - 1:above + 1], times[above - 1:above + 1]))


def table(runs: dict[Job, dict], made: dict) -> str:
    """Foundations, rows beside the paper's, paired differences, time to a score: as lines of text."""
    clip, sam = made["clip"], made["sam"]
    lines = [f"foundations: CLIP {clip['seconds']:.0f} s, retrieval {100 * clip['retrieval']:.1f} "
             f"(chance {100 * clip['chance']:.1f}); SAM {sam['seconds']:.0f} s, mask IoU {100 * sam['mask_iou']:.1f} "
             f"(untrained {100 * sam['untrained']:.1f})", "",
             "in percent, mean +- deviation of n seeds: the paper's on LIP at full size, ours on drawn people or photos",
             f"{'':39}{'paper mIoU':>10}  {'mIoU':>14}{'pixel acc.':>16}{'mean acc.':>17}{'n':>4}{'steps':>7}{'CPU s':>7}"
             f"{'trained':>9}"]
    rows = [row for row in ROWS if ends(runs, row)]
    for row in rows:
        mine = [run for job, run in runs.items() if job.row == row]
        values = "   ".join(spread(list(ends(runs, row, key).values())) for key in ("miou", "pixel_acc", "mean_acc"))
        last = [run["looks"][-1] for run in mine]
        paper = f"{PAPER[row][2]:.2f}" if row in PAPER else "-"
        lines.append(f"{ROWS[row].title:39}{paper:>10}  {values}{len(mine):4}{np.mean([x['steps'] for x in last]):7.0f}"
                     f"{np.mean([x['seconds'] for x in last]):7.0f}{mine[0]['trained'] / 1e6:8.2f}M")
    return "\n".join([*lines, "", *differences(runs), "", *sooner(runs, rows)])


def differences(runs: dict[Job, dict]) -> list[str]:
    lines = [f"{'difference of mIoU, seed by seed':81}{'paper':>7}{'ours':>14}  each seed"]
    for a, b in PAIRS:
        first, second = ends(runs, a), ends(runs, b)
        each = [first[seed] - second[seed] for seed in first if seed in second]
        if each:
            paper = f"{PAPER[a][2] - PAPER[b][2]:+.2f}" if a in PAPER and b in PAPER else "-"
            lines.append(f"{ROWS[a].title:38} - {ROWS[b].title:40}{paper:>7} {spread(each)}  "
                         + " ".join(f"{value:+.2f}" for value in each))
    return lines


def sooner(runs: dict[Job, dict], rows: list[str]) -> list[str]:
    """CPU time until each row has what training from scratch ends with."""
    lines = ["CPU seconds until the final mIoU of training from scratch for the same time, seed by seed (-: not reached)"]
    for row in rows:
        goals = ends(runs, "photos_scratch" if on_photos(row) else "scratch")
        times = [reached(run, goals[job.seed] / 100) for job, run in runs.items() if job.row == row and job.seed in goals]
        lines.append(f"{ROWS[row].title:39}" + "".join(f"{t:8.0f}" if t < math.inf else f"{'-':>8}" for t in times))
    return lines


def write_csv(path: Path, runs: dict[Job, dict], classes: tuple[str, ...]):
    keys = ("seconds", "steps", "loss", "miou", "mean_acc", "pixel_acc")
    lines = [["row", "seed", *keys, *classes]]
    for job, run in runs.items():
        for look in run["looks"]:
            values = [*(look[key] for key in keys), *look["iou"]]
            lines.append([job.row, job.seed, *(f"{value:.5g}" for value in values)])
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def draw(path: Path, runs: dict[Job, dict]):
    panels = {}
    for heading, rows in CURVES.items():
        for row in rows:
            mine = [run["looks"] for job, run in runs.items() if job.row == row]
            if mine:
                series = panels.setdefault(heading, {})
                times = np.mean([[look["seconds"] for look in looks] for looks in mine], 0)
                series[ROWS[row].title] = (times, [[100 * look["miou"] for look in looks] for looks in mine])
    pictures.save_png(path, plots.curves(panels, "CPU seconds of training, pretraining not counted", size=(440, 600)))


def report(jobs: list[Job], args: argparse.Namespace, made: dict):
    runs = {job: run for job in jobs if (run := record(job, args))}
    place = f"{processor()}, torch {torch.__version__}, {args.processes} processes of one thread"
    text = f"{place}\n{'--quick: the figures mean nothing' + chr(10) if args.quick else ''}{table(runs, made)}\n"
    write_text(args.out / "table.txt", text)
    for name, photos in (("table6.csv", False), ("photos.csv", True)):
        some = {job: run for job, run in runs.items() if on_photos(job.row) == photos}
        if some:
            write_csv(args.out / name, some, label_set(settings(next(iter(some)), args)).classes)
    draw(args.out / "curves.png", runs)
    print(text, end="")


# ------------------------------------------------------------------------------------------------------------- program

def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps of each run, in a folder of its own")
    parser.add_argument("--out", type=user_path, help="runs/table6, or runs/table6_quick")
    parser.add_argument("--photos", type=user_path, default=str(ROOT.parent / "shared/data/ccp"),
                        help="a data set as configs/custom.yaml describes it, with its classes (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, for all rows")
    args = parser.parse_intermixed_args(argv)
    args.photos = Path(args.photos).resolve()
    if not args.photos.is_dir() and any(map(on_photos, args.rows)):
        print(f"{args.photos}: no such folder, so the rows on photos are left out (--photos)", file=sys.stderr)
        args.rows = [row for row in args.rows if not on_photos(row)]
    args.out = Path(args.out or f"runs/table6{'_quick' if args.quick else ''}").resolve()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    made = foundations.make(args.out / "foundations", **(
        {"iters": (5, 5), "changes": ["warmup_iters=1", "synthetic_train=64"]} if args.quick else {}))
    jobs = [Job(row, seed) for seed in args.seeds for row in args.rows]
    timed = [job for job in jobs if ROWS[job.row].time_of]
    first = [Job(ROWS[job.row].time_of, job.seed) for job in timed]
    run_all(list(dict.fromkeys([*first, *(job for job in jobs if job not in timed)])), args)
    run_all(timed, args)
    report(jobs, args, made)


if __name__ == "__main__":
    run_program(main, less_memory="--processes 1")
