"""CLIP's towers against open_clip and transformers with random weights, and the official file format."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from clip_vit import CLIP, SIZES, load_clip
from errors import UserError
from files import weights
from layers import resample_positions

TOLERANCE = 1e-5
SIZES["small clip"] = (32, 4, 4, 4, 16, 24, 2, 3)
SMALL = (*SIZES["small clip"], (0, 1, 2, 3))
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def random_state(clip, seed=0):
    """Weights in which every tensor matters: no bias, position or embedding near zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in clip.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if ".ln_" in name or name.startswith("ln_"):
            state[name] = 0.4 * noise + (1 if name.endswith("weight") else 0)
        elif "embedding" in name:                          # so small that the norms' epsilon matters, as in CLIP
            state[name] = 0.02 * noise
        elif tensor.ndim < 2:
            state[name] = 0.5 * noise
        else:                                              # matrices keep the size of what they multiply
            fan_in = tensor.shape[0] if name.endswith("proj") or name == "text_projection" else tensor[0].numel()
            state[name] = noise * fan_in**-0.5 * (0.02 if "conv1" in name else 1)
    return state


def token_rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    tokens = torch.zeros(len(lengths), 77, dtype=torch.int64)
    for row, length in zip(tokens, lengths):
        row[0], row[length - 1] = 49406, 49407
        row[1:length - 1] = torch.from_numpy(rng.integers(0, 49406, length - 2))
    return tokens


def photo(h, w, batch=1, seed=0):
    return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(seed))


def error(ours, reference):
    assert ours.shape == reference.shape
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def bicubic(table, h, w):
    """(grid, grid, D) -> (h, w, D) by the cubic convolution formula with a = -0.75, in double precision."""
    def matrix(new, old):
        m = np.zeros((new, old))
        for i in range(new):
            x = (i + 0.5) * old / new - 0.5
            for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                d = abs(x - j)
                value = (1.25 * d - 2.25) * d * d + 1 if d <= 1 else -0.75 * (((d - 5) * d + 8) * d - 4)
                m[i, min(max(j, 0), old - 1)] += value
        return m
    rows, columns = matrix(h, table.shape[0]), matrix(w, table.shape[1])
    return torch.from_numpy(np.einsum("yi,xj,ijd->yxd", rows, columns, table.double().numpy())).float()


def resized(state, h, w):
    """The state with its position table resampled to h x w patches."""
    table = state["visual.positional_embedding"]
    grid = round((len(table) - 1) ** 0.5)
    patches = bicubic(table[1:].unflatten(0, (grid, grid)), h, w).flatten(0, 1)
    return {**state, "visual.positional_embedding": torch.cat([table[:1], patches])}


def hugging_face_names(state):
    """OpenAI's tensors under the names of transformers."""
    renamed = {"logit_scale": state["logit_scale"]}
    for ours, theirs in (("text_projection", "text_projection"), ("visual.proj", "visual_projection")):
        renamed[f"{theirs}.weight"] = state[ours].T
    fixed = {"visual.class_embedding": "vision_model.embeddings.class_embedding",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
             "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
             "positional_embedding": "text_model.embeddings.position_embedding.weight"}
    for kind in ("weight", "bias"):
        fixed |= {f"visual.ln_pre.{kind}": f"vision_model.pre_layrnorm.{kind}",
                  f"visual.ln_post.{kind}": f"vision_model.post_layernorm.{kind}",
                  f"ln_final.{kind}": f"text_model.final_layer_norm.{kind}"}
    parts = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for name, tensor in state.items():
        if name in fixed:
            renamed[fixed[name]] = tensor
        elif "resblocks" in name:
            tower, rest = name.split("transformer.resblocks.")
            number, part = rest.split(".", 1)
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
            if "in_proj" in part:
                for letter, block in zip("qkv", tensor.chunk(3)):
                    renamed[f"{layer}self_attn.{letter}_proj.{part.split('_')[-1]}"] = block
            else:
                module, kind = part.rsplit(".", 1)
                renamed[f"{layer}{parts[module]}.{kind}"] = tensor
    return renamed


@pytest.fixture(scope="module")
def full():
    clip = CLIP().eval().requires_grad_(False)
    state = random_state(clip)
    clip.load_state_dict(state, assign=True)
    return clip, state


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    clip = CLIP(*SMALL).eval()
    clip.load_state_dict(random_state(clip))
    return clip.requires_grad_(False)


