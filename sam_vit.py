"""SAM's ViT image encoder (§4.2) at any size, with four outputs: after each quarter of the layers (ViT-L: 6 12 18 24).

Source: "Segment Anything", Kirillov et al. 2023, https://github.com/facebookresearch/segment-anything (Apache-2.0).
Module and parameter names are the official checkpoint's, so that loading it is one strict call. It is the same function
(the tests compare); what differs:
  * no neck: SCHNet reads the outputs of the blocks;
  * any grid, not only square ones: the absolute table is resampled bicubically, the relative ones by SAM's linear rule;
  * the padding of windows is not projected: the official code pads with zeros before `qkv`, so that a padded position's
    key and value are the bias of `qkv`. Here they are filled in, and there are no padded queries;
  * the relative positions are part of a dot product where that is faster (`relative_terms`).

In the comments: B images of h x w tokens of width C; n heads of width d; windows of H x W keys, or the whole grid.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from files import weights
from linear import Linear

MEAN = (123.675, 116.28, 103.53)                           # SAM's preprocessing: ImageNet's, for values from 0 to 255
STD = (58.395, 57.12, 57.375)
PIECE = 4 << 20                                            # bytes of logits at a time on a CPU
UNUSED = ("neck.", "prompt_encoder.", "mask_decoder.")      # what the official file holds besides


def resample_absolute(table: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Absolute positions (1, H, W, C) at a grid of h x w: bicubic without antialiasing, as ViT-Adapter does."""
    if table.shape[1:3] == (h, w):
        return table
    return F.interpolate(table.permute(0, 3, 1, 2), (h, w), mode="bicubic").permute(0, 2, 3, 1)


def expand_relative(table: torch.Tensor, size: int) -> torch.Tensor:
    """Relative positions (L, d) as (size, size, d): the entry of query i and key j is that of distance i - j.

    SAM's rule: a table of another length than 2 size - 1 is resampled as a whole, linearly.
    """
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.t()[None], 2 * size - 1, mode="linear")[0].t()
    steps = torch.arange(size, device=table.device)
    return table[steps[:, None] - steps + size - 1]


class Kept:
    """`rule(*tables, *key)`, remembered for each key as long as the tables are frozen and unchanged.

    With trained tables it is computed at every call, so that their gradient arrives and no value is stale.
    """

    def __init__(self, rule: Callable) -> None:
        self.rule = rule
        self.state, self.tables = None, None
        self.results = {}

    def __call__(self, tables: tuple[torch.Tensor, ...], *key):
        if any(table.requires_grad for table in tables) or torch.compiler.is_compiling():
            return self.rule(*tables, *key)
        state = [(t.data_ptr(), t.dtype, t.device, None if t.is_inference() else t._version) for t in tables]
        if state != self.state:
            self.state, self.results = state, {}
            self.tables = [table.detach() for table in tables]          # held: no other tensor can get their address
        if key not in self.results:
            with torch.inference_mode(False), torch.no_grad():          # what an evaluation keeps, training may use
                self.results[key] = self.rule(*self.tables, *key)
        return self.results[key]


def relative_terms(rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor, H: int, W: int, dtype: torch.dtype,
                   device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What H x W keys need: rows (H, H, d), columns (W, W', d), and place (H W, H + W') or None.

    The logit of query (y, x) and key (y', x') is q.k / sqrt(d) + q.rows[y, y'] + q.columns[x, x']. That is q'.k' with
        q' = [q / sqrt(d), q.rows[y, 0], q.rows[y, 1], ..., q.columns[x, 0], ...]
        k' = [k, one-hot of y', one-hot of x'],
    which needs no array over all pairs: a GPU's fused kernels run and memory is linear in the tokens. `place` holds the
    one-hots; W' - W zeros make q' a multiple of 32 wide. On a CPU it is faster in bf16 (900 tokens: 11 ms, not 39) but
    not in fp32 (34 ms, not 28; 4096 tokens: 1000, not 550), so that there the terms are added to the logits.
    """
    rows, columns = (expand_relative(*p).to(device, dtype) for p in ((rel_pos_h, H), (rel_pos_w, W)))
    if device.type == "cpu" and dtype == torch.float32:
        return rows, columns, None
    columns = F.pad(columns, (0, 0, 0, -(rows.shape[-1] + H + W) % 32))
    places = torch.arange(H * W, device=device)
    place = torch.cat([F.one_hot(places // W, H), F.one_hot(places % W, columns.shape[1])], 1)
    return rows, columns, place.to(dtype)


def spans(size: int, window: int) -> list[int]:
    """The lengths of what whole windows cover and of the rest."""
    return [length for length in (size // window * window, size % window) if length]


def fill(x: torch.Tensor, padding: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Windows filled up to H x W with the padding's key or value: (B, y, h, x, w, n, d) -> (B, y, x, n, H W, d)."""
    for dim, missing in ((2, H - x.shape[2]), (4, W - x.shape[4])):
        if missing:
            x = torch.cat([x, padding.expand(*x.shape[:dim], missing, *x.shape[dim + 1:])], dim)
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def pieces(size: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, size, step)]


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, by_row: torch.Tensor | None = None,
                      by_column: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q.k + by_row + by_column) v for a CPU: q (..., h, w, D), k and v (..., H W, D), by_row (..., h, w, H).

    Some heads and at most a window's number of queries at a time, so that their logits stay in the cache: memory is
    linear in the tokens, and 4096 of them take less than half of the time that all heads at once take.
    """
    *_, h, w, _ = shape = q.shape
    q, k, v = q.flatten(0, -4), k.flatten(0, -3).transpose(-1, -2), v.flatten(0, -3)     # G windows times heads
    if by_row is not None:
        by_row, by_column = by_row.flatten(0, -4).unsqueeze(-1), by_column.flatten(0, -4).unsqueeze(-2)

    def attend(heads: slice, rows: slice) -> torch.Tensor:
        logits = q[heads, rows].flatten(1, 2) @ k[heads]
        if by_row is not None:
            pairs = logits.view(*q[heads, rows].shape[:3], by_row.shape[3], by_column.shape[4])
            pairs += by_row[heads, rows]
            pairs += by_column[heads, rows]
        return logits.softmax(-1) @ v[heads]

    rows = max(1, 196 // w)
    heads = max(1, PIECE // (min(rows, h) * w * k.shape[-1] * q.element_size()))
    groups = [slice(None)] if torch.compiler.is_compiling() else pieces(len(q), heads)   # any batch may follow
    x = torch.cat([torch.cat([attend(some, part) for part in pieces(h, rows)], 1) for some in groups])
    return x.view(*shape[:-1], -1)


def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q.k) v for a GPU: q (..., h, w, D), k (..., H W, D), v (..., H W, d); one kernel, for equal widths."""
    d, v = v.shape[-1], F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    x = F.scaled_dot_product_attention(*(t.flatten(0, -4) for t in (q.flatten(-3, -2), k, v)), scale=1.0)
    return x[..., :d].reshape(*q.shape[:-1], d)


