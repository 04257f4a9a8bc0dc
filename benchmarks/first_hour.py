"""Training and inference speed on a new GPU: the full-size SCHNet with random weights at 480 x 480 px.

    python benchmarks/first_hour.py                           bf16
    python benchmarks/first_hour.py --precision fp32          the same, with a row for TF32
    python benchmarks/first_hour.py --device cpu --small --precision fp32   a small network, to test this script

Prints the error of the logits relative to the CPU; time and peak memory of a training step of 16 and of 4 images, with
and without checkpointing; a step of 16 with one switch changed at a time; images per second in inference. Batches are
random and already on the device (bench_data.py measures the loader); weight files and data are not needed. timing.py
explains the columns. Further on a GPU: bench_fast.py --device cuda, bench_parts.py --device cuda.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from unittest import mock

import full_size
import torch
import torch.distributed as dist
from timing import error, measure, options, print_machine, report
from torch.nn.parallel import DistributedDataParallel

import model as network
from config import Config
from errors import run_program
from layers import autocast, cast_frozen
from model import SCHNet


def agreement(model: SCHNet, cfg: Config, device: torch.device):
    """Prints the error of the logits of one image, relative to the CPU in fp32. Leaves the model on the device."""
    image = torch.rand(1, 3, *cfg.crop_size)
    with torch.inference_mode():
        expected = model.eval().cpu()(image)
        model.to(device)
        for precision in dict.fromkeys(("fp32", cfg.precision)):
            with autocast(device, precision):
                logits = model(image.to(device)).float().cpu()
            print(f"logits in {precision} on the device, relative error: {error([logits], [expected]):.0e}")


def training(model: SCHNet, device: str, images: int, checkpointing: bool, rounds: int):
    """Prints the time of an optimizer step, images per second and peak memory."""
    model.cfg = dataclasses.replace(model.cfg, batch_size=images, checkpointing=checkpointing)
    learner, batch = full_size.learner(model, device), full_size.batch(model.cfg, images, device)
    cuda = learner.world.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def step():
        learner.step([batch], 0)                           # iteration 0: a learning rate near 0

    title = f"training, batch {images}" + ", checkpointing" * checkpointing
    try:
        step()                                             # creates AdamW's moments
        measured = measure({"step": step}, rounds, model.cfg.precision, device)
    except torch.OutOfMemoryError:
        print(f"{title}: out of memory\n", flush=True)
        return
    peak = f"{torch.cuda.max_memory_allocated() / 2 ** 30:10.1f}" if cuda else f"{'-':>10}"
    rate = 1e3 * images / measured.summary()["step"].median
    report(title, measured, f"{'images/s':>10}{'peak GiB':>10}", {"step": f"{rate:10.1f}{peak}"})
    model.zero_grad(set_to_none=True)


def inference(model: SCHNet, images: int, device: torch.device, rounds: int):
    image, precision = torch.rand(images, 3, *model.cfg.crop_size, device=device), model.cfg.precision
    with torch.inference_mode(), autocast(device, precision):
        measured = measure({"SCHNet": lambda: model(image)}, rounds, precision, device)
    rate = 1e3 * images / measured.summary()["SCHNet"].median
    report(f"inference, batch {images}", measured, f"{'images/s':>10}", {"SCHNet": f"{rate:10.1f}"})


@contextlib.contextmanager
def without_cudnn_benchmark():
    torch.backends.cudnn.benchmark = False
    yield
    torch.backends.cudnn.benchmark = True


@contextlib.contextmanager
def tf32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def switches(model: SCHNet, device: str, images: int, rounds: int):
    """Prints the time of a training step as it is, and with one switch changed at a time."""
    model.cfg = dataclasses.replace(model.cfg, batch_size=images, checkpointing=False)
    learner, batch = full_size.learner(model.train(), device), full_size.batch(model.cfg, images, device)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)

    def step(change: Callable = contextlib.nullcontext, **attributes):
        with change(), mock.patch.multiple(learner, **attributes) if attributes else contextlib.nullcontext():
            learner.step([batch], 0)

    def parallel(view: bool) -> Callable:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
        return lambda: step(network=wrapped)

    unfused = torch.optim.AdamW(learner.optimizer.param_groups, lr=1e-12, fused=False)
    runs = {"as it is": step, "cudnn.benchmark off": lambda: step(without_cudnn_benchmark),
            "only one buffer copied": lambda: step(buffers=learner.buffers[:1], before=learner.before[:1]),
            "Eq. 5's logits in the step's precision":
                lambda: step(lambda: mock.patch.object(network, "matmul_fp32", torch.matmul)),
            "AdamW not fused": lambda: step(optimizer=unfused)}
    if model.cfg.precision == "fp32":
        runs["TF32"] = lambda: step(tf32)
    report(f"a step of {images}", measure(runs, rounds, model.cfg.precision, device))
    model.zero_grad(set_to_none=True)
    runs = {"DDP, gradient_as_bucket_view": parallel(True), "DDP without": parallel(False)}
    report(f"a step of {images}, one process", measure(runs, rounds, model.cfg.precision, device))
    dist.destroy_process_group()


def main(argv: list[str] | None = None):
    parser = options(__doc__, device="cuda", rounds=10, threads=torch.get_num_threads())
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--small", action="store_true", help="a small network, to test this script")
    args = parser.parse_args(argv)
    cfg = full_size.lip_config(f"precision={args.precision}", *(full_size.SMALL if args.small else []))
    print_machine(f"{args.precision}, {cfg.crop_size[0]} x {cfg.crop_size[1]}", args.threads, args.device)
    model = full_size.network(dataclasses.replace(cfg, precision="fp32"))
    agreement(model, cfg, torch.device(args.device))
    model.cfg = cfg
    cast_frozen(model, cfg.precision)
    few, many = (2, 4) if args.small else (4, 16)
    for images, checkpointing in ((many, False), (many, True), (few, False), (few, True)):
        training(model, args.device, images, checkpointing, args.rounds)
    switches(model, args.device, many, args.rounds)
    for images in (1, many):
        inference(model.eval(), images, torch.device(args.device), args.rounds)


if __name__ == "__main__":
    run_program(main, less_memory="--small")
