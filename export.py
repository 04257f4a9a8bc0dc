"""Export a trained SCHNet to ONNX, checked against PyTorch before the file gets its name.

    python export.py                                     # the newest run -> model.onnx in its folder
    python export.py --run runs/lip --out lip.onnx --size 480x320

    image           uint8 (N, H, W, 3), RGB              # any N; H and W are fixed
    probabilities   float32 (N, K, H, W)

Height and width are fixed because the network's structure follows them: SAM's windows, the tables of positions, the
bins of the pyramid pooling. predict.py shows the network a canvas of at least crop_size, with the photo's long side
at `base_size` and the rest in the mean colour, as examples/onnx_predict.py does. The metadata hold classes, palette and
what else a program needs, as JSON.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from augment import MEAN_COLOUR
from config import user_path
from errors import UserError, run_program
from files import weights
from files.labels import LabelSet
from inference import load_run
from layers import round_up
from synthetic.draw import draw

MAX_DIFFERENCE = 1e-4                                      # of probabilities
MIN_AGREEMENT = 0.999                                      # share of pixels with the same class
OLDEST_TORCH = (2, 10)                                     # torch 2.8 and 2.9 cannot export the network
OPSET, IR_VERSION = 18, 8                             # IR 8 is enough for opset 18; the exporter's 10 excludes runtimes
ONE_FILE_BYTES = 1 << 30                                   # larger weights get a file of their own: ONNX ends at 2 GiB


class Deployed(nn.Module):
    """The network with what surrounds it in prediction: bytes in, probabilities out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.permute(0, 3, 1, 2).float() / 255).softmax(1)


def export(model: nn.Module, labels: LabelSet, source: Path, target: Path,
           size: tuple[int, int]) -> tuple[float, float]:
    """Write `target` (and `target`.data beside it if it is large); returns the largest difference and the agreement."""
    model = Deployed(model).eval().requires_grad_(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export", dir=target.parent) as folder:
        part = Path(folder, target.name)
        program = _translate(model, size)
        program.model.metadata_props.update(metadata(model.model.cfg, labels, source, size))
        program.save(part, external_data=sum(p.nbytes for p in model.state_dict().values()) > ONE_FILE_BYTES)
        difference, agreement = check(model, part, size)
        if not (difference <= MAX_DIFFERENCE and agreement >= MIN_AGREEMENT):
            raise UserError(f"{target} was not written: probabilities differ from PyTorch's by {difference:.1e}, "
                            f"{agreement:.2%} of the pixels have the same class")
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == part):      # the weights first
            file.replace(target.parent / file.name)
    return difference, agreement


def session(path: Path):
    import onnxruntime
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _translate(model: Deployed, size: tuple[int, int]):
    """An ONNX program. Of onnxscript's optimiser only what onnxruntime needs: all of it takes time in the square of the
    network's depth, and onnxruntime fuses by itself (the same speed either way)."""
    from onnxscript import optimizer

    image = torch.zeros(2, *size, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.onnx.export(
        model, (image,), dynamo=True, opset_version=OPSET, input_names=["image"],
        output_names=["probabilities"], dynamic_shapes={"image": {0: batch}}, optimize=False, verbose=False)
    optimizer.inline(program.model)
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    program.model.ir_version = IR_VERSION
    return program


def metadata(cfg, labels: LabelSet, source: Path, size: tuple[int, int]) -> dict[str, str]:
    """What a program needs to use the file, as JSON values."""
    values = {"label_set": labels.name, "classes": labels.classes, "palette": labels.palette,
              "flip_pairs": labels.flip_pairs, "height": size[0], "width": size[1], "base_size": cfg.base_size,
              "pad_colour": MEAN_COLOUR, "normalisation": "inside the network: give RGB bytes",
              "checkpoint_sha256": weights.sha256(source)}
    return {key: json.dumps(value) for key, value in values.items()}


@torch.inference_mode()
def check(model: Deployed, path: Path, size: tuple[int, int]) -> tuple[float, float]:
    """onnxruntime against PyTorch on a drawn person, on noise, and on both at once."""
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    images = np.stack([draw(0, 0, size)[0], noise])
    run, difference, same = session(path).run, 0.0, []
    for batch in (images[:1], images):
        expected = model(torch.from_numpy(batch)).numpy()
        found = run(["probabilities"], {"image": batch})[0]
        difference = max(difference, float(np.abs(found - expected).max()))
        same.append((found.argmax(1) == expected.argmax(1)).mean())
    return difference, float(min(same))


def default_size(cfg) -> tuple[int, int]:
    """The square that every photo fits into at its prediction size."""
    side = round_up(max(cfg.base_size, *cfg.crop_size))
    return side, side


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match or any(int(side) < 32 or int(side) % 32 for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in multiples of 32, such as 480x320")
    return int(match[1]), int(match[2])


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a run, or a checkpoint; the newest run if not given")
    parser.add_argument("--out", type=user_path, help="the file; model.onnx in the run's folder if not given")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="height and width in pixels")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run's config")
    args = parser.parse_intermixed_args(argv)
    if args.out is not None and args.out.is_dir():
        parser.error(f"--out {args.out} is a folder; it must name the file")
    if torch.__version__ < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"torch {torch.__version__} cannot export this network, {oldest} and newer can: "
                        f'pip install "torch>={oldest}" (for the export alone: the run may be of any version)')
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install onnx onnxruntime onnxscript") from None
    model, labels, source = load_run(args.run, [*args.overrides, "precision=fp32"], "cpu")
    height, width = size = args.size or default_size(model.cfg)
    target = args.out or source.parent / "model.onnx"
    print(f"{source}: {len(labels.classes)} classes of {labels.name}")
    difference, agreement = export(model, labels, source, target, size)
    print(f"{target}: {height} x {width}; beside PyTorch the probabilities differ by at most {difference:.1e}, "
          f"{agreement:.2%} of the pixels have the same class")


if __name__ == "__main__":
    run_program(main)
