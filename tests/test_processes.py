"""Several processes: the same numbers as one, and none of them left waiting when another stops, fails or is killed."""

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny import Processes, assert_same_run, free_port, gradients, logged, make_config, wait_until, with_faults, worst

import evaluate
import train
from config import load_config
from datasets import open_split
from engine import processes
from errors import UserError
from engine.processes import World, pick_device
from engine.run import Run
from evaluate import evaluate_split
from files.atomic import LEFTOVERS
from model import build_model

ROOT = Path(__file__).parent.parent
ENDLESS = ("iters=3000", "save_every=2", "eval_every=3000", "log_every=3000")        # longer than anybody waits


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    return make_config(tmp_path_factory.mktemp("tiny"))


def begun(folder: Path):
    return lambda: (folder / "previous.pt").exists()       # four iterations are done


def saved_iteration(folder: Path) -> int:
    return torch.load(folder / "last.pt", weights_only=True)["progress"]["iteration"]


# ---- the same numbers

def compare_gradients(config: str):
    world, cfg = World(), load_config(config)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        alone = gradients(cfg, 1, dtype)
        print(dtype, [worst(gradients(cfg, 1, dtype, world), alone),                 # 2 processes x 2 images
                      worst(gradients(cfg, 2, dtype), alone)], "bound", bound)       # 2 steps x 2 images
        assert worst(gradients(cfg, 1, dtype, world), alone) < bound
        one_by_one = gradients(cfg, 1, dtype, loss_group=1)
        assert worst(gradients(cfg, 2, dtype, world, loss_group=1), one_by_one) < bound   # 2 processes x 2 steps x 1
    world.close()


def test_two_processes_have_the_gradient_of_one(config, tmp_path):
    with Processes(tmp_path, compare_gradients, config, count=2) as both:
        assert both.wait() == [0, 0], both.said(0) + both.said(1)


def gather(group, value) -> list:
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def compare_evaluations(config: str):
    world, cfg = World(), load_config(config)
    torch.manual_seed(1)
    model, pairs = build_model(cfg, cfg.classes), open_split(cfg, "val")
    assert len(pairs) == 7                                 # divides by neither 2 nor 3, nor by the batch
    alone = evaluate_split(model, pairs, 3, (1.0, 1.5), cfg.flip_pairs, batch=2)
    assert alone[0].sum() == sum(label.size for _, label in map(pairs.read, range(7))) and len(alone[1]) == 7
    for size in (2, 3):
        group = dist.new_group(list(range(size)), backend="gloo")
        if world.rank < size:
            some = SimpleNamespace(rank=world.rank, size=size, gather=functools.partial(gather, group))
            shared = evaluate_split(model, pairs, 3, (1.0, 1.5), cfg.flip_pairs, 2, some)
            assert torch.equal(shared[0], alone[0]) and shared[1] == alone[1]
    world.close()


def test_shared_evaluation_is_exact(config, tmp_path):
    with Processes(tmp_path, compare_evaluations, config, count=3) as three:
        assert three.wait() == [0, 0, 0], three.said(0) + three.said(1) + three.said(2)


def work_on(program, argv: list[str], roots: list[str]):
    """As on machines of their own: each process has its own copy of the data."""
    program([*argv, f"data_root={roots[int(os.environ['RANK'])]}"])


def test_processes_that_see_other_photos_stop(config, tmp_path):
    """One copy was unpacked in half; or it is in another order, which the number of photos would not tell."""
    for name in ("half", "other"):
        shutil.copytree(Path(config).parent / "data", tmp_path / name)
    for kind in ("images", "labels"):
        (tmp_path / "half" / kind / "val/3.png").unlink()
        (tmp_path / "other" / kind / "train/3.png").rename(tmp_path / "other" / kind / "train/a.png")
    mine = str(Path(config).parent / "data")
    train.main(["--cfg", config, f"out={tmp_path / 'whole'}"])
    training, evaluation = ["--cfg", config, f"out={tmp_path / 'run'}"], ["--checkpoint", str(tmp_path / "whole")]
    for program, argv, other, split in ((train.main, training, "half", "val split"),
                                        (train.main, training, "other", "train split"),
                                        (train.main, [*training, "iters=0"], "other", "data set"),
                                        (evaluate.main, evaluation, "half", "val split")):
        with Processes(tmp_path, work_on, program, argv, [mine, str(tmp_path / other)], count=2) as both:
            assert both.wait() == [1, 1]
            said = both.said(0) + both.said(1)
            assert said.count("error") == 1 and f"error: process 1 sees another {split} than process 0: all mach" in said


