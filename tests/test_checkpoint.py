"""checkpoint.py: whole or not at all, damage found, nothing executed, official tensors left out and checked."""

import dataclasses
import os
import pickle
import random
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import inference
import model as model_file
from config import Config
from datasets import LabelSet
from engine import checkpoint
from errors import UserError
from files import weights, whole
from model import build_model
from sam_vit import SAMViT

CFG = Config(sam_weights="", clip_weights="", vocab="", sam_dim=16, sam_depth=4, sam_heads=2, sam_window=2, sam_grid=2,
             clip_dim=16, clip_depth=4, clip_heads=2, clip_grid=2, clip_taps=(0, 1, 2, 3), clip_embed=8, text_dim=8,
             text_depth=1, text_heads=2, ftm_tokens=4, prior_dim=8, deform_heads=2, deform_points=2, head_dim=8,
             aux_dim=8, crop_size=(32, 32), base_size=32, precision="fp32")
LABELS = LabelSet("custom", ("ground", "left", "right"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)), ((1, 2),))


def packed(cfg: Config = CFG, official: dict | None = None) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(3)
    model = build_model(cfg, LABELS.classes)
    official = checkpoint.official_files(model) if official is None else official
    return model, checkpoint.pack(model, LABELS, official, {"progress": {"iteration": 7}})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "last.pt"
    checkpoint.write(path, packed()[1])
    return path


# ---- there and back

def test_a_restored_network_is_the_one_that_was_saved(saved):
    model, content = packed()
    again, labels = inference.restore(checkpoint.read(saved), saved)
    assert labels == LABELS and not again.training and again.cfg == CFG
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(image), model.eval()(image))


