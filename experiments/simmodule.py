"""Does SimModule's f_sim (Eq. 1) help SRM, and does it predict the classes in an image? In miniature.

    python experiments/simmodule.py --seeds 5 --iters 1000        about three CPU hours, with table6.py's encoders
    python experiments/simmodule.py --quick                       a few steps per row, to test this script

Beside SAM alone and the full network, the rows are SAM + CLIP with SRM on the encoders of foundations.py. They differ
in f_sim, one in f_cv:

  * f_sim as it is; of other images; or another reading of "the possibility of each category", as a softmax without
    the background's sentence or as a sigmoid per class;
  * positive control: the true presence of each class (1 if the label shows it), and that of other images. If the first
    is not better than the second, these runs cannot show what f_sim is worth;
  * Eq. 4 alone: f_cv = 0, so that no feature of CLIP reaches SAM.

Each network is scored twice: as it is, and with the logits of absent classes masked; the gain is what knowing the
classes is still worth. The area under the ROC curve (AUC; chance 50) shows how well f_sim itself predicts the presence
of each class.
"""

import argparse
import functools
import math
from pathlib import Path

import numpy as np
import runner
import torch
from runner import Job, final, spread
from timing import processor
from torch import Tensor

import foundations
import table6
from config import user_path
from datasets import open_split
from errors import run_program
from evaluate import confusion_matrix, scores
from files.atomic import mark_folder
from files.labels import label_set
from layers import autocast
from train import Learner

ROWS = {
    "sam": "SAM alone",
    "eq4": "Eq. 4 alone (f_cv = 0)",
    "srm": "f_sim as it is",
    "others": "f_sim of other images",
    "no_background": "softmax without the background",
    "sigmoid": "sigmoid for each class",
    "presence": "true presence of classes",
    "presence_others": "true presence of other images",
    "full": "f_sim as it is, with FTM",
}
PAIRS = (("srm", "sam"), ("eq4", "sam"), ("srm", "eq4"), ("srm", "others"), ("presence", "presence_others"),
         ("presence", "srm"), ("no_background", "srm"), ("sigmoid", "srm"), ("full", "srm"), ("full", "sam"))


# ----------------------------------------------------------------------------------------------------------------------
# what SRM receives

