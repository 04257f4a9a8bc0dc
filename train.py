"""Train SCHNet (§4.3).

    python train.py                                                     the demo: drawn people, a small network, a CPU
    torchrun --nproc_per_node 4 train.py --cfg configs/cihp.yaml        the paper's setting: 16 images on 4 GPUs
    python train.py --cfg configs/cihp.yaml accum_steps=4               one GPU, the same 16 images per step
    python train.py --cfg configs/cihp.yaml --resume                    go on from runs/cihp/last.pt, exactly
    python train.py --cfg configs/cihp.yaml iters=0                     a dry run: data, weights, memory, time per step

One process or many, one machine or many, CPU or GPU: the same file. What it leaves in runs/<config>/: see engine/run.py.
"""

import argparse
import contextlib
import dataclasses
import math
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import Config, load_config, parse_overrides, user_path
from datasets import doubtful_labels, fingerprint, label_set, open_split, train_loader
from engine import checkpoint
from engine.errors import UserError
from engine.processes import StopSignal, World, memory, run_together
from engine.run import Progress, Run, describe
from engine.workers import end_workers
from evaluate import evaluate_split, scores
from inference import autocast, predict_labels, store_frozen
from losses import parsing_loss
from model import SCHNet, build_model

MAX_SKIPPED = 20                                                         # steps in a row without a finite gradient
NOT_DECAYED = ("tokens", "level_embed", "pos_embed", "positional_embedding", "rel_pos_h", "rel_pos_w")


# ------------------------------------------------------------------------------------ schedule and parameter groups

def get_lr(it: int, cfg: Config) -> float:
    """The learning rate of iteration `it` (0-based): polynomial to 0 from the start (ViT-Adapter), times §4.3's linear
    warm-up. So the largest is below cfg.lr: 5.85e-4 on LIP."""
    rate = cfg.lr * (1 - it / max(1, cfg.iters)) ** cfg.poly_power
    if it < cfg.warmup_iters:
        rate *= 1 - (1 - it / cfg.warmup_iters) * (1 - cfg.warmup_ratio)
    return rate


def param_groups(model: SCHNet) -> list[dict]:
    """AdamW's groups: (decay, no decay) x (patch embedding, the rest). What must not be pulled to zero: biases, norms
    and other vectors, FTM's tokens and rho, the injectors' gamma, level embedding, position tables."""
    embedding = model.sam.patch_embed if model.cfg.backbone == "sam" else model.clip.conv1
    patch = {id(p) for p in embedding.parameters()}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = model.cfg.weight_decay if p.ndim > 1 and not name.endswith(NOT_DECAYED) else 0.0
            factor = model.cfg.patch_embed_lr_mult if id(p) in patch else 1.0
            group = groups.setdefault((decay, factor), {"params": [], "weight_decay": decay, "lr_factor": factor})
            group["params"].append(p)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------------------ the step

def seed_step(seed: int, it: int, micro_batch: int):
    """Dropout and DropPath as a function of the seed, the iteration and the micro-batch's place in the whole batch.
    Reseeding each step leaves no random state to save: a resumed run draws what an uninterrupted one would have."""
    torch.manual_seed((seed * 1_000_003 + it) * 4_096 + micro_batch)


def shares_statistics(cfg: Config, world: World) -> bool:
    """Whether BatchNorm sees the images of all processes."""
    return world.size > 1 and world.device.type == "cuda" and cfg.sync_bn


def check_batch(cfg: Config, world: World):
    """Refuse, before anything is built, an uneven batch, and the one value of one image's 1x1 pool in BatchNorm."""
    each, left = divmod(cfg.batch_size, world.size * cfg.accum_steps)
    if left:
        raise UserError(f"batch_size ({cfg.batch_size}) must be a multiple of processes x accum_steps "
                        f"({world.size} x {cfg.accum_steps})")
    if each == 1 and not shares_statistics(cfg, world):
        raise UserError(f"batch_size ({cfg.batch_size}) is one image for each of {world.size} processes and "
                        f"{cfg.accum_steps} steps: BatchNorm needs two at least")


