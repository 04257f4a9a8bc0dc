"""Atomic writes: a file gets its name only when all of it is on the disk. Folders for results."""

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

LEFTOVERS = f".*-{'[0-9a-f]' * 8}.part*"                   # the temporary names below, left behind by a kill
MARK = ".schnet"                                          # in folders of results: nothing in them is taken for an input


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, renamed to it when the block succeeds and removed otherwise.

    A system error becomes a `UserError`.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}.part{path.suffix}")       # names have 255 bytes
    try:
        yield part
        _sync(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:               # torch hides an OSError in a RuntimeError
        cause = _system_error(error)
        if cause is None:
            raise
        raise UserError(f"{path} could not be written ({cause.strerror or cause})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str):
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def mark_folder(folder: str | Path):
    """Makes a folder for results, and marks it as such; an OSError, before the work, if it is not writable."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        Path(folder, MARK).touch()


def results_folder(folder: str | Path):
    """`mark_folder` of a new or empty folder, or of one that is marked already; UserError for any other."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith(".")) if os.path.isdir(folder) else []
    if names and not os.path.exists(os.path.join(folder, MARK)):
        raise UserError(f"{folder} holds other files ({', '.join(names[:3])}{', ...' * (len(names) > 3)}): results "
                        "need a new or empty folder, choose another --out")
    mark_folder(folder)


def _sync(path: Path):
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):         # some file systems have no fsync
                raise


def _system_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
