"""Compares onnxruntime with PyTorch (fp32, bf16): time, size, labels.

    python benchmarks/onnx_parity.py                                       # configs/lip.yaml with random weights: 10 GB
    python benchmarks/onnx_parity.py --run runs/demo --size 128x128        # a trained run

Prints the largest difference in the probabilities, then a table of one drawing at a time, alternating (timing.py
explains the columns); "labels" is the share of pixels with the same class as in PyTorch fp32. Parameters initialised to
zero (last projections of SRM and FTM, the injectors' gammas) would hide errors in the layers before them, so they are
randomised. The classifier is scaled so that the logits are as large as a trained network's.
"""

import copy
import tempfile
from pathlib import Path

import full_size
import numpy as np
import torch
from timing import measure, options, print_machine, report

import export
from config import Config
from errors import run_program
from files.labels import label_set
from inference import load_run
from layers import autocast, cast_frozen
from model import SCHNet
from synthetic.draw import draw

LOGITS = 4.0                                               # standard deviation of a trained network's logits


def random_network(cfg: Config) -> SCHNet:
    model = full_size.network(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
        image = torch.from_numpy(draw(0, 0, (160, 160))[0]).permute(2, 0, 1)[None] / 255
        model.head.conv_seg.weight.mul_(LOGITS / model(image).std())
    return model


def print_table(model: SCHNet, path: Path, size: tuple[int, int], drawings: int, rounds: int):
    """Prints the table of PyTorch and the ONNX file `path`."""
    images = [draw(1, n, size)[0][None] for n in range(drawings)]
    deployed, half = export.Deployed(model).eval(), export.Deployed(copy.deepcopy(model)).eval()
    half.requires_grad_(False)
    cast_frozen(half, "bf16")

    def in_torch(module: torch.nn.Module, image: np.ndarray, precision: str) -> np.ndarray:
        with torch.inference_mode(), autocast(torch.device("cpu"), precision):
            return module(torch.from_numpy(image)).float().numpy()

    session = export.session(path)
    runs = {"PyTorch fp32": lambda image: in_torch(deployed, image, "fp32"),
            "PyTorch bf16": lambda image: in_torch(half, image, "bf16"),
            "onnxruntime fp32": lambda image: session.run(None, {"image": image})[0]}
    labels = {name: np.concatenate([run(image).argmax(1) for image in images]) for name, run in runs.items()}
    bytes_of = {"PyTorch fp32": sum(p.nbytes for p in model.state_dict().values()),
                "PyTorch bf16": sum(p.nbytes for p in half.state_dict().values()),
                "onnxruntime fp32": sum(file.stat().st_size for file in path.parent.iterdir())}
    same = {name: (found == labels["PyTorch fp32"]).mean() for name, found in labels.items()}
    notes = {name: f"{bytes_of[name] / 2 ** 20:9.1f}{same[name]:10.3%}" for name in runs}
    measured = measure({name: lambda run=run: run(images[0]) for name, run in runs.items()}, rounds)
    report(f"{size[0]} x {size[1]}, {len(images)} drawings", measured, f"{'MiB':>9}{'labels':>10}", notes)


def main(argv: list[str] | None = None):
    parser = options(__doc__, rounds=5, drawings=16, threads=2)
    parser.add_argument("--size", type=export.parse_size, default=(480, 480), metavar="HxW", help="(480x480)")
    parser.add_argument("--run", help="a trained run instead of random weights")
    args = parser.parse_args(argv)
    if args.run:
        model, labels, source = load_run(args.run, device="cpu")
    else:
        model, source = random_network(full_size.lip_config("precision=fp32")), Path(__file__)
        labels = label_set(model.cfg)
    print_machine(f"{args.run or 'random weights'}, limits of export.py: {export.MAX_DIFFERENCE:g} in probabilities, "
                  f"{export.MIN_AGREEMENT:.1%} of the labels", args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        difference, agreement = export.export(model, labels, source, path, args.size)
        print(f"largest difference of probabilities {difference:.1e}, same class on {agreement:.3%} of the pixels")
        print_table(model, path, args.size, args.drawings, args.rounds)


if __name__ == "__main__":
    run_program(main)
