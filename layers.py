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
    """Absolute positions (H, W, C) at a grid of h x w: bicubic, as ViT-Adapter does (DenseCLIP and Rein: bilinear).

    One axis after the other: in two dimensions a GPU gives each of the h w places one thread, which does all C channels.
    """
    H, W, C = table.shape
    if (H, W) == (h, w):
        return table
    table = F.interpolate(table.reshape(1, 1, H, W * C), (h, W * C), mode="bicubic")
    return F.interpolate(table.view(1, h, W, C), (w, C), mode="bicubic")[0]


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Relative positions (L, d) as (size, size, d): the entry of query i and key j is that of distance i - j.

    SAM's rule: a table of another length than 2 size - 1 is resampled as a whole, linearly.
    """
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.t()[None], 2 * size - 1, mode="linear")[0].t()
    steps = torch.arange(size, device=table.device)
    return table[steps[:, None] - steps + size - 1]


def level_sizes(shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """(width, height) of each map, (L, 2). Filled on the device: building it from a list would force a GPU sync."""
    return torch.stack([torch.full((), side, device=device) for h, w in shapes for side in (w, h)]).view(-1, 2)


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
    """a @ b in the precision of `b`, also under autocast: for logits, which have steps of 0.125 from 16 on in bf16."""
    with torch.autocast(a.device.type, enabled=False):
        return a.to(b.dtype) @ b


def cast_frozen(model: nn.Module, precision: str):
    """Stores frozen linear layers' weights as `autocast` would round them at every use: the same results to the last bit,
    half the memory of the weights, no second copy saved for the backward pass. For use under that autocast only."""
    if DTYPES[precision] is not None:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and parameter.ndim == 2 and name.endswith("weight"):      # in_proj_weight too
                parameter.data = parameter.data.to(DTYPES[precision])
