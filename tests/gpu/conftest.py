"""Set-up of the tests of a GPU: `make test-gpu`. Without CUDA each test says that it is skipped; with
SCHNET_TEST_DEVICE=cpu the same comparisons run on a small network, which is how they are kept alive without a card."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                # before cuBLAS is loaded: deterministic products

import pytest  # noqa: E402
import torch  # noqa: E402
from compare import DEVICE  # noqa: E402


def pytest_collection_modifyitems(items):
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device (SCHNET_TEST_DEVICE=cpu runs it on a CPU)"))


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32: what is compared is the arithmetic of the network."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