def prepare(model: SCHNet, cfg: Config, world: World) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    """The model on its device: what is called in training, its optimiser, and the scaler that fp16 needs."""
    if shares_statistics(cfg, world):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    store_frozen(model, cfg.precision)
    model.to(world.device)
    network: nn.Module = model
    if world.size > 1:
        # DDP's warning is about dimensions of size 1, whose strides mean nothing
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        network = DistributedDataParallel(network)
        network.broadcast_buffers = False                                # `validate` shares BatchNorm's statistics
    optimizer = torch.optim.AdamW(param_groups(model), lr=cfg.lr, betas=cfg.betas, fused=True)
    return network, optimizer, torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "fp16")


def forward_backward(network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, batches: list,
                     cfg: Config, device: torch.device, it: int, first_micro_batch: int = 0) -> dict[str, float]:
    """The gradient of this process's micro-batches, not yet applied. Returns the loss and its parts, averaged over
    them, and the gradient norm.

    `network` is the model or its DDP wrapper: gradients travel once, with the last micro-batch.
    """
    for group in optimizer.param_groups:
        group["lr"] = get_lr(it, cfg) * group["lr_factor"]
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for n, (image, label, _) in enumerate(batches):
        seed_step(cfg.seed, it, first_micro_batch + n)
        last = n == len(batches) - 1
        wait = isinstance(network, DistributedDataParallel) and not last
        with network.no_sync() if wait else contextlib.nullcontext():
            image = image.to(device, non_blocking=True).float() / 255    # (b, 3, h, w)
            label = label.to(device, non_blocking=True)                  # (b, h, w)
            with autocast(device, cfg.precision):
                logits, aux = network(image)
            loss, parts = parsing_loss(logits, label, cfg.lovasz_weight, cfg.loss_group)
            if aux is not None:
                parts["aux"], _ = parsing_loss(aux, label, cfg.lovasz_weight, cfg.loss_group)
                loss = loss + cfg.aux_weight * parts["aux"]
            scaler.scale(loss / len(batches)).backward()
        for name, value in {"loss": loss, **parts}.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(batches)
    scaler.unscale_(optimizer)
    totals["grad"] = nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]])
    values = torch.stack([value.double() for value in totals.values()]).tolist()     # the step's only wait for the GPU
    return dict(zip(totals, values))


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, batches: list,
               cfg: Config, world: World, it: int, stop: bool = False) -> tuple[dict[str, float], bool, bool]:
    """One optimiser step. Returns the values of `forward_backward`, averaged over the processes, whether the step was
    taken, and whether any process wants to `stop`.

    Where a loss or gradient is not finite all processes skip the step: nothing of it is kept; fp16's scale is halved.
    """
    before = [buffer.clone() for buffer in network.buffers()]
    parts = forward_backward(network, optimizer, scaler, batches, cfg, world.device, it, world.rank * cfg.accum_steps)
    stopping, *sums = world.sum([float(stop), *parts.values()])
    finite = all(map(math.isfinite, sums))
    if finite:
        scaler.step(optimizer)
    else:
        for buffer, value in zip(network.buffers(), before):
            buffer.copy_(value)                                          # BatchNorm's statistics, of the forward pass
    scaler.update()
    return {name: total / world.size for name, total in zip(parts, sums)}, finite, stopping > 0


# ------------------------------------------------------------------------------------------------------------- the run

