"""A data set and a network small enough to train in a test, and processes that train it."""

import atexit
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

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import clip_vit
import sam_vit
import train
from config import Config, to_yaml
from engine import checkpoint
from engine.processes import World
from files.labels import LABEL_SETS
from model import build_model

sam_vit.SIZES |= {"tiny": (16, 4, 2, 2, 2), "tests": (32, 4, 2, 3, 4)}
clip_vit.SIZES |= {"tiny": (16, 4, 2, 2, 8, 8, 1, 2), "tests": (32, 4, 2, 4, 16, 16, 1, 2)}

SIZE = 32
RANDOM = dict(sam_weights="", clip_weights="", vocab="", clip_taps=(0, 1, 2, 3), prior_dim=8, deform_heads=2)
SMALL = RANDOM | dict(dataset="synthetic", crop_size=(64, 64), base_size=64, sam="tests", clip="tests", ftm_tokens=8,
                      head_dim=16, aux_weight=0.0, tta_scales=(1.0, 1.5))
TINY = RANDOM | dict(crop_size=(SIZE, SIZE), base_size=SIZE, sam="tiny", clip="tiny", ftm_tokens=4, deform_points=2,
                     head_dim=8, aux_dim=8, precision="fp32")
RUN = TINY | dict(dataset="custom", classes=("ground", "left", "right"), flip_pairs=((1, 2),), scale_range=(0.75, 1.25),
                  workers=0, freeze=False, iters=4, batch_size=4, loss_group=2, lr=1e-3, warmup_iters=1, log_every=2,
                  eval_every=2, save_every=1)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (6, 5, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def read(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def small_run(path: Path) -> Path:
    """Writes a run to `path` whose small random network predicts many of LIP's classes; returns `path`."""
    torch.manual_seed(0)
    labels = LABEL_SETS["lip"]
    model = build_model(Config(**SMALL), labels.classes)
    torch.nn.init.normal_(model.head.conv_seg.weight, std=2.0)
    path.mkdir()
    checkpoint.write(path / checkpoint.LAST, checkpoint.pack(model, labels, {}, {}))
    return path


def make_data(root: Path, train: int = 10, val: int = 7):
    """Writes photos with a left and a right patch, and their labels, in the folders of `dataset: custom`."""
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
    """Writes a config file and its data into `folder`, where the run will be too; returns the file's path."""
    make_data(folder / "data")
    (folder / "tiny.yaml").write_text(to_yaml(Config(**RUN, data_root=str(folder / "data"), out=str(folder / "run"))))
    return str(folder / "tiny.yaml")


# ---- values

def close(a, b, tolerance: float = 1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def shake(module: torch.nn.Module) -> torch.nn.Module:
    """Adds noise to the parameters and BatchNorm statistics: initial zeros and ones would hide errors."""
    torch.manual_seed(1)
    for p in module.parameters():
        p.add_(0.2 * torch.randn_like(p))
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 2)
    return module


# ---- one step

ALONE = SimpleNamespace(rank=0, size=1, main=True, device=torch.device("cpu"), sum=list, gather=lambda value: [value])


def gradients(cfg: Config, parts: int, dtype=torch.float64, world: World = ALONE, **changes) -> dict:
    """The gradient of a batch of 4 in `parts` micro-batches per process, with frozen BatchNorm and no dropout."""
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


FAULTS = {
    "image": lambda net: net.register_forward_pre_hook(lambda _, args: args[0] * torch.nan),     # BatchNorm too
    "loss": lambda net: net.register_forward_hook(lambda _, __, out: (out[0] * torch.nan, out[1])),
    "gradient": lambda net: net.register_forward_hook(
        lambda _, __, out: out[0].register_hook(lambda gradient: gradient * torch.nan) and None)}


def with_faults(gradient, faults: dict[int, str]):
    """`Learner.gradient` with a NaN image, loss or gradient; `faults`: {iteration: which of them}."""
    def faulty(learner, micro_batches, it):
        hooks = [FAULTS[faults[it]](learner.network)] if it in faults else []
        losses = gradient(learner, micro_batches, it)
        for hook in hooks:
            hook.remove()
        return losses
    return faulty


def worst(a: dict, b: dict) -> float:
    """The largest relative difference of a tensor between two gradients."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in a if b[name].any())


# ---- interrupted runs

GRADIENT = train.Learner.gradient


class Killed(BaseException):
    """Simulates SIGKILL: no code catches it, so the files are those that a kill leaves."""


def throw(error: BaseException):
    raise error


def before_step(it: int, action):
    """`Learner.gradient` that calls `action` before iteration `it`."""
    gradient = train.Learner.gradient                      # may be replaced already

    def changed(self, micro_batches, now):
        if now == it:
            action()
        return gradient(self, micro_batches, now)
    return changed


def kill_and_resume(argv: list[str], folder: Path, at: int, *overrides: str):
    """Trains, is killed at iteration `at`, and resumes to the end with `overrides`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Learner, "gradient", before_step(at, lambda: throw(Killed())))
        with pytest.raises(Killed):
            train.main([*argv, f"out={folder}"])
    train.main([*argv, f"out={folder}", "--resume", *overrides])


def ends(code: int, *argv: str):
    with pytest.raises(SystemExit) as end:
        train.main(list(argv))
    assert end.value.code == code


def fails(capsys, *argv: str) -> str:
    """The error line of a training run that must fail."""
    ends(1, *argv)
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


def progress(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)["progress"]


# ---- comparing runs

def logged(folder: Path) -> list[dict]:
    """The log without entries that depend on the machine."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    left_out = {"seconds", "waiting", "gib"}
    return [{key: value for key, value in entry.items() if key not in left_out} for entry in entries]


def differences(a, b, where: str = "") -> list[str]:
    """The keys at which two checkpoints are not bit-identical, except for times, folder and save interval."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if not isinstance(a, dict):
        return [] if a == b else [where]
    assert a.keys() == b.keys(), where
    keys = [key for key in a if key not in ("seconds", "out", "save_every")]
    return [place for key in keys for place in differences(a[key], b[key], f"{where}.{key}")]


def assert_same_run(a: Path, b: Path):
    """Asserts that weights, optimizer, progress, best checkpoint and log are bit-identical."""
    for name in ("last.pt", "best.pt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        assert differences(first, second) == [], name
    assert logged(a) == logged(b)


# ---- processes, forked from a server that has already imported the program

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tiny", "torch._dynamo"])           # the first optimizer would import it
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)       # the server imports `tiny` before sys.path is set


def _child(action, args, output: Path, environment: dict[str, str], tests: int):
    os.setsid()                                            # a new process group, as under torchrun and Slurm
    os.environ.update(environment)
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    threading.Thread(target=_end_with, args=(tests,), daemon=True).start()
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)   # the default of a normal process
    try:
        action(*args)
    finally:
        atexit._run_exitfuncs()                            # multiprocessing skips these


