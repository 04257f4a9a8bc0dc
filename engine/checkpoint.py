"""Checkpoints: written atomically, read back without executing anything.

A checkpoint is a plain dict: the trained tensors (BatchNorm statistics and text features included), the optimizer's state
by parameter name, the progress, the configuration and the label set. Tensors that came unchanged out of an official file
(§4.3: CLIP and SAM are frozen) are left out; a hash of their names, shapes and values is recorded and checked when the
run is loaded. There is no random state to save: every random number of training is a function of (seed, iteration, place
in the batch).

    runs/cihp/last.pt       the newest state: model, optimizer, iteration
    runs/cihp/previous.pt   the one before, used when last.pt is damaged
    runs/cihp/best.pt       the best validation mIoU so far, without the optimizer
"""

import dataclasses
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from config import user_path
from errors import UserError, in_one_line, reading
from files.atomic import atomic_write
from files.walk import walk

FORMAT = 3
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


def official_files(model: nn.Module) -> dict[str, dict[str, str]]:
    """{config key: file, content} of the official files that the tensors left out come from. The content is a hash of the
    tensors, so that the same numbers in another format will do."""
    found = {}
    for key in sorted({name.partition(".")[0] for name in official_names(model)}):
        encoder = getattr(model, key)
        found[f"{key}_weights"] = {"file": getattr(model.cfg, f"{key}_weights"), "content": encoder.content,
                                   **({"activation": encoder.activation} if key == "clip" else {})}
    return found


def check_official(model: nn.Module, saved: dict[str, dict[str, str]], path: Path):
    """UserError if a checkpoint was trained with other official weights than the model has."""
    mine = official_files(model)
    for key in sorted({*saved, *mine}):
        was, now = saved.get(key, {}), mine.get(key, {})
        for part in ("content", "activation"):
            if was.get(part) != now.get(part):
                raise UserError(f"{key}: {path} was trained with another {was.get('file') or 'random network'} than "
                                f"{now.get('file') or 'a random one'} ({part} {(was.get(part) or 'none')[:12]}, not "
                                f"{(now.get(part) or 'none')[:12]})")


def pack(model: nn.Module, labels, official: dict, training: dict) -> dict:
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
    """`state` into `model`, which may be on the meta device; every tensor must be there but the frozen ones of the official
    files."""
    own = model.state_dict()
    wrong = [name for name in state if name not in own or own[name].shape != state[name].shape]
    wrong += sorted(own.keys() - state.keys() - set(official_names(model)))
    if wrong:
        raise UserError(f"{path} does not fit its network: {len(wrong)} tensors are unknown, missing or of another shape "
                        f"({wrong[0]}, ...)")
    for name, tensor in state.items():
        if own[name].is_meta:
            state = state | {name: tensor.to(own[name].dtype)}
    model.load_state_dict(state, strict=False, assign=any(tensor.is_meta for tensor in own.values()))


def init_from(model: nn.Module, run: str, classes: Sequence[str]) -> str:
    """Starts a new run from a trained one: takes every tensor of its checkpoint; those that depend on the class list are
    taken for the classes that both have. Returns a line that says what was taken. UserError for another architecture."""
    path = find(run)
    content = read(path)
    check_official(model, content["official"], path)
    own, old, theirs = model.state_dict(), content["model"], content["labels"]["classes"]
    pairs = [(k, theirs.index(name)) for k, name in enumerate(classes) if name in theirs]
    mine, other = (torch.tensor([pair[n] for pair in pairs], dtype=torch.long) for n in (0, 1))
    for name, tensor in own.items():
        if name in ("f_txt", "sim_scale") or name in official_names(model):
            continue                                       # computed for the new names; from the official file
        if name not in old:
            if name.startswith("aux."):                    # the trained run had no auxiliary head
                continue
            raise UserError(f"init: {path} has another architecture: it lacks {name}")
        by_class = {"head.conv_seg": 0, "aux.conv_seg": 0, "srm.expand": 1}.get(name.rpartition(".")[0])
        if by_class is None or name == "srm.expand.bias":
            if old[name].shape != tensor.shape:
                raise UserError(f"init: {path} has another architecture: {name} is {tuple(old[name].shape)}, not "
                                f"{tuple(tensor.shape)}")
            tensor.copy_(old[name])
        else:
            tensor.index_copy_(by_class, mine, old[name].to(tensor.dtype).index_select(by_class, other))
    unknown = sorted(name for name in old.keys() - own.keys() if not name.startswith("aux.") and name != "f_txt")
    if unknown:
        raise UserError(f"init: {path} has another architecture: this network has no {unknown[0]}")
    new = [name for name in classes if name not in theirs]
    return (f"init from {path}: all tensors; of the classes {len(pairs)} of {len(classes)}"
            + (f" (new: {', '.join(new)})" if new else ""))