class Trainer:
    """A run under way; every process has one, and all do the same."""

    def __init__(self, cfg: Config, world: World, resume: bool):
        self.cfg, self.world, self.run = cfg, world, Run(cfg, world)
        with world.together():
            self.labels = label_set(cfg)
            self.train_pairs, self.val_pairs = open_split(cfg, "train"), open_split(cfg, "val")
            content = self.run.open(resume)
            doubts = [doubtful_labels(pairs, self.labels.classes) for pairs in (self.train_pairs, self.val_pairs)
                      if world.main]
        content = world.from_main(content)
        seen = {"train": fingerprint(self.train_pairs), "val": fingerprint(self.val_pairs)}
        for split in seen:
            world.agree(seen[split], f"{split} split")
        torch.manual_seed(cfg.seed)
        with world.together():
            self.model = build_model(cfg, self.labels.classes)
            self.official = checkpoint.official_files(self.model)
            if content:
                checkpoint.load_state(self.model, content["model"], self.run.folder / checkpoint.LAST)
                if content["official"] != self.official:
                    raise UserError(f"{self.run.folder} was trained on other official weights than "
                                    f"{', '.join(self.official) or 'none'} now name")
        self.network, self.optimizer, self.scaler = prepare(self.model, cfg, world)
        self.progress = Progress(images=len(self.train_pairs))
        if content:
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.progress = Progress(**content["progress"])
            self.compare(seen)
        self.progress.train, self.progress.val = seen["train"], seen["val"]
        with world.together():
            self.run.begin()
        self.saved = self.progress.iteration                             # what last.pt holds
        world.say("\n".join([describe(self.model, cfg, world, len(self.train_pairs)),
                             *(f"warning: {doubt}" for doubt in doubts if doubt)]))

    def compare(self, seen: dict[str, str]):
        """Say where a run goes on with other photos than it had."""
        now, count = self.progress, len(self.train_pairs)
        if now.images != count or now.train not in ("", seen["train"]):          # "": a checkpoint from before
            self.world.say(f"warning: {count} training images, there were {now.images}: from here on they come in "
                           "another order than the run began with")
            now.images = count
        if now.val not in ("", seen["val"]):
            self.world.say(f"warning: another validation set than before: {checkpoint.BEST} will be the best on this one")
            now.best_miou, now.best_iteration = -1.0, 0

    def fit(self):
        cfg, now, world = self.cfg, self.progress, self.world
        self.begun = time.monotonic() - now.seconds
        self.waited, self.logged = 0.0, time.monotonic()                 # seconds for data since the last entry of the log
        self.bar = tqdm(total=cfg.iters, initial=now.iteration, unit="it", disable=not world.main,
                        dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30)
        with StopSignal(world.main) as self.stop, self.bar:
            if now.iteration > now.validated and self.due(cfg.eval_every):           # where the run had been stopped
                self.validate()
            batches = train_loader(cfg, self.train_pairs, world.rank, world.size, now.iteration)
            self.model.train()
            for it in range(now.iteration, cfg.iters):
                begun = time.monotonic()
                some = [next(batches) for _ in range(cfg.accum_steps)]
                self.waited += time.monotonic() - begun
                stopping = self.step(it, some)

                # every log_every iterations: the mean since the last entry
                if self.due(cfg.log_every):
                    self.log(get_lr(it, cfg))

                # every save_every iterations, and before a validation: what a run can go on from
                if self.due(cfg.save_every) or self.due(cfg.eval_every):
                    self.save()
                if stopping:
                    self.leave()

                # every eval_every iterations: the validation set, all processes together
                if self.due(cfg.eval_every):
                    self.validate()
        skipped = f"{now.skipped} of {cfg.iters} steps were skipped: {self.run.log}\n" if now.skipped else ""
        world.say(f"{skipped}done: best mIoU {100 * now.best_miou:.2f} at iteration {now.best_iteration}, "
                  f"{self.run.folder / checkpoint.BEST}; curves in {self.run.folder / 'curves.png'}\n"
                  f"next: python evaluate.py --run {self.run.folder} --tta")

    def due(self, every: int) -> bool:
        return self.progress.iteration % every == 0 or self.progress.iteration == self.cfg.iters

    def step(self, it: int, batches: list) -> bool:
        """One optimiser step; whether a process has been asked to stop."""
        now = self.progress
        parts, finite, stopping = train_step(self.network, self.optimizer, self.scaler, batches, self.cfg,
                                             self.world, it, self.stop.number > 0)
        now.iteration = it + 1
        if finite:
            now.sums = {name: now.sums.get(name, 0.0) + value for name, value in parts.items()}
            now.count += 1
            now.in_a_row = 0
        else:
            self.skipped(parts, batches)
        losses = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
        skipped = f" {now.skipped} skipped" if now.skipped else ""
        self.bar.set_postfix_str(f"{losses} lr {get_lr(it, self.cfg):.1e} {memory(self.world.device):.1f} GiB{skipped}",
                                 refresh=False)
        self.bar.update()
        return stopping

    def skipped(self, parts: dict[str, float], batches: list):
        """Note a step that was not taken; end the run where this goes on and on."""
        now = self.progress
        now.skipped += 1
        now.in_a_row += 1
        what = "gradient" if math.isfinite(parts["loss"]) else "loss"
        named = self.world.gather([name for _, _, names in batches for name in names])
        self.run.note(iter=now.iteration, skipped=what, batch=[name for names in named for name in names])
        scale = self.scaler.get_scale()                                  # 1 where there is no scaler
        if now.in_a_row < MAX_SKIPPED and scale >= 1:
            return
        self.attempt(self.run.write_log)
        why = f"{now.in_a_row} steps in a row were skipped" if scale >= 1 else "the scale of fp16 has fallen below 1"
        values = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
        raise UserError(f"iteration {now.iteration}: {why}, the {what} is not finite ({values}); the batches are in "
                        f"{self.run.log}; {self.kept()}", everywhere=True)

    def kept(self) -> str:
        """What would be left if the run ended now; known to the main process."""
        if not self.saved:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is of iteration {self.saved}, in {self.run.folder}"

    def log(self, lr: float):
        now = self.progress
        means = {name: total / now.count for name, total in now.sums.items()}
        time_now = time.monotonic()
        self.run.note(iter=now.iteration, **means, lr=lr, seconds=round(time_now - self.begun, 1),
                      waiting=round(self.waited / (time_now - self.logged), 3), gib=round(memory(self.world.device), 2))
        now.sums, now.count = {}, 0
        self.waited, self.logged = 0.0, time_now
        self.attempt(self.run.write_log)

    def attempt(self, write, *args, must: bool = False) -> bool:
        """Write; a disk that is full for a while is no reason to stop, unless it `must` be now."""
        try:
            write(*args)
        except UserError as error:
            if must:
                raise UserError(f"{error}; {self.kept()}") from None
            self.world.say(f"warning: {error}; {self.kept()}; training goes on")
            return False
        return True

    def save(self, must: bool = False):
        """last.pt, and before it the log, which must not lack what the checkpoint counts as logged."""
        self.progress.seconds = time.monotonic() - self.begun
        if self.world.main:
            self.attempt(self._save, must=must)
            self.run.draw_curves()

    def _save(self):
        self.run.write_log()
        checkpoint.write_last(self.run.folder, checkpoint.pack(self.model, self.labels, self.official, {
            "progress": dataclasses.asdict(self.progress), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict()}))
        self.saved = self.progress.iteration

    def save_best(self) -> bool:
        content = checkpoint.pack(self.model, self.labels, self.official, {"progress": dataclasses.asdict(self.progress)})
        return self.attempt(checkpoint.write, self.run.folder / checkpoint.BEST, content,
                            must=self.progress.iteration == self.cfg.iters)

    def validate(self):
        """Single-scale scores on the whole validation set, sharded over the processes."""
        now, world, run = self.progress, self.world, self.run
        if world.size > 1:                                               # BatchNorm's statistics differ without SyncBN
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        matrix, _ = evaluate_split(self.model, self.val_pairs, len(self.labels.classes), world=world,
                                   progress=world.main and sys.stderr.isatty(),
                                   interrupted=lambda: self.stop.number > 0)
        if world.sum([float(self.stop.number > 0)])[0]:                  # images may lack; a resumed run validates anew
            self.leave()
        result = scores(matrix)
        now.validated = now.iteration
        run.note(iter=now.iteration, **{key: result[key] for key in ("miou", "mean_acc", "pixel_acc", "iou")},
                 seconds=round(time.monotonic() - self.begun, 1))
        percent = {key: f"{100 * result[key]:.2f}" for key in ("miou", "mean_acc", "pixel_acc")}
        world.say(f"iteration {now.iteration}: mIoU {percent['miou']}, mean accuracy {percent['mean_acc']}, "
                  f"pixel accuracy {percent['pixel_acc']} on {len(self.val_pairs)} images")
        if not result["miou"] <= now.best_miou:                          # also where there is none, nan
            before = now.best_miou, now.best_iteration
            now.best_miou, now.best_iteration = result["miou"], now.iteration
            if not world.from_main(world.main and self.save_best()):
                now.best_miou, now.best_iteration = before               # the next validation may do better
        self.save(must=now.iteration == self.cfg.iters)
        if world.main:
            run.draw_validation(self.look(), self.labels, now.iteration)

    def look(self) -> list[tuple]:
        """The first photos of the validation set, their labels, what the network makes of them."""
        pairs = [self.val_pairs.read(i) for i in range(min(4, len(self.val_pairs)))]
        found = [predict_labels(self.model.eval(), [image])[0] for image, _ in pairs]
        self.model.train()
        return [(image, label, pred) for (image, label), pred in zip(pairs, found)]

    def leave(self):
        """End as the signal asks, with its exit code; all processes together."""
        if self.saved < self.progress.iteration:
            self.save(must=True)
        number = self.stop.number or signal.SIGTERM                      # none: another process was asked to stop
        self.world.say(f"stopped by {signal.Signals(number).name} after iteration {self.progress.iteration}; "
                       f"{self.run.folder / checkpoint.LAST} is saved, --resume goes on")
        raise SystemExit(128 + number)


