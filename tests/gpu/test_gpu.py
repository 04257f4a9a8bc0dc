"""A GPU beside the CPU: numbers, kernels, memory, waits, programs. `make test-gpu`, about three minutes on one card."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import compare
import numpy as np
import pytest
import torch
import torch.distributed as dist
from compare import DEVICE, SMALL, batch, configuration, error, logits, network, one_step
from test_fast import BOUNDS, PAIRS, SLOPES, relative
from tiny import differences, free_port, make_config

import evaluate
import export
import fast
import inference
import predict
import train
from config import Config
from datasets import LABEL_SETS, open_split, train_loader
from engine import checkpoint
from inference import cast_frozen
from losses import lovasz_softmax
from synthetic.draw import draw

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(DEVICE.type == "cpu", reason="about CUDA itself")
# GiB of a step, counted from what autograd keeps (docs/reproduce.md): images, checkpointing
COUNTED = {(4, False): 10.7, (4, True): 7.2, (16, False): 37.3, (16, True): 23.2}
AIMS = {(4, False): 16, (4, True): 10}


@pytest.fixture(scope="module")
def wanted():
    """On the CPU in fp32, with the plain forms: the network's logits, the loss and the gradient of a step of two images."""
    cfg = configuration()
    model = network(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "ENABLED", False)
        return logits(model, cfg, 1, CPU), one_step(model, cfg, 2, CPU)


# ---- numbers

def test_the_step_is_the_cpus_in_fp32(wanted):
    cfg = configuration()
    model = network(cfg)
    print(compare.same_logits(logits(model, cfg, 1, DEVICE), wanted[0], 1e-4))
    losses, gradients = one_step(model, cfg, 2, DEVICE)
    print(compare.same_loss(losses, wanted[1][0], 1e-4))
    print(compare.same_gradients(gradients, wanted[1][1], 1e-3))


@pytest.mark.parametrize("precision, of_logits, of_loss, of_gradient", [("bf16", 0.03, 0.02, 0.2), ("fp16", 0.01, 0.01, 0.1)])
def test_lower_precision_is_close(wanted, precision, of_logits, of_loss, of_gradient):
    if precision == "fp16" and DEVICE.type == "cpu":
        pytest.skip("fp16 is for GPUs")
    cfg = configuration(f"precision={precision}")
    model = network(cfg)
    cast_frozen(model, precision)
    print(compare.same_logits(logits(model, cfg, 1, DEVICE), wanted[0], of_logits))
    losses, gradients = one_step(model, cfg, 2, DEVICE)
    print(compare.same_loss(losses, wanted[1][0], of_loss))
    flat = [torch.cat([g.flatten() for g in gradient.values()]) for gradient in (gradients, wanted[1][1])]
    print(f"the whole gradient differs by {error(*flat):.1e}")
    assert error(*flat) < of_gradient


def test_frozen_weights_kept_in_half_give_the_same_step():
    half, whole = compare.frozen_in_half(configuration())
    print(compare.same_loss(half[0], whole[0], 1e-6))
    print(compare.same_gradients(half[1], whole[1], 1e-2))  # sums in bf16, in an order that is not fixed on a GPU


def test_checkpointing_gives_the_same_gradients():
    results = [one_step(network(cfg), cfg, 2, DEVICE) for cfg in (configuration(), configuration("checkpointing=true"))]
    print(compare.same_loss(results[1][0], results[0][0], 1e-6))
    print(compare.same_gradients(results[1][1], results[0][1], 1e-4))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", [name for name in PAIRS if SMALL or "480" in name])
def test_fast_forms_are_the_plain_ones(name, dtype):
    pair, make = PAIRS[name]
    if DEVICE.type not in pair.on:
        pytest.skip(f"the plain form is used on {DEVICE.type}")
    g = torch.Generator().manual_seed(0)
    arguments, _ = make(lambda shape: torch.randn(shape, generator=g), dtype)
    inputs = []

    def move(value):
        if isinstance(value, list):
            return [move(item) for item in value]
        if isinstance(value, torch.nn.Module):
            inputs.extend(value.to(DEVICE).parameters())
            return value
        if isinstance(value, torch.Tensor):
            inputs.append(value.detach().to(DEVICE).requires_grad_())
            return inputs[-1]
        return value

    arguments = [move(value) for value in arguments]
    plain, quick = pair.plain(*arguments), pair.fast(*arguments)
    assert relative(quick, plain) < BOUNDS[dtype]
    up = torch.randn(plain.shape, generator=g).to(plain)
    slopes = [torch.autograd.grad(out, inputs, up) for out in (quick, plain)]
    for ours, theirs in zip(*slopes, strict=True):
        assert relative(ours, theirs) < SLOPES[dtype]