def test_a_network_from_before_eq_6_had_two_readings_keeps_its_own(tmp_path):
    """It was trained with f_i as the residual; with the default of today it would compute something else."""
    _, content = packed(dataclasses.replace(CFG, ftm_residual="f"))
    del content["config"]["ftm_residual"]
    checkpoint.write(tmp_path / "last.pt", content)
    again, _ = inference.restore(checkpoint.read(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert again.cfg.ftm_residual == again.ftm.residual == "f"


def test_overrides_reach_the_restored_network(saved):
    model, _ = inference.restore(checkpoint.read(saved), saved, ["precision=bf16", "data_root=/else"])
    assert model.cfg.precision == "bf16" and model.cfg.data_root == "/else"


def test_frozen_weights_in_half_precision_predict_the_same(saved):
    """As from fp32 weights under autocast, to the last bit; what was trained stays in fp32."""
    model, _ = inference.restore(checkpoint.read(saved), saved, ["precision=bf16"])
    half, _, _ = inference.load_run(saved, ["precision=bf16"], "cpu")
    stored = [name for name, p in half.named_parameters() if p.dtype == torch.bfloat16]
    assert len(stored) == 8 * 4 and all(name.startswith(("sam.blocks", "clip.transformer")) for name in stored)
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    assert torch.equal(*(inference.predict(network, image, (1.0, 1.5), ()) for network in (model, half)))


def test_the_newest_is_kept_and_the_one_before_it(tmp_path):
    for n in range(4):
        checkpoint.write_last(tmp_path, {"format": 1, "model": {}, "config": {}, "n": n})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"][:n + 1]
        content, path, damaged = checkpoint.read_last(tmp_path)
        assert content["n"] == n and path.name == "last.pt" and not damaged
    assert checkpoint.read(tmp_path / "previous.pt")["n"] == 2


def test_a_write_that_fails_leaves_what_was_there(saved, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    shutil.copy(saved, path)
    before = path.read_bytes()
    monkeypatch.setattr(whole.secrets, "token_hex", lambda _: "x")
    (tmp_path / ".last-x.part.pt").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"last.pt could not be written \(No space left on device, .* GiB free"):
        checkpoint.write(path, packed()[1])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]

    def replace(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="Read-only file system"):
        checkpoint.write(path, packed()[1])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_file_size_limit_is_told_by_its_own_name(saved, tmp_path):
    """torch.save reports what the system says as "unexpected pos 704 vs 598"."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            checkpoint.write(tmp_path / "last.pt", packed()[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# ---- damage

def test_no_damage_goes_unnoticed(saved, tmp_path):
    """Cut off at 20 places, one bit turned at 60: an error that names the file, or the content as it was."""
    content, whole = saved.read_bytes(), checkpoint.read(saved)
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
        else:                                              # the bit was in the padding between the tensors
            assert n >= 20 and all(torch.equal(again["model"][k], v) for k, v in whole["model"].items())
    assert found >= 40


@pytest.mark.parametrize("make, words", (
    (lambda path: None, "no such checkpoint"),
    (lambda path: path.write_bytes(b""), "damaged or not a checkpoint"),
    (lambda path: path.write_text("<html><body>404</body></html>"), "damaged or not a checkpoint"),
    (lambda path: path.mkdir(), "cannot be read"),
    (lambda path: torch.save({"state_dict": {}}, path), "not a checkpoint of this program"),
    (lambda path: torch.save([1, 2], path), "not a checkpoint of this program"),
    (lambda path: torch.save({"format": 99, "model": {}}, path), "not a checkpoint of this program"),
    (lambda path: path.write_bytes(pickle.dumps({"model": 1})), "damaged or not a checkpoint"),
))
def test_what_is_no_checkpoint_is_one_line(tmp_path, make, words):
    path = tmp_path / "last.pt"
    make(path)
    with pytest.raises(UserError) as error:
        checkpoint.read(path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_too_little_memory_is_not_damage(saved, tmp_path, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: ...")

    shutil.copy(saved, tmp_path / "last.pt")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError, match="last.pt: not enough memory to read it"):
        checkpoint.read_last(tmp_path)


class Call:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_checkpoint_with_a_call_in_it_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": {}, "call": Call()}, "last.pt")
    assert zipfile.is_zipfile("last.pt")
    with pytest.raises(UserError, match="last.pt"):
        checkpoint.read(Path("last.pt"))
    assert not Path("executed").exists()


def test_a_checkpoint_of_another_network(saved):
    content = checkpoint.read(saved)
    lost = dict(content["model"])
    del lost["ftm.rho"]
    with pytest.raises(UserError, match=r"1 tensors missing, 0 unknown \(ftm.rho, ...\)"):
        inference.restore(content | {"model": lost}, saved)
    with pytest.raises(UserError, match="last.pt: size mismatch for ftm"):
        inference.restore(content | {"config": content["config"] | {"ftm_tokens": 5}}, saved)


# ---- finding

def test_which_checkpoint_a_run_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds no run yet"):
        checkpoint.find(None)
    for n, name in enumerate(("runs/old/best.pt", "runs/old/last.pt", "runs/ablation/new/last.pt")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
        os.utime(name, (time.time() + n, time.time() + n))
    assert checkpoint.find(None) == Path("runs/ablation/new/last.pt")
    Path("disk").mkdir()                                   # a run that lies elsewhere, and a link that leads back up
    Path("disk/last.pt").write_bytes(b"")
    os.utime("disk/last.pt", (time.time() + 9, time.time() + 9))
    Path("runs/there").symlink_to(Path("disk").absolute())
    Path("runs/ablation/up").symlink_to("..")
    assert checkpoint.find(None) == Path("runs/there/last.pt")
    Path("runs/there").unlink()
    Path("runs/there").symlink_to("nowhere")
    assert checkpoint.find(None) == Path("runs/ablation/new/last.pt")
    assert checkpoint.find("runs/old") == Path("runs/old/best.pt")
    assert checkpoint.find("runs/old/last.pt") == Path("runs/old/last.pt")
    with pytest.raises(UserError, match="runs/none: no such run or checkpoint"):
        checkpoint.find("runs/none")
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find("runs")


# ---- official weights (§4.3: CLIP and SAM are frozen)

@pytest.fixture
def official(tmp_path, monkeypatch) -> Config:
    """A configuration whose SAM comes out of a file, as the official one does, but is small."""
    def load_sam(path):
        sam = SAMViT(CFG.sam_dim, CFG.sam_depth, CFG.sam_heads, CFG.sam_window, CFG.sam_grid)
        sam.load_state_dict(torch.load(path, weights_only=True))
        return sam

    monkeypatch.setattr(model_file, "load_sam", load_sam)
    path = tmp_path / "sam.pth"
    torch.save(load_state(11), path)
    return dataclasses.replace(CFG, sam_weights=str(path))


def load_state(seed: int) -> dict:
    torch.manual_seed(seed)
    return SAMViT(CFG.sam_dim, CFG.sam_depth, CFG.sam_heads, CFG.sam_window, CFG.sam_grid).state_dict()


@pytest.mark.parametrize("override", [
    "sim_scale=1.0", "prompt=my {class}", "rho_init=0", "flip_pairs=[[0, 1]]", "palette=[[0,0,0],[9,9,9],[1,1,1]]",
    "classes=[a, b, c]", "out=elsewhere", "lr=1.0", "srm=false", "ftm_tokens=9"])
def test_what_a_network_was_trained_with_cannot_be_changed(saved, override):
    """It would change nothing, and stand in results.json as if it had."""
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=f"{key}: .*last.pt was trained with .*, which cannot be changed any more"):
        inference.restore(checkpoint.read(saved), saved, [override])


def test_what_may_be_said_anew(saved):
    again, labels = inference.restore(checkpoint.read(saved), saved, ["base_size=64", "lr=6e-4", "ftm_residual=f"])
    assert (again.cfg.base_size, again.ftm.residual) == (64, "f")
    other, labels = inference.restore(checkpoint.read(saved), saved, ["dataset=lip", "flip_pairs=[]"])
    assert other.cfg.dataset == "lip" and labels == LABELS       # other photos are read, the classes stay the network's
    with pytest.raises(UserError, match="override 'lrr=1': unknown key"):
        inference.restore(checkpoint.read(saved), saved, ["lrr=1"])


def test_frozen_official_tensors_are_left_out_and_named(official, tmp_path):
    model, content = packed(official)
    names = {name for name, p in model.named_parameters() if name.startswith("sam.") and not p.requires_grad}
    assert names and content["model"].keys() == model.state_dict().keys() - names
    assert {name for name in content["model"] if name.startswith("sam.")} == {
        f"sam.{name}" for name in model.sam.state_dict() if name.startswith("patch_embed.")}
    assert any(name.startswith("clip.") for name in content["model"])        # random, so in no file
    assert content["official"] == {"sam_weights": weights.sha256(official.sam_weights)}
    path = tmp_path / "last.pt"
    checkpoint.write(path, content)
    again, _ = inference.restore(checkpoint.read(path), path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    moved = tmp_path / "moved.pth"
    Path(official.sam_weights).rename(moved)
    with pytest.raises(UserError, match="run `python download.py`, or say where it is with sam_weights=PATH"):
        inference.restore(checkpoint.read(path), path)
    again, _ = inference.restore(checkpoint.read(path), path, [f"sam_weights={moved}"])
    assert torch.equal(again.sam.blocks[0].attn.qkv.weight, model.sam.blocks[0].attn.qkv.weight)
    torch.save(load_state(12), moved)
    with pytest.raises(UserError, match="was trained on another .*moved.pth"):
        inference.restore(checkpoint.read(path), path, [f"sam_weights={moved}"])


@pytest.mark.parametrize("lost, fits", (("sam.blocks.0.attn.qkv.weight", True), ("sam.patch_embed.proj.weight", False),
                                        ("clip.conv1.weight", False), ("head.conv_seg.bias", False)))
def test_nothing_may_be_missing_but_what_the_official_file_has(official, lost, fits):
    """SAM's patch embedding is trained (§4.3), CLIP is random here: neither may be left as it happens to be."""
    model, content = packed(official)
    state = {name: tensor for name, tensor in content["model"].items() if name != lost}
    assert (len(state) == len(content["model"])) == fits
    for load in (lambda: checkpoint.load_state(model, state, Path("last.pt")),
                 lambda: inference.restore(content | {"model": state}, Path("last.pt"))):
        if fits:
            load()
        else:
            with pytest.raises(UserError, match=f"last.pt does not fit its network: 1 tensors missing, .*{lost}"):
                load()


def test_without_freezing_everything_is_in_the_checkpoint(official, tmp_path):
    model, content = packed(dataclasses.replace(official, freeze=False))
    assert content["official"] == {} and content["model"].keys() == model.state_dict().keys()
    path = tmp_path / "last.pt"
    checkpoint.write(path, content)
    Path(official.sam_weights).unlink()                    # not needed any more
    again, _ = inference.restore(checkpoint.read(path), path)
    assert torch.equal(again.sam.pos_embed, model.sam.pos_embed)
