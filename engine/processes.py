"""The processes of a run: how they find and hear each other, what ends them, what they say then.

One process alone, or those that torchrun starts, on one machine or many: gloo on CPUs, NCCL on GPUs.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.errors import UserError, escape_unprintable, in_one_line


def run_together(work: Callable[["World"], None], device: str = "", less_memory: str = ""):
    """`work` in every process of a program. When one cannot go on it says why, in one line, and all end.

    `device`: as for `pick_device`; `less_memory`: as for `in_one_line`.
    """
    world = None
    escape_unprintable()
    try:
        world = World(device)
        work(world)
    except (Exception, KeyboardInterrupt) as error:
        end_with(error, world, less_memory)
        raise
    finally:
        if world is not None:
            world.close()


LOST = ("another process of this run has ended; why, it said itself, above or in the log of its machine; "
        "what is written is whole")


def _lost_another(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def end_with(error: BaseException, world: "World | None", less_memory: str = ""):
    """Leave with one line, said once, and exit code 1 (Ctrl-C: 130). Returns for a bug in a process that is alone."""
    lost = _lost_another(error)
    reason = f" ({str(error).splitlines()[0]})" if lost and str(error) else ""           # NCCL has other reasons too
    line = LOST + reason if lost else in_one_line(error, less_memory)
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    alike = lost or isinstance(error, KeyboardInterrupt) or getattr(error, "everywhere", False)
    first = world.main if world else os.environ.get("LOCAL_RANK", "0") == "0"
    rank = str(world.rank) if world else os.environ.get("RANK", "0")     # World() itself has failed
    if line and (first or not alike):
        print("error" + ("" if rank == "0" else f" in process {rank}") + f": {line}", file=sys.stderr, flush=True)
    if world is not None and world.size > 1:
        if not line:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)                                     # the orderly way can wait for others that wait for this one
    if line:
        sys.exit(code)


def memory(device: torch.device) -> float:
    """The most memory this process has held, in GiB: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if sys.platform == "win32":                                          # has no such counter in the standard library
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def pick_device(name: str = "") -> torch.device:
    """The device called `name`; "cuda": this process's GPU; "": the same, or the CPU where there is none."""
    if name in ("", "cuda") and torch.cuda.is_available():
        index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if index >= count:
            raise UserError(f"it is number {index + 1} on its machine, which has {count} GPU{'s' * (count > 1)}: "
                            "--nproc_per_node must not be more")
        return torch.device("cuda", index)
    try:
        return torch.empty(0, device=name or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}", everywhere=True) from None


# ----------------------------------------------------------------------------------------------------------- processes

PATIENCE = timedelta(minutes=30)                                         # with processes that do not answer
SOON = 10.0                                                              # seconds, until it is said who is missing
GRACE = 45.0                                                             # seconds, after one has ended
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")          # what torchrun tells a process


def place() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) for one that is alone."""
    said = {key: os.environ.get(key, "") for key in LAUNCHED}
    if said["WORLD_SIZE"] in ("", "1"):
        return 0, 1
    wrong = [key for key, value in said.items() if not (value if key == "MASTER_ADDR" else value.isdecimal())]
    if not wrong and int(said["RANK"]) < int(said["WORLD_SIZE"]):
        return int(said["RANK"]), int(said["WORLD_SIZE"])
    shown = dict.fromkeys(("WORLD_SIZE", *(wrong or ["RANK"])))
    raise UserError(", ".join(f"{key} is {said[key] or 'not set'}" for key in shown) + ": start several processes with "
                    "torchrun, and one alone without WORLD_SIZE in its environment")


class Absent:
    """The processes that this one waits for. After SOON it is said who they are, after PATIENCE it is an error."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.ranks = rank, size, set(range(1, size)) if rank == 0 else {0}
        self.end = time.monotonic() + PATIENCE.total_seconds()
        self.notice = threading.Timer(SOON, self.tell)                   # the main thread may be in C++ for all of it
        self.notice.daemon = True

    def __enter__(self) -> "Absent":
        self.notice.start()
        return self

    def __exit__(self, *_):
        self.notice.cancel()

    def __str__(self) -> str:
        return f"process{'es' * (len(self.ranks) > 1)} {', '.join(map(str, sorted(self.ranks)))} of {self.size}"

    def tell(self):
        print(f"process {self.rank} is waiting for {self}", file=sys.stderr, flush=True)

    def wait(self):
        if time.monotonic() > self.end:
            raise UserError(f"waited {PATIENCE} for {self}, in vain")
        time.sleep(0.02)


