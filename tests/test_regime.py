"""The paper's regime (§4.3): encoders out of weight files and frozen; SRM, FTM, adapter, head and SAM's patch embedding
trained. Small files with the official keys stand for the official ones, and real steps are taken."""

import importlib.util
from pathlib import Path

import pytest
import torch

import train
from clip_vit import CLIP
from config import Config
from datasets import label_set, open_split, train_loader
from engine import checkpoint
from errors import UserError
from engine.processes import World
from inference import restore
from model import SCHNet, build_model
from sam_vit import SAMViT

PACKAGE = importlib.util.find_spec("open_clip")
VOCAB = str(Path(PACKAGE.origin).with_name("bpe_simple_vocab_16e6.txt.gz")) if PACKAGE else ""
pytestmark = pytest.mark.skipif(not Path(VOCAB).is_file(), reason="the vocabulary comes with open_clip")

TAPS = (0, 1, 2, 3)
SMALL = dict(dataset="synthetic", synthetic_size=(64, 64), synthetic_train=40, crop_size=(64, 64), base_size=64, workers=0,
             vocab=VOCAB, clip_heads=2, text_heads=2, clip_taps=TAPS, ftm_tokens=8, prior_dim=8, deform_heads=2,
             deform_points=2, head_dim=16, aux_dim=8, batch_size=4, lr=2e-3, iters=100, warmup_iters=5, precision="fp32")
CPU = World("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A SAM with decoder and neck and a CLIP, under the official keys. SAM's tables are not at zero, as in no real file."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(11)
    sam, clip = SAMViT(32, 8, 2, 2, 4), CLIP(24, 4, 2, 4, taps=TAPS, embed=16, text_dim=16, text_depth=1, text_heads=2)
    with torch.no_grad():
        for p in sam.parameters():
            p.add_(0.02 * torch.randn_like(p))
    tensors = {f"image_encoder.{name}": tensor for name, tensor in sam.state_dict().items()}
    tensors |= {"image_encoder.neck.0.weight": torch.rand(8, 32, 1, 1), "mask_decoder.iou_token.weight": torch.rand(1, 8)}
    torch.save(tensors, folder / "sam.pth")
    torch.save(clip.state_dict(), folder / "clip.pt")
    return {"sam_weights": str(folder / "sam.pth"), "clip_weights": str(folder / "clip.pt")}


def trained(files: dict[str, str], steps: int, **changes) -> tuple[SCHNet, dict, list[dict]]:
    """The network after some steps of real training, its tensors before them, and the gradients of the last one."""
    cfg = Config(**SMALL | files | changes)
    torch.manual_seed(0)
    model = build_model(cfg, label_set(cfg).classes)
    network, optimizer, scaler = train.prepare(model, cfg, CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = train_loader(cfg, open_split(cfg, "train"))
    model.train()
    for it in range(steps):
        _, finite, _ = train.train_step(network, optimizer, scaler, [next(batches)], cfg, CPU, it)
        assert finite
    return model, before, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def after_20(files):
    return trained(files, 20)


@pytest.fixture(scope="module")
def after_50(files):
    return trained(files, 50, seed=1)                      # the middle one of seeds 0, 1, 2


def expected_to_move(name: str) -> bool:
    """§4.3: "the inserted SRM and FTM modules, patch-embedding block, the spatial prior module, the injector module, the
    multi-scale feature extractor, and UpperNet decoder"."""
    return name.startswith(("srm.", "ftm.", "sam.patch_embed.", "adapter.", "head.", "aux."))


def test_exactly_what_section_4_3_names_has_moved(after_20):
    """Every tensor of it, whatever it starts at, and not a bit of the encoders; nor of Eq. 1's text features."""
    model, before, _ = after_20
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]) != expected_to_move(name), name
    for name in ("f_txt", "sim_scale"):
        assert torch.equal(getattr(model, name), before[name])


def test_the_frozen_encoders_are_still_the_files(after_20, files):
    model, _, _ = after_20
    sam = {f"sam.{name.removeprefix('image_encoder.')}": tensor for name, tensor in torch.load(files["sam_weights"]).items()}
    clip = {f"clip.{name.removeprefix('visual.')}": tensor for name, tensor in torch.load(files["clip_weights"]).items()
            if name.startswith("visual.")}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == len(sam) + len(clip) - 2 - 2     # the patch embedding is trained, neck and decoder are not read
    for name in frozen:
        assert torch.equal(model.get_parameter(name), (sam | clip)[name]), name


