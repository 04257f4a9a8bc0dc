"""The full-size SCHNet with random weights at 480 x 480 on one GPU: training step, memory, shares, inference.

    python benchmarks/bench_gpu.py                            bf16, some minutes
    python benchmarks/bench_gpu.py --device cpu --small       the same code on a small network, to see that it works

The logits against those of the same weights on the CPU; seconds per training step at batch 16 and 4 with peak memory,
with and without checkpointing, and where a step and a forward pass spend their time; images per second in inference;
beside it, where `transformers` is installed, its two encoders and its UperNet, which lack adapter, SRM and FTM. The
columns: timing.py. Batches are random and already on the device: the loader is measured by bench_data.py. Needs no
weight files, no data and no network.
"""

import sys
import time
from pathlib import Path

import torch
from timing import begin, error, measure, options, report

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train  # noqa: E402
from config import Config, load_config  # noqa: E402
from inference import autocast, cast_frozen  # noqa: E402
from model import SCHNet, build_model  # noqa: E402

CLASSES = [f"class {n}" for n in range(20)]
RANDOM = ["sam_weights=", "clip_weights=", "vocab="]
SMALL = ["sam_dim=64", "sam_depth=4", "sam_heads=4", "sam_window=4", "clip_dim=32", "clip_depth=4", "clip_heads=2",
         "clip_taps=[0, 1, 2, 3]", "clip_embed=16", "text_dim=16", "text_depth=1", "text_heads=2", "prior_dim=8",
         "deform_heads=4", "head_dim=32", "aux_dim=16", "crop_size=128", "base_size=128"]


def sync(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run, device: torch.device, calls: int) -> float:
    """Of so many calls."""
    sync(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    sync(device)
    return time.perf_counter() - start


def agreement(model: SCHNet, cfg: Config, device: torch.device):
    """One image on the device against the same weights on the CPU in fp32. Leaves the model on the device."""
    image = torch.rand(1, 3, *cfg.crop_size)
    with torch.inference_mode():
        wanted = model.eval().cpu()(image)
        model.to(device)
        for precision in dict.fromkeys(("fp32", cfg.precision)):
            with autocast(device, precision):
                found = model(image.to(device)).float().cpu()
            print(f"logits in {precision} on the device, relative error: {error([found], [wanted]):.0e}")


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
    """A table of one row: an optimiser step, images per second, peak memory; then where a step spends its time."""
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
        train.forward_backward(model, optimizer, scaler, [(image, label, [])], cfg, device, cfg.warmup_iters)
        scaler.step(optimizer)
        scaler.update()

    title = f"training, batch {batch}" + ", checkpointing" * checkpointing
    try:
        seconds(step, device, 2)                           # the second has AdamW's moments from the start
    except torch.OutOfMemoryError:
        print(f"{title}: out of memory\n", flush=True)
        return
    peak = f"{torch.cuda.max_memory_allocated() / 2 ** 30:10.1f}" if device.type == "cuda" else f"{'-':>10}"
    measured = measure({"step": step}, rounds, cfg.precision, device)
    rate = 1e3 * batch / measured.figures()["step"].median
    report(title, measured, f"{'images/s':>10}{'peak GiB':>10}", {"step": f"{rate:10.1f}{peak}"})
    total = {}
    undo = [watch(owner, name, part, total, device) for owner, name, part in
            ((model, "forward", "forward"), (train, "parsing_loss", "loss"), (torch.Tensor, "backward", "backward"),
             (scaler, "step", "AdamW"))]
    whole = seconds(step, device, 3)
    for restore in undo:
        restore()
    print(f"  time of a step: {shares(total, whole)}\n", flush=True)


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
        whole = seconds(lambda: model(image), device, rounds)
    print(f"  time of a forward pass: {shares(total, whole)}\n")


def peer_parts(model: SCHNet):
    """SAM's and CLIP's encoders and UperNet out of transformers, as one function of an image. The head gets maps of its
    own making: what is timed is the parts, not a network."""
    import peers
    cfg, device, size = model.cfg, model.f_txt.device, model.cfg.crop_size[0]
    states = [{name: tensor.float().cpu() for name, tensor in part.state_dict().items()}
              for part in (model.sam, model.clip, model.head)]
    sizes = {"dim": cfg.sam_dim, "depth": cfg.sam_depth, "heads": cfg.sam_heads, "window": cfg.sam_window}
    sam, run_sam = peers.sam("transformers", states[0], size, sizes)
    clip, run_clip = peers.hugging_face_clip(states[1], size, cfg.clip_heads, cfg.clip_taps)
    head = peers.upernet(states[2]).eval()
    for part in (sam, clip, head):
        part.to(device)

    def run(image: torch.Tensor) -> torch.Tensor:
        run_sam(image)
        run_clip(image)
        return head([torch.zeros(len(image), cfg.sam_dim, size // s, size // s, device=device) for s in (4, 8, 16, 32)])
    return run


def inference(runs: dict, image: torch.Tensor, precision: str, rounds: int):
    with torch.inference_mode(), autocast(image.device, precision):
        measured = measure({name: lambda run=run: run(image) for name, run in runs.items()}, rounds, precision,
                           image.device)
    rates = {name: f"{1e3 * len(image) / of.median:10.1f}" for name, of in measured.figures().items()}
    report(f"inference, batch {len(image)}", measured, f"{'images/s':>10}", rates)


def main():
    parser = options(__doc__, device="cuda", rounds=10, threads=torch.get_num_threads())
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--small", action="store_true", help="a small network")
    args = parser.parse_args()
    device = torch.device(args.device)
    knobs = [*RANDOM, f"precision={args.precision}", *(SMALL if args.small else [])]
    cfg = load_config(ROOT / "configs/lip.yaml", knobs)
    begin(f"{args.precision}, {cfg.crop_size[0]} x {cfg.crop_size[1]}", args.threads, args.device)
    began = time.perf_counter()
    model = build_model(cfg, CLASSES)
    agreement(model, cfg, device)
    cast_frozen(model, cfg.precision)                     # as train.py and load_run do
    for batch, checkpointing in ((16, False), (16, True), (4, False), (4, True)):
        training(model, cfg, device, batch, checkpointing, args.rounds)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    model.zero_grad(set_to_none=True)
    model.eval()
    runs = {"SCHNet": model}
    try:
        runs["SAM + CLIP + UperNet, transformers"] = peer_parts(model)
    except ImportError as missing:
        print(f"transformers' parts left out: {missing}")
    images = [torch.rand(batch, 3, *cfg.crop_size, device=device) for batch in (1, 16)]
    for image in images:
        inference(runs, image, args.precision, args.rounds)
    forward_shares(model, images[-1], args.precision, args.rounds)
    print(f"{time.perf_counter() - began:.0f} s, the total")


if __name__ == "__main__":
    main()
