"""download.py against a local server with planted faults."""

import dataclasses
import errno
import hashlib
import http.server
import io
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import download
from download import FileSpec
from files.weights import sha256

CONTENT = bytes(range(256)) * 12_000 + b"the end"         # 3 MB
NAMES = ["a.pt", "b.pth"]
OFFICIAL = download.FILES


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the server's `plan` names the fault of each request."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        fault = self.server.plan.pop(0) if self.server.plan else ""
        if fault.startswith("status"):
            return self.send_error(int(fault.split()[1]))
        content, start = {"wrong": b"?" + CONTENT[1:], "page": b"<html>please sign in</html>"}.get(fault, CONTENT), 0
        if "Range" in self.headers and fault != "no range":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
            start += fault == "other range"
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        half = (start + len(content)) // 2
        self.wfile.write(content[start:{"cut": half, "stall": half, "cut at once": start}.get(fault)])
        if fault == "stall":
            self.server.release.wait(20)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    httpd.plan, httpd.requests, httpd.release = [], [], threading.Event()
    httpd.handle_error = lambda *_: None                   # some tests disconnect early
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def specs(monkeypatch, server):
    """Two small files replace the official ones."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    found = [FileSpec(name, (f"{server.url}/official/{name}",), len(CONTENT), digest, f"file {name}") for name in NAMES]
    monkeypatch.setattr(download, "FILES", found)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    return found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights"


def run(folder, *arguments):
    return download.main(["--dir", str(folder), *arguments])


def complete(folder, name="a.pt"):
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(name)) == [name]
    return (folder / name).read_bytes() == CONTENT


def test_files_by_name_and_files_that_are_already_there(folder, server, capsys):
    assert run(folder, "b.pth") == 0
    assert server.requests == [("/official/b.pth", None)]
    assert complete(folder, "b.pth") and not (folder / "a.pt").exists()
    assert "SHA-256 checked" in capsys.readouterr().out
    assert run(folder) == 0 and complete(folder) and server.requests[1:] == [("/official/a.pt", None)]
    capsys.readouterr()
    assert run(folder) == 0 and len(server.requests) == 2 and capsys.readouterr().out.count("already there") == 2


@pytest.mark.parametrize("plan, ranges", [
    (["cut", "cut", ""], 3), (["cut", "cut", "no range", ""], 3), (["status 503", "status 429", ""], 3),
    (["no length"], 1), (["cut", "other range", ""], 3), (["cut", "status 500", ""], 3)])
def test_transient_faults_are_retried(folder, server, plan, ranges):
    server.plan = list(plan)
    assert run(folder, "a.pt") == 0 and complete(folder) and len(server.requests) == ranges
    if plan[0] == "cut":                                   # the first half is not requested again
        assert server.requests[1][1] == f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize("fault, message", [
    ("status 404", "404"), ("page", r"\b27 bytes"), ("cut at once", "cut"), ("status 500", "500")])
def test_permanent_faults_leave_no_file_and_do_not_stop_the_others(folder, server, capsys, fault, message):
    server.plan = [fault] * download.TRIES
    assert run(folder) == 1 and complete(folder, "b.pth") and not (folder / "a.pt").exists()
    *_, line, error = [line for line in capsys.readouterr().err.splitlines() if "B/s" not in line]
    assert re.search(message, line) and f"{server.url}/official/a.pt: " in line and error.startswith("error: a.pt: ")
    assert len(server.requests) == download.TRIES + 1


def test_an_address_of_another_file_is_asked_once(folder, server, capsys):
    server.plan = ["wrong"]
    assert run(folder, "a.pt") == 1 and len(server.requests) == 1 and not list(folder.iterdir())
    assert "official/a.pt: serves another file" in capsys.readouterr().err


def test_a_line_that_breaks_often_is_resumed_while_there_is_progress(folder, server, monkeypatch):
    monkeypatch.setattr(download, "CHUNK", 5000)
    server.plan = ["cut"] * 8
    assert run(folder, "a.pt") == 0 and complete(folder) and len(server.requests) == 9


def test_the_next_address_resumes_the_first_ones_download(folder, server, specs, capsys, monkeypatch):
    """HF_ENDPOINT replaces the hub's address; each failed address is printed."""
    monkeypatch.setattr(download, "HUB", "https://hub.invalid")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub/")
    urls = (f"{server.url}/gone/a.pt", *specs[0].urls, "https://hub.invalid/a.pt")
    specs[0] = dataclasses.replace(specs[0], urls=urls)
    server.plan = ["status 404", "cut", ""]
    assert run(folder, "a.pt") == 0 and complete(folder)
    assert server.requests == [("/gone/a.pt", None), ("/official/a.pt", None),
                               ("/hub/a.pt", f"bytes={len(CONTENT) // 2}-")]
    printed = capsys.readouterr().err
    assert re.search(f"{server.url}/gone/a.pt: .*404.*\n", printed)
    assert f"{server.url}/official/a.pt: the connection was cut\n" in printed


