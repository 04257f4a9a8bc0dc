"""SAM's image encoder against segment-anything and transformers, random weights; weight files: test_formats.py."""

from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sam_vit import SIZES, SAMViT

TOLERANCE = 1e-5
SMALL = (48, 8, 3, 5, 12)                               # odd blocks attend to the complete grid, even blocks in windows
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1) / 255
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1) / 255


def random_state(model, seed=0):
    """Random weights without tensors near zero, which would hide errors; matrices preserve the scale of their input."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        noise = torch.empty(tensor.shape, dtype=torch.float32).normal_(generator=generator)
        if "norm" in name and name.endswith("weight"):
            state[name] = 1 + 0.2 * noise
        elif "rel_pos" in name:
            state[name] = 0.2 * noise
        else:
            state[name] = noise * (0.3 if tensor.ndim == 1 or name == "pos_embed" else tensor[0].numel() ** -0.5)
    return state


def build(state, size=SMALL, frozen=True):
    with torch.device("meta"):
        model = SAMViT(*size)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(not frozen)


def absolute(state, h, w):
    """The position table resized to the image's grid, as the reference encoders need it."""
    return F.interpolate(state["pos_embed"].permute(0, 3, 1, 2), (h, w), mode="bicubic").permute(0, 2, 3, 1)


