"""SAM's image encoder against segment-anything and transformers with random weights, and the official file's format."""

from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fast
from errors import UserError
from sam_vit import Attention, SAMViT, load_sam

TOLERANCE = 1e-5
LARGE = dict(dim=1024, depth=24, heads=16, window=14, grid=64)
SMALL = dict(dim=48, depth=8, heads=3, window=5, grid=12)              # odd blocks see the grid, even ones windows
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1) / 255
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1) / 255


def random_state(model, seed=0):
    """Weights of which every tensor matters: no bias or position near zero, matrices keep the size of their input."""
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


def build(state, frozen=True, **sizes):
    with torch.device("meta"):
        model = SAMViT(**sizes)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(not frozen)


def absolute(state, h, w):
    """The peers take positions of the grid's own size."""
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
    names = (("blocks.", "layers."), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("embed.proj", "embed.projection"))
    renamed = {**state, "pos_embed": absolute(state, h, w)}
    for old, new in names:
        renamed = {name.replace(old, new): tensor for name, tensor in renamed.items()}
    model.load_state_dict(renamed, assign=True)
    return model, model.layers


def peer_outputs(peer, state, image, sizes, trained=False):
    """What a peer's blocks at the end of each quarter put out, and the peer."""
    model, blocks = peer(state, image.shape[2] // 16, image.shape[3] // 16, **sizes)
    model.requires_grad_(trained)
    outs = []
    for block in list(blocks)[len(blocks) // 4 - 1::len(blocks) // 4]:
        block.register_forward_hook(lambda module, args, out: outs.append(out[0] if isinstance(out, tuple) else out))
    model((image - MEAN.to(image)) / STD.to(image))
    return outs, model


def error(got, wanted):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# ViT-L at full size


@pytest.fixture(scope="module")
def large():
    with torch.device("meta"):
        model = SAMViT()
    return random_state(model)


@torch.inference_mode()
@pytest.mark.parametrize("h, w", [(480, 480), (320, 544), (1024, 1024)])
def test_full_size_parity(large, monkeypatch, h, w):
    image = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(1))
    wanted = [peer_outputs(peer, large, image, LARGE)[0] for peer in (official, hugging_face)]
    for form in (True, False) if h == w == 480 else (True,):
        monkeypatch.setattr(fast, "ENABLED", form)
        outs = build(large, **LARGE)(image)
        assert [out.shape for out in outs] == [(1, h // 16, w // 16, 1024)] * 4
        assert all(error(outs, theirs) <= TOLERANCE for theirs in wanted)


@torch.inference_mode()
@pytest.mark.parametrize("sizes", [dict(dim=768, depth=12, heads=12), dict(dim=1280, depth=32, heads=16)], ids="BH")
def test_full_size_parity_of_the_other_encoders(sizes):
    sizes = {**LARGE, **sizes}
    with torch.device("meta"):
        model = SAMViT(**sizes)
    state = random_state(model)
    image = torch.rand(1, 3, 480, 480, generator=torch.Generator().manual_seed(1))
    assert error(build(state, **sizes)(image), peer_outputs(official, state, image, sizes)[0]) <= TOLERANCE


def test_official_file(large, tmp_path):
    """All 482 tensors of a full SAM ViT-L, the encoder's with random values, through a file of torch.save."""
    from segment_anything import sam_model_registry
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in sam_model_registry["vit_l"]().state_dict().items()}
    assert len(shapes) == 482
    ours = {f"image_encoder.{name}": tensor for name, tensor in large.items()}
    full = {name: ours.pop(name, torch.ones(())).expand(shape) for name, shape in shapes.items()}
    assert not ours
    path = tmp_path / "sam_vit_l_0b3195.pth"
    torch.save(full, path)
    model = load_sam(path)
    path.unlink()
    state = model.state_dict()
    assert list(state) == list(large) and all(torch.equal(state[name], large[name]) for name in large)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert error(model(image), peer_outputs(official, large, image, LARGE)[0]) <= TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# The same code, small


@pytest.fixture(scope="module")
def small():
    return random_state(SAMViT(**SMALL))


def picture(h=8, w=13, batch=2, dtype=torch.float32):
    return torch.rand(batch, 3, 16 * h, 16 * w, generator=torch.Generator().manual_seed(h * w), dtype=dtype)


@pytest.mark.parametrize("peer", [official, hugging_face])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, TOLERANCE), (torch.float64, 1e-13)])
@pytest.mark.parametrize("h, w", [(8, 13), (10, 5), (12, 12), (2, 3), (16, 16)])
def test_every_kind_of_grid(small, peer, dtype, tolerance, h, w, both_forms):
    """Whole windows only, cut ones in one or both directions, less than a window; fp64 folds the positions, fp32 adds."""
    state = {name: tensor.to(dtype) for name, tensor in small.items()}
    with torch.no_grad():
        outs = build(state, **SMALL)(picture(h, w, dtype=dtype))
        assert error(outs, peer_outputs(peer, state, picture(h, w, dtype=dtype), SMALL)[0]) <= tolerance


