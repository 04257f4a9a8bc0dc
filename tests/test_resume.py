"""engine/run.py: runs that are stopped, killed, resumed or changed, failures, the folder of a run."""

import contextlib
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

import pytest
import torch
from PIL import Image
from tiny import (GRADIENT, Killed, assert_same_run, before_step, differences, ends, fails, kill_and_resume, logged,
                  progress, with_faults)

import train
from config import load_config
from datasets import BatchOrder
from engine import checkpoint, processes
from errors import UserError
from files import atomic

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def uninterrupted(config) -> Path:
    """The folder of an uninterrupted run."""
    train.main(["--cfg", config])
    return Path(load_config(config).out)


@pytest.fixture
def copied(uninterrupted, tmp_path) -> Path:
    return Path(shutil.copytree(uninterrupted, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_killed_at_any_write_resumes_exactly(config, uninterrupted, tmp_path, monkeypatch):
    """Killed at each rename of a file and in the middle of each checkpoint, one after another."""
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
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("number, at", ((signal.SIGINT, 3), (signal.SIGUSR1, 0)))
def test_a_signal_saves_and_stops(config, uninterrupted, tmp_path, capsys, monkeypatch, number, at):
    folder, handlers = tmp_path / "run", [signal.getsignal(number) for number in processes.SIGNALS]
    monkeypatch.setattr(train.Learner, "gradient", before_step(at, lambda: signal.raise_signal(number)))
    ends(128 + number, "--cfg", config, f"out={folder}", "save_every=100")
    assert [signal.getsignal(number) for number in processes.SIGNALS] == handlers
    assert f"{number.name} after iteration {at + 1}; {folder / 'last.pt'}" in capsys.readouterr().out
    monkeypatch.undo()
    train.main(["--cfg", config, "--resume", f"out={folder}"])
    printed = capsys.readouterr().out
    assert f"resuming from {folder / 'last.pt'}, iteration {at + 1}; changed: save_every 100 -> 1" in printed
    assert_same_run(folder, uninterrupted)


def stalls(count: int):
    """A loader that hangs after `count` batches."""
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
    ("train_loader", stalls(0), 0), ("evaluate_split", interrupted, 2)))
def test_a_signal_while_waiting_or_validating(config, uninterrupted, tmp_path, capsys, monkeypatch, name, change, done):
    """The run stops at once; the resumed run repeats the validation."""
    folder = tmp_path / "run"
    monkeypatch.setattr(train, name, change(getattr(train, name)))
    ends(143, "--cfg", config, f"out={folder}")
    printed = f"SIGTERM after iteration {done}; " + (str(folder / "last.pt") if done else "there is no checkpoint")
    assert printed in capsys.readouterr().out and (folder / "last.pt").exists() == (done > 0)
    monkeypatch.undo()
    train.main(["--cfg", config, f"out={folder}", "--resume"])
    assert_same_run(folder, uninterrupted)


def test_frozen_weights_in_half_precision_change_nothing(config, tmp_path, monkeypatch):
    """Autocast would give the same values at each use; a resumed run is bit-identical."""
    argv = ["--cfg", config, "freeze=true", "save_every=2", "eval_every=4", "precision=bf16"]
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


def test_a_run_is_never_overwritten(config, uninterrupted, copied, capsys):
    """Only --resume removes the leftovers of a kill; resuming a finished run changes nothing."""
    before, leftover, other = contents(uninterrupted), copied / ".last-0123abcd.part.pt", copied / ".photo.part1"
    for path in (leftover, other):
        path.write_bytes(b"")
    line = fails(capsys, "--cfg", config, f"out={copied}")
    assert str(copied) in line and "--resume" in line and "out=FOLDER" in line and leftover.exists()
    assert "no.pth" in fails(capsys, "--cfg", config, f"out={copied}", "sam_weights=no.pth", "--resume")
    assert contents(copied) == before | {other.name: b""}
    train.main(["--cfg", config, "--resume"])
    assert "done: best mIoU" in capsys.readouterr().out and contents(uninterrupted) == before


