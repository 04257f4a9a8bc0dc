"""The official weights: CLIP ViT-B/16, SAM ViT-L and CLIP's vocabulary; by name also SAM ViT-B and ViT-H.

    python download.py                                  # the first three into weights/, 1.6 GB
    python download.py sam_vit_b_01ec64.pth             # SAM ViT-B, for small cards
    python download.py bpe_simple_vocab_16e6.txt.gz     # the vocabulary alone, 1.4 MB
    python download.py --dir /data/weights              # elsewhere
    python download.py --mirror https://example.org/w   # https://example.org/w/ViT-B-16.pt, ...
    python download.py --from /media/stick              # copied from a folder, checked in the same way

Each file has several addresses: the authors', then public copies of the same bytes, which the SHA-256 makes safe. HF_ENDPOINT
replaces https://huggingface.co, proxies are taken from the environment. A broken download is resumed, by itself and by the
next call; a file gets its name only when its size and its SHA-256 are the official ones.
"""

import argparse
import contextlib
import errno
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from config import user_path
from errors import UserError, run_program
from files.weights import sha256

TRIES = 3                                                  # in a row without a mebibyte of progress
TIMEOUT = 30                                               # seconds without a byte
CHUNK = 1 << 20
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class FileSpec:
    name: str
    urls: tuple[str, ...]
    bytes: int
    sha256: str
    what: str


def _sam(name: str, size: int, digest: str, what: str) -> FileSpec:
    return FileSpec(name, (f"https://dl.fbaipublicfiles.com/segment_anything/{name}",
                           f"{HUB}/mashb1t/misc/resolve/main/{name}",
                           f"{HUB}/ybelkada/segment-anything/resolve/main/checkpoints/{name}"), size, digest, what)


_CLIP_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
FILES = (                                                  # what the paper's network needs
    FileSpec("ViT-B-16.pt", (f"https://openaipublic.azureedge.net/clip/models/{_CLIP_SHA256}/ViT-B-16.pt",
                             f"{HUB}/jinaai/clip-models/resolve/main/ViT-B-16.pt",
                             f"{HUB}/omlab/OmDet-Turbo_tiny_SWIN_T/resolve/main/ViT-B-16.pt"),
             350_837_078, _CLIP_SHA256, "CLIP ViT-B/16"),
    _sam("sam_vit_l_0b3195.pth", 1_249_524_607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
         "SAM ViT-L"),
    FileSpec("bpe_simple_vocab_16e6.txt.gz",
             ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
              "https://raw.githubusercontent.com/mlfoundations/open_clip/main/src/open_clip/bpe_simple_vocab_16e6.txt.gz"),
             1_356_917, "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a", "CLIP's vocabulary"))
