"""files/foundations.py: weights of SAM and CLIP in every format, written by the projects that use it."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import train
from tiny import RUN, assert_same_run, fails, kill_and_resume, make_data

import clip_vit
import sam_vit
from clip_vit import load_clip
from config import Config, to_yaml
from errors import UserError
from files import foundations
from files.foundations import content_hash
from sam_vit import SAMViT, load_sam

pytest.importorskip("open_clip")
pytest.importorskip("transformers")
pytest.importorskip("segment_anything")
import write_weights  # noqa: E402

TOLERANCE = 1e-5
VOCAB = Path(importlib.util.find_spec("open_clip").origin).with_name("bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture(scope="module", autouse=True)
def forget_models():
    yield
    for make in (write_weights.open_clip_model, write_weights.transformers_clip, write_weights.segment_anything_model,
                 write_weights.transformers_sam):
        make.cache_clear()


@pytest.mark.parametrize("names, activation", [
    (("openai", "open_clip_bin"), "quick_gelu"), (("open_clip",), "gelu"),
    (("hub", "hub_shards", "hub_bin"), "quick_gelu")])
def test_clip_formats(tmp_path, names, activation):
    """The features are those of the saved model; other formats of the same model give the same tensors."""
    contents = set()
    for name in names:
        clip = load_clip(write_weights.write(name, tmp_path))
        contents.add((clip.visual.content, content_hash(clip.state_dict())))
        assert clip.visual.activation == activation and {p.dtype for p in clip.parameters()} == {torch.float32}
        if name == names[0]:
            assert write_weights.clip_error(name, clip) <= TOLERANCE
        shutil.rmtree(tmp_path / name)
    assert len(contents) == 1


@pytest.mark.parametrize("names", [("segment_anything", "training"), ("hub_sam",)])
def test_sam_formats(tmp_path, names):
    contents = set()
    for name in names:
        sam = load_sam(write_weights.write(name, tmp_path), "vit_b")
        contents.add(sam.content)
        if name == names[0]:
            assert write_weights.sam_error(name, sam) <= TOLERANCE
        shutil.rmtree(tmp_path / name)
    assert len(contents) == 1


@pytest.mark.parametrize("size", ["vit_l", "vit_h"])
def test_names_of_the_larger_sams(size):
    from segment_anything import sam_model_registry
    from transformers import SamConfig, SamModel, SamVisionConfig
    dim, depth, heads, window, grid = sam_vit.SIZES[size]
    config = SamVisionConfig(hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, window_size=window,
                             global_attn_indexes=list(range(depth // 4 - 1, depth, depth // 4)), mlp_dim=4 * dim)
    with torch.device("meta"):
        ours = SAMViT(*sam_vit.SIZES[size]).state_dict()
        for peer in (sam_model_registry[size](), SamModel(SamConfig(vision_config=config.to_dict()))):
            found = foundations.sam_tensors(peer.state_dict())
            assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in ours.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """One random CLIP and one SAM of size "tiny", each as the hub's files and with the official names."""
    from transformers import CLIPConfig, CLIPModel, SamConfig, SamModel, SamVisionConfig
    folder, (dim, depth, heads, grid, embed, *text) = tmp_path_factory.mktemp("small"), clip_vit.SIZES["tiny"]
    names = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
    image, text = (dict(zip(names, (*tower, 4 * tower[0]))) for tower in ((dim, depth, heads), text))
    image |= {"image_size": 16 * grid, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(projection_dim=embed, vision_config=image, text_config=text))
    dim, depth, heads, window, grid = sam_vit.SIZES["tiny"]
    vision = SamVisionConfig(hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, window_size=window,
                             image_size=16 * grid, global_attn_indexes=[0, 1, 2, 3], mlp_dim=4 * dim)
    write_weights.randomize(clip).save_pretrained(folder / "clip_hub")
    write_weights.randomize(SamModel(SamConfig(vision_config=vision.to_dict()))).save_pretrained(folder / "sam_hub")
    torch.save(load_clip(folder / "clip_hub", (0, 1, 2, 3), "tiny").state_dict(), folder / "clip.pt")
    sam = load_sam(folder / "sam_hub", "tiny").state_dict()
    torch.save({f"image_encoder.{name}": tensor for name, tensor in sam.items()}, folder / "sam.pth")
    return folder


def refused(tmp_path: Path, tensors: dict, load) -> str:
    torch.save(tensors, tmp_path / "given.pth")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "given.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'given.pth'}: ") and "\n" not in str(caught.value)
    return str(caught.value)


ONE = torch.zeros(1)