def test_the_lovasz_loss_is_the_cpus():
    g = torch.Generator().manual_seed(0)
    shape = (2, 20, 64, 64) if SMALL else (4, 20, 480, 480)
    values = torch.randn(shape, generator=g)
    labels = torch.randint(0, 19, (shape[0], *shape[2:]), generator=g)
    results = []
    for device in (CPU, DEVICE):
        x = values.to(device).requires_grad_()
        loss = lovasz_softmax(x, labels.to(device))
        results.append((loss.item(), torch.autograd.grad(loss, x)[0].cpu()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert error(results[1][1], results[0][1]) < 1e-4


# ---- kernels, memory, waits

def test_fused_attention_is_taken():
    cfg = configuration()
    print(compare.fused_attention_is_taken(network(cfg), cfg))


@needs_cuda
@pytest.mark.parametrize("images, checkpointing", COUNTED)
def test_peak_memory(images, checkpointing):
    cfg = configuration("precision=bf16", f"checkpointing={checkpointing}")
    model = network(cfg)
    cast_frozen(model, "bf16")
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(train.param_groups(model), lr=cfg.lr, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        train.forward_backward(model, optimizer, scaler, [batch(cfg, images)], cfg, DEVICE, cfg.warmup_iters)
        optimizer.step()
    peak = torch.cuda.max_memory_allocated() / 2 ** 30
    print(f"{images} images, checkpointing {checkpointing}: {peak:.1f} GiB, counted {COUNTED[images, checkpointing]}")
    assert peak < AIMS.get((images, checkpointing), 1e9)
    assert peak < 1.25 * COUNTED[images, checkpointing] + 1   # the loss and the libraries' workspace come on top


@needs_cuda
def test_a_step_waits_once():
    """For the values of the log. Every other wait would leave the GPU without work."""
    cfg = configuration("precision=bf16")
    model = network(cfg).to(DEVICE).train()
    optimizer = torch.optim.AdamW(train.param_groups(model), lr=cfg.lr, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    images, labels, names = batch(cfg, 2)
    batches = [(images.pin_memory(), labels.pin_memory(), names)]
    train.forward_backward(model, optimizer, scaler, batches, cfg, DEVICE, 0)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train.forward_backward(model, optimizer, scaler, batches, cfg, DEVICE, 1)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{Path(w.filename).name}:{w.lineno}" for w in waits if "synchronizing CUDA operation" in str(w.message)]
    print("waits:", waits)
    assert len(waits) == 1 and waits[0].startswith("train.py")


@needs_cuda
def test_copies_overlap_with_the_step():
    """What the loader hands over lies in pinned memory, so that `non_blocking` copies do not block."""
    cfg = dataclasses.replace(configuration(), dataset="synthetic", workers=2, batch_size=2)
    image, label, _ = next(train_loader(cfg, open_split(cfg, "train")))
    assert image.is_pinned() and label.is_pinned()


# ---- processes

@contextlib.contextmanager
def process_group():
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", init_method=f"tcp://127.0.0.1:{free_port()}",
                            rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_of_one_process_has_the_same_gradients():
    cfg = configuration()
    wanted = one_step(network(cfg), cfg, 2, DEVICE)
    with process_group():
        model = network(cfg).to(DEVICE).train()
        model.cfg = cfg
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(train.param_groups(model), lr=cfg.lr)
        scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
        losses = train.forward_backward(ddp, optimizer, scaler, [batch(cfg, 2)], cfg, DEVICE, cfg.warmup_iters)
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
    print(compare.same_loss(losses, wanted[0], 1e-5))
    print(compare.same_gradients(gradients, wanted[1], 1e-3))


@needs_cuda
def test_sync_batchnorm_is_batchnorm_for_one_process():
    cfg = configuration()
    results = []
    with process_group():
        for sync in (False, True):
            model = network(cfg)
            if sync:
                model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
                assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
            model.to(DEVICE).train()
            results.append(model(batch(cfg, 2)[0].to(DEVICE).float() / 255)[0].detach().cpu())
    assert error(results[1], results[0]) < 1e-5


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card")
def test_many_cards_train_like_one(tmp_path):
    config, cards = make_config(tmp_path), torch.cuda.device_count()
    knobs = [f"batch_size={2 * cards}", "loss_group=2", "iters=6", "log_every=1", "precision=fp32", "drop_path=0",
             "head_dropout=0"]
    logs = []
    for count in (1, cards):
        folder = tmp_path / f"run{count}"
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), ROOT / "train.py",
                        "--cfg", config, f"out={folder}", *knobs], check=True, cwd=ROOT, timeout=300)
        logs.append([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])
    for one, many in zip(*logs, strict=True):
        assert one["iter"] == many["iter"] and all(
            many[key] == pytest.approx(one[key], rel=1e-2) for key in ("loss", "ce") if key in one)


class Killed(BaseException):
    """No program catches this."""


def test_killed_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    """To the last bit where every operator has a deterministic form; which have none is said, and then it is close."""
    config, real = make_config(tmp_path), train.forward_backward
    common = ["--cfg", config, "iters=8", "save_every=2", "eval_every=8"]
    monkeypatch.setattr(train, "World", lambda *_: compare.world_of_one(), raising=False)

    def step(*args):
        if args[6] == 5:
            raise Killed
        return real(*args)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            train.main([*common, f"out={tmp_path / 'whole'}"])
            monkeypatch.setattr(train, "forward_backward", step)
            with pytest.raises(Killed):
                train.main([*common, f"out={tmp_path / 'killed'}"])
            monkeypatch.setattr(train, "forward_backward", real)
            train.main([*common, f"out={tmp_path / 'killed'}", "--resume"])
        finally:
            torch.use_deterministic_algorithms(False)
    unordered = sorted({str(w.message).split(" ")[0] for w in found if "deterministic" in str(w.message)})
    print("operators without a deterministic form:", ", ".join(unordered) or "none")
    whole, killed = (checkpoint.read(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    differing = differences(killed, whole)
    print(f"{len(differing)} values of the checkpoints differ")
    assert not differing or unordered
    for name, tensor in whole["model"].items():
        assert error(killed["model"][name], tensor) < 1e-3 or tensor.double().norm() < 1e-3, name


# ---- the programs

@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose small random network finds many classes in a figure."""
    cfg = Config(**{**vars(configuration()), "dataset": "synthetic", "synthetic_size": (128, 96), "synthetic_val": 12,
                    "crop_size": (128, 128), "base_size": 128, "aux_weight": 0.0, "workers": 2, "sam_dim": 64,
                    "sam_depth": 4, "sam_heads": 4, "sam_window": 3, "sam_grid": 8, "clip_dim": 32, "clip_depth": 4,
                    "clip_heads": 2, "clip_grid": 4, "clip_taps": (0, 1, 2, 3), "clip_embed": 16, "text_dim": 16,
                    "text_depth": 1, "text_heads": 2, "prior_dim": 8, "deform_heads": 4, "head_dim": 32})
    labels = LABEL_SETS["lip"]
    torch.manual_seed(0)
    model = inference.build_model(cfg, labels.classes)
    torch.nn.init.normal_(model.head.conv_seg.weight, std=2.0)
    path = tmp_path_factory.mktemp("runs") / "small"
    path.mkdir()
    checkpoint.write(path / checkpoint.BEST, checkpoint.pack(model, labels, {}, {}))
    return path


def test_the_programs_give_what_they_give_on_a_cpu(run, tmp_path):
    figures = tmp_path / "figures"
    figures.mkdir()
    for i in range(3):
        predict.pictures.save_png(figures / f"{i}.png", draw(5, i, (160, 120))[0])
    scores, labels = {}, {}
    for device in ("cpu", DEVICE.type):
        out = tmp_path / f"evaluation_{device}"
        evaluate.main(["--run", str(run), "--tta", "--device", device, "--out", str(out), "precision=fp32"])
        scores[device] = json.loads((out / "results.json").read_text())
        parser = predict.Parser(run, device=device)
        parser.model.cfg = dataclasses.replace(parser.model.cfg, precision="fp32")
        labels[device] = np.stack([parser.parse(figures / f"{i}.png") for i in range(3)])
        assert predict.main([str(figures), "--run", str(run), "--device", device, "--out", str(tmp_path / device)]) in (0, None)
        assert len(list((tmp_path / device / "labels").iterdir())) == 3
    assert scores[DEVICE.type]["miou"] == pytest.approx(scores["cpu"]["miou"], abs=2e-3)
    assert (labels["cpu"] == labels[DEVICE.type]).mean() > 0.999


def test_export_on_this_machine(run, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export.main(["--run", str(run), "--out", str(tmp_path / "model.onnx")])
    assert (tmp_path / "model.onnx").stat().st_size > 0


@needs_cuda
def test_out_of_memory_ends_in_one_line(tmp_path, capsys):
    config = make_config(tmp_path)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (8 << 20)) / total)
    try:
        with pytest.raises(SystemExit) as end:
            train.main(["--cfg", config, f"out={tmp_path / 'run'}", "crop_size=512", "base_size=512", "head_dim=256"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert end.value.code == 1 and "out of GPU memory" in line and "checkpointing=true" in line and "accum_steps" in line
