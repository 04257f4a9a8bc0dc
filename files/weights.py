"""Readers of weight files that execute nothing.

`read_tensors` takes OpenAI's CLIP archives (TorchScript), files of `torch.save`, safetensors, and folders as the
Hugging Face hub has them, in one file or in shards with an index. A pickle can call any function when it is read; the
ones here are read with `weights_only=True` or by `_ArchiveReader`, which calls none. Every fault is a `UserError`.
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

from errors import UserError, in_one_line, reading

HINT = "; `python download.py` gets the official ones"
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json",
                "open_clip_model.safetensors", "open_clip_pytorch_model.bin")     # of a folder: the first that is there


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    with reading(path, "file", HINT), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file or folder by name, on the CPU, in the file's types; an outer `state_dict` or `model` is
    opened. Values that are not tensors (the epoch of a training file) are left out."""
    path = Path(path)
    try:
        with reading(path, "file of weights", HINT):
            if path.is_dir():
                path = next((path / name for name in FOLDER_FILES if (path / name).exists()), path)
            values = _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)
    except Exception as error:                             # damaged files raise arbitrary exceptions
        if in_one_line(error, ""):                         # UserError, out of memory
            raise
        text = str(error).partition("\n")[0]
        called = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"refused, because it would call {called[1]}" if called else text[:100] or type(error).__name__
        raise UserError(f"{path}: not a file of weights, or damaged ({reason}){HINT}") from None
    for key in ("state_dict", "model"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    values = values if isinstance(values, dict) else {}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name{HINT}")
    return tensors


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index of the hub's names."""
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in read_tensors(index.parent / file).items()}


def _read_file(path: Path):
    """What the file holds; its first bytes choose the reader."""
    with open(path, "rb") as file:
        head = file.read(20)
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    raise ValueError(f"it begins with {head!r}")


def _read_zip(path: Path):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        folder = next((name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)), "").removesuffix("data.pkl")
        if f"{folder}constants.pkl" in names:
            return _read_torchscript(archive, folder)
        damaged = archive.testzip()                        # torch.load ignores the checksums
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


class _Module:
    """Stands for every class of a TorchScript archive: takes the attributes, runs nothing."""


class _ArchiveReader(pickle.Unpickler):
    """Reads `data.pkl` of a TorchScript archive; a name that `find_class` does not know is never called."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.archive, self.folder, self.storages = archive, folder, {}

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
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, saved: tuple) -> Tensor:
        _, dtype, key, _, count = saved
        if key not in self.storages:
            self.storages[key] = _tensor(bytearray(self.archive.read(f"{self.folder}data/{key}")), dtype, (count,))
        return self.storages[key]


def _read_torchscript(archive: zipfile.ZipFile, folder: str) -> dict[str, Tensor]:
    tensors, modules = {}, [("", _ArchiveReader(archive, folder).load())]
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
                raise ValueError(f"{name} has numbers of type {entry['dtype']}")
            first, end = entry["data_offsets"]
            if not 0 <= first <= end <= size - start:
                raise ValueError(f"{name} is cut off")
            data = bytearray(end - first)
            file.seek(start + first)
            file.readinto(data)
            tensors[name] = _tensor(data, _DTYPES[entry["dtype"]], entry["shape"])
    return tensors


def _tensor(data: bytearray, dtype: torch.dtype, shape: list[int] | tuple[int, ...]) -> Tensor:
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {math.prod(shape)} numbers of type {dtype}")
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


_STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
             "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
             "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
             "BoolStorage": torch.bool}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}
