"""uperhead.py against transformers' UperNet heads with the same weights."""

import pytest
import torch
from tiny import close, shake
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from uperhead import FCNHead, UPerHead

SIZES = [(24, 16), (12, 8), (6, 4), (3, 2)]


def features(dim=8, b=3, sizes=SIZES, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(b, dim, *size, dtype=dtype, requires_grad=True) for size in sizes]


def transformers_names(state):
    return {name.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier"): x for name, x in state.items()}


def heads(in_dim=8, dim=6, num_classes=5):
    """(this repository's, transformers') heads of both kinds, same random weights, double precision, no dropout."""
    config = UperNetConfig(hidden_size=dim, auxiliary_channels=dim, auxiliary_num_convs=1, num_labels=num_classes,
                           auxiliary_in_channels=in_dim)
    pairs = []
    for ours, theirs in ((UPerHead(in_dim, dim, num_classes, 0.0), UperNetHead(config, [in_dim] * 4)),
                         (FCNHead(in_dim, dim, num_classes, 0.0), UperNetFCNHead(config, [in_dim] * 4))):
        theirs.double().load_state_dict(transformers_names(shake(ours).double().state_dict()))
        pairs.append((ours, theirs))
    return pairs


def compare(ours, theirs, mine, features, expected):
    """Outputs, gradients of all parameters and of `features`, and BatchNorm's statistics."""
    close(mine, expected)
    up, names = torch.randn_like(mine), dict(ours.named_parameters())
    others = dict(theirs.named_parameters())
    slopes = torch.autograd.grad(mine, [*features, *names.values()], up)
    wanted = torch.autograd.grad(expected, [*features, *[others[name] for name in transformers_names(names)]], up)
    for a, b in zip(slopes, wanted, strict=True):
        close(a, b, 1e-8)
    buffers = dict(theirs.named_buffers())
    for name, buffer in transformers_names(dict(ours.named_buffers())).items():
        close(buffer, buffers[name])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, [(40, 24), (20, 12), (10, 6), (5, 3)], [(8, 8), (4, 4), (2, 2), (1, 1)]])
def test_heads_against_transformers(train, sizes, both_forms):
    upernet, fcn = heads()
    for head in (*upernet, *fcn):
        head.train(train)
    f = features(sizes=sizes)
    out = upernet[0](f)
    assert out.shape == (3, 5, *sizes[0])
    compare(*upernet, out, f, upernet[1](f))
    compare(*fcn, fcn[0](f[2]), f[2:3], fcn[1](f))


def test_initialisation():
    torch.manual_seed(2)
    head = UPerHead(64, 64, 20, 0.1)
    for module, fan_out in ((head.fpn_bottleneck, 64 * 9), (head.lateral_convs[0], 64)):
        assert abs(module.conv.weight.std() / (2 / fan_out) ** 0.5 - 1) < 0.05
        assert (module.bn.weight == 1).all() and (module.bn.bias == 0).all()
    assert abs(head.conv_seg.weight.std() / 0.01 - 1) < 0.1 and (head.conv_seg.bias == 0).all()


def test_dropout_drops_channels():
    for head in (UPerHead(8, 60, 5, 0.5), FCNHead(8, 60, 5, 0.5)):
        seen = []
        head.conv_seg.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        f = features(dtype=torch.float32)
        head.train()(f if isinstance(head, UPerHead) else f[2])
        dropped = (seen[0] == 0).flatten(2).all(-1)
        assert 0.3 < dropped.float().mean() < 0.7


def test_half_precision_stays_close(both_forms):
    torch.manual_seed(3)
    head = UPerHead(32, 24, 5, 0.1).eval()
    f = features(32, dtype=torch.float32)
    exact = head(f)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(f)
    assert (half - exact).norm() < 0.02 * exact.norm()
    head.bfloat16()
    assert (head([x.bfloat16() for x in f]) - exact).norm() < 0.02 * exact.norm()