def _end_with(tests: int):
    """Kills the process group if the tests themselves are killed."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(tests, 0)                              # raises if the process has ended
            time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Processes:
    """`count` processes that run `action(*args)` with torchrun's environment variables, but without torchrun."""

    def __init__(self, folder: Path, action, *args, count: int = 1, **environment: str):
        port = free_port()
        self.outputs, self.all = [], []
        for rank in range(count):
            place = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(port)}
            self.outputs.append(folder / f"output{rank}.txt")
            task = (action, args, self.outputs[-1], environment | (place if count > 1 else {}), os.getpid())
            self.all.append(FORKSERVER.Process(target=_child, args=task))
            self.all[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.join()
            with contextlib.suppress(ProcessLookupError):  # its children
                os.killpg(process.pid, signal.SIGKILL)

    def wait(self, seconds: float = 180) -> list[int]:
        """The exit codes; None for a process still running after `seconds`."""
        end = time.monotonic() + seconds
        for process in self.all:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.all]

    def printed(self, rank: int = 0) -> str:
        """The output of a process, without the connection messages of gloo (torch 2.8)."""
        text = self.outputs[rank].read_text() if self.outputs[rank].exists() else ""
        return re.sub(r"\[Gloo\] Rank \d+ is connected to .*\n", "", text)

    def send(self, number: signal.Signals, rank: int = 0):
        os.kill(self.all[rank].pid, number)


def wait_until(true, seconds: float = 180):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)