def test_the_checkpoint_leaves_the_frozen_ones_to_the_files(after_20, files, tmp_path):
    model, _, _ = after_20
    labels, official = label_set(model.cfg), checkpoint.official_files(model)
    content = checkpoint.pack(model, labels, official, {})
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert model.state_dict().keys() - content["model"].keys() == frozen and official.keys() == files.keys()
    checkpoint.write(tmp_path / "last.pt", content)
    again, _ = restore(checkpoint.read(tmp_path / "last.pt"), tmp_path / "last.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("key", ["sam_weights", "clip_weights"])
def test_a_checkpoint_is_not_restored_on_another_file(after_20, files, tmp_path, key):
    model, _, _ = after_20
    other = tmp_path / "other"
    tensors = torch.load(files[key])
    torch.save({name: tensor + 1e-3 for name, tensor in tensors.items()}, other)
    content = checkpoint.pack(model, label_set(model.cfg), checkpoint.official_files(model), {})
    with pytest.raises(UserError, match="was trained on another"):
        restore(content, tmp_path / "last.pt", [f"{key}={other}"])


def test_frozen_weights_kept_in_bf16_give_the_step_of_fp32_ones(files, monkeypatch):
    """Under autocast, which rounds them at every use: the same step to the last bit."""
    kept, _, _ = trained(files, 1, precision="bf16")
    assert kept.sam.blocks[0].mlp.lin1.weight.dtype == torch.bfloat16
    monkeypatch.setattr(train, "cast_frozen", lambda model, precision: None)
    plain, _, _ = trained(files, 1, precision="bf16")
    assert plain.sam.blocks[0].mlp.lin1.weight.dtype == torch.float32
    for name, p in plain.named_parameters():
        if p.requires_grad:
            assert torch.equal(kept.get_parameter(name), p), name


# ---- SRM and FTM are alive

EPS = 1e-8                                                 # AdamW's: a gradient below it moves nothing
PARTS = ("srm.expand", "srm.to_sam", "srm.squeeze", "srm.unsqueeze", "ftm.tokens", "ftm.rho", "ftm.value", "ftm.out",
         "ftm.first", *(f"ftm.second.{i}" for i in range(8)), "ftm.third")


def rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def moved(model: SCHNet, before: dict, name: str) -> float:
    """How far a tensor is from where it was, as a share of its size then or now, whichever is larger."""
    then, now = before[name], model.get_parameter(name).detach()
    return rms(now - then) / max(rms(then), rms(now))


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_srm_and_ftm_learns(after_50, part):
    """Within 50 steps by a twentieth of its size at least; weight decay alone takes a two-hundredth."""
    model, before, gradients = after_50
    names = [name for name in gradients if name == part or name == f"{part}.weight"]
    assert len(names) == 1
    assert rms(gradients[names[0]]) > EPS and moved(model, before, names[0]) > 0.05


def effect_of_rho(model: SCHNet) -> float:
    """The largest change of a logit, as a share of the largest logit, when Eq. 5 adds nothing."""
    model.eval()
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    rho = model.ftm.rho.item()
    with torch.no_grad():
        logits = model(image)
        model.ftm.rho.zero_()
        without = model(image)
        model.ftm.rho.fill_(rho)
    return ((logits - without).abs().max() / logits.abs().max()).item()


def test_eq_5_changes_logits(after_50):
    model, _, _ = after_50
    assert effect_of_rho(model) > 1e-4


def test_eq_6_as_printed_leaves_eq_5_dead(files):
    """The reason for the default: with f_i as the residual, tokens and both MLPs of Eq. 5 stay below AdamW's eps."""
    model, before, gradients = trained(files, 50, seed=1, ftm_residual="f")
    for name in ("ftm.tokens", "ftm.value.weight", "ftm.out.weight"):
        assert rms(gradients[name]) < EPS and moved(model, before, name) < 0.05
    assert effect_of_rho(model) < 1e-5
