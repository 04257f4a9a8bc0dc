"""Set-up of the tests: peers that import torchvision must also import beside a CPU-only torch."""

import signal

import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # run in the background: the programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import torchvision  # noqa: F401
except RuntimeError:                                       # a torchvision built for CUDA: its C++ operators did not load
    for name in ("nms", "qnms"):                           # it only needs their schemas, nobody calls them here
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
