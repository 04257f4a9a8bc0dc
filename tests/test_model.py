"""model.py against section 3 of the paper: Eqs. 1-6 in naive code, gradients, shapes, parameter counts."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY, shake

import clip_vit
import model as model_file
import sam_vit
from clip_vit import CLIP
from config import Config, load_config
from errors import UserError
from losses import parsing_loss
from model import FTM, SRM, build_model, similarity
from sam_vit import SAMViT

ROOT = Path(__file__).parent.parent
sam_vit.SIZES["eight"] = (32, 8, 2, 3, 4)                  # windows in every other layer
clip_vit.SIZES["four"], clip_vit.SIZES["six"] = (24, 4, 2, 3, 16, 16, 1, 2), (24, 6, 2, 3, 16, 16, 1, 2)
SMALL = TINY | dict(sam="eight", clip="four", ftm_tokens=5, deform_heads=4, drop_path=0.0, head_dropout=0.0,
                    crop_size=(64, 64), base_size=64)
CLASSES = ("Background", "Hat", "Left-arm", "Right-arm")


def small(**changes):
    torch.manual_seed(0)
    return build_model(Config(**SMALL | changes), CLASSES)


def mlp(linear, vector):
    """Eq. 3: f_out = W f_in + b, written out."""
    return [sum(w * v for w, v in zip(row, vector)) + b for row, b in zip(linear.weight.tolist(), linear.bias.tolist())]


def gelu(vector):
    return [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in vector]


def softmax(values):
    e = [math.exp(v - max(values)) for v in values]
    return [v / sum(e) for v in e]


def test_eq_1_similarity():
    f_cls, f_txt = (F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=-1) for n in (2, 5))
    for scale in (1.0, 100.0):
        naive = [softmax([scale * sum(a * b for a, b in zip(cls, txt)) for txt in f_txt.tolist()])
                 for cls in f_cls.tolist()]
        torch.testing.assert_close(similarity(f_cls, f_txt, scale), torch.tensor(naive, dtype=torch.float64))


def test_eqs_2_and_4_srm():
    srm = SRM(num_classes=3, clip_dim=5, dim=8, ratio=0.25).double()
    shake(srm)
    f_sv, f_cv = torch.randn(2, 2, 3, 8, dtype=torch.float64), torch.randn(2, 2, 3, 5, dtype=torch.float64)
    f_sim = torch.rand(2, 3, dtype=torch.float64).softmax(-1)
    out = srm(f_sv, f_cv, f_sim)
    for b in range(2):
        gate = mlp(srm.expand, f_sim[b].tolist())
        for y in range(2):
            for x in range(3):
                product = [a * g for a, g in zip(f_cv[b, y, x].tolist(), gate)]
                refined = [a + s for a, s in zip(mlp(srm.to_sam, product), f_sv[b, y, x].tolist())]      # Eq. 2
                update = mlp(srm.unsqueeze, gelu(mlp(srm.squeeze, refined)))
                expected = [r + u for r, u in zip(refined, update)]                                      # Eq. 4
                torch.testing.assert_close(out[b, y, x], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("residual, init", [("f", "zero"), ("f'", "torch")])
@pytest.mark.parametrize("scale_logits", [False, True])
def test_eqs_5_and_6_ftm(scale_logits, residual, init):
    ftm = FTM(2, 8, tokens=3, ratio=0.5, rho=1e-3, scale_logits=scale_logits, residual=residual, init=init).double()
    assert (init == "zero") == (not ftm.third.weight.any() and not ftm.third.bias.any())
    shake(ftm)
    f = torch.randn(2, 1, 2, 8, dtype=torch.float64)
    for i in range(2):
        out = ftm(f, i)
        tokens = ftm.tokens[i].tolist()
        values = [mlp(ftm.value, token) for token in tokens]                             # MLP(T_i)
        for b in range(2):
            for x in range(2):
                pixel = f[b, 0, x].tolist()
                scale = 1 / math.sqrt(8) if scale_logits else 1
                logits = [scale * sum(a * t for a, t in zip(pixel, token)) for token in tokens]
                mixed = [sum(w * v[c] for w, v in zip(softmax(logits), values)) for c in range(8)]
                with_tokens = [ftm.rho.item() * o + a for o, a in zip(mlp(ftm.out, mixed), pixel)]       # Eq. 5
                third = mlp(ftm.third, gelu(mlp(ftm.second[i], gelu(mlp(ftm.first, with_tokens)))))
                added = pixel if residual == "f" else with_tokens
                expected = [t + a for t, a in zip(third, added)]                         # Eq. 6
                torch.testing.assert_close(out[b, 0, x], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("changes, bound", [({"ftm_residual": "f"}, 0), ({"ftm_residual": "f'", "rho_init": 0.0}, 0),
                                             ({"ftm_residual": "f'"}, 5e-3)])
def test_an_untrained_network_leaves_sams_features_unchanged(monkeypatch, changes, bound):
    """With ftm_init=zero. Where Eq. 6 adds f'_i, rho of Eq. 5 changes them by a small fraction of their norm."""
    model = small(ftm_init="zero", **changes).eval()
    with torch.no_grad():
        for p in model.sam.parameters():
            p.add_(0.1 * torch.randn_like(p))
    seen = []
    fuse = model.adapter.fuse
    monkeypatch.setattr(model.adapter, "fuse", lambda c1, c, outs: seen.extend(outs) or fuse(c1, c, outs))
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        model.forward_features(image)
        expected = model.sam(image)
    assert len(seen) == len(expected) == 4
    for ours, sams in zip(seen, expected):
        assert torch.equal(ours, sams) == (bound == 0) and (ours - sams).norm() <= bound * sams.norm()
    with torch.no_grad():                                                # FTM is really used
        model.ftm.third.bias.add_(1.0)
        seen.clear()
        model.forward_features(image)
    assert not torch.equal(seen[0], expected[0])


