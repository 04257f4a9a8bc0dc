"""train.py: schedule, parameter groups, one step, skipped steps; engine/processes.py: signals, devices."""

import contextlib
import copy
import dataclasses
import os
import re
import signal
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from tiny import (ALONE, GRADIENT, before_step, differences, fails, gradients, logged, progress, throw, with_faults,
                  worst)

import inference
import train
from config import Config, load_config
from datasets import open_split, train_loader
from engine import checkpoint, run
from engine.processes import StopSignal, World, pick_device
from errors import UserError, in_one_line
from files.atomic import MARK
from model import build_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_learning_rate_schedule():
    cfg = Config(iters=80_000, warmup_iters=1500, lr=6e-4, warmup_ratio=1e-5, poly_power=1.0)
    assert train.get_lr(0, cfg) == pytest.approx(6e-9, rel=1e-9)
    assert train.get_lr(750, cfg) == pytest.approx(6e-4 * (1 - 750 / 80_000) * (0.5 + 0.5e-5), rel=1e-9)
    assert train.get_lr(1500, cfg) == pytest.approx(6e-4 * (1 - 1500 / 80_000), rel=1e-12)
    assert train.get_lr(40_000, cfg) == pytest.approx(3e-4, rel=1e-12)
    assert train.get_lr(79_999, cfg) == pytest.approx(6e-4 / 80_000, rel=1e-9)
    assert train.get_lr(10, dataclasses.replace(cfg, warmup_iters=0, poly_power=0.0)) == 6e-4


@pytest.mark.parametrize("freeze", (True, False))
def test_every_trained_parameter_is_in_one_group(config, freeze):
    cfg = load_config(config, [f"freeze={freeze}", "patch_embed_lr_mult=0.5", "weight_decay=0.05"])
    model, found = build_model(cfg, cfg.classes), {}
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    for group in train.param_groups(model):
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = (group["weight_decay"], group["lr_factor"])
    assert sorted(found) == sorted(names.values())
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or name.rpartition(".")[2] in (
                "tokens", "level_embed", "pos_embed", "positional_embedding", "rel_pos_h", "rel_pos_w", "gamma", "rho")
            assert found[name] == (0.0 if plain else 0.05, 0.5 if name.startswith("sam.patch_embed") else 1.0), name
    assert {"ftm.rho", "ftm.tokens", "adapter.level_embed"} <= {name for name, (decay, _) in found.items() if not decay}


@pytest.mark.parametrize("dtype, bound", ((torch.float64, 1e-10), (torch.float32, 1e-5)))
def test_accumulation_does_not_change_the_gradient(config, dtype, bound):
    cfg = load_config(config)
    assert worst(gradients(cfg, 2, dtype), gradients(cfg, 1, dtype)) < bound
    other = gradients(dataclasses.replace(cfg, loss_group=4), 1, dtype)
    assert worst(other, gradients(cfg, 1, dtype)) > 1e-4   # without groups in the loss it would


@pytest.mark.parametrize("freeze", (True, False))
def test_activation_checkpointing_does_not_change_the_gradient(config, freeze):
    cfg = load_config(config)
    with_it, without = (gradients(cfg, 1, checkpointing=on, freeze=freeze) for on in (True, False))
    assert worst(with_it, without) < 1e-12


def learner_of(cfg: Config) -> train.Learner:
    torch.manual_seed(0)
    return train.Learner(build_model(cfg, cfg.classes), cfg, ALONE)


def batch_of(it: int) -> list:
    g = torch.Generator().manual_seed(it)
    return [(torch.randint(0, 256, (4, 3, 32, 32), generator=g, dtype=torch.uint8),
             torch.randint(0, 3, (4, 32, 32), generator=g, dtype=torch.uint8), [f"{it}.png"])]


def state_of(learner: train.Learner) -> dict:
    """Weights, BatchNorm statistics and the optimizer's moments, but not the learning rate, which depends on `it`."""
    moments = checkpoint.optimizer_state(learner.model, learner.optimizer)
    return copy.deepcopy({"model": dict(learner.model.state_dict()), "moments": moments})


