"""A page to look at: drop a photo on it, see its parts. The standard library's HTTP server and a trained network.

    python examples/serve.py --run runs/demo              # then open http://127.0.0.1:8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000/parse

    GET  /         the page (serve.html), which needs nothing else, so that it works offline
    POST /parse    the photo as the body: JPEG, PNG, WebP or BMP. Back comes JSON: width, height, seconds, labels (the
                   indexed PNG that predict.py writes, base64), classes (name, colour, share of the pixels)

There is nothing else to reach, and nothing is stored. One photo at a time is decoded and parsed, a few more wait; what
cannot be served is said in a line of text with a status of its own. It is meant for one machine or a trusted network:
there is no encryption and no password, and it listens on 127.0.0.1 unless --host says otherwise.
"""

import argparse
import base64
import contextlib
import io
import json
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import user_path  # noqa: E402
from errors import UserError, in_one_line, run_program  # noqa: E402
from files.images import PHOTO_FORMATS, as_shown  # noqa: E402
from predict import Parser  # noqa: E402
from viz import pictures  # noqa: E402

MAX_BYTES = 32 << 20
MAX_PIXELS = 64 << 20
WAITING = 8                                                # photos that may wait for their turn
SILENCE = 30                                               # seconds that a request may keep the server waiting
PAGE = Path(__file__).with_name("serve.html")
POLICY = ("default-src 'none'; connect-src 'self'; img-src blob: data:; media-src blob:; style-src 'unsafe-inline'; "
          "script-src 'unsafe-inline'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'")


