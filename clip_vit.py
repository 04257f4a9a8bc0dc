"""CLIP ViT-B/16: the image tower with taps, and the text tower.

Paper §3.1, §4.2. Reference: github.com/openai/CLIP (MIT). Modules have the names of the official
file; smaller sizes are for training from scratch. Different from the reference: images of any
size (the position table is resampled); the raw outputs of the blocks `taps` are returned.

Shapes: B images of H x W pixels, h = H/16, w = W/16, N tokens, D width, K texts, E output width.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from files import foundations
from files.weights import read_tensors
from layers import resample_positions
from tokenizer import CONTEXT, VOCAB_SIZE

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIZES = {
    #           dim  depth heads grid embed | text: dim  depth heads
    "vit_b16": (768, 12,   12,   14,  512,          512, 12,   8),    # grid: side of position table
    "small":   (64,  4,    2,    16,  64,           64,  2,    2),     # embed: width of the outputs
    "demo":    (32,  4,    2,    8,   64,           64,  2,    2),
}


class QuickGELU(nn.Module):
    """OpenAI's CLIP was trained with this; the exact GELU in its place silently loses accuracy."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)       # (B, N, 3D)
        qkv = qkv.unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                # (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)   # softmax(q k^T / sqrt(d)) v
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}    # OpenAI's; LAION's and DataComp's


class MLP(nn.Module):
    def __init__(self, dim: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.gelu = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, dim: int, heads: int, activation: str):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.ln_1 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, activation)
        self.ln_2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:       # (B, N, D)
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, activation: str):
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(dim, heads, activation) for _ in range(depth))
        for block in self.resblocks:              # CLIP's initialisation; attention biases are zero
            nn.init.normal_(block.attn.in_proj_weight, std=dim**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * depth * dim) ** -0.5)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * depth * dim) ** -0.5)


class VisionTransformer(nn.Module):
    """The image tower; `taps` are 0-based numbers of blocks whose raw outputs are returned."""

    def __init__(self, dim: int, depth: int, heads: int, grid: int, embed: int,
                 taps: tuple[int, ...], activation: str):
        super().__init__()
        self.dim, self.depth, self.grid = dim, depth, grid
        self.taps, self.activation = tuple(taps), activation
        self.content = ""                     # hash of the file's tensors, see files/foundations.py
        scale = dim**-0.5
        self.conv1 = nn.Conv2d(3, dim, 16, stride=16, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(dim))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + grid**2, dim))
        self.ln_pre = nn.LayerNorm(dim)
        self.transformer = Transformer(dim, depth, heads, activation)
        self.ln_post = nn.LayerNorm(dim)
        self.proj = nn.Parameter(scale * torch.randn(dim, embed))
        for name, values in (("mean", MEAN), ("std", STD)):
            value = torch.tensor(values, device="cpu").view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """RGB in [0, 1], (B, 3, H, W) -> class embedding (B, E), unit length; taps (B, h, w, D)."""
        x = self.embed(image)
        B, h, w, D = x.shape
        cls = self.ln_pre(self.class_embedding + self.positional_embedding[0])
        x = torch.cat([cls.expand(B, 1, D), x.flatten(1, 2)], dim=1)    # (B, 1 + hw, D)
        taps = []
        for n, block in enumerate(self.transformer.resblocks):
            x = block(x)
            if n in self.taps:           # contiguous: nn.Linear is slow on a 4-D tensor that is not
                taps.append(x[:, 1:].unflatten(1, (h, w)).contiguous())
        f_cls = self.ln_post(x[:, 0]) @ self.proj
        return F.normalize(f_cls, dim=-1), taps

    @property
    def patch_embed(self) -> nn.Conv2d:
        """The name of SAM's."""
        return self.conv1

    def normalize(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def embed(self, image: Tensor) -> Tensor:
        """Input of the first block without the class token: (B, 3, H, W) -> (B, h, w, D)."""
        x = self.conv1(self.normalize(image)).permute(0, 2, 3, 1)       # (B, h, w, D)
        table = self.positional_embedding[1:].unflatten(0, (self.grid, self.grid))
        return self.ln_pre(x + resample_positions(table, *x.shape[1:3]))

    def layer(self, i: int, x: Tensor) -> Tensor:
        """Block i on patch tokens alone: (B, h, w, D) -> (B, h, w, D)."""
        return self.transformer.resblocks[i](x.flatten(1, 2)).view_as(x)


class CLIP(nn.Module):
    """Both towers; the defaults are ViT-B/16's."""

    def __init__(self, dim: int = 768, depth: int = 12, heads: int = 12, grid: int = 14,
                 embed: int = 512, text_dim: int = 512, text_depth: int = 12, text_heads: int = 8,
                 taps: tuple[int, ...] = (3, 5, 7, 11), activation: str = "quick_gelu"):
        super().__init__()
        self.visual = VisionTransformer(dim, depth, heads, grid, embed, taps, activation)
        self.transformer = Transformer(text_dim, text_depth, text_heads, activation)
        self.token_embedding = nn.Embedding(VOCAB_SIZE, text_dim)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(CONTEXT, text_dim))
        self.ln_final = nn.LayerNorm(text_dim)
        self.text_projection = nn.Parameter(text_dim**-0.5 * torch.randn(text_dim, embed))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))    # ln 100 after training
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """`tokens` (K, 77) of `tokenizer.tokenize` -> (K, E) of unit length."""
        end = tokens.argmax(dim=1)                          # the end token has the largest id
        tokens = tokens[:, :int(end.max()) + 1]  # causal: tokens after the end token have no effect
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        x = x[torch.arange(len(x), device=x.device), end]   # (K, text D)
        return F.normalize(self.ln_final(x) @ self.text_projection, dim=-1)


def load_clip(path: str | Path, taps: tuple[int, ...] = (3, 5, 7, 11), size: str = "vit_b16",
              activation: str = "") -> CLIP:
    """CLIP in fp32, from a file or folder in any format of files/foundations.py.

    `size`: a name in SIZES. `activation`: "quick_gelu" or "gelu"; "": read from the config beside
    the file; OpenAI's archive is known to have "quick_gelu". Raises `UserError`.
    """
    tensors = read_tensors(path)
    activation = activation or foundations.clip_activation(path, tensors)
    if activation not in ACTIVATIONS:
        raise UserError(f"{path}: the activation of this CLIP is unknown: set "
                        "clip_activation=quick_gelu for OpenAI's, gelu for LAION's or DataComp's")
    with torch.device("meta"):                              # skips the random initialisation
        clip = CLIP(*SIZES[size], taps, activation)
    foundations.load(clip, foundations.clip_tensors(tensors), path, f"clip={size}")
    clip.visual.content = foundations.content_hash(clip.visual.state_dict())
    return clip
