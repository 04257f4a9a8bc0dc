"""GPU against CPU: values, kernels, memory, synchronisation, programs. `make test-gpu`."""

import contextlib
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
from tiny import differences, free_port, kill_and_resume, make_config

import evaluate
import fast
import predict
import train
from engine import checkpoint
from layers import cast_frozen
from synthetic.draw import draw
from viz.pictures import save_png

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(DEVICE.type == "cpu", reason="tests CUDA itself")
# {(images, checkpointing): GiB of a step}, computed from the tensors autograd saves (docs/reproduce.md)
COUNTED = {(4, False): 10.7, (4, True): 7.2, (16, False): 37.3, (16, True): 23.2}
AIMS = {(4, False): 16, (4, True): 10}


@pytest.fixture(scope="module")
def wanted():
    """Logits, losses and gradients of a step on the CPU, in fp32 with the plain versions."""
    cfg = configuration()
    model = network(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "ENABLED", False)
        return logits(model, cfg, 1, CPU), one_step(model, cfg, 2, CPU)


@pytest.mark.parametrize("precision, of_logits, of_loss, of_gradient", [
    ("fp32", 1e-4, 1e-4, 1e-4), ("bf16", 0.03, 0.02, 0.2),
    pytest.param("fp16", 0.01, 0.01, 0.1, marks=pytest.mark.skipif(SMALL, reason="fp16 is for GPUs"))])
def test_a_step_equals_the_cpus(wanted, precision, of_logits, of_loss, of_gradient):
    cfg = configuration(f"precision={precision}")
    model = network(cfg)
    cast_frozen(model, precision)
    print(compare.same_logits(logits(model, cfg, 1, DEVICE), wanted[0], of_logits))
    losses, gradients = one_step(model, cfg, 2, DEVICE)
    print(compare.same_loss(losses, wanted[1][0], of_loss))
    flat = [torch.cat([g.flatten() for g in gradient.values()]) for gradient in (gradients, wanted[1][1])]
    print(f"the complete gradient differs by {error(*flat):.1e}")
    assert error(*flat) < of_gradient
    if precision == "fp32":
        print(compare.same_gradients(gradients, wanted[1][1], 1e-3))


def test_frozen_weights_kept_in_half_give_the_same_step():
    half, full = compare.frozen_in_half(configuration())
    print(compare.same_loss(half[0], full[0], 1e-6))
    print(compare.same_gradients(half[1], full[1], 1e-2))  # bf16 sums, whose order varies on a GPU


def test_checkpointing_gives_the_same_gradients():
    results = [one_step(network(cfg), cfg, 2, DEVICE) for cfg in (configuration(), configuration("checkpointing=true"))]
    print(compare.same_loss(results[1][0], results[0][0], 1e-6))
    print(compare.same_gradients(results[1][1], results[0][1], 1e-4))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", [name for name in PAIRS if ("480" in name) != SMALL])
def test_fast_versions_equal_the_plain_ones(name, dtype):
    pair, make = PAIRS[name]
    if DEVICE.type not in pair.on:
        pytest.skip(f"the plain version is used on {DEVICE.type}")
    g, inputs = torch.Generator().manual_seed(0), []

    def move(value):
        if isinstance(value, list):
            return [move(item) for item in value]
        if isinstance(value, torch.nn.Module):
            inputs.extend(value.to(DEVICE).parameters())
        if isinstance(value, torch.Tensor):
            value = value.detach().to(DEVICE).requires_grad_()
            inputs.append(value)
        return value

    arguments = [move(value) for value in make(lambda shape: torch.randn(shape, generator=g), dtype)[0]]
    plain, quick = pair.plain(*arguments), pair.fast(*arguments)
    assert relative(quick, plain) < BOUNDS[dtype]
    up = torch.randn(plain.shape, generator=g).to(plain)
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, up) for out in (quick, plain)), strict=True):
        assert relative(ours, theirs) < SLOPES[dtype]


def test_fused_attention_is_taken():
    cfg = configuration()
    print(compare.fused_attention_is_taken(network(cfg), cfg))


@needs_cuda
@pytest.mark.parametrize("images, checkpointing", COUNTED)
def test_peak_memory(images, checkpointing):
    cfg = configuration("precision=bf16", f"checkpointing={checkpointing}")
    learner = compare.learner(network(cfg), cfg, DEVICE)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        learner.step([batch(cfg, images)], cfg.warmup_iters)
    peak = torch.cuda.max_memory_allocated() / 2 ** 30
    print(f"{images} images, checkpointing {checkpointing}: {peak:.1f} GiB, counted {COUNTED[images, checkpointing]}")
    assert peak < AIMS.get((images, checkpointing), 1e9)
    assert peak < 1.25 * COUNTED[images, checkpointing] + 1   # plus the loss and the libraries' workspace


