"""Set-up of the GPU tests (`make test-gpu`). Without CUDA they are skipped; with SCHNET_TEST_DEVICE=cpu they run on the
CPU with a small network, to test the comparisons themselves."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")            # must be set before cuBLAS loads: deterministic

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
    """Disables TF32, which would hide differences."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
