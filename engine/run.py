"""A training run on disk: its folder, log, checkpoints and pictures, and what its progress is.

    runs/cihp/last.pt, best.pt               see checkpoint.py
    runs/cihp/config.yaml                    every setting of the run
    runs/cihp/log.jsonl                      a line per log_every iterations, and one per validation
    runs/cihp/curves.png, validation.png     plots, updated during training
    runs/cihp/.lock                          held by the process that trains in it

Only the main process opens and writes the folder: the others may be on machines that do not see it.
"""

import dataclasses
import errno
import fcntl
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import RESUMABLE, Config, to_yaml
from datasets import DrawnSet, LabelSet, PairSet, sample_warning
from engine import checkpoint
from engine.processes import Stop, StopSignal, World, device_name, memory
from errors import UserError
from files.atomic import LEFTOVERS, MARK, write_text
from viz import pictures, training

MAX_SKIPPED = 20                                           # consecutive steps with a non-finite loss or gradient
TIMED = 10                                                 # steps from which the expected time of a run is estimated


@dataclass
class Progress:
    """Training progress, saved with the weights, so that log and best score continue after a stop."""
    iteration: int = 0                                     # done, or skipped
    skipped: int = 0                                       # steps whose loss or gradient was not finite
    in_a_row: int = 0                                      # of these, since the last step that was taken
    validated: int = 0                                     # iteration of the newest validation
    best_miou: float = -1.0
    best_iteration: int = 0
    sums: dict[str, float] = field(default_factory=dict)   # of the losses since the last log entry
    count: int = 0
    train: str = ""                                        # fingerprints of both splits
    val: str = ""
    machine: str = ""                                      # where it was trained: processes and device
    seconds: float = 0.0