@pytest.mark.parametrize("h, w", [(224, 224), (480, 320)])
@torch.no_grad()
def test_image_tower_equals_open_clip(full, h, w):
    open_clip = pytest.importorskip("open_clip")
    clip, state = full
    peer = open_clip.create_model("ViT-B-16-quickgelu", force_image_size=(h, w)).eval()
    table = state if (h, w) == (224, 224) else resized(state, h // 16, w // 16)
    assert not peer.load_state_dict(table, assign=True, strict=False).missing_keys
    image = photo(h, w)
    out = peer.visual.forward_intermediates((image - MEAN) / STD, indices=[3, 5, 7, 11], intermediates_only=False,
                                            output_fmt="NLC", normalize_intermediates=False)
    f_cls, taps = clip.encode_image(image)
    assert error(f_cls, nn.functional.normalize(out["image_features"], dim=-1)) <= TOLERANCE
    assert len(taps) == 4
    for tap, reference in zip(taps, out["image_intermediates"]):
        assert tap.shape == (1, h // 16, w // 16, 768)
        assert error(tap.flatten(1, 2), reference) <= TOLERANCE


@torch.no_grad()
def test_text_tower_equals_open_clip(full):
    open_clip = pytest.importorskip("open_clip")
    clip, state = full
    peer = open_clip.create_model("ViT-B-16-quickgelu").eval()
    assert not peer.load_state_dict(state, assign=True, strict=False).missing_keys
    tokens = token_rows([77, 3, 8, 12])
    reference = peer.encode_text(tokens, normalize=True)
    assert error(clip.encode_text(tokens), reference) <= TOLERANCE
    assert error(clip.encode_text(tokens[1:]), reference[1:]) <= TOLERANCE      # all short: the tower cuts the rows


@torch.no_grad()
def test_both_towers_equal_transformers(full):
    transformers = pytest.importorskip("transformers")
    clip, state = full
    config = transformers.CLIPConfig(
        projection_dim=512, vision_config=dict(patch_size=16, hidden_act="quick_gelu", attn_implementation="eager"),
        text_config=dict(eos_token_id=49407, hidden_act="quick_gelu"))
    peer = transformers.CLIPModel(config).eval()
    assert not peer.load_state_dict(hugging_face_names(state), assign=True, strict=False).missing_keys
    for h, w in ((224, 224), (320, 480)):
        image = photo(h, w, seed=1)
        out = peer.vision_model((image - MEAN) / STD, output_hidden_states=True, interpolate_pos_encoding=h != 224)
        f_cls, taps = clip.encode_image(image)
        reference = nn.functional.normalize(peer.visual_projection(out.pooler_output), dim=-1)
        assert error(f_cls, reference) <= TOLERANCE
        assert error(clip.visual.embed(image).flatten(1, 2), out.hidden_states[0][:, 1:]) <= TOLERANCE
        for tap, block in zip(taps, (3, 5, 7, 11)):
            assert error(tap.flatten(1, 2), out.hidden_states[block + 1][:, 1:]) <= TOLERANCE
    tokens = token_rows([5, 77, 20], seed=1)
    reference = peer.text_projection(peer.text_model(tokens).pooler_output)
    assert error(clip.encode_text(tokens), nn.functional.normalize(reference, dim=-1)) <= TOLERANCE


@torch.no_grad()
def test_every_tensor_matters(small):
    """Without any one tensor, an output is wrong by more than a hundred times what the parity tests allow."""
    def outputs(clip):
        f_cls, taps = clip.encode_image(photo(96, 128))
        return [f_cls, *taps, clip.encode_text(token_rows([6, 9])), clip.logit_scale]

    reference = outputs(small)
    for name in small.state_dict():
        clip = copy.deepcopy(small)
        clip.get_parameter(name).zero_()
        assert max(map(error, outputs(clip), reference)) > 100 * TOLERANCE, name


@torch.no_grad()
def test_one_image_of_a_batch_is_the_image_alone(small):
    images = photo(64, 96, batch=3)
    f_cls, taps = small.encode_image(images)
    for n in range(3):
        alone, alone_taps = small.encode_image(images[n:n + 1])
        assert error(f_cls[n:n + 1], alone) <= TOLERANCE
        assert all(error(tap[n:n + 1], a) <= TOLERANCE for tap, a in zip(taps, alone_taps))
    assert torch.allclose(f_cls.norm(dim=1), torch.ones(3))


@torch.no_grad()
def test_lower_precision_and_double(small):
    image = photo(64, 96)
    f_cls, taps = small.encode_image(image)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_taps = small.encode_image(image)
    assert low_taps[3].dtype == torch.float32 and error(low_taps[3], taps[3]) < 0.03 and error(low, f_cls) < 0.03
    double, _ = copy.deepcopy(small).double().encode_image(image.double())
    assert double.dtype == torch.float64 and error(f_cls, double) < TOLERANCE
    half, _ = copy.deepcopy(small).bfloat16().encode_image(image.bfloat16())
    assert half.dtype == torch.bfloat16 and error(half, f_cls) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Positions at other grids


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(30, 30), (4, 7), (3, 2), (5, 4)])
def test_positions_are_bicubic(small, h, w):
    table = small.visual.positional_embedding[1:].unflatten(0, (4, 4))
    assert error(resample_positions(table, h, w), bicubic(table, h, w)) < 1e-6
    assert torch.equal(resample_positions(table, 4, 4), table)


def test_trained_positions_have_a_gradient_at_any_size(small):
    visual = copy.deepcopy(small).visual.requires_grad_(True)
    visual(photo(96, 96))[1][3].square().sum().backward()
    assert visual.positional_embedding.grad[1:].abs().min() > 0


