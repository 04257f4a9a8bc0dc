"""SAM's ViT image encoder (§4.2), with four outputs: after each quarter of the layers.

Source: "Segment Anything", Kirillov et al. 2023, github.com/facebookresearch/segment-anything
(Apache-2.0). Modules have the names of the official checkpoint. It is the same function (the tests
compare), without the neck, and on any grid, not only square grids.

In the comments: B images of h x w tokens of width C; n heads of width d; w' windows.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import fast
from files import foundations
from files.weights import read_tensors
from layers import init_linears, relative_positions, resample_positions, window_partition, window_unpartition

MEAN = (123.675, 116.28, 103.53)         # SAM's preprocessing: ImageNet's, for values from 0 to 255
STD = (58.395, 57.12, 57.375)
SIZES = {
    #         dim   depth heads window grid
    "vit_b": (768,  12,   12,   14,    64),   # grid: side of the position table; 64: 1024 px images
    "vit_l": (1024, 24,   16,   14,    64),
    "vit_h": (1280, 32,   16,   14,    64),
    "small": (96,   4,    4,    8,     16),                 # configs/custom.yaml
    "demo":  (64,   4,    4,    4,     8),                  # configs/demo.yaml
}


class Attention(nn.Module):
    """Self-attention with decomposed relative positions, over the grid (window 0) or in windows."""

    def __init__(self, dim: int, heads: int, window: int, size: int):
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))

    @fast.replaced_by(fast.sam_attention)
    def forward(self, x: Tensor) -> Tensor:                 # (B, h, w, C)
        # SAM does not mask the padding of a window: `qkv` turns zeros into its bias, so the bias is
        # key and value of a padded position in the softmax. The weights were trained that way.
        if self.window:
            return window_unpartition(self.attend(window_partition(x, self.window)), *x.shape[1:3])
        return self.attend(x)

    def attend(self, x: Tensor) -> Tensor:
        """softmax(q.k / sqrt(d) + q.Rh[y - y'] + q.Rw[x - x']) v for all pairs of (B, h, w, C)."""
        B, h, w, C = x.shape
        qkv = self.qkv(x).view(B, h * w, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                # (B, n, h w, d)
        at = q.unflatten(2, (h, w))
        by_row = torch.einsum("bnhwd,hkd->bnhwk", at, relative_positions(self.rel_pos_h, h))
        by_column = torch.einsum("bnhwd,wkd->bnhwk", at, relative_positions(self.rel_pos_w, w))
        distance = by_row.unsqueeze(-1) + by_column.unsqueeze(-2)       # (B, n, h, w, h, w)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + distance.flatten(4).flatten(2, 3)
        x = logits.softmax(-1) @ v                          # (B, n, h w, d)
        return self.proj(x.transpose(1, 2).reshape(B, h, w, C))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, size: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, window, size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:                 # (B, h, w, C)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 16, stride=16)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).permute(0, 2, 3, 1).contiguous()      # (B, h, w, C), also in memory


class SAMViT(nn.Module):
    """The image encoder without its neck; the defaults are ViT-L's. `depth` is a multiple of 4."""

    def __init__(self, dim: int = 1024, depth: int = 24, heads: int = 16, window: int = 14,
                 grid: int = 64):
        super().__init__()
        self.dim, self.depth = dim, depth
        self.content = ""                     # hash of the file's tensors, see files/foundations.py
        self.patch_embed = PatchEmbed(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        self.blocks = nn.ModuleList()
        for i in range(depth):
            wide = (i + 1) % (depth // 4) == 0              # the last of a quarter is global
            self.blocks.append(Block(dim, heads, 0 if wide else window, grid if wide else window))
        for name, values in (("mean", MEAN), ("std", STD)):       # not in the file, so never "meta"
            value = torch.tensor(values, device="cpu").view(3, 1, 1) / 255
            self.register_buffer(name, value, persistent=False)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)     # relative positions start at zero
        init_linears(self)

    def normalize(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def embed(self, image: Tensor) -> Tensor:
        """RGB in [0, 1], (B, 3, H, W) -> patch tokens with absolute positions, (B, h, w, C)."""
        x = self.patch_embed(self.normalize(image))
        return x + resample_positions(self.pos_embed[0], *x.shape[1:3])

    def layer(self, i: int, x: Tensor) -> Tensor:
        """Layer i of `depth`: (B, h, w, C) -> (B, h, w, C)."""
        return self.blocks[i](x)

    def forward(self, image: Tensor) -> list[Tensor]:
        """RGB in [0, 1], (B, 3, H, W) -> the output of each quarter of the layers: 4 (B, h, w, C).

        For tests and benchmarks: `SCHNet.forward_features` runs the layers itself.
        """
        x, outs = self.embed(image), []
        for i in range(self.depth):
            x = self.layer(i, x)
            if (i + 1) % (self.depth // 4) == 0:
                outs.append(x)
        return outs


def load_sam(path: str | Path, size: str = "vit_l") -> SAMViT:
    """SAM's image encoder in fp32, from a file or folder in any format of files/foundations.py.
    `size`: a name in SIZES. Raises `UserError`."""
    with torch.device("meta"):                              # skips the random initialisation
        sam = SAMViT(*SIZES[size])
    foundations.load(sam, foundations.sam_tensors(read_tensors(path)), path, f"sam={size}")
    sam.content = foundations.content_hash(sam.state_dict())
    return sam