@pytest.mark.parametrize("part, requests", [
    (b"x" * 5000, 2), (CONTENT, 0), (CONTENT + b"more", 1), (b"x" * len(CONTENT), 1), (b"", 1), (CONTENT[:-1], 1)])
def test_old_partial_files_are_resumed_or_replaced(folder, server, part, requests):
    folder.mkdir()
    (folder / "a.pt.part").write_bytes(part)
    assert run(folder, "a.pt") == 0 and complete(folder) and len(server.requests) == requests


def test_a_wrong_file_is_kept_until_it_is_replaced(folder, server, capsys):
    folder.mkdir()
    (folder / "a.pt").write_bytes(b"?" + CONTENT[1:])
    server.plan = ["status 404"] * download.TRIES
    assert run(folder, "a.pt") == 1 and (folder / "a.pt").read_bytes() == b"?" + CONTENT[1:]
    (folder / "a.pt").write_bytes(b"<html>")
    assert run(folder, "a.pt") == 0 and complete(folder) and "6 bytes instead of 3,072,007" in capsys.readouterr().out


def test_no_connection(folder, specs, capsys):
    specs[0] = dataclasses.replace(specs[0], urls=("http://127.0.0.1:9/a.pt",))
    assert run(folder, "a.pt") == 1
    assert re.search("http://127.0.0.1:9/a.pt: .*refused", capsys.readouterr().err)


def test_disk_full_in_the_middle(folder, server, monkeypatch, capsys):
    class Full(io.FileIO):
        def write(self, chunk):
            super().write(chunk[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "open", lambda *args: (open if args[1] == "rb" else Full)(*args), raising=False)
        assert run(folder, "a.pt") == 1 and "a.pt.part: No space left" in capsys.readouterr().err
    assert run(folder, "a.pt") == 0 and complete(folder)      # the written bytes are kept
    assert server.requests[1][1] == "bytes=1000-"


def test_folders_that_cannot_be_used(folder, server, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == 1 and capsys.readouterr().err.count("error: ") == 2
    (folder / "a.pt").mkdir(parents=True)
    assert run(folder, "a.pt") == 1 and "a.pt.part: Is a directory" in capsys.readouterr().err


def test_ctrl_c_leaves_a_partial_file_to_resume(folder, server, specs):
    server.plan = ["stall"]
    program = (f"import download; download.FILES = [download.{specs[0]}]; "
               f"download.run_program(lambda: download.main(['--dir', {str(folder)!r}]))")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(download.__file__).parent, text=True,
                               stderr=subprocess.PIPE)
    part, deadline = folder / "a.pt.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size == len(CONTENT) // 2) and time.monotonic() < deadline:
        threading.Event().wait(0.05)                       # time.sleep is replaced here
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in text and "Traceback" not in text
    assert part.read_bytes() == CONTENT[:len(CONTENT) // 2] and not (folder / "a.pt").exists()
    assert run(folder, "a.pt") == 0 and complete(folder)
    assert server.requests[-1][1] == f"bytes={len(CONTENT) // 2}-"


def test_official_files():
    for spec in (*OFFICIAL, *download.OTHER_FILES):
        assert len(bytes.fromhex(spec.sha256)) == 32 and len(spec.urls) >= 2
        assert all(url.startswith("https://") and url.endswith(f"/{spec.name}") for url in spec.urls)
    clip, _, vocabulary = OFFICIAL
    assert clip.sha256 in clip.urls[0]
    package = find_spec("open_clip")                       # contains the vocabulary
    if package:
        path = Path(package.origin).with_name(vocabulary.name)
        assert path.stat().st_size == vocabulary.bytes and sha256(path) == vocabulary.sha256
