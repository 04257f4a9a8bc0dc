"""Readers of weight files that execute nothing.

`read_tensors` takes OpenAI's CLIP archives (TorchScript), files of `torch.save`, safetensors, and folders as the Hugging
Face hub has them, in one file or in shards with an index. A pickle can call any function when it is read; the ones here
are read with `weights_only=True` or by `_ArchiveReader`, which calls none. Every fault is a `UserError`.
"""

import hashlib
import io
import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError, reading

HINT = "; `python download.py` gets the official ones"
AGAIN = "get it again with `python download.py`"
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
                "open_clip_model.safetensors", "open_clip_pytorch_model.bin")          # of a folder: the first that is there


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    with reading(path, "file", HINT), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file or folder by name, on the CPU, in the file's types; an outer `state_dict` or `model` is opened."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in FOLDER_FILES if (path / name).exists()), path)
        if path.is_dir():
            raise UserError(f"{path}: holds none of {', '.join(FOLDER_FILES)}")
    try:
        with reading(path, "file of weights", HINT):
            if path.name.endswith(".index.json"):
                return _read_shards(path)
            with open(path, "rb") as file:
                head = file.read(512)
            values = _reader(path, head, path.stat().st_size)(path)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: does not fit in memory") from None
    except Exception as error:                             # damaged files raise arbitrary exceptions
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise _refused(path, refused[1]) from None
        reason = str(error).partition("\n")[0][:80] if isinstance(error, (zipfile.BadZipFile, ValueError)) else ""
        raise UserError(f"{path}: is damaged or cut off ({reason or type(error).__name__}); {AGAIN}") from None
    for key in ("state_dict", "model"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: holds no tensors by name")
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {key!r} is not a tensor but a value of type {type(value).__name__}")
    return dict(values)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The files that an index of the hub's names."""
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{index}: is not an index of shards") from None
    missing = [name for name in files if not (index.parent / name).exists()]
    if missing:
        raise UserError(f"{index}: {len(missing)} of its {len(files)} files are missing ({', '.join(missing[:3])})")
    return {name: tensor for file in files for name, tensor in read_tensors(index.parent / file).items()}


# ----------------------------------------------------------------------------------------------------------------------
# one reader per format, chosen by the first bytes

def _reader(path: Path, head: bytes, size: int):
    start = head.lstrip().lower()
    if size == 0:
        raise UserError(f"{path}: is empty; {AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a git-lfs pointer, not the file it points to; `git lfs pull`, or {AGAIN}")
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError(f"{path}: is a web page saved under this name; {AGAIN}")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip
    if head.startswith(_LEGACY):
        return _read_legacy
    if head.startswith(b"\x80"):
        raise UserError(f"{path}: refused and not executed: it is a pickle that torch.save did not write")
    if head[8:9] == b"{":
        return _read_safetensors
    if re.fullmatch(rb"[\t\n\r\x20-\x7e]*", head):
        raise UserError(f"{path}: is a text file, not weights; {AGAIN}")
    raise UserError(f"{path}: unknown format (not a TorchScript archive, torch.save, safetensors); {AGAIN}")


def _refused(path: Path, name: str) -> UserError:
    return UserError(f"{path}: refused and not executed: it does not hold tensors alone but wants to call {name} (or it is "
                     f"cut off in the middle of that name; then {AGAIN})")


def _read_zip(path: Path):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise UserError(f"{path}: is a zip archive, but not one of PyTorch's")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in names:
            return _read_torchscript(path, archive, folder)
        damaged = archive.testzip()                        # torch.load ignores the checksums
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_legacy(path: Path):
    return torch.load(path, map_location="cpu", weights_only=True)


class _Module:
    """Stands for every class of a TorchScript archive: takes the attributes, runs nothing."""


class _ArchiveReader(pickle.Unpickler):
    """Reads `data.pkl` of a TorchScript archive; a name that `find_class` does not know is never called."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.path, self.archive, self.folder, self.storages = path, archive, folder, {}

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict                             # a tensor's hooks: always empty
        if module == "torch.jit._pickle":                  # lists with a type: the list is their first argument
            return lambda value, *_: value
        raise _refused(self.path, f"{module}.{name}")

    def persistent_load(self, saved: tuple) -> Tensor:
        _, dtype, key, _, count = saved
        if key not in self.storages:
            self.storages[key] = _tensor(bytearray(self.archive.read(f"{self.folder}data/{key}")), dtype, (count,))
        return self.storages[key]


def _read_torchscript(path: Path, archive: zipfile.ZipFile, folder: str) -> dict[str, Tensor]:
    root = _ArchiveReader(path, archive, folder).load()
    tensors, modules = {}, [("", root)]
    while modules:
        prefix, module = modules.pop()
        for name, value in vars(module).items() if isinstance(module, _Module) else ():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _Module):
                modules.append((f"{prefix}{name}.", value))
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    size, tensors = path.stat().st_size, {}
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(start, size) - 8))
        header.pop("__metadata__", None)                   # free text
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise UserError(f"{path}: {name} has numbers of type {entry['dtype']}, which cannot be used")
            first, end = entry["data_offsets"]
            if not 0 <= first <= end <= size - start:
                raise ValueError(f"{name} ends behind the end of the file")
            data = bytearray(end - first)
            file.seek(start + first)
            file.readinto(data)
            tensors[name] = _tensor(data, _DTYPES[entry["dtype"]], entry["shape"])
    return tensors


def _tensor(data: bytearray, dtype: torch.dtype, shape: list[int] | tuple[int, ...]) -> Tensor:
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {math.prod(shape)} numbers of type {dtype}")
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."      # how files of torch.save before 1.6 begin
_STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
             "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
             "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
             "BoolStorage": torch.bool}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}
