"""ViT-Adapter: a convolutional pyramid that reads from and writes to a plain vision transformer.

Paper: section 4.2 ("basic structure and network settings provided by ViT-Adapter").
Source: Chen et al., Vision Transformer Adapter for Dense Predictions (arXiv 2205.08534), and
https://github.com/czczup/ViT-Adapter (Apache-2.0), segmentation, the ViT-L + UperNet configuration;
for deformable attention Zhu et al., Deformable DETR (arXiv 2010.04159). Differs from them in:
  - deformable attention is plain PyTorch, no compiled operator;
  - the sizes of the three maps are arguments, not inferred from the number of tokens.

Letters: B batch, h x w the transformer's grid (stride 16), C its width, N = 4hw + hw + hw/4 tokens
of the pyramid (strides 8 16 32), Q queries, S keys, M heads, D width of a head, L levels, P points
per head and level.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from layers import init_linears, resize

Shapes = list[tuple[int, int]]
STAGES = 4


def pyramid(h: int, w: int) -> Shapes:
    """Sizes of the three token maps (strides 8, 16, 32) beside a grid of h x w."""
    return [(2 * h, 2 * w), (h, w), (h // 2, w // 2)]


def cell_centres(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Centres (x, y) in [0, 1] of all cells of the maps, row by row, one map after the other."""
    maps = []
    for h, w in shapes:
        y = (torch.arange(h, device=device, dtype=dtype) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=dtype) + 0.5) / w
        maps.append(torch.stack([x.repeat(h), y.repeat_interleave(w)], dim=-1))
    return torch.cat(maps)                                  # (Q, 2)


def level_sizes(shapes: Shapes, device: torch.device) -> Tensor:
    """(width, height) of each map, (L, 2), filled on the device: a list would force a GPU sync."""
    sides = [torch.full((), side, device=device) for h, w in shapes for side in (w, h)]
    return torch.stack(sides).view(-1, 2)


def ms_deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, zero outside the maps, in fp32 or better as the original.

    value (B, S, M, D); locations (B, Q, M, L, P, 2), (x, y) in [0, 1]; weights (B, Q, M, L, P).
    Returns (B, Q, M * D).
    """
    b, s, m, d = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    grids = 2 * locations.to(dtype) - 1
    grids = grids.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)   # (L, B*M, Q, P, 2)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)            # (B*M, D, S)
    maps = maps.split([h * w for h, w in shapes], dim=-1)
    samples = [F.grid_sample(level.unflatten(-1, shape), grid, align_corners=False)
               for level, shape, grid in zip(maps, shapes, grids)]
    samples = torch.cat(samples, dim=-1)                    # (B*M, D, Q, LP)
    weights = weights.to(dtype).transpose(1, 2).flatten(3).flatten(0, 1).unsqueeze(1)
    out = (samples * weights).sum(-1).view(b, m * d, -1)
    return out.transpose(1, 2).to(value.dtype)


class MSDeformAttn(nn.Module):
    """Each query takes `points` samples per head and level, at offsets in cells of the map."""

    def __init__(self, dim: int, levels: int, heads: int, points: int, ratio: float):
        super().__init__()
        width = int(dim * ratio)
        if not width or width % heads:
            raise UserError(f"deform_ratio ({ratio}) of the encoder's width ({dim}) is {width}, "
                            f"not a multiple of deform_heads ({heads})")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, width)
        self.output_proj = nn.Linear(width, dim)

    def reset_parameters(self):
        """Head m samples along direction m, its point p at p + 1 cells; all weights are equal."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)                  # (M, 2)
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        offsets = direction.view(-1, 1, 1, 2) * steps       # (M, 1, P, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, reference: Tensor, keys: Tensor, shapes: Shapes) -> Tensor:
        """query (B, Q, C), reference (Q, 2), keys (B, S, C) of maps `shapes` -> (B, Q, C)."""
        b, q, _ = query.shape
        grid = (self.heads, self.levels, self.points)
        size = level_sizes(shapes, query.device).unsqueeze(1)           # (L, 1, 2)
        value = self.value_proj(keys).view(b, keys.shape[1], self.heads, -1)          # (B, S, M, D)
        offsets = self.sampling_offsets(query).view(b, q, *grid, 2)     # (B, Q, M, L, P, 2)
        weights = self.attention_weights(query).view(b, q, self.heads, -1).softmax(-1)
        locations = reference.view(1, q, 1, 1, 1, 2) + offsets / size
        return self.output_proj(ms_deform_attn(value, shapes, locations, weights.view(b, q, *grid)))


class Injector(nn.Module):
    """Transformer tokens read from the pyramid; gamma = 0 at first, which is the identity."""

    def __init__(self, dim: int, heads: int, points: int, ratio: float):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn(dim, 3, heads, points, ratio)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, c: Tensor, shapes: Shapes) -> Tensor:
        b, h, w, dim = x.shape
        reference = cell_centres([(h, w)], x.device, torch.promote_types(x.dtype, torch.float32))
        query = self.query_norm(x).view(b, h * w, dim)
        update = self.attn(query, reference, self.feat_norm(c), shapes)
        return x + self.gamma * update.view(b, h, w, dim)