def dry_run(cfg: Config, world: World, steps: int = 4):
    """Data, weights, memory and a few real steps, without leaving a file; says what the whole run will take."""
    with world.together():
        labels = label_set(cfg)
        train_pairs, val_pairs = open_split(cfg, "train"), open_split(cfg, "val")
    world.agree((fingerprint(train_pairs), fingerprint(val_pairs)), "data set")
    with world.together():
        batches = train_loader(cfg, train_pairs, world.rank, world.size)
        model = build_model(cfg, labels.classes)
    network, optimizer, scaler = prepare(model, cfg, world)
    world.say(describe(model, cfg, world, len(train_pairs)))
    model.train()
    times = []
    for it in range(steps):
        begun = time.monotonic()
        parts, finite, _ = train_step(network, optimizer, scaler, [next(batches) for _ in range(cfg.accum_steps)],
                                      cfg, world, it)
        times.append(time.monotonic() - begun)
        values = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
        world.say(f"step {it + 1}: {times[-1]:.2f} s, {values}" + ("" if finite else " (skipped: not finite)"))
    begun = time.monotonic()
    chosen = range(min(4, len(val_pairs)))
    predict_labels(model.eval(), [val_pairs.read(i)[0] for i in chosen])
    each = (time.monotonic() - begun) / len(chosen)
    validation = each * len(val_pairs) / world.size * math.ceil(cfg.iters / cfg.eval_every)
    training = sorted(times[1:])[len(times[1:]) // 2] * cfg.iters        # the first step also starts the loader
    trained = sum(t.nbytes for t in checkpoint.model_state(model).values())
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    world.say(f"dry run: all well; {memory(world.device):.1f} GiB per process; {cfg.iters} iterations take about "
              f"{training / 3600:.1f} hours and validation {validation / 3600:.1f}; "
              f"checkpoints take {(4 * trained + 3 * moments) / 2 ** 30:.1f} GiB of disk")


def check_place(cfg: Config, args: argparse.Namespace):
    """Refuse the config of a run's folder that was copied or moved: going on from it would change the other run."""
    beside = user_path(args.cfg).resolve().parent
    told = parse_overrides(args.overrides)
    if "out" not in told and (beside / checkpoint.LAST).exists() and beside != Path(cfg.out).resolve():
        raise UserError(f"{args.cfg} lies in the folder of a run, but names {cfg.out} as its own: say which it is with "
                        "out=FOLDER")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Train SCHNet.",
                                     epilog="key=value: overrides of the config, see config.py")
    parser.add_argument("--cfg", default="configs/demo.yaml", help="a file of configs/; the demo if not given")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)              # options may stand between overrides

    def work(world: World):
        try:
            with world.together():
                cfg = load_config(args.cfg, args.overrides)
                check_batch(cfg, world)
                check_place(cfg, args)
            if cfg.iters:
                Trainer(cfg, world, args.resume).fit()
            else:
                others = [item for item in args.overrides if "iters" not in parse_overrides([item])]
                with world.together():
                    cfg = load_config(args.cfg, others)
                    if not cfg.iters:
                        raise UserError(f"{args.cfg}: iters is 0; a dry run needs the number of the real one there, "
                                        "and iters=0 on the command line")
                dry_run(cfg, world)
        finally:
            end_workers()

    run_together(work, less_memory="checkpointing=true (recomputes the encoder layers in the backward pass), "
                                   "accum_steps=2 (the same batch in two halves), or fewer workers")


if __name__ == "__main__":
    main()
