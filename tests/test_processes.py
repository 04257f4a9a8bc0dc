"""Several processes: the same results as one, and what happens when one is stopped, fails or is killed; torchrun."""

import contextlib
import dataclasses
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import (ALONE, Processes, assert_same_run, gradients, logged, make_config, wait_until, with_faults, worst)

import evaluate
import train
from config import load_config
from datasets import BatchOrder, label_set, open_split
from engine.processes import World, run_together
from engine.run import Run
from errors import UserError
from evaluate import evaluate_split
from files.atomic import LEFTOVERS
from model import build_model

ROOT = Path(__file__).parent.parent
ENDLESS = ("iters=3000", "save_every=2", "eval_every=3000", "log_every=3000")        # longer than any of the tests


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"    # encoder sizes known without tiny.py
    train.main(["--cfg", config, "iters=2", "sam=demo", "clip=demo", f"out={folder}"])
    return folder


def saved_iteration(folder: Path) -> int:
    path = folder / "last.pt"
    return torch.load(path, weights_only=True)["progress"]["iteration"] if path.exists() else 0


def evaluated(config: str, world, batch: int) -> tuple:
    cfg = load_config(config)
    torch.manual_seed(1)
    model = build_model(cfg, cfg.classes)
    return evaluate_split(model, open_split(cfg, "val"), 3, world, (1.0, 1.5), cfg.flip_pairs, batch)


def compare(config: str, world: World):
    cfg = load_config(config)
    alone, one_by_one = gradients(cfg, 1), gradients(cfg, 1, loss_group=1)
    assert worst(gradients(cfg, 1, world=world), alone) < 1e-10                        # 2 processes x 2 images
    assert worst(gradients(cfg, 2, world=world, loss_group=1), one_by_one) < 1e-10     # 2 processes x 2 steps x 1
    (matrix, images), (expected, of_each) = (evaluated(config, where, 3) for where in (world, ALONE))
    assert torch.equal(matrix, expected) and images == of_each


def compare_in_processes(config: str):
    run_together(lambda world: compare(config, world))


def test_two_processes_have_the_gradient_and_the_scores_of_one(config, tmp_path):
    with Processes(tmp_path, compare_in_processes, config, count=2) as both:
        assert both.wait() == [0, 0], both.printed(0) + both.printed(1)


def test_the_shares_of_three_processes_add_up(config):
    """7 images, which neither 3 processes nor batches of 2 divide; the shares are computed one after another here."""
    alone, parts = evaluated(config, ALONE, 2), []
    pairs = open_split(load_config(config), "val")
    assert alone[0].sum() == sum(label.size for _, label in map(pairs.read, range(7))) and len(alone[1]) == 7
    for rank in range(3):
        one = SimpleNamespace(rank=rank, size=3, gather=lambda part: parts.append(part) or parts)
        matrix, images = evaluated(config, one, 2)
    assert torch.equal(matrix, alone[0]) and images == alone[1]


def train_with_a_fault(argv: list[str]):
    """On one process, the loss of one step is not finite."""
    if os.environ["RANK"] == "1":
        train.Learner.gradient = with_faults(train.Learner.gradient, {1: "image"})
    train.main(argv)


def test_a_step_is_skipped_by_all_processes_or_none(config, tmp_path):
    """Each process's own BatchNorm statistics stay finite, and nothing warns."""
    folder = tmp_path / "run"
    with Processes(tmp_path, train_with_a_fault, ["--cfg", config, f"out={folder}"], count=2) as both:
        assert both.wait() == [0, 0], both.printed(0) + both.printed(1)
        assert "Warning" not in both.printed(0) + both.printed(1)
    content = torch.load(folder / "last.pt", weights_only=True)
    assert content["progress"]["skipped"] == 1 and content["progress"]["iteration"] == 4
    assert {int(state["step"]) for state in content["optimizer"].values()} == {3}
    assert all(t.isfinite().all() for t in content["model"].values())
    skipped, = [entry for entry in logged(folder) if "skipped" in entry]
    assert skipped["iter"] == 2 and len(skipped["batch"]) == 4           # of both processes


