"""What a run keeps: checkpoints that are written whole or not at all, and read back without executing anything.

A checkpoint is a plain dict: the trained tensors (BatchNorm statistics and text features included), the optimiser, how
far the run is, the configuration and the label set. Tensors that came unchanged out of an official file (§4.3: CLIP
and SAM are frozen) are left out; the file is named with its SHA-256, which is checked when the run is loaded. There is
no random state to keep: every random number of training is a function of (seed, iteration, place in the batch).

    runs/cihp/last.pt       the newest state: model, optimiser, iteration
    runs/cihp/previous.pt   the one before, used when last.pt is damaged
    runs/cihp/best.pt       the best validation mIoU so far, without the optimiser
"""

import dataclasses
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from config import user_path
from datasets import LabelSet
from engine.errors import UserError
from files import weights
from files.walk import walk
from files.whole import whole
from model import SCHNet

FORMAT = 1
RETIRED = ("compile",)                                     # keys that older checkpoints have; no result hangs on them
BEFORE = {"ftm_residual": "f"}                             # of a checkpoint older than the key, if not today's default
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


class Damaged(UserError):
    """A file that is there and can be read, but is no whole checkpoint."""


def model_state(model: SCHNet) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds: all but the frozen ones that an official file holds already."""
    left_out = set(official_names(model))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def official_names(model: SCHNet) -> list[str]:
    """Names of the frozen tensors that came out of an official file."""
    cfg = model.cfg
    prefixes = tuple(prefix for prefix, path in (("sam.", cfg.sam_weights), ("clip.", cfg.clip_weights)) if path)
    if not cfg.freeze or not prefixes:
        return []
    return [name for name, p in model.named_parameters() if name.startswith(prefixes) and not p.requires_grad]


def official_files(model: SCHNet) -> dict[str, str]:
    """{config key: SHA-256} of the official files that the tensors left out are to be taken from."""
    prefixes = {name.partition(".")[0] for name in official_names(model)}
    return {f"{prefix}_weights": weights.sha256(getattr(model.cfg, f"{prefix}_weights")) for prefix in sorted(prefixes)}


def pack(model: SCHNet, labels: LabelSet, official: dict[str, str], training: dict) -> dict:
    """A checkpoint as a plain dict; `training` is what a run adds (how far it is, the optimiser, ...)."""
    return {"format": FORMAT, "model": model_state(model), "official": official, "labels": dataclasses.asdict(labels),
            "config": dataclasses.asdict(model.cfg), **training}


def write(path: Path, content: dict, keep: Path | None = None):
    """`content` under `path`, whole or not at all; with `keep`, the file that was there before goes by that name."""
    with whole(path, keep) as part:
        with open(part, "wb") as file:
            torch.save(content, file)


def write_last(folder: Path, content: dict):
    """last.pt, the one before it kept as previous.pt: at any moment one of the two is whole."""
    write(folder / LAST, content, keep=folder / PREVIOUS)


def read(path: Path) -> dict:
    """A checkpoint, on the CPU. UserError if it is missing, damaged or no checkpoint of SCHNet."""
    try:
        with zipfile.ZipFile(path) as archive:                           # torch.load does not look at the checksums
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:                             # damage has many faces: BadZipFile, zlib, pickle, ...
        if isinstance(error, MemoryError) or "allocate memory" in str(error):            # ... and this is none
            raise MemoryError(f"{path}: not enough memory to read it") from None
        raise Damaged(f"{path}: damaged or not a checkpoint ({type(error).__name__})") from None
    if content is None:
        raise Damaged(f"{path}: damaged (the checksum of {damaged} is wrong)")
    if not isinstance(content, dict) or content.get("format") != FORMAT or "model" not in content:
        raise Damaged(f"{path}: not a checkpoint of this program (format {FORMAT})")
    for key in RETIRED:
        content["config"].pop(key, None)
    content["config"] = BEFORE | content["config"]
    return content


def read_last(folder: Path) -> tuple[dict, Path, list[tuple[Path, str]]]:
    """The newest whole checkpoint of a run to go on from: (content, its path, which were damaged and how)."""
    damaged = []
    for name in (LAST, PREVIOUS):
        if os.path.lexists(folder / name):
            try:
                return read(folder / name), folder / name, damaged
            except Damaged as error:                       # a disk that fails for a moment is another matter
                damaged.append((folder / name, str(error)))
    raise UserError(f"{folder}: nothing to go on from ({'; '.join(why for _, why in damaged) or f'no {LAST}'}); "
                    "begin anew in another folder with out=FOLDER")


def newest_run(root: Path = Path("runs")) -> Path:
    """The folder below `root` whose checkpoint is the newest."""
    found = [Path(folder) / name for folder, _, names in walk(root) for name in names if name in (LAST, BEST)]
    if not found:
        raise UserError(f"{root}/ holds no run yet: train one (`python train.py`) or name one with --run")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def find(run: str | Path | None) -> Path:
    """The checkpoint file that `--run` means: a file, or a folder (its best.pt, else last.pt); None: the newest run."""
    path = user_path(run) if run is not None else newest_run()
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    if path.is_file():
        return path
    for name in (BEST, LAST, PREVIOUS):
        if (path / name).exists():
            return path / name
    raise UserError(f"{path}: holds no checkpoint ({BEST} or {LAST})")


def load_state(model: SCHNet, state: dict[str, Tensor], path: Path):
    """`state` into `model`; every tensor must be there but the frozen ones of the official files, which it has."""
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path}: {str(error).splitlines()[-1].strip()}") from None
    official = set(official_names(model))
    lost = [name for name in missing if name not in official]
    if lost or unexpected:
        raise UserError(f"{path} does not fit its network: {len(lost)} tensors missing, {len(unexpected)} "
                        f"unknown ({(lost + unexpected)[0]}, ...)")
