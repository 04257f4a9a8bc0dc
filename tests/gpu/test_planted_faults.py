"""Planted faults show, on the CPU, that each comparison of compare.py can fail."""

import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch.nn.functional as F

import fast
from sam_vit import Attention

with mock.patch.dict("os.environ", SCHNET_TEST_DEVICE="cpu"):            # a separate copy: the other may use a GPU
    spec = importlib.util.spec_from_file_location("compare_on_cpu", Path(__file__).with_name("compare.py"))
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)


@pytest.fixture(scope="module")
def cfg():
    return compare.configuration()


@pytest.fixture(scope="module")
def right(cfg):
    model = compare.network(cfg)
    return compare.logits(model, cfg, 1, compare.DEVICE), compare.one_step(model, cfg, 2, compare.DEVICE)


def test_a_wrong_scale_in_a_fast_version(cfg, right, monkeypatch):
    wrong = fast.replaced_by(lambda self, x: 1.02 * fast.sam_attention(self, x))(Attention.forward.plain)
    monkeypatch.setattr(Attention, "forward", wrong)
    model = compare.network(cfg)
    with pytest.raises(AssertionError, match="logits differ"):
        compare.same_logits(compare.logits(model, cfg, 1, compare.DEVICE), right[0], 1e-4)
    losses, gradients = compare.one_step(model, cfg, 2, compare.DEVICE)
    with pytest.raises(AssertionError, match="gradients differ"):
        compare.same_gradients(gradients, right[1][1], 1e-3)


@pytest.mark.parametrize("factor", (0.0, 0.5, 1.01))
def test_a_wrong_gradient(cfg, right, factor):
    model = compare.network(cfg)
    model.ftm.second[1].weight.register_hook(lambda gradient: factor * gradient)
    _, gradients = compare.one_step(model, cfg, 2, compare.DEVICE)
    with pytest.raises(AssertionError, match="in ftm.second.1.weight"):
        compare.same_gradients(gradients, right[1][1], 1e-3)


def test_an_attention_that_is_not_fused(cfg, monkeypatch):
    monkeypatch.setattr(fast, "ENABLED", False)
    with pytest.raises(AssertionError, match="4 of 8 layers call the fused attention"):
        compare.fused_attention_is_taken(compare.network(cfg), cfg)


def test_an_attention_that_falls_back(cfg, monkeypatch):
    """The CPU's fused kernels do not support dropout."""
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: kernel(*args, **more, dropout_p=0.1))
    with pytest.raises(RuntimeError, match="kernel"):
        compare.fused_attention_is_taken(compare.network(cfg), cfg)
