"""Counts the floating-point operations of a run, operator by operator. A multiply-add counts as two.

Counted: matrix products, convolutions, attention and the weighted samples of deformable attention, each time they run:
forward, backward, recomputation. Not counted: elementwise operations, norms, softmax, interpolation.
torch.utils.flop_counter misses attention on a CPU, nn.MultiheadAttention's fast path and grid_sample, and
counts the weight gradient of a grouped convolution once per group.

An operator that multiplies but has no formula here raises an error: too low a count would look like a slow run.
"""

import math
import re
from collections.abc import Callable

from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

MULTIPLIES = re.compile("m[mv](_|$)|dot|conv|attention|transformer|bag|grid_sampler|mkl|rnn|lstm|gru")


def product(a: Tensor, b: Tensor) -> int:
    return 2 * a.numel() * b.shape[-1]


def attention(q: Tensor, k: Tensor, v: Tensor, scores: int, sums: int) -> int:
    """q (..., N, d), k (..., M, d), v (..., M, D): `scores` products of the shape of q k^T, `sums` of that times v."""
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (scores * q.shape[-1] + sums * v.shape[-1])


def forward_attention(out, q: Tensor, k: Tensor, v: Tensor, *_) -> int:
    return attention(q, k, v, 1, 1)


def backward_attention(out, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> int:
    return attention(q, k, v, 3, 2)          # q k^T again, gradients of q and k; of weights and v


def multi_head_attention(out, q: Tensor, k: Tensor, v: Tensor, dim: int, *_) -> int:
    """Four linear layers and attention, on (B, N, dim)."""
    return 2 * q.numel() * 4 * dim + attention(q, k, v, 1, 1)


def convolution(out: Tensor, x: Tensor, weight: Tensor, bias, stride, padding, dilation, transposed: bool, *_) -> int:
    return 2 * (x if transposed else out).numel() * math.prod(weight.shape[1:])


def backward_convolution(out, grad: Tensor, x: Tensor, weight: Tensor, bias, stride, padding, dilation,
                         transposed: bool, output_padding, groups: int, output_mask: list[bool]) -> int:
    return sum(output_mask[:2]) * convolution(grad, x, weight, bias, stride, padding, dilation, transposed)


def grid_sampler(out: Tensor, *_) -> int:
    return 2 * 4 * out.numel()                             # four neighbours


def backward_grid_sampler(out, grad: Tensor, x, grid, mode, padding, align, output_mask: list[bool]) -> int:
    return 2 * 4 * grad.numel() * (output_mask[0] + 2 * output_mask[1])              # gradient of the map; of x and y


FORMULAS: dict[str, Callable[..., int]] = {
    "mm": lambda out, a, b, *_: product(a, b), "bmm": lambda out, a, b, *_: product(a, b),
    "addmm": lambda out, c, a, b, *_: product(a, b), "baddbmm": lambda out, c, a, b, *_: product(a, b),
    "mv": lambda out, a, b: 2 * a.numel(), "dot": lambda out, a, b: 2 * a.numel(),
    "convolution": convolution, "convolution_backward": backward_convolution,
    "_native_multi_head_attention": multi_head_attention,
    "grid_sampler_2d": grid_sampler, "grid_sampler_2d_backward": backward_grid_sampler}
for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    FORMULAS[f"_scaled_dot_product_{kernel}"] = forward_attention
    FORMULAS[f"_scaled_dot_product_{kernel}_backward"] = backward_attention


class Flops(TorchDispatchMode):
    """Context manager: counts the operations inside it in `total`."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        space, _, name = operator.name().partition(".")[0].partition("::")
        formula, kwargs = FORMULAS.get(name), kwargs or {}
        if formula is None:
            with self, enable_reentrant_dispatch():        # composed of others, as linear is of addmm, also in autocast
                out = operator.decompose(*args, **kwargs) if space == "aten" else NotImplemented
            if out is not NotImplemented:
                return out
            if MULTIPLIES.search(name):
                raise NotImplementedError(f"{name}: {__file__} has no formula for its operations")
        out = operator(*args, **kwargs)
        if formula is not None:
            self.total += formula(out, *args)
        return out


def count(run: Callable) -> tuple[object, int]:
    """The result of `run()` and its floating-point operations."""
    with Flops() as flops:
        result = run()
    return result, flops.total
