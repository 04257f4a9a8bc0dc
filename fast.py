"""Faster versions of plain functions elsewhere in this repository.

    @fast.replaced_by(fast.conv_of_resized)
    def conv_of_resized(maps, weight, size): ...

calls the version in this file while `fast.ENABLED` is true; `SCHNET_FAST=0 python train.py ...` runs the plain ones.
tests/test_fast.py compares each pair, values and gradients; `python benchmarks/bench_fast.py` measures each.
"""

import functools
import os
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from config import IGNORE
from layers import relative_positions, window_partition, window_unpartition

ENABLED = os.environ.get("SCHNET_FAST", "1") != "0"
CPU_STRIP, GPU_STRIP = 2 << 20, 256 << 20                  # bytes of class probabilities at a time


def replaced_by(form, on: tuple[str, ...] = ("cpu", "cuda")):
    """Decorator: replaces a plain function by `form` while ENABLED, on devices `on`."""
    def decorate(plain):
        @functools.wraps(plain)
        def chosen(*args, **kwargs):
            return (form if ENABLED and _device(args) in on else plain)(*args, **kwargs)

        chosen.plain, chosen.fast, chosen.on = plain, form, on
        return chosen
    return decorate


def _device(args: tuple) -> str:
    """Device type of the first tensor (or first tensor of a list) in `args`."""
    first = next(arg for arg in args if isinstance(arg, (Tensor, list)))
    return (first if isinstance(first, Tensor) else first[0]).device.type


# ----------------------------------------------------------------------------------------------------------------------
# sam_vit.Attention.forward: padding is not projected; one fused kernel, no array of biases over the grid

def sam_attention(self, x: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, h, w, C). SAM pads before `qkv`, so that a padded position has the bias of `qkv`."""
    if not self.window:
        return self.proj(_attend(self, self.qkv(x)))
    qkv = window_partition(F.linear(x, self.qkv.weight), self.window)
    windows = _attend(self, qkv + self.qkv.bias.to(qkv.dtype))
    return self.proj(window_unpartition(windows, *x.shape[1:3]).contiguous())        # one product, not one per row


def _attend(self, qkv: Tensor) -> Tensor:
    """Attention within each window or grid: (B, h, w, 3C) -> (B, h, w, C)."""
    B, h, w, _ = qkv.shape
    q, k, v = qkv.reshape(B, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)            # (B, n, h w, d)
    rows, columns, place = _folded_positions(self.rel_pos_h, self.rel_pos_w, h, w, q.dtype)
    by_row = torch.einsum("bnhwd,hkd->bnhwk", q.unflatten(2, (h, w)), rows)
    by_column = torch.einsum("bnhwd,wkd->bnhwk", q.unflatten(2, (h, w)), columns)
    if self.window and qkv.device.type == "cpu":           # few keys: their biases cost less than wider products
        bias = (by_row.unsqueeze(-1) + by_column[..., None, :w]).flatten(4).flatten(2, 3)
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(B, h, w, -1)
    d = q.shape[-1]
    q = torch.cat([q * d ** -0.5, by_row.flatten(2, 3), by_column.flatten(2, 3)], -1)    # (B, n, h w, D)
    k = torch.cat([k, place.expand(B, self.heads, -1, -1)], -1)
    x = F.scaled_dot_product_attention(q, k, F.pad(v, (0, q.shape[-1] - d)), scale=1.0)[..., :d]     # equal widths
    return x.transpose(1, 2).reshape(B, h, w, -1)


def _folded_positions(rel_pos_h: Tensor, rel_pos_w: Tensor, H: int, W: int,
                      dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Position tables for H x W keys: rows (H, H, d), columns (W, W', d), place (H W, H + W').

    The logit of query (y, x) and key (y', x') is q.k / sqrt(d) + q.rows[y, y'] + q.columns[x, x']. That is q'.k' with
        q' = [q / sqrt(d), q.rows[y, 0], q.rows[y, 1], ..., q.columns[x, 0], ...]
        k' = [k, one-hot of y', one-hot of x'],
    and memory stays linear in the tokens. `place` holds the one-hots; W' - W zeros make q' a multiple of 32 wide.
    """
    rows, columns = relative_positions(rel_pos_h, H).to(dtype), relative_positions(rel_pos_w, W).to(dtype)
    columns = F.pad(columns, (0, 0, 0, -(rows.shape[-1] + H + W) % 32))
    of_row = torch.eye(H, dtype=dtype, device=rows.device).repeat_interleave(W, 0)
    of_column = torch.eye(W, columns.shape[1], dtype=dtype, device=rows.device).repeat(H, 1)
    return rows, columns, torch.cat([of_row, of_column], 1)


# ----------------------------------------------------------------------------------------------------------------------
# uperhead.conv_of_resized: resizing and mixing channels commute, so each tap mixes channels on the small map first

