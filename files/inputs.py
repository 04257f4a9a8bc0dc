"""The photos and videos that predict.py's arguments mean: files, folders, patterns; and the names of their results.

The name of a result depends only on its own file and on the folder it was asked for with: photos/a/x.jpg is saved as
"x" if it was named itself or matched by a pattern, as "a/x" if `photos` was given.
"""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from errors import UserError
from files import video
from files.images import ALL_SUFFIXES
from files.atomic import MARK
from files.results import KINDS
from files.walk import walk

VIDEO_SUFFIXES = frozenset(".3g2 .3gp .asf .avi .divx .f4v .flv .m2ts .m2v .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf "
                           ".ogv .ts .vob .webm .wmv".split())
INPUT_SUFFIXES = ALL_SUFFIXES | VIDEO_SUFFIXES | {".heic", ".heif"}      # HEIC is listed to be reported, not ignored
NO_PHOTOS = ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX")  # thumbnails, deleted files


@dataclass(frozen=True)
class Input:
    path: str
    name: str                                              # of its results: a relative path without extension


@dataclass
class Inputs:
    photos: list[Input] = field(default_factory=list)
    videos: list[Input] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)       # one line each: argument or folder, and reason
    ignored: Counter = field(default_factory=Counter)      # what was found and is not parsed, in words


def list_inputs(arguments: list[str]) -> Inputs:
    """Every file once, in order. UserError where two would be saved under one name."""
    inputs, seen = Inputs(), set()
    for text in arguments:
        for path, name in _below(text, inputs) if os.path.isdir(text) else _matching(text, inputs):
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                found = Input(path, os.path.splitext(name)[0])
                (inputs.videos if _is_video(path) else inputs.photos).append(found)
    for found in (inputs.photos, inputs.videos):
        _check_names(found)
    return inputs


def _check_names(inputs: list[Input]):
    taken, twice = {}, []
    for found in inputs:
        other = taken.setdefault(found.name.casefold(), found)           # some file systems ignore case
        twice += [(other, found)] if other is not found else []
    if twice:
        other, found = twice[0]
        more = f" (and {len(twice) - 1} more pairs)" if len(twice) > 1 else ""
        raise UserError(f"{other.path} and {found.path} would both be saved as {found.name}{more}: parse them with an --out "
                        "folder each, or rename one")


def _is_video(path: str) -> bool:
    suffix = _suffix(path)
    return suffix in VIDEO_SUFFIXES or suffix not in INPUT_SUFFIXES and video.is_video(path)


def _matching(text: str, inputs: Inputs) -> Iterator[tuple[str, str]]:
    """(path, name) of the files that an argument means which is not a folder: a path or a pattern."""
    pattern = glob.has_magic(text) and not os.path.lexists(text)
    paths = sorted(glob.glob(text, recursive=True)) if pattern else [text]
    if not paths:
        inputs.missing.append(f"{text}: matches no file")
    for path in paths:
        kind = _kind(path)
        if kind == "missing":
            inputs.missing.append(f"{os.path.normpath(path)}: no such file or folder")
        elif kind or _is_result(path):
            inputs.ignored[kind and f"{kind} ({path})" or "results of predict.py"] += 1
        elif not pattern or _suffix(path) in INPUT_SUFFIXES:
            yield path, os.path.basename(path)
        else:
            inputs.ignored[_suffix(path) or "without extension"] += 1


def _below(folder: str, inputs: Inputs) -> Iterator[tuple[str, str]]:
    """(path, path inside the folder) of the photos and videos below a folder, hidden ones left out."""
    def unreadable(error: OSError):
        inputs.missing.append(f"{error.filename}: {error.strerror}")

    def left_out(path: str) -> bool:
        ours = os.path.exists(os.path.join(path, MARK)) or _is_result(path)
        if ours or os.path.basename(path) in NO_PHOTOS:
            inputs.ignored[f"{path}: {'results of SCHNet' if ours else 'a system folder'}"] += 1
            return True
        return False

    for where, _, names in walk(folder, left_out, unreadable):
        for name in names:
            path = os.path.join(where, name)
            kind = _kind(path)
            if name.startswith("."):
                continue
            if _suffix(name) not in INPUT_SUFFIXES:
                inputs.ignored[_suffix(name) or "without extension"] += 1
            elif kind == "missing":
                inputs.missing.append(f"{path}: a link to {os.readlink(path)}, which does not exist")
            elif kind:
                inputs.ignored[f"{kind} ({path})"] += 1
            else:
                yield path, os.path.relpath(path, folder)


def _kind(path: str) -> str:
    """"" for a regular file, else what it is."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "missing"
    if stat.S_ISREG(mode):
        return ""
    return "folder" if stat.S_ISDIR(mode) else "named pipe" if stat.S_ISFIFO(mode) else "not a regular file"


def _is_result(path: str) -> bool:
    """Whether a file or folder is in a results folder of predict.py."""
    *parents, _ = os.path.join(os.path.realpath(path), "").split(os.sep)
    return any(part in KINDS and os.path.exists(os.path.join(os.sep.join(parents[:n]) or os.sep, MARK))
               for n, part in enumerate(parents))


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
