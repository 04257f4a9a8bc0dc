"""The folders below a folder, linked ones too."""

import os
from collections.abc import Callable, Iterator


def walk(root: str | os.PathLike, left_out: Callable[[str], bool] = lambda path: False,
         onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, str, list[str]]]:
    """(folder, its real path, names of its files) of all folders from `root` down, in order, hidden ones left out.

    Links to folders are followed when the folders themselves are done; each folder comes once, by whatever name, so
    that symlink cycles end. `left_out` is asked about each folder's path; `onerror`: as for `os.walk`.
    """
    waiting, seen = [os.fspath(root)], set()
    while waiting:
        for folder, folders, files in os.walk(waiting.pop(0), onerror=onerror):
            real = os.path.realpath(folder)
            if real in seen or left_out(folder):
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [path for path in (os.path.join(folder, name) for name in folders) if os.path.islink(path)]
            yield folder, real, sorted(files)
