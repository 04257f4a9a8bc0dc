"""Train SCHNet (§4.3).

    python train.py                                                     the demo: drawn people, a small network, a CPU
    torchrun --nproc_per_node 4 train.py --cfg configs/cihp.yaml        the paper's setting: 16 images on 4 GPUs
    python train.py --cfg configs/cihp.yaml accum_steps=4               one GPU, the same 16 images per step
    python train.py --cfg configs/cihp.yaml --resume                    go on from runs/cihp/last.pt, exactly
    python train.py --cfg configs/cihp.yaml iters=0                     a dry run: data, weights, memory, time per step

One process or many, one node or many, CPU or GPU: the same file. Leaves in runs/<config>/: last.pt, previous.pt, best.pt,
config.yaml, log.jsonl, curves.png, validation.png.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import pictures
import plots
from config import Config, ConfigError, load_config, to_yaml
from checkpoint import CheckpointError
from datasets import label_set, open_split, train_loader
from evaluate import ERRORS, autocast, evaluate_split, pick_device, predict_labels, scores
from losses import parsing_loss
from model import SCHNet, build_model

# Keys that may change when a run goes on: where things lie, how often something is done, how the work is cut up.
HARMLESS = {"data_root", "sam_weights", "clip_weights", "vocab", "workers", "log_every", "eval_every", "save_every", "out",
            "checkpointing", "compile", "tta_scales", "accum_steps"}

LOSSES = ("loss", "ce", "lovasz", "aux")


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


# --------------------------------------------------------------------------------------------- schedule and parameter groups

def get_lr(it: int, cfg: Config) -> float:
    """The learning rate of iteration `it` (0-based): linear warm-up (§4.3), then polynomial decay to 0 (ViT-Adapter)."""
    rate = cfg.lr * (1 - it / max(1, cfg.iters)) ** cfg.poly_power
    if it < cfg.warmup_iters:
        rate *= 1 - (1 - it / cfg.warmup_iters) * (1 - cfg.warmup_ratio)
    return rate


def param_groups(model: SCHNet) -> list[dict]:
    """AdamW's groups: (decay, no decay) x (patch embedding, the rest). What must not be pulled to zero: biases, norms and other
    vectors, FTM's tokens and rho, the injectors' gamma, level embedding, position tables."""
    patch = {id(p) for p in (model.sam.patch_embed if model.cfg.backbone == "sam" else model.clip.conv1).parameters()}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tables = ("tokens", "level_embed", "pos_embed", "positional_embedding", "rel_pos_h", "rel_pos_w")
            decay = model.cfg.weight_decay if p.ndim > 1 and not name.endswith(tables) else 0.0
            factor = model.cfg.patch_embed_lr_mult if id(p) in patch else 1.0
            group = groups.setdefault((decay, factor), {"params": [], "weight_decay": decay, "lr_factor": factor})
            group["params"].append(p)
    return list(groups.values())


def seed_step(seed: int, it: int, micro_batch: int):
    """Dropout and DropPath as a function of the seed, the iteration and the micro-batch's place in the whole batch. Reseeding
    each step leaves no random state to save: a resumed run draws what an uninterrupted one would have drawn."""
    torch.manual_seed((seed * 1_000_003 + it) * 4_096 + micro_batch)


# ----------------------------------------------------------------------------------------------------------------- processes

class World:
    """This process among the others: torchrun's environment, or one process alone."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device()
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.control = None                                              # a CPU group for numbers and counts
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
            self.control = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        self.main = self.rank == 0
        self.training = False                                            # from here on an error may be this process's alone

    def say(self, *words):
        if self.main:
            tqdm.write(" ".join(str(w) for w in words), file=sys.stdout)

    def sum(self, values: list[float]) -> list[float]:
        """The sum over all processes, the same on each. float64, so that counts stay exact."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.control)
        return total.tolist()

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the current step; a second one ends the process at once.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun: what follows within seconds is the same one.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0
        self.grace = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if self.number and time.monotonic() - self.since >= self.grace:
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()


# ------------------------------------------------------------------------------------------------------------------ the step

def train_step(network: nn.Module, optimizer, scaler, batches: list, cfg: Config, device: torch.device, it: int,
               first_micro_batch: int = 0) -> dict[str, float]:
    """One optimiser step over the micro-batches of this process; returns the loss and its parts, averaged over them.

    `network` is the model or its DDP wrapper: gradients travel once, with the last micro-batch. The step is left out, and the
    weights stay as they are, when the loss is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = get_lr(it, cfg) * group["lr_factor"]
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for n, (image, label, _) in enumerate(batches):
        seed_step(cfg.seed, it, first_micro_batch + n)
        last = n == len(batches) - 1
        with contextlib.nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync():
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
    names = list(totals)
    values = torch.stack([totals[name].double() for name in names]).tolist()             # the step's only wait for the GPU
    return dict(zip(names, values))