def train_with_a_fault(argv: list[str]):
    """The loss of one process is not finite, in one step."""
    if os.environ["RANK"] == "1":
        train.forward_backward = with_faults(train.forward_backward, {1: "image"})
    train.main(argv)


def test_a_step_is_skipped_by_all_or_none(config, tmp_path):
    """... and BatchNorm's statistics, which the processes have each of their own, stay clean; nothing else is said."""
    folder = tmp_path / "run"
    with Processes(tmp_path, train_with_a_fault, ["--cfg", config, f"out={folder}"], count=2) as both:
        assert both.wait() == [0, 0], both.said(0) + both.said(1)
        assert "Warning" not in both.said(0) + both.said(1)
    content = torch.load(folder / "last.pt", weights_only=True)
    assert content["progress"]["skipped"] == 1 and content["progress"]["iteration"] == 4
    assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {3}
    assert all(t.isfinite().all() for t in content["model"].values())
    skipped, = [entry for entry in logged(folder) if "skipped" in entry]
    assert skipped["iter"] == 2 and len(skipped["batch"]) == 4           # of both processes


# ---- asked to stop

def test_one_process_asked_to_stop_stops_both_and_one_alone_goes_on(config, tmp_path):
    folder = tmp_path / "run"
    argv = ["--cfg", config, f"out={folder}", "workers=1"]
    with Processes(tmp_path, train.main, [*argv, *ENDLESS], count=2) as both:
        wait_until(begun(folder))
        both.send(signal.SIGTERM, 1)
        assert both.wait() == [143, 143]
        line = re.search(r"stopped by SIGTERM after iteration (\d+); \S+last.pt is saved, --resume", both.said(0))
        assert line and "stopped" not in both.said(1) and "Traceback" not in both.said(0) + both.said(1)
        assert saved_iteration(folder) == int(line[1])
    with Processes(tmp_path, train.main, [*argv, *ENDLESS, "--resume"]) as one:
        wait_until(lambda: saved_iteration(folder) > int(line[1]))
        assert f"going on from {folder / 'last.pt'}, iteration {line[1]}" in one.said()


def test_a_signal_to_the_whole_group_leaves_the_loaders_to_the_main_process(config, tmp_path):
    folder = tmp_path / "run"
    with Processes(tmp_path, train.main, ["--cfg", config, f"out={folder}", "workers=2", *ENDLESS]) as one:
        wait_until(begun(folder))
        os.killpg(one.all[0].pid, signal.SIGTERM)
        assert one.wait() == [143]
        assert "stopped by SIGTERM after iteration" in one.said() and "error" not in one.said()


def test_one_run_at_a_time_in_a_folder(config, tmp_path):
    folder = tmp_path / "run"
    argv = ["--cfg", config, f"out={folder}", "workers=1", *ENDLESS]
    (tmp_path / "other").mkdir()
    with Processes(tmp_path, train.main, argv) as one:
        wait_until(begun(folder))
        with Processes(tmp_path / "other", train.main, [*argv, "--resume"]) as other:
            assert other.wait() == [1]
            assert f"error: {folder}: another process is training in this folder" in other.said()
        one.send(signal.SIGKILL)
        one.wait()
        before = saved_iteration(folder)
        with Processes(tmp_path / "other", train.main, [*argv, "--resume"]) as other:    # the lock went with its owner
            wait_until(lambda: saved_iteration(folder) > before)


