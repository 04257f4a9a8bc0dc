"""The comparisons of the GPU tests, as functions so that test_planted_faults.py can show that each can fail."""

import dataclasses
import os
from unittest import mock

import torch
import torch.nn.functional as F
import tiny  # noqa: F401                                  registers the encoder size "tests"
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from config import Config, load_config
from engine.processes import World
from layers import autocast
from model import SCHNet, build_model
from sam_vit import Attention

DEVICE = torch.device(os.environ.get("SCHNET_TEST_DEVICE", "cuda"))
SMALL = DEVICE.type == "cpu"                               # without a GPU: a small network
RANDOM = ["sam_weights=", "clip_weights=", "vocab=", "drop_path=0", "head_dropout=0", "precision=fp32"]
SMALL_SIZES = ["sam=tests", "clip=tests", "clip_taps=[0, 1, 2, 3]", "ftm_tokens=8", "prior_dim=8", "deform_heads=4",
               "head_dim=32", "aux_dim=16", "crop_size=128", "base_size=128"]
CLASSES = [f"class {n}" for n in range(20)]
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
FP16_SCALE = 2.0 ** 10                                     # the default overflows with these weights


def configuration(*changes: str) -> Config:
    return load_config("configs/lip.yaml", [*RANDOM, *(SMALL_SIZES if SMALL else []), *changes])


def network(cfg: Config, seed: int = 0) -> SCHNet:
    """SCHNet with random weights on the CPU; noise replaces initial zeros, so that every path matters."""
    torch.manual_seed(seed)
    model = build_model(cfg, CLASSES)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim:
                p.add_(torch.randn_like(p) * 0.05)
    return model


def batch(cfg: Config, images: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Smooth images and blocky labels, some ignored: uint8 (b, 3, h, w), uint8 (b, h, w), names."""
    g = torch.Generator().manual_seed(1)
    h, w = cfg.crop_size
    image = F.interpolate(torch.rand(images, 3, h // 8, w // 8, generator=g), (h, w), mode="bilinear") * 255
    label = torch.randint(0, 20, (images, h // 16, w // 16), generator=g, dtype=torch.uint8)
    label[:, 0] = 255
    return image.to(torch.uint8), label.repeat_interleave(16, 1).repeat_interleave(16, 2), []


def learner(model: SCHNet, cfg: Config, device: torch.device) -> train.Learner:
    """A learner with frozen BatchNorm statistics."""
    model.cfg = cfg
    made = train.Learner(model, cfg, World(device.type))
    made.scaler = torch.amp.GradScaler(device.type, init_scale=FP16_SCALE, enabled=cfg.precision == "fp16")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return made


def one_step(model: SCHNet, cfg: Config, images: int, device: torch.device) -> tuple[dict, dict]:
    """(loss and its parts, gradient of every trained tensor) of one step."""
    losses = learner(model, cfg, device).gradient([batch(cfg, images)], cfg.warmup_iters)
    return losses, {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.requires_grad}


def logits(model: SCHNet, cfg: Config, images: int, device: torch.device) -> torch.Tensor:
    model.to(device).eval()
    with torch.inference_mode(), autocast(device, cfg.precision):
        return model(batch(cfg, images)[0].to(device).float() / 255).float().cpu()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def same_logits(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> str:
    worst = error(found, wanted)
    assert worst < bound, f"logits differ by {worst:.1e}, allowed {bound:.0e}"
    return f"logits differ by {worst:.1e}"


def same_loss(found: dict, wanted: dict, bound: float) -> str:
    worst = max(abs(found[name] - wanted[name]) / abs(wanted[name]) for name in ("loss", "ce", "lovasz", "aux"))
    assert worst < bound, f"losses differ by {worst:.1e}, allowed {bound:.0e}"
    return f"losses differ by {worst:.1e}"


def same_gradients(found: dict, wanted: dict, bound: float) -> str:
    """For every trained tensor, relative to its norm or, if larger, a millionth of the complete gradient's norm."""
    assert found.keys() == wanted.keys()
    total = torch.stack([g.double().norm() for g in wanted.values()]).norm().item()
    errors = {}
    for name, theirs in wanted.items():
        size = max(theirs.double().norm().item(), 1e-6 * total)
        errors[name] = (found[name].double() - theirs.double()).norm().item() / size
    worst = max(errors, key=errors.get)
    assert errors[worst] < bound, f"gradients differ by {errors[worst]:.1e} in {worst}, allowed {bound:.0e}"
    return f"gradients differ by at most {errors[worst]:.1e} ({worst})"


def fused_attention_is_taken(model: SCHNet, cfg: Config) -> str:
    """Every layer of SAM and CLIP calls the fused attention; PyTorch raises if it cannot use a fused kernel."""
    model.to(DEVICE).eval()
    image = batch(cfg, 2)[0].to(DEVICE).float() / 255
    forward, kernel, calls = Attention.forward, F.scaled_dot_product_attention, []

    def counted(*args, **kwargs):
        calls.append(0)
        return kernel(*args, **kwargs)

    # a CPU's fast version has no fused call, so the GPU's is tested there
    with (mock.patch.object(F, "scaled_dot_product_attention", counted),
          mock.patch.object(Attention, "forward", forward.plain if DEVICE.type == "cpu" else forward),
          torch.inference_mode(), autocast(DEVICE, "bf16" if DEVICE.type == "cuda" else "fp32"), sdpa_kernel(FUSED)):
        model.sam(image)
        model.clip(image)
    layers = model.sam.depth + model.clip.depth
    assert len(calls) == layers, f"{len(calls)} of {layers} layers call the fused attention"
    return f"{layers} layers, fused kernels only"


def frozen_in_half(cfg: Config) -> tuple[tuple, tuple]:
    """A step with the frozen weights stored in bf16, and one with them in fp32."""
    cfg = dataclasses.replace(cfg, precision="bf16")
    half = one_step(network(cfg), cfg, 2, DEVICE)
    with mock.patch.object(train, "cast_frozen", lambda model, precision: None):
        return half, one_step(network(cfg), cfg, 2, DEVICE)
