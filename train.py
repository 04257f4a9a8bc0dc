"""Train SCHNet (§4.3).

    python train.py                                                     the demo: drawn people, a small network, a CPU
    torchrun --nproc_per_node 4 train.py --cfg configs/cihp.yaml        the paper's setting: 16 images on 4 GPUs
    python train.py --cfg configs/cihp.yaml accum_steps=4               one GPU, the same 16 images per step
    python train.py --cfg configs/cihp.yaml --resume                    resumes exactly from runs/cihp/last.pt, if there
    python train.py --cfg configs/cihp.yaml iters=0                     a dry run: data, weights, memory, time per step

One process or many, one machine or many, CPU or GPU: the same file. For the files in runs/<config>/ see engine/run.py.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import textwrap
import time
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config import Config, load_config
from datasets import DrawnSet, LabelSet, PairSet, label_set, open_split, train_loader
from engine import checkpoint
from engine.processes import StopSignal, World, device_name, memory, run_together
from engine.run import Run
from errors import UserError
from evaluate import evaluate_split, scores
from inference import predict_labels
from layers import autocast, cast_frozen
from losses import parsing_loss
from model import SCHNet, build_model

SHOWN_ABOVE = ("dataset", "data_root", "out", "iters", "batch_size", "precision")       # in the first screen
NOT_DECAYED = ("tokens", "level_embed", "pos_embed", "positional_embedding", "rel_pos_h", "rel_pos_w")


# ------------------------------------------------------------------------------------ schedule and parameter groups

def get_lr(it: int, cfg: Config) -> float:
    """The learning rate of iteration `it` (0-based): polynomial to 0 from the start (ViT-Adapter), times §4.3's linear
    warm-up. So the largest is below cfg.lr: 5.85e-4 on LIP."""
    rate = cfg.lr * (1 - it / cfg.iters) ** cfg.poly_power
    if it < cfg.warmup_iters:
        rate *= 1 - (1 - it / cfg.warmup_iters) * (1 - cfg.warmup_ratio)
    return rate


def param_groups(model: SCHNet) -> list[dict]:
    """AdamW's groups: (decay, no decay) x (patch embedding, the rest). No weight decay on biases, norms and other
    vectors, FTM's tokens and rho, the injectors' gamma, level embedding, position tables."""
    patch = {id(p) for p in model.encoder.patch_embed.parameters()}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = model.cfg.weight_decay if p.ndim > 1 and not name.endswith(NOT_DECAYED) else 0.0
            factor = model.cfg.patch_embed_lr_mult if id(p) in patch else 1.0
            group = groups.setdefault((decay, factor), {"params": [], "weight_decay": decay, "lr_factor": factor})
            group["params"].append(p)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------------------ the step

def uses_sync_bn(cfg: Config, world: World) -> bool:
    return world.size > 1 and world.device.type == "cuda" and cfg.sync_bn


def check_batch(cfg: Config, world: World):
    """Rejects an uneven batch, and one image per process: BatchNorm over UperNet's 1x1 pool needs two values."""
    each, left = divmod(cfg.batch_size, world.size * cfg.accum_steps)
    if left:
        raise UserError(f"batch_size ({cfg.batch_size}) must be a multiple of processes x accum_steps "
                        f"({world.size} x {cfg.accum_steps})")
    if each == 1 and not uses_sync_bn(cfg, world):
        raise UserError(f"batch_size ({cfg.batch_size}) is one image for each of {world.size} processes and "
                        f"{cfg.accum_steps} steps: BatchNorm needs at least two")


