"""Set-up of the tests: on the CPU everywhere; peers that import torchvision must also import beside a CPU-only torch."""

import os
import signal

import pytest
import torch

import fast

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # run in the background: the programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:                                # only some of the peers need it
    pass
except RuntimeError:                                       # a torchvision built for CUDA: its C++ operators did not load
    for name in ("nms", "qnms"):                           # it only needs their schemas, nobody calls them here
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_configure():                                    # the benchmarks, which import this file too, may use a GPU
    if os.environ.get("SCHNET_TEST_DEVICE", "cpu") == "cpu":             # and so may tests/gpu
        os.environ["CUDA_VISIBLE_DEVICES"] = ""            # results are compared bit by bit, which no GPU promises


@pytest.fixture(params=("fast", "plain"))
def both_forms(request, monkeypatch):
    """The test with the faster forms of fast.py, and with the plain ones."""
    monkeypatch.setattr(fast, "ENABLED", request.param == "fast")