@pytest.mark.parametrize("changes", [
    {}, {"freeze": False}, {"srm_sites": 4}, {"srm": False}, {"srm": False, "ftm": False}, {"ftm": False},
    {"aux_weight": 0.0}, {"srm": False, "ftm": False, "backbone": "clip"},
    {"srm": False, "ftm": False, "backbone": "clip", "freeze": False},
    {"checkpointing": True},
], ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()) or "full")
def test_gradient_reaches_every_trained_parameter(changes):
    """So that DDP has no unused parameters. Initial zeros, which would stop the gradient, are replaced first."""
    model = small(**changes)
    shake(model)
    model.train()
    logits, aux = model(torch.rand(2, 3, 64, 64))
    assert (aux is None) == (changes.get("aux_weight") == 0.0)
    (logits.square().mean() + (aux.square().mean() if aux is not None else 0)).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().max() > 0, name
        else:
            assert p.grad is None, name


def test_a_step_never_synchronises_with_the_cpu(monkeypatch):
    """On the "meta" device, which replaces a GPU here, a CPU tensor is an error, and so is reading a value."""
    monkeypatch.setattr(model_file, "matmul_fp32", torch.matmul)         # autocast does not know "meta"
    model = small(checkpointing=True).to("meta").train()
    logits, aux = model(torch.rand(8, 3, 64, 96, device="meta"))
    labels = torch.zeros(8, 64, 96, dtype=torch.uint8, device="meta")
    losses = [parsing_loss(x, labels, 1.0, 4) for x in (logits, aux)]
    sum(loss for loss, _ in losses).backward()
    assert all(part.device.type == "meta" for _, parts in losses for part in parts.values())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("height, width", [(32, 32), (50, 70), (33, 31), (1, 1)])
def test_logits_have_the_size_of_the_image(height, width):
    model = small().eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, height, width)).shape == (1, len(CLASSES), height, width)


def test_padding_is_the_mean_colour():
    model = small().eval()
    image = torch.rand(1, 3, 40, 64)
    padded = model._pad(image)
    assert padded.shape == (1, 3, 64, 64) and torch.allclose(padded[..., :40, :], image)
    assert torch.allclose(padded[0, :, 40:].amax((1, 2)), model.sam.mean.flatten())


def test_the_last_two_srm_sites_share_the_last_clip_map(monkeypatch):
    """D1: Eq. 2 has five sites, but CLIP only four maps."""
    for sites in (5, 4):
        model = small(srm_sites=sites).eval()
        taken = []
        srm = model.srm.forward
        monkeypatch.setattr(model.srm, "forward", lambda x, f_cv, f_sim: taken.append(f_cv) or srm(x, f_cv, f_sim))
        image = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            model(image)
            maps = model.clip(image)[1]
        assert len(taken) == sites
        for site, f_cv in enumerate(taken):
            assert torch.equal(f_cv, maps[min(site, 3)])


