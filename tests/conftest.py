"""Set-up of the tests: on the CPU everywhere, torchvision importable beside a CPU-only torch; fixtures."""

import os
import signal
from pathlib import Path

import pytest
import torch

import fast

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # in the background; the programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:                                # only some of the peers need it
    pass
except RuntimeError:                                       # a torchvision for CUDA: its C++ operators did not load
    for name in ("nms", "qnms"):                           # it only needs their schemas, nobody calls them here
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_configure():                                    # the benchmarks, which import this file too, may use a GPU
    if os.environ.get("SCHNET_TEST_DEVICE", "cpu") == "cpu":             # and so may tests/gpu
        os.environ["CUDA_VISIBLE_DEVICES"] = ""            # results are compared bit by bit, which no GPU promises


@pytest.fixture(params=("fast", "plain"))
def both_forms(request, monkeypatch):
    """Runs a test with the fast versions of fast.py and with the plain ones."""
    monkeypatch.setattr(fast, "ENABLED", request.param == "fast")


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)                               # sums must not depend on how busy the machine is
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a config with a small network and data for it."""
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
    """predict.py with that run: its exit code."""
    import predict

    def program(*argv) -> int:
        try:
            return predict.main(["--run", str(small), *map(str, argv)])
        except SystemExit as end:
            return end.code
    return program