def open_at_once(config: str, folder: str, begin: float, count: int):
    """Be there at the same moments as another process that does the same, in one new folder after the other."""
    cfg, world = load_config(config), World()
    runs = [Run(dataclasses.replace(cfg, out=f"{folder}/{n}"), world) for n in range(count)]
    for n, run in enumerate(runs):
        while time.time() < begin + 0.1 * n:
            pass
        try:
            run.open(False)
            run.kept = (run.folder / f".last-{os.getpid():08x}.part.pt").open("w")     # being written
            print("in", n, flush=True)
        except UserError as error:
            assert "another process is training in this folder" in str(error), error
    Path(f"{folder}.{os.getpid()}.done").touch()
    wait_until(lambda: len(list(Path(folder).parent.glob("*.done"))) == 2)     # a lock lasts as long as its run


def test_of_two_that_begin_at_once_in_a_new_folder_one_gets_in(config, tmp_path):
    outputs, count = [tmp_path / name for name in ("one", "other")], 60
    for output in outputs:
        output.mkdir()
    args = (open_at_once, config, str(tmp_path / "runs"), time.time() + 4, count)
    with Processes(outputs[0], *args) as one, Processes(outputs[1], *args) as other:
        assert one.wait() == other.wait() == [0], one.said() + other.said()
        found = [{int(n) for n in re.findall(r"in (\d+)", process.said())} for process in (one, other)]
    assert found[0] | found[1] == set(range(count)) and not found[0] & found[1]
    for n in range(count):                                 # nothing of it was taken for litter
        assert len(list((tmp_path / "runs" / str(n)).glob(LEFTOVERS))) == 1


def train_when_told(argv: list[str], go: Path):
    real = train.forward_backward

    def step(*args):
        print("in the step", args[6])
        wait_until(go.exists)
        return real(*args)

    train.forward_backward = step
    train.main(argv)


@pytest.mark.parametrize("torchrun", (False, True))
def test_a_second_signal_leaves_at_once(config, tmp_path, torchrun):
    """... but for torchrun, which doubles a Ctrl-C."""
    folder = tmp_path / "run"
    argv = ["--cfg", config, f"out={folder}", "save_every=1000", "eval_every=1000", "iters=1000"]
    environment = {"TORCHELASTIC_RUN_ID": "none"} if torchrun else {}
    go = tmp_path / "go"
    with Processes(tmp_path, train_when_told, argv, go, **environment) as one:
        wait_until(lambda: "in the step 0" in one.said())
        one.send(signal.SIGINT)
        wait_until(lambda: "\nSIGINT: saving and stopping after this step; a second signal leaves" in one.said())
        one.send(signal.SIGTERM)
        if torchrun:
            go.touch()
        assert one.wait() == [130 if torchrun else 143]
        assert ("leaving at once, without saving: a second signal, SIGTERM" in one.said()) != torchrun
        assert (folder / "last.pt").exists() == torchrun


# ---- coming together

def come_together(fails_at: str = ""):
    """What every program does first; the process of rank `fails_at` cannot."""
    def pick_device(name):
        if os.environ.get("RANK") == fails_at:
            raise UserError("no GPU is left")
        return torch.device("cpu")

    processes.pick_device = pick_device
    if fails_at:
        processes.SOON, processes.PATIENCE = 3.0, timedelta(seconds=8)
    processes.run_together(lambda world: print(f"rank {world.rank} of {world.size}"))


def test_a_process_that_cannot_even_begin_says_so_and_is_missed(tmp_path):
    """As the last of three on a machine with two GPUs."""
    with Processes(tmp_path, come_together, "2", count=3) as three:
        assert three.wait(60)[2] == 1
        assert three.said(2) == "error in process 2: no GPU is left\n"
        assert three.wait(60)[0] == 1
        assert "process 0 is waiting for process 2 of 3\n" in three.said(0)
        assert "error: waited 0:00:08 for process 2 of 3, in vain\n" in three.said(0)
        assert "Traceback" not in three.said(0) + three.said(1)


def test_a_main_process_that_does_not_come_is_missed(tmp_path):
    with Processes(tmp_path, come_together, "0", count=2) as both:
        assert both.wait(60) == [1, 1]
        assert both.said(0) == "error: no GPU is left\n"
        assert "process 1 is waiting for process 0 of 2\n" in both.said(1)
        assert "error in process 1: cannot reach the main process at 127.0.0.1:" in both.said(1)
        assert "Traceback (most" not in both.said(1)


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with Processes(tmp_path, come_together, **place) as one:
            assert one.wait(60) == [1]
            assert f"error: cannot listen at 127.0.0.1:{port} (" in one.said() and "Traceback" not in one.said()


