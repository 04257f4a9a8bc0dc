"""Loader processes and threads. The main process handles signals, detects workers that die or stall, and kills them."""

import atexit
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.pool import ThreadPool

import cv2
from torch.utils.data import DataLoader

from errors import UserError

STALLED = 600                                              # seconds without a batch
LOOK_EVERY = 5                                             # the loader's timeout: then it looks for dead workers


def start_worker(_):
    """For `worker_init_fn`."""
    cv2.setNumThreads(0)                                   # the workers are the parallelism
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):            # sent to entire process groups: the main process
        if hasattr(signal, name):                                        # decides, and kills its workers
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def watched(loader: DataLoader, expected: Iterator[list[str]]) -> Iterator:
    """The loader's batches. A `UserError` that a worker returns is raised here; so is its death, and a stall.

    `expected`: the names of the photos of each batch, for the message about a stall.
    """
    child_died = getattr(signal, "SIGCHLD", None)          # Windows has none
    handler = child_died and signal.getsignal(child_died)
    others, names, workers = set(multiprocessing.active_children()), [], set()
    try:
        try:
            batches = iter(loader)
        finally:                                           # also of those that were started before one could not be
            workers = set(multiprocessing.active_children()) - others
            atexit.register(kill, workers)                 # also where somebody still holds the loader at the end
        if workers and child_died:                         # torch's handler raises wherever the main process is when a
            signal.signal(child_died, handler)             # worker dies; waiting for a batch notices it without it
        while True:
            names = next(expected)
            batch = _next(batches)
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        text = " ".join(f"{type(error).__name__} {error}".split())
        if not loader.num_workers or "Caught" in text:     # an error inside a worker keeps its traceback
            raise
        if "timed out" in text:
            text = f"no training sample for {STALLED} s, waiting for {', '.join(names[:4])}"
        raise UserError(f"loader processes failed: {text}; try fewer workers, which need less memory, shared memory "
                        "(docker run --shm-size=1g) and open files (ulimit -n)") from None
    finally:
        kill(workers)


def _next(batches: Iterator):
    """The next batch. The loader looks for dead workers only when its timeout is over; then the wait may be resumed."""
    end = time.monotonic() + STALLED
    while True:
        try:
            return next(batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out") or time.monotonic() > end:
                raise


def kill(workers: set[multiprocessing.Process]):
    """Ends loader processes at once: Python would send SIGTERM, which they ignore, and wait for them for ever."""
    for worker in workers:
        worker.kill()


def read_ahead(read: Callable, items: Iterable, threads: int, name: Callable[..., str] = str,
               interrupted: Callable[[], bool] = lambda: False) -> Iterator[tuple]:
    """(item, read(item)) in order; threads decode files while the network works. Ends early when `interrupted()`.

    UserError with the `name` of an item that cannot be read for STALLED seconds.
    """
    with ThreadPool(max(1, threads)) as pool:              # of daemon threads: a process can end while they are blocked
        items = iter(items)
        waiting = deque((item, pool.apply_async(read, (item,))) for item in islice(items, threads + 1))
        while waiting:
            item, result = waiting.popleft()
            waiting.extend((item, pool.apply_async(read, (item,))) for item in islice(items, 1))
            end = time.monotonic() + STALLED
            while not result.ready():
                if interrupted():
                    return
                if time.monotonic() > end:
                    raise UserError(f"{name(item)}: not read within {STALLED} s")
                result.wait(0.5)
            yield item, result.get()
