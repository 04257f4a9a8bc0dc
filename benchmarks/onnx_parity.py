"""ONNX beside PyTorch on three sizes: a network of any configuration with random weights, the full-size one by default.

    python benchmarks/onnx_parity.py [--cfg configs/lip.yaml] [--size 480x480 --size 480x320 ...] [--tmp DIR]
    python benchmarks/onnx_parity.py --int8 --size 480x480                 # size, time and labels of the int8 file too
    python benchmarks/onnx_parity.py --int8 --run runs/demo --size 128x128 # of a trained run

What starts at zero (the last projections of SRM and FTM, the injectors' gammas) would hide a wrong translation of what
stands before it, so it gets random numbers too. The classifier is scaled to logits as trained networks have them: with
30 times as large ones PyTorch's own fp32 differs from its fp64 by more than what is asked for. The files (1.9 GB each
at full size) are deleted after each size. Full size: 7 GB of memory, a minute or two of one core for each size. For a
trained run, `python export.py --run RUN --size HxW` does the same comparison before the file gets its name.

--int8: PyTorch in fp32 and bf16, onnxruntime in fp32 and int8, in turn, a figure at a time (the columns: timing.py);
"labels" is the share of the figures' pixels that have the class that PyTorch's fp32 gives them.
"""

import argparse
import copy
import dataclasses
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import machine, measure, report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import export  # noqa: E402
from config import Config, load_config  # noqa: E402
from datasets import label_set  # noqa: E402
from inference import autocast, load_run, cast_frozen  # noqa: E402
from model import SCHNet, build_model  # noqa: E402
from synthetic.draw import draw  # noqa: E402

SIZES = [(480, 480), (480, 320), (256, 352)]
LOGITS = 4.0                                               # their standard deviation


def random_network(cfg: Config, classes: tuple[str, ...]) -> SCHNet:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(cfg, sam_weights="", clip_weights="", vocab="", precision="fp32"), classes)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
        image = torch.from_numpy(draw(0, 0, (160, 160))[0]).permute(2, 0, 1)[None] / 255
        model.head.conv_seg.weight.mul_(LOGITS / model.eval()(image).std())
    return model


def side_by_side(model: SCHNet, path: Path, size: tuple[int, int], rounds: int, figures: int):
    """A table of PyTorch, fp32 and bf16, and of the files `path` and its int8."""
    small = path.with_stem(f"{path.stem}_int8")
    export.quantize(path, small, size, wanted=0.0)
    images = [draw(1, n, size)[0][None] for n in range(figures)]
    deployed, half = export.Deployed(model).eval(), export.Deployed(copy.deepcopy(model)).eval()
    half.requires_grad_(False)
    cast_frozen(half, "bf16")

    def in_torch(module: torch.nn.Module, image: np.ndarray, precision: str) -> np.ndarray:
        with torch.inference_mode(), autocast(torch.device("cpu"), precision):
            return module(torch.from_numpy(image)).float().numpy()

    sessions = {"onnxruntime fp32": export.session(path), "onnxruntime int8": export.session(small)}
    runs = {"PyTorch fp32": lambda image: in_torch(deployed, image, "fp32"),
            "PyTorch bf16": lambda image: in_torch(half, image, "bf16")}
    runs |= {name: lambda image, s=s: s.run(None, {"image": image})[0] for name, s in sessions.items()}
    labels = {name: np.concatenate([run(image).argmax(1) for image in images]) for name, run in runs.items()}
    bytes_of = {"PyTorch fp32": sum(p.nbytes for p in model.state_dict().values()),
                "PyTorch bf16": sum(p.nbytes for p in half.state_dict().values()),
                "onnxruntime fp32": export.size_of(path), "onnxruntime int8": export.size_of(small)}
    notes = {name: f"{bytes_of[name] / 2 ** 20:9.1f}{(labels[name] == labels['PyTorch fp32']).mean():10.3%}" for name in runs}
    measured = measure({name: lambda run=run: run(images[0]) for name, run in runs.items()}, rounds)
    report(f"{size[0]} x {size[1]}, {figures} figures", measured, f"{'MiB':>9}{'labels':>10}", notes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=Path, default=ROOT / "configs/lip.yaml")
    parser.add_argument("--size", type=export.parse_size, action="append", metavar="HxW")
    parser.add_argument("--tmp", help="folder of the temporary files; the system's if not given")
    parser.add_argument("--opset", type=int, default=18)
    parser.add_argument("--run", help="a trained run instead of random weights")
    parser.add_argument("--int8", action="store_true", help="and the table of times, sizes and labels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--figures", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run:
        model, labels, args.cfg = load_run(args.run, device="cpu")
    else:
        labels = label_set(load_config(args.cfg))
        model = random_network(load_config(args.cfg), labels.classes)
    bad, count = 0, sum(p.numel() for p in model.state_dict().values())
    print(f"{machine()}\n{args.cfg}: {count / 1e6:.1f} M numbers, at most {export.MAX_DIFFERENCE:g} and at least "
          f"{export.MIN_AGREEMENT:.1%} are asked for", flush=True)
    for size in args.size or SIZES:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
            try:
                path = Path(folder) / "model.onnx"
                found = export.export(model, labels, args.cfg, path, size, args.opset)
            except export.UserError as error:
                print(f"{size[0]:4} x {size[1]:<4} {error}", flush=True)
                bad += 1
                continue
            print(f"{size[0]:4} x {size[1]:<4} largest difference of probabilities {found[0]:.1e}, same class on "
                  f"{found[1]:.3%} of the pixels, {time.monotonic() - start:.0f} s", flush=True)
            if args.int8:
                side_by_side(model, path, size, args.rounds, args.figures)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