def test_processes_that_come_say_nothing(tmp_path):
    with Processes(tmp_path, come_together, count=3) as three:
        assert three.wait(60) == [0, 0, 0]
        assert [three.said(rank) for rank in range(3)] == [f"rank {rank} of 3\n" for rank in range(3)]


@pytest.mark.parametrize("environment, words", (
    ({"WORLD_SIZE": "4"}, "error: WORLD_SIZE is 4, RANK is not set, LOCAL_RANK is not set, MASTER_ADDR is not set, "
                          "MASTER_PORT is not set: start several processes with torchrun, and one alone without"),
    ({"WORLD_SIZE": "x", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
     "error: WORLD_SIZE is x: "),
    ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
     "error in process 2: WORLD_SIZE is 2, RANK is 2: "),
    ({"WORLD_SIZE": "1"}, "rank 0 of 1\n"),
    ({"WORLD_SIZE": ""}, "rank 0 of 1\n"),
    ({"RANK": "3"}, "rank 0 of 1\n"),                      # it is the main process of a run, whatever else was meant
))
def test_an_environment_that_is_not_torchruns(tmp_path, environment, words):
    with Processes(tmp_path, come_together, **environment) as one:
        assert one.wait(60) == [int(words.startswith("error"))]
        assert one.said().startswith(words) and one.said().count("\n") == 1


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    """Also where one is asked for by `--device cuda`; a number means that GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert pick_device("") == pick_device("cuda") == torch.device("cuda", rank)
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="it is number 3 on its machine, which has 2 GPUs: --nproc_per_node"):
        pick_device("cuda")
    monkeypatch.undo()
    for name in ("cuda", "cuda:1", "gpu"):                 # a CPU is no GPU
        with pytest.raises(UserError, match=f"device '{name}' cannot be used: "):
            pick_device(name)


# ---- another system

ELSEWHERE = """
import os, signal, sys
import cv2, numpy, PIL.Image, torch.distributed, torch.utils.data, tqdm, yaml        # these are there on Windows
del signal.SIGCHLD, signal.SIGKILL, os.fork, os.killpg, os.setsid, os.sched_setaffinity
sys.modules.update(fcntl=None, resource=None, pwd=None, grp=None)
sys.platform = "win32"
import predict
sys.exit(predict.main(sys.argv[1:]))
"""


def test_predicting_needs_nothing_that_windows_lacks(config, tmp_path):
    train.main(["--cfg", config, "iters=1", "warmup_iters=0", f"out={tmp_path / 'run'}"])
    photo = next((Path(config).parent / "data" / "images" / "val").iterdir())
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, photo, "--run", tmp_path / "run", "--out", tmp_path / "out",
                           "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "labels" / photo.name).exists()


# ---- one fails: the others say so and go, at once, without a traceback and without torchrun's help

@pytest.mark.parametrize("victim", (0, 1))
def test_a_killed_process_takes_the_other_along(config, tmp_path, victim):
    folder = tmp_path / "run"
    with Processes(tmp_path, train.main, ["--cfg", config, f"out={folder}", *ENDLESS], count=2) as both:
        wait_until(begun(folder))
        both.send(signal.SIGKILL, victim)
        codes = both.wait()
        assert codes[victim] == -9 and codes[1 - victim] == 1
        assert "Traceback" not in both.said(0) + both.said(1)
        if victim == 1:
            assert "error: another process of this run has ended" in both.said(0)
        assert saved_iteration(folder) >= 2                # what was lost: the iterations since then


def get_stuck(argv: list[str]):
    """The main process waits as on a GPU, where nothing tells it that another one has ended."""
    def step(*args):
        print("in the step")
        time.sleep(600)

    processes.GRACE = 1.0
    train.forward_backward = step
    train.main(argv)


@pytest.mark.parametrize("victim", (0, 1))
def test_a_killed_process_takes_one_along_that_does_not_notice(config, tmp_path, victim):
    with Processes(tmp_path, get_stuck, ["--cfg", config, f"out={tmp_path / 'run'}"], count=2) as both:
        wait_until(lambda: all("in the step" in both.said(rank) for rank in (0, 1)))
        both.send(signal.SIGKILL, victim)
        codes = both.wait(60)
        assert codes[victim] == -9 and codes[1 - victim] == 1
        assert "error: another process of this run has ended" in both.said(0) or victim == 0
        assert "Traceback" not in both.said(0) + both.said(1)


def test_a_bad_file_is_named_once(config, tmp_path):
    folder, photo = tmp_path / "run", tmp_path / "data" / "images" / "train" / "7.png"
    make_config(tmp_path)
    photo.write_bytes(photo.read_bytes()[:200])
    argv = ["--cfg", config, f"out={folder}", f"data_root={tmp_path / 'data'}", "workers=1", *ENDLESS]
    with Processes(tmp_path, train.main, argv, count=2) as both:
        assert both.wait() == [1, 1]
        said = both.said(0) + both.said(1)
        assert said.count(f"{photo}: damaged or cut off") == 1 and "Traceback" not in said


def fail_as_1(argv: list[str], other: list[str]):
    """The second process has another configuration, or a bug."""
    def step(*args):
        raise RuntimeError("a bug")

    if os.environ["RANK"] == "1":
        argv += other
        train.forward_backward = train.forward_backward if other else step
    train.main(argv)


def test_a_fault_of_one_process_before_training_is_told_by_the_main_one(config, tmp_path):
    argv = ["--cfg", config, f"out={tmp_path / 'run'}"]
    with Processes(tmp_path, fail_as_1, argv, [f"data_root={tmp_path / 'none'}"], count=2) as both:
        assert both.wait() == [1, 1]
        assert f"error: data_root {tmp_path / 'none'}: no such" in both.said(0) and "(process 1)" in both.said(0)
        assert "error" not in both.said(1) and "Traceback" not in both.said(0) + both.said(1)


def test_a_fault_of_all_is_told_once(config, tmp_path):
    with Processes(tmp_path, train.main, ["--cfg", config, "batch_size=7"], count=2) as both:
        assert both.wait() == [1, 1]
        assert (both.said(0) + both.said(1)).count("batch_size (7) must be a multiple") == 1
    with Processes(tmp_path, train.main, ["--cfg", config, "lr=fast"], count=2) as both:
        assert both.wait() == [1, 1]
        assert (both.said(0) + both.said(1)).count("lr must be a number") == 1


@pytest.mark.parametrize("iters", (0, 4))                   # the dry run, too
def test_one_image_for_each_process_and_step_is_refused_at_the_start(config, tmp_path, iters):
    argv = ["--cfg", config, f"out={tmp_path / 'run'}", f"iters={iters}", "accum_steps=2"]
    with Processes(tmp_path, train.main, argv, count=2) as both:
        assert both.wait() == [1, 1]
        said = both.said(0) + both.said(1)
        assert said.startswith("error: batch_size (4) is one image for each of 2 processes and 2 steps: ")
        assert said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_bug_in_one_process_keeps_its_traceback(config, tmp_path):
    with Processes(tmp_path, fail_as_1, ["--cfg", config, f"out={tmp_path / 'run'}"], [], count=2) as both:
        assert both.wait() == [1, 1]
        assert "Traceback" in both.said(1) and "RuntimeError: a bug" in both.said(1)
        assert "error: another process of this run has ended" in both.said(0) and "Traceback" not in both.said(0)


def test_a_killed_loader_is_one_line(config, tmp_path):
    folder = tmp_path / "run"
    with Processes(tmp_path, train.main, ["--cfg", config, f"out={folder}", "workers=2", *ENDLESS]) as one:
        wait_until(begun(folder))
        pid = one.all[0].pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        assert one.wait() == [1]
        assert "error: a loader process was ended by the system" in one.said() and "Traceback" not in one.said()


# ---- torchrun itself

class Agents:
    """torchrun on `nodes` machines, as far as it can tell, with a total of two workers; gone with the block."""

    def __init__(self, folder: Path, nodes: int, argv: list[str]):
        port, self.outputs = free_port(), [folder / f"agent{node}.txt" for node in range(nodes)]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node",
                   str(2 // nodes), "--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                   f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", ROOT / "train.py", *argv]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.all = [subprocess.Popen(command, stdout=output.open("w"), stderr=subprocess.STDOUT, env=environment,
                                     start_new_session=True) for output in self.outputs]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            print(self.said())                             # pytest shows it
        for agent in self.all:
            if agent.poll() is None:
                agent.send_signal(signal.SIGSTOP)          # it must not start another worker now
                for pid in [*self.workers(agent), agent.pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)       # loaders end with their worker
                agent.wait()

    def workers(self, agent: subprocess.Popen) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]

    def wait(self, seconds: float = 300) -> list[int]:
        end = time.monotonic() + seconds
        return [agent.wait(max(0.0, end - time.monotonic())) for agent in self.all]

    def said(self) -> str:
        return "".join(f"\n---- {path.name}\n{path.read_text()}" for path in self.outputs)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")


@needs_proc
@pytest.mark.parametrize("nodes", (1, 2))
def test_torchrun_restarts_after_a_killed_worker_and_goes_on(config, tmp_path, nodes):
    """One machine with two workers, two with one each: the result is that of two processes nothing happened to."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    argv = ["--cfg", config, "iters=40", "save_every=2", "eval_every=20"]
    with Agents(tmp_path, nodes, [*argv, f"out={folder}"]) as agents:
        wait_until(begun(folder))
        os.kill(agents.workers(agents.all[-1])[-1], signal.SIGKILL)
        killed_at = saved_iteration(folder)
        assert agents.wait() == [0] * nodes
        said = agents.said()
        assert killed_at < 40 and said.count("going on from") == 1
        assert int(re.search(rf"going on from {folder / 'last.pt'}, iteration (\d+)", said)[1]) >= killed_at
        assert said.count("done: best mIoU") == 1
    with Processes(tmp_path, train.main, [*argv, f"out={whole}"], count=2) as both:
        assert both.wait() == [0, 0]
    assert_same_run(folder, whole)
    assert len(logged(folder)) == 20 + 2


