"""The processes of a run, as torchrun starts them: set-up, collectives on Python values, signals, errors.

One process alone needs no launcher. Several are torchrun's (or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT): gloo on CPUs, NCCL on GPUs. Restarts, time-outs and lost processes are torchrun's and
torch.distributed's business, and their messages are shown as they are.
"""

import contextlib
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from errors import UserError, exit_code, in_one_line, print_error, protect_output

TIMEOUT = timedelta(minutes=30)                            # of a collective: a process that does not answer is lost
SIGNALS = (signal.SIGTERM, signal.SIGINT, *(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1")
                                            if hasattr(signal, name)))   # Windows has the first two


def run_together(work: Callable[["World"], None], device: str = "", less_memory: str = "",
                 timeout: timedelta = TIMEOUT):
    """Runs `work` in every process of a program. A process that fails prints why and exits; torchrun ends the others.

    `device`: see `pick_device`; `less_memory`: see `errors.in_one_line`; `timeout`: of every collective.
    """
    protect_output()
    try:
        world = World(device, timeout)
        work(world)
    except (Exception, KeyboardInterrupt) as error:
        rank, size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
        if size == 1:
            print_error(error, less_memory)
            sys.exit(exit_code(error))
        alike = isinstance(error, KeyboardInterrupt) or getattr(error, "everywhere", False)
        if rank == 0 or not alike:                         # otherwise the main process prints it
            print_error(error, less_memory, f" in process {rank}")
        sys.stdout.flush()
        os._exit(exit_code(error))                         # a clean shutdown would wait for the other processes
    if world.size > 1:
        dist.destroy_process_group()


def memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: on the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):                       # not Linux, or not x86
        return platform.processor() or platform.machine()


def pick_device(name: str = "") -> torch.device:
    """The device called `name`; "cuda": this process's GPU; "": the same, or the CPU where there is none."""
    if name in ("", "cuda") and torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", 0))
        if torch.cuda.device_count() == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
            index = 0                                      # one visible GPU per process, as schedulers set it
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False        # fp32 means fp32
        return torch.device("cuda", index)
    try:
        return torch.empty(0, device=name or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}", everywhere=True) from None


class World:
    """This process among the others. Every method but `print0` is a collective: all processes must call it."""

    def __init__(self, device: str = "", timeout: timedelta = TIMEOUT):
        self.size = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = int(os.environ.get("RANK") or 0) if self.size > 1 else 0
        self.main = self.rank == 0
        self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS") or 1) > 1:
            print(f"warning: SLURM_NTASKS is {os.environ['SLURM_NTASKS']}, but this is one process: start several "
                  "with `srun torchrun ...` (docs/training.md)", file=sys.stderr, flush=True)
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", timeout=timeout)

    def print0(self, text: str):
        """Prints on the main process, above its progress bar."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def sum(self, values: list[float]) -> list[float]:
        """The sum over all processes, the same on each; in float64, so that counts stay exact."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value) -> list:
        """The values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """The main process's value, on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def check_same(self, value, what: str):
        """Raises where a process's value differs from the main process's: they would work on different things."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"process {rank} sees a different {what} than process 0: all machines need the same "
                                "files", everywhere=True)

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Around code that may fail on some processes (and has no collective): if one fails, all raise its error."""
        mine = None
        try:
            yield
        except (UserError, OSError) as error:
            mine = in_one_line(error, "")
            if not mine:
                raise
        errors = self.gather(mine)
        failed = [rank for rank, error in enumerate(errors) if error]
        if failed:
            where = "" if len(failed) == self.size else f" (process {failed[0]})"
            raise UserError(errors[failed[0]] + where, everywhere=True)


class Stop(Exception):
    """Raised by StopSignal while the process waits for data."""


class StopSignal:
    """Requests a stop with a save on SIGTERM, SIGINT, SIGHUP or SIGUSR1: after the current step, or while waiting.

    A second Ctrl-C ends the process at once, except under torchrun; other repeated signals do not count, as a launcher
    and a scheduler may both send their own. A signal that was ignored at the start (nohup) stays ignored.
    """

    def __init__(self, main: bool = True):
        self.main, self.number, self.waiting = main, 0, False

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Around a wait for data: a requested stop raises `Stop` in it at once."""
        self.waiting = True
        try:
            if self.number:
                raise Stop
            yield
        finally:
            self.waiting = False

    def _receive(self, number: int, frame):
        if self.number and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            self._print("second Ctrl-C: exiting without saving")
            os._exit(128 + number)
        if not self.number and self.main:
            self._print(f"{signal.Signals(number).name}: saving and stopping after this step")
        self.number = self.number or number
        if self.waiting:
            self.waiting = False
            raise Stop

    def _print(self, text: str):
        with contextlib.suppress(OSError):                 # the terminal may be gone
            os.write(2, f"\n{text}\n".encode())