def test_stop_resume_and_the_lock(config, tmp_path):
    """A signal to one process group stops both. One process resumes; a second is refused."""
    folder, other = tmp_path / "run", tmp_path / "other"
    argv = ["--cfg", config, f"out={folder}", "workers=1", *ENDLESS, "--resume"]
    other.mkdir()
    with Processes(tmp_path, train.main, argv, count=2) as both:
        wait_until(lambda: saved_iteration(folder) >= 4)
        os.killpg(both.all[1].pid, signal.SIGTERM)
        assert both.wait() == [143, 143]
        stopped = int(re.search(r"SIGTERM after iteration (\d+); ", both.printed(0))[1])
        assert "stopped" not in both.printed(1) and "rror" not in both.printed(0) + both.printed(1)
        assert saved_iteration(folder) == stopped
    with Processes(tmp_path, train.main, argv) as one:
        wait_until(lambda: saved_iteration(folder) > stopped)
        assert f"resuming from {folder / 'last.pt'}, iteration {stopped}" in one.printed()
        with Processes(other, train.main, argv) as second:
            assert second.wait() == [1] and f"error: {folder}: another process" in second.printed()
        one.send(signal.SIGKILL)
        assert one.wait() == [-9]
    before = saved_iteration(folder)
    with Processes(other, train.main, argv) as third:      # the lock ended with its owner
        wait_until(lambda: saved_iteration(folder) > before)
        os.killpg(third.all[0].pid, signal.SIGINT)
        assert third.wait() == [130] and "Traceback" not in third.printed()


def open_at_once(config: str, folder: str, begin: float, count: int):
    """Opens new folders one after another, at the same moments as another process."""
    cfg, world = load_config(config), World()
    runs = [Run(dataclasses.replace(cfg, out=f"{folder}/{n}"), world, label_set(cfg)) for n in range(count)]
    for n, run in enumerate(runs):
        while time.time() < begin + 0.1 * n:
            pass
        try:
            run.open(resume=False)
            run.kept = (run.folder / f".last-{os.getpid():08x}.part.pt").open("w")     # being written
            print("in", n, flush=True)
        except UserError as error:
            assert "another process" in str(error), error
    Path(f"{folder}.{os.getpid()}.done").touch()
    wait_until(lambda: len(list(Path(folder).parent.glob("*.done"))) == 2)     # a lock is held until its process ends


def test_of_two_concurrent_starts_in_a_new_folder_one_succeeds(config, tmp_path):
    outputs, count = [tmp_path / name for name in ("one", "other")], 30
    for output in outputs:
        output.mkdir()
    args = (open_at_once, config, str(tmp_path / "runs"), time.time() + 2, count)
    with Processes(outputs[0], *args) as one, Processes(outputs[1], *args) as other:
        assert one.wait() == other.wait() == [0], one.printed() + other.printed()
        found = [{int(n) for n in re.findall(r"in (\d+)", process.printed())} for process in (one, other)]
    assert found[0] | found[1] == set(range(count)) and not found[0] & found[1]
    for n in range(count):                                 # neither removed the other's file as a leftover
        assert len(list((tmp_path / "runs" / str(n)).glob(LEFTOVERS))) == 1


