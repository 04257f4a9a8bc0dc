"""A data set and a network that are small enough to train in a test, and processes to train them in."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from PIL import Image

import clip_vit
import sam_vit
import train
from config import Config
from files.labels import LABEL_SETS
from engine import checkpoint
from engine.processes import World
from model import build_model

sam_vit.SIZES |= {"tiny": (16, 4, 2, 2, 2), "tests": (32, 4, 2, 3, 4)}
clip_vit.SIZES |= {"tiny": (16, 4, 2, 2, 8, 8, 1, 2), "tests": (32, 4, 2, 4, 16, 16, 1, 2)}

SIZE = 32
CONFIG = {
    "dataset": "custom", "classes": ["ground", "left", "right"], "flip_pairs": [[1, 2]], "crop_size": SIZE,
    "base_size": SIZE, "scale_range": [0.75, 1.25], "workers": 0, "sam_weights": "", "clip_weights": "", "vocab": "",
    "freeze": False, "sam": "tiny", "clip": "tiny", "clip_taps": [0, 1, 2, 3], "ftm_tokens": 4, "prior_dim": 8, "deform_heads": 2, "deform_points": 2,
    "head_dim": 8, "aux_dim": 8, "iters": 4, "batch_size": 4, "loss_group": 2, "lr": 1e-3, "warmup_iters": 1,
    "precision": "fp32", "log_every": 2, "eval_every": 2, "save_every": 1}


SMALL = dict(
    dataset="synthetic", crop_size=(64, 64), base_size=64, sam_weights="", clip_weights="", vocab="", sam="tests",
    clip="tests", clip_taps=(0, 1, 2, 3), ftm_tokens=8, prior_dim=8,
    deform_heads=2, head_dim=16, aux_weight=0.0, tta_scales=(1.0, 1.5))


def small_run(path: Path) -> Path:
    """A run in the folder `path` whose small random network finds many of LIP's classes in a photo."""
    torch.manual_seed(0)
    labels = LABEL_SETS["lip"]
    model = build_model(Config(**SMALL), labels.classes)
    torch.nn.init.normal_(model.head.conv_seg.weight, std=2.0)
    path.mkdir()
    checkpoint.write(path / checkpoint.LAST, checkpoint.pack(model, labels, {}, {}))
    return path


def make_data(root: Path, train: int = 10, val: int = 7):
    """Photos with a bright left and a dark right patch, and their labels, in the folders of `dataset: custom`."""
    for split, count in (("train", train), ("val", val)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng((count, i))
            label = np.zeros((SIZE, SIZE + i % 3), np.uint8)
            top, left = rng.integers(2, SIZE // 2, 2)
            label[top:top + 12, left:left + 6], label[top:top + 12, left + 6:left + 12] = 1, 2
            image = rng.integers(0, 40, (*label.shape, 3)) + np.array([90, 210, 30])[label][..., None]
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{i}.png")
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")


def make_config(folder: Path) -> str:
    """The path of a config file, beside which its data and its run lie."""
    make_data(folder / "data")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"data_root": str(folder / "data"), "out": str(folder / "run")}))
    return str(path)


# ---- one step

ALONE = SimpleNamespace(rank=0, size=1, main=True, device=torch.device("cpu"), sum=list, gather=lambda value: [value])