def test_every_tensor_matters(small, both_forms):
    """Setting any one tensor to zero changes the last output by a hundred times what the parity tests allow, or more."""
    image = picture(batch=1)
    with torch.no_grad():
        wanted = build(small, **SMALL)(image)[-1:]
        for name, tensor in small.items():
            outs = build({**small, name: torch.zeros_like(tensor)}, **SMALL)(image)
            assert error(outs[-1:], wanted) > 100 * TOLERANCE, name


def test_fused_attention_is_the_same(small, monkeypatch):
    """The folded positions make the kernel exact."""
    state = {name: tensor.double() for name, tensor in small.items()}
    image = picture(dtype=torch.float64).requires_grad_()
    outs = build(state, **SMALL)(image)
    gradient = torch.autograd.grad(outs[-1].square().sum(), image)
    monkeypatch.setattr(Attention, "forward", Attention.forward.plain)
    widths, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, **more: (widths.append((q.shape[-1], v.shape[-1])), kernel(q, k, v, **more))[1])
    fused_outs = build(state, **SMALL)(image)
    assert len(widths) == SMALL["depth"] and all(q == v and q % 32 == 0 for q, v in widths)
    assert error(fused_outs, outs) < 1e-13
    assert error(torch.autograd.grad(fused_outs[-1].square().sum(), image), gradient) < 1e-12


def test_bf16_is_close(small, both_forms):
    image = picture()
    with torch.no_grad():
        wanted = build(small, **SMALL)(image)
        with torch.autocast("cpu", torch.bfloat16):
            outs = build(small, **SMALL)(image)
            theirs = peer_outputs(official, small, image, SMALL)[0]
    assert error(outs, wanted) < 2e-2
    assert error(outs, wanted) < 1.2 * error(theirs, wanted)


def test_no_array_over_all_pairs(small, monkeypatch):
    """Memory is linear in the tokens: nothing holds as much as one number per head, query and key of the grid."""
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
        monkeypatch.setattr(Attention, "forward", form)    # the last with the form of a GPU for the attention itself
        model = build({name: tensor.to(dtype) for name, tensor in small.items()}, **SMALL)
        with torch.no_grad(), Largest() as largest:
            model(picture(h, w, 1, dtype))
        assert largest.numbers < SMALL["heads"] * (h * w) ** 2 / 2


def test_batch_is_a_loop(small, both_forms):
    model = build(small, **SMALL)
    with torch.no_grad():
        single = [model(image[None]) for image in picture(batch=3)]
        assert error(model(picture(batch=3)), [torch.cat(outs) for outs in zip(*single)]) < 1e-6


