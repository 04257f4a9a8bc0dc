"""What the tests of a device compare, as functions, so that a planted fault can be shown to fail each of them."""

import dataclasses
import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from config import Config, load_config
from engine.processes import World
from inference import autocast, cast_frozen
from model import SCHNet, build_model
from sam_vit import Attention

DEVICE = torch.device(os.environ.get("SCHNET_TEST_DEVICE", "cuda"))
SMALL = DEVICE.type == "cpu"                               # the same comparisons on a small network, without a GPU
RANDOM = ["sam_weights=", "clip_weights=", "vocab=", "drop_path=0", "head_dropout=0", "precision=fp32"]
SMALL_SIZES = ["sam_dim=64", "sam_depth=4", "sam_heads=4", "sam_window=3", "sam_grid=8", "clip_dim=32", "clip_depth=4",
               "clip_heads=2", "clip_grid=4", "clip_taps=[0, 1, 2, 3]", "clip_embed=16", "text_dim=16", "text_depth=1",
               "text_heads=2", "ftm_tokens=8", "prior_dim=8", "deform_heads=4", "head_dim=32", "aux_dim=16",
               "crop_size=128", "base_size=128"]
CLASSES = [f"class {n}" for n in range(20)]
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
SCALER_START = 2.0 ** 10


def configuration(*changes: str) -> Config:
    return load_config("configs/lip.yaml", [*RANDOM, *(SMALL_SIZES if SMALL else []), *changes])


def network(cfg: Config, seed: int = 0) -> SCHNet:
    """SCHNet with random weights on the CPU, every part away from its special start: nothing is zero, no path is dead."""
    torch.manual_seed(seed)
    model = build_model(cfg, CLASSES)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim:
                p.add_(torch.randn_like(p) * 0.05)
    return model


def batch(cfg: Config, images: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Soft fields of colour and blocks of classes, some of them to be ignored: uint8 (b, 3, h, w), uint8 (b, h, w)."""
    g = torch.Generator().manual_seed(1)
    h, w = cfg.crop_size
    image = F.interpolate(torch.rand(images, 3, h // 8, w // 8, generator=g), (h, w), mode="bilinear") * 255
    label = torch.randint(0, 20, (images, h // 16, w // 16), generator=g, dtype=torch.uint8)
    label[:, 0] = 255
    return image.to(torch.uint8), label.repeat_interleave(16, 1).repeat_interleave(16, 2), []


def one_step(model: SCHNet, cfg: Config, images: int, device: torch.device) -> tuple[dict, dict]:
    """(loss and its parts, gradient of every trained tensor) of one step, BatchNorm's statistics as they are."""
    model.to(device).train()
    model.cfg = cfg
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.AdamW(train.param_groups(model), lr=cfg.lr)
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALER_START, enabled=cfg.precision == "fp16")
    losses = train.forward_backward(model, optimizer, scaler, [batch(cfg, images)], cfg, device, cfg.warmup_iters)
    return losses, {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.requires_grad}


def logits(model: SCHNet, cfg: Config, images: int, device: torch.device) -> torch.Tensor:
    model.to(device).eval()
    with torch.inference_mode(), autocast(device, cfg.precision):
        return model(batch(cfg, images)[0].to(device).float() / 255).float().cpu()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


# ---- the comparisons: each ends in an AssertionError, or the figures it found

def same_logits(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> str:
    worst = error(found, wanted)
    assert worst < bound, f"logits differ by {worst:.1e}, allowed {bound:.0e}"
    return f"logits differ by {worst:.1e}"


def same_loss(found: dict, wanted: dict, bound: float) -> str:
    worst = max(abs(found[name] - wanted[name]) / abs(wanted[name]) for name in ("loss", "ce", "lovasz", "aux"))
    assert worst < bound, f"losses differ by {worst:.1e}, allowed {bound:.0e}"
    return f"losses differ by {worst:.1e}"


def same_gradients(found: dict, wanted: dict, bound: float) -> str:
    """Of every trained tensor, relative to its own size (to the whole gradient's for those that are next to nothing)."""
    assert found.keys() == wanted.keys()
    whole = torch.stack([g.double().norm() for g in wanted.values()]).norm().item()
    errors = {}
    for name, theirs in wanted.items():
        size = max(theirs.double().norm().item(), 1e-6 * whole)
        errors[name] = (found[name].double() - theirs.double()).norm().item() / size
    worst = max(errors, key=errors.get)
    assert errors[worst] < bound, f"gradients differ by {errors[worst]:.1e} in {worst}, allowed {bound:.0e}"
    return f"gradients differ by at most {errors[worst]:.1e} ({worst})"


def fused_attention_is_taken(model: SCHNet, cfg: Config) -> str:
    """SAM's windows, SAM's global layers and CLIP: every layer calls the fused attention, and where no fused kernel can
    run PyTorch raises instead of falling back to the one that keeps an array over all pairs."""
    model.to(DEVICE).eval()
    image = batch(cfg, 2)[0].to(DEVICE).float() / 255
    forward, kernel, calls = Attention.forward, F.scaled_dot_product_attention, []
    F.scaled_dot_product_attention = lambda *args, **kwargs: (calls.append(0), kernel(*args, **kwargs))[1]
    if DEVICE.type == "cpu":                               # a CPU's own form has no fused call: the GPU's is looked at
        Attention.forward = forward.plain
    try:
        with torch.inference_mode(), autocast(DEVICE, "bf16" if DEVICE.type == "cuda" else "fp32"), sdpa_kernel(FUSED):
            model.sam(image)
            model.clip(image)
    finally:
        Attention.forward, F.scaled_dot_product_attention = forward, kernel
    layers = model.sam.depth + model.clip.depth
    assert len(calls) == layers, f"{len(calls)} of {layers} layers call the fused attention"
    return f"{layers} layers, fused kernels only"


def frozen_in_half(cfg: Config) -> tuple[tuple, tuple]:
    """The step of a network whose frozen weights are kept in bf16, and of one that keeps them in fp32."""
    cfg = dataclasses.replace(cfg, precision="bf16")
    results = []
    for half in (True, False):
        model = network(cfg)
        if half:
            cast_frozen(model, "bf16")
        results.append(one_step(model, cfg, 2, DEVICE))
    return tuple(results)


def world_of_one() -> World:
    return World(DEVICE.type)
