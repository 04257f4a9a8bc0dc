"""examples/serve.py and its page: what it answers, what it refuses and in which words, and the page in a real browser."""

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import small_run, wait_until

from predict import Parser
from synthetic.draw import draw
from viz import pictures

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import serve  # noqa: E402


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> Parser:
    return Parser(small_run(tmp_path_factory.mktemp("runs") / "small"))


@pytest.fixture
def server(parser: Parser):
    with serve.Server(("127.0.0.1", 0), parser) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def encoded(image: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def send(server: serve.Server, request: bytes, end: bool = True) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes back. `end`: say that nothing more will be sent."""
    with socket.create_connection(server.server_address, timeout=30) as line:
        with contextlib.suppress(ConnectionError):         # it need not listen to all of it
            line.sendall(request)
            if end:
                line.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: line.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    return int(status.split()[1]), {k.lower(): v for k, v in (header.split(": ", 1) for header in headers)}, body


def post(body: bytes, path: str = "/parse", **headers) -> bytes:
    lines = {"Host": "me", "Content-Length": len(body)} | {name.replace("_", "-"): value for name, value in headers.items()}
    return "\r\n".join([f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in lines.items() if v is not None), "", ""]).encode() + body


PHOTO = draw(1, 0, (96, 64))[0]


# ---- what it answers

def test_the_answer_is_what_predict_writes(server, parser: Parser, tmp_path: Path):
    status, headers, body = send(server, post(encoded(PHOTO)))
    found, label = json.loads(body), parser.parse(PHOTO)
    assert status == 200 and headers["content-type"] == "application/json"
    assert (found["height"], found["width"]) == label.shape == (96, 64)
    pictures.save_palette_png(tmp_path / "label.png", label, parser.palette)
    assert base64.b64decode(found["labels"]) == (tmp_path / "label.png").read_bytes()
    for k, (name, colour) in enumerate(zip(parser.classes, parser.palette)):
        about = found["classes"][k]
        assert about["name"] == name and bytes.fromhex(about["colour"][1:]) == bytes(colour)
        assert about["share"] == pytest.approx((label == k).mean())
    assert len(found["classes"]) == len(parser.classes) and len(np.unique(label)) > 3


def test_a_turned_photo_is_parsed_as_it_is_shown(server, parser: Parser):
    exif = Image.Exif()
    exif[0x0112] = 6
    body = encoded(PHOTO, "JPEG", quality=95, exif=exif)
    found = json.loads(send(server, post(body))[2])
    assert (found["width"], found["height"]) == (96, 64)
    label = np.array(Image.open(io.BytesIO(base64.b64decode(found["labels"]))))
    assert (label == parser.parse(Image.open(io.BytesIO(body)))).all()


def test_the_page_asks_for_nothing_from_elsewhere(server):
    status, headers, body = send(server, b"GET /?x=1 HTTP/1.1\r\nHost: me\r\n\r\n")
    assert status == 200 and body == (ROOT / "examples/serve.html").read_bytes()
    assert headers["content-type"] == "text/html; charset=utf-8" and "default-src 'none'" in headers["content-security-policy"]
    assert b"http" not in body.replace(b"no HTTPS", b"")


def test_one_photo_at_a_time_a_few_wait_more_are_sent_away(server, parser: Parser, monkeypatch):
    inside, most, go, parse = [], [], threading.Event(), Parser.parse

    def watched(self, image):
        inside.append(1)
        most.append(len(inside))
        go.wait(30)
        inside.pop()
        return parse(self, image)

    monkeypatch.setattr(Parser, "parse", watched)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(send(server, post(encoded(PHOTO))))) for _ in range(1 + serve.WAITING)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.places._value == 0)
    status, _, body = send(server, post(encoded(PHOTO)))
    assert status == 503 and b"8 photos are waiting already" in body
    go.set()
    for thread in threads:
        thread.join()
    assert [status for status, _, _ in answers] == [200] * (1 + serve.WAITING) and max(most) == 1
    assert send(server, post(encoded(PHOTO)))[0] == 200


# ---- what it refuses

def bomb(side: int) -> bytes:
    """The first bytes of a PNG of so many pixels each way."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    size = side.to_bytes(4, "big") * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x01\0\0\0\0") + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def get(path: str, method: str = "GET", *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: me", *headers, "", ""]).encode()


JPEG = encoded(PHOTO, "JPEG")
FORM = (b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + JPEG
        + b"\r\n--x--\r\n")
ONLY, BAD = "there is only the page, GET /, and POST /parse", "only GET / and POST /parse are served"
REFUSED = {
    "its own source": (get("/serve.py"), 404, ONLY),
    "a file above": (get("/../config.py"), 404, ONLY),
    "a file above, escaped": (get("/%2e%2e/%2e%2e/etc/passwd"), 404, ONLY),
    "an absolute path": (get("//etc/passwd"), 404, ONLY),
    "another site": (get("http://example.org/"), 404, ONLY),
    "a photo to another path": (post(JPEG, "/parse/"), 404, ONLY),
    "no photo to be got": (get("/parse"), 405, f"GET /parse: {BAD}"),
    "a photo to the page": (post(JPEG, "/"), 405, f"POST /: {BAD}"),
    "PUT": (get("/parse", "PUT"), 405, f"PUT /parse: {BAD}"),
    "DELETE": (get("/", "DELETE"), 405, f"DELETE /: {BAD}"),
    "OPTIONS": (get("/parse", "OPTIONS"), 405, f"OPTIONS /parse: {BAD}"),
    "TRACE": (get("/", "TRACE"), 405, f"TRACE /: {BAD}"),
    "no method at all": (get("/", "BREW"), 501, "Unsupported method ('BREW')"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n", 400, "Bad request"),
    "a long address": (get("/" + "a" * 70_000), 414, "URI Too Long"),
    "many headers": (get("/", "GET", *(f"X-{i}: 1" for i in range(300))), 431, "Too many headers"),
    "no length": (post(JPEG, Content_Length=None), 411, "must say its Content-Length"),
    "a length below zero": (post(JPEG, Content_Length=-5), 411, "must say its Content-Length"),
    "a length that is no number": (post(JPEG, Content_Length="1e3"), 411, "must say its Content-Length"),
    "in pieces": (post(b"0\r\n\r\n", Transfer_Encoding="chunked"), 411, "in one piece"),
    "too many bytes": (post(b"x" * (serve.MAX_BYTES + 1)), 413, "32.0 MiB: at most 32 are taken, make it smaller first"),
    "a length beyond all": (post(JPEG, Content_Length=10 ** 30), 413, "at most 32 are taken"),
    "a form": (post(FORM, Content_Type="multipart/form-data; boundary=x"), 415, "send the photo itself as the body, not a form"),
    "nothing": (post(b""), 400, "an empty request"),
    "half of it": (post(JPEG[:500], Content_Length=len(JPEG)), 400, f"cut off: 500 of {len(JPEG)} bytes came"),
    "a text": (post(b"hello"), 415, "not a photo in JPEG, PNG, WEBP, BMP format"),
    "another format": (post(encoded(PHOTO, "TIFF")), 415, "not a photo in JPEG, PNG, WEBP, BMP format"),
    "half a JPEG": (post(JPEG[:len(JPEG) // 2]), 422, "the photo is damaged or cut off (image file is truncated"),
    "half a PNG": (post(encoded(PHOTO)[:2000]), 422, "the photo is damaged or cut off ("),
    "many pixels": (post(bomb(9_000)), 413, "9000 x 9000 pixels: at most 67 million are taken"),
    "more pixels than a decoder takes": (post(bomb(30_000)), 413, "far too many pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told_in_a_line(server, name: str, capsys):
    request, expected, words = REFUSED[name]
    status, headers, body = send(server, request)
    assert status == expected and words in body.decode()
    assert headers["content-type"] == "text/plain; charset=utf-8" and headers["connection"] == "close"
    assert body.count(b"\n") == 1 and int(headers["content-length"]) == len(body)
    assert send(server, post(JPEG))[0] == 200              # it is alive
    assert "Traceback" not in capsys.readouterr().err


def test_head_has_no_body(server):
    assert send(server, get("/", "HEAD"))[::2] == (405, b"")


def test_who_falls_silent_is_told_so(server, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    status, _, body = send(server, post(JPEG[:500], Content_Length=len(JPEG)), end=False)
    assert status == 408 and b"nothing more came" in body


def test_faults_behind_the_photo_end_no_server(server, monkeypatch, capsys):
    for error, words in ((MemoryError(), b"out of memory: try a smaller photo"), (ValueError("a bug"), b"a fault of the server")):
        def fail(*_, error=error):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(Parser, "parse", fail)
            status, _, body = send(server, post(JPEG))
        assert status == 500 and words in body
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1 and "a bug" in said
    assert send(server, post(JPEG))[0] == 200


def test_who_leaves_early_leaves_no_traceback(server, capsys):
    for _ in range(3):
        line = socket.create_connection(server.server_address)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")        # a reset, at once
        line.sendall(post(JPEG))
        line.close()
    assert send(server, post(JPEG))[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_the_program(parser: Parser):
    """From the command line until Ctrl-C; a port that is taken, and a run that is not there, are a line."""
    command = [sys.executable, str(ROOT / "examples/serve.py"), "--run", str(parser.path.parent)]
    program = subprocess.Popen([*command, "--port", "0", "--map", str(ROOT / "configs/maps/coarse.yaml"), "base_size=96"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    try:
        address = next(word for word in program.stdout.readline().split() if word.startswith("http://127.0.0.1:"))
        with urllib.request.urlopen(address + "/parse", encoded(PHOTO)) as answer:
            assert [about["name"] for about in json.load(answer)["classes"]][:2] == ["background", "hair"]
        taken = subprocess.run([*command, "--port", address.rpartition(":")[2]], capture_output=True, text=True)
        assert taken.returncode == 1 and taken.stderr.count("\n") == 1 and "--port" in taken.stderr
    finally:
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    assert program.returncode == 0 and "64 x 96" in said and "Traceback" not in said


# ---- the page in a browser

def browser_path() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not browser_path():
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser_path(), args=[
            "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server):
    """The page; that it asked nobody else for anything and made no mistake is seen at the end."""
    page = browser.new_page(viewport={"width": 1000, "height": 700}, permissions=["camera"])
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and not message.text.startswith("Failed to load resource")
            and faults.append(message.text))
    address = "http://{}:{}/".format(*server.server_address)
    page.goto(address)
    yield page
    page.close()
    assert not faults and all(url in (address, address + "parse") or url.startswith(("blob:", "data:")) for url in asked)


DROP = """async ([letters, name, type, event]) => {
  const data = new DataTransfer();
  if (letters !== null) data.items.add(new File([Uint8Array.from(atob(letters), c => c.charCodeAt())], name, {type}));
  const made = event === "paste" ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
                                 : new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
  document.getElementById("stage").dispatchEvent(made);
}"""


def drop(page, body: bytes | None, name: str = "figure.png", event: str = "drop"):
    page.evaluate(DROP, [body and base64.b64encode(body).decode(), name, "image/png", event])


def say(page, words: str):
    page.wait_for_function("words => document.getElementById('say').textContent.includes(words)", arg=words)


def at(page, label: np.ndarray, y: int, x: int):
    """The pointer on a pixel of the photo; the class that the page then names."""
    box = page.locator("#overlay").bounding_box()
    page.mouse.move(box["x"] + (x + 0.5) * box["width"] / label.shape[1], box["y"] + (y + 0.5) * box["height"] / label.shape[0])
    return page.locator("#tip").inner_text()


def pixel(page, y: int, x: int) -> list[int]:
    return page.evaluate("([x, y]) => [...document.getElementById('overlay').getContext('2d').getImageData(x, y, 1, 1).data]", [x, y])


def two_points(label: np.ndarray) -> list[tuple[int, int]]:
    """Pixels of the two most frequent classes but the first, which is black."""
    counts = np.bincount(label.ravel())
    counts[0] = 0
    return [tuple(np.argwhere(label == k)[0].tolist()) for k in np.argsort(counts)[-2:]]


def test_a_photo_is_dropped_and_looked_at(page, parser: Parser):
    label = parser.parse(PHOTO)
    drop(page, encoded(PHOTO))
    say(page, "64 x 96, parsed in")
    points = two_points(label)
    for y, x in points:
        assert at(page, label, y, x) == parser.classes[label[y, x]]
        assert pixel(page, y, x) == [*parser.palette[label[y, x]], 255]
        assert page.locator("#classes li.under").inner_text().startswith(parser.classes[label[y, x]])
    shares = page.locator("#classes li").all_inner_texts()
    assert len(shares) == len(np.unique(label))            # the largest first
    order = np.argsort(-np.bincount(label.ravel(), minlength=20), kind="stable")[:len(shares)]
    assert [text.split("\n")[0] for text in shares] == [parser.classes[k] for k in order]
    assert shares[0].split("\n")[-1] == f"{100 * (label == order[0]).mean():.1f} %"
    page.mouse.move(999, 699)
    assert page.locator("#tip").is_hidden()

    (y, x), (v, u) = points
    name = parser.classes[label[y, x]]
    page.get_by_label(name, exact=False).first.uncheck()   # that class off, the other stays, and on again
    assert pixel(page, y, x)[3] == 0 and pixel(page, v, u)[3] == 255
    page.get_by_label(name, exact=False).first.check()
    assert pixel(page, y, x)[3] == 255
    page.locator("#strength").fill("25")
    assert page.locator("#overlay").evaluate("canvas => getComputedStyle(canvas).opacity") == "0.25"


def test_what_is_saved_is_what_is_seen(page, parser: Parser, tmp_path: Path):
    label = parser.parse(PHOTO)
    drop(page, encoded(PHOTO), "my.figure.png")
    say(page, "parsed in")
    with page.expect_download() as download:
        page.get_by_text("Save labels").click()
    pictures.save_palette_png(tmp_path / "label.png", label, parser.palette)
    assert download.value.suggested_filename == "my.figure.png"
    assert Path(download.value.path()).read_bytes() == (tmp_path / "label.png").read_bytes()
    page.locator("#strength").fill("50")
    (y, x), (v, u) = two_points(label)
    page.get_by_label(parser.classes[label[y, x]], exact=False).first.uncheck()
    with page.expect_download() as download:
        page.get_by_text("Save overlay").click()
    assert download.value.suggested_filename == "my.figure_overlay.png"
    saved = np.array(Image.open(download.value.path()).convert("RGB")).astype(int)
    assert saved.shape == PHOTO.shape and (saved[y, x] == PHOTO[y, x]).all()
    assert abs(saved[v, u] - (PHOTO[v, u].astype(int) + parser.palette[label[v, u]]) / 2).max() < 2


def test_what_is_no_photo_is_told_and_the_page_goes_on(page, parser: Parser):
    drop(page, b"hello", "notes.txt")
    say(page, "notes.txt: not a photo in JPEG, PNG, WEBP, BMP format")
    assert page.locator("#say.bad").count() == 1
    drop(page, None)
    say(page, "that was no file")
    drop(page, None, event="paste")
    say(page, "there is no picture in the clipboard")
    drop(page, encoded(PHOTO), event="paste")
    say(page, "64 x 96, parsed in")
    assert page.locator("#say.bad").count() == 0


def test_a_chosen_photo_lies_as_it_was_taken(page, parser: Parser):
    exif = Image.Exif()
    exif[0x0112] = 6
    body = encoded(PHOTO, "JPEG", quality=95, exif=exif)
    page.locator("#file").set_input_files({"name": "phone.jpg", "mimeType": "image/jpeg", "buffer": body})
    say(page, "96 x 64, parsed in")
    label = parser.parse(Image.open(io.BytesIO(body)))
    for y, x in two_points(label):
        assert at(page, label, y, x) == parser.classes[label[y, x]]
        shown = page.evaluate("([x, y]) => [...document.getElementById('photo').getContext('2d').getImageData(x, y, 1, 1).data]",
                              [x, y])
        assert abs(np.array(shown[:3]) - np.rot90(PHOTO, -1)[y, x]).max() < 60


def test_a_photo_from_the_camera(page):
    page.get_by_role("button", name="Camera").click()
    page.get_by_text("Take the photo").click()
    say(page, "parsed in")
    page.get_by_role("button", name="Camera").click()
    page.get_by_text("Cancel").click()
    page.locator("dialog").wait_for(state="detached")      # a dialog's "close" comes after the click


def test_the_last_of_two_photos_stays(page, server, parser: Parser, monkeypatch):
    go, parse = threading.Event(), Parser.parse

    def slow(self, image):
        go.wait(30)
        return parse(self, image)

    monkeypatch.setattr(Parser, "parse", slow)
    drop(page, encoded(PHOTO))
    drop(page, encoded(PHOTO[:48]))
    go.set()
    say(page, "64 x 48, parsed in")
    time.sleep(0.3)
    say(page, "64 x 48, parsed in")


def test_a_server_that_is_gone_is_told(page):
    page.route("**/parse", lambda route: route.abort())
    drop(page, encoded(PHOTO))
    say(page, "the server does not answer: is it still running?")