def test_text_features_are_stored_and_the_text_tower_is_dropped(monkeypatch):
    """The prompts are in lower case."""
    model, seen = small(), []
    assert model.f_txt.shape == (4, 16) and torch.allclose(model.f_txt.norm(dim=-1), torch.ones(4))
    assert "f_txt" in model.state_dict() and not any("token_embedding" in name for name in model.state_dict())
    state = dict(model.state_dict()) | {"f_txt": 2 * model.f_txt}
    assert torch.equal(build_model(model.cfg, CLASSES, state).f_txt, state["f_txt"])
    monkeypatch.setattr(model_file, "tokenize",
                        lambda prompts, _: seen.extend(prompts) or torch.ones(len(prompts), 77, dtype=torch.int64))
    build_model(model.cfg, ("Background", "Left-arm"))
    assert seen == ["a photo of a background.", "a photo of a left arm."]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    sam, clip = SAMViT(*sam_vit.SIZES["eight"]), CLIP(*clip_vit.SIZES["six"], (1, 2, 3, 5))
    torch.save({f"image_encoder.{name}": tensor for name, tensor in sam.state_dict().items()}, folder / "sam.pth")
    torch.save(clip.state_dict(), folder / "clip.pt")
    return {"sam_weights": str(folder / "sam.pth"), "clip_weights": str(folder / "clip.pt")}


def from_files(files, **changes):
    """The network of these weight files; given text features need no vocabulary."""
    cfg = Config(**SMALL | {"clip": "six", "clip_taps": (1, 2, 3, 5), "clip_activation": "gelu"} | files | changes)
    return build_model(cfg, CLASSES, {"f_txt": F.normalize(torch.ones(4, 16)), "sim_scale": torch.tensor(100.0)})


def test_weight_files_and_clip_taps_are_used(files):
    model, other = from_files(files), from_files(files, clip_taps=(0, 1, 2, 5))
    for name, tensor in torch.load(files["sam_weights"]).items():
        assert torch.equal(model.sam.state_dict()[name.removeprefix("image_encoder.")], tensor)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        usual, maps = model.clip(image)[1], other.clip(image)[1]
    assert not torch.equal(maps[0], usual[0]) and torch.equal(maps[1], usual[0]) and torch.equal(maps[3], usual[3])


@pytest.mark.parametrize("changes, words", [
    ({"sam": "huge"}, "sam .*vit_l.* 'huge'"), ({"clip": "huge"}, "clip .*vit_b16.* 'huge'"),
    ({"sam": "tiny"}, "sam.pth: .* sam=tiny: "), ({"clip": "tiny"}, "clip.pt: .* clip=tiny: "),
    ({"clip_taps": (0, 1, 2, 3)}, r"clip_taps .* 5, not \(0, 1, 2, 3\)")])
def test_sizes_that_contradict_the_weights_are_refused(files, changes, words):
    with pytest.raises(UserError, match=words):
        from_files(files, **({"clip_taps": (0, 1, 2, 3)} if "clip" in changes else {}) | changes)


def test_clip_weights_need_the_vocabulary(files):
    with pytest.raises(UserError, match="^vocab: "):
        clip = {"clip": "six", "clip_taps": (1, 2, 3, 5), "clip_activation": "gelu"}
        build_model(Config(**SMALL | clip | files), CLASSES)


def test_full_size(monkeypatch):
    """configs/lip.yaml: the published parameter counts, and the shapes for one image."""
    monkeypatch.setattr(model_file, "matmul_fp32", torch.matmul)         # autocast does not know "meta"
    cfg = load_config(ROOT / "configs/lip.yaml", ["sam_weights=", "clip_weights=", "vocab="])
    state = {"f_txt": torch.zeros(20, 512), "sim_scale": torch.tensor(100.0)}
    model = build_model(cfg, [f"class {n}" for n in range(20)], state).to("meta").eval()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model.clip) == 86_192_640
    assert count(model.sam) == 308_278_272 - 852_992                     # the encoder without its neck
    assert count(model.adapter) == 23_236_800
    assert count(model.head) == 34_363_412
    assert count(model.aux) == 2_364_948
    assert count(model.srm) == 16_128 + 787_456 + 525_568                # K -> 768 -> 1024; Eq. 4's bottleneck: 256
    assert abs(count(model.ftm) - (4.557e6 + 2.105e6)) < 1e3
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert abs(trained - 68.743e6) < 2e3
    with torch.no_grad():
        assert model(torch.rand(1, 3, 320, 240, device="meta")).shape == (1, 20, 320, 240)
