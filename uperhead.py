"""UperNet's head and the auxiliary FCN head.

Paper: section 4.2. Source: Xiao et al., Unified Perceptual Parsing (arXiv 1807.10221), in the form
of mmsegmentation's UPerHead and FCNHead (https://github.com/open-mmlab/mmsegmentation, Apache-2.0),
whose parameter names are kept.

Letters: B batch, K classes, O channels out, f1..f4 the adapter's maps at strides 4, 8, 16, 32.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import fast
from layers import resize

POOL_SIDES = (1, 2, 3, 6)


class ConvModule(nn.Module):
    """Convolution, BatchNorm, ReLU; on channels-last maps, preferred by tensor cores and bf16."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x.contiguous(memory_format=torch.channels_last))))


def classifier(in_dim: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_dim, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


@fast.replaced_by(fast.conv_of_resized)
def conv_of_resized(maps: list[Tensor], weight: Tensor, size: tuple[int, int]) -> Tensor:
    """3x3 convolution of the maps (B, C, h, w) resized to `size`, which the first has, and joined.

    weight (O, sum of C, 3, 3) -> (B, O, *size).
    """
    return F.conv2d(torch.cat([resize(x, size) for x in maps], dim=1), weight, padding=1)


class UPerHead(nn.Module):
    """Pyramid pooling on f4, top-down pathway, all four maps fused at stride 4."""

    def __init__(self, in_dim: int, dim: int, num_classes: int, dropout: float):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvModule(in_dim, dim, 1))
             for side in POOL_SIDES])
        self.bottleneck = ConvModule(in_dim + len(POOL_SIDES) * dim, dim, 3)
        self.lateral_convs = nn.ModuleList([ConvModule(in_dim, dim, 1) for _ in range(3)])
        self.fpn_convs = nn.ModuleList([ConvModule(dim, dim, 3) for _ in range(3)])
        self.fpn_bottleneck = ConvModule(4 * dim, dim, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(dim, num_classes)

    def pool(self, f4: Tensor) -> Tensor:
        """Pyramid pooling: joins each cell with averages over the image, 1 x 1 to 6 x 6."""
        context = [resize(module(f4), f4.shape[2:]) for module in self.psp_modules]
        return self.bottleneck(torch.cat([f4, *context], dim=1))

    def forward(self, features: list[Tensor]) -> Tensor:
        """[f1..f4] (B, in_dim, H/4, W/4) .. (B, in_dim, H/32, W/32) -> logits (B, K, H/4, W/4)."""
        maps = [lateral(f) for lateral, f in zip(self.lateral_convs, features)]
        maps.append(self.pool(features[3]))
        for i in (2, 1, 0):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i].shape[2:])
        maps = [conv(m) for conv, m in zip(self.fpn_convs, maps)] + maps[3:]
        fused = conv_of_resized(maps, self.fpn_bottleneck.conv.weight, maps[0].shape[2:])
        fused = F.relu(self.fpn_bottleneck.bn(fused))       # (B, O, H/4, W/4)
        return self.conv_seg(self.dropout(fused))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier on f3, in training only."""

    def __init__(self, in_dim: int, dim: int, num_classes: int, dropout: float):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(in_dim, dim, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(dim, num_classes)

    def forward(self, f3: Tensor) -> Tensor:
        """(B, in_dim, H/16, W/16) -> (B, K, H/16, W/16)."""
        return self.conv_seg(self.dropout(self.convs(f3)))
