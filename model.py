"""SCHNet: SAM Marries CLIP for Human Parsing (arXiv 2503.22237), section 3. Read beside Figs. 2-4.

    paper      here       shape          what
    I          image      (B, 3, H, W)   RGB in [0, 1]; each encoder has its own mean and std
    f_cls      f_cls      (B, E)         CLIP's class embedding, unit length, E = 512
    f_txt      f_txt      (K, E)         CLIP's features of the K class names, unit length; fixed
    f_sim      f_sim      (B, K)         how likely each class is in the image
    f_cv^1..4  f_cv[0..3] (B, h, w, D)   CLIP's patch tokens after blocks 3, 5, 7, 11, D = 768
    f_sv^0..4  x          (B, h, w, C)   SAM's tokens, after the patch embedding and after layers
                                         6, 12, 18, 24; C = 1024; afterwards x is SRM's f''_sv
    f_i        f          (B, h, w, C)   SAM's tokens after layer i, from 0 here, 1 in the paper
    T_i        tokens[i]  (m, C)         learnable tokens of layer i, m = 100

h = H/16, w = W/16: one grid for CLIP and SAM, which is why their features can be added.
"MLP" in the paper is one affine map (Eq. 3), so each is an `nn.Linear` here.

SAM and CLIP are frozen, except SAM's patch embedding (§4.3). Gradients still flow through SAM's
blocks, because the patch embedding, SRM, FTM and the injectors come earlier; only CLIP runs without
a graph.
"""

import contextlib
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import clip_vit
import sam_vit
from adapter import ViTAdapter
from clip_vit import CLIP, VisionTransformer, load_clip
from config import Config
from errors import UserError
from layers import init_linears, matmul_fp32, resize, round_up
from sam_vit import SAMViT, load_sam
from tokenizer import tokenize
from uperhead import FCNHead, UPerHead


def similarity(f_cls: Tensor, f_txt: Tensor, scale: float) -> Tensor:
    """SimModule (Eq. 1, Fig. 3a): f_cls (B, E), f_txt (K, E) -> f_sim (B, K), rows sum to 1.

    Eq. 1 prints no temperature. Cosines of unit vectors differ by some hundredths: with `scale` 1
    the softmax is flat (99.96 % of the largest entropy), not "the possibility of each category".
    CLIP's similarities are always computed with its learned scale, 100, and so they are here;
    `sim_scale: 1.0` in a config is the literal equation.
    """
    cosine = (f_cls[:, None] * f_txt).sum(-1)           # (B, K); no matmul: autocast would round it
    return (scale * cosine).softmax(-1)                     # (B, K)        Eq. 1


class SRM(nn.Module):
    """Semantic-Refinement Module (§3.1, Fig. 3b). All sites use one ("in the shared manner")."""

    def __init__(self, num_classes: int, clip_dim: int, dim: int, ratio: float):
        super().__init__()
        hidden = max(1, int(dim * ratio))                   # C/4: as ViT-Adapter's FFN
        self.expand = nn.Linear(num_classes, clip_dim)      # "increase the dimension of f_sim"
        self.to_sam = nn.Linear(clip_dim, dim)
        self.squeeze = nn.Linear(dim, hidden)
        self.unsqueeze = nn.Linear(hidden, dim)
        init_linears(self)
        _zero(self.to_sam, self.unsqueeze)                  # SAM's features pass at first

    def forward(self, f_sv: Tensor, f_cv: Tensor, f_sim: Tensor) -> Tensor:
        gate = self.expand(f_sim)[:, None, None]            # (B, 1, 1, D)
        f_prime = self.to_sam(f_cv * gate) + f_sv           # (B, h, w, C)  Eq. 2: f'_sv
        refined = self.unsqueeze(F.gelu(self.squeeze(f_prime)))
        return f_prime + refined                            # (B, h, w, C)  Eq. 4: f''_sv


