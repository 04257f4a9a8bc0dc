"""CLIP's towers against open_clip with random weights; full size, transformers and weight files: test_formats.py."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip_vit import CLIP

TOLERANCE = 1e-5
SMALL = (32, 4, 4, 4, 16, 24, 2, 3, (0, 1, 2, 3))
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def random_state(clip, seed=0):
    """Random weights without biases, positions or embeddings near zero, which would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in clip.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if ".ln_" in name or name.startswith("ln_"):
            state[name] = 0.4 * noise + (1 if name.endswith("weight") else 0)
        elif "embedding" in name:                          # small enough for the norms' epsilon to matter, as in CLIP
            state[name] = 0.02 * noise
        elif tensor.ndim < 2:
            state[name] = 0.5 * noise
        else:                                              # matrices preserve the scale of their input
            fan_in = tensor.shape[0] if name.endswith("proj") or name == "text_projection" else tensor[0].numel()
            state[name] = noise * fan_in**-0.5 * (0.02 if "conv1" in name else 1)
    return state


def token_rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    tokens = torch.zeros(len(lengths), 77, dtype=torch.int64)
    for row, length in zip(tokens, lengths):
        row[0], row[length - 1] = 49406, 49407
        row[1:length - 1] = torch.from_numpy(rng.integers(0, 49406, length - 2))
    return tokens


def photo(h, w, batch=2, seed=0):
    return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(seed))


def error(ours, reference):
    assert ours.shape == reference.shape
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def resized(state, h, w):
    """The state with its position table resized to h x w patches."""
    table = state["visual.positional_embedding"]
    grid = round((len(table) - 1) ** 0.5)
    patches = F.interpolate(table[1:].T.view(1, -1, grid, grid), (h, w), mode="bicubic")
    return {**state, "visual.positional_embedding": torch.cat([table[:1], patches[0].flatten(1).T])}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    clip = CLIP(*SMALL).eval()
    clip.load_state_dict(random_state(clip))
    return clip.requires_grad_(False)


def open_clip_model(state, h, w):
    """open_clip's model with these weights, for images of h x w pixels."""
    model = pytest.importorskip("open_clip.model").CLIP(
        16, {"image_size": (h, w), "layers": 4, "width": 32, "head_width": 8, "patch_size": 16},
        {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2}, quick_gelu=True).eval()
    assert not model.load_state_dict(resized(state, h // 16, w // 16), strict=False).missing_keys
    return model


@pytest.mark.parametrize("h, w", [(64, 64), (480, 320), (32, 80)])
@torch.no_grad()
def test_image_tower_equals_open_clip(small, h, w):
    image = photo(h, w)
    out = open_clip_model(small.state_dict(), h, w).visual.forward_intermediates(
        (image - MEAN) / STD, indices=[0, 1, 2, 3], intermediates_only=False, output_fmt="NLC",
        normalize_intermediates=False)
    f_cls, taps = small.visual(image)
    assert error(f_cls, F.normalize(out["image_features"], dim=-1)) <= TOLERANCE
    assert len(taps) == 4
    for tap, reference in zip(taps, out["image_intermediates"]):
        assert tap.shape == (2, h // 16, w // 16, 32)
        assert error(tap.flatten(1, 2), reference) <= TOLERANCE


@torch.no_grad()
def test_text_tower_equals_open_clip(small):
    tokens = token_rows([77, 3, 8, 12])
    reference = open_clip_model(small.state_dict(), 64, 64).encode_text(tokens, normalize=True)
    assert error(small.encode_text(tokens), reference) <= TOLERANCE
    assert error(small.encode_text(tokens[1:]), reference[1:]) <= TOLERANCE      # only short rows: padding is cut off


@torch.no_grad()
def test_lower_precision(small):
    image = photo(64, 96)
    f_cls, taps = small.visual(image)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_taps = small.visual(image)
    assert low_taps[3].dtype == torch.float32 and error(low_taps[3], taps[3]) < 0.03 and error(low, f_cls) < 0.03
    half, _ = copy.deepcopy(small).bfloat16().visual(image.bfloat16())
    assert half.dtype == torch.bfloat16 and error(half, f_cls) < 0.05
