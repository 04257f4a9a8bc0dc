"""The full-size SCHNet with random weights at 480 x 480 on one GPU: training step, memory, shares, inference.

    python benchmarks/bench_gpu.py                            bf16, some minutes
    python benchmarks/bench_gpu.py --device cpu --small       the same code on a small network, to see that it works

The logits against those of the same weights on the CPU; seconds per training step at batch 16 and 4 with peak memory,
with and without checkpointing, and where a step and a forward pass spend their time; images per second in inference;
beside it, where `transformers` is installed, its two encoders and its UperNet, which lack adapter, SRM and FTM. Batches
are random and already on the device: the loader is measured by bench_data.py. Needs no weight files, no data and no
network.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train  # noqa: E402
from config import Config, load_config  # noqa: E402
from inference import autocast, store_frozen  # noqa: E402
from model import SCHNet, build_model  # noqa: E402

CLASSES = [f"class {n}" for n in range(20)]
RANDOM = ["sam_weights=", "clip_weights=", "vocab="]
SMALL = ["sam_dim=64", "sam_depth=4", "sam_heads=4", "sam_window=4", "clip_dim=32", "clip_depth=4", "clip_heads=2",
         "clip_taps=[0, 1, 2, 3]", "clip_embed=16", "text_dim=16", "text_depth=1", "text_heads=2", "prior_dim=8",
         "deform_heads=4", "head_dim=32", "aux_dim=16", "crop_size=128", "base_size=128"]


def sync(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(run, device: torch.device, rounds: int, warm: int = 2) -> list[float]:
    """Seconds of each of `rounds` calls, in order."""
    times = []
    for n in range(rounds + warm):
        sync(device)
        start = time.perf_counter()
        run()
        sync(device)
        if n >= warm:
            times.append(time.perf_counter() - start)
    return times


def spread(times: list[float]) -> str:
    quarter = sorted(times)
    return f"{statistics.median(times):8.3f} s  ({quarter[len(times) // 4]:.3f} .. {quarter[-1 - len(times) // 4]:.3f})"


def agreement(model: SCHNet, cfg: Config, device: torch.device):
    """One image on the device against the same weights on the CPU in fp32. Leaves the model on the device."""
    image = torch.rand(1, 3, *cfg.crop_size)
    with torch.inference_mode():
        wanted = model.eval().cpu()(image)
        model.to(device)
        for precision in dict.fromkeys(("fp32", cfg.precision)):
            with autocast(device, precision):
                found = model(image.to(device)).float().cpu()
            error = ((found - wanted).norm() / wanted.norm()).item()
            print(f"logits in {precision} on the device, relative error: {error:.0e}")


def watch(owner, name: str, part: str, total: dict[str, float], device: torch.device):
    """Adds the seconds of every call of `owner.name` to `total[part]`; waits for the device before and after."""
    inner = getattr(owner, name)

    def outer(*args):
        sync(device)
        start = time.perf_counter()
        result = inner(*args)
        sync(device)
        total[part] = total.get(part, 0.0) + time.perf_counter() - start
        return result
    setattr(owner, name, outer)
    return lambda: setattr(owner, name, inner)


def training(model: SCHNet, cfg: Config, device: torch.device, batch: int, checkpointing: bool, rounds: int):
    """One row: seconds per optimiser step, images per second, peak memory; then where a step spends its time."""
    torch.manual_seed(0)
    model.cfg = cfg = Config(**{**vars(cfg), "batch_size": batch, "checkpointing": checkpointing})
    model.train()
    optimizer = torch.optim.AdamW(train.param_groups(model), lr=cfg.lr, betas=cfg.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    height, width = cfg.crop_size
    image = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, device=device)
    label = torch.randint(0, 20, (batch, height // 16, width // 16), dtype=torch.uint8, device=device)
    label = label.repeat_interleave(16, 1).repeat_interleave(16, 2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step():
        train.train_step(model, optimizer, scaler, [(image, label, [])], cfg, device, cfg.warmup_iters)
        scaler.step(optimizer)
        scaler.update()

    row = f"train  batch {batch:2d}  checkpointing {'on ' if checkpointing else 'off'}"
    try:
        times = timed(step, device, rounds)
    except torch.OutOfMemoryError:
        print(f"{row}     out of memory", flush=True)
        return
    peak = f"{torch.cuda.max_memory_allocated() / 2 ** 30:7.1f} GiB" if device.type == "cuda" else "      -"
    print(f"{row} {spread(times)}  {batch / statistics.median(times):7.1f} images/s  peak {peak}", flush=True)
    total = {}
    undo = [watch(owner, name, part, total, device) for owner, name, part in
            ((model, "forward", "forward"), (train, "parsing_loss", "loss"), (torch.Tensor, "backward", "backward"),
             (scaler, "step", "AdamW"))]
    whole = sum(timed(step, device, 3, 0))
    for restore in undo:
        restore()
    print("       of a step: " + shares(total, whole), flush=True)


def shares(total: dict[str, float], whole: float) -> str:
    total = {**total, "the rest": whole - sum(total.values())}
    longest_first = sorted(total.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {100 * value / whole:.1f} %" for part, value in longest_first)


def forward_shares(model: SCHNet, image: torch.Tensor, precision: str, rounds: int):
    """Where a forward pass spends its time: every part waited for, so the sum is a little more than the whole."""
    device, total = image.device, {}
    for block in model.sam.blocks:
        watch(block, "forward", "SAM blocks", total, device)
    for owner, part in ((model.clip, "CLIP"), (model.srm, "SRM"), (model.ftm, "FTM"), (model.head, "UperNet")):
        watch(owner, "forward", part, total, device)
    names = {"prior": "spatial prior", "inject": "injectors", "extract": "extractors", "fuse": "fusion"}
    for name, part in names.items():
        watch(model.adapter, name, part, total, device)
    with torch.inference_mode(), autocast(device, precision):
        model(image)
        total.clear()
        whole = sum(timed(lambda: model(image), device, rounds, 0))
    print("       of a forward pass: " + shares(total, whole))


def peer_parts(cfg: Config, device: torch.device):
    """SAM's and CLIP's encoders and UperNet out of transformers, as one function of an image. The head gets maps of its
    own making: what is timed is the parts, not a network."""
    import conftest  # noqa: F401                          torchvision beside a CPU-only torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, SamVisionConfig, UperNetConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder
    from transformers.models.upernet.modeling_upernet import UperNetHead
    height, width = cfg.crop_size
    sam = SamVisionEncoder(SamVisionConfig(
        hidden_size=cfg.sam_dim, num_hidden_layers=cfg.sam_depth, num_attention_heads=cfg.sam_heads, image_size=height,
        window_size=cfg.sam_window, global_attn_indexes=[cfg.sam_depth * s // 4 - 1 for s in range(1, 5)],
        patch_size=16, mlp_dim=4 * cfg.sam_dim))
    clip = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=cfg.clip_dim, intermediate_size=4 * cfg.clip_dim, patch_size=16, image_size=height,
        num_hidden_layers=cfg.clip_depth, num_attention_heads=cfg.clip_heads))
    head = UperNetHead(UperNetConfig(hidden_size=cfg.head_dim, num_labels=20, backbone_config=None), [cfg.sam_dim] * 4)
    parts = [part.to(device).eval() for part in (sam, clip, head)]

    def run(image: torch.Tensor) -> torch.Tensor:
        parts[0](image)
        parts[1](image, output_hidden_states=True)
        maps = [torch.zeros(len(image), cfg.sam_dim, height // s, width // s, device=device) for s in (4, 8, 16, 32)]
        return parts[2](maps)
    return run


def inference(name: str, run, image: torch.Tensor, precision: str, rounds: int):
    with torch.inference_mode(), autocast(image.device, precision):
        times = timed(lambda: run(image), image.device, rounds)
    rate = len(image) / statistics.median(times)
    print(f"infer  batch {len(image):2d}  {name:34s} {spread(times)}  {rate:7.1f} images/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--small", action="store_true", help="a small network")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    device = torch.device(args.device)
    knobs = [*RANDOM, f"precision={args.precision}", *(SMALL if args.small else [])]
    cfg = load_config(ROOT / "configs/lip.yaml", knobs)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.precision}, {cfg.crop_size[0]} x {cfg.crop_size[1]}")
    began = time.perf_counter()
    model = build_model(cfg, CLASSES)
    agreement(model, cfg, device)
    store_frozen(model, cfg.precision)                     # as train.py and load_run do
    for batch, checkpointing in ((16, False), (16, True), (4, False), (4, True)):
        training(model, cfg, device, batch, checkpointing, args.rounds)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    model.zero_grad(set_to_none=True)
    model.eval()
    images = [torch.rand(batch, 3, *cfg.crop_size, device=device) for batch in (1, 16)]
    for image in images:
        inference("SCHNet", model, image, args.precision, args.rounds)
    forward_shares(model, images[-1], args.precision, args.rounds)
    try:
        peers = peer_parts(cfg, device)
    except ImportError as error:
        print(f"transformers' parts left out: {error}")
    else:
        for image in images:
            inference("SAM + CLIP + UperNet, transformers", peers, image, args.precision, args.rounds)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