@torch.no_grad()
def test_compiled_and_exported(small):
    visual, image = copy.deepcopy(small).visual, photo(64, 96)
    expected, _ = small.visual(image)
    program = torch.export.export(visual, (image,))
    compiled = torch.compile(visual, backend="eager", fullgraph=True)
    for run in (program.module(), compiled, visual):       # the last: tracing has left no symbolic tensor in the module
        assert error(run(image)[0], expected) <= TOLERANCE
    visual.positional_embedding.mul_(2)
    assert error(compiled(image)[0], visual(image)[0]) <= TOLERANCE < error(compiled(image)[0], expected)


# ---------------------------------------------------------------------------------------------------------------------
# The official file


def openai_archive(state, path):
    """A TorchScript archive with the names and types of OpenAI's: half precision except for norms and embeddings."""
    def stored(name, tensor):
        single = "embedding" in name or ".ln_" in name or name.startswith("ln_") or name == "logit_scale"
        return tensor if single else tensor.half()

    class Node(nn.Module):
        def forward(self, x):
            return x + 1

    root = Node()
    entries = {name: nn.Parameter(stored(name, tensor)) for name, tensor in state.items()}
    entries |= {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77),
                "vocab_size": torch.tensor(49408)}
    for name, tensor in entries.items():
        node = root
        *parents, last = name.split(".")
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, Node())
            node = node.get_submodule(parent)
        if isinstance(tensor, nn.Parameter):
            node.register_parameter(last, tensor)
        else:
            node.register_buffer(last, tensor)
    torch.jit.save(torch.jit.trace(root, torch.ones(1)), path)
    return root.state_dict()


@torch.no_grad()
def test_official_archive_round_trip(full, tmp_path):
    clip, state = full
    stored = openai_archive(state, tmp_path / "ViT-B-16.pt")
    tensors = weights.read_tensors(tmp_path / "ViT-B-16.pt")
    assert len(tensors) == 305 and set(tensors) == set(stored)
    kinds = [tensor.dtype for tensor in tensors.values()]
    assert [kinds.count(t) for t in (torch.float16, torch.float32, torch.int64)] == [195, 107, 3]
    assert sum(t.numel() for t in tensors.values() if t.is_floating_point()) == 149_620_737
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    loaded = load_clip(tmp_path / "ViT-B-16.pt")
    assert all(t.dtype == torch.float32 and torch.equal(t, tensors[name]) for name, t in loaded.state_dict().items())
    f_cls, taps = loaded.encode_image(photo(64, 96))
    expected, expected_taps = clip.encode_image(photo(64, 96))
    assert error(f_cls, expected) < 5e-3 and error(taps[3], expected_taps[3]) < 5e-3     # half precision was stored
    (tmp_path / "ViT-B-16.pt").unlink()


def test_other_file_formats_load_the_same(small, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = small.state_dict()
    openai_archive(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"epoch": 3, "state_dict": {k: v.half() for k, v in state.items()}}, tmp_path / "c.pth")
    torch.save({"model": state}, tmp_path / "d.pth", _use_new_zipfile_serialization=False)
    safetensors.save_file(state, tmp_path / "e.safetensors", metadata={"format": "pt"})
    for name in ("a.pt", "b.pth", "c.pth", "d.pth", "e.safetensors"):
        clip = load_clip(tmp_path / name, SMALL[-1], "small clip")
        exact = name not in ("a.pt", "c.pth")              # the others have half precision
        for key, tensor in clip.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, state[key]) if exact else error(tensor, state[key]) < 1e-3
    f_cls, taps = clip.encode_image(photo(64, 96))         # number of heads and taps are in no file
    assert torch.equal(f_cls, small.encode_image(photo(64, 96))[0]) and len(taps) == 4


def test_other_tensors_are_named(small, tmp_path):
    state, one = small.state_dict(), torch.zeros(1)
    path = tmp_path / "given.pth"
    for tensors, words in (
        (hugging_face_names(state), "Hugging Face"),
        ({k: v for k, v in state.items() if not k.startswith("visual.")}, "text tower alone"),
        ({k: v for k, v in state.items() if k.startswith("visual.")}, "image tower alone"),
        ({"visual.layer1.0.conv1.weight": one}, "ResNet"),
        ({"image_encoder.patch_embed.proj.weight": torch.zeros(1280, 3, 1, 1),
          "image_encoder.blocks.0.attn.rel_pos_h": one}, "SAM ViT-H"),
        ({**state, "visual.conv1.weight": torch.zeros(1024, 3, 14, 14)}, "CLIP ViT-L/14"),
        ({"a": one}, "unknown kind"),
        ({k: v for k, v in state.items() if k != "ln_final.bias"}, "1 missing (ln_final.bias)"),
        ({**state, "extra": one, "more": one}, "2 left over (extra, more)"),
        ({**state, "text_projection": torch.zeros(3, 4)}, "text_projection (3, 4) instead of (24, 16)"),
        ({**state, "text_projection": state["text_projection"].to(torch.int8)}, "torch.int8"),
    ):
        torch.save(tensors, path)
        with pytest.raises(UserError) as caught:
            load_clip(path, SMALL[-1], "small clip")
        assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
