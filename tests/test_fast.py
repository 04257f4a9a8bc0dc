"""fast.py: each fast version against its plain one, values and gradients, at small and real sizes."""

import math
import runpy

import pytest
import torch

import fast
from inference import label_map, probabilities
from losses import lovasz_softmax
from sam_vit import Attention
from uperhead import conv_of_resized

BOUNDS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}          # relative, of values
SLOPES = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 6e-2}          # ... and of gradients


def sam(h, w, window, grid, dim, heads, b=2):
    """A block's attention over h x w tokens, in windows or (window 0) over the complete grid."""
    def make(random, dtype):
        module = Attention(dim, heads, window, window or grid)
        for p in module.parameters():
            p.data = random(p.shape) * (0.2 if p.ndim < 2 or len(p) < dim else dim ** -0.5)
        module.to(dtype)
        x = random((b, h, w, dim)).to(dtype).requires_grad_()
        return (module, x), [x, *module.parameters()]
    return Attention.forward, make


def fusion(sizes, dim, b=2):
    def make(random, dtype):
        maps = [random((b, dim, *size)).to(dtype).requires_grad_() for size in sizes]
        weight = (random((dim, dim * len(sizes), 3, 3)) / (9 * dim * len(sizes)) ** 0.5).to(dtype).requires_grad_()
        return (maps, weight, sizes[0]), [*maps, weight]
    return conv_of_resized, make


PAIRS = {
    "SAM, windows": sam(8, 13, 5, 12, 48, 3),
    "SAM, a grid smaller than a window": sam(2, 3, 5, 12, 48, 3),
    "SAM, one image, one row of windows": sam(5, 13, 5, 12, 48, 3, b=1),
    "SAM, complete grid": sam(8, 13, 0, 12, 48, 3),
    "SAM, windows, ViT-L at 480 px": sam(30, 30, 14, 64, 1024, 16),
    "SAM, complete grid, ViT-L at 480 px": sam(30, 30, 0, 64, 1024, 16),
    "convolution of resized maps": fusion([(7, 9), (5, 4), (3, 3), (1, 1)], 6),
    "convolution of resized maps, enlarged and reduced": fusion([(4, 4), (9, 8)], 6),
    "convolution of resized maps, UperNet at 480 px": fusion([(120, 120), (60, 60), (30, 30), (15, 15)], 512, b=1),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


# The real sizes in fp32 only: most CPUs compute bf16 very slowly.
CASES = [(name, dtype) for name in PAIRS for dtype in BOUNDS if "480" not in name or dtype == torch.float32]


@pytest.mark.parametrize("name, dtype", CASES, ids=[f"{name}, {dtype}" for name, dtype in CASES])
def test_pairs_are_equal(name, dtype):
    pair, make = PAIRS[name]
    generator = torch.Generator().manual_seed(0)
    arguments, inputs = make(lambda shape: torch.randn(shape, generator=generator), dtype)
    plain, quick = pair.plain(*arguments), pair.fast(*arguments)
    assert relative(quick, plain) < BOUNDS[dtype]
    if "UperNet" in name:                                  # the plain version's gradient needs gigabytes
        return
    up = torch.randn(plain.shape, generator=generator).to(plain.dtype)
    slopes = (torch.autograd.grad(out, inputs, up) for out in (quick, plain))
    for ours, theirs in zip(*slopes, strict=True):
        assert relative(ours, theirs) < SLOPES[dtype]


@pytest.mark.parametrize("merge", (None, ((3, 0), (1,), (), (2, 4))))
@pytest.mark.parametrize("size, views", (((1, 1), [(2, 3)]), ((61, 83), [(24, 32), (32, 43), (61, 83), (100, 40)]),
                                         ((960, 1280), [(270, 360), (360, 480)])))
def test_probabilities_in_strips_are_equal(monkeypatch, size, views, merge):
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(5, *view, generator=generator) for view in views]
    plain, label = probabilities.plain(logits, size, merge), label_map.plain(logits, size, merge)
    best = plain.topk(2, dim=0).values
    for rows in (13, 4000):                                # several strips, the last one shorter; one strip
        monkeypatch.setattr(fast, "CPU_STRIP", 4 * 5 * size[1] * rows)
        assert len(list(fast.strips(logits, size, merge))) == math.ceil(size[0] / rows)
        quick = probabilities.fast(logits, size, merge)
        assert quick.shape == plain.shape and (quick - plain).abs().max() < 1e-5
        found = label_map.fast(logits, size, merge)
        assert found.dtype == label.dtype == torch.uint8 and torch.equal(found, quick.argmax(0).byte())
        assert (found == label)[best[0] - best[1] > 1e-4].all()


@pytest.mark.parametrize("size, dtype", (((2, 5, 12, 9), torch.float64), ((2, 20, 480, 480), torch.float32)), ids=str)
def test_losses_are_equal(size, dtype):
    """Without ties, both versions sort the errors in the same order."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, dtype=dtype, generator=generator).requires_grad_()
    labels = torch.randint(size[1] - 1, (size[0], *size[2:]), generator=generator)       # the last class is absent
    labels[:, :3] = 255
    plain, quick = lovasz_softmax.plain(logits, labels), lovasz_softmax.fast(logits, labels)
    assert relative(quick, plain) < (1e-12 if dtype == torch.float64 else 1e-5)
    slopes = [torch.autograd.grad(loss, logits)[0] for loss in (quick, plain)]
    assert relative(*slopes) < (1e-10 if dtype == torch.float64 else 1e-4)


def test_the_switch(monkeypatch):
    calls = []
    pair = fast.replaced_by(lambda x: calls.append("fast"))(lambda x: calls.append("plain"))
    monkeypatch.setattr(fast, "ENABLED", True)
    pair(torch.zeros(1))
    monkeypatch.setattr(fast, "ENABLED", False)
    pair(torch.zeros(1))
    monkeypatch.setattr(fast, "ENABLED", True)
    pair(torch.zeros(1, device="meta"))                    # neither a CPU nor CUDA
    assert calls == ["fast", "plain", "plain"]
    for value, enabled in (("0", False), ("1", True)):
        monkeypatch.setenv("SCHNET_FAST", value)
        assert runpy.run_path(fast.__file__)["ENABLED"] == enabled
