"""Threads that read ahead, in training, evaluation and prediction."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.pool import ThreadPool

from errors import UserError

STALLED = 600                                              # seconds


def read_ahead(read: Callable, items: Iterable, threads: int, name: Callable[..., str] = str,
               interrupted: Callable[[], bool] = lambda: False) -> Iterator[tuple]:
    """(item, read(item)) in order; threads decode and augment while the network works. Ends early when `interrupted()`.

    UserError with the `name` of an item that cannot be read for STALLED seconds.
    """
    stopped = False

    def read_unless_stopped(item):
        return None if stopped else read(item)

    with ThreadPool(max(1, threads)) as pool:              # of daemon threads: a process can end while they are blocked
        results = ((item, pool.apply_async(read_unless_stopped, (item,))) for item in items)
        waiting = deque(islice(results, threads + 1))
        try:
            while waiting:
                item, result = waiting[0]
                end = time.monotonic() + STALLED
                while not result.ready():
                    if interrupted():
                        return
                    if time.monotonic() > end:
                        raise UserError(f"{name(item)}: not read within {STALLED} s")
                    result.wait(0.5)
                waiting.popleft()
                waiting.extend(islice(results, 1))
                yield item, result.get()
        finally:                                           # a process that ends while a thread is in OpenCV aborts
            stopped, end = True, time.monotonic() + STALLED / 20         # a blocked thread must not hold it up for long
            for _, result in waiting:
                result.wait(max(0, end - time.monotonic()))
