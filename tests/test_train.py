"""train.py, run.py: schedule, groups, one step; a run that is stopped, killed, changed or out of luck."""

import contextlib
import copy
import dataclasses
import errno
import functools
import itertools
import os
import re
import shutil
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from tiny import assert_same_run, differences, gradients, logged, make_config, with_faults, worst

import inference
import train
from config import RANGES, SIZES, Config, load_config
from datasets import BatchOrder, TrainSet, open_split
from engine import checkpoint
from errors import UserError, in_one_line
from engine.processes import World
from files import atomic
from model import build_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)                               # the machine may be busy, and the sums must not vary with it
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    return make_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """A run that nothing happened to."""
    train.main(["--cfg", config])
    return Path(load_config(config).out)


def fails(capsys, *argv: str) -> str:
    """The one line that a training that cannot go on leaves on stderr."""
    with pytest.raises(SystemExit) as end:
        train.main(list(argv))
    assert end.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    return lines[0]


# ---- schedule and groups

def test_learning_rate_at_the_corners():
    cfg = Config(iters=80_000, warmup_iters=1500, lr=6e-4, warmup_ratio=1e-5, poly_power=1.0)
    assert train.get_lr(0, cfg) == pytest.approx(6e-9, rel=1e-9)
    assert train.get_lr(750, cfg) == pytest.approx(6e-4 * (1 - 750 / 80_000) * (0.5 + 0.5e-5), rel=1e-9)
    assert train.get_lr(1500, cfg) == pytest.approx(6e-4 * (1 - 1500 / 80_000), rel=1e-12)
    assert train.get_lr(40_000, cfg) == pytest.approx(3e-4, rel=1e-12)
    assert train.get_lr(79_999, cfg) == pytest.approx(6e-4 / 80_000, rel=1e-9)
    assert train.get_lr(10, dataclasses.replace(cfg, warmup_iters=0, poly_power=0.0)) == 6e-4
    rates = [train.get_lr(it, cfg) for it in range(0, 80_000, 7)]
    top = rates.index(max(rates))
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert abs(7 * top - 1500) <= 7


@pytest.mark.parametrize("freeze", (True, False))
def test_groups_hold_every_trained_parameter_once(config, freeze):
    cfg = load_config(config, [f"freeze={freeze}", "patch_embed_lr_mult=0.5", "weight_decay=0.05"])
    model = build_model(cfg, cfg.classes)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for group in train.param_groups(model):
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = (group["weight_decay"], group["lr_factor"])
    assert sorted(found) == sorted(names.values())
    for name, p in model.named_parameters():
        if p.requires_grad:
            word = name.rpartition(".")[2]
            plain = p.ndim == 1 or p.ndim == 0 or word in ("tokens", "level_embed", "pos_embed", "positional_embedding",
                                                           "rel_pos_h", "rel_pos_w", "gamma", "rho")
            assert found[name] == (0.0 if plain else 0.05, 0.5 if name.startswith("sam.patch_embed") else 1.0), name
    assert {"ftm.rho", "ftm.tokens", "adapter.level_embed"} <= {name for name, (decay, _) in found.items() if not decay}


# ---- one step

@pytest.mark.parametrize("dtype, bound", ((torch.float64, 1e-10), (torch.float32, 1e-5)))
def test_accumulation_does_not_change_the_gradient(config, dtype, bound):
    cfg = load_config(config)
    assert worst(gradients(cfg, 2, dtype), gradients(cfg, 1, dtype)) < bound
    other = gradients(dataclasses.replace(cfg, loss_group=4), 1, dtype)
    assert worst(other, gradients(cfg, 1, dtype)) > 1e-4   # the grouping of the loss is what makes it so


@pytest.mark.parametrize("freeze", (True, False))
def test_activation_checkpointing_does_not_change_the_gradient(config, freeze):
    cfg = load_config(config)
    with_it, without = (gradients(cfg, 1, checkpointing=on, freeze=freeze) for on in (True, False))
    assert worst(with_it, without) < 1e-12


