"""The peers' parts at any size with this project's weights, as the benchmarks run them.

Each comes as (module, function): SAM's and CLIP's functions take an image (B, 3, H, W) in [0, 1] and return what ours do,
their position tables are made for its size beforehand. UperNet's head is a module that takes the four maps. A library is
imported when it is asked for: the benchmarks measure memory.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401                        torchvision beside a CPU-only torch
from test_clip_vit import MEAN as CLIP_MEAN, STD as CLIP_STD, hugging_face_names, resized  # noqa: E402
from test_sam_vit import LARGE, MEAN, STD, hugging_face, official  # noqa: E402

from layers import relative_positions  # noqa: E402

TAPS = (3, 5, 7, 11)
NORMS = {"SAM": (MEAN, STD), "CLIP": (CLIP_MEAN, CLIP_STD)}
SAMS = {"segment-anything": official, "transformers": hugging_face}


@functools.cache
def norm(encoder: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, moved once: a copy at every call would have a GPU wait."""
    return tuple(values.to(device) for values in NORMS[encoder])


def normalized(image: Tensor, encoder: str) -> Tensor:
    mean, std = norm(encoder, image.device)
    return (image - mean) / std


def sam(name: str, state: dict[str, Tensor], size: int, sizes: dict = LARGE) -> tuple[nn.Module, Callable]:
    """One of SAMS, without its neck: the outputs at the end of each quarter of the layers, (B, h, w, C) each."""
    grid, fitted = size // 16, dict(state)
    for key, table in state.items():                       # row i, column 0 of the expanded table is distance i, ...
        if "rel_pos" in key and len(table) != 2 * sizes["window"] - 1:
            full = relative_positions(table, grid)
            fitted[key] = torch.cat([full[0].flip(0), full[1:, 0]])
    model, blocks = SAMS[name](fitted, grid, grid, **{**sizes, "grid": grid})
    model.requires_grad_(False)
    outs, quarter = [], len(blocks) // 4
    for block in list(blocks)[quarter - 1::quarter]:
        block.register_forward_hook(lambda module, args, out: outs.append(out[0] if isinstance(out, tuple) else out))

    def run(image: Tensor) -> list[Tensor]:
        outs.clear()
        model(normalized(image, "SAM"))
        return list(outs)

    return model, run


def openai_clip(state: dict[str, Tensor], size: int) -> tuple[nn.Module, Callable]:
    """open_clip's image tower, whose blocks are OpenAI's (nn.MultiheadAttention), with ViT-B/16's sizes: the class
    embedding (B, E) of unit length and four taps (B, N, D)."""
    import open_clip
    model = open_clip.create_model("ViT-B-16-quickgelu", force_image_size=size).visual.eval().requires_grad_(False)
    fitted = resized({f"visual.{name}": tensor for name, tensor in state.items()}, size // 16, size // 16)
    model.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in fitted.items()})

    def run(image: Tensor) -> list[Tensor]:
        out = model.forward_intermediates(normalized(image, "CLIP"), indices=list(TAPS), output_fmt="NLC",
                                          normalize_intermediates=False)
        return [nn.functional.normalize(out["image_features"], dim=-1), *out["image_intermediates"]]

    return model, run


def hugging_face_clip(state: dict[str, Tensor], size: int, heads: int = 12,
                      taps: tuple[int, ...] = TAPS) -> tuple[nn.Module, Callable]:
    """transformers' image tower, of the sizes of `state`: as `openai_clip`."""
    import transformers
    dim, embed = state["proj"].shape
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        patch_size=16, image_size=size, hidden_act="quick_gelu", hidden_size=dim, intermediate_size=4 * dim,
        num_hidden_layers=taps[-1] + 1, num_attention_heads=heads, projection_dim=embed)).eval().requires_grad_(False)
    text = {name: torch.zeros(1, 1) for name in ("logit_scale", "text_projection")}                 # is left out
    fitted = resized({f"visual.{name}": tensor for name, tensor in state.items()} | text, size // 16, size // 16)
    assert not model.load_state_dict(hugging_face_names(fitted), strict=False).missing_keys

    def run(image: Tensor) -> list[Tensor]:
        out = model(normalized(image, "CLIP"), output_hidden_states=True)
        return [nn.functional.normalize(out.image_embeds, dim=-1), *(out.hidden_states[tap + 1][:, 1:] for tap in taps)]

    return model, run


CLIPS = {"open_clip": openai_clip, "transformers": hugging_face_clip}


def upernet(state: dict[str, Tensor]) -> nn.Module:
    """transformers' UperNet head, of the sizes of `state`."""
    from test_uperhead import transformers_names
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead
    classes, dim = state["conv_seg.weight"].shape[:2]
    in_dim = state["lateral_convs.0.conv.weight"].shape[1]
    model = UperNetHead(UperNetConfig(hidden_size=dim, num_labels=classes), [in_dim] * 4)
    model.load_state_dict(transformers_names(state))
    return model