class Refusal(Exception):
    """A request that is not served: the status and a line of text for whoever sent it."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], parser: Parser):
        super().__init__(address, Handler)
        self.parser, self.page = parser, PAGE.read_bytes()
        self.worker = ThreadPoolExecutor(1)                # one photo at a time, the others queue
        self.places = threading.BoundedSemaphore(1 + WAITING)

    def parse(self, body: bytes) -> dict:
        """What /parse answers."""
        begun = time.perf_counter()
        image = decode(body)
        label, parser = self.parser.parse(image), self.parser
        counts = np.bincount(label.ravel(), minlength=len(parser.classes))
        file = io.BytesIO()
        pictures.palette_picture(label, parser.palette).save(file, "PNG")
        return {"width": label.shape[1], "height": label.shape[0], "seconds": round(time.perf_counter() - begun, 3),
                "labels": base64.b64encode(file.getvalue()).decode(),
                "classes": [{"name": name, "colour": "#{:02x}{:02x}{:02x}".format(*colour), "share": count / label.size}
                            for name, colour, count in zip(parser.classes, parser.palette, counts.tolist())]}


def decode(body: bytes) -> np.ndarray:
    """The photo (H, W, 3) in the bytes of a file."""
    try:
        with Image.open(io.BytesIO(body), formats=PHOTO_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Refusal(413, f"{image.width} x {image.height} pixels: at most {MAX_PIXELS / 1e6:.0f} million are "
                                   "taken, make it smaller first")
            return as_shown(image)
    except (Refusal, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Refusal(413, "far too many pixels, make it smaller first") from None
    except Image.UnidentifiedImageError:
        raise Refusal(415, f"not a photo in {', '.join(PHOTO_FORMATS)} format") from None
    except Exception as error:                             # damaged files make the decoders raise a dozen kinds
        raise Refusal(422, f"the photo is damaged or cut off ({error})") from None


class Handler(BaseHTTPRequestHandler):
    """A request. Every answer ends its connection, so that nothing of a refused one is taken for the next."""

    protocol_version = default_request_version = "HTTP/1.1"         # a status line also for what is no HTTP
    server_version, sys_version = "SCHNet", ""
    timeout = SILENCE

    def do_GET(self):
        self.serve(lambda: ("text/html; charset=utf-8", self.server.page), "/")

    def do_POST(self):
        self.serve(self.parsed, "/parse")

    def refuse_method(self):
        self.serve(None, "")

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = refuse_method

    def serve(self, answer, path: str):
        """`answer` -> (content type, body), if it is `path` that is asked for."""
        try:
            asked = self.path.partition("?")[0]
            if asked not in ("/", "/parse"):
                raise Refusal(404, "there is only the page, GET /, and POST /parse")
            if asked != path:
                raise Refusal(405, f"{self.command} {asked}: only GET / and POST /parse are served")
            status, (kind, body) = 200, answer()
        except Refusal as refusal:
            status, kind, body = refusal.status, "text/plain; charset=utf-8", f"{refusal}\n".encode()
        except Exception as error:
            line = in_one_line(error, "a smaller photo")
            if not line:
                traceback.print_exc()
            line = line or "a fault of the server, which its terminal shows"
            status, kind, body = 500, "text/plain; charset=utf-8", f"{line}\n".encode()
        self.reply(status, kind, body)

    def parsed(self) -> tuple[str, bytes]:
        body = self.body()
        if not self.server.places.acquire(blocking=False):
            raise Refusal(503, f"{WAITING} photos are waiting already: try again in a moment")
        try:
            found = self.server.worker.submit(self.server.parse, body).result()
        finally:
            self.server.places.release()
        self.log_message("%d x %d, %.2f s", found["width"], found["height"], found["seconds"])
        return "application/json", json.dumps(found).encode()

    def body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "the request must say its Content-Length and send the photo in one piece")
        if int(length) > MAX_BYTES:
            raise Refusal(413, f"{int(length) / 2 ** 20:.1f} MiB: at most {MAX_BYTES >> 20} are taken, make it smaller first")
        if self.headers.get_content_maintype() == "multipart":
            raise Refusal(415, "send the photo itself as the body, not a form: curl --data-binary @photo.jpg")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise Refusal(408, f"nothing more came for {SILENCE} seconds") from None
        if len(body) < int(length):
            raise Refusal(400, f"cut off: {len(body)} of {length} bytes came")
        if not body:
            raise Refusal(400, "an empty request: the photo is its body")
        return body

    def reply(self, status: int, kind: str, body: bytes):
        if status != 200:
            self.log_message("%s %s: %d, %s", self.command, self.path, status, body.decode().strip())
        with contextlib.suppress(OSError):                 # whoever asked is gone
            self.send_response_only(status)
            for name, value in {"Content-Type": kind, "Content-Length": len(body), "Connection": "close",
                                "Cache-Control": "no-store", "Content-Security-Policy": POLICY,
                                "X-Content-Type-Options": "nosniff"}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")
            if status != 200:
                self.read_rest()

    def read_rest(self):
        """What a refused request still sends, or its sender would see the connection break instead of the answer."""
        self.connection.settimeout(1)
        for _ in range(256):                               # MiB
            if not self.rfile.read1(1 << 20):
                break

    def send_error(self, code: int, message: str | None = None, explain: str | None = None):
        """What the standard library refuses: requests that are no HTTP, lines too long, unknown methods."""
        self.command, self.path = getattr(self, "command", None) or "-", getattr(self, "path", "-")
        self.reply(code, "text/plain; charset=utf-8", f"{message or self.responses[code][0]}\n".encode())


def main(argv: list[str] | None = None):
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", help="folder of a run, or a checkpoint; the newest run if not given")
    options.add_argument("--map", type=user_path, metavar="FILE", help="merge the classes into others: configs/maps")
    options.add_argument("--tta", action="store_true", help="average over scales and flips")
    options.add_argument("--size", type=int, help="long side of a photo as the network sees it; the run's if not given")
    options.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; the GPU if there is one")
    options.add_argument("--host", default="127.0.0.1", help="0.0.0.0: whoever reaches this machine may use it")
    options.add_argument("--port", type=int, default=8000, help="0: any that is free")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run's config")
    args = options.parse_intermixed_args(argv)
    parser = Parser(args.run, args.tta, args.size, args.device, args.map, args.overrides)
    try:
        server = Server((args.host, args.port), parser)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {args.host} --port {args.port}: {getattr(error, 'strerror', None) or error}") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"{parser.path}: http://{args.host}:{server.server_port} until Ctrl-C", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_program(main, less_memory="a smaller --size, or --device cpu")
