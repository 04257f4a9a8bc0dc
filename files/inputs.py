"""The photos that predict.py's arguments mean: files, folders, patterns; and the names of their results.

The name of a result depends only on its own file and on the folder it was asked for with: photos/a/x.jpg is saved as
"x" if it was named itself or matched by a pattern, as "a/x" if `photos` was given.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from errors import UserError
from files.atomic import MARK
from files.images import ALL_SUFFIXES
from files.walk import walk

INPUT_SUFFIXES = ALL_SUFFIXES | {".heic", ".heif"}         # HEIC is listed to be reported, not ignored
SYSTEM_FOLDERS = ("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information",
                  "__macosx", "lost+found")                            # thumbnails and deleted files, in small letters


@dataclass(frozen=True)
class Input:
    path: str
    name: str                                              # of its results: a relative path without extension


@dataclass
class Inputs:
    photos: list[Input] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)       # one line each: argument or folder, and reason
    ignored: Counter = field(default_factory=Counter)      # what was found and is not parsed, in words


def list_inputs(arguments: list[str]) -> Inputs:
    """Every file once, in order. UserError where two would be saved under one name."""
    inputs, seen = Inputs(), set()
    for text in arguments:
        for path, name in _below(text, inputs) if os.path.isdir(text) else _matching(text, inputs):
            real = os.path.realpath(path)
            if real in seen:
                inputs.ignored["found twice, or a link to one of the others"] += 1
                continue
            seen.add(real)
            inputs.photos.append(Input(path, os.path.splitext(name)[0]))
    taken = {}
    for found in inputs.photos:
        first = taken.setdefault(found.name.casefold(), found)           # some file systems ignore case
        if first is not found:
            raise UserError(f"{first.path} and {found.path} would both be saved as {found.name}: parse them with an "
                            "--out folder each, or rename one")
    return inputs


def _matching(text: str, inputs: Inputs) -> Iterator[tuple[str, str]]:
    """(path, name) of the files that an argument means which is not a folder: a path or a pattern."""
    pattern = glob.has_magic(text) and not os.path.lexists(text)
    paths = sorted(glob.glob(text, recursive=True)) if pattern else [text]
    if not paths:
        inputs.missing.append(f"{text}: matches no file")
    for path in paths:
        if _is_file(path, inputs):
            reason = _left_out(os.path.dirname(path))
            if reason or pattern and _suffix(path) not in INPUT_SUFFIXES:
                inputs.ignored[reason or _suffix(path) or "without extension"] += 1
            else:
                yield path, os.path.basename(path)


def _below(folder: str, inputs: Inputs) -> Iterator[tuple[str, str]]:
    """(path, path inside the folder) of the photos below a folder, hidden ones left out."""
    def left_out(path: str) -> bool:
        reason = _left_out(path)
        inputs.ignored.update([f"{path}: {reason}"] if reason else [])
        return bool(reason)

    for where, _, names in walk(folder, left_out,
                                lambda error: inputs.missing.append(f"{error.filename}: {error.strerror}")):
        for name in [name for name in names if not name.startswith(".")]:
            path = os.path.join(where, name)
            if _suffix(name) not in INPUT_SUFFIXES:
                inputs.ignored[_suffix(name) or "without extension"] += 1
            elif _is_file(path, inputs):
                yield path, os.path.relpath(path, folder)


def _is_file(path: str, inputs: Inputs) -> bool:
    """Whether a path is that of a regular file; anything else is recorded in `inputs`."""
    if os.path.isfile(path):
        return True
    if os.path.exists(path):
        inputs.ignored[f"{'folder' if os.path.isdir(path) else 'named pipe or device'} ({path})"] += 1
    else:
        link = os.path.islink(path) and f"a link to {os.readlink(path)}, which does not exist"
        inputs.missing.append(f"{os.path.normpath(path)}: {link or 'no such file or folder'}")
    return False


def _left_out(folder: str) -> str:
    """Why the files of a folder are not parsed: results of this project, or a system folder, is above them; else ""."""
    folder = os.path.realpath(folder)
    if os.path.basename(folder).casefold() in SYSTEM_FOLDERS:
        return "a system folder"
    if os.path.exists(os.path.join(folder, MARK)):
        return "results of SCHNet"
    parent = os.path.dirname(folder)
    return "" if parent == folder else _left_out(parent)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
