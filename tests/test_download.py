"""download.py against a local server that misbehaves."""

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
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import download
from files.weights import FileSpec

CONTENT = bytes(range(256)) * 12_000 + b"the end"         # 3 MB
NAMES = ["a.pt", "b.pth"]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the server's `plan` names the fault of each request."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        fault = self.server.plan.pop(0) if self.server.plan else ""
        if fault.startswith("status"):
            return self.send_error(int(fault.split()[1]))
        content, start = {"wrong": b"?" + CONTENT[1:], "page": b"<html>please sign in</html>",
                          "short": CONTENT[:-1]}.get(fault, CONTENT), 0
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
    httpd.handle_error = lambda *_: None                   # clients that disconnect early are part of the tests
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def specs(monkeypatch, server):
    """Two small files instead of the official ones, and no waiting."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    found = [FileSpec(name, f"{server.url}/official/{name}", len(CONTENT), digest, f"file {name}") for name in NAMES]
    monkeypatch.setattr(download, "FILES", found)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    return found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights"


def run(folder, *arguments):
    return download.main(["--dir", str(folder), *arguments])


def whole(folder, name="a.pt"):
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(name)) == [name]
    return (folder / name).read_bytes() == CONTENT


def test_one_file_of_a_mirror_then_the_others_then_nothing(folder, server, capsys):
    assert run(folder, "b.pth", "--mirror", f"{server.url}/mirror/") == 0
    assert server.requests == [("/mirror/b.pth", None)] and whole(folder, "b.pth") and not (folder / "a.pt").exists()
    assert "SHA-256 checked" in capsys.readouterr().out
    assert run(folder) == 0 and whole(folder) and server.requests[1:] == [("/official/a.pt", None)]
    capsys.readouterr()
    assert run(folder) == 0 and len(server.requests) == 2 and capsys.readouterr().out.count("already there") == 2


@pytest.mark.parametrize("plan, ranges", [
    (["cut", ""], 2), (["cut", "cut", "cut", ""], 4), (["cut", "no range"], 2), (["cut", "cut", "no range", ""], 3),
    (["status 503", "status 429", ""], 3), (["cut at once"] * 4 + [""], 5), (["no length"], 1),
    (["cut", "other range", ""], 3), (["cut", "cut at once", "status 500", "cut at once", ""], 5)])
def test_transient_faults_are_retried(folder, server, plan, ranges):
    server.plan = list(plan)
    assert run(folder, "a.pt") == 0 and whole(folder) and len(server.requests) == ranges
    if plan[0] == "cut":                                   # the first half was not requested again
        assert server.requests[1][1] == f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize("plan, message, requests", [
    (["status 404"], "HTTP 404", 1), (["status 403"], "HTTP 403", 1), (["page"], r"\b27 bytes", 1),
    (["short"], f"{len(CONTENT) - 1:,} bytes", 1), (["wrong"], "SHA-256", 1),
    (["cut at once"] * 5, "cut.*5 tries", 5), (["status 500"] * 5, "HTTP 500", 5)])
def test_lasting_faults_leave_no_file_and_do_not_stop_the_others(folder, server, capsys, plan, message, requests):
    server.plan = list(plan)
    assert run(folder) == 1 and whole(folder, "b.pth") and not (folder / "a.pt").exists()
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line) and "/official/a.pt" in line and len(server.requests) == requests + 1


def test_waits_grow_and_the_next_call_resumes(folder, server, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.plan = ["cut"] + ["cut at once"] * 4
    assert run(folder, "a.pt") == 1 and waits == [2, 4, 8, 16]
    assert (folder / "a.pt.part").stat().st_size == len(CONTENT) // 2 and not (folder / "a.pt").exists()
    assert run(folder, "a.pt") == 0 and whole(folder)
    assert server.requests[5:] == [("/official/a.pt", f"bytes={len(CONTENT) // 2}-")]


@pytest.mark.parametrize("part, requests", [
    (b"x" * 5000, 2), (CONTENT, 0), (CONTENT + b"more", 1), (b"x" * len(CONTENT), 1), (b"", 1), (CONTENT[:-1], 1)])
def test_what_an_old_part_may_be(folder, server, part, requests):
    folder.mkdir()
    (folder / "a.pt.part").write_bytes(part)
    assert run(folder, "a.pt") == 0 and whole(folder) and len(server.requests) == requests


def test_wrong_file_in_place_is_replaced(folder, server, capsys):
    folder.mkdir()
    (folder / "a.pt").write_bytes(b"<html>")
    assert run(folder, "a.pt") == 0 and whole(folder) and "6 bytes instead of 3,072,007" in capsys.readouterr().out
    (folder / "a.pt").write_bytes(b"?" + CONTENT[1:])
    server.plan = ["status 404"]
    assert run(folder, "a.pt") == 1 and (folder / "a.pt").read_bytes() == b"?" + CONTENT[1:]     # kept until then


def test_from_a_folder(folder, server, tmp_path, capsys):
    stick = tmp_path / "stick"
    for path, content in ((stick / "a.pt", CONTENT), (stick / "b.pth", CONTENT[:-2]),
                          (folder / "b.pth.part", CONTENT[:9])):         # the last one of an interrupted download
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert run(folder, "--from", str(stick)) == 1 and whole(folder) and not server.requests
    error = capsys.readouterr().err
    assert f"{stick / 'b.pth'}: " in error and f"{len(CONTENT) - 2:,} bytes instead of {len(CONTENT):,}" in error
    assert sorted(p.name for p in folder.iterdir()) == ["a.pt", "b.pth.part"]
    (stick / "b.pth").unlink()
    assert run(folder, "--from", str(stick)) == 1 and f"{stick / 'b.pth'}: No such" in capsys.readouterr().err


def test_no_connection_a_shorter_file_and_no_space(folder, server, monkeypatch, capsys):
    assert run(folder, "a.pt", "--mirror", "http://127.0.0.1:9") == 1
    assert "no connection" in capsys.readouterr().err.splitlines()[-1]
    (folder / "a.pt.part").write_bytes(CONTENT[:-1])
    server.plan = ["short"]
    assert run(folder, "a.pt") == 1 and f"{len(CONTENT) - 1:,} bytes or less" in capsys.readouterr().err
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert run(folder, "b.pth") == 1 and re.search(f"{len(CONTENT):,} bytes.* 1,000 ", capsys.readouterr().err)


def test_disk_full_in_the_middle(folder, server, monkeypatch, capsys):
    class Full(io.FileIO):
        def write(self, chunk):
            super().write(chunk[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "open", lambda *args: (open if args[1] == "rb" else Full)(*args), raising=False)
        assert run(folder, "a.pt") == 1 and "a.pt.part: the disk is full" in capsys.readouterr().err
    assert run(folder, "a.pt") == 0 and whole(folder)      # what had been written is used
    assert server.requests[1][1] == "bytes=1000-"


def test_folders_that_cannot_be_used(folder, server, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == 1 and capsys.readouterr().err.count("error: ") == 2
    (folder / "a.pt").mkdir(parents=True)
    assert run(folder, "a.pt") == 1 and "a.pt: is a folder" in capsys.readouterr().err and not server.requests
    forbidden = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "w"))
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=forbidden))      # root may write into every real folder
    assert run(tmp_path / "w", "a.pt") == 1 and f"{tmp_path / 'w'}: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["c.pt"], ["--mirror", "ftp://x"], ["--mirror", "http://x", "--from", "."]])
def test_wrong_arguments(folder, arguments):
    with pytest.raises(SystemExit, match="2"):
        run(folder, *arguments)
    assert not folder.exists()


def test_ctrl_c_leaves_a_part_to_resume(folder, server, specs):
    server.plan = ["stall"]
    program = (f"import download; from files import weights; download.FILES = [weights.{specs[0]}]; "
               f"raise SystemExit(download.main(['--dir', {str(folder)!r}]))")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(download.__file__).parent, text=True,
                               stderr=subprocess.PIPE)
    part, deadline = folder / "a.pt.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size == len(CONTENT) // 2) and time.monotonic() < deadline:
        threading.Event().wait(0.05)                       # time.sleep does nothing here
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in text and "Traceback" not in text
    assert part.read_bytes() == CONTENT[:len(CONTENT) // 2] and not (folder / "a.pt").exists()
    assert run(folder, "a.pt") == 0 and whole(folder)
    assert server.requests[-1][1] == f"bytes={len(CONTENT) // 2}-"
