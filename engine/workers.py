"""Loader processes: the main process alone answers signals, notices when one of them dies, and ends them."""

import multiprocessing
import signal
from collections.abc import Iterator

import cv2
from torch.utils.data import DataLoader

from engine.errors import UserError


def start_worker(_):
    """For `worker_init_fn`."""
    cv2.setNumThreads(0)                                   # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # both are sent to all processes: the main one decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)          # what is still done, and ends its workers


def watched(loader: DataLoader) -> Iterator:
    """The loader's batches. A fault that a worker hands over as a value is raised here; so is the death of one."""
    child_died = getattr(signal, "SIGCHLD", None)          # Windows has none
    handler = child_died and signal.getsignal(child_died)
    batches = iter(loader)
    if loader.num_workers and child_died:                  # torch's handler raises in whatever the main process is at
        signal.signal(child_died, handler)                 # when a worker dies; without it, waiting for a batch does
    while True:
        try:
            batch = next(batches)
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            other = isinstance(error, RuntimeError) and "DataLoader worker (" not in str(error)
            if loader.num_workers == 0 or other or str(error).startswith("Caught"):         # a bug keeps its traceback
                raise
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise UserError("a loader process was ended by the system, usually for want of memory (or of shared "
                            f"memory, /dev/shm): try fewer workers ({reason})") from None
        if isinstance(batch, UserError):
            raise batch
        yield batch


def end_workers():
    """End the loader processes that are left; Python's own way is SIGTERM, and it would wait for that to work."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