def test_checkpointing_repeats_the_same_dropout(config):
    losses = [learner_of(load_config(config, ["drop_path=0.5", "head_dropout=0.5", f"checkpointing={on}"])).gradient(
        batch_of(0), 0) for on in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("precision, fault", [
    ("fp32", "image"), ("fp16", "loss"), ("fp32", "gradient"), ("bf16", "loss")])
def test_a_skipped_step_changes_nothing(config, monkeypatch, precision, fault):
    """Except for the fp16 loss scale, which is halved; later steps are as if it had never happened."""
    cfg = load_config(config, [f"precision={precision}"])
    monkeypatch.setattr(train.Learner, "gradient", with_faults(GRADIENT, {2: fault}))
    learner, states, scales = learner_of(cfg), [], []
    for it in (0, 1, 2, 3):
        losses, taken = learner.step(batch_of(it), it)
        states.append(state_of(learner))
        scales.append(learner.scaler.get_scale())
        assert taken == (it != 2) and list(losses) == ["loss", "ce", "lovasz", "aux", "grad"]
    assert losses["grad"] < 1e3                            # gradients are unscaled in fp16, too
    assert differences(states[1], states[2]) == [] and differences(states[2], states[3]) != []
    assert scales == ([2.0 ** 16, 2.0 ** 16, 2.0 ** 15, 2.0 ** 15] if precision == "fp16" else [1.0] * 4)
    assert all(t.isfinite().all() for t in states[-1]["model"].values())
    if precision != "fp16":                                # rounding depends on the scale
        learner = learner_of(cfg)
        for it in (0, 1, 3):
            learner.step(batch_of(it), it)
        assert differences(states[-1], state_of(learner)) == []


def test_fp16_overflows_are_handled_as_in_pytorch(config):
    """Compared with the recipe in torch.amp's documentation, where the scaler makes every decision."""
    cfg, found = load_config(config, ["precision=fp16"]), []
    for own in (True, False):
        learner, taken = learner_of(cfg), []
        learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": 2.0 ** 37, "growth_interval": 2})
        for it in range(20):
            if own:
                taken.append(learner.step(batch_of(it), it)[1])
            else:
                learner.gradient(batch_of(it), it)
                learner.scaler.step(learner.optimizer)
                learner.scaler.update()
        weights = {name: p.detach() for name, p in learner.model.named_parameters()}     # BatchNorm's statistics differ
        found.append([weights, learner.optimizer.state_dict(), learner.scaler.state_dict()])
        assert not own or (not all(taken[:3]) and True in taken and False in taken[taken.index(True):])
    assert differences(*found) == []


@pytest.mark.parametrize("override", [
    "base_size=1", "scale_range=16", "drop_path=0.999", "srm_ratio=0.01", "tta_scales=[0.01]"])
def test_a_step_and_a_prediction_at_the_limits_of_the_ranges(config, override):
    cfg = load_config(config, [override])
    learner = learner_of(cfg)
    learner.step([next(train_loader(cfg, open_split(cfg, "train")))], 0)
    inference.predict_labels(learner.model.eval(), [np.zeros((20, 30, 3), np.uint8)], cfg.tta_scales, cfg.flip_pairs)


def test_repeated_and_ignored_signals(monkeypatch):
    """A second Ctrl-C without torchrun ends the process; other repetitions do not count."""
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # like nohup
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.number == 0
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
                signal.raise_signal(number)
            assert stop.number == signal.SIGTERM and exits == []
            signal.raise_signal(signal.SIGINT)
            assert exits == [130]
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")            # torchrun sends a second one itself
            signal.raise_signal(signal.SIGINT)
            assert exits == [130]
            assert stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("batch, processes, accum, words", [
    (6, 4, 1, r"batch_size \(6\) .*\(4 x 1\)"), (8, 3, 2, r"batch_size \(8\) .*\(3 x 2\)"),
    (8, 4, 2, r"batch_size \(8\) is one image .* 4 processes .* 2 steps"), (8, 2, 2, None)])
def test_a_batch_must_divide_among_processes_and_steps(batch, processes, accum, words):
    """Each part has at least two images, unless SyncBatchNorm is used on GPUs."""
    cfg = Config(batch_size=batch, accum_steps=accum)
    world = SimpleNamespace(size=processes, device=torch.device("cpu"))
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        train.check_batch(cfg, world)
    world.device = torch.device("cuda")
    if batch == 8 and processes == 4:
        train.check_batch(cfg, world)
        with pytest.raises(UserError, match=words):
            train.check_batch(dataclasses.replace(cfg, sync_bn=False), world)


def test_a_dry_run_leaves_no_file(config, tmp_path, capsys):
    train.main(["--cfg", config, "iters=0", f"out={tmp_path / 'run'}"])
    printed = capsys.readouterr().out
    assert printed.count("\nstep ") == 4 and " GiB per process; 10,000 iterations take " in printed
    line = fails(capsys, "--cfg", config, "iters=0", f"out={tmp_path / 'run'}", "batch_size=6", "accum_steps=4")
    assert "batch_size (6)" in line and "accum_steps" in line
    assert not (tmp_path / "run").exists()


def test_skipped_steps_are_counted_and_printed(config, tmp_path, capsys, monkeypatch):
    """Also if every step between two log entries is skipped."""
    monkeypatch.setattr(train.Learner, "gradient", with_faults(GRADIENT, {0: "loss", 1: "gradient"}))
    train.main(["--cfg", config, f"out={tmp_path / 'run'}"])
    log, out = logged(tmp_path / "run"), capsys.readouterr().out
    assert [entry["iter"] for entry in log if "lr" in entry] == [2, 4] and "loss" not in log[2] and "loss" in log[4]
    assert (tmp_path / "run" / "curves.png").exists()
    assert re.search(r"\niteration 2/4: lr .* 2 skipped, (.*\n)*iteration 4/4: loss .* 2 skipped, ", out)
    assert re.search(rf"\n2 of 4 .*{tmp_path / 'run' / 'log.jsonl'}\ndone: ", out)


def test_a_diverged_network_stops_after_20_skipped_steps(config, tmp_path, capsys):
    folder = tmp_path / "run"
    argv = ["--cfg", config, "lr=1e6", "warmup_iters=0", "iters=100", "save_every=6", "eval_every=100", f"out={folder}"]
    line = fails(capsys, *argv)
    assert "iteration 21: 20 steps" in line and "(loss nan" in line
    assert str(folder / "log.jsonl") in line and f"iteration 18, in {folder}" in line
    log = logged(folder)
    assert [entry["iter"] for entry in log if "skipped" in entry] == list(range(2, 22))
    content = torch.load(folder / "last.pt", weights_only=True)
    assert content["progress"]["iteration"] == 18 and content["progress"]["in_a_row"] == 17
    assert all(t.isfinite().all() for t in content["model"].values())
    again = fails(capsys, *argv, "--resume")               # the count is in the checkpoint
    assert again == line and logged(folder) == log


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_a_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MAX_SKIPPED", 3)
    monkeypatch.setattr(train.Learner, "gradient", with_faults(GRADIENT, dict.fromkeys((0, 1, 3, 4, 6, 7), "gradient")))
    train.main(["--cfg", config, f"out={tmp_path / 'run'}", "iters=8", "save_every=100", "eval_every=100"])
    found = progress(tmp_path / "run")
    assert (found["skipped"], found["in_a_row"]) == (6, 2)


def test_out_of_memory_is_one_line(config, tmp_path, capsys, monkeypatch):
    for allocate in (lambda: torch.empty(2 ** 60, dtype=torch.uint8), lambda: torch.empty(2 ** 40, 2 ** 40, 2 ** 40),
                     lambda: cv2.resize(np.zeros((1, 1, 3), np.uint8), (2 ** 30, 2 ** 30))):
        with pytest.raises((RuntimeError, cv2.error)) as error:
            allocate()
        assert in_one_line(error.value, "fewer workers") == "out of memory: try fewer workers"
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB ...")
    monkeypatch.setattr(train.Learner, "gradient", before_step(0, lambda: throw(error)))
    assert "checkpointing=true" in fails(capsys, "--cfg", config, f"out={tmp_path / 'run'}")


def test_every_process_has_its_own_gpu(monkeypatch, capsys):
    """Also with `--device cuda`; SLURM's tasks without torchrun are named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert pick_device("") == pick_device("cuda") == torch.device("cuda", rank)
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.undo()
    for name in ("cuda", "cuda:1", "gpu"):                 # without a GPU
        with pytest.raises(UserError, match=f"device '{name}' "):
            pick_device(name)
    monkeypatch.setenv("RANK", "3")                        # a single process is the main one
    for size in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert World("cpu").main and World("cpu").gather(5) == [5]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert World("cpu").size == 1 and "SLURM_NTASKS" in capsys.readouterr().err


def test_files_of_no_run_are_left_alone(config, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("# by hand")
    for how in ((), ("--resume",)):
        assert str(tmp_path) in fails(capsys, "--cfg", config, f"out={tmp_path}", *how)
    assert (tmp_path / "config.yaml").read_text() == "# by hand" and not (tmp_path / MARK).exists()