# ------------------------------------------------------------------------------------------------------------------- the run

class Run:
    """The folder of a run: checkpoints, the log, the pictures. Only the main process writes."""

    def __init__(self, cfg: Config, world: World):
        self.cfg, self.world = cfg, world
        self.folder = Path(cfg.out or "runs/demo")
        self.log = self.folder / "log.jsonl"

    def open(self, resume: bool):
        """Make the folder, or go on in it. A finished or half-finished run is never overwritten."""
        taken = (self.folder / checkpoint.LAST).exists() or (self.folder / checkpoint.PREVIOUS).exists()
        if taken and not resume:
            raise ConfigError(f"{self.folder} already holds a run: go on with --resume, or choose another folder with out=FOLDER")
        if resume and not taken and not self.world.restarted:
            raise CheckpointError(f"{self.folder}: no checkpoint to go on from (no {checkpoint.LAST})")
        try:
            if self.world.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "config.yaml").write_text(to_yaml(self.cfg))
        except OSError as error:
            raise ConfigError(f"out: {self.folder} cannot be written ({error.strerror})") from None
        return taken

    def write(self, entry: dict):
        if self.world.main:
            with open(self.log, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def entries(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def cut_log(self, iteration: int):
        """Drop what was logged after the checkpoint that the run goes on from (and a line that a kill left half-written)."""
        if self.world.main and self.log.exists():
            kept = []
            for line in self.log.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    if json.loads(line)["iter"] <= iteration:
                        kept.append(line + "\n")
            temporary = self.log.with_name(".log.part")
            temporary.write_text("".join(kept))
            os.replace(temporary, self.log)

    def draw(self):
        """curves.png from the log: the loss and its parts, the learning rate, the validation scores."""
        if not self.world.main:
            return
        entries = self.entries()
        train, val = [e for e in entries if "loss" in e], [e for e in entries if "miou" in e]
        at = [e["iter"] for e in train]
        panels = {"loss": {name: (at, [e[name] for e in train]) for name in LOSSES if train and name in train[0]},
                  "learning rate": {"lr": (at, [e["lr"] for e in train])}}
        if val:
            panels["validation"] = {name: ([e["iter"] for e in val], [e[name] for e in val])
                                    for name in ("miou", "mean_acc", "pixel_acc")}
        if train:
            pictures.save_png(self.folder / "curves.png", plots.curves(panels, smooth=["loss"]))


def resume(run: Run, model: SCHNet, optimizer, scaler, official: dict[str, str], world: World) -> dict:
    """Load the newest whole checkpoint of the run into the model and the optimiser; returns its content."""
    content, path, warnings = checkpoint.read_last(run.folder)
    for warning in warnings:
        world.say(f"warning: {warning}; using {path}")
    cfg, old = run.cfg, content["config"]
    changed = {key: (old.get(key), getattr(cfg, key)) for key in cfg.__dataclass_fields__ if old.get(key) != getattr(cfg, key)}
    listed = ", ".join(f"{key} {was!r} -> {now!r}" for key, (was, now) in changed.items() if key in HARMLESS)
    refused = ", ".join(f"{key} {was!r} -> {now!r}" for key, (was, now) in changed.items() if key not in HARMLESS)
    if refused:
        raise ConfigError(f"{path} was trained with another configuration ({refused}): restore it, or start a new run with out=FOLDER")
    if content["official"] != official:
        raise CheckpointError(f"{path} was trained on other official weights than {', '.join(official) or 'none'} now name")
    checkpoint.load_state(model, content["model"], content, path)
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    run.cut_log(content["iteration"])
    world.say(f"going on from {path}, iteration {content['iteration']}" + (f"; changed: {listed}" if listed else ""))
    return content


def validate(run: Run, model: SCHNet, pairs, labels, it: int, seconds: float) -> float:
    """Single-scale scores on the whole validation set, shared out over the processes; the log, the curves and a picture."""
    world = run.world
    if world.size > 1:                                                   # BatchNorm statistics of a CPU run differ by process
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    matrix, _ = evaluate_split(model, pairs, len(labels.classes), rank=world.rank, world=world.size, group=world.control,
                               progress=world.main)
    result = scores(matrix)
    run.write({"iter": it, **{key: result[key] for key in ("miou", "mean_acc", "pixel_acc")}, "iou": result["iou"],
               "seconds": round(seconds, 1)})
    world.say(f"iteration {it}: mIoU {100 * result['miou']:.2f}, mean accuracy {100 * result['mean_acc']:.2f}, "
              f"pixel accuracy {100 * result['pixel_acc']:.2f} on {len(pairs)} images")
    if world.main:
        run.draw()
        model.eval()
        rows = []
        for i in range(min(4, len(pairs))):
            image, label = pairs.read(i)
            pred = predict_labels(model, [image])[0]
            rows.append([image] + [pictures.overlay(image, part, labels.palette) for part in (label, pred)])
        sheet = pictures.sheet(rows, titles=["photo", "truth", f"iteration {it}"])
        pictures.save_png(run.folder / "validation.png", pictures.with_legend(sheet, labels.classes, labels.palette, size=16))
        model.train()
    return result["miou"]


def describe(model: SCHNet, cfg: Config, world: World, count: int) -> str:
    """What is about to be trained, and on what, in two lines."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    each = cfg.batch_size // (world.size * cfg.accum_steps)
    return (f"{trained / 1e6:.2f} M parameters trained, {(total - trained) / 1e6:.2f} M frozen; {count} training images\n"
            f"{cfg.iters} iterations of {cfg.batch_size} images = {world.size} processes x {cfg.accum_steps} steps x {each}, "
            f"{cfg.precision} on {world.device.type}")


def memory(device: torch.device) -> float:
    """GiB: the peak on a GPU; on a CPU what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 30


def train(cfg: Config, go_on: bool, world: World, stop: StopSignal):
    """The whole run; every process calls it."""
    # ------------------------------------------------------------------------------------------------------ data and model
    labels = label_set(cfg)
    train_pairs, val_pairs = open_split(cfg, "train"), open_split(cfg, "val")
    run = Run(cfg, world)
    go_on = run.open(go_on or world.restarted)
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, labels.classes)
    official = checkpoint.official_files(model)
    network = prepare(model, cfg, world)
    optimizer = torch.optim.AdamW(param_groups(model), lr=cfg.lr, betas=cfg.betas, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "fp16")
    state = {"iteration": 0, "best": {"miou": -1.0, "iter": 0}, "window": {}, "count": 0, "seconds": 0.0}
    if go_on:
        content = resume(run, model, optimizer, scaler, official, world)
        state = {key: content[key] for key in state}
    world.say(describe(model, cfg, world, len(train_pairs)))
    world.training = True

    def save(name: str):
        if world.main:
            more = {} if name == checkpoint.BEST else {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            content = checkpoint.pack(model, labels, official, **state, **more)
            if name == checkpoint.LAST:
                checkpoint.write_last(run.folder, content)
            else:
                checkpoint.write(run.folder / name, content)

    # ------------------------------------------------------------------------------------------------------------ the loop
    batches = train_loader(cfg, train_pairs, world.rank, world.size, state["iteration"])
    begun = time.monotonic() - state["seconds"]
    bar = tqdm(total=cfg.iters, initial=state["iteration"], unit="it", disable=not world.main, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 30)
    model.train()
    for it in range(state["iteration"], cfg.iters):
        micro_batches = [next(batches) for _ in range(cfg.accum_steps)]
        parts = train_step(network, optimizer, scaler, micro_batches, cfg, world.device, it, world.rank * cfg.accum_steps)
        stopping, *sums = world.sum([float(stop.number > 0), *parts.values()])
        if not all(map(math.isfinite, sums)):
            raise TrainingError(not_finite(run, it, parts, micro_batches))
        scaler.step(optimizer)
        scaler.update()

        parts = {name: total / world.size for name, total in zip(parts, sums)}
        state["window"] = {name: state["window"].get(name, 0.0) + value for name, value in parts.items()}
        state["count"] += 1
        state["iteration"], state["seconds"] = it + 1, time.monotonic() - begun
        last = it + 1 == cfg.iters
        bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in parts.items())
                            + f" lr {get_lr(it, cfg):.1e} {memory(world.device):.1f} GiB", refresh=False)
        bar.update()

        # every log_every iterations: the mean since the last entry
        if (it + 1) % cfg.log_every == 0 or last:
            means = {name: total / state["count"] for name, total in state["window"].items()}
            run.write({"iter": it + 1, **means, "lr": get_lr(it, cfg), "seconds": round(state["seconds"], 1),
                       "gib": round(memory(world.device), 2)})
            state["window"], state["count"] = {}, 0

        # every eval_every iterations: the validation set, all processes together
        if (it + 1) % cfg.eval_every == 0 or last:
            miou = validate(run, model, val_pairs, labels, it + 1, state["seconds"])
            if miou > state["best"]["miou"]:
                state["best"] = {"miou": miou, "iter": it + 1}
                save(checkpoint.BEST)

        # every save_every iterations: what a run can go on from
        if (it + 1) % cfg.save_every == 0 or last or stopping:
            state["seconds"] = time.monotonic() - begun
            try:
                save(checkpoint.LAST)
            except CheckpointError as error:
                if last or stopping:
                    raise
                world.say(f"warning: {error}; training goes on, the next try is in {cfg.save_every} iterations")
            run.draw()
        if stopping and not last:
            bar.close()
            name = signal.Signals(stop.number or signal.SIGTERM).name
            world.say(f"stopped by {name} after iteration {it + 1}; {run.folder / checkpoint.LAST} is saved, --resume goes on")
            raise SystemExit(128 + (stop.number or signal.SIGTERM))
    bar.close()
    best = state["best"]
    world.say(f"done: best mIoU {100 * best['miou']:.2f} at iteration {best['iter']}, {run.folder / checkpoint.BEST}; curves in "
              f"{run.folder / 'curves.png'}\nnext: python evaluate.py --run {run.folder} --tta")