def connect(rank: int) -> "dist.Store":
    """The store that all processes see: torchrun has one, else the main process opens it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(address, port, is_master=serves, timeout=PATIENCE, wait_for_workers=False)
    except dist.DistError as error:
        what = "listen at" if serves else "reach the main process at"
        raise UserError(f"cannot {what} {address}:{port} ({str(error).splitlines()[0]})") from None


def meet(rank: int, size: int) -> "dist.Store":
    """The place where the processes of this attempt leave their addresses for each other.

    torchrun gives all attempts of a run the same store: a restarted process would find the address of one that is dead
    and wait for it (pytorch/pytorch#135712). Numbers of restarts do not tell attempts apart, every machine has its own.
    So each process takes a number nobody else ever had, and the main process's becomes the name of the attempt once all
    others have acknowledged it: what dead ones have left cannot do that.
    """
    with Absent(rank, size) as absent:
        store = connect(rank)
        me = str(store.add("processes", 1))
        if rank > 0:
            store.set(f"process of rank {rank}", me)
            while not store.check([f"name for process {me}"]):
                absent.wait()
            name = store.get(f"name for process {me}").decode()
            store.set(f"attempt {name} has rank {rank}", "")
            return dist.PrefixStore(f"attempt {name}", store)
        while absent.ranks:
            for other in absent.ranks:
                if store.check([f"process of rank {other}"]):            # or one of an earlier attempt: look again
                    store.set(f"name for process {store.get(f'process of rank {other}').decode()}", me)
            absent.wait()
            absent.ranks = {other for other in absent.ranks if not store.check([f"attempt {me} has rank {other}"])}
        return dist.PrefixStore(f"attempt {me}", store)


def agent() -> str:
    """What started this process, torchrun or a shell, by a name that nothing else ever had. A restart does not change it."""
    parent = os.getppid()
    stat = Path(f"/proc/{parent}/stat")                                  # Linux: field 22 is when it began
    return f"{socket.gethostname()} {parent} {stat.read_text().rpartition(')')[2].split()[19] if stat.exists() else ''}"


class World:
    """This process among the others: torchrun's environment, or one process alone."""

    def __init__(self, device: str = ""):
        self.rank, self.size = place()
        self.main = self.rank == 0
        self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.control = None                                              # a CPU group for counts, scores and messages
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=meet(self.rank, self.size),
                                    rank=self.rank, world_size=self.size, timeout=PATIENCE)
            self.control = dist.new_group(backend="gloo", timeout=PATIENCE)
            self.ring, self.patient = (dist.new_group(backend="gloo", timeout=timedelta(days=1000)) for _ in range(2))
            self.closing = threading.Event()
            self.watcher = threading.Thread(target=self._watch, daemon=True)
            self.watcher.start()
        # torchrun counts restarts per machine, and not those that another machine caused
        told = self.gather((int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), agent()))
        self.restarted, self.agents = any(count for count, _ in told), {name for _, name in told}

    def say(self, text: str):
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def sum(self, values: list[float]) -> list[float]:
        """The sum over all processes, the same on each. float64, so that counts stay exact."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, value, patient: bool = False) -> list:
        """The values of all processes, by rank. `patient`: some of them may come hours later than others."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self.patient if patient else self.control)
        return found

    def from_main(self, value):
        """The main process's value, on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def agree(self, value, what: str):
        """An error where a process has another value than the main process: they would work on different things."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"process {rank} sees another {what} than process 0: all machines need the same files",
                                everywhere=True)

    @contextlib.contextmanager
    def together(self):
        """Around what can fail on some processes only, and does not communicate: if one fails all stop, and the main
        process says why."""
        mine = None
        try:
            yield
        except UserError as error:
            if self.size == 1:
                raise
            mine = str(error)
        errors = self.gather(mine)
        failed = [rank for rank, error in enumerate(errors) if error]
        if failed:
            everywhere = len(failed) == self.size
            raise UserError(errors[failed[0]] + ("" if everywhere else f" (process {failed[0]})"), everywhere=True)

    def _watch(self):
        """End this process some time after its neighbour has: NCCL would let it wait for the whole of its patience.
        Before that the main thread can find out by itself, which knows more, and finish what it is writing."""
        try:
            dist.recv(torch.zeros(1), (self.rank + 1) % self.size, group=self.ring)  # close() sends it
        except RuntimeError:
            self.closing.wait(GRACE)
            end_with(dist.DistError(), self)

    def close(self):
        """Leave together."""
        if self.size > 1:
            self.closing.set()
            with contextlib.suppress(RuntimeError):                      # it has ended: the watcher deals with that
                dist.send(torch.zeros(1), (self.rank - 1) % self.size, group=self.ring)
            self.watcher.join()
            dist.destroy_process_group()


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the current step; a second one ends the process at once.

    Under torchrun one Ctrl-C can arrive twice, from the terminal and from torchrun: what follows within seconds is
    the same one.
    """

    def __init__(self, main: bool = True):
        self.main, self.number, self.since = main, 0, 0.0
        self.grace = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.number and time.monotonic() - self.since >= self.grace:
            os.write(2, f"\nleaving at once, without saving: a second signal, {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()
            if self.main:
                os.write(2, f"\n{signal.Signals(number).name}: saving and stopping after this step; "
                            "a second signal leaves at once, without saving\n".encode())