class Run:
    """The folder of a run and the record of its progress."""

    def __init__(self, cfg: Config, world: World, labels: LabelSet):
        self.cfg, self.world, self.labels = cfg, world, labels
        self.folder = Path(cfg.out or "runs/demo")
        self.log_path = self.folder / "log.jsonl"
        self.entries: list[dict] = []
        self.progress = Progress()
        self.saved = 0                                     # iteration of last.pt
        self.waited, self.logged = 0.0, time.monotonic()   # seconds waited for data since the last log entry; its time

    # ---- before training

    def open(self, resume: bool) -> dict | None:
        """Makes and locks the folder; returns the checkpoint to resume from. No run is ever overwritten."""
        with self.world.all_or_none():
            content = self._open(resume) if self.world.main else None
        return self.world.broadcast(content)

    def _open(self, resume: bool) -> dict | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()                                   # first: of two concurrent starts, one must see the other's files
        held = any(os.path.lexists(self.folder / name)                   # also a link to a disk that is not mounted
                   for name in (checkpoint.LAST, checkpoint.BEST))
        if held and not resume:
            raise UserError(f"{self.folder} already contains a run: continue it with --resume, or choose another with "
                            "out=FOLDER")
        foreign = [name for name in ("config.yaml", "log.jsonl") if os.path.exists(self.folder / name)]
        if foreign and not held and not (self.folder / MARK).exists():
            raise UserError(f"{self.folder}: {foreign[0]} is not that of a run: choose another folder with out=FOLDER")
        (self.folder / MARK).touch()
        for leftover in self.folder.glob(LEFTOVERS):
            leftover.unlink()
        if not held and resume:
            self.world.print0(f"{self.folder}: no checkpoint, starting a new run")
        return self._resume() if held else None

    def _lock(self):
        """An exclusive lock on the folder, released by the system when the process ends."""
        self.lock = open(self.folder / ".lock", "a")       # lockf works on NFS too
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:                           # anything else: a file system without locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{self.folder}: another process is training in this folder; choose another with "
                                "out=FOLDER") from None

    def _resume(self) -> dict:
        path = self.folder / checkpoint.LAST
        try:
            content = checkpoint.read(path)
        except UserError as error:
            hint = f"; init={self.folder} out=FOLDER starts a new run from {checkpoint.BEST}"
            raise UserError(str(error) + hint * (self.folder / checkpoint.BEST).exists()) from None
        old = dataclasses.asdict(Config()) | content["config"]           # a key may be newer than the checkpoint
        changed = {key: f"{key} {old[key]!r} -> {new!r}" for key, new in vars(self.cfg).items() if old[key] != new}
        refused = [text for key, text in changed.items() if key not in RESUMABLE]
        if refused:
            raise UserError(f"{path} was trained with other settings ({', '.join(refused)}): resume with "
                            f"--cfg {self.folder / 'config.yaml'} --resume, or start a new run with out=FOLDER")
        progress = content["progress"]
        if self.cfg.iters < progress["iteration"]:
            raise UserError(f"iters ({self.cfg.iters}) is below the {progress['iteration']} iterations of {path}")
        entries = training.read_log(self.log_path) if self.log_path.exists() else []
        self.entries = [entry for entry in entries
                        if entry["iter"] <= progress["validated" if "miou" in entry else "iteration"]]
        self.world.print0(f"resuming from {path}, iteration {progress['iteration']}"
                          + (f"; changed: {', '.join(changed.values())}" if changed else ""))
        return content

    def start(self, learner, content: dict | None, train: PairSet | DrawnSet, val: PairSet | DrawnSet):
        """Restores the learner from the checkpoint and claims the folder: config.yaml, log.jsonl."""
        self.official = checkpoint.official_files(learner.model)
        if content:
            checkpoint.load_optimizer(learner.model, learner.optimizer, content["optimizer"])
            learner.scaler.load_state_dict(content["scaler"])
            self.progress = Progress(**content["progress"])
        self._note_data(train.fingerprint, val.fingerprint)
        self.progress.machine = f"{self.world.size} x {device_name(self.world.device)}"
        self.saved = self.progress.iteration
        if self.world.main:
            write_text(self.folder / "config.yaml", to_yaml(self.cfg))
            self._write_log()                              # cut back to the checkpoint; empty for a new run
            for warning in (sample_warning(pairs, self.labels.classes) for pairs in (train, val)):
                if warning:
                    self.world.print0(f"warning: {warning}")
        self.started = time.monotonic() - self.progress.seconds
        self.first = self.progress.iteration
        self.bar = tqdm(total=self.cfg.iters, initial=self.first, unit="it", dynamic_ncols=True, mininterval=0.5,
                        disable=not (self.world.main and sys.stderr.isatty()))           # in a file: see log_means

    def _note_data(self, train: str, val: str):
        """Records the fingerprints of the splits; warns if they changed since the checkpoint."""
        progress = self.progress
        if progress.train not in ("", train):
            self.world.print0("warning: the training images or labels have changed "
                              f"({progress.train.split()[0]} images before, {train.split()[0]} now)")
        if progress.val not in ("", val):
            self.world.print0(f"warning: the validation set has changed: {checkpoint.BEST} will be the best on the new")
            progress.best_miou, progress.best_iteration = -1.0, 0
        progress.train, progress.val = train, val

    # ---- during training

    def due(self, every: int) -> bool:
        return self.progress.iteration % every == 0 or self.progress.iteration == self.cfg.iters

    def next_batches(self, batches: Iterator, stop: StopSignal, learner) -> list[tuple]:
        """The micro-batches of a step. Where a process was asked to stop or has no data, all save and end the run."""
        start, error, micro_batches = time.monotonic(), "", []
        try:
            with stop.wait():
                micro_batches = [next(batches) for _ in range(self.cfg.accum_steps)]
        except Stop:
            pass
        except UserError as fault:
            error = str(fault)
        self.waited += time.monotonic() - start
        stopping, failed = self.world.sum([stop.number > 0, error != ""])
        if stopping:
            self.stop(learner, stop.number)
        if failed:
            if self.saved < self.progress.iteration:
                self.save(learner)
            error = next(text for text in self.world.gather(error) if text)
            raise UserError(f"{error}; {self.last_checkpoint()}", everywhere=True)
        return micro_batches

    def count(self, losses: dict[str, float], taken: bool, names: list[str], lr: float):
        """Counts a step, taken or skipped; ends the run after too many skipped ones in a row."""
        progress = self.progress
        progress.iteration += 1
        if taken:
            progress.sums = {name: progress.sums.get(name, 0.0) + value for name, value in losses.items()}
            progress.count, progress.in_a_row = progress.count + 1, 0
        else:
            progress.skipped, progress.in_a_row = progress.skipped + 1, progress.in_a_row + 1
            what = "gradient" if math.isfinite(losses["loss"]) else "loss"
            self.record(iter=progress.iteration, skipped=what, batch=sum(self.world.gather(names), []))
            if progress.in_a_row >= MAX_SKIPPED:
                self._try_write(self._write_log)
                values = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
                raise UserError(f"iteration {progress.iteration}: {progress.in_a_row} steps in a row were skipped, the "
                                f"{what} is not finite ({values}); the batches are in {self.log_path}; "
                                f"{self.last_checkpoint()}", everywhere=True)
        self.bar.set_postfix_str(self._state(losses, lr), refresh=False)
        self.bar.update()
        if progress.iteration == self.first + 1:
            self.begun = time.monotonic()                  # the first step also waits for the first photos
        if progress.iteration == self.first + 1 + TIMED:
            self.world.print0(f"time     about {self._time_left()}, without validations")

    def _time_left(self) -> timedelta:
        """The time of the remaining iterations at the mean speed since the first."""
        progress, elapsed = self.progress, time.monotonic() - self.begun
        each = elapsed / (progress.iteration - self.first - 1)
        return timedelta(seconds=round(each * (self.cfg.iters - progress.iteration)))

    def _state(self, losses: dict[str, float], lr: float) -> str:
        shown = "".join(f"{name} {value:.3f} " for name, value in losses.items())
        skipped = f" {self.progress.skipped} skipped" if self.progress.skipped else ""
        return f"{shown}lr {lr:.1e} {memory(self.world.device):.1f} GiB{skipped}"

    def log_means(self, lr: float):
        """A log entry with the mean losses since the last one."""
        progress, now = self.progress, time.monotonic()
        means = {name: total / progress.count for name, total in progress.sums.items()}
        self.record(iter=progress.iteration, **means, lr=lr, seconds=round(now - self.started, 1),
                    waiting=round(self.waited / (now - self.logged), 3), gib=round(memory(self.world.device), 2))
        progress.sums, progress.count, self.waited, self.logged = {}, 0, 0.0, now
        self._try_write(self._write_log)
        if self.bar.disable:
            left = f", {self._time_left()} to go" if progress.iteration > self.first + 1 else ""
            self.world.print0(f"iteration {progress.iteration}/{self.cfg.iters}: {self._state(means, lr)}{left}")

    def validated(self, result: dict, images: int, learner):
        """A validation's scores: into the log, and best.pt where they are the best so far."""
        progress, last = self.progress, self.progress.iteration == self.cfg.iters
        progress.validated = progress.iteration
        self.record(iter=progress.iteration, **{key: result[key] for key in ("miou", "mean_acc", "pixel_acc", "iou")},
                    seconds=round(time.monotonic() - self.started, 1))
        self.world.print0(f"iteration {progress.iteration}: mIoU {100 * result['miou']:.2f}, "
                          f"mean accuracy {100 * result['mean_acc']:.2f}, "
                          f"pixel accuracy {100 * result['pixel_acc']:.2f} on {images} images")
        if not result["miou"] <= progress.best_miou:       # true for nan as well
            before = progress.best_miou, progress.best_iteration
            progress.best_miou, progress.best_iteration = result["miou"], progress.iteration
            if not self.world.broadcast(self.world.main and self._try_write(
                    checkpoint.write, self.folder / checkpoint.BEST, self._content(learner), must=last)):
                progress.best_miou, progress.best_iteration = before     # the next validation may write it
        self.save(learner, must=last)

    def stop(self, learner, number: int):
        """Saves and exits with the signal's exit code, all processes together."""
        if self.saved < self.progress.iteration:
            self.save(learner, must=True)
        number = number or signal.SIGTERM                  # none: another process was asked to stop
        saved = f"{self.folder / checkpoint.LAST} is saved" if self.saved else self.last_checkpoint()
        name = signal.Signals(number).name
        self.world.print0(f"stopped by {name} after iteration {self.progress.iteration}; {saved}")
        self.world.sum([0.0])                              # torchrun ends all when one exits: wait for the save
        raise SystemExit(128 + number)

    def finish(self):
        progress = self.progress
        if progress.skipped:
            self.world.print0(f"{progress.skipped} of {self.cfg.iters} steps were skipped: {self.log_path}")
        self.world.print0(f"done: best mIoU {100 * progress.best_miou:.2f} at iteration {progress.best_iteration}, "
                          f"{self.folder / checkpoint.BEST}; curves in {self.folder / 'curves.png'}\n"
                          f"next: python evaluate.py --run {self.folder} --tta")

    # ---- writing

    def save(self, learner, must: bool = False):
        """last.pt and curves.png. A failed write is a warning, unless `must`."""
        self.progress.seconds = time.monotonic() - self.started
        if self.world.main:
            self._try_write(self._save, learner, must=must)
            self._try_write(pictures.save_png, self.folder / "curves.png", training.curves(self.entries))

    def _save(self, learner):
        self._write_log()                                  # first, so that the log is never behind the checkpoint
        checkpoint.write(self.folder / checkpoint.LAST, self._content(learner) | {
            "optimizer": checkpoint.optimizer_state(learner.model, learner.optimizer),
            "scaler": learner.scaler.state_dict()})
        self.saved = self.progress.iteration

    def _content(self, learner) -> dict:
        progress = dataclasses.asdict(self.progress)
        return checkpoint.pack(learner.model, self.labels, self.official, {"progress": progress})

    def _try_write(self, write: Callable, *args, must: bool = False) -> bool:
        try:
            write(*args)
        except UserError as error:
            if must:
                raise UserError(f"{error}; {self.last_checkpoint()}") from None
            self.world.print0(f"warning: {error}; {self.last_checkpoint()}; training continues")
            return False
        return True

    def last_checkpoint(self) -> str:
        """Which checkpoint remains if the run ends now (main process only)."""
        if not self.saved:
            return "there is no checkpoint yet"
        return f"the last checkpoint is of iteration {self.saved}, in {self.folder}"

    def record(self, **entry):
        """Adds a line to the log; a score that does not exist (nan) becomes null."""
        if self.world.main:
            self.entries.append(json.loads(json.dumps(entry), parse_constant=lambda _: None))

    def _write_log(self):
        if self.world.main:
            write_text(self.log_path, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def draw_validation(self, samples: list[tuple[np.ndarray, np.ndarray, np.ndarray]]):
        """validation.png from (photo, label, prediction) of some photos."""
        image = training.validation(samples, self.labels, self.progress.iteration)
        self._try_write(pictures.save_png, self.folder / "validation.png", image)
