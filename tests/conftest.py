"""Set-up of the tests: peers that import torchvision must also import beside a CPU-only torch."""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:                                       # a torchvision built for CUDA: its C++ operators did not load
    for name in ("nms", "qnms"):                           # it only needs their schemas, nobody calls them here
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
