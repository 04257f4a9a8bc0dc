"""Every script of benchmarks/, experiments/ and examples/: imports, names that exist, --help.

One process imports the libraries once for all of them. What a script does is not tested here.
"""

import ast
import contextlib
import importlib
import inspect
import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "experiments", "examples")
PATHS = [ROOT, ROOT / "tests", *(ROOT / folder for folder in FOLDERS)]


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")
def test_scripts():
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_intervals_are_students_t(monkeypatch):
    """Against numbers from tables: the mean of n differences is known to t(n - 1) standard errors."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    runner = importlib.import_module("runner")
    three = runner.difference([2.13, 0.26, 4.56])
    assert three.mean == pytest.approx(2.317, abs=1e-3) and three.verdict == "not decided"
    assert (three.low, three.high) == (pytest.approx(-3.04, abs=0.02), pytest.approx(7.67, abs=0.02))
    assert runner.difference([7.95, 6.55, 10.31]).verdict == "decided"
    assert runner.difference([1.0]).verdict == "not decided"
    records = [{"name": name, "seed": seed, "looks": [{"miou": 0.1 * seed + gain}]}
               for name, gain in (("a", 0.25), ("b", 0.2)) for seed in range(4) if (name, seed) != ("b", 0)]
    (pair, found), = runner.differences(records, [("a", "b"), ("a", "c")]).items()
    assert pair == ("a", "b") and found.each == pytest.approx([5.0] * 3)


def check(path: Path):
    with contextlib.suppress(SystemExit):                  # a script without a main guard wants its arguments
        importlib.import_module(path.stem)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    check_names(tree)
    if "__main__" in path.read_text(encoding="utf-8"):
        output, sys.argv = io.StringIO(), [str(path), "--help"]
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        printed = output.getvalue() or str(end.value.code)               # without argparse: the docstring
        assert printed.startswith("usage:") or f"{path.parent.name}/{path.name}" in printed, "no --help"


def check_names(tree: ast.Module):
    """Resolves each imported name and each `module.attribute` of a project module, and binds the arguments of calls."""
    names = {}                                             # in the script: the object that it means
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):        # a module of a package
                    importlib.import_module(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = getattr(module, alias.name)
    names = {name: found for name, found in names.items() if is_ours(found)}

    def resolve(node: ast.expr):
        if isinstance(node, ast.Name):
            return names.get(node.id)
        owner = resolve(node.value) if isinstance(node, ast.Attribute) else None
        return getattr(owner, node.attr) if inspect.ismodule(owner) else None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node)
        if isinstance(node, ast.Call) and callable(function := resolve(node.func)):
            keywords = [keyword.arg for keyword in node.keywords]
            if None not in keywords and not any(isinstance(argument, ast.Starred) for argument in node.args):
                try:
                    inspect.signature(function).bind(*node.args, **dict.fromkeys(keywords))
                except TypeError as error:
                    raise TypeError(f"line {node.lineno}, {ast.unparse(node.func)}: {error}") from None


def is_ours(found) -> bool:
    """Whether an object is a module of this repository, or a function or class of one."""
    module = found if inspect.ismodule(found) else sys.modules.get(getattr(found, "__module__", None) or "")
    return Path(getattr(module, "__file__", None) or "/").resolve().parent in [*PATHS, *(ROOT / name for name in (
        "engine", "files", "synthetic", "viz"))]


if __name__ == "__main__":
    sys.path[:0] = [str(path) for path in PATHS]
    failed = 0
    for script in [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]:
        try:
            check(script)
        except BaseException as error:
            failed += 1
            print(f"{script.relative_to(ROOT)}: {type(error).__name__}: {error}")
    sys.exit(failed > 0)