def conv_of_resized(maps: list[Tensor], weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w), the first of size `size`; weight (O, sum of C, 3, 3) -> (B, O, *size).

    After mixing, the nine results are resized, shifted and added. That is linear along each axis: one matrix product
    across, then one down for all maps. It takes half of the arithmetic and never builds a map of all channels.
    """
    first, *others = weight.split([x.shape[1] for x in maps], dim=1)
    rows, down = [], []
    for x, taps in zip(maps[1:], others):
        b, _, h, w = x.shape
        across = _shifted_interpolation(w, size[1], x).permute(1, 2, 0).flatten(1)       # (W, 3w)
        tokens = x.permute(0, 2, 3, 1).flatten(0, 2)                                     # (B*h*w, C)
        for k, shifted in enumerate(_shifted_interpolation(h, size[0], x)):              # (H, h)
            mixed = F.linear(tokens, taps[:, :, k].permute(2, 0, 1).flatten(0, 1))       # (B*h*w, 3*O)
            rows.append(across @ mixed.view(b, h, 3 * w, -1))                            # (B, h, W, O)
            down.append(shifted)
    out = torch.cat(down, dim=1) @ torch.cat(rows, dim=1).flatten(2)                     # (B, H, W*O)
    return F.conv2d(maps[0], first, padding=1) + out.unflatten(2, (size[1], -1)).permute(0, 3, 1, 2)


def _shifted_interpolation(n: int, size: int, like: Tensor) -> Tensor:
    """(3, size, n): interpolation of n values at `size` places, as `resize` does, shifted by -1, 0 and +1 with zeros
    outside, as the three taps of a zero-padded convolution read them."""
    eye = torch.eye(n, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    places = F.interpolate(eye[None], size=size, mode="linear", align_corners=False)[0].T        # (size, n)
    places = F.pad(places, (0, 0, 1, 1)).to(like.dtype)
    return torch.stack([places[k:k + size] for k in range(3)])


# ----------------------------------------------------------------------------------------------------------------------
# losses.lovasz_softmax, on a CPU: class by class, so that the data stay in cache, and without a graph

def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, K, H, W), labels (B, H, W) -> scalar. The weights of the errors are constants for the gradient, so the
    cost is linear in the probabilities; absent classes need no sort."""
    probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)       # (B, K, H, W)
    valid, slopes, cost, present = labels != IGNORE, [], probs.new_zeros(()), 0
    with torch.no_grad():
        for c, p in enumerate(probs.unbind(1)):                                          # (B, H, W)
            truth = labels == c
            if not truth.any():
                slopes.append(torch.zeros_like(p))
                continue
            errors = torch.where(truth, 1 - p, p) * valid
            weights = lovasz_weights(errors.flatten(), truth.flatten()).view_as(p) * valid
            slopes.append(torch.where(truth, -weights, weights))
            cost, present = cost + (weights * errors).sum(), present + 1
        slopes = torch.stack(slopes, dim=1)                                              # (B, K, H, W)
    linear = (probs * slopes).sum()                                                      # the cost up to a constant
    return (cost + (linear - linear.detach())) / max(1, present)


# ----------------------------------------------------------------------------------------------------------------------
# losses.lovasz_weights: sorted as integers, in closed form

def lovasz_weights(errors: Tensor, truth: Tensor) -> Tensor:
    """errors (..., N) in [0, 1], truth (..., N) bool -> weight of each error, (..., N).

    Bits of floats >= 0 have the floats' order, and integers sort several times faster on a CPU. In closed form, as
    differences of neighbouring fp32 values lose most of their digits: a pixel of the class takes 1 / union (it leaves
    the intersection), any other intersection / (union * (union - 1)) (it joins the union), both after the step.
    """
    integer = torch.int32 if errors.dtype == torch.float32 else torch.int64
    one = torch.ones_like(errors[..., :1]).view(integer)
    keys, order = ((one - errors.view(integer)) * 2 + truth).sort(-1)                    # largest error first
    hit = (keys & 1).bool()                                # the lowest bit is `truth`, which saves a gather
    intersection = truth.sum(-1, keepdim=True, dtype=torch.int32) - hit.cumsum(-1, dtype=torch.int32)
    union = intersection + torch.arange(1, keys.shape[-1] + 1, dtype=torch.int32, device=keys.device)
    intersection = intersection.to(errors.dtype)
    steps = torch.where(hit, 1, intersection / (union - 1).clamp(min=1)) / union
    return torch.empty_like(errors).scatter_(-1, order, steps)


# ----------------------------------------------------------------------------------------------------------------------
# inference.probabilities and inference.label_map, in strips of rows: memory does not grow with the photo

def strips(logits: list[Tensor], size: tuple[int, int],
           merge: Sequence[Sequence[int]] | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, probabilities (K, rows, W)) of a photo (H, W), from top to bottom.

    Rows are interpolated by hand: F.interpolate on a cut-out strip would differ at its edges.
    """
    (height, width), device = size, logits[0].device
    limit = CPU_STRIP if device.type == "cpu" else GPU_STRIP
    step = max(1, limit // (4 * width * logits[0].shape[0]))
    for top in range(0, height, step):
        rows, total = slice(top, min(top + step, height)), 0
        for view in logits:
            h = view.shape[1]
            y = ((torch.arange(rows.start, rows.stop, device=device) + 0.5) * (h / height) - 0.5).clamp(0, h - 1)
            above = y.floor().long()
            strip = torch.lerp(view[:, above], view[:, (above + 1).clamp(max=h - 1)], (y - above)[:, None])
            strip = F.interpolate(strip[None], (len(y), width), mode="bilinear", align_corners=False)[0]
            total = total + strip.softmax(0)
        total = total / len(logits)
        yield rows, total if merge is None else torch.stack([total[list(sources)].sum(0) for sources in merge])


def probabilities(logits: list[Tensor], size: tuple[int, int], merge: Sequence[Sequence[int]] | None = None) -> Tensor:
    """As inference.probabilities: (K, H, W)."""
    result = logits[0].new_empty(len(logits[0] if merge is None else merge), *size)
    for rows, strip in strips(logits, size, merge):
        result[:, rows] = strip
    return result


def label_map(logits: list[Tensor], size: tuple[int, int], merge: Sequence[Sequence[int]] | None = None) -> Tensor:
    """As inference.label_map: (H, W) uint8 on the CPU."""
    label = torch.empty(size, dtype=torch.uint8)           # preallocated: many small parts would fragment memory
    for rows, strip in strips(logits, size, merge):
        label[rows] = strip.max(0).indices.byte().cpu()    # argmax(0) is 4x slower on a CPU
    return label
