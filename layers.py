"""Shared by the network files: resizing, position tables, initialisation, precision."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def round_up(side: int) -> int:
    """The next multiple of 32, the stride of the adapter's coarsest map."""
    return -(-side // 32) * 32


def resample_positions(table: Tensor, h: int, w: int) -> Tensor:
    """Absolute positions (H, W, C) at a grid of h x w: bicubic, as ViT-Adapter does.

    One axis after the other: the two-dimensional GPU kernel loops over channels in one thread.
    """
    H, W, C = table.shape
    if (H, W) == (h, w):
        return table
    table = F.interpolate(table.reshape(1, 1, H, W * C), (h, W * C), mode="bicubic")
    return F.interpolate(table.view(1, h, W, C), (w, C), mode="bicubic")[0]


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Relative positions (L, d) as (size, size, d): entry (i, j) is that of the distance i - j.

    SAM's rule: a table whose length is not 2 size - 1 is resampled linearly.
    """
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.t()[None], 2 * size - 1, mode="linear")[0].t()
    steps = torch.arange(size, device=table.device)
    return table[steps[:, None] - steps + size - 1]


def window_partition(x: Tensor, size: int) -> Tensor:
    """(B, h, w, C) -> windows (B w', size, size, C); zero-padded at the bottom and right."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % size, 0, -x.shape[1] % size))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))      # (B, rows, size, columns, size, C)
    return x.transpose(2, 3).flatten(0, 2)


def window_unpartition(x: Tensor, h: int, w: int) -> Tensor:
    """Windows (B w', size, size, C) back to (B, h, w, C); drops the padding."""
    size = x.shape[1]
    x = x.unflatten(0, (-1, -(-h // size), -(-w // size)))
    x = x.transpose(2, 3)                                   # (B, rows, size, columns, size, C)
    return x.flatten(3, 4).flatten(1, 2)[:, :h, :w]


def init_linears(module: nn.Module):
    """ViT's initialisation of linear layers: truncated normal of 0.02, no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def autocast(device: torch.device, precision: str):
    """A context in which the network runs in `precision`: bf16, fp16 or fp32."""
    dtype = DTYPES[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of b: under autocast, logits would have steps of 0.125 from 16 on."""
    with torch.autocast(a.device.type, enabled=False):
        return a.to(b.dtype) @ b


def cast_frozen(model: nn.Module, precision: str):
    """Stores frozen linear weights as `autocast` rounds them at every use; for use under autocast.

    Results are equal to the last bit, and autocast keeps no second copy for the backward pass.
    """
    if DTYPES[precision] is not None:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and parameter.ndim == 2 and name.endswith("weight"):
                parameter.data = parameter.data.to(DTYPES[precision])