@needs_cuda
def test_a_step_synchronises_once():
    """To read the losses and the gradient norm; any other synchronisation would leave the GPU idle."""
    cfg = configuration("precision=bf16")
    learner = compare.learner(network(cfg), cfg, DEVICE)
    images, labels, names = batch(cfg, 2)
    batches = [(images.pin_memory(), labels.pin_memory(), names)]
    learner.step(batches, 0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            learner.step(batches, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchronizing CUDA operation" in str(w.message)]
    print("synchronisations:", lines)
    assert len(lines) == 1 and lines[0].startswith("train.py")


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
        learner = compare.learner(network(cfg), cfg, DEVICE)
        learner.network = torch.nn.parallel.DistributedDataParallel(learner.model)
        losses = learner.gradient([batch(cfg, 2)], cfg.warmup_iters)
    gradients = {name: p.grad.cpu() for name, p in learner.model.named_parameters() if p.requires_grad}
    print(compare.same_loss(losses, wanted[0], 1e-5))
    print(compare.same_gradients(gradients, wanted[1], 1e-3))


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card")
def test_several_gpus_train_like_one(tmp_path):
    cards, logs = torch.cuda.device_count(), []
    overrides = [f"batch_size={2 * cards}", "loss_group=2", "iters=6", "log_every=1", "precision=fp32", "drop_path=0",
                 "head_dropout=0", "sam=demo", "clip=demo"]              # sizes known to train.py
    config = make_config(tmp_path)
    for count in (1, cards):
        folder = tmp_path / f"run{count}"
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
                        ROOT / "train.py",
                        "--cfg", config, f"out={folder}", *overrides], check=True, cwd=ROOT, timeout=300)
        logs.append([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])
    for one, many in zip(*logs, strict=True):
        assert one["iter"] == many["iter"] and all(
            many[key] == pytest.approx(one[key], rel=1e-2) for key in ("loss", "ce") if key in one)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """Bit-identical if every operator is deterministic; otherwise close, and the other operators are printed."""
    argv = ["--cfg", make_config(tmp_path), "iters=8", "save_every=2", "eval_every=8"]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            train.main([*argv, f"out={tmp_path / 'uninterrupted'}"])
            kill_and_resume(argv, tmp_path / "killed", at=5)
        finally:
            torch.use_deterministic_algorithms(False)
    unordered = sorted({str(w.message).split(" ")[0] for w in found if "deterministic" in str(w.message)})
    print("operators without a deterministic form:", ", ".join(unordered) or "none")
    one, other = (checkpoint.read(tmp_path / name / checkpoint.LAST) for name in ("uninterrupted", "killed"))
    differing = differences(other, one)
    print(f"{len(differing)} values of the checkpoints differ")
    assert not differing or unordered
    for name, tensor in one["model"].items():
        assert error(other["model"][name], tensor) < 1e-3 or tensor.double().norm() < 1e-3, name


def test_the_programs_give_the_cpus_results(small, tmp_path):
    people = [tmp_path / "people" / f"{i}.png" for i in range(3)]
    people[0].parent.mkdir()
    for i, path in enumerate(people):
        save_png(path, draw(5, i, (160, 120))[0])
    scores, labels = {}, {}
    for device in ("cpu", DEVICE.type):
        out = tmp_path / f"evaluation_{device}"
        evaluate.main(["--run", str(small), "--tta", "--device", device, "--out", str(out), "precision=fp32",
                       "synthetic_val=12", "synthetic_size=[128, 96]"])
        scores[device] = json.loads((out / evaluate.RESULTS).read_text())["miou"]
        parser = predict.Parser(small, device=device, overrides=["precision=fp32"])
        labels[device] = np.stack([parser.parse(path) for path in people])
        assert predict.main([str(people[0].parent), "--run", str(small), "--device", device,
                             "--out", str(tmp_path / device)]) == 0
        assert len(list((tmp_path / device / "labels").iterdir())) == 3
    assert scores[DEVICE.type] == pytest.approx(scores["cpu"], abs=2e-3)
    assert (labels["cpu"] == labels[DEVICE.type]).mean() > 0.999


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
    assert end.value.code == 1
    assert all(words in line for words in ("out of GPU memory", "checkpointing=true", "accum_steps"))
