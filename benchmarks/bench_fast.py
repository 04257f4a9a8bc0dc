"""What each function of fast.py gains: the full-size network with all fast versions, and with one replaced at a time.

    python benchmarks/bench_fast.py                        a photo at 480 px and a training step of 2, fp32 and bf16
    python benchmarks/bench_fast.py --device cuda --batch 16

A fast version must save a tenth of the time of a photo or a step on some machine, and slow down a photo on none;
otherwise it is removed.
"""

from unittest import mock

import full_size
import torch
from timing import measure, options, print_machine, report

import fast
import losses
import sam_vit
import uperhead
from errors import run_program
from layers import autocast

PAIRS = {
    "SAM's attention": (sam_vit.Attention, "forward"),
    "convolution of resized maps": (uperhead, "conv_of_resized"),
    "Lovasz, class by class": (losses, "lovasz_softmax"),
    "Lovasz weights": (losses, "lovasz_weights")}
HIDDEN_ON_CPU = ("Lovasz weights",)                        # not called while another fast version is on


def variants(run, device: str) -> dict:
    """`run` with all fast versions, with one of this device's replaced by the plain version, and with none."""
    def without(owner, name):
        with mock.patch.object(owner, name, getattr(owner, name).plain):
            run()

    def all_plain():
        with mock.patch.object(fast, "ENABLED", False):
            run()

    titles = [title for title, pair in PAIRS.items()
              if device in getattr(*pair).on and not (device == "cpu" and title in HIDDEN_ON_CPU)]
    return {"all fast": run, **{f"plain: {title}": lambda pair=PAIRS[title]: without(*pair) for title in titles},
            "all plain": all_plain}


def main(argv: list[str] | None = None):
    parser = options(__doc__, rounds=3, batch=2, size=480, threads=2, device="cpu")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--only", choices=["photo", "step"], help="measure one of the two")
    args = parser.parse_args(argv)
    print_machine(f"{args.size} px, a training step of {args.batch}", args.threads, args.device)
    for precision in args.precision:
        cfg = full_size.lip_config(f"precision={precision}", f"crop_size={args.size}")
        learner = full_size.learner(full_size.network(cfg), args.device)
        batch = full_size.batch(cfg, args.batch, args.device)

        def photo():
            with torch.inference_mode(), autocast(learner.world.device, precision):
                learner.model.eval()(batch[0][:1].float() / 255)

        def step():
            learner.model.train()
            learner.step([batch], 0)                       # iteration 0: a learning rate near 0

        if args.only != "step":
            photos = {name: run for name, run in variants(photo, args.device).items() if "Lovasz" not in name}
            report(f"a photo, {precision}", measure(photos, args.rounds, precision, args.device))
        if args.only != "photo":
            steps = measure(variants(step, args.device), args.rounds, precision, args.device)
            report(f"a step of {args.batch}, {precision}", steps)


if __name__ == "__main__":
    run_program(main)
