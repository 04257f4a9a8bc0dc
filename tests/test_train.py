"""train.py, engine/run.py: schedule, groups, one step; runs that are stopped, killed, changed or failing."""

import contextlib
import copy
import dataclasses
import errno
import itertools
import os
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from tiny import ALONE, assert_same_run, differences, gradients, logged, make_config, with_faults, worst

import inference
import train
from config import Config, load_config
from datasets import BatchOrder, open_split, train_loader
from engine import checkpoint, processes, run
from engine.processes import StopSignal
from errors import UserError, in_one_line
from files import atomic
from model import build_model

GRADIENT = train.Learner.gradient


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)                               # sums must not depend on how busy the machine is
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    return make_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """A run without any incident."""
    train.main(["--cfg", config])
    return Path(load_config(config).out)


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def progress(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)["progress"]


def ends(code: int, *argv: str):
    with pytest.raises(SystemExit) as end:
        train.main(list(argv))
    assert end.value.code == code


def fails(capsys, *argv: str) -> str:
    """The one line of error of a training that ends with one."""
    ends(1, *argv)
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


def before_step(it: int, action):
    """`Learner.gradient` that first calls `action` in iteration `it`."""
    def gradient(self, micro_batches, now):
        if now == it:
            action()
        return GRADIENT(self, micro_batches, now)
    return gradient


def throw(error: BaseException):
    raise error


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


# ---- one step

@pytest.mark.parametrize("dtype, bound", ((torch.float64, 1e-10), (torch.float32, 1e-5)))
def test_accumulation_does_not_change_the_gradient(config, dtype, bound):
    cfg = load_config(config)
    assert worst(gradients(cfg, 2, dtype), gradients(cfg, 1, dtype)) < bound
    other = gradients(dataclasses.replace(cfg, loss_group=4), 1, dtype)
    assert worst(other, gradients(cfg, 1, dtype)) > 1e-4   # thanks to the groups of the loss


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
    """Weights, BatchNorm's statistics, the optimizer's moments; not the learning rate, which changes with `it`."""
    moments = checkpoint.optimizer_state(learner.model, learner.optimizer)
    return copy.deepcopy({"model": dict(learner.model.state_dict()), "moments": moments})