def gradients(cfg: Config, parts: int, dtype=torch.float64, world: World = ALONE, **changes) -> dict:
    """The gradient of one batch of 4, cut into `parts` micro-batches per process; BatchNorm frozen, nothing dropped."""
    cfg = dataclasses.replace(cfg, drop_path=0.0, head_dropout=0.0, accum_steps=parts, **changes)
    torch.manual_seed(0)
    model = build_model(cfg, cfg.classes).to(dtype)
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (4, 3, 32, 32), generator=g, dtype=torch.uint8)
    label = torch.randint(0, 3, (4, 32, 32), generator=g, dtype=torch.uint8)
    label[:, :3] = 255
    model.register_forward_pre_hook(lambda _, args: args[0].to(dtype))
    learner = train.Learner(model, cfg, world)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    batches = [(i, n, None) for i, n in zip(image.chunk(parts * world.size), label.chunk(parts * world.size))]
    learner.gradient(batches[world.rank * parts:(world.rank + 1) * parts], it=5)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def with_faults(gradient, faults: dict[int, str]):
    """`Learner.gradient` with an "image", "loss" or "gradient" that is nan at these iterations."""
    def faulty(learner, micro_batches, it):
        hooks, kind = [], faults.get(it)
        if kind == "image":                                # reaches BatchNorm's statistics
            hooks.append(learner.network.register_forward_pre_hook(lambda _, images: images[0] * torch.nan))
        if kind == "loss":
            hooks.append(learner.network.register_forward_hook(lambda _, __, logits: (logits[0] * torch.nan, logits[1])))
        if kind == "gradient":
            hooks.append(learner.network.register_forward_hook(
                lambda _, __, logits: logits[0].register_hook(lambda gradient: gradient * torch.nan) and None))
        losses = gradient(learner, micro_batches, it)
        for hook in hooks:
            hook.remove()
        return losses
    return faulty


def worst(a: dict, b: dict) -> float:
    """Largest relative difference between two gradients, over the tensors."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in a if b[name].any())


# ---- comparing runs

def logged(folder: Path) -> list[dict]:
    """The log without what depends on the machine."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in ("seconds", "waiting", "gib")} for entry in entries]


def differences(a, b, where: str = "") -> list[str]:
    """The places at which two checkpoints differ in a single bit; times and the folder's name do not count."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        keys = [key for key in a if key not in ("seconds", "out")]
        return [place for key in keys for place in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        return [place for n, (x, y) in enumerate(zip(a, b)) for place in differences(x, y, f"{where}.{n}")]
    return [] if a == b else [where]


def assert_same_run(a: Path, b: Path):
    """Weights, optimiser, progress, best network and log, to the last bit."""
    for name in ("last.pt", "best.pt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        assert differences(first, second) == [], name
    assert logged(a) == logged(b)


# ---- processes of their own: a server that has imported the program once starts them in a moment

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tiny"])
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)       # the server looks for it before it has been told sys.path


def _child(action, args, output: Path, environment: dict[str, str], tests: int):
    os.setsid()                                            # a group of its own, as torchrun and Slurm give it
    os.environ.update(environment)
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    threading.Thread(target=_end_with, args=(tests,), daemon=True).start()
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)   # as in a process that no server started
    action(*args)


def _end_with(tests: int):
    """Nothing is left over when the tests themselves are killed."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(tests, 0)                              # does it exist?
            time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Processes:
    """`count` processes that run `action(*args)`, as torchrun would set them up but without its help when one dies."""

    def __init__(self, folder: Path, action, *args, count: int = 1, **environment: str):
        port = free_port()
        self.outputs, self.all = [], []
        for rank in range(count):
            place = {} if count == 1 else {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank),
                                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.outputs.append(folder / f"output{rank}.txt")
            task = (action, args, self.outputs[-1], place | environment, os.getpid())
            self.all.append(FORKSERVER.Process(target=_child, args=task))
            self.all[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.join()
            with contextlib.suppress(ProcessLookupError):  # loaders that it left
                os.killpg(process.pid, signal.SIGKILL)

    def wait(self, seconds: float = 180) -> list[int]:
        """The exit codes; a process that is still there after `seconds` has none."""
        end = time.monotonic() + seconds
        for process in self.all:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.all]

    def said(self, rank: int = 0) -> str:
        """What it printed, but for the lines of torch 2.8's gloo about its connections."""
        text = self.outputs[rank].read_text() if self.outputs[rank].exists() else ""
        return re.sub(r"\[Gloo\] Rank \d+ is connected to .*\n", "", text)

    def send(self, number: signal.Signals, rank: int = 0):
        os.kill(self.all[rank].pid, number)


def wait_until(true, seconds: float = 180):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
