"""What each pair of fast.py buys: the whole network with all faster forms, and with one of them after the other plain.

    python benchmarks/bench_fast.py                        a photo at 480 px and a training step of 2, fp32 and bf16
    python benchmarks/bench_fast.py --device cuda --batch 16

A pair that buys less than a tenth of a photo's time or of a step's on no machine has no place in fast.py.
"""

import contextlib
import sys
from pathlib import Path

import torch
from timing import begin, measure, options, report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import adapter  # noqa: E402
import fast  # noqa: E402
import losses  # noqa: E402
import sam_vit  # noqa: E402
import train  # noqa: E402
import uperhead  # noqa: E402
from config import load_config  # noqa: E402
from inference import autocast, cast_frozen  # noqa: E402
from model import build_model  # noqa: E402

PAIRS = {
    "SAM's attention, a CPU's form": (sam_vit.Attention, "forward"),
    "SAM's attention, fused": (sam_vit.Attention, "attend"),
    "deformable attention": (adapter, "ms_deform_attn"),
    "convolution of resized maps": (uperhead, "conv_of_resized"),
    "Lovasz, class by class": (losses, "lovasz_softmax"),
    "Lovasz weights": (losses, "lovasz_weights")}
ALL = "all faster forms"


@contextlib.contextmanager
def plain(owner, name: str):
    chosen = getattr(owner, name)
    setattr(owner, name, chosen.plain)
    yield
    setattr(owner, name, chosen)


def variants(run, device: str) -> dict:
    """`run` as it is, with each pair of this device plain, and with none of the faster forms."""
    def without(owner, name):
        with plain(owner, name):
            run()

    def with_none():
        fast.ENABLED = False
        run()
        fast.ENABLED = True

    pairs = {f"plain: {title}": pair for title, pair in PAIRS.items() if device in getattr(*pair).on}
    if device == "cpu":                                    # hidden behind the other form of SAM's attention
        del pairs["plain: SAM's attention, fused"]
        pairs.pop("plain: Lovasz weights", None)           # and behind the other form of the loss
    return {ALL: run, **{title: lambda pair=pair: without(*pair) for title, pair in pairs.items()}, "all plain": with_none}


def main():
    parser = options(__doc__, rounds=3, batch=2, size=480, threads=2, device="cpu")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--only", choices=["photo", "step"], help="one of the two")
    args = parser.parse_args()
    device = torch.device(args.device)
    begin(f"{args.size} px, a training step of {args.batch}", args.threads, args.device)
    for precision in args.precision:
        cfg = load_config(ROOT / "configs/lip.yaml", ["sam_weights=", "clip_weights=", "vocab=", f"precision={precision}",
                                                      f"crop_size={args.size}"])
        model = build_model(cfg, [f"class {n}" for n in range(20)])
        cast_frozen(model, precision)
        model.to(device)
        image = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8, device=device)
        label = torch.randint(0, 20, (args.batch, args.size // 16, args.size // 16), dtype=torch.uint8, device=device)
        label = label.repeat_interleave(16, 1).repeat_interleave(16, 2)
        optimizer = torch.optim.AdamW(train.param_groups(model), lr=1e-6, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=False)

        def photo():
            with torch.inference_mode(), autocast(device, precision):
                model.eval()(image[:1].float() / 255)

        def step():
            model.train()
            train.forward_backward(model, optimizer, scaler, [(image, label, [])], cfg, device, cfg.warmup_iters)
            optimizer.step()

        if args.only != "step":
            photos = {name: run for name, run in variants(photo, device.type).items() if "Lovasz" not in name}
            report(f"a photo, {precision}", measure(photos, args.rounds, precision, args.device))
        if args.only != "photo":
            steps = variants(step, device.type)
            report(f"a step of {args.batch}, {precision}", measure(steps, args.rounds, precision, args.device))


if __name__ == "__main__":
    main()