def prepare(model: SCHNet, cfg: Config, world: World) -> nn.Module:
    """The model on its device, wrapped for several processes; what it returns is called in training."""
    if world.size > 1 and world.device.type == "cuda" and cfg.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(world.device)
    if cfg.compile:
        model.compile()
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device.index] if world.device.type == "cuda" else None)


def not_finite(run: Run, it: int, parts: dict[str, float], micro_batches: list) -> str:
    """The message for a loss that is not finite; nothing of this step has reached the weights."""
    mine = [name for _, _, names in micro_batches for name in names] if not all(map(math.isfinite, parts.values())) else []
    found = [mine]
    if run.world.size > 1:
        found = [None] * run.world.size
        dist.all_gather_object(found, mine, group=run.world.control)
    last = run.folder / checkpoint.LAST
    kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
    return (f"iteration {it + 1}: the loss is not finite ({', '.join(f'{k} {v:.3g}' for k, v in parts.items())}); the batch was "
            f"{', '.join(name for names in found for name in names)}; {kept}")


def dry_run(cfg: Config, planned: int, world: World, steps: int = 4):
    """Data, weights, memory and a few real steps, without a folder or a file; says what `planned` iterations will take."""
    labels = label_set(cfg)
    train_pairs, val_pairs = open_split(cfg, "train"), open_split(cfg, "val")
    model = build_model(cfg, labels.classes)
    network = prepare(model, cfg, world)
    optimizer = torch.optim.AdamW(param_groups(model), lr=cfg.lr, betas=cfg.betas, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "fp16")
    world.say(describe(model, dataclasses.replace(cfg, iters=planned), world, len(train_pairs)))
    model.train()
    batches = train_loader(cfg, train_pairs, world.rank, world.size)
    times = []
    for it in range(steps):
        begun = time.monotonic()
        parts = train_step(network, optimizer, scaler, [next(batches) for _ in range(cfg.accum_steps)], cfg, world.device, it,
                           world.rank * cfg.accum_steps)
        scaler.step(optimizer)
        scaler.update()
        times.append(time.monotonic() - begun)
        world.say(f"step {it + 1}: {times[-1]:.2f} s, " + ", ".join(f"{name} {value:.3f}" for name, value in parts.items()))
    predict_labels(model.eval(), [val_pairs.read(0)[0]])
    seconds = sorted(times[1:])[len(times[1:]) // 2]
    world.say(f"dry run: all well; {seconds:.2f} s per iteration, {memory(world.device):.1f} GiB per process: {planned} iterations "
              f"take about {seconds * planned / 3600:.1f} hours without validation")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Train SCHNet.", epilog="key=value: overrides of the config, see config.py")
    parser.add_argument("--cfg", default="configs/demo.yaml", help="a file of configs/; the demo if not given")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    world = None
    try:
        cfg = load_config(args.cfg, args.overrides)
        world, stop = World(), StopSignal()
        if cfg.iters:
            train(cfg, args.resume, world, stop)
        else:
            others = [item for item in args.overrides if not item.startswith("iters=")]
            dry_run(cfg, load_config(args.cfg, others).iters, world)
    except (*ERRORS, TrainingError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = "out of GPU memory: try checkpointing=true, or accum_steps=2 (the same batch in two halves)"
        if world is None or world.main:
            sys.exit(f"error: {error}")
        sys.exit(f"error in process {world.rank}: {error}" if world.training else 1)
    finally:
        if world is not None:
            world.close()


if __name__ == "__main__":
    main()
