"""A stand-in for the paper's baseline, ViT-Adapter-L with UperNet, in the official form and at its real size.

ViT-Adapter's code needs mmsegmentation and a compiled operator. This computes what it does (Chen et al., arXiv
2205.08534, the ViT-L + UperNet configuration with windows of 14) in the same way: plain linear layers and NCHW
convolutions, windows padded after `qkv`, deformable attention by one grid_sample per level in fp32 (transformers'
Deformable DETR), every map at its full size, UperNet from transformers. It is faster than the official code in one
place: attention is the fused call, not an explicit softmax. Parameters have SCHNet's names, so that it takes its
weights.
"""

import peers  # noqa: F401                                 torchvision beside a CPU-only torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
from transformers.models.upernet.modeling_upernet import UperNetHead

DIM, DEPTH, HEADS, WINDOW = 1024, 24, 16, 14


class Attention(nn.Module):
    def __init__(self, window: int):
        super().__init__()
        self.window = window
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        b, s = len(x), self.window or h
        t = self.window or w
        qkv = self.qkv(x).view(b, h, w, -1)
        qkv = F.pad(qkv, (0, 0, 0, -w % t, 0, -h % s))
        rows, columns = qkv.shape[1] // s, qkv.shape[2] // t
        qkv = qkv.view(b, rows, s, columns, t, 3, HEADS, -1).permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3)
        x = F.scaled_dot_product_attention(*qkv)                                         # (windows, heads, s t, d)
        x = x.view(b, rows, columns, HEADS, s, t, -1).permute(0, 1, 4, 2, 5, 3, 6).reshape(b, rows * s, columns * t, -1)
        return self.proj(x[:, :h, :w].reshape(b, h * w, -1))