@needs_proc
def test_torchrun_does_not_go_on_with_a_run_that_was_there(config, tmp_path):
    """It starts a process that was refused again, which is not a restart of that run."""
    folder = tmp_path / "run"
    with Agents(tmp_path, 1, ["--cfg", config, f"out={folder}", "iters=2"]) as agents:
        assert agents.wait() == [0]
    before = (folder / "last.pt").read_bytes(), (folder / "log.jsonl").read_bytes()
    with Agents(tmp_path, 1, ["--cfg", config, f"out={folder}", "iters=2"]) as agents:
        assert agents.wait() == [1]
        assert agents.said().count("already holds a run") == 3 and "going on from" not in agents.said()
    assert before == ((folder / "last.pt").read_bytes(), (folder / "log.jsonl").read_bytes())


def meet_and_count():
    """Rank 1 comes late: what the attempt before left of it is there already."""
    if os.environ["RANK"] == "1":
        time.sleep(1)
    world = World()
    print("together", world.sum([1.0]))
    os._exit(0)                                            # as if killed: nothing is taken back


def test_processes_do_not_take_dead_ones_for_each_other(tmp_path):
    """torchrun keeps one store for all attempts; in the first, one process came and died before the other did."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("process of rank 1", str(store.add("processes", 1)))
    for _ in range(3):
        with Processes(tmp_path, meet_and_count, count=2, MASTER_PORT=str(store.port),
                       TORCHELASTIC_USE_AGENT_STORE="True") as both:
            assert both.wait(60) == [0, 0], both.said(0) + both.said(1)
            assert "together [2.0]" in both.said(0) and "together [2.0]" in both.said(1)


@needs_proc
def test_ctrl_c_under_torchrun_saves(config, tmp_path):
    folder = tmp_path / "run"
    with Agents(tmp_path, 1, ["--cfg", config, f"out={folder}", *ENDLESS]) as agents:
        wait_until(begun(folder))
        agents.all[0].send_signal(signal.SIGINT)
        assert agents.wait(60) != [0]                      # torchrun's own code for it
        line = re.search(r"stopped by SIGINT after iteration (\d+); \S+last.pt is saved", agents.said())
        assert line and saved_iteration(folder) == int(line[1])