def test_parts_make_the_whole(small):
    """What SCHNet calls: `normalize`, `embed` and the blocks, one by one."""
    model = build(small, **SMALL)
    image = picture()
    with torch.no_grad():
        assert torch.allclose(model.normalize(image), (image - MEAN) / STD, atol=1e-6)
        x = model.embed(image)
        for block in model.blocks:
            x = block(x)
        assert torch.equal(x, model(image)[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_gradients_are_the_officials(small, dtype, tolerance, both_forms):
    """Of every tensor and of the image, trained from scratch; positions at another grid than their own."""
    state = {name: tensor.to(dtype) for name, tensor in small.items()}
    image = picture(dtype=dtype)
    leaf = state["pos_embed"].clone().requires_grad_()
    outs, peer = peer_outputs(official, state, image, SMALL, trained=True)
    weight = [torch.randn_like(out) for out in outs]
    sum((a * b).sum() for a, b in zip(outs, weight)).backward()
    absolute({"pos_embed": leaf}, 8, 13).backward(peer.pos_embed.grad)
    wanted = {name: p.grad for name, p in peer.named_parameters()}
    wanted["pos_embed"] = leaf.grad
    model = build({name: tensor.clone() for name, tensor in state.items()}, frozen=False, **SMALL)
    sum((a * b).sum() for a, b in zip(model(image), weight)).backward()
    for name, p in model.named_parameters():
        assert error([p.grad], [wanted[name]]) < tolerance, name


def test_frozen_blocks_pass_the_gradient(small, both_forms):
    """SCHNet's case: only the patch embedding is trained, its gradient comes through all blocks, recomputed or not."""
    model = build(small, **SMALL)
    model.patch_embed.requires_grad_(True)
    image = picture(batch=1)

    def gradient(run):
        x = model.embed(image)
        for block in model.blocks:
            x = run(block, x)
        return torch.autograd.grad(x.square().sum(), list(model.patch_embed.parameters()))

    wanted = gradient(lambda block, x: block(x))
    assert all(grad.abs().sum() > 0 for grad in wanted)
    assert error(gradient(lambda block, x: checkpoint(block, x, use_reentrant=False)), wanted) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert error(gradient(lambda block, x: block(x)), wanted) < 0.05


def test_learns_from_scratch():
    torch.manual_seed(0)
    model = SAMViT(dim=32, depth=4, heads=2, window=3, grid=4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    image, target = torch.rand(4, 3, 80, 64), torch.randn(4, 5, 4, 32)
    losses = []
    for _ in range(25):
        loss = F.mse_loss(model(image)[-1], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# Positions at other grids


def test_positions_come_from_the_originals(small):
    """Whatever sizes came before, and after training, changing type or moving: nothing is kept that could be stale."""
    own = {name: tensor.clone() for name, tensor in small.items()}
    model, image = build(own, **SMALL), picture()
    with torch.inference_mode():
        first = model(image)
        model(picture(16, 9))
        assert torch.equal(model(image)[-1], first[-1])
    model.requires_grad_(True)
    tables = [p for name, p in model.named_parameters() if "pos" in name]
    assert len(tables) == 1 + 2 * SMALL["depth"]
    for table, grad in zip(tables, torch.autograd.grad(model(image)[-1].square().sum(), tables)):
        assert grad.abs().sum() > 0
        table.data -= 1e-3 * grad / grad.abs().max()
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        assert torch.equal(model(image)[-1], build(trained, **SMALL)(image)[-1])
        assert not torch.equal(model(image)[-1], first[-1])


def test_tables_of_windows_never_change(small, both_forms):
    """A grid smaller than a window is padded to one: the window's tables are used as they are, not resampled."""
    image = picture(2, 3)
    with torch.no_grad():
        wanted = build(small, **SMALL)(image)[-1]
        beyond = {name: tensor.clone() for name, tensor in small.items()}
        for i in range(0, SMALL["depth"], 2):              # distances that 2 x 3 tokens and their padding do not have
            beyond[f"blocks.{i}.attn.rel_pos_h"][6:] += 1
        assert torch.equal(build(beyond, **SMALL)(image)[-1], wanted)
        beyond["blocks.0.attn.rel_pos_h"][5] += 1          # of tokens in the second row to those in the first
        assert not torch.equal(build(beyond, **SMALL)(image)[-1], wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Files: the values are one number repeated, so that a ViT-L takes a few kilobytes


def hollow(dim=1024, depth=24, heads=16, prefix="image_encoder."):
    with torch.device("meta"):
        model = SAMViT(dim, depth, heads)
    return {prefix + name: torch.full((), 0.5).expand(tensor.shape) for name, tensor in model.state_dict().items()}


def fault(path, tensors):
    torch.save(tensors, path)
    with pytest.raises(UserError) as caught:
        load_sam(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "image_encoder."])
def test_encoder_alone(tmp_path, prefix):
    tensors = {name: tensor.half() for name, tensor in hollow(prefix=prefix).items()}
    tensors[prefix + "neck.0.weight"] = torch.ones(1).expand(256, 1024, 1, 1)
    torch.save(tensors, tmp_path / "encoder.pth")
    model = load_sam(tmp_path / "encoder.pth")
    assert all(p.dtype == torch.float32 and (p == 0.5).all() for p in model.parameters())
    assert torch.equal(model.mean.flatten(), MEAN.flatten()) and model.std.device.type == "cpu"


@pytest.mark.parametrize("dim, depth, heads", [(768, 12, 12), (1024, 24, 16), (1280, 32, 16)])      # B, L, H
def test_the_size_is_the_files(tmp_path, dim, depth, heads):
    torch.save(hollow(dim, depth, heads), tmp_path / "sam.pth")
    model = load_sam(tmp_path / "sam.pth")
    assert (model.dim, model.depth, model.heads, model.window, model.grid) == (dim, depth, heads, 14, 64)
    assert [i for i, block in enumerate(model.blocks) if block.attn.window == 0] == [
        depth // 4 - 1, depth // 2 - 1, 3 * depth // 4 - 1, depth - 1]


def test_other_models_are_named(tmp_path):
    assert "Hugging Face" in fault(tmp_path / "hf.pth", {"vision_encoder.pos_embed": torch.ones(1)})


def test_strict(tmp_path):
    missing = hollow()
    del missing["image_encoder.blocks.7.attn.rel_pos_w"]
    assert "blocks.7.attn.rel_pos_w" in fault(tmp_path / "missing.pth", missing)
    assert "adapter.weight" in fault(tmp_path / "left.pth", {**hollow(), "adapter.weight": torch.ones(1)})
    assert "neck_norm" in fault(tmp_path / "neck.pth", {**hollow(), "image_encoder.neck_norm": torch.ones(1)})
    tuned = {**hollow(), "image_encoder.blocks.5.attn.rel_pos_h": torch.ones(59, 64)}
    assert "blocks.5.attn.rel_pos_h (59, 64)" in fault(tmp_path / "size.pth", tuned)


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match=r"sam_depth \(6\)"):
        SAMViT(depth=6)