class Semantics:
    """Replaces SCHNet.clip_features: returns another f_sim or f_cv."""

    def __init__(self, learner: Learner, pairs, kind: str):
        self.model, self.kind, self.given = learner.model, kind, None
        self.features, self.rng = learner.model.clip_features, torch.Generator().manual_seed(0)
        count = range(min(256, len(pairs)))
        images, labels = zip(*(pairs.read(i) for i in count))
        if kind == "presence_others":
            self.pool = foundations.presence(torch.from_numpy(np.stack(labels)), self.model.srm.expand.in_features)
        elif kind == "others":
            with torch.no_grad():
                batches = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).split(32)
                self.pool = torch.cat([self.features(batch / 255)[0] for batch in batches])

    def __call__(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        f_sim, f_cv = self.features(image)
        if self.kind in ("others", "presence_others"):
            f_sim = self.pool[torch.randint(len(self.pool), (len(image),), generator=self.rng)]
        elif self.kind == "presence":
            f_sim = self.given
        elif self.kind == "eq4":
            f_cv = [torch.zeros_like(f) for f in f_cv]
        elif self.kind in ("no_background", "sigmoid"):
            f_sim = reading(self.kind, f_sim)
        return f_sim, f_cv


def reading(kind: str, f_sim: Tensor) -> Tensor:
    """Another reading of "the possibility of each category", from the softmax (B, K). A softmax determines its logits
    up to a constant per image: "no_background" cancels it, "sigmoid" makes their mean zero."""
    logits = f_sim.clamp(min=1e-12).log()
    if kind == "no_background":
        return torch.cat([torch.zeros_like(f_sim[:, :1]), logits[:, 1:].softmax(1)], 1)
    return (logits - logits.mean(1, keepdim=True)).sigmoid()


def change(learner: Learner, pairs, kind: str):
    """Gives SRM the row's f_sim and f_cv; the true presence comes with each batch's labels."""
    if kind in ("sam", "srm", "full"):
        return
    semantics = learner.model.clip_features = Semantics(learner, pairs, kind)
    losses = learner.losses

    def with_presence(image: Tensor, label: Tensor) -> dict[str, Tensor]:
        semantics.given = foundations.presence(label, learner.model.srm.expand.in_features)
        return losses(image, label)

    learner.losses = with_presence


@torch.inference_mode()
def score(learner: Learner, pairs, count: int) -> dict:
    """Scores over a complete split; "masked": the mIoU with the logits of absent classes masked."""
    model, semantics = learner.model.eval(), getattr(learner.model, "clip_features", None)
    matrix, masked = (torch.zeros(count, count, dtype=torch.int64) for _ in range(2))
    for image, label in foundations.images_of(pairs):
        shown = foundations.presence(label, count)
        if isinstance(semantics, Semantics):
            semantics.given = shown
        with autocast(image.device, model.cfg.precision):
            logits = model(image)
        masked_logits = logits.masked_fill(shown[:, :, None, None] == 0, -math.inf)
        matrix += confusion_matrix(logits.argmax(1), label, count)
        masked += confusion_matrix(masked_logits.argmax(1), label, count)
    model.train()
    return scores(matrix) | {"masked": scores(masked)["miou"]}


# ----------------------------------------------------------------------------------------------------------------------
# how well f_sim predicts the classes

@torch.no_grad()
def auc(args: argparse.Namespace) -> list[str]:
    """A table as lines of text: the AUC of each class's presence, for f_sim and its other readings."""
    cfg = settings("srm", 0, args)
    clip = foundations.load_clip(cfg.clip_weights, cfg.clip_taps, cfg.clip, cfg.clip_activation)
    f_txt, names, f_cls, shown = clip.encode_text(foundations.prompts(cfg)), label_set(cfg).classes, [], []
    for image, label in foundations.images_of(open_split(cfg, "val")):
        f_cls.append(clip.visual(image)[0])
        shown.append(foundations.presence(label, len(names)))
    cosine, shown, scale = torch.cat(f_cls) @ f_txt.T, torch.cat(shown) > 0, clip.logit_scale.exp()
    f_sim = (scale * cosine).softmax(1)
    readings = {"softmax": f_sim, "no background": reading("no_background", f_sim), "sigmoid": cosine}
    first = torch.bincount(f_sim.argmax(1), minlength=len(names))
    lines = [f"AUC of a class's presence in {len(shown)} held-out drawings, in percent; learned scale {scale:.1f}; "
             f"largest f_sim: {names[int(first.argmax())]} in {int(first.max())}",
             f"{'':20}" + "".join(f"{name:>15}" for name in readings) + f"{'shown in':>12}"]
    table = [[area(values[:, k], shown[:, k]) for values in readings.values()] for k in range(len(names))]
    for name, row, rate in zip(names, table, shown.float().mean(0)):
        lines.append(f"{name:20}" + "".join(f"{value:15.1f}" for value in row) + f"{100 * rate:11.0f}%")
    return [*lines, f"{'mean':20}" + "".join(f"{value:15.1f}" for value in np.nanmean(table, 0))]


def area(values: Tensor, truth: Tensor) -> float:
    """Percent of pairs (shown, not shown) in which the shown one has the larger value; ties count half."""
    if not truth.any() or truth.all():
        return math.nan
    shown, not_shown = values[truth, None], values[~truth]
    return 100 * ((shown > not_shown).double() + 0.5 * (shown == not_shown)).mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# the program

def settings(name: str, seed: int, args: argparse.Namespace):
    config = {"sam": "ablation/sam", "full": "lip"}.get(name, "ablation/sam_clip_srm")
    eq_6 = table6.ROWS["full"].overrides
    encoders = args.out.parent / "foundations" if not args.quick else args.out / "foundations"
    quick = ["warmup_iters=1", "synthetic_train=64", "synthetic_val=20"] if args.quick else ["synthetic_val=1000"]
    return table6.small_config(config, encoders, [*eq_6, *quick, f"iters={args.iters}", f"seed={seed}"])


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="trains seeds 0 to N - 1 (5)")
    parser.add_argument("--iters", type=int, help="training steps (1000)")
    parser.add_argument("--out", type=user_path, help="(runs/table6/simmodule); the encoders are in ../foundations")
    parser.add_argument("--quick", action="store_true", help="6 steps, encoders of 5 steps")
    args = parser.parse_args(argv)
    args.iters = args.iters or (6 if args.quick else 1000)
    args.out = (args.out or Path("runs/simmodule_quick" if args.quick else "runs/table6/simmodule")).resolve()
    mark_folder(args.out)
    encoders = foundations.make((args.out if args.quick else args.out.parent) / "foundations", quick=args.quick)
    jobs = [Job(name, settings(name, seed, args), build=table6.build, score=score,
                change=functools.partial(change, kind=name)) for seed in range(args.seeds) for name in args.rows]
    records = runner.run_jobs(jobs, args.out)
    lines = [f"{processor()}, torch {torch.__version__}, {runner.PROCESSES} x one thread, {args.iters} steps",
             foundations.summary(encoders), "", f"{'':32}{'mIoU':>14}{'masked':>17}{'gain':>16}{'n':>4}{'CPU s':>7}"]
    for name in args.rows:
        plain, masked = final(records, name), final(records, name, "masked")
        seconds = np.mean([record["looks"][-1]["seconds"] for record in records if record["name"] == name])
        gain = [masked[seed] - plain[seed] for seed in plain]
        columns = "   ".join(spread(values) for values in ([*plain.values()], [*masked.values()], gain))
        lines.append(f"{ROWS[name]:32}{columns}{len(plain):4}{seconds:7.0f}")
    pairs = [pair for pair in PAIRS if set(pair) <= set(args.rows)]
    differences = runner.differences(records, pairs)
    table = runner.difference_table(differences, ROWS)
    runner.write_report(args.out, [*lines, "", *table, "", *auc(args)], differences)


if __name__ == "__main__":
    run_program(main)
