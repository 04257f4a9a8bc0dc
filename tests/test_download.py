"""The download program against a local server that behaves badly."""

import errno
import http.server
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import download
from files import weights
from files.weights import FileSpec

CONTENT = bytes(range(256)) * 12_000 + b"the end"         # 3 MB
NAMES = ["a.pt", "b.pth"]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the server's `plan` says, request by request, what goes wrong."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        fault = self.server.plan.pop(0) if self.server.plan else ""
        content = CONTENT
        if fault.startswith("status"):
            return self.send_error(int(fault.split()[1]))
        if fault == "wrong":
            content = b"?" + CONTENT[1:]
        if fault in ("page", "short"):
            content = b"<html>please sign in</html>" if fault == "page" else CONTENT[:-1]
        start = 0
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
        half = start + (len(content) - start) // 2
        self.wfile.write(content[start:{"cut": half, "stall": half, "cut at once": start}.get(fault, len(content))])
        if fault == "stall":
            self.server.release.wait(20)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    httpd.plan, httpd.requests, httpd.release = [], [], threading.Event()
    httpd.handle_error = lambda *_: None                   # clients that leave early are part of the tests
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def specs(monkeypatch, server, tmp_path):
    """Two small files in the place of the official ones, no waiting."""
    (tmp_path / "content").write_bytes(CONTENT)
    digest = weights.sha256(tmp_path / "content")
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


def test_all_files_then_nothing_to_do(folder, server, capsys):
    assert run(folder) == 0 and all(whole(folder, name) for name in NAMES)
    assert [path for path, _ in server.requests] == ["/official/a.pt", "/official/b.pth"]
    assert "SHA-256 checked" in capsys.readouterr().out
    assert run(folder) == 0 and len(server.requests) == 2
    assert capsys.readouterr().out.count("already there") == 2


def test_one_name_and_mirror(folder, server):
    assert run(folder, "b.pth", "--mirror", f"{server.url}/mirror/") == 0
    assert server.requests == [("/mirror/b.pth", None)] and whole(folder, "b.pth") and not (folder / "a.pt").exists()


@pytest.mark.parametrize("plan, ranges", [
    (["cut", ""], 2), (["cut", "cut", "cut", ""], 4), (["cut", "no range"], 2), (["cut", "cut", "no range", ""], 3),
    (["status 503", "status 429", ""], 3), (["cut at once"] * 4 + [""], 5), (["no length"], 1),
    (["cut", "other range", ""], 3), (["cut", "cut at once", "status 500", "cut at once", ""], 5)])
def test_faults_that_another_try_mends(folder, server, plan, ranges):
    server.plan = list(plan)
    assert run(folder, "a.pt") == 0 and whole(folder)
    assert len(server.requests) == ranges
    if plan[0] == "cut":                                   # what had arrived was asked for no more
        assert server.requests[1][1] == f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize("plan, message, requests", [
    (["status 404"], "HTTP 404", 1), (["status 403"], "HTTP 403", 1), (["page"], "serves 27 bytes, the official", 1),
    (["short"], "the official a.pt has", 1), (["wrong"], "serves something else.*SHA-256", 1),
    (["cut at once"] * 5, "the connection was cut.*5 tries.*resumes", 5), (["status 500"] * 5, "HTTP 500", 5)])
def test_faults_that_remain(folder, server, capsys, plan, message, requests):
    server.plan = list(plan)
    assert run(folder, "a.pt") == 1
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("error: ") and re.search(message, text), text
    assert len(server.requests) == requests and not (folder / "a.pt").exists()


def test_one_fault_does_not_stop_the_others(folder, server):
    server.plan = ["status 404"]
    assert run(folder) == 1 and whole(folder, "b.pth") and not (folder / "a.pt").exists()


