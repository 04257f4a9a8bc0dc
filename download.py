"""The official weights: CLIP ViT-B/16, SAM ViT-L and CLIP's vocabulary; by name also SAM ViT-B and ViT-H.

    python download.py                                  # the first three into weights/, 1.6 GB
    python download.py sam_vit_b_01ec64.pth             # SAM ViT-B, for small cards
    python download.py bpe_simple_vocab_16e6.txt.gz     # the vocabulary alone, 1.4 MB
    python download.py --dir /data/weights              # elsewhere

Each file has several addresses: the authors', then public copies of the same bytes, which the SHA-256 makes safe.
HF_ENDPOINT replaces https://huggingface.co, proxies are read from the environment. A broken download is resumed, by
itself and by the next call; a file gets its name only when its size and its SHA-256 are the official ones, and files
that are already there, copied from another machine for instance, are checked. The hub's own formats of the same weights
can be used instead: clip_weights=FOLDER with openai/clip-vit-base-patch16, sam_weights=FOLDER with
facebook/sam-vit-large.
"""

import argparse
import http.client
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from config import user_path
from errors import UserError, run_program
from files.weights import sha256

TRIES = 3                                                  # of each address
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
              "https://github.com/mlfoundations/open_clip/raw/main/src/open_clip/bpe_simple_vocab_16e6.txt.gz"),
             1_356_917, "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a", "CLIP's vocabulary"))
OTHER_FILES = (                                            # available by name
    _sam("sam_vit_b_01ec64.pth", 375_042_383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
         "SAM ViT-B"),
    _sam("sam_vit_h_4b8939.pth", 2_564_550_879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
         "SAM ViT-H"))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    code = 0
    for spec in (*FILES, *OTHER_FILES):
        if spec.name in (args.names or [spec.name for spec in FILES]):
            try:
                print(f"{args.dir / spec.name}: {get(spec, args.dir)}", flush=True)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                code = 1
    return code


def parse(argv: list[str] | None) -> argparse.Namespace:
    names = [spec.name for spec in (*FILES, *OTHER_FILES)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"files to get (the first three): {', '.join(names)}")
    parser.add_argument("--dir", type=user_path, default=Path("weights"), help="folder to put them in (weights)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in names:
            parser.error(f"unknown file {name!r}, known are {', '.join(names)}")
    return args


def get(spec: FileSpec, folder: Path) -> str:
    """Puts the file into the folder unless it is there; returns a few words about what happened."""
    target, part = folder / spec.name, folder / f"{spec.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists():
            fault = mismatch(target, spec)
            if fault is None:
                return "already there, SHA-256 checked"
            print(f"{target}: is not the official file ({fault}); getting it again", flush=True)
        download(addresses(spec), part, spec)
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"{error.filename or part}: {error.strerror or error}") from None
    return f"{spec.what}, {spec.bytes:,} bytes, SHA-256 checked"


def addresses(spec: FileSpec) -> list[str]:
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    return [url.replace(HUB, endpoint, 1) for url in spec.urls]


def mismatch(path: Path, spec: FileSpec) -> str | None:
    """How a file differs from the official one; None if it does not."""
    if size(path) != spec.bytes:
        return f"{size(path):,} bytes instead of {spec.bytes:,}"
    digest = sha256(path)
    return None if digest == spec.sha256 else f"SHA-256 {digest} instead of {spec.sha256}"


def download(urls: list[str], part: Path, spec: FileSpec):
    """Fills `part` from one address after another; each continues where the last connection broke."""
    waiting, failures = deque(urls), 0                     # failures in a row without a mebibyte of progress
    old = size(part) > 0                                   # its beginning may be that of another file
    while waiting and failures < TRIES * len(urls):
        url, before = waiting[0], size(part)
        try:
            if before < spec.bytes:
                receive(url, part, spec)
            fault = mismatch(part, spec)
            if fault is None:
                return
            part.unlink()
            fault = f"serves another file than the official {spec.name} ({fault})"
            waiting.rotate(-1) if old else waiting.popleft()
            old = False
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            fault = error                                  # of the network; a full disk is another OSError
            failures = 0 if size(part) - before >= CHUNK else failures + 1
            waiting.rotate(-1)
            time.sleep(1)
        print(f"{url}: {fault}", file=sys.stderr, flush=True)
    raise UserError(f"{spec.name}: none of {len(urls)} addresses served it (see above); run the same command to "
                    "resume, or try another format (--help)")


def receive(url: str, part: Path, spec: FileSpec):
    """One request for the rest of the file."""
    start = size(part)
    headers = {"User-Agent": "schnet-download", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        start = start if response.status == 206 else 0     # some servers ignore ranges: from the beginning
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and start + int(length) != spec.bytes:             # a page in place of the file
            raise ConnectionError(f"serves {start + int(length):,} bytes, the official file has {spec.bytes:,}")
        with open(part, "ab" if start else "wb") as file, \
                tqdm(total=spec.bytes, initial=start, unit="B", unit_scale=True, desc=spec.name, disable=None) as bar:
            while chunk := response.read1(min(CHUNK, spec.bytes - file.tell())):    # what has arrived, to lose nothing
                file.write(chunk)
                bar.update(len(chunk))
    if size(part) < spec.bytes:
        raise ConnectionError("the connection was cut")


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    run_program(main)