@pytest.mark.parametrize("how, words", (((), "--resume"), (("--resume",), "last.pt: no such checkpoint")))
def test_a_folder_with_only_a_best_checkpoint_is_left_alone(config, uninterrupted, tmp_path, capsys, how, words):
    """It may be kept for prediction; it has no optimizer state to resume from."""
    for name in ("best.pt", "log.jsonl", "config.yaml"):
        shutil.copy(uninterrupted / name, tmp_path)
    before = contents(tmp_path)
    line = fails(capsys, "--cfg", config, f"out={tmp_path}", *how)
    assert str(tmp_path) in line and words in line and "out=FOLDER" in line
    assert before.items() <= contents(tmp_path).items()


def test_links_to_a_missing_disk_count_as_a_run(config, uninterrupted, tmp_path, capsys):
    shutil.copy(uninterrupted / "log.jsonl", tmp_path)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).symlink_to(tmp_path / "away" / name)
    argv = ["--cfg", config, f"out={tmp_path}"]
    assert "--resume" in fails(capsys, *argv)
    assert f"{tmp_path / 'last.pt'}: no such checkpoint" in fails(capsys, *argv, "--resume")
    assert (tmp_path / "log.jsonl").read_bytes() == (uninterrupted / "log.jsonl").read_bytes()


def test_a_changed_configuration_is_refused_or_listed(config, copied, capsys):
    line = fails(capsys, "--cfg", config, "--resume", "lr=0.5", "workers=2", f"out={copied}")
    assert f"{copied / 'last.pt'} " in line and "(lr 0.001 -> 0.5)" in line
    assert load_config(copied / "config.yaml").lr == 1e-3
    train.main(["--cfg", config, "--resume", "workers=1", "log_every=7", f"out={copied}"])
    printed = capsys.readouterr().out
    assert "workers 0 -> 1" in printed and "log_every 2 -> 7" in printed


def test_a_longer_run(config, copied, capsys):
    """`iters` may grow on resume: the learning rate continues on the longer schedule."""
    argv = ["--cfg", config, f"out={copied}", "--resume"]
    train.main([*argv, "iters=6"])
    *_, last = [entry for entry in logged(copied) if "lr" in entry]
    assert last["iter"] == 6 and last["lr"] == pytest.approx(train.get_lr(5, load_config(config, ["iters=6"])))
    line = fails(capsys, *argv, "iters=5")
    assert "iters" in line and "5" in line and "6" in line


def test_a_log_that_cannot_be_read(config, copied, capsys):
    log = copied / "log.jsonl"
    log.write_text(log.read_text()[:-9])                   # cut off
    assert str(log) in fails(capsys, "--cfg", config, f"out={copied}", "--resume") and log.exists()


def test_changed_photos_give_a_warning(config, tmp_path, capsys):
    """Other photos or labels, equal in number; a changed validation set resets the best score."""
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
    Image.new("L", Image.open(data / "labels/val/3.png").size).save(data / "labels/val/3.png")
    capsys.readouterr()
    train.main([*argv, "--resume"])
    printed = capsys.readouterr().out
    assert re.search(r"warning: .*training images .*10 images before, 10 now", printed)
    assert re.search(r"warning: .*validation set .*best.pt", printed)
    assert "done: best mIoU 99" not in printed and "at iteration 4" in printed
    train.main([*argv, "--resume"])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("scores, failing, best", [
    ((0.2, 0.6, 0.3, 0.4), {2}, 0.4), ((0.2, 0.3, 0.4, 0.6), {4}, None)])
def test_a_checkpoint_that_could_not_be_written_is_not_the_best(config, tmp_path, capsys, monkeypatch, scores, failing,
                                                             best):
    """A later validation may write it; at the last one it is an error, and a resumed run validates again."""
    folder, values, written = tmp_path / "run", iter(scores), itertools.count(1)
    real, write = train.scores, checkpoint.write
    monkeypatch.setattr(train, "scores", lambda matrix: real(matrix) | {"miou": next(values)})

    def refuse(path, content):
        if path.name == "best.pt" and next(written) in failing:
            raise UserError(f"{path} could not be written (No space left on device)")
        write(path, content)

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