OTHER_FILES = (                                            # available by name
    _sam("sam_vit_b_01ec64.pth", 375_042_383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", "SAM ViT-B"),
    _sam("sam_vit_h_4b8939.pth", 2_564_550_879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
         "SAM ViT-H"))


class ConnectionFault(Exception):
    """A network error worth retrying."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    code = 0
    for spec in (*FILES, *OTHER_FILES):
        if spec.name in (args.names or [spec.name for spec in FILES]):
            try:
                print(f"{args.dir / spec.name}: {get(spec, args.dir, args.mirror, args.source)}", flush=True)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                code = 1
    return code


def parse(argv: list[str] | None) -> argparse.Namespace:
    names = [spec.name for spec in (*FILES, *OTHER_FILES)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"files to get (the first three): {', '.join(names)}")
    parser.add_argument("--dir", type=user_path, default=Path("weights"), help="folder to put them in (weights)")
    parser.add_argument("--mirror", metavar="URL", help="get URL/<name> instead of the known addresses")
    parser.add_argument("--from", dest="source", type=user_path, metavar="DIR", help="copy DIR/<name>, use no network")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in names:
            parser.error(f"unknown file {name!r}, known are {', '.join(names)}")
    if args.mirror and not args.mirror.startswith(("http://", "https://")):
        parser.error("--mirror must begin with http:// or https://; for a folder use --from")
    if args.mirror and args.source:
        parser.error("--mirror and --from exclude each other")
    return args


def get(spec: FileSpec, folder: Path, mirror: str | None = None, source: Path | None = None) -> str:
    """Puts the file into the folder unless it is there; returns a few words about what happened."""
    target = folder / spec.name
    try:
        if target.is_dir():
            raise UserError(f"{target}: is a folder, the file cannot take its place")
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f".{spec.name}.lock"):
            part = folder / f"{spec.name}.part"
            if target.exists():
                fault = mismatch(target, spec)
                if fault is None:
                    return "already there, SHA-256 checked"
                print(f"{target}: is not the official file ({fault}); getting it again", flush=True)
            if source is not None:
                copy(source / spec.name, part, spec)
            else:
                download([f"{mirror.rstrip('/')}/{spec.name}"] if mirror else addresses(spec), part, spec)
            os.replace(part, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{target}.part: the disk is full; {spec.what} needs {spec.bytes:,} bytes") from None
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from None
    return f"{spec.what}, {spec.bytes:,} bytes, SHA-256 checked"


def addresses(spec: FileSpec) -> list[str]:
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    return [url.replace(HUB, endpoint, 1) for url in spec.urls]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other download of this file is under way in this folder; the lock ends with its process."""
    with open(path, "a") as lock:
        if sys.platform != "win32":
            import fcntl
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{path.parent}: another download of this file is under way, waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:                                # a file system without locks
                pass
        yield


def mismatch(path: Path, spec: FileSpec) -> str | None:
    """How a file differs from the official one; None if it does not."""
    size = path.stat().st_size
    if size != spec.bytes:
        return f"{size:,} bytes instead of {spec.bytes:,}"
    digest = sha256(path)
    return None if digest == spec.sha256 else f"SHA-256 {digest} instead of {spec.sha256}"


def copy(source: Path, part: Path, spec: FileSpec):
    fault = mismatch(source, spec)
    if fault is not None:                                  # what an interrupted download left stays
        raise UserError(f"{source}: is not the official file ({fault})")
    shutil.copyfile(source, part)
    _sync(part)


def download(urls: list[str], part: Path, spec: FileSpec):
    """Fills `part` from the first address that serves the official file."""
    failed = []
    for url in urls:
        try:
            _download(url, part, spec)
            return _sync(part)
        except UserError as error:
            failed.append(str(error))
            print(f"{error}", file=sys.stderr, flush=True)
    others = "" if spec.what not in HUB_COPIES else f"; {HUB_COPIES[spec.what]} has the same numbers in another format, which loads too"
    raise UserError(f"{spec.name}: none of its {len(urls)} addresses served it; the same command resumes, --mirror and --from "
                    f"are other ways{others}")


HUB_COPIES = {"CLIP ViT-B/16": "openai/clip-vit-base-patch16 on the Hugging Face hub (clip_weights=FOLDER)",
              "SAM ViT-L": "facebook/sam-vit-large on the Hugging Face hub (sam_weights=FOLDER)"}


def _download(url: str, part: Path, spec: FileSpec):
    """Fills `part` until it is the official file; what was there before is used if it is its beginning."""
    resumed = _size(part) > 0
    if _size(part) < spec.bytes:
        _fill(url, part, spec)
    fault = mismatch(part, spec)
    if fault is not None and resumed:                      # an old beginning may be of something else
        part.unlink()
        _fill(url, part, spec)
        fault = mismatch(part, spec)
    if fault is not None:
        part.unlink()
        raise UserError(f"{url}: serves something else than the official {spec.name} ({fault})")


def _fill(url: str, part: Path, spec: FileSpec):
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
                raise UserError(f"{url}: {fault} ({TRIES} tries)") from None
            print(f"{url}: {fault}; trying again in {2**failures} s", file=sys.stderr)
            time.sleep(2**failures)


def _receive(url: str, part: Path, spec: FileSpec):
    """One request for what is missing."""
    start = _size(part)
    with _open(url, start) as response:
        complete = response.status != 206
        if complete:
            start = 0                                      # the server ignores ranges: from the beginning
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise ConnectionFault("the server sent another range than asked for")
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and start + int(length) != spec.bytes:
            raise UserError(f"{url}: serves {start + int(length):,} bytes, the official {spec.name} has {spec.bytes:,}")
        with open(part, "wb" if complete else "ab") as file, \
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
    proxy = urllib.request.getproxies().get(url.partition(":")[0], "")
    through = f" through the proxy {proxy}" if proxy else ""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            raise UserError(f"{url}: serves {start:,} bytes or less, which is not the complete file") from None
        if error.code in (408, 429) or error.code >= 500:
            raise ConnectionFault(f"HTTP {error.code} {error.reason}{through}") from None
        raise UserError(f"{url}: HTTP {error.code} {' '.join(str(error.reason).split())}{through}") from None
    except urllib.error.URLError as error:
        raise ConnectionFault(f"no connection{through} ({error.reason})") from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionFault(f"no connection{through} ({error})") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def _read(response: http.client.HTTPResponse, most: int) -> bytes:
    try:
        return response.read1(min(CHUNK, most))            # what is there, so that a stop loses nothing
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionFault(f"the connection broke ({error or type(error).__name__})") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sync(path: Path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    run_program(main)
