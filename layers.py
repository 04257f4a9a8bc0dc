"""What the network files share: resizing, positions, the start of new layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


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
    """(width, height) of each map, (L, 2). Filled in on the device: copying a list there would wait for a GPU."""
    return torch.stack([torch.full((), side, device=device) for h, w in shapes for side in (w, h)]).view(-1, 2)


def init_linears(module: nn.Module):
    """ViT's start of new linear layers: truncated normal of 0.02, no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
