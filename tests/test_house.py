"""What stands around the code: the README's map of the files, the Makefile's virtual environment."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tree() -> dict[str, int]:
    """{path: lines} of the files in README's reading map."""
    text, found, folder = (ROOT / "README.md").read_text(encoding="utf-8"), {}, ""
    for line in re.search(r"```text\n(.*?)```", text, re.S)[1].splitlines():
        entry = re.match(r"( *)([\w.]+/?) +(?:(\d+) )?", line)
        if not entry:                                      # a heading
            continue
        folder = entry[2] if not entry[1] else folder
        if entry[3]:
            found[folder + entry[2] if entry[1] else entry[2]] = int(entry[3])
    return found


def test_the_readmes_map_is_the_repository():
    """Each Python file that runs stands in it, with its number of lines, within a seventh."""
    files = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
             for folder in (".", "engine", "files", "viz", "synthetic") for path in (ROOT / folder).glob("*.py")}
    files = {path: lines for path, lines in files.items() if not path.endswith("__init__.py")}
    assert tree().keys() == files.keys()
    far = {path: (said, files[path]) for path, said in tree().items() if abs(said - files[path]) > max(5, files[path] / 7)}
    assert not far


def test_what_the_texts_point_to_is_there():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("**/*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


@pytest.mark.skipif(sys.platform == "win32" or not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("left", ["no pip", "half of pip"])
def test_make_mends_what_an_interrupted_make_left(tmp_path, left):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "constraints.txt", "requirements-dev.txt"):
        (tmp_path / name).write_text("")                   # nothing to install: no network
    options = ["--without-pip"] if left == "no pip" else []
    subprocess.run([sys.executable, "-m", "venv", *options, tmp_path / ".venv"], check=True)
    if left == "half of pip":
        shutil.rmtree(next((tmp_path / ".venv").glob("lib/python*/site-packages/pip/_internal")))
    done = subprocess.run(["make", ".venv/run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([tmp_path / ".venv/bin/python", "-m", "pip", "--version"], capture_output=True).returncode == 0