def test_a_run_with_skipped_steps_resumes_exactly(config, tmp_path, monkeypatch):
    """Killed in a skipped step. Each skipped step is logged with its batch and left out of the mean losses."""
    argv = ["--cfg", config, "precision=fp16", "iters=6", "save_every=2", "eval_every=6"]
    monkeypatch.setattr(train.Learner, "gradient", with_faults(GRADIENT, FAULTS))
    train.main([*argv, f"out={tmp_path / 'uninterrupted'}"])
    kill_and_resume(argv, tmp_path / "killed", 2)
    assert_same_run(tmp_path / "killed", tmp_path / "uninterrupted")
    order, names = iter(BatchOrder(10, load_config(config))), sorted(str(i) for i in range(10))
    batches = [[names[index] for index, _, _ in next(order)] for _ in range(6)]
    log = logged(tmp_path / "uninterrupted")
    assert [entry for entry in log if "skipped" in entry] == [
        {"iter": it + 1, "skipped": "gradient" if kind == "gradient" else "loss", "batch": batches[it]}
        for it, kind in FAULTS.items()]
    trained = [entry for entry in log if "lr" in entry]
    assert [entry["iter"] for entry in trained] == [2, 4, 6] and all(0 < entry["loss"] < 9 for entry in trained)
    content = torch.load(tmp_path / "uninterrupted" / "last.pt", weights_only=True)
    assert content["progress"]["iteration"] == 6 and content["progress"]["skipped"] == 3
    assert all(t.isfinite().all() for t in content["model"].values())


def test_a_transient_disk_error_is_not_damage(config, uninterrupted, copied, capsys, monkeypatch):
    def failing(path, *args, **more):
        if Path(path).name == "last.pt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return zipfile.ZipFile(path, *args, **more)

    monkeypatch.setattr(checkpoint, "zipfile", SimpleNamespace(ZipFile=failing))
    line = fails(capsys, "--cfg", config, f"out={copied}", "--resume")
    assert f"{copied / 'last.pt'}: " in line and "Input/output error" in line
    monkeypatch.undo()
    assert (copied / "last.pt").read_bytes() == (uninterrupted / "last.pt").read_bytes()
    train.main(["--cfg", config, f"out={copied}", "--resume"])
    assert f"resuming from {copied / 'last.pt'}" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named(config, copied, capsys):
    content = (copied / "last.pt").read_bytes()
    (copied / "last.pt").write_bytes(content[:len(content) // 2])
    assert f"{copied / 'last.pt'}: damaged" in fails(capsys, "--cfg", config, f"out={copied}", "--resume")
    (copied / "last.pt").unlink()
    assert f"{copied / 'last.pt'}: no such" in fails(capsys, "--cfg", config, f"out={copied}", "--resume")


def test_a_full_disk_is_reported_and_training_continues(config, uninterrupted, tmp_path, capsys, monkeypatch):
    """The temporary files of last.pt and the log are links to /dev/full."""
    folder = tmp_path / "run"

    def fill():
        for name in (".last-x.part.pt", ".log-x.part.jsonl"):
            (folder / name).symlink_to("/dev/full")

    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "x")
    monkeypatch.setattr(train.Learner, "gradient", before_step(1, fill))     # the save after iteration 2 fails
    train.main(["--cfg", config, f"out={folder}"])
    printed = capsys.readouterr().out
    assert f"warning: {folder / 'log.jsonl'} could not be written (No space left on device" in printed
    assert f"iteration 1, in {folder}" in printed
    assert_same_run(folder, uninterrupted)

    folder = tmp_path / "other"                            # now the last save fails, which is an error
    monkeypatch.setattr(train.Learner, "gradient", GRADIENT)
    monkeypatch.setattr(train.Learner, "gradient", before_step(3, fill))
    monkeypatch.setattr(atomic.Path, "unlink", lambda *_, **__: None)        # the disk stays full
    line = fails(capsys, "--cfg", config, f"out={folder}")
    assert "could not be written (No space left on device" in line and f"iteration 3, in {folder}" in line
    assert progress(folder)["iteration"] == 3


def test_a_folder_that_cannot_be_written(config, capsys):
    for folder, words in (("/proc/run", "No such file"), (config, "File exists")):
        line = fails(capsys, "--cfg", config, f"out={folder}")
        assert line.startswith(f"error: {folder}: ") and words in line