class ConvFFN(nn.Module):
    """Two linear layers and between them a depthwise 3x3 convolution, shared by the three maps."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, c: Tensor, shapes: Shapes) -> Tensor:
        c = self.fc1(c)
        maps = [self.dwconv(part).flatten(2).transpose(1, 2) for part in split_maps(c, shapes)]
        return self.fc2(F.gelu(torch.cat(maps, dim=1)))


class DropPath(nn.Module):
    """In training, drops the residual branch of random samples and scales up the others."""

    def __init__(self, prob: float):
        super().__init__()
        self.prob = prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.prob)
        return x * keep / (1 - self.prob)


class Extractor(nn.Module):
    """The pyramid reads from the tokens, then a convolutional FFN, which alone has DropPath."""

    def __init__(self, dim: int, heads: int, points: int, ratio: float, cffn_ratio: float,
                 drop_path: float):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn(dim, 1, heads, points, ratio)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFFN(dim, max(1, int(dim * cffn_ratio)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, c: Tensor, shapes: Shapes) -> Tensor:
        h, w = x.shape[1:3]
        reference = cell_centres(shapes, x.device, torch.promote_types(x.dtype, torch.float32))
        c = c + self.attn(self.query_norm(c), reference, self.feat_norm(x.flatten(1, 2)), [(h, w)])
        return c + self.drop_path(self.ffn(self.ffn_norm(c), shapes))


def conv_bn_relu(in_dim: int, out_dim: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_dim, out_dim, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_dim), nn.ReLU()]


class SpatialPrior(nn.Module):
    """A small convolutional network: image -> maps at strides 4, 8, 16, 32 with C channels."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.stem = nn.Sequential(*conv_bn_relu(3, width, 2), *conv_bn_relu(width, width, 1),
                                  *conv_bn_relu(width, width, 1), nn.MaxPool2d(3, 2, padding=1))
        self.conv2 = nn.Sequential(*conv_bn_relu(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*conv_bn_relu(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*conv_bn_relu(4 * width, 4 * width, 2))
        self.fc1 = nn.Conv2d(width, dim, 1)
        self.fc2 = nn.Conv2d(2 * width, dim, 1)
        self.fc3 = nn.Conv2d(4 * width, dim, 1)
        self.fc4 = nn.Conv2d(4 * width, dim, 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        c1 = self.stem(image.contiguous(memory_format=torch.channels_last))        # like the tokens
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return [self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)]


def split_maps(c: Tensor, shapes: Shapes) -> list[Tensor]:
    """Tokens (B, N, C) of several maps back to one (B, C, h, w) each."""
    parts = c.transpose(1, 2).split([h * w for h, w in shapes], dim=2)
    return [part.reshape(*part.shape[:2], h, w) for part, (h, w) in zip(parts, shapes)]


class ViTAdapter(nn.Module):
    """Four stages of injector and extractor, then f1..f4; the caller runs the transformer."""

    def __init__(self, dim: int, prior_dim: int, heads: int, points: int, deform_ratio: float,
                 cffn_ratio: float, drop_path: float):
        super().__init__()
        self.spm = SpatialPrior(dim, prior_dim)
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.injectors = nn.ModuleList(
            [Injector(dim, heads, points, deform_ratio) for _ in range(STAGES)])
        self.extractors = nn.ModuleList(                    # the last stage has two extra
            [Extractor(dim, heads, points, deform_ratio, cffn_ratio, drop_path)
             for _ in range(STAGES + 2)])
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(dim) for _ in range(4)])
        self.reset_parameters()

    def reset_parameters(self):
        """ViT-Adapter's initialisation: trunc-normal linears, He-normal (fan-out) convolutions."""
        nn.init.normal_(self.level_embed)
        init_linears(self)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()

    def prior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W), normalised, sides in multiples of 32 -> map (B, C, H/4, W/4) and pyramid (B, N, C)."""
        c1, *maps = self.spm(image)
        tokens = [x.flatten(2).transpose(1, 2) + embed for x, embed in zip(maps, self.level_embed)]
        return c1, torch.cat(tokens, dim=1)

    def inject(self, s: int, x: Tensor, c: Tensor) -> Tensor:
        """Stage s: tokens x (B, h, w, C) read from the pyramid c (B, N, C)."""
        return self.injectors[s](x, c, pyramid(*x.shape[1:3]))

    def extract(self, s: int, x: Tensor, c: Tensor) -> Tensor:
        """Stage s: the pyramid c reads from tokens x; three times in the last stage."""
        for extractor in self.extractors[s:] if s == STAGES - 1 else self.extractors[s:s + 1]:
            c = extractor(x, c, pyramid(*x.shape[1:3]))
        return c

    def fuse(self, c1: Tensor, c: Tensor, outs: list[Tensor]) -> list[Tensor]:
        """f1..f4: the pyramid plus the stages' tokens (B, h, w, C), resized to its strides."""
        c2, c3, c4 = split_maps(c, pyramid(*outs[0].shape[1:3]))
        weight = self.up.weight.contiguous(memory_format=torch.channels_last)  # halves the CPU time
        maps = [F.conv_transpose2d(c2, weight, self.up.bias, stride=2) + c1, c2, c3, c4]
        outs = [x.permute(0, 3, 1, 2) for x in outs]
        return [norm(m + resize(x, m.shape[2:])) for norm, m, x in zip(self.norms, maps, outs)]
