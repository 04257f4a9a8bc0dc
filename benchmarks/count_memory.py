"""Operations and memory of a training step, counted on fake tensors: the tables of docs/reproduce.md.

    python benchmarks/count_memory.py                      a few minutes, 1.5 GB of memory, no GPU
    python benchmarks/count_memory.py configs/lip.yaml ftm_tokens=200 crop_size=512
    python benchmarks/count_memory.py --modules            parameters and GFLOP of each module, one image

Operations: flops.py, forward and backward, including what checkpointing recomputes. Memory: weights,
gradients, AdamW's two moments and every storage that autograd saves for the backward pass (`saved_tensors_hooks`),
under bf16 autocast, with frozen weights in bf16 as in train.py and fused attention as on a GPU. Both are counted for 2
and 3 images and extrapolated linearly. Not counted: the loss and the libraries' workspace.
"""

import argparse
import warnings

import full_size
import torch
from flops import Flops
from timing import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from config import Config, load_config
from errors import run_program
from files.labels import label_set
from layers import autocast, cast_frozen
from model import SCHNet, build_model

CASES = (("configs/lip.yaml", ()), ("configs/lip.yaml", ("checkpointing=true",)),
         *((f"configs/ablation/{name}.yaml", ()) for name in ("sam_clip_srm", "sam", "clip")))


def step(model: SCHNet, image: torch.Tensor) -> tuple[int, int]:
    """Operations of a forward and backward pass, and the bytes saved between them, without the weights."""
    saved, own = {}, {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage                # this reference keeps the address from being reused
        return tensor

    with Flops() as flops:
        with saved_tensors_hooks(save, lambda tensor: tensor), autocast(image.device, model.cfg.precision):
            outputs = model(image)
        sum(logits.float().sum() for logits in outputs if logits is not None).backward()
    return flops.total, sum(storage.nbytes() for storage in saved.values())


def module_table() -> list[str]:
    """Parameters of each module of configs/lip.yaml, and its operations in a forward pass of one image."""
    model, spent, start = fake_model(load_config(ROOT / "configs" / "lip.yaml", full_size.RANDOM)), {}, {}
    groups = {"SAM": [model.sam.patch_embed, *model.sam.blocks], "CLIP, image tower": [model.clip], "SRM": [model.srm],
              "FTM": [model.ftm], "UperNet": [model.head], "auxiliary head, in training": [model.aux]}
    with FakeTensorMode(allow_non_fake_inputs=True), Flops() as flops, autocast(torch.device("cpu"), "bf16"):
        for name, members in groups.items():
            for member in members:
                member.register_forward_pre_hook(lambda *_, name=name: start.update({name: flops.total}))
                member.register_forward_hook(lambda *_, name=name: spent.update(
                    {name: spent.get(name, 0) + flops.total - start[name]}))
        model(torch.empty(2, 3, *model.cfg.crop_size))         # BatchNorm needs two images
    sizes = {name: sum(p.numel() for part in members for p in part.parameters()) for name, members in groups.items()}
    sizes["SAM"] += model.sam.pos_embed.numel()
    sizes["ViT-Adapter"] = sum(p.numel() for p in model.adapter.parameters())
    spent["ViT-Adapter"] = flops.total - sum(spent.values())
    return ["| module | parameters, million | GFLOP |", "|---|---|---|",
            *(f"| {name} | {sizes[name] / 1e6:.1f} | {spent[name] / 2e9:.1f} |" for name in sizes),
            f"| complete | {sum(sizes.values()) / 1e6:.1f} | {flops.total / 2e9:.1f} |"]


def fake_model(cfg: Config) -> SCHNet:
    """A network in training mode on fake tensors."""
    classes = label_set(cfg).classes
    texts = {"f_txt": torch.zeros(len(classes), 512), "sim_scale": torch.tensor(100.0)}
    model = build_model(cfg, classes, state=texts)         # on the meta device
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        cast_frozen(model, cfg.precision)
    return model


def row(path: str, overrides: tuple[str, ...]) -> str:
    cfg = load_config(ROOT / path, [*full_size.RANDOM, *overrides])
    model = fake_model(cfg)
    with FakeTensorMode(allow_non_fake_inputs=True):
        (flops, saved), (flops_of_3, saved_of_3) = (step(model, torch.empty(n, 3, *cfg.crop_size)) for n in (2, 3))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + 3 * 4 * trained
    tera = (flops + 14 * (flops_of_3 - flops)) / 1e12
    gib = [(fixed + saved + (n - 2) * (saved_of_3 - saved)) / 2 ** 30 for n in (4, 16)]
    name = " ".join([f"`{path.removeprefix('configs/')}`", *(f"`{item}`" for item in overrides)])
    count = sum(p.numel() for p in model.parameters())
    return (f"| {name} | {count / 1e6:.0f} ({trained / 1e6:.0f}) | {tera / 16:.2f} | {tera:.0f} | {gib[0]:.1f} | "
            f"{gib[1]:.1f} |")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", action="store_true", help="print the table of the modules instead")
    parser.add_argument("cfg", nargs="?", help="a file of configs/; if not given, the rows of docs/reproduce.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    if args.modules:
        print("\n".join(module_table()))
        return
    print("| configuration | weights, million (trained) | TFLOP per image | TFLOP per step of 16 | GiB for 4 images | "
          "GiB for 16 images |\n|---|---|---|---|---|---|")
    for path, overrides in [(args.cfg, tuple(args.overrides))] if args.cfg else CASES:
        print(row(path, overrides), flush=True)


if __name__ == "__main__":
    run_program(main)
