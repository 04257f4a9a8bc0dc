"""Checkpoints: written atomically, read back without executing anything.

A checkpoint is a plain dict: the trained tensors (BatchNorm statistics and text features included), the optimizer's
state by parameter name, the progress, the configuration and the label set. Tensors that came unchanged out of an
official file (§4.3: CLIP and SAM are frozen) are left out; a hash of their names, shapes and values is recorded and
checked when the run is loaded. No random state is saved: every random number of training is a function of (seed,
iteration, place in the batch).

    runs/cihp/last.pt    the newest state: model, optimizer, iteration
    runs/cihp/best.pt    the best validation mIoU so far, without the optimizer
"""

import dataclasses
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
LAST, BEST = "last.pt", "best.pt"
BY_CLASS = {"head.conv_seg.weight": 0, "head.conv_seg.bias": 0, "aux.conv_seg.weight": 0, "aux.conv_seg.bias": 0,
            "srm.expand.weight": 1}                        # tensors with a row or column per class, and that dimension


def official_names(model: nn.Module) -> list[str]:
    """Names of the frozen tensors that came out of an official file."""
    cfg = model.cfg
    prefixes = tuple(prefix for prefix, path in (("sam.", cfg.sam_weights), ("clip.", cfg.clip_weights)) if path)
    if not cfg.freeze or not prefixes:
        return []
    return [name for name, p in model.named_parameters() if name.startswith(prefixes) and not p.requires_grad]


def official_files(model: nn.Module) -> dict[str, dict[str, str]]:
    """{config key: file, content[, activation]} of the official files that the tensors left out come from. The content
    is a hash of the tensors, so that a file of another format with the same numbers can take its place."""
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
        if was | {"file": ""} != now | {"file": ""}:
            text = [", ".join([values.get("file", "random weights"), values.get("content", "")[:12],
                               values.get("activation", "")]).strip(", ") for values in (was, now)]
            raise UserError(f"{key}: {path} was trained with ({text[0]}), not with ({text[1]})")


def pack(model: nn.Module, labels, official: dict, training: dict) -> dict:
    """A checkpoint as a plain dict, without the tensors of official files; `training`: progress, optimizer, ..."""
    left_out = set(official_names(model))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    return {"format": FORMAT, "model": state, "official": official, "labels": dataclasses.asdict(labels),
            "config": dataclasses.asdict(model.cfg), **training}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of each parameter, by the parameter's name."""
    names = _optimizer_names(model, optimizer)
    return {names[n]: state for n, state in optimizer.state_dict()["state"].items()}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Tensor]]):
    """UserError if a state is not that of a parameter of this name and shape: fused AdamW would crash."""
    names, shapes = _optimizer_names(model, optimizer), {name: p.shape for name, p in model.named_parameters()}
    wrong = [name for name, state in saved.items() if name not in names
             or any(value.shape != shapes[name] for key, value in state.items() if key != "step")]
    if wrong:
        raise UserError(f"the optimizer's state does not fit the network: {len(wrong)} parameters are unknown or of "
                        f"another shape ({wrong[0]}, ...)")
    state = {n: saved[name] for n, name in enumerate(names) if name in saved}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _optimizer_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters in the order in which the optimizer numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def write(path: Path, content: dict):
    with atomic_write(path) as part:
        with open(part, "wb") as file:
            torch.save(content, file)


def read(path: Path) -> dict:
    """A checkpoint, on the CPU. UserError if it is missing, damaged or not a checkpoint of SCHNet."""
    try:
        with reading(path, "checkpoint"):
            with zipfile.ZipFile(path) as archive:         # torch.load ignores the checksums
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            return content
    except Exception as error:                        # damaged files raise BadZipFile, zlib.error, UnpicklingError, ...
        if in_one_line(error, ""):                         # UserError, out of memory
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path}: damaged or not a checkpoint of format {FORMAT} ({reason})") from None


def find(run: str | Path | None) -> Path:
    """The checkpoint file of `--run`: a file, or a folder (best.pt, else last.pt); None: the newest run in runs/."""
    path = user_path(run) if run is not None else Path("runs")
    if run is None:
        found = [Path(folder) / name for folder, _, names in walk(path) for name in names if name in (LAST, BEST)]
        path = max(found, key=lambda file: file.stat().st_mtime).parent if found else path
    if path.is_file():
        return path
    for name in (BEST, LAST):
        if (path / name).exists():
            return path / name
    raise UserError(f"{path}: no checkpoint ({BEST} or {LAST}); `python train.py` trains one, --run names one")


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path):
    """Loads `state`; `model` may be on the meta device. UserError unless it has all but the official files' tensors."""
    own = model.state_dict()
    wrong = [name for name in state if name not in own or own[name].shape != state[name].shape]
    wrong += sorted(own.keys() - state.keys() - set(official_names(model)))
    if wrong:
        raise UserError(f"{path} does not fit its network: {len(wrong)} tensors are unknown, missing or of another "
                        f"shape ({wrong[0]}, ...)")
    state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    model.load_state_dict(state, strict=False, assign=any(tensor.is_meta for tensor in own.values()))


def init_from(model: nn.Module, run: str, classes: Sequence[str]) -> str:
    """Starts a new run from a trained one: copies every tensor of its checkpoint; of those with a row or column per
    class, only the classes that both have. Returns a line about it. UserError for another architecture."""
    path = find(run)
    content = read(path)
    check_official(model, content["official"], path)
    left_out = {"f_txt", "sim_scale", *official_names(model)}           # computed for the new class names; in the files
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    old, theirs = content["model"], content["labels"]["classes"]
    for name in [*own, *sorted(old.keys() - own.keys() - left_out)]:
        shapes = [[size for dim, size in enumerate(tensors[name].shape) if dim != BY_CLASS.get(name)] if name in tensors
                  else "missing" for tensors in (old, own)]
        if shapes[0] != shapes[1]:
            raise UserError(f"init: {path} has another architecture: {name} {shapes[0]}, here {shapes[1]}")
    both = [name for name in classes if name in theirs]
    for name, tensor in own.items():
        if name in BY_CLASS:
            for each in both:
                to, of = classes.index(each), theirs.index(each)
                tensor.select(BY_CLASS[name], to).copy_(old[name].select(BY_CLASS[name], of))
        else:
            tensor.copy_(old[name])
    new = [name for name in classes if name not in theirs]
    return (f"init from {path}: all weights; {len(both)} of {len(classes)} classes"
            + f", new are {', '.join(new)}" * bool(new))
