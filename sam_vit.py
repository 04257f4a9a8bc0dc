"""SAM's ViT image encoder (§4.2), any input size, four outputs: one after each quarter of the layers (6 12 18 24 of ViT-L).

Source: "Segment Anything", Kirillov et al. 2023, https://github.com/facebookresearch/segment-anything (Apache-2.0); module and
parameter names are the official checkpoint's, so that loading it is one strict call. It computes the same function; differs in:
  * no neck: SCHNet reads the blocks' outputs;
  * any grid, also non-square: the absolute table is resampled bicubically, the relative ones by SAM's own linear rule;
  * padding of the windows is not projected: the official code pads with zeros after norm1, so that a padded position's query,
    key and value are the bias of `qkv`. Here they are filled in, and never become queries of `proj`;
  * the relative positions are part of a dot product (see `Attention`), so that a fused attention kernel runs without a mask.

B images of h x w tokens of width C; d width of a head; N tokens that see each other (h w, or a window's 196).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F



MEAN = (123.675, 116.28, 103.53)                           # ImageNet's, as SAM's preprocessing has them, for values 0..255
STD = (58.395, 57.12, 57.375)
KEYS = "image_encoder."                                    # prefix in the official file
UNUSED = ("image_encoder.neck.", "prompt_encoder.", "mask_decoder.")


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


class Resampled:
    """`rule(table, *grid)`, remembered for each grid as long as the table is frozen and unchanged.

    A trained table is resampled at every call, so that its gradient arrives and its values are never stale.
    """

    def __init__(self, rule) -> None:
        self.rule = rule
        self.source = None                                 # the table that the kept results are of; holding it keeps its
        self.kept = {}                                     # address from being given to another tensor

    def __call__(self, table: torch.Tensor, *grid: int) -> torch.Tensor:
        if table.requires_grad or torch.compiler.is_compiling():
            return self.rule(table, *grid)
        state = (table.data_ptr(), table.dtype, table.device, None if table.is_inference() else table._version)
        if self.source is None or self.source[0] != state:
            self.source = (state, table.detach())
            self.kept = {}
        if grid not in self.kept:
            with torch.inference_mode(False), torch.no_grad():          # training may follow an evaluation
                self.kept[grid] = self.rule(table.detach(), *grid)
        return self.kept[grid]


class Linear(nn.Linear):
    """nn.Linear over (B, h, w, C); in fp32 on a CPU the same as a 1x1 convolution, which oneDNN computes and not MKL.

    Two cores of an AMD Zen 5, 900 tokens, 1024 to 3072: 15 ms instead of 29; 4096 to 1024: 20 instead of 38.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
                and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()):
            return F.conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)
        return F.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Self-attention with decomposed relative positions, over the whole grid (window 0) or in windows.

    The official logit of query (y, x) and key (y', x') is q.k / sqrt(d) + q.Rh[y - y'] + q.Rw[x - x'].
    """

    def __init__(self, dim: int, heads: int, window: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))
        self.rows = Resampled(expand_relative)
        self.columns = Resampled(expand_relative)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, h, w, C) -> (B, h, w, C). Whole windows are one piece; those that the edges cut are up to three more."""
        h, w = x.shape[1:3]
        size = (self.window, self.window) if self.window else (h, w)
        bands = self.qkv(x).split(spans(h, size[0]), 1)
        bands = [[self.attend(piece, *size) for piece in band.split(spans(w, size[1]), 2)] for band in bands]
        return self.proj(torch.cat([torch.cat(band, 2) for band in bands], 1))

    def attend(self, qkv: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """Windows of H x W keys, of which the first (h, w) are tokens and queries: (B, y h, x w, 3C) -> (B, y h, x w, C)."""
        h, w = min(H, qkv.shape[1]), min(W, qkv.shape[2])
        qkv = qkv.unflatten(3, (3, self.heads, -1)).unflatten(2, (-1, w)).unflatten(1, (-1, h))  # (B, y, h, x, w, 3, n, d)
        q, kv = qkv[..., 0, :, :], qkv[..., 1:, :, :]
        if (h, w) != (H, W):                               # SAM pads with zeros before `qkv`: k and v are its bias there
            bias = self.qkv.bias.to(kv.dtype).view(3, self.heads, -1)[1:]
            padded = bias.expand(*kv.shape[:2], H, kv.shape[3], W, -1, -1, -1).clone()
            padded[:, :, :h, :, :w] = kv
            kv = padded
        by_row = torch.einsum("byhxwnd,hkd->byxnhwk", q, self.rows(self.rel_pos_h, H)[:h].to(q.dtype))
        by_column = torch.einsum("byhxwnd,wkd->byxnhwk", q, self.columns(self.rel_pos_w, W)[:w].to(q.dtype))
        q = q.permute(0, 1, 3, 5, 2, 4, 6)                                                  # (B, y, x, n, h, w, d)
        k, v = kv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6)                             # (B, y, x, n, H W, d)
        x = biased_attention(q, k, v, by_row, by_column)
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def spans(size: int, window: int) -> list[int]:
    """Lengths of what whole windows cover and of the rest."""
    return [length for length in (size // window * window, size % window) if length]


def biased_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, by_row: torch.Tensor,
                     by_column: torch.Tensor) -> torch.Tensor:
    """softmax(q.k / sqrt(d) + by_row + by_column) v.

    q (..., h, w, d); k, v (..., H W, d); by_row (..., h, w, H), by_column (..., h, w, W): the terms of a key's row and column.
    With q' = [q / sqrt(d), by_row, by_column] and k' = [k, one-hot of its row, one-hot of its column] the logit is q'.k': no
    array of all pairs is made for it, so that a GPU's fused kernels, which take no such array, can run.
    """
    d, H, W = q.shape[-1], by_row.shape[-1], by_column.shape[-1]
    q = q * d ** -0.5
    fold = q.device.type != "cpu" or q.dtype != torch.float32
    if fold:
        place = torch.arange(H * W, device=k.device)
        place = torch.cat([F.one_hot(place // W, H), F.one_hot(place % W, W)], 1).to(k.dtype)
        q = torch.cat([q, by_row, by_column], -1)
        k = torch.cat([k, place.expand(*k.shape[:-1], -1)], -1)
    if q.device.type != "cpu":
        return fused_attention(q.flatten(-3, -2), k, v).unflatten(-2, q.shape[-3:-1])
    k = k.transpose(-1, -2)
    out = []
    rows = -(-128 // q.shape[-2])
    for q, r, c in zip(q.split(rows, -3), by_row.split(rows, -3), by_column.split(rows, -3)):
        logits = q.flatten(-3, -2) @ k
        if not fold:
            logits.view(*q.shape[:-1], H, W).add_(r[..., None]).add_(c[..., None, :])
        out.append((logits.softmax(-1) @ v).unflatten(-2, q.shape[-3:-1]))
    return torch.cat(out, -3)


def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    spare = -q.shape[-1] % 32
    x = F.scaled_dot_product_attention(*(F.pad(t.flatten(0, -4), (0, q.shape[-1] + spare - t.shape[-1])) for t in (q, k, v)), scale=1.0)
    return x[..., :v.shape[-1]].unflatten(0, q.shape[:-3])


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
        return self.proj(image).permute(0, 2, 3, 1)


class SAMViT(nn.Module):
    """The image encoder without its neck; the defaults are ViT-L's at 1024 x 1024."""

    def __init__(self, dim: int = 1024, depth: int = 24, heads: int = 16, window: int = 14, grid: int = 64, patch: int = 16,
                 mlp_ratio: float = 4.0) -> None:
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
        self.positions = Resampled(resample_absolute)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) / 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) / 255, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Random weights, for training from scratch: ViT's usual ones. Relative positions start at zero, as in SAM's code."""
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
        return x + self.positions(self.pos_embed, x.shape[1], x.shape[2])

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """RGB in [0, 1], (B, 3, H, W) -> the output of each quarter of the blocks, 4 x (B, h, w, C)."""
        x, outs = self.embed(image), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if (i + 1) % self.stage == 0:
                outs.append(x)
        return outs


def load_sam(path: str) -> SAMViT:
    """SAM ViT-L from the official `sam_vit_l_0b3195.pth` or from a file of its image encoder alone, in fp32."""
    import weights
    tensors = weights.read_tensors(path)
    tensors = {k: v for k, v in tensors.items() if not k.startswith(UNUSED)}
    tensors = {k.removeprefix(KEYS): v.float() for k, v in tensors.items()}
    model = SAMViT()
    model.load_state_dict(tensors, strict=True)
    return model
