"""The paper's training regime (§4.3): encoders from files and frozen; SRM, FTM, adapter, head and SAM's patch embedding
trained. Small encoders with the official tensor names replace the official ones."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import ALONE

import clip_vit
import sam_vit
import train
from clip_vit import CLIP
from config import Config
from datasets import label_set, open_split, train_loader
from engine import checkpoint
from errors import UserError
from inference import restore
from model import SCHNet, build_model
from sam_vit import SAMViT

PACKAGE = importlib.util.find_spec("open_clip")
VOCAB = str(Path(PACKAGE.origin).with_name("bpe_simple_vocab_16e6.txt.gz")) if PACKAGE else ""
pytestmark = pytest.mark.skipif(not Path(VOCAB).is_file(), reason="needs the vocabulary file of open_clip")

sam_vit.SIZES["regime"], clip_vit.SIZES["regime"] = (32, 8, 2, 2, 4), (24, 4, 2, 4, 16, 16, 1, 2)
SMALL = dict(dataset="synthetic", synthetic_size=(64, 64), synthetic_train=40, crop_size=(64, 64), base_size=64,
             workers=0, vocab=VOCAB, sam="regime", clip="regime", clip_taps=(0, 1, 2, 3), ftm_tokens=8, prior_dim=8,
             clip_activation="quick_gelu", deform_heads=2, deform_points=2, head_dim=16, aux_dim=8, batch_size=4,
             lr=2e-3, iters=100, warmup_iters=5, precision="fp32")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A SAM with neck and decoder and a CLIP, with the official names; SAM's position tables are not zero."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(11)
    sam, clip = SAMViT(*sam_vit.SIZES["regime"]), CLIP(*clip_vit.SIZES["regime"])
    with torch.no_grad():
        for p in sam.parameters():
            p.add_(0.02 * torch.randn_like(p))
    tensors = {f"image_encoder.{name}": tensor for name, tensor in sam.state_dict().items()}
    neck, decoder = torch.rand(8, 32, 1, 1), torch.rand(1, 8)
    tensors |= {"image_encoder.neck.0.weight": neck, "mask_decoder.iou_token.weight": decoder}
    torch.save(tensors, folder / "sam.pth")
    torch.save(clip.state_dict(), folder / "clip.pt")
    return {"sam_weights": str(folder / "sam.pth"), "clip_weights": str(folder / "clip.pt")}


def trained(files: dict[str, str], steps: int, **changes) -> tuple[SCHNet, dict, list[dict]]:
    """The network after `steps` training steps, its tensors before training, and the last gradients."""
    cfg = Config(**SMALL | files | changes)
    torch.manual_seed(0)
    model = build_model(cfg, label_set(cfg).classes)
    learner = train.Learner(model, cfg, ALONE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = train_loader(cfg, open_split(cfg, "train"))
    for it in range(steps):
        assert learner.step([next(batches)], it)[1]
    return model, before, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def after_50(files):
    return trained(files, 50, seed=1)


def is_trained(name: str) -> bool:
    """§4.3: "the inserted SRM and FTM modules, patch-embedding block, the spatial prior module, the injector module,
    the multi-scale feature extractor, and UpperNet decoder"."""
    return name.startswith(("srm.", "ftm.", "sam.patch_embed.", "adapter.", "head.", "aux."))


def test_exactly_the_parameters_of_section_4_3_are_trained(after_50):
    """Every one of them changes; the encoders and Eq. 1's text features keep their bits."""
    model, before, _ = after_50
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]) != is_trained(name), name
    for name in ("f_txt", "sim_scale"):
        assert torch.equal(getattr(model, name), before[name])


def test_the_checkpoint_leaves_frozen_tensors_to_their_files(after_50, files, tmp_path):
    model, _, _ = after_50
    official, path = checkpoint.official_files(model), tmp_path / "last.pt"
    content = checkpoint.pack(model, label_set(model.cfg), official, {})
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert model.state_dict().keys() - content["model"].keys() == frozen and official.keys() == files.keys()
    checkpoint.write(path, content)
    again, _ = restore(checkpoint.read(path), path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for key in files:
        torch.save({name: tensor + 1e-3 for name, tensor in torch.load(files[key]).items()}, tmp_path / "other")
        with pytest.raises(UserError, match=f"^{key}: .*other"):
            restore(content, path, [f"{key}={tmp_path / 'other'}"])


EPS = 1e-8                                                 # AdamW's: smaller gradients have no effect
PARTS = ("srm.expand", "srm.to_sam", "srm.squeeze", "srm.unsqueeze", "ftm.tokens", "ftm.rho", "ftm.value", "ftm.out",
         "ftm.first", *(f"ftm.second.{i}" for i in range(8)), "ftm.third")


def rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def change(model: SCHNet, before: dict, name: str) -> float:
    """The change of a tensor relative to its norm before or after, whichever is larger."""
    then, now = before[name], model.get_parameter(name).detach()
    return rms(now - then) / max(rms(then), rms(now))


def test_each_part_of_srm_and_ftm_learns(after_50):
    """By at least 1/30 of its norm in 50 steps; weight decay alone changes it by 1/200."""
    model, before, gradients = after_50
    for part in PARTS:
        name, = [name for name in gradients if name in (part, f"{part}.weight")]
        assert rms(gradients[name]) > EPS and change(model, before, name) > 1 / 30, name


def test_eq_5_changes_logits(after_50):
    model, image = after_50[0].eval(), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    rho = model.ftm.rho.item()
    with torch.no_grad():
        logits = model(image)
        model.ftm.rho.zero_()
        change = (logits - model(image)).abs().max() / logits.abs().max()
        model.ftm.rho.fill_(rho)
    assert change > 2e-5                                   # rounding error: 2e-6


def test_eq_5_hardly_learns_if_eq_6_is_initialised_to_zero(files):
    """Why ftm_init is "torch": with f_i as the residual, Eq. 5's gradient comes through Eq. 6's MLPs alone, and from a
    third MLP of zeros it stays below AdamW's eps."""
    model, before, gradients = trained(files, 25, seed=1, ftm_init="zero")
    for name in ("ftm.tokens", "ftm.value.weight", "ftm.out.weight"):
        assert rms(gradients[name]) < EPS and change(model, before, name) < 1 / 30, name
