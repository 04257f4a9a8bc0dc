"""UserError, and how every program reports errors and ends.

A user's mistake ends in one line that names the file or key; a bug keeps its traceback. Exit codes: 0 success, 1 error,
130 Ctrl-C, 128 + n stopped by signal n.
"""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import cv2  # noqa: F401
except ImportError as error:
    raise SystemExit(f"error: OpenCV cannot be loaded ({error}). On a machine without a display:\n"
                     "    pip uninstall opencv-python; pip install opencv-python-headless") from None

# How torch, C++ and OpenCV report that memory is exhausted.
NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed", "std::bad_alloc", "Insufficient memory")
NO_GPU_MEMORY = ("CUDA error: out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
GPU_FAULTS = ("busy or unavailable", "no kernel image", "ECC error", "no CUDA-capable device", "CUDA driver version",
              "invalid device ordinal")


class UserError(Exception):
    """An error the user can fix: one line that names the file or key at fault and what to do.

    `everywhere`: raised on every process of a run, so that only the main process prints it.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


@contextlib.contextmanager
def reading(path: str | Path, what: str, hint: str = "") -> Iterator[None]:
    """Turns an OSError raised while reading `path` (a `what`) into a UserError; `hint` follows "no such file"."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a {what}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def in_one_line(error: BaseException, less_memory: str) -> str:
    """The message for an expected error; "" for a bug. `less_memory`: the program's options that save memory."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C; all files written so far are complete"
    import torch.distributed                               # takes seconds: not before it is needed
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_GPU_MEMORY):
        return f"out of GPU memory, here or in another program: try {less_memory}"
    if any(words in str(error) for words in GPU_FAULTS):
        return f"the GPU cannot be used ({str(error).splitlines()[0]})"
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return f"out of memory: try {less_memory}"
    if isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error):
        return f"torch.distributed: {error}"               # the complete message, which can have several lines
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    return ""


class Output:
    """A standard stream that never raises: text is lost when its terminal, pipe or disk is gone; the work is not."""

    def __init__(self, stream: io.TextIOBase):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):     # ValueError: the stream is closed
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def protect_output():
    """Makes sys.stdout and sys.stderr safe to print to: lost streams lose text only, unprintable names are escaped."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:                                    # closed: no other file may get its number
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Output):
            setattr(sys, name, Output(stream))


def exit_code(error: BaseException) -> int:
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def print_error(error: BaseException, less_memory: str, where: str = ""):
    """Prints an expected error as one line, a bug with its traceback. `where`: " in process 1"."""
    line = in_one_line(error, less_memory)
    if line:
        print(f"error{where}: {line}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def run_program(main: Callable[[], int | None], less_memory: str = "a smaller size"):
    """Runs a program of one process and exits with its code."""
    protect_output()
    try:
        sys.exit(main())
    except (Exception, KeyboardInterrupt) as error:
        print_error(error, less_memory)
        sys.exit(exit_code(error))
