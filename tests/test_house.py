"""The structure of the repository: imports between its files, their number and size, the links of its texts."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
         for folder in (".", "engine", "files", "viz", "synthetic", "examples") for path in (ROOT / folder).glob("*.py")
         if path.stem != "__init__"}
FLOORS = """
    errors
    config
    files
    viz
    layers fast losses tokenizer sam_vit clip_vit adapter uperhead augment synthetic
    engine.workers engine.processes
    datasets model
    engine.checkpoint
    engine.run inference
    engine.parsing
    evaluate
    predict train export download
    examples"""


def floor(module: str) -> int:
    """The line of FLOORS that names a module or its folder."""
    lines = FLOORS.strip().splitlines()
    return next(n for n, line in enumerate(lines) if {module, module.partition(".")[0]} & set(line.split()))


def imports(path: Path) -> set[str]:
    """The files of this repository that a file imports, at its top or inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FILES.keys()


def test_no_import_is_circular_or_leads_to_a_higher_floor():
    graph = {module: imports(path) for module, path in FILES.items()}
    assert len(graph["predict"]) > 8                       # imports are found at all
    TopologicalSorter(graph).prepare()                     # CycleError
    wrong = [f"{module} imports {other}" for module, others in graph.items() for other in others
             if floor(other) > floor(module)]
    assert not wrong


def test_few_files_of_a_readable_size():
    assert len(list(ROOT.glob("*.py"))) <= 19
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: length for module, length in lengths.items() if length > 350} == {}


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page: Path):
    targets = re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
