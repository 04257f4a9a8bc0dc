"""Set-up: tests use the CPU, a CUDA torchvision can be imported with a CPU-only torch; common fixtures."""

import os
import signal
from pathlib import Path

import pytest
import torch

import fast

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # as in background jobs; the tested programs would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:                                # only some reference packages need it
    pass
except RuntimeError:                                       # built for CUDA: its C++ operators did not load
    for name in ("nms", "qnms"):                           # it needs their schemas only; none is called here
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_configure():                                    # benchmarks, which import this file too, may use a GPU
    if os.environ.get("SCHNET_TEST_DEVICE", "cpu") == "cpu":             # and tests/gpu, too
        os.environ["CUDA_VISIBLE_DEVICES"] = ""            # bit-identical results are not guaranteed on GPUs


@pytest.fixture(params=("fast", "plain"))
def both_forms(request, monkeypatch):
    """Runs a test with the fast versions of fast.py and with the plain versions."""
    monkeypatch.setattr(fast, "ENABLED", request.param == "fast")


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)                               # sums must not depend on the number of threads
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a config for a small network, with its data."""
    from tiny import make_config
    return make_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a small random network."""
    from tiny import small_run
    return small_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def parser(small: Path):
    """A `predict.Parser` of that run."""
    from predict import Parser
    return Parser(small)


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parse(small: Path):
    """Runs predict.py with that run; returns its exit code."""
    import predict

    def program(*argv) -> int:
        try:
            return predict.main(["--run", str(small), *map(str, argv)])
        except SystemExit as end:
            return end.code
    return program


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """The longest files first: workers that take files in turn then end at about the same time."""
    longest = ("test_export", "test_processes", "test_formats", "test_resume")
    items.sort(key=lambda item: item.path.stem not in longest)
