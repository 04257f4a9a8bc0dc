"""files/weights.py: every file format; broken files are reported in one line; no code in a file is executed."""

import io
import json
import os
import pickle
import random
import re
import zipfile
from argparse import Namespace

import pytest
import torch
from torch import nn

from errors import UserError
from files import weights
from files.weights import read_tensors

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.tensor([1.5, -2.0]).half(),
           "b": torch.tensor(7), "c": torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
           "empty": torch.zeros(0, 3)}
NAMES = ("script.pt", "zip.pth", "x.safetensors")


class Call:
    """Unpickling this object calls `os.system`."""

    def __init__(self, witness):
        self.command = f"touch {witness}"

    def __reduce__(self):
        return os.system, (self.command,)


def saved(tensors, **options):
    buffer = io.BytesIO()
    torch.save(tensors, buffer, **options)
    return buffer.getvalue()


def scripted():
    """A TorchScript archive of TENSORS, including a view, and of attributes that are not tensors."""
    class Part(nn.Module):
        def forward(self, x):
            return x

    class Root(nn.Module):
        sizes: list[int]

        def __init__(self):
            super().__init__()
            self.a = Part()
            self.a.register_parameter("weight", nn.Parameter(TENSORS["a.weight"].T.contiguous().T))
            self.a.register_buffer("bias", TENSORS["a.bias"])
            for name in ("b", "c", "empty"):
                self.register_buffer(name, TENSORS[name])
            self.sizes, self.ratio, self.label = [1, 2], 0.5, "text"

        def forward(self, x):
            return self.a(x) * self.ratio + len(self.sizes) + len(self.label)

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Root()), buffer)
    return buffer.getvalue()


def formats():
    return {"script.pt": scripted(), "zip.pth": saved(TENSORS),
            "x.safetensors": pytest.importorskip("safetensors.torch").save(TENSORS, metadata={"format": "pt"})}


def replaced(archive, member, content):
    """A zip archive with one member replaced and correct checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith(member) else old.read(name))
    return buffer.getvalue()


def same(tensors):
    return set(tensors) == set(TENSORS) and all(
        t.dtype == TENSORS[name].dtype and torch.equal(t, TENSORS[name]) for name, t in tensors.items())


@pytest.mark.parametrize("name", NAMES)
def test_formats(name, tmp_path):
    (tmp_path / name).write_bytes(formats()[name])
    assert same(read_tensors(tmp_path / name)) and same(read_tensors(str(tmp_path / name)))


@pytest.mark.parametrize("outer", [{"state_dict": TENSORS, "epoch": 3}, {"model": TENSORS, "optimizer": {}},
                                   TENSORS | {"epoch": 3}])
def test_outer_keys(outer, tmp_path):
    torch.save(outer, tmp_path / "a.pth")
    assert same(read_tensors(tmp_path / "a.pth"))


def test_a_missing_shard_is_named(tmp_path):
    """Complete folders of the hub: test_formats.py."""
    index = tmp_path / "pytorch_model.bin.index.json"
    torch.save(TENSORS, tmp_path / "one.bin")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "one.bin") | {"z": "two.bin"}}))
    with pytest.raises(UserError, match="two.bin: no such"):
        read_tensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match="pytorch_model.bin.index.json: .*weight_map"):
        read_tensors(index)


def test_every_dtype(tmp_path):
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool)
    tensors = {str(kind): torch.tensor([0, 1, 1]).to(kind) for kind in kinds}
    pytest.importorskip("safetensors.torch").save_file(tensors, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {str(kind): kind for kind in kinds}
    assert all(t.tolist() == [0, 1, 1] for t in found.values())


def broken_files(witness):
    """{name: (content, regular expression for the message)}."""
    (script, plain, safe), call = formats().values(), Call(witness)
    flipped = bytearray(plain)
    flipped[plain.index(TENSORS["a.weight"].numpy().tobytes()) + 5] ^= 64
    script_flipped = bytearray(script)
    script_flipped[script.index(TENSORS["c"].view(torch.int16).numpy().tobytes()) + 5] ^= 64
    return {
        "empty": (b"", "begins with b''"),
        "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:58\nsize 350837078\n", "version https"),
        "zip-cut": (plain[:len(plain) // 2], "zip"),
        "zip-flipped": (bytes(flipped), "checksum"),
        "script-flipped": (bytes(script_flipped), "CRC"),
        "safetensors-cut": (safe[:-4], "is cut off"),
        "safetensors-wrong-header": (safe.replace(b'"shape"', b'"shapf"'), "shape"),
        "fp8": (safe.replace(b'"F32"', b'"F8E"'), "a.weight .*F8E"),
        "call-zip": (saved({"a": call}), "would call .*system"),
        "pickle": (pickle.dumps({"a": call}, protocol=2), "begins with"),
        "call-script": (replaced(script, "data.pkl", pickle.dumps(call, protocol=2)), "would call .*system"),
        "load-script": (replaced(script, "data.pkl", b"\x80\x02ctorch\nload\n."), "would call torch.load"),
        "whole-module": (saved(nn.Linear(2, 2)), "would call torch.nn"),
        "arguments-inside": (saved({"model": TENSORS, "args": Namespace(lr=1)}), "would call .*Namespace"),
        "module-without-tensors": (replaced(script, "data.pkl", b"\x80\x02N."), "no tensors|__dict__"),
    }


def test_broken_files_end_in_one_line(tmp_path):
    witness = tmp_path / "executed"
    cases = broken_files(witness)
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_tensors(path)
        found = re.fullmatch(rf"{path}: (.{{,250}}); `python download.py` .*", str(caught.value))
        assert found and re.search(message, found[1]), (name, str(caught.value))
    assert not witness.exists()
    pickle.loads(cases["pickle"][0])                # pickle itself does execute it
    assert witness.exists()


@pytest.mark.parametrize("read", [read_tensors, weights.sha256])
def test_system_errors_are_one_line(tmp_path, monkeypatch, read):
    for name, words in (("missing.pt", "no such .*download.py"), ("long" * 100, "cannot be read"), ("", "is a folder")):
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)

    def forbidden(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(weights, "open", forbidden, raising=False)       # root can read every real file
    with pytest.raises(UserError, match="a.pt: cannot be read .Permission denied"):
        read(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", NAMES)
def test_random_damage(name, tmp_path):
    """A cut or some changed bytes give the right tensors or a one-line error. Only zip archives have checksums."""
    content, rng, path, refused = formats()[name], random.Random(0), tmp_path / name, 0
    for round in range(100):
        damaged = bytearray(content[:rng.randrange(len(content))] if round % 2 else content)
        for _ in range(rng.randint(1, 4) * (1 - round % 2)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            tensors = read_tensors(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert all(isinstance(t, torch.Tensor) for t in tensors.values())
            assert same(tensors) or name == "x.safetensors"
    assert refused > 50
