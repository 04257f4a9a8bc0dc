"""adapter.py: the deformable attention against transformers' Deformable DETR, the other parts in naive code."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import close, shake
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrMultiscaleDeformableAttention,
    MultiScaleDeformableAttention,
)

from adapter import Extractor, Injector, MSDeformAttn, SpatialPrior, ViTAdapter, ms_deform_attn
from errors import UserError

SHAPES = [(3, 5), (4, 2), (1, 1)]


def small(dim=8, prior_dim=2, heads=2, points=2, drop_path=0.3):
    return ViTAdapter(dim, prior_dim, heads, points, 0.5, 0.25, drop_path)


def problem(shapes=SHAPES, b=2, q=4, m=3, p=2, d=5, dtype=torch.float64, reach=0.5):
    """Random values; many of the locations are outside the maps."""
    torch.manual_seed(0)
    value = torch.randn(b, sum(h * w for h, w in shapes), m, d, dtype=dtype)
    locations = torch.rand(b, q, m, len(shapes), p, 2, dtype=dtype) * (1 + 2 * reach) - reach
    weights = torch.rand(b, q, m, len(shapes), p, dtype=dtype)
    return value.requires_grad_(), shapes, locations.requires_grad_(), weights.requires_grad_()


@pytest.mark.parametrize("shapes, sizes, tolerance", [
    (SHAPES, dict(dtype=torch.float64), 1e-10),
    ([(60, 60), (30, 30), (15, 15)], dict(b=1, q=900, m=16, p=4, d=32, dtype=torch.float32, reach=0.05), 1e-3)])
def test_sampling_against_deformable_detr(shapes, sizes, tolerance):
    """At small sizes in double precision and at those of the injector; some locations are outside the maps."""
    value, _, locations, weights = problem(shapes, **sizes)
    inside = (locations > 0).all(-1) & (locations < 1).all(-1)
    assert 0 < inside.sum() < inside.numel()
    expected = MultiScaleDeformableAttention()(value, torch.tensor(shapes), shapes, None, locations, weights, 64)
    out = ms_deform_attn(value, shapes, locations, weights)
    close(out, expected, tolerance / 10)
    up = torch.randn_like(out)
    inputs = (value, weights, locations) if tolerance < 1e-9 else (value, weights)         # fp32: kinks at the cells
    for a, b in zip(torch.autograd.grad(out, inputs, up), torch.autograd.grad(expected, inputs, up), strict=True):
        close(a, b, tolerance)


def test_samples_outside_the_maps_are_zero():
    value, shapes, locations, weights = problem(dtype=torch.float32)
    for far in (-1e9, -2.0, 3.0, 1e9):
        out = ms_deform_attn(value, shapes, torch.full_like(locations, far), weights)
        assert (out == 0).all() and torch.autograd.grad(out.sum(), value)[0].abs().sum() == 0
    broken = ms_deform_attn(value, shapes, torch.full_like(locations, math.nan), weights)
    assert broken.isnan().all()                            # no memory was read out of bounds


def test_half_precision_is_sampled_in_single():
    value, shapes, locations, weights = problem(dtype=torch.float32)
    out = ms_deform_attn(value.bfloat16(), shapes, locations, weights)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ms_deform_attn(value.bfloat16().float(), shapes, locations, weights).bfloat16())


def deformable_detr(levels, dim=32, heads=8, points=4):
    """transformers' module, and this repository's with its weights."""
    config = DeformableDetrConfig(d_model=dim, num_feature_levels=levels)
    theirs = DeformableDetrMultiscaleDeformableAttention(config, heads, points)
    ours = MSDeformAttn(dim, levels, heads, points, 1.0)
    torch.manual_seed(1)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return theirs.double(), ours.double()


@pytest.mark.parametrize("shapes", [SHAPES, [(6, 4)]])
def test_module_against_deformable_detr(shapes):
    theirs, ours = deformable_detr(len(shapes))
    sizes = torch.tensor(shapes)
    query = torch.randn(2, 7, 32).double()
    keys = torch.randn(2, int(sizes.prod(1).sum()), 32).double()
    reference = torch.rand(7, 2).double()
    expected, _ = theirs(query, encoder_hidden_states=keys, spatial_shapes=sizes, spatial_shapes_list=shapes,
                         reference_points=reference.view(1, 7, 1, 2).expand(2, 7, len(shapes), 2))
    close(ours(query, reference, keys, shapes), expected)


def test_initial_offsets_form_a_star():
    attn = MSDeformAttn(32, 2, 8, 3, 0.5)
    for linear in (attn.sampling_offsets, attn.attention_weights):
        torch.nn.init.normal_(linear.weight)
    attn.reset_parameters()
    star = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]).float()
    offsets = attn.sampling_offsets(torch.randn(1, 32)).view(8, 2, 3, 2)
    for level in range(2):
        for point in range(3):
            close(offsets[:, level, point], star * (point + 1), 1e-5)
    assert (attn.attention_weights(torch.randn(1, 32)) == 0).all()
    assert (attn.output_proj.bias == 0).all() and (attn.value_proj.bias == 0).all()
    bound = math.sqrt(6 / (32 + 16))
    assert 0.9 * bound < attn.value_proj.weight.abs().max() <= bound


@pytest.mark.parametrize("dim, heads, ratio, width", [(96, 7, 0.5, 48), (16, 16, 0.05, 0)])
def test_heads_must_divide_the_width(dim, heads, ratio, width):
    with pytest.raises(UserError, match=rf"deform_ratio \({ratio}\) .* {width}, .* deform_heads \({heads}\)"):
        MSDeformAttn(dim, 1, heads, 4, ratio)
    assert Extractor(16, 2, 2, 0.5, 0.05, 0.0).ffn.fc1.out_features == 1             # at least one channel


def layer_norm(x, norm):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def centres(shapes):
    """(x, y) of the centre of every cell, in 0 to 1."""
    points = [((j + 0.5) / w, (i + 0.5) / h) for h, w in shapes for i in range(h) for j in range(w)]
    return torch.tensor(points, dtype=torch.float64)


def tokens(h, w, dim=8, b=2):
    torch.manual_seed(3)
    shapes = [(2 * h, 2 * w), (h, w), (h // 2, w // 2)]
    x = torch.randn(b, h, w, dim).double()
    return x, torch.randn(b, sum(a * b for a, b in shapes), dim).double(), shapes


def test_injector():
    injector = shake(Injector(8, 2, 2, 0.5)).double()
    x, c, shapes = tokens(2, 4)
    update = injector.attn(layer_norm(x, injector.query_norm).view(2, 8, 8), centres([(2, 4)]),
                           layer_norm(c, injector.feat_norm), shapes)
    close(injector(x, c, shapes), x + injector.gamma * update.view(2, 2, 4, 8))
    assert torch.equal(Injector(8, 2, 2, 0.5).double()(x, c, shapes), x)             # at initialisation


def naive_ffn(ffn, c, shapes):
    hidden = linear(ffn.fc1, c)
    out, start = torch.zeros_like(hidden), 0
    for h, w in shapes:
        for i in range(h):
            for j in range(w):
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < h and 0 <= j + dj < w:
                            tap = ffn.dwconv.weight[:, 0, di + 1, dj + 1]
                            out[:, start + i * w + j] += tap * hidden[:, start + (i + di) * w + j + dj]
        start += h * w
    out = out + ffn.dwconv.bias
    return linear(ffn.fc2, out * 0.5 * (1 + torch.erf(out / math.sqrt(2))))


def test_extractor():
    extractor = shake(Extractor(8, 2, 2, 0.5, 0.5, 0.3)).double().eval()
    x, c, shapes = tokens(2, 4)
    keys = layer_norm(x.view(2, 8, 8), extractor.feat_norm)
    with torch.no_grad():
        query = layer_norm(c, extractor.query_norm)
        expected = c + extractor.attn(query, centres(shapes), keys, [(2, 4)])
        expected = expected + naive_ffn(extractor.ffn, layer_norm(expected, extractor.ffn_norm), shapes)
        close(extractor(x, c, shapes), expected)


def test_drop_path_drops_the_ffn_per_sample():
    extractor = shake(Extractor(8, 2, 2, 0.5, 0.5, 0.25)).double()
    x, c, shapes = tokens(2, 2)
    x, c = x[:1].expand(4000, -1, -1, -1), c[:1].expand(4000, -1, -1)
    with torch.no_grad():
        out = extractor(x, c, shapes)
        extractor.drop_path.prob = 1 - 1e-9
        attended = extractor(x[:1], c[:1], shapes)
        extractor.eval()
        full = extractor(x[:1], c[:1], shapes)
    dropped = (out - attended).abs().flatten(1).amax(1) < 1e-9
    assert 0.22 < dropped.double().mean() < 0.28
    close(out[~dropped], (attended + (full - attended) / 0.75).expand(int((~dropped).sum()), -1, -1))


def batch_norm(x, bn):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)


def test_spatial_prior():
    spm = shake(SpatialPrior(8, 2)).double().eval()
    image = torch.randn(2, 3, 64, 96).double()

    def step(x, conv, bn, stride):
        return F.conv2d(x, conv.weight, stride=stride, padding=1), bn

    x = image
    for i, stride in ((0, 2), (3, 1), (6, 1)):
        x = batch_norm(*step(x, spm.stem[i], spm.stem[i + 1], stride)).clamp(min=0)
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-math.inf), 3, 2)
    expected = [x]
    for conv in (spm.conv2, spm.conv3, spm.conv4):
        expected.append(batch_norm(*step(expected[-1], conv[0], conv[1], 2)).clamp(min=0))
    linears = (spm.fc1, spm.fc2, spm.fc3, spm.fc4)
    for out, x, fc, stride in zip(spm(image), expected, linears, (4, 8, 16, 32), strict=True):
        assert out.shape == (2, 8, 64 // stride, 96 // stride)
        close(out, torch.einsum("oc,bchw->bohw", fc.weight[:, :, 0, 0], x) + fc.bias.view(1, -1, 1, 1))


def test_fusion():
    net = shake(small()).double().eval()
    h, w = 4, 6
    outs = [torch.randn(2, h, w, 8).double() for _ in range(4)]
    _, c, shapes = tokens(h, w)
    c1 = torch.randn(2, 8, 4 * h, 4 * w).double()
    c2, c3, c4 = (part.transpose(1, 2).reshape(2, 8, *shape)
                  for part, shape in zip(c.split([4 * h * w, h * w, h * w // 4], 1), shapes, strict=True))
    up = torch.zeros(2, 8, 4 * h, 4 * w).double()
    for i in range(2):
        for j in range(2):
            up[:, :, i::2, j::2] = torch.einsum("co,bchw->bohw", net.up.weight[:, :, i, j], c2)
    maps = [c1 + up + net.up.bias.view(1, -1, 1, 1), c2, c3, c4]
    x1, x2, x3, x4 = (out.permute(0, 3, 1, 2) for out in outs)
    x1, x2 = (F.interpolate(x, scale_factor=k, mode="bilinear") for x, k in ((x1, 4), (x2, 2)))
    levels = [x1, x2, x3, F.avg_pool2d(x4, 2)]             # half size: the mean of 2 x 2
    for f, m, x, norm in zip(net.fuse(c1, c, outs), maps, levels, net.norms, strict=True):
        close(f, batch_norm(m + x, norm))


def test_initialisation():
    torch.manual_seed(4)
    net = small(96, 16, 8, 4)
    assert abs(net.extractors[0].ffn.fc1.weight.std() - 0.02) < 2e-3 and (net.extractors[0].ffn.fc1.bias == 0).all()
    assert abs(net.spm.conv2[0].weight.std() / math.sqrt(2 / (9 * 32)) - 1) < 0.05
    assert abs(net.up.weight.std() / math.sqrt(2 / (4 * 96)) - 1) < 0.05
    assert abs(net.extractors[0].ffn.dwconv.weight.std() / math.sqrt(2 / 9) - 1) < 0.2
    assert abs(net.level_embed.std() - 1) < 0.15 and (net.up.bias == 0).all()
    assert all((injector.gamma == 0).all() for injector in net.injectors)
    assert net.extractors[5].attn.sampling_offsets.bias.abs().max() == 4


def test_stages_and_image_sides():
    net = shake(small()).double().eval()
    c1, c = net.prior(torch.zeros(2, 3, 64, 96).double())
    close(c[:, 96:120], net.spm(torch.zeros(2, 3, 64, 96).double())[2].flatten(2).mT + net.level_embed[1])
    x, c, shapes = tokens(2, 4)
    for stage in range(3):
        close(net.extract(stage, x, c), net.extractors[stage](x, c, shapes))
    expected = c
    for extractor in net.extractors[3:]:
        expected = extractor(x, expected, shapes)
    assert len(net.extractors) == 6
    close(net.extract(3, x, c), expected)
