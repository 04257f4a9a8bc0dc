"""The official weights: CLIP ViT-B/16, SAM ViT-L and CLIP's vocabulary; by name also SAM ViT-B and ViT-H.

    python download.py                                  # the first three into weights/, 1.6 GB
    python download.py sam_vit_b_01ec64.pth             # SAM ViT-B, for small cards
    python download.py ViT-B-16.pt --dir /data/weights  # one of them, elsewhere
    python download.py --mirror https://example.org/w   # https://example.org/w/ViT-B-16.pt, ...
    python download.py --from /media/stick              # copied from a folder, checked in the same way

A broken download is resumed, by itself and by the next call. A file gets its name only when its size and its SHA-256 are
the official ones. Exit code: 0 all there, 1 a file is missing, 130 stopped with Ctrl-C.
"""

import argparse
import errno
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from config import user_path
from errors import UserError
from files.weights import FILES, OTHER_FILES, FileSpec, sha256

TRIES = 5                                                  # in a row without a mebibyte of progress
TIMEOUT = 30                                               # seconds without a byte
CHUNK = 1 << 20


class ConnectionFault(Exception):
    """The network failed in a way that another try may mend."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    code = 0
    for spec in (*FILES, *OTHER_FILES):
        if spec.name not in (args.names or [spec.name for spec in FILES]):
            continue
        try:
            print(f"{args.dir / spec.name}: {get(spec, args.dir, args.mirror, args.source)}", flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on where it was", file=sys.stderr)
            return 130
    return code


def parse(argv: list[str] | None) -> argparse.Namespace:
    names = [spec.name for spec in (*FILES, *OTHER_FILES)]
    parser = argparse.ArgumentParser(description="Get the official weights, resumed and checked.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"files to get (the first three): {', '.join(names)}")
    parser.add_argument("--dir", type=user_path, default=Path("weights"), help="folder to put them in (weights)")
    parser.add_argument("--mirror", metavar="URL", help="get URL/<name> instead of the official addresses")
    parser.add_argument("--from", dest="source", type=user_path, metavar="DIR", help="copy DIR/<name>, use no network")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in names:
            parser.error(f"unknown file {name!r}, there are {', '.join(names)}")
    if args.mirror and not args.mirror.startswith(("http://", "https://")):
        parser.error("--mirror must begin with http:// or https://; for a folder there is --from")
    if args.mirror and args.source:
        parser.error("--mirror and --from exclude each other")
    return args


def get(spec: FileSpec, folder: Path, mirror: str | None = None, source: Path | None = None) -> str:
    """Put the file into the folder unless it is there; says in a few words what happened."""
    target = folder / spec.name
    part = target.with_name(f"{spec.name}.part")
    try:
        if target.is_dir():
            raise UserError(f"{target}: is a folder, the file cannot take its place")
        if target.exists():
            fault = mismatch(target, spec)
            if fault is None:
                return "already there, SHA-256 checked"
            print(f"{target}: is not the official file ({fault}); getting it again", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        if source is not None:
            copy(source / spec.name, part, spec)
        else:
            download(f"{mirror.rstrip('/')}/{spec.name}" if mirror else spec.url, part, spec)
        os.replace(part, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{part}: the disk is full; {spec.what} needs {spec.bytes:,} bytes") from None
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from None
    return f"{spec.what}, {spec.bytes:,} bytes, SHA-256 checked"


def mismatch(path: Path, spec: FileSpec) -> str | None:
    """What tells a file from the official one; None if nothing does."""
    size = path.stat().st_size
    if size != spec.bytes:
        return f"{size:,} bytes instead of {spec.bytes:,}"
    digest = sha256(path)
    return None if digest == spec.sha256 else f"SHA-256 {digest} instead of {spec.sha256}"


def copy(source: Path, part: Path, spec: FileSpec) -> None:
    fault = mismatch(source, spec)
    if fault is not None:                                  # and what an interrupted download left stays
        raise UserError(f"{source}: is not the official file ({fault})")
    shutil.copyfile(source, part)
    _sync(part)


def download(url: str, part: Path, spec: FileSpec) -> None:
    """Fill `part` until it is the official file; what was there before is used if it is its beginning."""
    resumed = _size(part) > 0
    if _size(part) < spec.bytes:
        _fill(url, part, spec)
    fault = mismatch(part, spec)
    if fault is not None and resumed:                      # an old beginning may have been of something else
        part.unlink()
        _fill(url, part, spec)
        fault = mismatch(part, spec)
    if fault is not None:
        part.unlink()
        raise UserError(f"{url}: serves something else than the official {spec.name} ({fault})")
    _sync(part)


def _fill(url: str, part: Path, spec: FileSpec) -> None:
    failures = 0
    while (before := _size(part)) < spec.bytes:
        free = shutil.disk_usage(part.parent).free
        if free < spec.bytes - before:
            raise UserError(f"{part.parent}: {spec.name} needs {spec.bytes - before:,} bytes more, {free:,} are free")
        try:
            _receive(url, part, spec)
        except ConnectionFault as fault:
            failures = 1 if _size(part) - before >= CHUNK else failures + 1
            if failures == TRIES:
                raise UserError(f"{url}: {fault} ({TRIES} tries); the same command resumes, "
                                "--mirror and --from are ways around a wall") from None
            print(f"{url}: {fault}; trying again in {2**failures} s", file=sys.stderr)
            time.sleep(2**failures)


def _receive(url: str, part: Path, spec: FileSpec) -> None:
    """One request for what is missing."""
    start = _size(part)
    with _open(url, start) as response:
        whole = response.status != 206
        if whole:
            start = 0                                      # the server knows no ranges: from the beginning
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise ConnectionFault("the server sent another range than asked for")
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and start + int(length) != spec.bytes:
            raise UserError(f"{url}: serves {start + int(length):,} bytes, the official {spec.name} has {spec.bytes:,}")
        with open(part, "wb" if whole else "ab") as file, \
                tqdm(total=spec.bytes, initial=start, unit="B", unit_scale=True, desc=spec.name, disable=None) as bar:
            while file.tell() < spec.bytes and (chunk := _read(response, spec.bytes - file.tell())):
                file.write(chunk)
                bar.update(len(chunk))
    if _size(part) < spec.bytes:
        raise ConnectionFault("the connection was cut")


def _open(url: str, start: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "schnet-download", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            raise UserError(f"{url}: serves {start:,} bytes or less, which is not the whole file") from None
        if error.code in (408, 429) or error.code >= 500:
            raise ConnectionFault(f"HTTP {error.code} {error.reason}") from None
        raise UserError(f"{url}: HTTP {error.code} {error.reason}; --mirror and --from are other ways") from None
    except urllib.error.URLError as error:
        raise ConnectionFault(f"no connection ({error.reason})") from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionFault(f"no connection ({error})") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def _read(response: http.client.HTTPResponse, most: int) -> bytes:
    try:
        return response.read1(min(CHUNK, most))            # what is there, so that a stop loses nothing
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionFault(f"the connection broke ({error or type(error).__name__})") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
