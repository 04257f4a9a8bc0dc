"""The folder of a run. Only the main process opens and writes it: the others may be on machines that do not see it.

    runs/cihp/last.pt, previous.pt, best.pt      see checkpoint.py
    runs/cihp/config.yaml                        every knob as it was used
    runs/cihp/log.jsonl                          a line per log_every iterations, and one per validation
    runs/cihp/curves.png, validation.png         to look at, refreshed as it runs
    runs/cihp/.lock                              held by the process that trains in it; names torchrun's processes
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import SIZES, Config, to_overrides, to_yaml
from datasets import LabelSet
from engine import checkpoint
from engine.errors import UserError
from engine.processes import World
from files.whole import LITTER, write_text
from model import SCHNet
from viz import pictures, plots

# Keys that may change when a run goes on: where things lie, how often something is done, how the work is cut up.
HARMLESS = {"data_root", "sam_weights", "clip_weights", "vocab", "workers", "log_every", "eval_every", "save_every",
            "out", "checkpointing", "tta_scales", "accum_steps"}

LOSSES = {"loss": "total", "ce": "cross-entropy", "lovasz": "Lovasz-softmax", "aux": "auxiliary head"}
SCORES = {"miou": "mIoU", "mean_acc": "mean accuracy", "pixel_acc": "pixel accuracy"}


@dataclass
class Progress:
    """How far a run is. Saved with the weights: its log and its best score go on as if it had never stopped."""
    iteration: int = 0                                     # done, or skipped
    skipped: int = 0                                       # steps whose loss or gradient was not finite
    in_a_row: int = 0                                      # of these, since the last step that was taken
    validated: int = 0                                     # iteration of the newest validation
    best_miou: float = -1.0
    best_iteration: int = 0
    sums: dict[str, float] = field(default_factory=dict)   # of the losses since the last entry of the log
    count: int = 0
    images: int = 0                                        # of the training set
    train: str = ""                                        # fingerprints of both splits
    val: str = ""
    seconds: float = 0.0


class Run:
    """The folder, its log and its pictures."""

    def __init__(self, cfg: Config, world: World):
        self.cfg, self.world = cfg, world
        self.folder = Path(cfg.out or "runs/demo")
        self.log = self.folder / "log.jsonl"
        self.locked = None                                 # .lock, open as long as this run
        self.entries: list[dict] = []

    def open(self, resume: bool) -> dict | None:
        """Make the folder, or find the checkpoint to go on from; a run that is there is never overwritten."""
        if not self.world.main:
            return None
        nothing = UserError(f"{self.folder}: no checkpoint to go on from (no {checkpoint.LAST}); without --resume the "
                            "run begins anew")
        if resume and not self.folder.exists():
            raise nothing
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            before = self.lock()                           # of two that come at once, one must find what the other left
        except OSError as error:
            raise UserError(f"out: {self.folder} cannot be used ({error.strerror})") from None
        names = checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST
        held = [name for name in names if os.path.lexists(self.folder / name)]      # a link to a disk that is away, too
        if held == [checkpoint.BEST]:
            raise UserError(f"{self.folder} holds a {checkpoint.BEST} but no {checkpoint.LAST}, which alone has what "
                            "training needs to go on: choose another folder with out=FOLDER")
        if held and not resume and not (self.world.restarted and self.world.agents & before):
            raise UserError(f"{self.folder} already holds a run: go on with --resume, or choose another folder "
                            "with out=FOLDER")
        if resume and not held:
            raise nothing
        for part in self.folder.glob(LITTER):              # what a kill left half-written
            part.unlink()
        return self._go_on() if held else None

    def begin(self):
        """Nothing has failed: from here on the folder is this run's."""
        if self.world.main:
            if self.locked:
                self.locked.truncate(0)
                self.locked.write("".join(f"{agent}\n" for agent in sorted(self.world.agents)))
                self.locked.flush()
            write_text(self.folder / "config.yaml", to_yaml(self.cfg))
            self.write_log()                               # cut back to the checkpoint; empty for a new run

    def lock(self) -> set[str]:
        """Two runs in one folder would overwrite each other. The system's lock ends with the process that has it.

        Returns whose run it was: one that torchrun restarts goes on by itself, one that it starts anew does not.
        """
        if sys.platform == "win32":
            return set()
        import fcntl
        self.locked = open(self.folder / ".lock", "a+")    # not inherited by the loaders, as flock's would be
        try:
            fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:                           # anything else: a file system without locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{self.folder}: another process is training in this folder; choose another with "
                                "out=FOLDER") from None
        self.locked.seek(0)
        return set(self.locked.read().splitlines())

    def _go_on(self) -> dict:
        content, path, damaged = checkpoint.read_last(self.folder)
        for file, why in damaged:                          # aside: the next save must not put it in the other's place
            with contextlib.suppress(OSError):
                file.rename(file.with_suffix(".damaged"))
            self.world.say(f"warning: {why}; {path} is used")
        old = dataclasses.asdict(Config()) | content["config"]           # a knob that is newer than the checkpoint
        changed = {key: f"{key} {old.get(key)!r} -> {value!r}" for key, value in vars(self.cfg).items()
                   if old.get(key) != value and not (key in SIZES and value is None)}
        refused = [text for key, text in changed.items() if key not in HARMLESS]
        if refused:
            raise UserError(f"{path} was trained with another configuration ({', '.join(refused)}): restore it, or "
                            "start a new run with out=FOLDER")
        now = content["progress"]
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        try:
            entries = [json.loads(line) for line in lines if line.strip()]
            self.entries = [entry for entry in entries
                            if entry["iter"] <= (now["validated"] if "miou" in entry else now["iteration"])]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.log}: not as it was written; mend it, or put it aside to go on without") from None
        self.world.say(f"going on from {path}, iteration {now['iteration']}"
                       + (f"; changed: {', '.join(changed.values())}" if changed else ""))
        return content

    def note(self, **entry):
        """One more line of the log; a score that does not exist (nan) becomes null."""
        if self.world.main:
            self.entries.append(json.loads(json.dumps(entry), parse_constant=lambda _: None))

    def write_log(self):
        """log.jsonl as a whole, so that it never holds half a line."""
        if self.world.main:
            write_text(self.log, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def draw_curves(self):
        """curves.png from the log: the loss and its parts, learning rate, gradient, validation scores."""
        train, val = [e for e in self.entries if "loss" in e], [e for e in self.entries if "miou" in e]
        if not train:
            return

        def series(entries: list[dict], key: str, factor: float = 1) -> tuple[list, list]:
            values = [math.nan if e[key] is None else factor * e[key] for e in entries]
            ends = 0, train[-1]["iter"]                    # all panels span the same iterations
            return [*ends, *(e["iter"] for e in entries)], [math.nan, math.nan, *values]

        panels = {"loss": {name: series(train, key) for key, name in LOSSES.items() if key in train[0]},
                  "validation, %": {name: series(val, key, 100) for key, name in SCORES.items()},
                  "learning rate": {"lr": series(train, "lr")}}
        if "grad" in train[0]:
            panels["gradient norm"] = {"grad": series(train, "grad")}
        self._picture("curves.png", lambda: plots.curves(panels, smooth=["loss", "gradient norm"]))

    def draw_validation(self, seen: list[tuple], labels: LabelSet, iteration: int):
        """validation.png: photos, their labels, and what the network makes of them."""
        def draw() -> np.ndarray:
            rows = [[image] + [pictures.overlay(image, part, labels.palette) for part in (label, pred)]
                    for image, label, pred in seen]
            sheet = pictures.sheet(rows, titles=["photo", "ground truth", f"iteration {iteration}"])
            return pictures.with_legend(sheet, labels.classes, labels.palette, size=16)

        self._picture("validation.png", draw)

    def _picture(self, name: str, draw: Callable[[], np.ndarray]):
        """A picture is nothing to stop for: where it cannot be written, that is said."""
        if self.world.main:
            try:
                pictures.save_png(self.folder / name, draw())
            except UserError as error:
                self.world.say(f"warning: {error}")


def describe(model: SCHNet, cfg: Config, world: World, count: int) -> str:
    """The whole configuration, what is about to be trained, and on what."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    each = cfg.batch_size // (world.size * cfg.accum_steps)
    knobs = " ".join(f"{key}={shlex.quote(text)}" for key, text in to_overrides(cfg).items())
    lines = [*textwrap.wrap(knobs, 120, break_long_words=False, break_on_hyphens=False),
             f"{trained / 1e6:.2f} M parameters trained, {(total - trained) / 1e6:.2f} M frozen; "
             f"{count} training images",
             f"{cfg.iters} iterations of {cfg.batch_size} images = {world.size} process{'es' * (world.size > 1)} x "
             f"{cfg.accum_steps} step{'s' * (cfg.accum_steps > 1)} x {each}, {cfg.precision} on {world.device.type}"]
    if each % cfg.loss_group:
        lines.append(f"note: {each} images at a time, not a multiple of loss_group={cfg.loss_group}: the loss is "
                     "another than that of other ways to share the work out")
    return "\n".join(lines)
