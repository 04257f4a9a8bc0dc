"""engine/checkpoint.py: atomic writes, damage, no code executed, tensors of the official files left out."""

import copy
import dataclasses
import errno
import os
import pickle
import random
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny import TINY

import inference
import train
from config import Config
from engine import checkpoint
from errors import UserError
from files.foundations import content_hash
from files.labels import LabelSet
from model import build_model
from sam_vit import SIZES, SAMViT

CFG = Config(**TINY)
LABELS = LabelSet("custom", ("ground", "left", "right"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)), ((1, 2),))


def packed(cfg: Config = CFG) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(3)
    model = build_model(cfg, LABELS.classes)
    return model, checkpoint.pack(model, LABELS, checkpoint.official_files(model), {"progress": {"iteration": 7}})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "last.pt"
    checkpoint.write(path, packed()[1])
    return path


def restore(path: Path, *overrides: str):
    return inference.restore(checkpoint.read(path), path, overrides)


def test_a_restored_network_is_the_saved_one(saved):
    model, _ = packed()
    again, labels = restore(saved)
    assert labels == LABELS and not again.training and again.cfg == CFG
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(image), model.eval()(image))


def test_frozen_weights_in_half_precision_predict_the_same(saved):
    """The same bits as fp32 weights under autocast; trained tensors stay in fp32."""
    model, _ = restore(saved, "precision=bf16")
    half, _, _ = inference.load_run(saved, ["precision=bf16"], "cpu")
    stored = [name for name, p in half.named_parameters() if p.dtype == torch.bfloat16]
    assert len(stored) == 8 * 4 and all(name.startswith(("sam.blocks", "clip.transformer")) for name in stored)
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    assert torch.equal(*(inference.predict(network, image, (1.0, 1.5), ()) for network in (model, half)))


@pytest.mark.parametrize("override", [
    "sim_scale=1.0", "flip_pairs=[[0, 1]]", "classes=[a, b, c]", "out=elsewhere", "lr=1.0", "srm=false", "sam=demo"])
def test_settings_of_a_trained_network_cannot_be_changed(saved, override):
    """The change would have no effect, but results.json would record it."""
    with pytest.raises(UserError, match=f"^{override.partition('=')[0]}: .*last.pt "):
        restore(saved, override)


def test_settings_that_can_be_changed(saved):
    again, _ = restore(saved, "base_size=64", "lr=6e-4", "ftm_residual=f'", "precision=bf16", "data_root=/else")
    cfg = again.cfg
    assert (cfg.base_size, again.ftm.residual, cfg.precision, cfg.data_root) == (64, "f'", "bf16", "/else")
    other, labels = restore(saved, "dataset=lip", "flip_pairs=[]")       # other photos, but the network's classes
    assert other.cfg.dataset == "lip" and labels == LABELS
    with pytest.raises(UserError, match="'lrr=1'"):
        restore(saved, "lrr=1")