class Attention(nn.Module):
    """Self-attention with decomposed relative positions, over the whole grid (window 0) or in windows."""

    def __init__(self, dim: int, heads: int, window: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))
        self.relative_terms = Kept(relative_terms)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, h, w, C) -> (B, h, w, C). Whole windows make one piece, those that an edge cuts up to three more."""
        H, W = (self.window, self.window) if self.window else x.shape[1:3]
        bands = self.qkv(x).split(spans(x.shape[1], H), 1)
        bands = [[self.attend(piece, H, W) for piece in band.split(spans(x.shape[2], W), 2)] for band in bands]
        return self.proj(torch.cat([torch.cat(band, 2) for band in bands], 1))

    def attend(self, qkv: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """y x windows of H x W keys, of which the first h x w are tokens: (B, y h, x w, 3C) -> (B, y h, x w, C)."""
        h, w = min(H, qkv.shape[1]), min(W, qkv.shape[2])
        q, k, v = qkv.unflatten(3, (3, self.heads, -1)).unflatten(2, (-1, w)).unflatten(1, (-1, h)).unbind(5)
        bias = self.qkv.bias.to(q.dtype).view(3, self.heads, -1)                # what `qkv` makes of SAM's zero padding
        k, v = fill(k, bias[1], H, W), fill(v, bias[2], H, W)                   # (B, y, x, n, H W, d)
        rows, columns, place = self.relative_terms((self.rel_pos_h, self.rel_pos_w), H, W, q.dtype, q.device)
        by_row = torch.einsum("byhxwnd,hkd->byxnhwk", q, rows[:h])              # (B, y, x, n, h, w, H)
        by_column = torch.einsum("byhxwnd,wkd->byxnhwk", q, columns[:w])
        q = q.permute(0, 1, 3, 5, 2, 4, 6) * q.shape[-1] ** -0.5                # (B, y, x, n, h, w, d)
        if place is None:
            x = softmax_attention(q, k, v, by_row, by_column)
        else:
            q = torch.cat([q, by_row, by_column], -1)
            k = torch.cat([k, place.expand(*k.shape[:-1], -1)], -1)
            x = (softmax_attention if q.device.type == "cpu" else fused_attention)(q, k, v)
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = Linear(dim, hidden)
        self.lin2 = Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float, window: int, size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, window, size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.proj(image).permute(0, 2, 3, 1).contiguous()       # or every sum to come inherits (B, C, h, w)


class SAMViT(nn.Module):
    """The image encoder without its neck; the defaults are ViT-L's at 1024 x 1024."""

    def __init__(self, dim: int = 1024, depth: int = 24, heads: int = 16, window: int = 14, grid: int = 64,
                 patch: int = 16, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if depth % 4 or dim % heads:
            raise ValueError(f"SAM: depth {depth} must be a multiple of 4 and dim {dim} of heads {heads}")
        self.patch_embed = PatchEmbed(dim, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        self.stage = depth // 4                                         # layers before each of the four outputs
        self.blocks = nn.ModuleList()
        for i in range(depth):
            wide = (i + 1) % self.stage == 0                            # the last block of a stage sees the whole grid
            self.blocks.append(Block(dim, heads, mlp_ratio, 0 if wide else window, grid if wide else window))
        self.positions = Kept(resample_absolute)
        for name, values in (("mean", MEAN), ("std", STD)):             # in no file: real even where the rest is "meta"
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1) / 255, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Random weights for training from scratch, ViT's usual; relative positions start at zero, as SAM's did."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.std

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """RGB in [0, 1], (B, 3, H, W) -> patch tokens with their absolute positions, (B, h, w, C)."""
        x = self.patch_embed(self.normalize(image))
        return x + self.positions((self.pos_embed,), x.shape[1], x.shape[2])

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """RGB in [0, 1], (B, 3, H, W) -> the output of each quarter of the blocks, 4 x (B, h, w, C)."""
        x, outs = self.embed(image), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if (i + 1) % self.stage == 0:
                outs.append(x)
        return outs


def load_sam(path: str) -> SAMViT:
    """SAM ViT-L from the official `sam_vit_l_0b3195.pth` or a file of its image encoder alone, in fp32."""
    tensors = {name.removeprefix("image_encoder."): tensor for name, tensor in weights.read_tensors(path).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(UNUSED)}
    with torch.device("meta"):                             # no time for random weights
        model = SAMViT()
    weights.check_keys(model, tensors, path)
    model.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, assign=True)
    return model
