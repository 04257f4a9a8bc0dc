"""SAM's image encoder beside segment-anything and transformers with random weights; files: test_formats.py."""

from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sam_vit import SIZES, Attention, SAMViT

TOLERANCE = 1e-5
SMALL = (48, 8, 3, 5, 12)                               # odd blocks attend to the complete grid, even blocks in windows
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1) / 255
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1) / 255


def random_state(model, seed=0):
    """Weights in which every tensor matters: no bias or position near zero, matrices keep the size of their input."""
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
    """The position table at the size of the image's grid, as the peers need it."""
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
    """The outputs of a peer's blocks at the end of each quarter, and the peer."""
    model, blocks = peer(state, image.shape[2] // 16, image.shape[3] // 16, *size)
    model.requires_grad_(trained)
    outs = []
    for block in list(blocks)[len(blocks) // 4 - 1::len(blocks) // 4]:
        block.register_forward_hook(lambda module, args, out: outs.append(out[0] if isinstance(out, tuple) else out))
    model((image - MEAN.to(image)) / STD.to(image))
    return outs, model


def error(got, wanted):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Full size


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


# ---------------------------------------------------------------------------------------------------------------------
# The same code, small


@pytest.fixture(scope="module")
def small():
    return random_state(SAMViT(*SMALL))


def picture(h=8, w=13, batch=2, dtype=torch.float32):
    return torch.rand(batch, 3, 16 * h, 16 * w, generator=torch.Generator().manual_seed(h * w), dtype=dtype)


@pytest.mark.parametrize("peer", [official, hugging_face])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, TOLERANCE), (torch.float64, 1e-13)])
@pytest.mark.parametrize("h, w", [(8, 13), (10, 5), (12, 12), (2, 3), (16, 16)])
def test_every_kind_of_grid(small, peer, dtype, tolerance, h, w, both_forms):
    """Whole windows, windows cut at one or both edges, less than a window; fp64 folds the positions, fp32 adds them."""
    state = {name: tensor.to(dtype) for name, tensor in small.items()}
    with torch.no_grad():
        outs = build(state)(picture(h, w, dtype=dtype))
        assert error(outs, peer_outputs(peer, state, picture(h, w, dtype=dtype))[0]) <= tolerance


def test_every_tensor_matters(small):
    """Without any one tensor, the last output is wrong by more than a hundred times what the parity tests allow."""
    image = picture(6, 7, batch=1)
    with torch.no_grad():
        wanted = build(small)(image)[-1:]
        for name, tensor in small.items():
            outs = build({**small, name: torch.zeros_like(tensor)})(image)
            assert error(outs[-1:], wanted) > 100 * TOLERANCE, name


def test_fused_attention_is_the_same(small, monkeypatch):
    """A GPU's form, with the positions folded into queries and keys."""
    state = {name: tensor.double() for name, tensor in small.items()}
    image = picture(dtype=torch.float64).requires_grad_()
    outs = build(state)(image)
    gradient = torch.autograd.grad(outs[-1].square().sum(), image)
    monkeypatch.setattr(Attention, "forward", Attention.forward.plain)
    widths, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, **more: (widths.append((q.shape[-1], v.shape[-1])), kernel(q, k, v, **more))[1])
    fused_outs = build(state)(image)
    assert len(widths) == SMALL[1] and all(q == v and q % 32 == 0 for q, v in widths)
    assert error(fused_outs, outs) < 1e-13
    assert error(torch.autograd.grad(fused_outs[-1].square().sum(), image), gradient) < 1e-12


def test_bf16_is_close(small, both_forms):
    image = picture()
    with torch.no_grad():
        wanted = build(small)(image)
        with torch.autocast("cpu", torch.bfloat16):
            outs = build(small)(image)
            theirs = peer_outputs(official, small, image)[0]
    assert error(outs, wanted) < 2e-2
    assert error(outs, wanted) < 1.2 * error(theirs, wanted)


def test_no_array_over_all_pairs(small, monkeypatch):
    """Memory is linear in the tokens: no array has one number per head, query and key of the grid."""
    h = w = 30

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numbers = max(self.numbers, out.numel())
            return out

    forward = Attention.forward
    for dtype, form in ((torch.float32, forward), (torch.float64, forward), (torch.float32, forward.plain)):
        monkeypatch.setattr(Attention, "forward", form)    # the last: a GPU's form
        model = build({name: tensor.to(dtype) for name, tensor in small.items()})
        with torch.no_grad(), Largest() as largest:
            model(picture(h, w, 1, dtype))
        assert largest.numbers < SMALL[2] * (h * w) ** 2 / 2


def test_a_batch_equals_its_images_and_the_parts_the_whole(small, both_forms):
    """Also what SCHNet calls: `normalize`, `embed` and the layers, one by one."""
    model, image = build(small), picture(batch=3)
    with torch.no_grad():
        outs = model(image)
        alone = [model(one[None]) for one in image]
        assert error(outs, [torch.cat(parts) for parts in zip(*alone)]) < 1e-6
        assert torch.allclose(model.normalize(image), (image - MEAN) / STD, atol=1e-6)
        x = model.embed(image)
        for i in range(model.depth):
            x = model.layer(i, x)
        assert torch.equal(x, outs[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_gradients_are_the_officials(small, dtype, tolerance, both_forms):
    """Of every tensor; positions at another grid than their own."""
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


def test_frozen_blocks_pass_the_gradient(small, both_forms):
    """SCHNet's case: only the patch embedding is trained, its gradient comes through all blocks; in bf16, too."""
    model, image = build(small), picture(batch=1)
    model.patch_embed.requires_grad_(True)

    def gradient():
        return torch.autograd.grad(model(image)[-1].square().sum(), list(model.patch_embed.parameters()))

    wanted = gradient()
    assert all(grad.abs().sum() > 0 for grad in wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(gradient(), wanted) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Positions at other grids


def test_positions_come_from_the_originals(small):
    """After other image sizes and after a training step: nothing stale is kept."""
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


def test_tables_of_windows_never_change(small, both_forms):
    """A grid smaller than a window is padded to one: the window's tables are not resampled."""
    image = picture(2, 3)
    with torch.no_grad():
        wanted = build(small)(image)[-1]
        beyond = {name: tensor.clone() for name, tensor in small.items()}
        for i in range(0, SMALL[1], 2):                    # distances that do not occur in 2 x 3 tokens
            beyond[f"blocks.{i}.attn.rel_pos_h"][6:] += 1
        assert torch.equal(build(beyond)(image)[-1], wanted)
        beyond["blocks.0.attn.rel_pos_h"][5] += 1          # from the second row to the first
        assert not torch.equal(build(beyond)(image)[-1], wanted)
