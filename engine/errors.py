"""The one exception that is no bug, and what is said when a program cannot go on."""

import io
import os
import sys
from collections.abc import Callable

import torch

# What torch, C++ and OpenCV say when there is no memory for what they are asked for.
NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed", "std::bad_alloc", "Insufficient memory")


class UserError(Exception):
    """What a user can mend: the message is one line that names the file or key at fault and what to do.

    `everywhere`: every process of a run has raised it alike, so that it is told once.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


def in_one_line(error: BaseException, less_memory: str) -> str:
    """What a user is told about an error that is no bug; "" for a bug, which keeps its traceback.

    `less_memory`: the options of the program that make it need less.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped; what is written is whole"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: try {less_memory}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return f"out of memory: try {less_memory}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    return ""


def escape_unprintable():
    """Names of files and classes that the terminal's encoding lacks are printed escaped: no run ends on a print."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_program(main: Callable[[], int | None], less_memory: str = "a smaller size"):
    """Run a program to its exit code: 0 all well, 1 an error (one line on stderr), 130 Ctrl-C. A bug has a traceback."""
    escape_unprintable()
    try:
        sys.exit(main())
    except BrokenPipeError:                                # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)                                      # as a shell says it
    except (Exception, KeyboardInterrupt) as error:
        line = in_one_line(error, less_memory)
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
