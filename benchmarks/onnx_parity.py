"""ONNX beside PyTorch on three sizes: a network of any configuration with random weights, the full-size one by default.

    python benchmarks/onnx_parity.py [--cfg configs/lip.yaml] [--size 480x480 --size 480x320 ...] [--tmp DIR]

What starts at zero (the last projections of SRM and FTM, the injectors' gammas) would hide a wrong translation of what
stands before it, so it gets random numbers too. The classifier is scaled to logits as trained networks have them: with
30 times as large ones PyTorch's own fp32 differs from its fp64 by more than what is asked for. The files (1.9 GB each
at full size) are deleted after each size. Full size: 7 GB of memory, a minute or two of one core for each size. For a
trained run, `python export.py --run RUN --size HxW` does the same comparison before the file gets its name.
"""

import argparse
import dataclasses
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import export  # noqa: E402
import synthetic  # noqa: E402
from config import Config, load_config  # noqa: E402
from datasets import label_set  # noqa: E402
from model import SCHNet, build_model  # noqa: E402

SIZES = [(480, 480), (480, 320), (256, 352)]
LOGITS = 4.0                                               # their standard deviation


def random_network(cfg: Config, classes: tuple[str, ...]) -> SCHNet:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(cfg, sam_weights="", clip_weights="", vocab="", precision="fp32"), classes)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
        image = torch.from_numpy(synthetic.draw(0, 0, (160, 160))[0]).permute(2, 0, 1)[None] / 255
        model.head.conv_seg.weight.mul_(LOGITS / model.eval()(image).std())
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=Path, default=ROOT / "configs/lip.yaml")
    parser.add_argument("--size", type=export.parse_size, action="append", metavar="HxW")
    parser.add_argument("--tmp", help="folder of the temporary files; the system's if not given")
    parser.add_argument("--opset", type=int, default=18)
    args = parser.parse_args()
    cfg = load_config(args.cfg)
    labels, bad = label_set(cfg), 0
    model = random_network(cfg, labels.classes)
    count = sum(p.numel() for p in model.state_dict().values())
    print(f"{machine()}\n{args.cfg.name}: {count / 1e6:.1f} M numbers, at most {export.MAX_DIFFERENCE:g} and at least "
          f"{export.MIN_AGREEMENT:.1%} are asked for", flush=True)
    for size in args.size or SIZES:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
            try:
                found = export.export(model, labels, args.cfg, Path(folder) / "model.onnx", size, args.opset)
            except export.UserError as error:
                print(f"{size[0]:4} x {size[1]:<4} {error}", flush=True)
                bad += 1
                continue
        print(f"{size[0]:4} x {size[1]:<4} largest difference of probabilities {found[0]:.1e}, same class on "
              f"{found[1]:.3%} of the pixels, {time.monotonic() - start:.0f} s", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
