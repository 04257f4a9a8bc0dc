"""The official weight files, and a reader of weight files that executes nothing.

`read_tensors` takes OpenAI's CLIP archives (TorchScript), files of `torch.save` and safetensors. A pickle can call any
function when it is read; the ones here are read with `weights_only=True` or by `_ArchiveReader`, which calls none.
Every fault is a `UserError`.
"""

import hashlib
import io
import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from errors import UserError, reading


@dataclass(frozen=True)
class FileSpec:
    name: str
    url: str
    bytes: int
    sha256: str
    what: str


_CLIP_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
CLIP_FILE = FileSpec(
    "ViT-B-16.pt", f"https://openaipublic.azureedge.net/clip/models/{_CLIP_SHA256}/ViT-B-16.pt",
    350_837_078, _CLIP_SHA256, "CLIP ViT-B/16")
SAM_FILE = FileSpec(
    "sam_vit_l_0b3195.pth", "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
    1_249_524_607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", "SAM ViT-L")
VOCAB_FILE = FileSpec(
    "bpe_simple_vocab_16e6.txt.gz", "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
    1_356_917, "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a", "CLIP's vocabulary")
SAM_B_FILE = FileSpec(
    "sam_vit_b_01ec64.pth", "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
    375_042_383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", "SAM ViT-B")
SAM_H_FILE = FileSpec(
    "sam_vit_h_4b8939.pth", "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
    2_564_550_879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", "SAM ViT-H")
FILES = (CLIP_FILE, SAM_FILE, VOCAB_FILE)                  # what the paper's network needs
OTHER_FILES = (SAM_B_FILE, SAM_H_FILE)                     # smaller and larger encoders, for who asks for them by name
HINT = "; `python download.py` gets the official ones"
AGAIN = "get it again with `python download.py`"


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    with reading(path, "file of weights", HINT), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU, in the file's types; an outer `state_dict` or `model` is opened."""
    path = Path(path)
    try:
        with reading(path, "file of weights", HINT):
            with open(path, "rb") as file:
                head = file.read(512)
            values = _reader(path, head, path.stat().st_size)(path)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: does not fit in memory") from None
    except Exception as error:                             # a damaged file can raise anything at all
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise _refused(path, refused[1]) from None
        raise _damaged(path, error) from None
    for key in ("state_dict", "model"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not tensors by name")
    for key, value in values.items():
        if not isinstance(key, str):
            raise UserError(f"{path}: {key!r} is no name of a tensor")
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {key!r} is not a tensor but a value of type {type(value).__name__}")
    if not values:
        raise UserError(f"{path}: holds no tensors")
    return dict(values)


def describe(tensors: dict[str, Tensor]) -> str:
    """What a set of names and shapes is, in words: `CLIP ViT-B/16`, `SAM ViT-L`, ..."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if any(name.startswith(("vision_model.", "text_model.", "vision_encoder.")) for name in shapes):
        return "a file with Hugging Face's names"
    for prefix in ("", "image_encoder."):
        conv = shapes.get(f"{prefix}patch_embed.proj.weight", ())
        if len(conv) == 4 and f"{prefix}blocks.0.attn.rel_pos_h" in shapes:
            return {768: "SAM ViT-B", 1024: "SAM ViT-L", 1280: "SAM ViT-H"}.get(conv[0], f"SAM of width {conv[0]}")
    if "visual.layer1.0.conv1.weight" in shapes:
        return "a CLIP with a ResNet"
    conv = shapes.get("visual.conv1.weight", ())
    if len(conv) == 4 and "visual.class_embedding" in shapes:
        known = {(768, 32): "CLIP ViT-B/32", (768, 16): "CLIP ViT-B/16", (1024, 14): "CLIP ViT-L/14"}
        name = known.get((conv[0], conv[3]), f"CLIP ViT of width {conv[0]}, patch {conv[3]}")
        return name if "token_embedding.weight" in shapes else f"the image tower alone of a {name}"
    if "token_embedding.weight" in shapes:
        return "the text tower alone of a CLIP"
    return "an unknown kind of file"


def count_blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    """How many blocks, numbered behind `prefix`, the names are of."""
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    return len(numbers)


def check_keys(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """`tensors` must have exactly the names and shapes of `model`'s state dict, as floating-point numbers."""
    state = model.state_dict()
    wanted, found = describe(state), describe(tensors)
    if found != wanted:
        raise UserError(f"{path}: this is {found}, the model needs {wanted} ({_names(tensors)})")
    faults = [f"{len(names)} {fault} ({_names(names)})" for fault, names in (
        ("missing", [name for name in state if name not in tensors]),
        ("left over", [name for name in tensors if name not in state])) if names]
    if faults:
        raise UserError(f"{path}: the names are not those of {wanted}: {', '.join(faults)}")
    wrong = [f"{name} {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
             for name, tensor in state.items() if tensor.shape != tensors[name].shape]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors of another size than the model's: {_names(wrong)}")
    wrong = [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors are not floating-point numbers: {_names(wrong)}")


def _names(names, shown: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


# ---------------------------------------------------------------------------------------------------------------------
# One function per format; which one, the first bytes say


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
    raise UserError(f"{path}: is of no known format (TorchScript archive, torch.save, safetensors); {AGAIN}")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0][:80] if isinstance(error, (zipfile.BadZipFile, ValueError)) else ""
    size = path.stat().st_size
    for spec in FILES + OTHER_FILES:
        if spec.name == path.name and spec.bytes != size:
            reason = f"it has {size:,} bytes, the official file {spec.bytes:,}"
    return UserError(f"{path}: is damaged or cut off ({reason or type(error).__name__}); {AGAIN}")


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
        damaged = archive.testzip()                        # torch.load does not look at the checksums
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} does not fit its checksum")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


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
            first, end = entry["data_offsets"]
            file.seek(start + first)
            tensors[name] = _tensor(bytearray(file.read(end - first)), _DTYPES[entry["dtype"]], entry["shape"])
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
