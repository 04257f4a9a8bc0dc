"""Set-up of the tests of a GPU: `make test-gpu`. Without CUDA each test is skipped with that reason; with
SCHNET_TEST_DEVICE=cpu the same comparisons run on a small network, so that they can be tested without a card."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")            # before cuBLAS is loaded: deterministic products

import pytest  # noqa: E402
import torch  # noqa: E402
from compare import DEVICE  # noqa: E402


def pytest_collection_modifyitems(items):
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        reason = "torch finds no CUDA device (SCHNET_TEST_DEVICE=cpu runs it on a CPU)"
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def full_precision():
    """Disables TF32: the network's arithmetic is compared."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