class Block(nn.Module):
    def __init__(self, window: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attn = Attention(window)
        self.mlp = nn.ModuleDict({"lin1": nn.Linear(DIM, 4 * DIM), "lin2": nn.Linear(4 * DIM, DIM)})

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = x + self.attn(self.norm1(x), h, w)
        return x + self.mlp["lin2"](F.gelu(self.mlp["lin1"](self.norm2(x))))


class DeformableAttention(nn.Module):
    def __init__(self, levels: int, points: int = 4):
        super().__init__()
        self.grid = (HEADS, levels, points)
        self.sampling_offsets = nn.Linear(DIM, HEADS * levels * points * 2)
        self.attention_weights = nn.Linear(DIM, HEADS * levels * points)
        self.value_proj, self.output_proj = nn.Linear(DIM, DIM // 2), nn.Linear(DIM // 2, DIM)
        self.core = MultiScaleDeformableAttention()

    def forward(self, query: Tensor, reference: Tensor, keys: Tensor, shapes: list) -> Tensor:
        b, q, _ = query.shape
        value = self.value_proj(keys).view(b, keys.shape[1], HEADS, -1)
        offsets = self.sampling_offsets(query).view(b, q, *self.grid, 2)
        weights = self.attention_weights(query).view(b, q, HEADS, -1).softmax(-1).view(b, q, *self.grid)
        sizes = torch.tensor([(w, h) for h, w in shapes], device=query.device)
        places = reference.view(1, q, 1, 1, 1, 2) + offsets / sizes.view(-1, 1, 2)
        out = self.core(value.float(), None, shapes, None, places.float(), weights.float(), 64)
        return self.output_proj(out)


class Injector(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attn = DeformableAttention(3)
        self.gamma = nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor, c: Tensor, shapes: list) -> Tensor:
        return x + self.gamma * self.attn(self.query_norm(x), centres(shapes[1:2], x), self.feat_norm(c), shapes)


class Extractor(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.ffn_norm = nn.LayerNorm(DIM, eps=1e-6)
        self.attn = DeformableAttention(1)
        self.ffn = nn.ModuleDict({"fc1": nn.Linear(DIM, DIM // 4), "fc2": nn.Linear(DIM // 4, DIM),
                                  "dwconv": nn.Conv2d(DIM // 4, DIM // 4, 3, padding=1, groups=DIM // 4)})

    def forward(self, x: Tensor, c: Tensor, shapes: list) -> Tensor:
        c = c + self.attn(self.query_norm(c), centres(shapes, x), self.feat_norm(x), shapes[1:2])
        maps = [self.ffn["dwconv"](part).flatten(2) for part in split(self.ffn["fc1"](self.ffn_norm(c)), shapes)]
        return c + self.ffn["fc2"](F.gelu(torch.cat(maps, 2).transpose(1, 2)))


def centres(shapes: list, like: Tensor) -> Tensor:
    grids = [torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij") for h, w in shapes]
    return torch.cat([torch.stack([x, y], -1).view(-1, 2) for y, x in grids]).to(like.device)


def split(c: Tensor, shapes: list) -> list[Tensor]:
    parts = c.split([h * w for h, w in shapes], 1)
    return [part.transpose(1, 2).reshape(len(c), -1, h, w) for part, (h, w) in zip(parts, shapes)]


def prior(width: int = 64) -> nn.ModuleDict:
    def conv(a, b, stride):
        return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.ModuleDict({
        "stem": nn.Sequential(*conv(3, width, 2), *conv(width, width, 1), *conv(width, width, 1),
                              nn.MaxPool2d(3, 2, 1)),
        "conv2": nn.Sequential(*conv(width, 2 * width, 2)), "conv3": nn.Sequential(*conv(2 * width, 4 * width, 2)),
        "conv4": nn.Sequential(*conv(4 * width, 4 * width, 2)), "fc1": nn.Conv2d(width, DIM, 1),
        "fc2": nn.Conv2d(2 * width, DIM, 1), "fc3": nn.Conv2d(4 * width, DIM, 1), "fc4": nn.Conv2d(4 * width, DIM, 1)})


class ViTAdapterUperNet(nn.Module):
    """Normalised image (B, 3, H, W) -> logits (B, K, H, W); `grid`: h and w of the position table and the image."""

    def __init__(self, classes: int, grid: tuple[int, int]):
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, 16, 16)
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, DIM))
        self.blocks = nn.ModuleList(Block(0 if n % 6 == 5 else WINDOW) for n in range(DEPTH))
        self.adapter = nn.ModuleDict({
            "spm": prior(), "injectors": nn.ModuleList(Injector() for _ in range(4)),
            "extractors": nn.ModuleList(Extractor() for _ in range(6)), "up": nn.ConvTranspose2d(DIM, DIM, 2, 2),
            "norms": nn.ModuleList(nn.BatchNorm2d(DIM) for _ in range(4))})
        self.level_embed = nn.Parameter(torch.zeros(3, DIM))
        self.head = UperNetHead(UperNetConfig(hidden_size=512, num_labels=classes), [DIM] * 4)

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[2] // 16, image.shape[3] // 16
        shapes = [(2 * h, 2 * w), (h, w), (h // 2, w // 2)]
        c1, c = self.pyramid(image)
        x = (self.patch(image).permute(0, 2, 3, 1) + self.pos_embed).flatten(1, 2)
        outs = []
        for stage in range(4):
            x = self.adapter["injectors"][stage](x, c, shapes)
            for block in self.blocks[6 * stage:6 * stage + 6]:
                x = block(x, h, w)
            for extractor in self.adapter["extractors"][stage:stage + 1 if stage < 3 else 6]:
                c = extractor(x, c, shapes)
            outs.append(x.transpose(1, 2).reshape(len(x), DIM, h, w))
        c2, c3, c4 = split(c, shapes)
        maps = [self.adapter["up"](c2) + c1, c2, c3, c4]
        maps = [norm(m + F.interpolate(x, m.shape[2:], mode="bilinear", align_corners=False))
                for norm, m, x in zip(self.adapter["norms"], maps, outs)]
        return F.interpolate(self.head(maps), image.shape[2:], mode="bilinear", align_corners=False)

    def pyramid(self, image: Tensor) -> tuple[Tensor, Tensor]:
        spm = self.adapter["spm"]
        c1 = spm["stem"](image)
        c2 = spm["conv2"](c1)
        c3 = spm["conv3"](c2)
        maps = [spm["fc2"](c2), spm["fc3"](c3), spm["fc4"](spm["conv4"](c3))]
        return spm["fc1"](c1), torch.cat([m.flatten(2).transpose(1, 2) + e for m, e in zip(maps, self.level_embed)], 1)


def from_schnet(state: dict[str, Tensor], classes: int, pos_embed: Tensor) -> ViTAdapterUperNet:
    """The baseline with the weights of an untrained SCHNet, whose relative positions and qkv biases are zero."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("sam.") and "rel_pos" not in name:
            renamed[name.removeprefix("sam.").replace("patch_embed.proj", "patch")] = tensor
        elif name.startswith("adapter."):
            renamed[name.replace("adapter.level_embed", "level_embed")] = tensor
        elif name.startswith("head."):
            renamed[name.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier")] = tensor
    renamed["pos_embed"] = pos_embed
    with torch.device("meta"):
        model = ViTAdapterUperNet(classes, pos_embed.shape[1:3])
    model.load_state_dict(renamed, assign=True)
    return model.eval().requires_grad_(False)