def train_without_output(argv: list[str], kind: str):
    """Output to a full disk, closed as by `>&-`, to a pipe without a reader, or to a closed terminal."""
    if kind == "closed":
        os.close(1), os.close(2)
        sys.stdout = sys.stderr = None
    else:
        reader, end = {"pipe": os.pipe, "terminal": pty.openpty,
                       "full disk": lambda: (os.dup(0), os.open("/dev/full", os.O_WRONLY))}[kind]()
        os.dup2(end, 1), os.dup2(end, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.close(reader)
    train.main(argv)


def test_lost_output_loses_no_work(config, tmp_path):
    with contextlib.ExitStack() as stack:
        runs = {}
        for kind in ("full disk", "closed", "pipe", "terminal"):
            (tmp_path / kind).mkdir()
            argv = ["--cfg", config, f"out={tmp_path / kind / 'run'}", *ENDLESS]
            runs[kind] = stack.enter_context(Processes(tmp_path / kind, train_without_output, argv, kind))
        for kind, run in runs.items():
            folder = tmp_path / kind / "run"
            wait_until(lambda: saved_iteration(folder) >= 4)
            before = saved_iteration(folder)
            run.send(signal.SIGTERM)
            assert run.wait() == [143], kind
            assert saved_iteration(folder) >= before


def work_on(program, argv: list[str], roots: list[str]):
    """Gives each process its own copy of the data, as on separate machines."""
    program([*argv, f"data_root={roots[int(os.environ['RANK'])]}"])


@pytest.mark.parametrize("program, split", ((train.main, "train split"), (evaluate.main, "val split")))
def test_processes_that_see_different_photos_stop(config, trained, tmp_path, program, split):
    """Process 1 has the training photos in another order, or lacks a validation photo."""
    data, copy = Path(config).parent / "data", tmp_path / "copy"
    shutil.copytree(data, copy)
    for kind in ("images", "labels"):
        (copy / kind / "val/3.png").unlink()
        (copy / kind / "train/3.png").rename(copy / kind / "train/a.png")
    argv = ["--cfg", config, f"out={tmp_path / 'run'}"] if program == train.main else ["--checkpoint", str(trained)]
    with Processes(tmp_path, work_on, program, argv, [str(data), str(copy)], count=2) as both:
        assert both.wait() == [1, 1]
        printed = both.printed(0) + both.printed(1)
        assert printed.count("error") == 1 and re.search(f"error.*: process 1 .*{split}", both.printed(0)), printed


def test_a_bad_photo_is_named_once_and_the_run_saved(tmp_path):
    config, folder = make_config(tmp_path), tmp_path / "run"
    index = BatchOrder(10, load_config(config)).index(8)   # first used in the third step
    photo = tmp_path / "data" / "images" / "train" / f"{index}.png"
    photo.write_bytes(photo.read_bytes()[:200])
    with Processes(tmp_path, train.main, ["--cfg", config, "workers=1", *ENDLESS], count=2) as both:
        assert both.wait() == [1, 1]
        printed = both.printed(0) + both.printed(1)
        assert printed.count(f"{photo}: damaged") == 1 and "Traceback" not in printed, printed
        assert f"iteration 2, in {folder}" in printed and saved_iteration(folder) == 2


@pytest.mark.parametrize("mine, words", ((["data_root={none}"], r"error.*: data_root {none}.*\(process 1\)"),
                                         ([], r"error.*: batch_size \(4\) .* 2 processes .* 2 steps")))
def test_a_mistake_is_printed_once(config, tmp_path, mine, words):
    none = str(tmp_path / "none")
    argv = ["--cfg", config, f"out={tmp_path / 'run'}"] + (["accum_steps=2"] if not mine else [])
    roots = [str(Path(config).parent / "data"), none if mine else str(Path(config).parent / "data")]
    with Processes(tmp_path, work_on, train.main, argv, roots, count=2) as both:
        assert both.wait() == [1, 1]
        assert both.printed(0).count("\n") == 1 and re.match(words.replace("{none}", none), both.printed(0))
        assert both.printed(1) == "" and not (tmp_path / "run").exists()


def train_until_a_bug(argv: list[str]):
    def gradient(self, micro_batches, it):
        raise RuntimeError("a bug")

    if os.environ["RANK"] == "1":
        train.Learner.gradient = gradient
    train.main(argv)


@pytest.mark.parametrize("fault, rank", (("kill", 0), ("bug", 1)))
def test_when_one_process_dies_the_other_ends_with_torchs_message(config, tmp_path, fault, rank):
    folder, action = tmp_path / "run", train.main if fault == "kill" else train_until_a_bug
    with Processes(tmp_path, action, ["--cfg", config, f"out={folder}", *ENDLESS], count=2) as both:
        if fault == "kill":
            wait_until(lambda: saved_iteration(folder) >= 4)
            both.send(signal.SIGKILL, rank)
        codes = both.wait()
        assert codes[rank] == (-9 if fault == "kill" else 1) and codes[1 - rank] == 1
        assert f"error in process {1 - rank}: torch.distributed: " in both.printed(1 - rank)
        assert "Traceback" not in both.printed(1 - rank)
        if fault == "bug":
            assert "Traceback" in both.printed(rank) and "RuntimeError: a bug" in both.printed(rank)
        else:
            assert saved_iteration(folder) >= 2 and "error" not in both.printed(rank)


WINDOWS = """
import os, signal, sys, sysconfig
import cv2, numpy, PIL.Image, torch.distributed, torch.utils.data, tqdm, yaml        # all of these exist on Windows
sysconfig.get_config_vars()                                # cached, since its file for Windows is missing here
del signal.SIGCHLD, signal.SIGKILL, signal.SIGHUP, signal.SIGUSR1, os.fork, os.killpg, os.setsid, os.sched_setaffinity
sys.modules.update(fcntl=None, resource=None, pwd=None, grp=None)
sys.platform = "win32"
import predict
sys.exit(predict.main(sys.argv[1:]))
"""


def test_predicting_needs_nothing_that_windows_lacks(config, trained, tmp_path):
    photo = next((Path(config).parent / "data" / "images" / "val").iterdir())
    done = subprocess.run([sys.executable, "-c", WINDOWS, photo, "--run", trained, "--out", tmp_path / "out",
                           "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "labels" / photo.name).exists()


@contextlib.contextmanager
def torchrun(output: Path, argv: list[str]):
    """`torchrun --max-restarts 3 --nproc_per_node 2 train.py`, with tiny.py's sizes; leaves no process behind."""
    program = output.with_name("train_tiny.py")
    program.write_text("import tiny, train\ntrain.main()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3",
               "--nproc_per_node", "2", program, *argv]
    with output.open("w") as file:
        # a new store per start: torch 2.13 leaves old processes' addresses in a shared store
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        agent = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        yield agent
    finally:
        if agent.poll() is None:
            agent.send_signal(signal.SIGSTOP)              # it must not start new workers now
            for pid in [*workers(agent), agent.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            agent.wait()
        print(output.read_text())                          # pytest shows it if the test fails


def workers(agent: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_and_ctrl_c_under_torchrun_change_nothing(config, tmp_path):
    """torchrun restarts the run, Ctrl-C saves it, and resumed again it equals an uninterrupted run."""
    folder, uninterrupted, output = tmp_path / "run", tmp_path / "uninterrupted", tmp_path / "output.txt"
    argv = ["--cfg", config, "iters=20", "save_every=2", "eval_every=20", "log_every=10", "--resume"]

    def resumed() -> list[int]:
        return list(map(int, re.findall(rf"resuming from {folder / 'last.pt'}, iteration (\d+)", output.read_text())))

    with torchrun(output, [*argv, f"out={folder}"]) as agent:
        wait_until(lambda: saved_iteration(folder) >= 4)
        os.kill(workers(agent)[-1], signal.SIGKILL)
        killed = saved_iteration(folder)
        wait_until(resumed, 90)
        assert resumed()[0] >= killed >= 2
        wait_until(lambda: saved_iteration(folder) > resumed()[0])
        agent.send_signal(signal.SIGINT)
        assert agent.wait(60) != 0                         # torchrun's own code
    stopped = int(re.search(r"SIGINT after iteration (\d+); ", output.read_text())[1])
    assert saved_iteration(folder) == stopped < 20
    for out in (folder, uninterrupted):
        with Processes(tmp_path, train.main, [*argv, f"out={out}"], count=2) as both:
            assert both.wait() == [0, 0]
    assert_same_run(folder, uninterrupted)
    assert len(logged(folder)) == 2 + 1