class Learner:
    """The network on its device, its optimizer, and the gradient scaler that fp16 needs."""

    def __init__(self, model: SCHNet, cfg: Config, world: World):
        self.cfg, self.world = cfg, world
        if uses_sync_bn(cfg, world):
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        cast_frozen(model, cfg.precision)
        self.model = model.to(world.device).train()
        self.network: nn.Module = model                               # what training calls: the model, or DDP around it
        if world.size > 1:
            # DDP's warning is about dimensions of size 1, whose strides mean nothing
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            self.network = DistributedDataParallel(model, gradient_as_bucket_view=True)
            self.network.broadcast_buffers = False                       # `share_buffers` does, before a validation
        self.optimizer = torch.optim.AdamW(param_groups(model), lr=cfg.lr, betas=cfg.betas, fused=True)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "fp16")
        self.buffers = list(model.buffers())                        # BatchNorm's statistics; f_txt, which never changes
        self.before = [buffer.clone() for buffer in self.buffers]
        torch.backends.cudnn.benchmark = True                            # the crop never changes

    def losses(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        """image uint8 (b, 3, h, w), label uint8 (b, h, w) -> "loss" and its parts."""
        cfg, device = self.cfg, self.world.device
        image, label = image.to(device, non_blocking=True).float() / 255, label.to(device, non_blocking=True)
        with autocast(device, cfg.precision):
            logits, aux = self.network(image)
        loss, parts = parsing_loss(logits, label, cfg.lovasz_weight, cfg.loss_group)
        if aux is not None:
            parts["aux"], _ = parsing_loss(aux, label, cfg.lovasz_weight, cfg.loss_group)
            loss = loss + cfg.aux_weight * parts["aux"]
        return {"loss": loss, **parts}

    def gradient(self, micro_batches: list[tuple], it: int) -> dict[str, float]:
        """The gradient of the micro-batches, not yet applied; returns the losses and the gradient norm, averaged over
        micro-batches and processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = get_lr(it, self.cfg) * group["lr_factor"]
        self.optimizer.zero_grad(set_to_none=True)
        count, totals = len(micro_batches), {}
        for n, (image, label, _) in enumerate(micro_batches):
            # dropout and DropPath follow from the iteration and the place in the batch: no random state to save
            torch.manual_seed((self.cfg.seed * 1_000_003 + it) * 4_096 + self.world.rank * self.cfg.accum_steps + n)
            wait = self.world.size > 1 and n < count - 1             # gradients are all-reduced once, with the last one
            with self.network.no_sync() if wait else contextlib.nullcontext():
                losses = self.losses(image, label)
                self.scaler.scale(losses["loss"] / count).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / count
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        totals["grad"] = nn.utils.get_total_norm(grads)
        values = torch.stack([value.double() for value in totals.values()])
        if self.world.size > 1:
            dist.all_reduce(values)
        return dict(zip(totals, (values / self.world.size).tolist()))    # the step's only GPU sync

    def step(self, micro_batches: list[tuple], it: int) -> tuple[dict[str, float], bool]:
        """One optimizer step. Returns the losses, averaged over the processes, and whether the step was taken: where a
        loss or gradient is not finite, all processes skip it, its effects are undone and fp16's scale is halved."""
        torch._foreach_copy_(self.before, self.buffers)
        losses = self.gradient(micro_batches, it)
        finite = all(map(math.isfinite, losses.values()))
        if finite:
            self.scaler.step(self.optimizer)
        else:
            torch._foreach_copy_(self.buffers, self.before)
        self.scaler.update()
        return losses, finite

    def share_buffers(self):
        """The main process's BatchNorm statistics on every process: without SyncBN they differ."""
        for buffer in self.model.buffers() if self.world.size > 1 else ():
            dist.broadcast(buffer, 0)


# ------------------------------------------------------------------------------------------------------------- the run

def open_data(cfg: Config, world: World) -> tuple[LabelSet, PairSet | DrawnSet, PairSet | DrawnSet]:
    """The label set, the training split and the validation split; all processes must see the same files."""
    with world.all_or_none():
        labels, train_pairs, val_pairs = label_set(cfg), open_split(cfg, "train"), open_split(cfg, "val")
    world.check_same(train_pairs.fingerprint, "train split")
    world.check_same(val_pairs.fingerprint, "val split")
    return labels, train_pairs, val_pairs


def train(cfg: Config, world: World, resume: bool):
    labels, train_pairs, val_pairs = open_data(cfg, world)
    run = Run(cfg, world, labels)
    content = run.open(resume)
    torch.manual_seed(cfg.seed)
    with world.all_or_none():
        model = build_model(cfg, labels.classes, content and content["model"])
        if content:
            checkpoint.check_official(model, content["official"], run.folder)
            checkpoint.load_state(model, content["model"], run.folder)
        elif cfg.init:
            world.print0(checkpoint.init_from(model, cfg.init, labels.classes))
    learner = Learner(model, cfg, world)
    with world.all_or_none():
        run.start(learner, content, train_pairs, val_pairs)
    world.print0(first_screen(model, cfg, world, (len(train_pairs), len(val_pairs))))
    loader = train_loader(cfg, train_pairs, world.rank, world.size, run.progress.iteration)

    with contextlib.closing(loader) as batches, StopSignal(world.main) as stop, run.bar:
        if run.progress.iteration > run.progress.validated and run.due(cfg.eval_every):
            validate(learner, val_pairs, run, stop)                      # the run was stopped before its validation
        for it in range(run.progress.iteration, cfg.iters):
            micro_batches = run.next_batches(batches, stop, learner)
            losses, taken = learner.step(micro_batches, it)
            names = [name for _, _, names in micro_batches for name in names]
            run.count(losses, taken, names, get_lr(it, cfg))

            # every log_every iterations: the mean losses since the last entry
            if run.due(cfg.log_every):
                run.log_means(get_lr(it, cfg))

            # every save_every iterations, and before a validation: a checkpoint to resume from
            if run.due(cfg.save_every) or run.due(cfg.eval_every):
                run.save(learner)

            # every eval_every iterations: the validation set, all processes together
            if run.due(cfg.eval_every):
                validate(learner, val_pairs, run, stop)
    run.finish()


def validate(learner: Learner, pairs: PairSet | DrawnSet, run: Run, stop: StopSignal):
    """Single-scale scores on the complete validation set, sharded over the processes."""
    model, world = learner.model, learner.world
    learner.share_buffers()
    matrix, _ = evaluate_split(model, pairs, len(run.labels.classes), world,
                               progress=world.main and sys.stderr.isatty(), interrupted=lambda: stop.number > 0)
    if world.sum([stop.number > 0])[0]:                                  # incomplete: validate again after resuming
        run.stop(learner, stop.number)
    run.validated(scores(matrix), len(pairs), learner)
    if world.main:
        samples = [pairs.read(i) for i in range(min(4, len(pairs)))]
        predicted = predict_labels(model.eval(), [image for image, _ in samples])
        model.train()
        run.draw_validation([(image, label, pred) for (image, label), pred in zip(samples, predicted)])


def dry_run(cfg: Config, world: World, steps: int = 4):
    """Data, weights, memory and a few real steps, without leaving a file."""
    cfg = dataclasses.replace(cfg, iters=cfg.warmup_iters + steps)
    labels, train_pairs, val_pairs = open_data(cfg, world)
    with world.all_or_none():
        model = build_model(cfg, labels.classes)
    learner = Learner(model, cfg, world)
    world.print0(first_screen(model, cfg, world, (len(train_pairs), len(val_pairs))))
    with contextlib.closing(train_loader(cfg, train_pairs, world.rank, world.size)) as batches:
        for it in range(steps):
            start = time.monotonic()
            with world.all_or_none():
                micro_batches = [next(batches) for _ in range(cfg.accum_steps)]
            losses, _ = learner.step(micro_batches, it)
            seconds = time.monotonic() - start
            values = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            world.print0(f"step {it + 1}: {seconds:.2f} s, {values}")
    world.print0(f"dry run ok; {memory(world.device):.1f} GiB per process; 10,000 iterations take about "
                 f"{10_000 * seconds / 3600:.1f} hours")     # the first step also waits for photos


def first_screen(model: SCHNet, cfg: Config, world: World, counts: tuple[int, int]) -> str:
    """The network, the data and the machine in a few lines; config.yaml has all settings."""
    def encoder(key: str) -> str:
        weights = getattr(cfg, f"{key}_weights")
        return f"{key.upper()} {getattr(cfg, key)} ({os.path.basename(weights.rstrip('/')) or 'random'})"

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    parts = [encoder(key) for key in ("sam", "clip") if getattr(model, key) is not None]
    parts += [key.upper() for key in ("srm", "ftm") if getattr(cfg, key)]
    each = cfg.batch_size // (world.size * cfg.accum_steps)
    changed = [f"{key}={value}" for key, value in vars(cfg).items()
               if value != getattr(Config, key) and key not in SHOWN_ABOVE]
    lines = [f"run      {cfg.out or 'runs/demo'}",
             f"data     {cfg.dataset}: {counts[0]:,} training images, {counts[1]:,} validation images",
             f"network  {', '.join(parts)}: {trained / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M frozen",
             f"batch    {cfg.batch_size} images = {world.size} (processes) x {cfg.accum_steps} (accum_steps) x {each}, "
             f"{cfg.iters:,} iterations, {cfg.precision} on {device_name(world.device)}",
             "changed  " + textwrap.shorten(", ".join(changed) or "nothing", 111, placeholder=" ... (config.yaml)")]
    if each % cfg.loss_group:
        lines.append(f"note     Lovasz-softmax sees {each} images at a time, not loss_group={cfg.loss_group}: do not "
                     "compare with other splits of the batch")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- the program

def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Train SCHNet.",
                                     epilog="key=value: overrides of the config, see config.py")
    parser.add_argument("--cfg", default="configs/demo.yaml", help="a file of configs/; the demo if not given")
    parser.add_argument("--resume", action="store_true",
                        help="continue from the run's last checkpoint, or start if there is none")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)

    def work(world: World):
        with world.all_or_none():
            cfg = load_config(args.cfg, args.overrides)
            check_batch(cfg, world)
        if cfg.iters:
            train(cfg, world, args.resume)
        else:
            dry_run(cfg, world)

    run_together(work, less_memory="checkpointing=true (recomputes the encoder layers in the backward pass), "
                                   "accum_steps=2 (the same batch in two halves)")


if __name__ == "__main__":
    main()