def test_waits_grow(folder, server, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.plan = ["cut at once"] * 5
    assert run(folder, "a.pt") == 1 and waits == [2, 4, 8, 16]


def test_resumed_by_the_next_call(folder, server):
    server.plan = ["cut"] + ["cut at once"] * 4
    assert run(folder, "a.pt") == 1
    assert (folder / "a.pt.part").stat().st_size == len(CONTENT) // 2 and not (folder / "a.pt").exists()
    server.requests.clear()
    assert run(folder, "a.pt") == 0 and whole(folder)
    assert server.requests == [("/official/a.pt", f"bytes={len(CONTENT) // 2}-")]


@pytest.mark.parametrize("part, requests", [
    (b"x" * 5000, 2), (CONTENT, 0), (CONTENT + b"more", 1), (b"x" * len(CONTENT), 1), (b"", 1), (CONTENT[:-1], 1)])
def test_what_an_old_part_may_be(folder, server, part, requests):
    folder.mkdir()
    (folder / "a.pt.part").write_bytes(part)
    assert run(folder, "a.pt") == 0 and whole(folder) and len(server.requests) == requests


def test_shorter_file_than_the_part(folder, server, capsys):
    folder.mkdir()
    (folder / "a.pt.part").write_bytes(CONTENT[:-1])
    server.plan = ["short"]
    assert run(folder, "a.pt") == 1 and "which is not the whole file" in capsys.readouterr().err


def test_wrong_file_in_place_is_replaced(folder, server, capsys):
    folder.mkdir()
    (folder / "a.pt").write_bytes(b"<html>")
    assert run(folder, "a.pt") == 0 and whole(folder)
    assert "is not the official file (6 bytes instead of" in capsys.readouterr().out
    (folder / "a.pt").write_bytes(b"?" + CONTENT[1:])
    server.plan = ["status 404"]
    assert run(folder, "a.pt") == 1 and (folder / "a.pt").read_bytes() == b"?" + CONTENT[1:]     # kept until then


def test_from_a_folder(folder, server, tmp_path, capsys):
    stick = tmp_path / "stick"
    stick.mkdir()
    (stick / "a.pt").write_bytes(CONTENT)
    (stick / "b.pth").write_bytes(CONTENT[:-2])
    folder.mkdir(exist_ok=True)
    (folder / "b.pth.part").write_bytes(CONTENT[:9])                     # of a download that was interrupted
    assert run(folder, "--from", str(stick)) == 1 and whole(folder) and not server.requests
    assert "b.pth: is not the official file" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["a.pt", "b.pth.part"]
    (stick / "b.pth").unlink()
    assert run(folder, "--from", str(stick)) == 1 and "b.pth: No such file" in capsys.readouterr().err


def test_nobody_answers(folder, capsys):
    assert run(folder, "a.pt", "--mirror", "http://127.0.0.1:9") == 1
    assert "no connection" in capsys.readouterr().err.splitlines()[-1]


def test_disk_full(folder, monkeypatch, capsys):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert run(folder, "a.pt") == 1
    assert f"a.pt needs {len(CONTENT):,} bytes more, 1,000 are free" in capsys.readouterr().err


def test_disk_full_in_the_middle(folder, server, monkeypatch, capsys):
    real = open

    def full(path, mode="r", *args, **options):
        file = real(path, mode, *args, **options)
        if "w" not in mode:
            return file

        class Full:
            def write(self, chunk):
                file.write(chunk[:1000])
                raise OSError(errno.ENOSPC, "No space left on device")

            def tell(self):
                return file.tell()

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()
        return Full()

    monkeypatch.setattr(download, "open", full, raising=False)
    assert run(folder, "a.pt") == 1 and "the disk is full" in capsys.readouterr().err
    monkeypatch.delattr(download, "open")
    assert run(folder, "a.pt") == 0 and whole(folder)      # what had been written is used
    assert server.requests[1][1] == "bytes=1000-"


def test_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == 1 and capsys.readouterr().err.count("error: ") == 2

    def forbidden(self, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)          # root may write everywhere: no real folder will do
    assert run(tmp_path / "w", "a.pt") == 1
    assert f"error: {tmp_path / 'w'}: Permission denied" in capsys.readouterr().err


def test_folder_of_the_same_name(folder, server, capsys):
    (folder / "a.pt").mkdir(parents=True)
    assert run(folder, "a.pt") == 1 and "is a folder" in capsys.readouterr().err and not server.requests


@pytest.mark.parametrize("arguments", [["c.pt"], ["--mirror", "ftp://x"], ["--mirror", "http://x", "--from", "."]])
def test_wrong_arguments(folder, arguments):
    with pytest.raises(SystemExit) as caught:
        run(folder, *arguments)
    assert caught.value.code == 2 and not folder.exists()


def test_ctrl_c_leaves_a_part_to_resume(folder, server, specs):
    server.plan = ["stall"]
    program = (f"import download; from files import weights; download.FILES = [weights.{specs[0]}]; "
               f"raise SystemExit(download.main(['--dir', {str(folder)!r}]))")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(download.__file__).parent,
                               stderr=subprocess.PIPE, text=True)
    part, deadline = folder / "a.pt.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size == len(CONTENT) // 2) and time.monotonic() < deadline:
        threading.Event().wait(0.05)                       # time.sleep does nothing here
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on where it was" in text and "Traceback" not in text
    assert part.read_bytes() == CONTENT[:len(CONTENT) // 2] and not (folder / "a.pt").exists()
    assert run(folder, "a.pt") == 0 and whole(folder)
    assert server.requests[-1][1] == f"bytes={len(CONTENT) // 2}-"
