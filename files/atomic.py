"""Files that are written whole or not at all: a name appears only when everything behind it is on the disk."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

LEFTOVERS = f".*-{'[0-9a-f]' * 8}.part*"                     # the temporary names below, which a kill leaves behind


@contextlib.contextmanager
def atomic_write(path: str | Path, keep: Path | None = None) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which takes its place when the block ends well and is gone otherwise.

    With `keep`, the file that was there before goes by that name. What the system refuses is a `UserError`.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}.part{path.suffix}")       # names have 255 bytes
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:               # torch hides an OSError in a RuntimeError
        cause = _system_error(error)
        if cause is None:
            raise
        raise UserError(f"{path} could not be written ({cause.strerror or cause}{_room(path)})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def usable_folder(folder: str | Path) -> Path:
    """The folder, made if it is not there. One that takes no files is a `UserError` now, not after the work."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f"{folder} takes no files ({error.strerror or error})") from None


def write_text(path: str | Path, text: str):
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def _system_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _room(path: Path) -> str:
    with contextlib.suppress(OSError):
        return f", {shutil.disk_usage(path.parent).free / 2 ** 30:.1f} GiB free on that disk"
    return ""