def test_checkpointing_redraws_the_same_dropout(config):
    cfg = dataclasses.replace(load_config(config), drop_path=0.5, head_dropout=0.5)
    losses = []
    for on in (True, False):
        torch.manual_seed(0)
        model = build_model(dataclasses.replace(cfg, checkpointing=on), cfg.classes).train()
        optimizer = torch.optim.AdamW(train.param_groups(model), lr=cfg.lr)
        batch = (torch.full((4, 3, 32, 32), 9, dtype=torch.uint8), torch.ones(4, 32, 32, dtype=torch.uint8), None)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses.append(train.forward_backward(model, optimizer, scaler, [batch], cfg, torch.device("cpu"), 0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def trainable(cfg: Config) -> tuple:
    """A network to train, its optimiser and its scaler."""
    torch.manual_seed(0)
    return train.prepare(build_model(cfg, cfg.classes).train(), cfg, World())


def batch_of(cfg: Config, it: int) -> list:
    g = torch.Generator().manual_seed(it)
    return [(torch.randint(0, 256, (4, 3, 32, 32), generator=g, dtype=torch.uint8),
             torch.randint(0, 3, (4, 32, 32), generator=g, dtype=torch.uint8), [f"{it}.png"])]


def state_of(network, optimizer) -> dict:
    """Weights, BatchNorm's statistics, the optimiser's moments; not the learning rate, which goes on."""
    return copy.deepcopy({"model": dict(network.state_dict()), "moments": optimizer.state_dict()["state"]})


@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("fault", ("image", "loss", "gradient"))
def test_nothing_of_a_skipped_step_is_kept(config, monkeypatch, precision, fault):
    """... but that fp16's scale is halved; and the next step is what it would have been."""
    cfg, world = load_config(config, [f"precision={precision}"]), World()
    monkeypatch.setattr(train, "forward_backward", with_faults(train.forward_backward, {2: fault}))
    network, optimizer, scaler = trainable(cfg)
    states, scales = [], []
    for it in (0, 1, 2, 3):
        parts, taken, stop = train.train_step(network, optimizer, scaler, batch_of(cfg, it), cfg, world, it)
        states.append(state_of(network, optimizer))
        scales.append(scaler.get_scale())
        assert taken == (it != 2) and not stop and list(parts) == ["loss", "ce", "lovasz", "aux", "grad"]
    assert parts["grad"] < 1e3                             # of unscaled gradients in fp16, too
    assert differences(states[1], states[2]) == [] and differences(states[2], states[3]) != []
    assert scales == ([2.0 ** 16, 2.0 ** 16, 2.0 ** 15, 2.0 ** 15] if precision == "fp16" else [1.0] * 4)
    assert all(t.isfinite().all() for t in states[-1]["model"].values())
    if precision != "fp16":                                # there the other scale rounds otherwise
        network, optimizer, scaler = trainable(cfg)
        for it in (0, 1, 3):
            train.train_step(network, optimizer, scaler, batch_of(cfg, it), cfg, world, it)
        assert differences(states[-1], state_of(network, optimizer)) == []


def test_fp16_overflows_are_treated_as_torch_does(config):
    """Beside the recipe of torch.amp's documentation, which leaves all decisions to the scaler."""
    cfg, world, found = load_config(config, ["precision=fp16"]), World(), []
    for own in (True, False):
        network, optimizer, scaler = trainable(cfg)
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0 ** 37, "growth_interval": 2})
        taken = []
        for it in range(20):
            if own:
                taken.append(train.train_step(network, optimizer, scaler, batch_of(cfg, it), cfg, world, it)[1])
            else:
                train.forward_backward(network, optimizer, scaler, batch_of(cfg, it), cfg, world.device, it)
                scaler.step(optimizer)
                scaler.update()
        weights = {name: p.detach() for name, p in network.named_parameters()}       # torch's keeps BatchNorm's
        found.append({"weights": weights, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
        assert not own or (not all(taken[:3]) and True in taken and False in taken[taken.index(True):])
    assert differences(*found) == []


def test_every_split_of_the_work_sees_the_same_samples(config):
    """... in the same order, also from the middle on."""
    for world, accum, start in ((1, 1, 0), (2, 1, 3), (4, 1, 3), (1, 4, 3), (2, 2, 0)):
        cfg = load_config(config, [f"accum_steps={accum}", "batch_size=8"])
        orders = [iter(BatchOrder(10, cfg, rank, world, start)) for rank in range(world)]
        found = [key for _ in range(9 - start) for order in orders for _ in range(accum) for key in next(order)]
        one = iter(BatchOrder(10, dataclasses.replace(cfg, accum_steps=1)))
        assert found == [key for batch in [next(one) for _ in range(9)][start:] for key in batch]


ENDS = [(key, end) for low, high, keys in RANGES for key in keys.split() for end in (low, high)
        if end == low or key not in (*SIZES, "base_size", "synthetic_size", "crop_size", "ftm_tokens", "prior_dim",
                                     "head_dim", "aux_dim", "deform_points", "synthetic_train", "synthetic_val",
                                     "batch_size")]


@pytest.mark.parametrize("key, end", ENDS, ids=[f"{key}={end}" for key, end in ENDS])
def test_the_network_takes_a_step_with_every_number_that_the_config_takes(config, key, end):
    """At the ends of its range; of the sizes only the least, as the greatest are beyond this machine's memory."""
    number = len(getattr(Config(), key)) if isinstance(getattr(Config(), key), tuple) else 0
    try:
        cfg = load_config(config, [f"{key}={[end] * number if number else end}"])
        network, optimizer, scaler = trainable(cfg)
    except UserError as error:                             # does not go with the other numbers here
        assert key in str(error) or key == "clip_depth" and "clip_taps" in str(error)
        return
    sample = TrainSet(open_split(cfg, "train"), cfg)[[(n, 0, n) for n in range(4)]]
    assert not isinstance(sample, UserError)
    train.train_step(network, optimizer, scaler, [sample], cfg, World(), 0)
    inference.predict_labels(network.eval(), [np.zeros((20, 30, 3), np.uint8)], cfg.tta_scales, cfg.flip_pairs)


# ---- stopped, killed, continued

class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL: what is on the disk then is what a kill leaves."""


def kill_and_resume(argv: list[str], folder: Path, at: int):
    """Train, die in the step `at`, train on to the end."""
    def step(*args):
        if args[6] == at:
            raise Killed
        return real(*args)

    real = train.forward_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "forward_backward", step)
        with pytest.raises(Killed):
            train.main([*argv, f"out={folder}"])
    train.main([*argv, f"out={folder}", "--resume"])


def test_a_run_killed_at_any_write_goes_on_exactly(config, whole, tmp_path, monkeypatch):
    """Before each file is renamed, and with half of a checkpoint written; each time resumed to the end."""
    folder, real_replace, real_save = tmp_path / "run", os.replace, torch.save
    budget = [0]

    def spend():
        budget[0] -= 1
        if budget[0] < 0:
            raise Killed

    def replace(*args):
        spend()
        real_replace(*args)

    def save(content, file):
        if budget[0] == 0:
            file.write(b"PK\x03\x04half of a checkpoint")
        spend()
        real_save(content, file)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(torch, "save", save)
    kills, allowed = 0, 0
    while True:                                            # each attempt gets a little further than the one before
        allowed += 1
        budget[0] = allowed
        resume = ["--resume"] if (folder / "last.pt").exists() or (folder / "previous.pt").exists() else []
        try:
            train.main(["--cfg", config, f"out={folder}", *resume])
            break
        except Killed:
            kills += 1
    assert kills >= 8
    assert_same_run(folder, whole)


@pytest.mark.parametrize("number, at", ((signal.SIGTERM, 1), (signal.SIGINT, 3)))
def test_a_signal_saves_and_leaves(config, whole, tmp_path, capsys, monkeypatch, number, at):
    folder, real = tmp_path / "run", train.forward_backward
    argv = ["--cfg", config, f"out={folder}", "save_every=100"]

    def step(*args):
        if args[6] == at:
            signal.raise_signal(number)
        return real(*args)

    monkeypatch.setattr(train, "forward_backward", step)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    assert end.value.code == 128 + number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    said = capsys.readouterr().out
    assert f"stopped by {number.name} after iteration {at + 1}; {folder / 'last.pt'} is saved, --resume goes on" in said
    monkeypatch.setattr(train, "forward_backward", real)
    train.main(["--cfg", config, "--resume", f"out={folder}"])
    said = capsys.readouterr().out
    assert f"going on from {folder / 'last.pt'}, iteration {at + 1}; changed: save_every 100 -> 1" in said
    assert_same_run(folder, whole)


def test_a_signal_during_validation_leaves_at_once_and_validates_later(config, whole, tmp_path, capsys, monkeypatch):
    folder, real = tmp_path / "run", train.evaluate_split
    asked = []

    def evaluate_split(model, pairs, *args, interrupted, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        matrix, images = real(model, pairs, *args, interrupted=interrupted, **kwargs)
        asked.append(len(images))
        return matrix, images

    monkeypatch.setattr(train, "evaluate_split", evaluate_split)
    with pytest.raises(SystemExit) as end:
        train.main(["--cfg", config, f"out={folder}"])
    assert end.value.code == 143 and asked == [0]
    assert "stopped by SIGTERM after iteration 2" in capsys.readouterr().out
    monkeypatch.setattr(train, "evaluate_split", real)
    train.main(["--cfg", config, f"out={folder}", "--resume"])
    assert_same_run(folder, whole)


def test_frozen_encoders_resume_exactly(config, tmp_path):
    """`freeze: true` with random encoders: they are in no official file, so the checkpoint has to hold them."""
    argv = ["--cfg", config, "freeze=true", "workers=1"]
    train.main([*argv, f"out={tmp_path / 'whole'}"])
    kill_and_resume(argv, tmp_path / "run", at=3)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_frozen_weights_in_half_precision_change_nothing(config, tmp_path, monkeypatch, precision):
    """They are what autocast makes of them at each use; a resumed run goes on with the same bits."""
    argv = ["--cfg", config, "freeze=true", f"precision={precision}"]
    train.main([*argv, f"out={tmp_path / 'half'}"])
    kill_and_resume(argv, tmp_path / "resumed", at=2)
    assert_same_run(tmp_path / "resumed", tmp_path / "half")
    monkeypatch.setattr(train, "cast_frozen", lambda model, precision: None)
    train.main([*argv, f"out={tmp_path / 'single'}"])
    half, single = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("half", "single"))
    stored = [name for name, tensor in half["model"].items() if tensor.dtype != torch.float32
              and single["model"][name].dtype == torch.float32]
    assert len(stored) == 8 * 4 and all(name.startswith(("sam.blocks", "clip.transformer")) for name in stored)
    for name in stored:                                    # 4 linear layers in each of 4 + 4 blocks
        single["model"][name] = single["model"][name].to(half["model"][name].dtype)
    assert differences(half, single) == [] and logged(tmp_path / "half") == logged(tmp_path / "single")


def test_fp16_saves_its_scaler(config, tmp_path, monkeypatch):
    argv = ["--cfg", config, "precision=fp16"]
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", functools.partialmethod(   # overflows, then halves and grows
        torch.amp.GradScaler.__init__, init_scale=2.0 ** 40, growth_interval=1))
    train.main([*argv, f"out={tmp_path / 'whole'}"])
    kill_and_resume(argv, tmp_path / "run", at=2)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert content["scaler"]["scale"] == 2.0 ** 36         # four steps overflowed, and were left out


def test_a_finished_run_is_left_alone(config, whole, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    train.main(["--cfg", config, "--resume"])
    assert "done: best mIoU" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


# ---- refused

def test_a_folder_with_a_run_is_not_overwritten(config, whole, capsys):
    before = (whole / "last.pt").read_bytes()
    line = fails(capsys, "--cfg", config)
    assert "already holds a run: go on with --resume, or choose another folder with out=FOLDER" in line
    assert (whole / "last.pt").read_bytes() == before


@pytest.mark.parametrize("how", ((), ("--resume",), ("restarted",)))
def test_a_folder_with_nothing_but_the_best_network_is_left_alone(config, whole, tmp_path, capsys, monkeypatch, how):
    """As kept for prediction, or sent by somebody: no optimiser is there to go on with, nothing may be overwritten."""
    if how == ("restarted",):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        how = ()
    for name in ("best.pt", "log.jsonl", "config.yaml"):
        shutil.copy(whole / name, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    line = fails(capsys, "--cfg", config, f"out={tmp_path}", *how)
    assert line == (f"error: {tmp_path} holds a best.pt but no last.pt, which alone has what training needs to go on: "
                    "choose another folder with out=FOLDER")
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()


def test_links_to_a_disk_that_is_away_are_a_run(config, whole, tmp_path, capsys):
    shutil.copy(whole / "log.jsonl", tmp_path)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).symlink_to(tmp_path / "away" / name)
    assert "already holds a run" in fails(capsys, "--cfg", config, f"out={tmp_path}")
    assert f"{tmp_path / 'last.pt'}: no such checkpoint" in fails(capsys, "--cfg", config, f"out={tmp_path}", "--resume")
    assert (tmp_path / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_the_config_of_a_copied_run_does_not_change_the_other(config, whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    line = fails(capsys, "--cfg", str(copy / "config.yaml"), "--resume")
    assert line == (f"error: {copy / 'config.yaml'} lies in the folder of a run, but names {whole} as its own: say which "
                    "it is with out=FOLDER")
    train.main(["--cfg", str(copy / "config.yaml"), "--resume", f"out={copy}"])
    train.main(["--cfg", str(copy / "config.yaml"), f"out={tmp_path / 'new'}"])
    train.main(["--cfg", str(whole / "config.yaml"), "--resume"])


def test_a_folder_with_nothing_but_the_checkpoint_before_the_last_goes_on(config, whole, tmp_path, capsys):
    shutil.copy(whole / "previous.pt", tmp_path)
    assert "already holds a run" in fails(capsys, "--cfg", config, f"out={tmp_path}")
    train.main(["--cfg", config, f"out={tmp_path}", "--resume"])
    assert f"going on from {tmp_path / 'previous.pt'}" in capsys.readouterr().out


def test_only_what_a_kill_left_is_cleaned_up(config, whole, tmp_path, capsys):
    """... and not before it is clear that the folder may be used."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    litter, other = folder / ".last-0123abcd.part.pt", folder / ".photo.part1"
    for path in (litter, other):
        path.write_bytes(b"")
    fails(capsys, "--cfg", config, f"out={folder}")
    assert litter.exists()
    train.main(["--cfg", config, f"out={folder}", "--resume"])
    assert not litter.exists() and other.exists()


def test_a_restart_by_torchrun_goes_on_by_itself(config, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(["--cfg", config])
    assert "going on from" in capsys.readouterr().out
    train.main(["--cfg", config, "iters=2", f"out={tmp_path / 'run'}"])      # died before its first checkpoint
    assert "going on from" not in capsys.readouterr().out


def test_another_torchrun_is_no_restart(config, whole, tmp_path, capsys, monkeypatch):
    """Its second attempt, after the first was refused, finds a run that another one began."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    lock = (folder / ".lock").read_text()
    assert len(lock.split()) == 3 and f" {os.getppid()} " in lock
    (folder / ".lock").write_text(lock.replace(f" {os.getppid()} ", " 1 "))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "already holds a run" in fails(capsys, "--cfg", config, f"out={folder}")


def test_a_refused_run_changes_nothing(config, whole, tmp_path, capsys):
    """Also where it is found late, when the network is built."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "no.gz" in fails(capsys, "--cfg", config, f"out={folder}", "--resume", "vocab=no.gz")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_log_that_was_edited(config, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    log = folder / "log.jsonl"
    log.write_text(log.read_text().replace("\n", "\n\n"))
    train.main(["--cfg", config, f"out={folder}", "--resume"])
    assert log.read_text() == (whole / "log.jsonl").read_text()
    log.write_text("{\n")
    assert f"{log}: not as it was written" in fails(capsys, "--cfg", config, f"out={folder}", "--resume")


def test_other_photos_than_before_are_said(config, tmp_path, capsys):
    """As many, but others; and another validation set, on which the best score begins anew."""
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(Path(config).parent / "data", data)
    argv = ["--cfg", config, f"data_root={data}", f"out={folder}"]
    train.main([*argv, "iters=2"])
    content = torch.load(folder / "last.pt", weights_only=True)
    content["config"]["iters"] = 4
    content["progress"]["best_miou"] = 0.99
    checkpoint.write(folder / "last.pt", content)
    for kind in ("images", "labels"):
        (data / kind / "train/3.png").rename(data / kind / "train/a.png")
        (data / kind / "val/3.png").rename(data / kind / "val/a.png")
    capsys.readouterr()
    train.main([*argv, "--resume"])
    said = capsys.readouterr().out
    assert "warning: 10 training images, there were 10: from here on they come in another order" in said
    assert "warning: another validation set than before: best.pt will be the best on this one" in said
    assert "done: best mIoU 99" not in said and "at iteration 4" in said
    train.main([*argv, "--resume"])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("scores, failing, best", [
    ((0.2, 0.6, 0.3, 0.4), {2}, 0.4), ((0.2, 0.6, 0.3, 0.4), {1}, 0.6), ((0.2, 0.3, 0.4, 0.6), {4}, None)])
def test_a_best_network_that_could_not_be_written_is_not_the_best(config, tmp_path, capsys, monkeypatch, scores, failing,
                                                                   best):
    """The next validation may write it; at the last one that is an error, and a resumed run validates anew."""
    folder, values, written = tmp_path / "run", iter(scores), itertools.count(1)
    real, write = train.scores, checkpoint.write
    monkeypatch.setattr(train, "scores", lambda matrix: real(matrix) | {"miou": next(values)})

    def refuse(path, content, keep=None):
        if path.name == "best.pt" and next(written) in failing:
            raise UserError(f"{path} could not be written (No space left on device)")
        write(path, content, keep)

    monkeypatch.setattr(checkpoint, "write", refuse)
    argv = ["--cfg", config, f"out={folder}", "eval_every=1"]
    if best is None:
        assert "best.pt could not be written" in fails(capsys, *argv)
        values, best = iter([0.6]), 0.6
        train.main([*argv, "--resume"])
    else:
        train.main(argv)
    content = torch.load(folder / "best.pt", weights_only=True)["progress"]
    assert content["best_miou"] == best and content["iteration"] == content["best_iteration"]
    assert f"done: best mIoU {100 * best:.2f} at iteration {content['iteration']}, " in capsys.readouterr().out


@pytest.mark.parametrize("text", ("iters=0", "iters =0"))
def test_a_dry_run_needs_the_real_number_of_iterations(config, tmp_path, capsys, text):
    train.main(["--cfg", config, text])
    assert "4 iterations take about" in capsys.readouterr().out
    (tmp_path / "none.yaml").write_text(Path(config).read_text().replace("iters: 4", "iters: 0"))
    assert "none.yaml: iters is 0; a dry run needs" in fails(capsys, "--cfg", str(tmp_path / "none.yaml"))


def test_nothing_to_resume(config, tmp_path, capsys):
    line = fails(capsys, "--cfg", config, "--resume", f"out={tmp_path / 'no'}")
    assert "no checkpoint to go on from (no last.pt)" in line and not (tmp_path / "no").exists()
    line = fails(capsys, "--cfg", config, "--resume", f"out={tmp_path}")
    assert "no checkpoint to go on from (no last.pt)" in line


def test_a_changed_configuration_is_refused_or_listed(config, whole, capsys):
    line = fails(capsys, "--cfg", config, "--resume", "lr=0.5", "workers=2")
    assert "was trained with another configuration (lr 0.001 -> 0.5): restore it, or start a new run" in line
    assert load_config(whole / "config.yaml").lr == 1e-3   # what the folder says still holds
    train.main(["--cfg", config, "--resume", "workers=1", "log_every=7"])
    assert "changed: workers 0 -> 1, log_every 2 -> 7" in capsys.readouterr().out
    train.main(["--cfg", config, "--resume"])


def test_a_knob_that_is_newer_than_the_checkpoint_has_its_default(config, whole, tmp_path, capsys):
    content = torch.load(whole / "last.pt", weights_only=True)
    del content["config"]["betas"]
    content["config"]["compile"] = False                   # one that the checkpoint has and there is no more
    checkpoint.write(tmp_path / "last.pt", content)
    train.main(["--cfg", config, "--resume", f"out={tmp_path}"])
    assert "going on from" in capsys.readouterr().out
    line = fails(capsys, "--cfg", config, "--resume", f"out={tmp_path}", "betas=[0.5, 0.9]")
    assert "betas (0.9, 0.999) -> (0.5, 0.9)" in line


@pytest.mark.parametrize("batch, processes, accum, words", [
    (6, 4, 1, "batch_size (6) must be a multiple of processes x accum_steps (4 x 1)"),
    (2, 4, 1, "batch_size (2) must be a multiple of processes x accum_steps (4 x 1)"),
    (8, 3, 2, "batch_size (8) must be a multiple of processes x accum_steps (3 x 2)"),
    (8, 4, 2, "batch_size (8) is one image for each of 4 processes and 2 steps"), (8, 2, 2, None)])
def test_a_batch_must_divide_among_processes_and_steps(batch, processes, accum, words):
    cfg, world = Config(batch_size=batch, accum_steps=accum), SimpleNamespace(size=processes, device=torch.device("cpu"))
    with pytest.raises(UserError, match=re.escape(words)) if words else contextlib.nullcontext():
        train.check_batch(cfg, world)


def test_a_batch_that_does_not_divide_is_refused_early(config, tmp_path, capsys):
    line = fails(capsys, "--cfg", config, "batch_size=6", "accum_steps=4", f"out={tmp_path / 'run'}")
    assert "batch_size" in line and "accum_steps" in line and not (tmp_path / "run").exists()


def test_a_changed_training_set_is_mentioned(config, tmp_path, capsys):
    shutil.copytree(Path(config).parent / "data", tmp_path / "data")
    argv = ["--cfg", config, f"out={tmp_path / 'run'}"]
    train.main([*argv, "iters=2"])
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder / "train" / "3.png").unlink()
    train.main([*argv, "iters=2", "--resume", f"data_root={tmp_path / 'data'}"])
    assert "warning: 9 training images, there were 10" in capsys.readouterr().out


# ---- out of luck

FAULTS = {1: "loss", 2: "gradient", 4: "image"}            # of six iterations


@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_a_run_with_skipped_steps_goes_on_exactly(config, tmp_path, capsys, monkeypatch, precision):
    """Killed within and behind skipped steps. Each is in the log with its batch, and none in the mean losses."""
    argv = ["--cfg", config, f"precision={precision}", "iters=6"]
    monkeypatch.setattr(train, "forward_backward", with_faults(train.forward_backward, FAULTS))
    train.main([*argv, f"out={tmp_path / 'whole'}"])
    assert "done: best mIoU" in capsys.readouterr().out
    for at in (2, 5):
        kill_and_resume(argv, tmp_path / f"killed{at}", at)
        assert_same_run(tmp_path / f"killed{at}", tmp_path / "whole")
    order, names = iter(BatchOrder(10, load_config(config))), sorted(str(i) for i in range(10))
    batches = [[names[index] for index, _, _ in next(order)] for _ in range(6)]
    log = logged(tmp_path / "whole")
    assert [entry for entry in log if "skipped" in entry] == [
        {"iter": it + 1, "skipped": "gradient" if kind == "gradient" else "loss", "batch": batches[it]}
        for it, kind in FAULTS.items()]
    trained = [entry for entry in log if "lr" in entry]
    assert [entry["iter"] for entry in trained] == [2, 4, 6] and all(0 < entry["loss"] < 9 for entry in trained)
    content = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    assert content["progress"]["iteration"] == 6 and content["progress"]["skipped"] == 3
    assert all(t.isfinite().all() for t in content["model"].values())


def test_a_stretch_of_the_log_may_have_nothing_but_skipped_steps(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "forward_backward", with_faults(train.forward_backward, {0: "loss", 1: "loss"}))
    train.main(["--cfg", config, f"out={tmp_path / 'run'}"])
    log = logged(tmp_path / "run")
    assert [entry["iter"] for entry in log if "lr" in entry] == [2, 4] and "loss" not in log[2] and "loss" in log[4]
    assert (tmp_path / "run" / "curves.png").exists()


def test_skipped_steps_are_counted_in_the_bar(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "forward_backward", with_faults(train.forward_backward, {1: "loss", 2: "gradient"}))
    monkeypatch.setenv("COLUMNS", "300")                   # pytest's processes have 80, and tqdm 4.62 keeps to them
    train.main(["--cfg", config, f"out={tmp_path / 'run'}"])
    out, err = capsys.readouterr()
    assert "GiB 2 skipped]" in err and "GiB 0 skipped" not in err
    assert f"2 of 4 steps were skipped: {tmp_path / 'run' / 'log.jsonl'}\ndone: " in out


def test_a_network_that_has_diverged_stops_after_20_skipped_steps(config, tmp_path, capsys):
    folder = tmp_path / "run"
    argv = ["--cfg", config, "lr=1e6", "warmup_iters=0", "iters=100", "save_every=6", "eval_every=100", f"out={folder}"]
    line = fails(capsys, *argv)
    assert "iteration 21: 20 steps in a row were skipped, the loss is not finite (loss nan" in line
    assert f"; the batches are in {folder / 'log.jsonl'}; " in line
    assert f"; the last good checkpoint is of iteration 18, in {folder}" in line
    log = logged(folder)
    assert [entry["iter"] for entry in log if "skipped" in entry] == list(range(2, 22))
    content = torch.load(folder / "last.pt", weights_only=True)
    assert content["progress"]["iteration"] == 18 and content["progress"]["in_a_row"] == 17
    assert all(t.isfinite().all() for t in content["model"].values())
    again = fails(capsys, *argv, "--resume")               # counted on from the checkpoint, not anew
    assert again == line and logged(folder) == log


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_a_run(config, tmp_path, monkeypatch):
    faults = {it: "gradient" for it in range(45) if it not in (19, 39)}
    monkeypatch.setattr(train, "forward_backward", with_faults(train.forward_backward, faults))
    train.main(["--cfg", config, f"out={tmp_path / 'run'}", "iters=45", "save_every=100", "eval_every=100"])
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (content["progress"]["skipped"], content["progress"]["in_a_row"]) == (43, 5)


def test_fp16_stops_when_its_scale_falls_below_1(config, tmp_path, capsys, monkeypatch):
    """2^16 can be halved 16 times: the seventeenth skipped step is one too many."""
    faults = {it: "gradient" for it in range(2, 40)}
    monkeypatch.setattr(train, "forward_backward", with_faults(train.forward_backward, faults))
    line = fails(capsys, "--cfg", config, "precision=fp16", "iters=40", f"out={tmp_path / 'run'}")
    assert "iteration 19: the scale of fp16 has fallen below 1, the gradient is not finite (loss 2" in line
    assert f"the last good checkpoint is of iteration 18, in {tmp_path / 'run'}" in line


def test_a_checkpoint_from_before_steps_were_skipped(config, whole, tmp_path, capsys):
    content = torch.load(whole / "previous.pt", weights_only=True)
    del content["progress"]["skipped"], content["progress"]["in_a_row"]
    checkpoint.write(tmp_path / "last.pt", content)
    train.main(["--cfg", config, "--resume", f"out={tmp_path}"])
    assert "going on from" in capsys.readouterr().out


def test_a_disk_that_fails_for_a_moment_is_no_damage(config, whole, tmp_path, capsys, monkeypatch):
    """The checkpoint keeps its name, and the run does not go back to the one before."""
    folder, real = tmp_path / "run", zipfile.ZipFile
    shutil.copytree(whole, folder)

    def failing(path, *args, **more):
        if Path(path).name == "last.pt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", failing)
    assert f"{folder / 'last.pt'}: cannot be read (Input/output error)" in fails(
        capsys, "--cfg", config, f"out={folder}", "--resume")
    monkeypatch.undo()
    assert (folder / "last.pt").read_bytes() == (whole / "last.pt").read_bytes()
    train.main(["--cfg", config, f"out={folder}", "--resume"])
    assert f"going on from {folder / 'last.pt'}" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(config, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    content = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(content[:len(content) // 2])
    train.main(["--cfg", config, f"out={folder}", "--resume"])
    said = capsys.readouterr().out
    assert f"warning: {folder / 'last.pt'}: damaged" in said and f"{folder / 'previous.pt'} is used" in said
    assert "going on from" in said
    assert_same_run(folder, whole)
    assert (folder / "last.damaged").stat().st_size == len(content) // 2

    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(content[:1000])
    line = fails(capsys, "--cfg", config, f"out={folder}", "--resume")
    assert "nothing to go on from" in line and "last.pt" in line and "previous.pt" in line and "begin anew" in line


def test_a_full_disk_is_reported_and_training_goes_on_while_it_can(config, whole, tmp_path, capsys, monkeypatch):
    """/dev/full stands in for the disk: every write there fails as on a full one."""
    folder, real = tmp_path / "run", train.forward_backward

    def step(*args):
        if args[6] in full:
            for name in (".last-x.part.pt", ".log-x.part.jsonl", ".best-x.part.pt"):
                (folder / name).symlink_to("/dev/full")
        return real(*args)

    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "x")
    full = {1}                                             # the save after iteration 2 fails, the others do not
    monkeypatch.setattr(train, "forward_backward", step)
    train.main(["--cfg", config, f"out={folder}"])
    said = capsys.readouterr().out
    assert f"warning: {folder / 'log.jsonl'} could not be written (No space left on device" in said
    assert f"the last good checkpoint is of iteration 1, in {folder}; training goes on" in said
    assert_same_run(folder, whole)

    full, folder = {3}, tmp_path / "other"                 # ... and at the end, where it matters
    monkeypatch.setattr(atomic.Path, "unlink", lambda *_, **__: None)            # the disk stays full
    line = fails(capsys, "--cfg", config, f"out={folder}")
    assert "could not be written (No space left on device" in line
    assert f"the last good checkpoint is of iteration 3, in {folder}" in line
    assert torch.load(folder / "last.pt", weights_only=True)["progress"]["iteration"] == 3


def test_a_folder_that_cannot_be_written(config, capsys):
    line = fails(capsys, "--cfg", config, "out=/proc/run")
    assert line.startswith("error: out: /proc/run cannot be used (")
    line = fails(capsys, "--cfg", config, f"out={config}")
    assert "cannot be used (File exists)" in line


def test_out_of_memory_is_one_line(config, tmp_path, capsys, monkeypatch):
    with pytest.raises(RuntimeError) as error:
        torch.empty(2 ** 60, dtype=torch.uint8)
    assert in_one_line(error.value, "fewer workers") == "out of memory: try fewer workers"
    with pytest.raises(RuntimeError) as error:
        torch.empty(2 ** 40, 2 ** 40, 2 ** 40)
    assert in_one_line(error.value, "fewer workers") == "out of memory: try fewer workers"
    with pytest.raises(cv2.error) as error:
        cv2.resize(np.zeros((1, 1, 3), np.uint8), (2 ** 30, 2 ** 30))
    assert in_one_line(error.value, "fewer workers") == "out of memory: try fewer workers"

    def step(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB ...")

    monkeypatch.setattr(train, "forward_backward", step)
    assert "checkpointing=true" in fails(capsys, "--cfg", config, f"out={tmp_path / 'run'}")


def test_a_bug_keeps_its_traceback(config, tmp_path, monkeypatch):
    def step(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(train, "forward_backward", step)
    with pytest.raises(RuntimeError, match="a bug"):
        train.main(["--cfg", config, f"out={tmp_path / 'run'}"])


def test_a_dry_run_leaves_no_file(config, tmp_path, capsys):
    train.main(["--cfg", config, "iters=0", f"out={tmp_path / 'run'}"])
    said = capsys.readouterr().out
    assert said.count("\nstep ") == 4 and "dry run: all well" in said and "4 iterations take about" in said
    assert not (tmp_path / "run").exists()
