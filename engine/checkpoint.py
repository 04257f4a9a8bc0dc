"""Checkpoints: written atomically, read back without executing anything.

A checkpoint is a plain dict: the trained tensors (BatchNorm statistics and text features included), the optimizer's state
by parameter name, the progress, the configuration and the label set. Tensors that came unchanged out of an official file
(§4.3: CLIP and SAM are frozen) are left out; the file's SHA-256 is recorded and checked when the run is loaded. There is
no random state to save: every random number of training is a function of (seed, iteration, place in the batch).

    runs/cihp/last.pt       the newest state: model, optimizer, iteration
    runs/cihp/previous.pt   the one before, used when last.pt is damaged
    runs/cihp/best.pt       the best validation mIoU so far, without the optimizer
"""

import dataclasses
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from config import user_path
from errors import UserError, in_one_line, reading
from files import weights
from files.walk import walk
from files.atomic import atomic_write

FORMAT = 2
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


class DamagedCheckpoint(UserError):
    """A readable file that is not a complete checkpoint."""


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds: all but the frozen ones that an official file holds already."""
    left_out = set(official_names(model))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def official_names(model: nn.Module) -> list[str]:
    """Names of the frozen tensors that came out of an official file."""
    cfg = model.cfg
    prefixes = tuple(prefix for prefix, path in (("sam.", cfg.sam_weights), ("clip.", cfg.clip_weights)) if path)
    if not cfg.freeze or not prefixes:
        return []
    return [name for name, p in model.named_parameters() if name.startswith(prefixes) and not p.requires_grad]


def official_files(model: nn.Module) -> dict[str, str]:
    """{config key: SHA-256} of the official files that the tensors left out are to be taken from."""
    prefixes = {name.partition(".")[0] for name in official_names(model)}
    return {f"{prefix}_weights": weights.sha256(getattr(model.cfg, f"{prefix}_weights")) for prefix in sorted(prefixes)}


def pack(model: nn.Module, labels, official: dict[str, str], training: dict) -> dict:
    """A checkpoint as a plain dict; `training`: what a run adds (progress, optimizer, ...)."""
    return {"format": FORMAT, "model": model_state(model), "official": official, "labels": dataclasses.asdict(labels),
            "config": dataclasses.asdict(model.cfg), **training}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of each parameter, by the parameter's name."""
    names = _optimizer_names(model, optimizer)
    return {names[n]: state for n, state in optimizer.state_dict()["state"].items()}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Tensor]], path: Path):
    """`saved` into the optimizer. UserError where the parameters have other names or shapes."""
    names, shapes = _optimizer_names(model, optimizer), {name: p.shape for name, p in model.named_parameters()}
    wrong = sorted(saved.keys() ^ set(names)) if saved else []
    wrong += [f"{name} {key}" for name, state in saved.items() for key, value in state.items()
              if not wrong and value.ndim and value.shape != shapes[name]]
    if wrong:
        raise UserError(f"{path}: the optimizer's state does not fit the network ({wrong[0]})")
    state = {n: saved[name] for n, name in enumerate(names) if name in saved}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _optimizer_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters in the order in which the optimizer numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def write(path: Path, content: dict, keep: Path | None = None):
    """Writes `content` atomically; with `keep`, the file that was there before is kept under that name."""
    with atomic_write(path, keep) as part:
        with open(part, "wb") as file:
            torch.save(content, file)


def write_last(folder: Path, content: dict):
    """last.pt, the one before it kept as previous.pt: at any moment one of the two is complete."""
    write(folder / LAST, content, keep=folder / PREVIOUS)


def read(path: Path) -> dict:
    """A checkpoint, on the CPU. UserError if it is missing, damaged or not a checkpoint of SCHNet."""
    try:
        with reading(path, "checkpoint"):
            with zipfile.ZipFile(path) as archive:                       # torch.load ignores the checksums
                damaged = archive.testzip()
            content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:                             # damaged files raise BadZipFile, zlib.error, UnpicklingError, ...
        if in_one_line(error, "").startswith("out of memory"):
            raise MemoryError(f"{path}: not enough memory to read it") from None
        raise DamagedCheckpoint(f"{path}: damaged or not a checkpoint ({type(error).__name__})") from None
    if content is None:
        raise DamagedCheckpoint(f"{path}: damaged (the checksum of {damaged} is wrong)")
    if not isinstance(content, dict) or content.get("format") != FORMAT or "model" not in content:
        raise DamagedCheckpoint(f"{path}: not a checkpoint of this program (format {FORMAT})")
    return content


def read_last(folder: Path) -> tuple[dict, Path, list[tuple[Path, str]]]:
    """The newest complete checkpoint of a run: (content, its path, the damaged ones with the reason)."""
    damaged = []
    for name in (LAST, PREVIOUS):
        if os.path.lexists(folder / name):
            try:
                return read(folder / name), folder / name, damaged
            except DamagedCheckpoint as error:             # a transient disk error is not damage
                damaged.append((folder / name, str(error)))
    raise UserError(f"{folder}: no usable checkpoint ({'; '.join(why for _, why in damaged)}); start a new run in another "
                    "folder with out=FOLDER")


def newest_run(root: Path = Path("runs")) -> Path:
    """The folder below `root` whose checkpoint is the newest."""
    found = [Path(folder) / name for folder, _, names in walk(root) for name in names if name in (LAST, BEST)]
    if not found:
        raise UserError(f"{root}/ holds no run yet: train one (`python train.py`) or name one with --run")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def find(run: str | Path | None) -> Path:
    """The checkpoint file of `--run`: a file, or a folder (its best.pt, else last.pt); None: the newest run."""
    path = user_path(run) if run is not None else newest_run()
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    if path.is_file():
        return path
    for name in (BEST, LAST, PREVIOUS):
        if (path / name).exists():
            return path / name
    raise UserError(f"{path}: holds no checkpoint ({BEST} or {LAST})")


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path):
    """`state` into `model`; every tensor must be there but the frozen ones of the official files."""
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path}: {str(error).splitlines()[-1].strip()}") from None
    official = set(official_names(model))
    lost = [name for name in missing if name not in official]
    if lost or unexpected:
        raise UserError(f"{path} does not fit its network: {len(lost)} tensors missing, {len(unexpected)} "
                        f"unknown ({(lost + unexpected)[0]}, ...)")
