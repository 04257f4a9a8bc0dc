"""Does Eq. 5 learn? Prints its gradients under both residuals and both initialisations of Eq. 6.

    python experiments/eq6.py                              full size with random weights: ten minutes, 6 GB
    python experiments/eq6.py --steps 50 lr=3e-3 sam=miniature clip=miniature clip_taps=[0,1,2,3]

After a few steps on drawn people, prints for each variant of Eq. 6 the RMS of the last gradient of Eq. 5's tokens and
of its two MLPs (AdamW's eps is 1e-8: far smaller gradients have no effect), how far the tokens have moved relative to
their norm, and the largest change of a logit, relative to the largest logit, when rho is set to zero.
"""

import argparse

import torch
from runner import ROOT
from timing import processor
from torch import Tensor

import foundations  # noqa: F401                           adds the miniature sizes
from config import load_config
from datasets import open_split, train_loader
from engine.processes import World
from errors import run_program
from files.labels import label_set
from model import build_model
from train import Learner

SETTINGS = ["sam_weights=", "clip_weights=", "vocab=", "dataset=synthetic", "crop_size=96", "synthetic_size=96",
            "base_size=96", "workers=0", "precision=fp32", "batch_size=4", "warmup_iters=1"]
VARIANTS = [("f'", "zero"), ("f'", "torch"), ("f", "zero"), ("f", "torch")]


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def measure(residual: str, init: str, args: argparse.Namespace) -> list[float]:
    """Trains one variant; returns the numbers of its row."""
    cfg = load_config(ROOT / "configs" / "lip.yaml", [*SETTINGS, *args.overrides, f"seed={args.seed}",
                                                      f"ftm_residual={residual}", f"ftm_init={init}"])
    torch.manual_seed(cfg.seed)
    learner = Learner(build_model(cfg, label_set(cfg).classes), cfg, World("cpu"))
    model, ftm, batches = learner.model, learner.model.ftm, train_loader(cfg, open_split(cfg, "train"))
    before = ftm.tokens.detach().clone()
    for it in range(args.steps):
        batch = next(batches)
        learner.step([batch], it + 1)                      # not 0, where the learning rate is near zero
    gradients = [rms(p.grad) for p in (ftm.tokens, ftm.value.weight, ftm.out.weight)]
    moved = rms(ftm.tokens.detach() - before) / rms(before)
    model.eval()
    with torch.no_grad():
        logits = model(batch[0] / 255)
        ftm.rho.zero_()
        change = (model(batch[0] / 255) - logits).abs().max() / logits.abs().max()
    return [*gradients, moved, change.item()]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config")
    args = parser.parse_intermixed_args(argv)
    print(f"{processor()}, torch {torch.__version__}; gradients after {args.steps} steps, seed {args.seed}\n"
          f"{'residual, initialisation':26}{'tokens':>10}{'inner MLP':>11}{'outer MLP':>11}{'moved':>8}{'rho = 0':>10}")
    for residual, init in VARIANTS:
        *gradients, moved, change = measure(residual, init, args)
        print(f"{residual + ', ' + init:26}{gradients[0]:10.0e}{gradients[1]:11.0e}{gradients[2]:11.0e}"
              f"{100 * moved:7.1f}%{change:10.0e}", flush=True)


if __name__ == "__main__":
    run_program(main)