class FTM(nn.Module):
    """Fine-Tuning Module (§3.2, Fig. 4), after each layer of the encoder.

    Tokens as in Rein (arXiv 2312.04265). Differs from it as Eq. 5 does: no 1/sqrt(C), all tokens
    kept, no feature added in the outer MLP.
    """

    def __init__(self, depth: int, dim: int, tokens: int, ratio: float, rho: float,
                 scale_logits: bool, residual: str, init: str):
        super().__init__()
        hidden = max(1, int(dim * ratio))                   # width not in the paper; as in SRM
        bound = (6 / (3 * 16 * 16 + dim)) ** 0.5            # Rein's, with a 16 x 16 patch
        # T and rho of Eq. 5; one rho for all layers: "a learnable parameter"
        self.tokens = nn.Parameter(torch.empty(depth, tokens, dim).uniform_(-bound, bound))
        self.rho = nn.Parameter(torch.tensor(float(rho)))
        self.value = nn.Linear(dim, dim)                    # inner MLP of Eq. 5, for all layers
        self.out = nn.Linear(dim, dim)                      # outer MLP of Eq. 5, for all layers
        self.first = nn.Linear(dim, hidden)                 # Eq. 6: "first and third ... shared"
        self.second = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.third = nn.Linear(hidden, dim)
        self.logit_scale = dim ** -0.5 if scale_logits else 1.0         # as in Rein; Eq. 5: 1
        self.residual = residual                            # Eq. 6 prints f_i; Rein has f'_i
        init_linears(self)
        for mlp in (self.value, self.out):                  # at torch's default, as in Rein
            mlp.reset_parameters()
        if init == "zero":
            _zero(self.third)                               # with f_i, Eq. 5 then hardly learns
        else:
            for mlp in (self.first, *self.second, self.third):
                mlp.reset_parameters()

    def forward(self, f: Tensor, i: int) -> Tensor:
        # The rows of a softmax sum to 1, so MLP(A V) = A MLP(V), bias included: m tokens, not h w pixels.
        values = self.out(self.value(self.tokens[i]))       # (m, C)
        logits = self.logit_scale * matmul_fp32(f, self.tokens[i].T)    # (B, h, w, m)
        f_prime = self.rho * (logits.softmax(-1) @ values) + f          # Eq. 5: f'_i
        squeezed = F.gelu(self.second[i](F.gelu(self.first(f_prime))))  # (B, h, w, C/4)
        residual = f if self.residual == "f" else f_prime
        return self.third(squeezed) + residual              # Eq. 6: f''_i