def official(state, h, w, dim, depth, heads, window, grid):
    from segment_anything.modeling import ImageEncoderViT
    with torch.device("meta"):
        model = ImageEncoderViT(
            img_size=16 * grid, embed_dim=dim, depth=depth, num_heads=heads, use_rel_pos=True, window_size=window,
            norm_layer=partial(nn.LayerNorm, eps=1e-6), global_attn_indexes=range(depth // 4 - 1, depth, depth // 4))
    model.neck = nn.Identity()
    model.pos_embed = nn.Parameter(torch.empty(1, h, w, dim, device="meta"))
    model.load_state_dict({**state, "pos_embed": absolute(state, h, w)}, assign=True)
    return model, model.blocks


def hugging_face(state, h, w, dim, depth, heads, window, grid):
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder
    config = SamVisionConfig(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, image_size=16 * grid, window_size=window,
        global_attn_indexes=list(range(depth // 4 - 1, depth, depth // 4)), mlp_dim=4 * dim)
    with torch.device("meta"):
        model = SamVisionEncoder(config)
    model.neck = nn.Identity()
    model.patch_embed.image_size = (16 * h, 16 * w)
    model.pos_embed = nn.Parameter(torch.empty(1, h, w, dim, device="meta"))
    renamed = {**state, "pos_embed": absolute(state, h, w)}
    for old, new in (("blocks.", "layers."), ("norm", "layer_norm"), ("embed.proj", "embed.projection")):
        renamed = {name.replace(old, new): tensor for name, tensor in renamed.items()}
    model.load_state_dict(renamed, assign=True)
    return model, model.layers


def peer_outputs(peer, state, image, size=SMALL, trained=False):
    """The outputs of a reference encoder's last block in each quarter, and the encoder."""
    model, blocks = peer(state, image.shape[2] // 16, image.shape[3] // 16, *size)
    model.requires_grad_(trained)
    outs = []
    for block in list(blocks)[len(blocks) // 4 - 1::len(blocks) // 4]:
        block.register_forward_hook(lambda module, args, out: outs.append(out[0] if isinstance(out, tuple) else out))
    model((image - MEAN.to(image)) / STD.to(image))
    return outs, model


def error(got, wanted):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))


def full_size(name):
    with torch.device("meta"):
        model = SAMViT(*SIZES[name])
    return random_state(model)


@torch.inference_mode()
def test_full_size_parity():
    """ViT-B: test_formats.py."""
    state, image = full_size("vit_l"), torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    outs = build(state, SIZES["vit_l"])(image)
    assert [out.shape for out in outs] == [(1, 6, 10, 1024)] * 4
    assert error(outs, peer_outputs(official, state, image, SIZES["vit_l"])[0]) <= TOLERANCE


@pytest.fixture(scope="module")
def small():
    return random_state(SAMViT(*SMALL))


def picture(h=8, w=13, batch=2, dtype=torch.float32):
    return torch.rand(batch, 3, 16 * h, 16 * w, generator=torch.Generator().manual_seed(h * w), dtype=dtype)


@pytest.mark.parametrize("peer", [official, hugging_face])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, TOLERANCE), (torch.float64, 1e-13)])
@pytest.mark.parametrize("h, w", [(8, 13), (10, 5), (12, 12), (2, 3), (16, 16)])
def test_outputs_equal_the_references_at_every_kind_of_grid(small, peer, dtype, tolerance, h, w, both_forms):
    """Full windows, windows cut at one or both edges, less than a window; fp64 folds the positions, fp32 adds them."""
    state = {name: tensor.to(dtype) for name, tensor in small.items()}
    with torch.no_grad():
        outs = build(state)(picture(h, w, dtype=dtype))
        assert error(outs, peer_outputs(peer, state, picture(h, w, dtype=dtype))[0]) <= tolerance


def test_queries_and_values_are_of_equal_width_for_the_fused_kernels(small, monkeypatch):
    widths, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, *mask, **more: (mask or widths.append((q.shape[-1], v.shape[-1])),
                                                       kernel(q, k, v, *mask, **more))[1])
    build(small)(picture())
    assert len(widths) == SMALL[1] // 2 and all(q == v and q % 32 == 0 for q, v in widths)     # of complete grids


def test_bf16_is_close(small, both_forms):
    image = picture()
    with torch.no_grad():
        wanted = build(small)(image)
        with torch.autocast("cpu", torch.bfloat16):
            outs = build(small)(image)
            theirs = peer_outputs(official, small, image)[0]
    assert error(outs, wanted) < 2e-2
    assert error(outs, wanted) < 1.2 * error(theirs, wanted)


def test_no_array_over_all_pairs(small):
    """Memory is linear in the tokens: no tensor has an element per head, query and key of the grid."""
    h = w = 30

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numbers = max(self.numbers, out.numel())
            return out

    for dtype in (torch.float32, torch.float64):
        model = build({name: tensor.to(dtype) for name, tensor in small.items()})
        with torch.no_grad(), Largest() as largest:
            model(picture(h, w, 1, dtype))
        assert largest.numbers < SMALL[2] * (h * w) ** 2 / 2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_gradients_equal_segment_anything(small, dtype, tolerance, both_forms):
    state = {name: tensor.to(dtype) for name, tensor in small.items()}
    image = picture(dtype=dtype)
    leaf = state["pos_embed"].clone().requires_grad_()
    outs, peer = peer_outputs(official, state, image, trained=True)
    weight = [torch.randn_like(out) for out in outs]
    sum((a * b).sum() for a, b in zip(outs, weight)).backward()
    absolute({"pos_embed": leaf}, 8, 13).backward(peer.pos_embed.grad)
    wanted = {name: p.grad for name, p in peer.named_parameters()}
    wanted["pos_embed"] = leaf.grad
    model = build({name: tensor.clone() for name, tensor in state.items()}, frozen=False)
    sum((a * b).sum() for a, b in zip(model(image), weight)).backward()
    for name, p in model.named_parameters():
        assert error([p.grad], [wanted[name]]) < tolerance, name


def test_resized_positions_are_never_stale(small):
    own = {name: tensor.clone() for name, tensor in small.items()}
    model, image = build(own), picture()
    with torch.inference_mode():
        first = model(image)
        model(picture(16, 9))
        assert torch.equal(model(image)[-1], first[-1])
    model.requires_grad_(True)
    tables = [p for name, p in model.named_parameters() if "pos" in name]
    assert len(tables) == 1 + 2 * SMALL[1]
    for table, grad in zip(tables, torch.autograd.grad(model(image)[-1].square().sum(), tables)):
        assert grad.abs().sum() > 0
        table.data -= 1e-3 * grad / grad.abs().max()
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        assert torch.equal(model(image)[-1], build(trained)(image)[-1])
        assert not torch.equal(model(image)[-1], first[-1])