@pytest.mark.parametrize("names, kind", [
    (("image_encoder.trunk.patch_embed.proj.weight", "image_encoder.trunk.blocks.0.attn.qkv.weight"), "SAM 2 "),
    (("vision_encoder.backbone.blocks.0.attn.qkv.weight",), "SAM 2 "),
    (("image_encoder.layers.1.blocks.0.attn.attention_biases", "mask_decoder.iou_token.weight"), "MobileSAM "),
    (("image_encoder.blocks.0.attn.qkv.weight", "mask_decoder.iou_token.weight"), "EfficientSAM "),
    (("visual.conv1.weight", "visual.class_embedding"), "a CLIP "), (("a",), "unknown kind")])
def test_weights_other_than_sams_are_identified(tmp_path, names, kind):
    message = refused(tmp_path, dict.fromkeys(names, ONE), load_sam)
    assert kind in message and "sam=vit_l" in message


@pytest.mark.parametrize("change, words", [
    (lambda t: {name: tensor for name, tensor in t.items() if not name.startswith("visual.")}, "the text tower"),
    (lambda t: {name: tensor for name, tensor in t.items() if name.startswith("visual.")}, "embedding is missing"),
    (lambda t: {"visual.layer1.0.conv1.weight": ONE}, "a CLIP with a ResNet"),
    (lambda t: {"image_encoder.blocks.0.attn.rel_pos_h": ONE}, "a SAM"),
    (lambda t: t | {"visual.conv1.weight": torch.zeros(24, 3, 14, 14)}, "visual.conv1.weight is (24, 3, 14, 14)"),
    (lambda t: {name: tensor for name, tensor in t.items() if name != "ln_final.bias"}, "ln_final.bias is missing (1 "),
    (lambda t: t | {"extra": ONE, "more": ONE}, "extra is unknown (2 "),
    (lambda t: t | {"text_projection": t["text_projection"].to(torch.int8)}, "torch.int8")])
def test_weights_other_than_this_clips_are_identified(small, tmp_path, change, words):
    tensors = change(torch.load(small / "clip.pt"))
    message = refused(tmp_path, tensors, lambda path: load_clip(path, (0, 1, 2, 3), "tiny", "gelu"))
    assert words in message and "clip=tiny" in message


def test_the_activation_is_read_from_the_files_or_required(small, tmp_path):
    shutil.copy(small / "clip.pt", tmp_path)

    def activation(**files) -> str:
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return load_clip(tmp_path / "clip.pt", (0, 1, 2, 3), "tiny").visual.activation

    with pytest.raises(UserError, match="clip.pt: .* clip_activation=quick_gelu .* gelu "):
        activation()
    assert load_clip(tmp_path / "clip.pt", (0, 1, 2, 3), "tiny", "gelu").visual.activation == "gelu"
    assert activation(config={"vision_config": {"hidden_act": "gelu"}}) == "gelu"
    assert activation(config={"vision_config": {}}) == "quick_gelu"      # transformers' default
    assert activation(open_clip_config={"model_cfg": {"quick_gelu": True}}) == "quick_gelu"
    assert activation(open_clip_config={"model_cfg": {}}) == "gelu"
    image = torch.rand(1, 3, 32, 32)
    quick, plain = (load_clip(small / "clip.pt", (0, 1, 2, 3), "tiny", each).visual(image)[0]
                    for each in ("quick_gelu", "gelu"))
    assert (quick - plain).abs().max() > 1e-5


def test_a_run_resumes_with_the_same_weights_in_another_format(small, tmp_path, capsys):
    """Started with the official files, killed, resumed with the hub's: bit-identical. Other weights are refused."""
    official = {"sam_weights": str(small / "sam.pth"), "clip_weights": str(small / "clip.pt"),
                "clip_activation": "quick_gelu"}
    hub = [f"sam_weights={small / 'sam_hub'}", f"clip_weights={small / 'clip_hub'}", "clip_activation="]
    make_data(tmp_path / "data")
    config = Config(**RUN | official | {"freeze": True, "vocab": str(VOCAB)}, data_root=str(tmp_path / "data"),
                    out=str(tmp_path / "uninterrupted"))
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    argv = ["--cfg", str(tmp_path / "tiny.yaml")]
    train.main(argv)
    kill_and_resume(argv, tmp_path / "run", 2, *hub)
    sam = torch.load(small / "sam.pth")
    torch.save(sam | {"image_encoder.pos_embed": sam["image_encoder.pos_embed"] + 1e-6}, tmp_path / "other.pth")
    line = fails(capsys, *argv, "--resume", f"sam_weights={tmp_path / 'other.pth'}")
    assert re.search("sam_weights: .*sam.pth.*other.pth", line)
    changed = ("sam_weights", "clip_weights", "clip_activation")
    for folder in (tmp_path / "uninterrupted", tmp_path / "run"):
        for name in ("last.pt", "best.pt"):
            content = torch.load(folder / name, weights_only=True)
            for key in changed:
                content["config"].pop(key)
            content["official"] = {key: value["content"] for key, value in content["official"].items()}
            torch.save(content, folder / name)
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
