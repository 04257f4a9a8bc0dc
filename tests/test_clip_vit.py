"""CLIP's towers beside open_clip with random weights; full size, transformers and files: test_formats.py."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from clip_vit import CLIP
from layers import resample_positions

TOLERANCE = 1e-5
SMALL = (32, 4, 4, 4, 16, 24, 2, 3, (0, 1, 2, 3))
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def random_state(clip, seed=0):
    """Weights in which every tensor matters: no bias, position or embedding near zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in clip.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if ".ln_" in name or name.startswith("ln_"):
            state[name] = 0.4 * noise + (1 if name.endswith("weight") else 0)
        elif "embedding" in name:                          # so small that the norms' epsilon matters, as in CLIP
            state[name] = 0.02 * noise
        elif tensor.ndim < 2:
            state[name] = 0.5 * noise
        else:                                              # matrices keep the size of what they multiply
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


def photo(h, w, batch=1, seed=0):
    return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(seed))


def error(ours, reference):
    assert ours.shape == reference.shape
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def bicubic(table, h, w):
    """(grid, grid, D) -> (h, w, D) by the cubic convolution formula with a = -0.75, in double precision."""
    def matrix(new, old):
        m = np.zeros((new, old))
        for i in range(new):
            x = (i + 0.5) * old / new - 0.5
            for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                d = abs(x - j)
                value = (1.25 * d - 2.25) * d * d + 1 if d <= 1 else -0.75 * (((d - 5) * d + 8) * d - 4)
                m[i, min(max(j, 0), old - 1)] += value
        return m
    rows, columns = matrix(h, table.shape[0]), matrix(w, table.shape[1])
    return torch.from_numpy(np.einsum("yi,xj,ijd->yxd", rows, columns, table.double().numpy())).float()


def resized(state, h, w):
    """The state with its position table resampled to h x w patches."""
    table = state["visual.positional_embedding"]
    grid = round((len(table) - 1) ** 0.5)
    patches = bicubic(table[1:].unflatten(0, (grid, grid)), h, w).flatten(0, 1)
    return {**state, "visual.positional_embedding": torch.cat([table[:1], patches])}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    clip = CLIP(*SMALL).eval()
    clip.load_state_dict(random_state(clip))
    return clip.requires_grad_(False)


def open_clip_model(state, h, w):
    """open_clip's model of the same sizes for images of h x w, whose position table is resampled here."""
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
    assert error(f_cls, nn.functional.normalize(out["image_features"], dim=-1)) <= TOLERANCE
    assert len(taps) == 4
    for tap, reference in zip(taps, out["image_intermediates"]):
        assert tap.shape == (1, h // 16, w // 16, 32)
        assert error(tap.flatten(1, 2), reference) <= TOLERANCE


@torch.no_grad()
def test_text_tower_equals_open_clip(small):
    tokens = token_rows([77, 3, 8, 12])
    reference = open_clip_model(small.state_dict(), 64, 64).encode_text(tokens, normalize=True)
    assert error(small.encode_text(tokens), reference) <= TOLERANCE
    assert error(small.encode_text(tokens[1:]), reference[1:]) <= TOLERANCE      # all short: the tower cuts the rows


@torch.no_grad()
def test_every_tensor_matters(small):
    """Without any one tensor, an output is wrong by more than a hundred times what the parity tests allow."""
    def outputs(clip):
        f_cls, taps = clip.visual(photo(96, 128))
        return [f_cls, *taps, clip.encode_text(token_rows([6, 9])), clip.logit_scale]

    reference = outputs(small)
    for name in small.state_dict():
        clip = copy.deepcopy(small)
        clip.get_parameter(name).zero_()
        assert max(map(error, outputs(clip), reference)) > 100 * TOLERANCE, name


@torch.no_grad()
def test_one_image_of_a_batch_is_the_image_alone(small):
    images = photo(64, 96, batch=3)
    f_cls, taps = small.visual(images)
    for n in range(3):
        alone, alone_taps = small.visual(images[n:n + 1])
        assert error(f_cls[n:n + 1], alone) <= TOLERANCE
        assert all(error(tap[n:n + 1], a) <= TOLERANCE for tap, a in zip(taps, alone_taps))
    assert torch.allclose(f_cls.norm(dim=1), torch.ones(3))


@torch.no_grad()
def test_lower_precision_and_double(small):
    image = photo(64, 96)
    f_cls, taps = small.visual(image)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_taps = small.visual(image)
    assert low_taps[3].dtype == torch.float32 and error(low_taps[3], taps[3]) < 0.03 and error(low, f_cls) < 0.03
    double, _ = copy.deepcopy(small).double().visual(image.double())
    assert double.dtype == torch.float64 and error(f_cls, double) < TOLERANCE
    half, _ = copy.deepcopy(small).bfloat16().visual(image.bfloat16())
    assert half.dtype == torch.bfloat16 and error(half, f_cls) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Positions at other grids


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(30, 30), (4, 7), (3, 2), (5, 4)])
def test_positions_are_bicubic(small, h, w):
    table = small.visual.positional_embedding[1:].unflatten(0, (4, 4))
    assert error(resample_positions(table, h, w), bicubic(table, h, w)) < 1e-6
    assert torch.equal(resample_positions(table, 4, 4), table)


def test_trained_positions_have_a_gradient_at_any_size(small):
    visual = copy.deepcopy(small).visual.requires_grad_(True)
    visual(photo(96, 96))[1][3].square().sum().backward()
    assert visual.positional_embedding.grad[1:].abs().min() > 0