def test_checkpointing_redraws_the_same_dropout(config):
    losses = [learner_of(load_config(config, ["drop_path=0.5", "head_dropout=0.5", f"checkpointing={on}"])).gradient(
        batch_of(0), 0) for on in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("precision, fault", [
    *itertools.product(("fp32", "fp16"), ("image", "loss", "gradient")), ("bf16", "loss")])
def test_a_skipped_step_changes_nothing(config, monkeypatch, precision, fault):
    """... but fp16's scale, which is halved; the next step is the one it would have been."""
    cfg = load_config(config, [f"precision={precision}"])
    monkeypatch.setattr(train.Learner, "gradient", with_faults(GRADIENT, {2: fault}))
    learner, states, scales = learner_of(cfg), [], []
    for it in (0, 1, 2, 3):
        losses, taken = learner.step(batch_of(it), it)
        states.append(state_of(learner))
        scales.append(learner.scaler.get_scale())
        assert taken == (it != 2) and list(losses) == ["loss", "ce", "lovasz", "aux", "grad"]
    assert losses["grad"] < 1e3                            # of unscaled gradients in fp16, too
    assert differences(states[1], states[2]) == [] and differences(states[2], states[3]) != []
    assert scales == ([2.0 ** 16, 2.0 ** 16, 2.0 ** 15, 2.0 ** 15] if precision == "fp16" else [1.0] * 4)
    assert all(t.isfinite().all() for t in states[-1]["model"].values())
    if precision != "fp16":                                # another scale rounds differently
        learner = learner_of(cfg)
        for it in (0, 1, 3):
            learner.step(batch_of(it), it)
        assert differences(states[-1], state_of(learner)) == []


def test_fp16_overflows_are_treated_as_torch_does(config):
    """Compared with the recipe of torch.amp's documentation, which leaves all decisions to the scaler."""
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
        weights = {name: p.detach() for name, p in learner.model.named_parameters()}     # torch keeps BatchNorm's
        found.append([weights, learner.optimizer.state_dict(), learner.scaler.state_dict()])
        assert not own or (not all(taken[:3]) and True in taken and False in taken[taken.index(True):])
    assert differences(*found) == []


@pytest.mark.parametrize("override", [
    "base_size=1", "scale_range=0.01", "scale_range=16", "max_class_share=0", "drop_path=0.999", "srm_ratio=0.01",
    "head_dim=1", "rho_init=1e6", "betas=[0.999999, 0.999999]", "tta_scales=[0.01]"])
def test_a_step_and_a_prediction_at_the_ends_of_the_ranges(config, override):
    cfg = load_config(config, [override])
    learner = learner_of(cfg)
    learner.step([next(train_loader(cfg, open_split(cfg, "train")))], 0)
    inference.predict_labels(learner.model.eval(), [np.zeros((20, 30, 3), np.uint8)], cfg.tta_scales, cfg.flip_pairs)


# ---- stopped, killed, resumed

class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL: the files are those that a kill leaves."""


def kill_and_resume(argv: list[str], folder: Path, at: int):
    """Trains, is killed in the step `at`, and trains to the end."""
    with pytest.MonkeyPatch.context() as patch:
        gradient = train.Learner.gradient                  # may have faults already
        patch.setattr(train.Learner, "gradient",
                      lambda self, batches, it: throw(Killed()) if it == at else gradient(self, batches, it))
        with pytest.raises(Killed):
            train.main([*argv, f"out={folder}"])
    train.main([*argv, f"out={folder}", "--resume"])


def test_a_run_killed_at_any_write_resumes_exactly(config, whole, tmp_path, monkeypatch):
    """Killed before each rename of a file and with half of a checkpoint written; each time one write later."""
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
    for allowed in itertools.count(1):
        budget[0] = allowed
        with contextlib.suppress(Killed):
            train.main(["--cfg", config, f"out={folder}", "--resume"])
            break
    assert allowed > 8
    assert_same_run(folder, whole)


@pytest.mark.parametrize("number, at", zip(processes.SIGNALS, (1, 3, 0, 2)))
def test_a_signal_saves_and_stops(config, whole, tmp_path, capsys, monkeypatch, number, at):
    folder, handlers = tmp_path / "run", [signal.getsignal(number) for number in processes.SIGNALS]
    monkeypatch.setattr(train.Learner, "gradient", before_step(at, lambda: signal.raise_signal(number)))
    ends(128 + number, "--cfg", config, f"out={folder}", "save_every=100")
    assert [signal.getsignal(number) for number in processes.SIGNALS] == handlers
    assert f"{number.name} after iteration {at + 1}; {folder / 'last.pt'}" in capsys.readouterr().out
    monkeypatch.undo()
    train.main(["--cfg", config, "--resume", f"out={folder}"])
    said = capsys.readouterr().out
    assert f"resuming from {folder / 'last.pt'}, iteration {at + 1}; changed: save_every 100 -> 1" in said
    assert_same_run(folder, whole)


def stalls(count: int):
    """A loader that gives `count` batches."""
    def change(load):
        def train_loader(*args):
            yield from itertools.islice(load(*args), count)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(600)
        return train_loader
    return change


def interrupted(evaluate):
    def evaluate_split(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        matrix, images = evaluate(*args, **kwargs)
        assert images == []
        return matrix, images
    return evaluate_split


@pytest.mark.parametrize("name, change, done", (
    ("train_loader", stalls(0), 0), ("train_loader", stalls(2), 2), ("evaluate_split", interrupted, 2)))
def test_a_signal_while_waiting_or_validating(config, whole, tmp_path, capsys, monkeypatch, name, change, done):
    """The run stops at once; resumed, it does the validation first."""
    folder = tmp_path / "run"
    monkeypatch.setattr(train, name, change(getattr(train, name)))
    ends(143, "--cfg", config, f"out={folder}")
    said = f"SIGTERM after iteration {done}; " + (str(folder / "last.pt") if done else "there is no checkpoint")
    assert said in capsys.readouterr().out and (folder / "last.pt").exists() == (done > 0)
    monkeypatch.undo()
    train.main(["--cfg", config, f"out={folder}", "--resume"])
    assert_same_run(folder, whole)


def test_repeated_and_ignored_signals(monkeypatch):
    """Within GRACE seconds they count once, except for a second Ctrl-C without torchrun; later they end the process."""
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.number == 0
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
                signal.raise_signal(number)
            assert stop.number == signal.SIGTERM and exits == []
            signal.raise_signal(signal.SIGINT)
            assert exits == [130]
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")            # torchrun sends its own beside the terminal's
            signal.raise_signal(signal.SIGINT)
            assert exits == [130]
            stop.since -= processes.GRACE
            signal.raise_signal(signal.SIGINT)
            assert exits == [130, 130] and stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("precision, workers", (("bf16", 1), ("fp16", 0)))
def test_frozen_weights_in_half_precision_change_nothing(config, tmp_path, monkeypatch, precision, workers):
    """They are what autocast makes of them at each use; a resumed run has the same bits."""
    argv = ["--cfg", config, "freeze=true", "save_every=2", "eval_every=4", f"precision={precision}",
            f"workers={workers}"]
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


# ---- which folder, which settings

def test_a_folder_with_a_run(config, whole, copied, capsys):
    """It is not overwritten; only --resume removes what a kill left behind; a finished run stays as it is."""
    before, leftover, other = contents(whole), copied / ".last-0123abcd.part.pt", copied / ".photo.part1"
    for path in (leftover, other):
        path.write_bytes(b"")
    line = fails(capsys, "--cfg", config, f"out={copied}")
    assert str(copied) in line and "--resume" in line and "out=FOLDER" in line and leftover.exists()
    assert "no.pth" in fails(capsys, "--cfg", config, f"out={copied}", "sam_weights=no.pth", "--resume")
    assert contents(copied) == before | {other.name: b""}
    train.main(["--cfg", config, "--resume"])
    assert "done: best mIoU" in capsys.readouterr().out and contents(whole) == before


def test_resume_without_a_checkpoint_starts(config, whole, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    train.main(["--cfg", config, "--resume", f"out={tmp_path / 'run'}"])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run'}: no checkpoint" in said and "resuming" not in said
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("how", ((), ("--resume",)))
def test_a_folder_with_only_the_best_network_is_left_alone(config, whole, tmp_path, capsys, how):
    """Kept for prediction, or sent by somebody: there is no optimizer state to resume from."""
    for name in ("best.pt", "log.jsonl", "config.yaml"):
        shutil.copy(whole / name, tmp_path)
    before = contents(tmp_path)
    line = fails(capsys, "--cfg", config, f"out={tmp_path}", *how)
    assert f"{tmp_path} " in line and "best.pt" in line and "last.pt" in line and "out=FOLDER" in line
    assert before.items() <= contents(tmp_path).items()


def test_links_to_an_absent_disk_are_a_run(config, whole, tmp_path, capsys):
    shutil.copy(whole / "log.jsonl", tmp_path)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).symlink_to(tmp_path / "away" / name)
    argv = ["--cfg", config, f"out={tmp_path}"]
    assert "--resume" in fails(capsys, *argv)
    assert f"{tmp_path / 'last.pt'}: no such checkpoint" in fails(capsys, *argv, "--resume")
    assert (tmp_path / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_the_config_of_a_copied_run_does_not_change_the_original(config, whole, copied, tmp_path, capsys):
    line = fails(capsys, "--cfg", str(copied / "config.yaml"), "--resume")
    assert str(copied / "config.yaml") in line and f" {whole} " in line and "out=FOLDER" in line
    train.main(["--cfg", str(copied / "config.yaml"), "--resume", f"out={copied}"])
    train.main(["--cfg", str(copied / "config.yaml"), f"out={tmp_path / 'new'}", "iters=2"])
    train.main(["--cfg", str(whole / "config.yaml"), "--resume"])


def test_a_changed_configuration_is_refused_or_listed(config, copied, capsys):
    line = fails(capsys, "--cfg", config, "--resume", "lr=0.5", "workers=2", f"out={copied}")
    assert f"{copied / 'last.pt'} " in line and "(lr 0.001 -> 0.5)" in line
    assert load_config(copied / "config.yaml").lr == 1e-3
    train.main(["--cfg", config, "--resume", "workers=1", "log_every=7", f"out={copied}"])
    said = capsys.readouterr().out
    assert "workers 0 -> 1" in said and "log_every 2 -> 7" in said


def test_an_edited_log(config, whole, copied, capsys):
    log = copied / "log.jsonl"
    log.write_text(log.read_text().replace("\n", "\n\n"))
    train.main(["--cfg", config, f"out={copied}", "--resume"])
    assert log.read_text() == (whole / "log.jsonl").read_text()
    log.write_text("{\n")
    assert f"{log}: " in fails(capsys, "--cfg", config, f"out={copied}", "--resume")


def test_changed_photos_are_a_warning(config, tmp_path, capsys):
    """As many photos, but others; with another validation set, the best score starts again."""
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
    assert re.search(r"warning: .*training images .*10 before, 10 now", said)
    assert re.search(r"warning: .*validation set .*best.pt", said)
    assert "done: best mIoU 99" not in said and "at iteration 4" in said
    train.main([*argv, "--resume"])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("batch, processes, accum, words", [
    (6, 4, 1, r"batch_size \(6\) .*\(4 x 1\)"), (2, 4, 1, r"batch_size \(2\) .*\(4 x 1\)"),
    (8, 3, 2, r"batch_size \(8\) .*\(3 x 2\)"), (8, 4, 2, r"batch_size \(8\) is one image .* 4 processes .* 2 steps"),
    (1, 1, 1, r"batch_size \(1\) is one image "), (8, 2, 2, None)])
def test_a_batch_must_divide_among_processes_and_steps(batch, processes, accum, words):
    """... into at least two images, except for SyncBatchNorm on GPUs."""
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
    for text in ("iters=0", "iters =0"):
        train.main(["--cfg", config, text, f"out={tmp_path / 'run'}"])
        said = capsys.readouterr().out
        assert said.count("\nstep ") == 4 and "dry run ok" in said and "4 iterations take about" in said
    for override in ("iters=0", "iters=4"):                # refused before there is a folder
        line = fails(capsys, "--cfg", config, override, f"out={tmp_path / 'run'}", "batch_size=6", "accum_steps=4")
        assert "batch_size (6)" in line and "accum_steps" in line
    assert not (tmp_path / "run").exists()
    (tmp_path / "none.yaml").write_text(Path(config).read_text().replace("iters: 4", "iters: 0"))
    assert "none.yaml: iters is 0" in fails(capsys, "--cfg", str(tmp_path / "none.yaml"))


# ---- failures

@pytest.mark.parametrize("scores, failing, best", [
    ((0.2, 0.6, 0.3, 0.4), {2}, 0.4), ((0.2, 0.6, 0.3, 0.4), {1}, 0.6), ((0.2, 0.3, 0.4, 0.6), {4}, None)])
def test_a_network_that_could_not_be_written_is_not_the_best(config, tmp_path, capsys, monkeypatch, scores, failing,
                                                             best):
    """The next validation may write it; at the last one that is an error, and a resumed run validates again."""
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
    found = progress(folder, "best.pt")
    assert found["best_miou"] == best and found["iteration"] == found["best_iteration"]
    assert f"done: best mIoU {100 * best:.2f} at iteration {found['iteration']}, " in capsys.readouterr().out


FAULTS = {1: "loss", 2: "gradient", 4: "image"}            # of six iterations


@pytest.mark.parametrize("precision, at", (("fp32", 5), ("fp16", 2)))
def test_a_run_with_skipped_steps_resumes_exactly(config, tmp_path, monkeypatch, precision, at):
    """Killed after and in skipped steps. Each is in the log with its batch, and none in the mean losses."""
    argv = ["--cfg", config, f"precision={precision}", "iters=6", "save_every=2", "eval_every=6"]
    monkeypatch.setattr(train.Learner, "gradient", with_faults(GRADIENT, FAULTS))
    train.main([*argv, f"out={tmp_path / 'whole'}"])
    kill_and_resume(argv, tmp_path / "killed", at)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
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


def test_skipped_steps_are_counted_and_shown(config, tmp_path, capsys, monkeypatch):
    """Also where there is no other step between two log entries."""
    monkeypatch.setattr(train.Learner, "gradient", with_faults(GRADIENT, {0: "loss", 1: "gradient"}))
    train.main(["--cfg", config, f"out={tmp_path / 'run'}"])
    log, out = logged(tmp_path / "run"), capsys.readouterr().out
    assert [entry["iter"] for entry in log if "lr" in entry] == [2, 4] and "loss" not in log[2] and "loss" in log[4]
    assert (tmp_path / "run" / "curves.png").exists()
    assert re.search(r"\niteration 2/4: lr .* 2 skipped, ", out) and re.search(r"\niteration 4/4: loss .* 2 skipped, ", out)
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
    again = fails(capsys, *argv, "--resume")               # the count continues from the checkpoint
    assert again == line and logged(folder) == log


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_a_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MAX_SKIPPED", 3)
    monkeypatch.setattr(train.Learner, "gradient", with_faults(GRADIENT, dict.fromkeys((0, 1, 3, 4, 6, 7), "gradient")))
    train.main(["--cfg", config, f"out={tmp_path / 'run'}", "iters=8", "save_every=100", "eval_every=100"])
    found = progress(tmp_path / "run")
    assert (found["skipped"], found["in_a_row"]) == (6, 2)


def test_fp16_stops_when_its_scale_falls_below_1(config, tmp_path, capsys, monkeypatch):
    """2^16 can be halved 16 times: the seventeenth skipped step is one too many."""
    monkeypatch.setattr(train.Learner, "gradient", with_faults(GRADIENT, dict.fromkeys(range(2, 40), "gradient")))
    line = fails(capsys, "--cfg", config, "precision=fp16", "iters=40", "save_every=9", "eval_every=40",
                 f"out={tmp_path / 'run'}")
    assert "iteration 19: " in line and "fp16" in line and "(loss 2" in line
    assert f"iteration 18, in {tmp_path / 'run'}" in line


def test_a_transient_disk_error_is_not_damage(config, whole, copied, capsys, monkeypatch):
    """The checkpoint keeps its name, and the run does not fall back to the one before."""
    def failing(path, *args, **more):
        if Path(path).name == "last.pt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return zipfile.ZipFile(path, *args, **more)

    monkeypatch.setattr(checkpoint, "zipfile", SimpleNamespace(ZipFile=failing))
    line = fails(capsys, "--cfg", config, f"out={copied}", "--resume")
    assert f"{copied / 'last.pt'}: " in line and "Input/output error" in line
    monkeypatch.undo()
    assert (copied / "last.pt").read_bytes() == (whole / "last.pt").read_bytes()
    train.main(["--cfg", config, f"out={copied}", "--resume"])
    assert f"resuming from {copied / 'last.pt'}" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ("cut off", "gone"))
def test_a_damaged_checkpoint_is_named_and_the_previous_used(config, whole, copied, capsys, damage):
    content = (copied / "last.pt").read_bytes()
    if damage == "gone":
        (copied / "last.pt").unlink()
        assert "--resume" in fails(capsys, "--cfg", config, f"out={copied}")
    else:
        (copied / "last.pt").write_bytes(content[:len(content) // 2])
    train.main(["--cfg", config, f"out={copied}", "--resume"])
    said = capsys.readouterr().out
    assert f"resuming from {copied / 'previous.pt'}" in said
    assert_same_run(copied, whole)
    if damage == "cut off":
        assert f"warning: {copied / 'last.pt'}: damaged" in said
        assert (copied / "last.damaged").stat().st_size == len(content) // 2
        for name in ("last.pt", "previous.pt"):
            (copied / name).write_bytes(content[:1000])
        line = fails(capsys, "--cfg", config, f"out={copied}", "--resume")
        assert "last.pt" in line and "previous.pt" in line and "out=FOLDER" in line


def test_a_full_disk_is_reported_and_training_continues_while_it_can(config, whole, tmp_path, capsys, monkeypatch):
    """The files are links to /dev/full, where every write fails as on a full disk."""
    folder = tmp_path / "run"

    def fill():
        for name in (".last-x.part.pt", ".log-x.part.jsonl", ".best-x.part.pt"):
            (folder / name).symlink_to("/dev/full")

    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "x")
    monkeypatch.setattr(train.Learner, "gradient", before_step(1, fill))     # the save after iteration 2 fails
    train.main(["--cfg", config, f"out={folder}"])
    said = capsys.readouterr().out
    assert f"warning: {folder / 'log.jsonl'} could not be written (No space left on device" in said
    assert f"iteration 1, in {folder}" in said
    assert_same_run(folder, whole)

    folder = tmp_path / "other"                            # now the last save, which must succeed
    monkeypatch.setattr(train.Learner, "gradient", before_step(3, fill))
    monkeypatch.setattr(atomic.Path, "unlink", lambda *_, **__: None)        # the disk stays full
    line = fails(capsys, "--cfg", config, f"out={folder}")
    assert "could not be written (No space left on device" in line and f"iteration 3, in {folder}" in line
    assert progress(folder)["iteration"] == 3


def test_a_folder_that_cannot_be_written(config, capsys):
    for folder, words in (("/proc/run", "No such file"), (config, "File exists")):
        line = fails(capsys, "--cfg", config, f"out={folder}")
        assert line.startswith("error: out: ") and f"{folder} " in line and words in line


def test_out_of_memory_is_one_line(config, tmp_path, capsys, monkeypatch):
    for allocate in (lambda: torch.empty(2 ** 60, dtype=torch.uint8), lambda: torch.empty(2 ** 40, 2 ** 40, 2 ** 40),
                     lambda: cv2.resize(np.zeros((1, 1, 3), np.uint8), (2 ** 30, 2 ** 30))):
        with pytest.raises((RuntimeError, cv2.error)) as error:
            allocate()
        assert in_one_line(error.value, "fewer workers") == "out of memory: try fewer workers"
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB ...")
    monkeypatch.setattr(train.Learner, "gradient", before_step(0, lambda: throw(error)))
    assert "checkpointing=true" in fails(capsys, "--cfg", config, f"out={tmp_path / 'run'}")


def test_a_bug_keeps_its_traceback(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.Learner, "gradient", before_step(0, lambda: throw(RuntimeError("a bug"))))
    ends(1, "--cfg", config, f"out={tmp_path / 'run'}")
    said = capsys.readouterr().err
    assert "Traceback" in said and "RuntimeError: a bug" in said
