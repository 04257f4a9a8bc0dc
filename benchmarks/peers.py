"""The encoders and the UperNet head of other libraries with this project's weights, at any image size.

Encoders come as (module, function). The function takes an image (B, 3, H, W) in [0, 1] and returns the same outputs as
ours; position tables are resampled in advance. Libraries are imported where they are used, because bench_parts.py
measures memory.
"""

import functools
from collections.abc import Callable

import torch
from timing import ROOT  # noqa: F401                      sets sys.path
from torch import Tensor, nn

import conftest  # noqa: F401                              makes torchvision importable with a CPU-only torch
from layers import relative_positions
from sam_vit import SIZES
from test_clip_vit import MEAN as CLIP_MEAN, STD as CLIP_STD, resized
from test_sam_vit import MEAN, STD, hugging_face, official

TAPS = (3, 5, 7, 11)
NORMS = {"SAM": (MEAN, STD), "CLIP": (CLIP_MEAN, CLIP_STD)}
SAMS = {"segment-anything": official, "transformers": hugging_face}


@functools.cache
def norm(encoder: str, device: torch.device) -> list[Tensor]:
    """Mean and standard deviation on the device, copied once: a copy in every call would synchronise a GPU."""
    return [values.to(device) for values in NORMS[encoder]]


def normalized(image: Tensor, encoder: str) -> Tensor:
    mean, std = norm(encoder, image.device)
    return (image - mean) / std


def sam(name: str, state: dict[str, Tensor], size: int) -> tuple[nn.Module, Callable]:
    """One of SAMS without its neck. Outputs: the last layer of each quarter, (B, h, w, C) each."""
    grid, fitted, (*shape, window, _) = size // 16, dict(state), SIZES["vit_l"]
    for key, table in state.items():                       # row i, column 0 of the full table is distance i
        if "rel_pos" in key and len(table) != 2 * window - 1:
            full = relative_positions(table, grid)
            fitted[key] = torch.cat([full[0].flip(0), full[1:, 0]])
    model, blocks = SAMS[name](fitted, grid, grid, *shape, window, grid)
    model.requires_grad_(False)
    outs, quarter = [], len(blocks) // 4
    for block in list(blocks)[quarter - 1::quarter]:
        block.register_forward_hook(lambda module, args, out: outs.append(out[0] if isinstance(out, tuple) else out))

    def run(image: Tensor) -> list[Tensor]:
        outs.clear()
        model(normalized(image, "SAM"))
        return list(outs)

    return model, run


def open_clip_tower(state: dict[str, Tensor], size: int) -> tuple[nn.Module, Callable]:
    """open_clip's ViT-B/16 image tower, with OpenAI's blocks (nn.MultiheadAttention). Outputs: the class embedding
    (B, E) of unit length and four taps (B, N, D)."""
    import open_clip
    model = open_clip.create_model("ViT-B-16-quickgelu", force_image_size=size).visual.eval().requires_grad_(False)
    fitted = resized({f"visual.{name}": tensor for name, tensor in state.items()}, size // 16, size // 16)
    model.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in fitted.items()})

    def run(image: Tensor) -> list[Tensor]:
        out = model.forward_intermediates(normalized(image, "CLIP"), indices=list(TAPS), output_fmt="NLC",
                                          normalize_intermediates=False)
        return [nn.functional.normalize(out["image_features"], dim=-1), *out["image_intermediates"]]

    return model, run


def transformers_clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an image tower as in transformers."""
    names = {"visual.class_embedding": "embeddings.class_embedding", "visual.conv1.": "embeddings.patch_embedding.",
             "visual.positional_embedding": "embeddings.position_embedding.weight", "visual.ln_pre.": "pre_layrnorm.",
             "visual.ln_post.": "post_layernorm.", "visual.transformer.resblocks.": "encoder.layers.",
             "attn.": "self_attn.", "ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "c_fc": "fc1", "c_proj": "fc2"}
    renamed = {"visual_projection.weight": state["visual.proj"].T}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "in_proj_" in name:
            for part, third in zip("qkv", tensor.chunk(3)):
                renamed[f"vision_model.{name.replace('in_proj_', f'{part}_proj.')}"] = third
        elif name != "visual.proj":
            renamed[f"vision_model.{name}"] = tensor
    return renamed


def transformers_tower(state: dict[str, Tensor], size: int) -> tuple[nn.Module, Callable]:
    """transformers' ViT-B/16 image tower, with the outputs of `open_clip_tower`."""
    import transformers
    config = transformers.CLIPVisionConfig(patch_size=16, image_size=size, projection_dim=512)
    model = transformers.CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    fitted = resized({f"visual.{name}": tensor for name, tensor in state.items()}, size // 16, size // 16)
    model.load_state_dict(transformers_clip_names(fitted))

    def run(image: Tensor) -> list[Tensor]:
        out = model(normalized(image, "CLIP"), output_hidden_states=True)
        return [nn.functional.normalize(out.image_embeds, dim=-1), *(out.hidden_states[tap + 1][:, 1:] for tap in TAPS)]

    return model, run


def clip_outputs(tower: nn.Module, image: Tensor) -> list[Tensor]:
    """The outputs of this project's image tower in the peers' layout."""
    f_cls, taps = tower(image)
    return [f_cls, *(tap.flatten(1, 2) for tap in taps)]


CLIPS = {"open_clip": open_clip_tower, "transformers": transformers_tower}


def upernet(state: dict[str, Tensor]) -> nn.Module:
    """transformers' UperNet head with the sizes and weights of `state`."""
    from test_uperhead import transformers_names
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead
    classes, dim = state["conv_seg.weight"].shape[:2]
    in_dim = state["lateral_convs.0.conv.weight"].shape[1]
    model = UperNetHead(UperNetConfig(hidden_size=dim, num_labels=classes), [in_dim] * 4)
    model.load_state_dict(transformers_names(state))
    return model