def optimized(cfg: Config, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = build_model(cfg, LABELS.classes)
    optimizer = torch.optim.AdamW(train.param_groups(model), lr=cfg.lr)
    for p in model.parameters():
        p.grad = torch.rand_like(p) if p.requires_grad else None
    optimizer.step()
    return model, optimizer


def test_the_optimizers_state_is_by_name():
    model, optimizer = optimized(CFG, 0)
    saved = copy.deepcopy(checkpoint.optimizer_state(model, optimizer))
    assert saved.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    other, theirs = optimized(dataclasses.replace(CFG, patch_embed_lr_mult=0.5, lr=0.01), 1)
    checkpoint.load_optimizer(other, theirs, saved)
    for name, p in other.named_parameters():
        if p.requires_grad:
            assert all(torch.equal(theirs.state[p][key], value) for key, value in saved[name].items()), name
    assert {group["lr"] for group in theirs.param_groups} == {0.01}
    checkpoint.load_optimizer(model, optimizer, {})     # of a run without a step
    assert not optimizer.state_dict()["state"]
    for name in ("no.such.parameter", "srm.expand.weight"):              # the second has another shape
        with pytest.raises(UserError, match=f"1 parameter.*{name}"):
            checkpoint.load_optimizer(model, optimizer, {name: saved["aux.conv_seg.bias"]})


@pytest.mark.parametrize("fault, words", [("disk", "File too large"), ("rename", "Read-only file system")])
def test_a_failed_write_leaves_the_old_file(saved, tmp_path, monkeypatch, fault, words):
    """A limit of the file size acts as a full disk; torch.save reports it as "unexpected pos 704 vs 598"."""
    resource, path = pytest.importorskip("resource"), tmp_path / "last.pt"
    shutil.copy(saved, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    else:
        monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(errno.EROFS, words)))
    try:
        with pytest.raises(UserError, match=rf"last.pt could not be written \({words}"):
            checkpoint.write(path, packed()[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == saved.read_bytes() and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_all_damage_is_detected(saved, tmp_path):
    """20 cut files and 60 with one changed bit give an error that names the file, or the same content."""
    content, intact = saved.read_bytes(), checkpoint.read(saved)
    dice, path, found = random.Random(0), tmp_path / "last.pt", 0
    for n in range(80):
        damaged = bytearray(content[:dice.randrange(len(content))] if n < 20 else content)
        if n >= 20:
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            again = checkpoint.read(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
        else:                                              # the bit is in the padding between tensors
            assert n >= 20 and all(torch.equal(again["model"][k], v) for k, v in intact["model"].items())
    assert found >= 40


class Call:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("make, words", (
    (lambda path: None, "no such checkpoint"), (lambda path: path.mkdir(), "folder"),
    (lambda path: path.write_bytes(b""), "damaged"),
    (lambda path: path.write_bytes(pickle.dumps({"model": 1})), "damaged"),
    (lambda path: torch.save({"format": checkpoint.FORMAT, "model": {}, "call": Call()}, path), "damaged"),
    (lambda path: torch.save({"format": 99, "model": {}}, path), "format 99"),
    (lambda path: torch.save({"state_dict": {}}, path), "KeyError"),
    (lambda path: torch.save([1], path), "TypeError")))
def test_files_that_are_not_checkpoints_are_one_line(tmp_path, monkeypatch, make, words):
    """No code in them is executed."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    make(path)
    with pytest.raises(UserError) as error:
        checkpoint.read(path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert not Path("executed").exists()


def test_out_of_memory_is_not_damage(saved, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: ...")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate memory"):
        checkpoint.read(saved)


def test_run_is_resolved_to_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs"):
        checkpoint.find(None)
    for n, name in enumerate(("runs/old/best.pt", "runs/old/last.pt", "runs/ablation/new/last.pt", "disk/last.pt")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
        os.utime(name, (time.time() + n, time.time() + n))
    Path("runs/ablation/up").symlink_to("..")
    assert checkpoint.find(None) == Path("runs/ablation/new/last.pt")
    Path("runs/gone").symlink_to("nowhere")
    Path("runs/link").symlink_to(Path("disk").absolute())
    assert checkpoint.find(None) == Path("runs/link/last.pt")
    Path("runs/link").unlink()
    assert checkpoint.find(None) == Path("runs/ablation/new/last.pt")
    assert checkpoint.find("runs/old") == Path("runs/old/best.pt")
    assert checkpoint.find("runs/old/last.pt") == Path("runs/old/last.pt")
    for path in ("runs/none", "runs"):
        with pytest.raises(UserError, match=f"^{path}: "):
            checkpoint.find(path)


@pytest.fixture
def official(tmp_path) -> Config:
    """A configuration whose SAM is read from a file."""
    torch.save(SAMViT(*SIZES["tiny"]).state_dict(), tmp_path / "sam.pth")
    return dataclasses.replace(CFG, sam_weights=str(tmp_path / "sam.pth"))


def test_frozen_official_tensors_are_read_from_their_file(official, tmp_path):
    model, content = packed(official)
    assert content["official"] == {
        "sam_weights": {"file": official.sam_weights, "content": content_hash(model.sam.state_dict())}}
    assert any(name.startswith("clip.") for name in content["model"])    # random here, so it has no file
    path, moved = tmp_path / "last.pt", tmp_path / "moved.pth"
    checkpoint.write(path, content)
    Path(official.sam_weights).rename(moved)
    with pytest.raises(UserError, match="sam.pth: .*download.py.* sam_weights="):
        restore(path)
    again, _ = restore(path, f"sam_weights={moved}")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("lost", ("sam.patch_embed.proj.weight", "clip.conv1.weight", "ftm.rho", "head.conv_seg.bias"))
def test_tensors_must_fit_and_only_official_ones_may_be_missing(official, lost):
    """SAM's patch embedding is trained (§4.3), CLIP is random here: neither may keep its initial values."""
    model, content = packed(official)
    checkpoint.load_state(model, content["model"], Path("last.pt"))
    state = {name: tensor for name, tensor in content["model"].items() if name != lost}
    with pytest.raises(UserError, match="last.pt .*: 1 .*ftm.tokens"):
        inference.restore(content | {"config": content["config"] | {"ftm_tokens": 5}}, Path("last.pt"))
    for load in (lambda: checkpoint.load_state(model, state, Path("last.pt")),
                 lambda: inference.restore(content | {"model": state}, Path("last.pt"))):
        with pytest.raises(UserError, match=f"last.pt .*: 1 .*{lost}"):
            load()


def test_without_freezing_the_checkpoint_has_all_tensors(official, tmp_path):
    model, content = packed(dataclasses.replace(official, freeze=False))
    assert content["official"] == {} and content["model"].keys() == model.state_dict().keys()
    checkpoint.write(tmp_path / "last.pt", content)
    Path(official.sam_weights).unlink()                    # no longer needed
    again, _ = restore(tmp_path / "last.pt")
    assert torch.equal(again.sam.pos_embed, model.sam.pos_embed)