class SCHNet(nn.Module):
    """Fig. 2, with ViT-Adapter (arXiv 2205.08534) around the encoder and UperNet on top (§4.2).

    `sam` or, for the row "CLIP" of Table 6, `clip` alone is the encoder; `f_txt` (K, E) and
    `sim_scale` are Eq. 1's.
    """

    def __init__(self, cfg: Config, num_classes: int, sam: SAMViT | None,
                 clip: VisionTransformer | None, f_txt: Tensor | None = None,
                 sim_scale: float = 100.0):
        super().__init__()
        self.cfg = cfg
        self.sam, self.clip = sam, clip
        if cfg.freeze:                                      # §4.3
            for encoder in filter(None, (sam, clip)):
                encoder.requires_grad_(False)
            self.encoder.patch_embed.requires_grad_(True)
        if cfg.backbone == "clip":               # a plain backbone has no class token (ViT-Adapter)
            for unused in (clip.class_embedding, clip.proj, *clip.ln_post.parameters()):
                unused.requires_grad_(False)
        dim, depth = self.encoder.dim, self.encoder.depth
        ends = [depth * s // 4 for s in range(1, 5)]        # ViT-L: 0-5, 6-11, 12-17, 18-23
        if cfg.backbone == "clip":
            ends = [tap + 1 for tap in cfg.clip_taps]
        self.stages = [range(a, b) for a, b in zip([0, *ends], ends)]
        if cfg.srm:
            self.register_buffer("f_txt", f_txt)
            self.register_buffer("sim_scale", torch.tensor(float(sim_scale)))
            self.srm = SRM(num_classes, clip.dim, dim, cfg.srm_ratio)
        if cfg.ftm:
            self.ftm = FTM(depth, dim, cfg.ftm_tokens, cfg.ftm_ratio, cfg.rho_init,
                           cfg.ftm_scale_logits, cfg.ftm_residual, cfg.ftm_init)
        self.adapter = ViTAdapter(dim, cfg.prior_dim, cfg.deform_heads, cfg.deform_points,
                                  cfg.deform_ratio, cfg.cffn_ratio, cfg.drop_path)
        self.head = UPerHead(dim, cfg.head_dim, num_classes, cfg.head_dropout)
        self.aux = None
        if cfg.aux_weight:
            self.aux = FCNHead(dim, cfg.aux_dim, num_classes, cfg.head_dropout)

    @property
    def encoder(self) -> SAMViT | VisionTransformer:
        """The plain ViT that ViT-Adapter wraps."""
        return self.sam if self.cfg.backbone == "sam" else self.clip

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """image (B, 3, H, W), any size -> logits (B, K, H, W); in training also `aux`'s."""
        height, width = image.shape[-2:]
        image = self._pad(image)
        features = self.forward_features(image)

        def upsample(x: Tensor) -> Tensor:
            return resize(x, image.shape[-2:])[..., :height, :width]

        logits = upsample(self.head(features))
        if not self.training:
            return logits
        return logits, upsample(self.aux(features[2])) if self.aux else None

    def forward_features(self, image: Tensor) -> list[Tensor]:
        """Fig. 2: image (B, 3, H, W), sides multiples of 32 -> four maps, strides 4, 8, 16, 32.

        Eq. 2 counts i = 1..5 but CLIP has four stages: the last two sites both take f_cv^4, since
        there is no f_cv^5.
        """
        if self.cfg.srm:
            f_sim, f_cv = self.clip_features(image)         # (B, K), 4 x (B, h, w, D)     Eq. 1
        x = self.encoder.embed(image)                       # (B, h, w, C)  f_sv^0
        if self.cfg.srm:
            x = self.srm(x, f_cv[0], f_sim)                 #               Eqs. 2, 4
        c1, c = self.adapter.prior(self.encoder.normalize(image))      # (B, C, H/4, W/4), (B, N, C)
        outs = []
        for stage, layers in enumerate(self.stages):
            x = self.adapter.inject(stage, x, c)
            for i in layers:
                x = self._layer(x, i)                       # f''_i         Eqs. 5, 6
            if self.cfg.srm and stage + 1 < self.cfg.srm_sites:
                x = self.srm(x, f_cv[min(stage + 1, 3)], f_sim)         # f''_sv^1..4   Eqs. 2, 4
            c = self.adapter.extract(stage, x, c)
            outs.append(x)
        return self.adapter.fuse(c1, c, outs)

    def clip_features(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """CLIP's view of the image: f_sim (B, K) and f_cv^1..4, each (B, h, w, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cfg.freeze):
            f_cls, f_cv = self.clip(image)                  # (B, E), 4 x (B, h, w, D)
        return similarity(f_cls, self.f_txt, self.sim_scale), f_cv

    def _layer(self, x: Tensor, i: int) -> Tensor:
        """Encoder layer i and its FTM; with `checkpointing`, recomputed in the backward pass."""
        def run(x: Tensor) -> Tensor:
            x = self.encoder.layer(i, x)
            return self.ftm(x, i) if self.cfg.ftm else x

        if self.cfg.checkpointing and self.training:
            return checkpoint(run, x, use_reentrant=False)
        return run(x)

    def _pad(self, image: Tensor) -> Tensor:
        """Pads the sides to multiples of 32 (the adapter's coarsest map) with the mean colour."""
        height, width = image.shape[-2:]
        below, right = round_up(height) - height, round_up(width) - width
        if not below and not right:
            return image
        mean = self.encoder.mean
        return F.pad(image - mean, (0, right, 0, below)) + mean


def build_model(cfg: Config, classes: Sequence[str],
                state: dict[str, Tensor] | None = None) -> SCHNet:
    """SCHNet for these class names, with the weight files named in `cfg`; no name: random weights.

    `state`: the tensors of a checkpoint that the caller loads next. What they will fill is built on
    the meta device, without random numbers, and the vocabulary is not needed.
    """
    for key, sizes in (("sam", sam_vit.SIZES), ("clip", clip_vit.SIZES)):
        if getattr(cfg, key) not in sizes:
            raise UserError(f"{key} must be one of {', '.join(sizes)}, not {getattr(cfg, key)!r}")
    sam = clip = f_txt = scale = None
    with torch.device("meta") if state is not None else contextlib.nullcontext():
        if cfg.backbone == "sam":
            sam = (load_sam(cfg.sam_weights, cfg.sam) if cfg.sam_weights else
                   SAMViT(*sam_vit.SIZES[cfg.sam]))
        if cfg.backbone == "clip" or cfg.srm:
            size = clip_vit.SIZES[cfg.clip]
            if cfg.clip_taps[-1] != size[1] - 1:
                raise UserError(f"clip_taps must end with CLIP's last block, {size[1] - 1}, "
                                f"not {cfg.clip_taps}")
            clip = (load_clip(cfg.clip_weights, cfg.clip_taps, cfg.clip, cfg.clip_activation)
                    if cfg.clip_weights else
                    CLIP(*size, cfg.clip_taps, cfg.clip_activation or "quick_gelu"))
        if cfg.srm:
            f_txt, scale = ((state["f_txt"], state["sim_scale"]) if state else
                            text_features(cfg, clip, classes))
        return SCHNet(cfg, len(classes), sam, clip.visual if clip else None, f_txt, scale)


@torch.no_grad()
def text_features(cfg: Config, clip: CLIP, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """f_txt = Enc_ct(T) (§3.1) and the scale of Eq. 1. The template is ours: the paper has "a text
    prompt T from labels"."""
    if cfg.clip_weights and not cfg.vocab:
        raise UserError("vocab: CLIP's weights need its vocabulary; `python download.py` gets it")
    prompts = [cfg.prompt.replace("{class}", name.lower().replace("-", " ")) for name in classes]
    f_txt = clip.encode_text(tokenize(prompts, cfg.vocab))
    return f_txt, clip.logit_scale.exp() if cfg.sim_scale is None else torch.tensor(cfg.sim_scale)


def _zero(*layers: nn.Linear):
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
