"""Random weights of CLIP ViT-B/16 and SAM ViT-B in every format SCHNet reads, written by the projects that use it.

    python tests/write_weights.py FOLDER        # 5 GB, a subfolder per format; prints their sizes and feature errors
"""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401  (makes torchvision importable)
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import interpolate, normalize  # noqa: E402

from clip_vit import CLIP, load_clip  # noqa: E402
from sam_vit import SAMViT, load_sam  # noqa: E402


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Adds noise, so that an ignored bias, norm or position is noticed; half precision holds the values exactly."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.1 if p.ndim < 2 else 0.02).copy_(p.half())
    return model.eval().requires_grad_(False)


@functools.cache
def open_clip_model(name: str) -> nn.Module:
    import open_clip
    return randomize(open_clip.create_model(name))


@functools.cache
def transformers_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel
    config = CLIPConfig(projection_dim=512, text_config={"eos_token_id": 49407},
                        vision_config={"patch_size": 16, "attn_implementation": "eager"})
    return randomize(CLIPModel(config))


@functools.cache
def segment_anything_model() -> nn.Module:
    from segment_anything import sam_model_registry
    return randomize(sam_model_registry["vit_b"]())


@functools.cache
def transformers_sam() -> nn.Module:
    from transformers import SamConfig, SamModel, SamVisionConfig
    return randomize(SamModel(SamConfig(vision_config=SamVisionConfig().to_dict())))


def save_archive(model: nn.Module, folder: Path):
    """A TorchScript archive with the names and types of OpenAI's: half precision except for norms and embeddings."""
    class Node(nn.Module):
        def forward(self, x):
            return x + 1

    root = Node()
    for name, tensor in model.state_dict().items():
        single = "embedding" in name or "ln_" in name or name == "logit_scale"
        node, (*parents, last) = root, name.split(".")
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, Node())
            node = node.get_submodule(parent)
        node.register_parameter(last, nn.Parameter(tensor if single else tensor.half()))
    for name, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(value))
    torch.jit.save(torch.jit.trace(root, torch.ones(1)), folder / "ViT-B-16.pt")


def save_open_clip(model: nn.Module, folder: Path, name: str, safe: bool):
    import open_clip
    tokenizer = SimpleNamespace(save_pretrained=lambda _: None)
    config = open_clip.get_model_config(name)
    sys.modules["open_clip.push_to_hf_hub"].save_for_hf(model, tokenizer, config, folder, safe)


def save_hub_bin(model: nn.Module, folder: Path):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)


def save_training(model: nn.Module, folder: Path):
    """As fine-tuning programs do: names with a prefix, next to other objects."""
    names = {f"module.sam.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": names, "optimizer": {"lr": 1e-4}, "epoch": 3}, folder / "finetuned.pth")


GELU, QUICK_GELU = "ViT-B-16", "ViT-B-16-quickgelu"
CLIP_FORMATS = {                                           # {name: (random model, writer, file to load)}
    "openai": (lambda: open_clip_model(QUICK_GELU), save_archive, "ViT-B-16.pt"),
    "open_clip": (lambda: open_clip_model(GELU), lambda *args: save_open_clip(*args, GELU, True), ""),
    "open_clip_bin": (lambda: open_clip_model(QUICK_GELU), lambda *args: save_open_clip(*args, QUICK_GELU, False),
                      "open_clip_pytorch_model.bin"),
    "hub": (transformers_clip, lambda model, folder: model.save_pretrained(folder), ""),
    "hub_shards": (transformers_clip, lambda model, folder: model.save_pretrained(folder, max_shard_size="200MB"), ""),
    "hub_bin": (transformers_clip, save_hub_bin, "pytorch_model.bin")}
SAM_FORMATS = {
    "segment_anything": (segment_anything_model,
                         lambda model, folder: torch.save(model.state_dict(), folder / "sam_b.pth"), "sam_b.pth"),
    "training": (segment_anything_model, save_training, "finetuned.pth"),
    "hub_sam": (transformers_sam, lambda model, folder: model.save_pretrained(folder), ""),
    "hub_sam_bin": (transformers_sam, save_hub_bin, "pytorch_model.bin")}


def write(name: str, folder: Path) -> Path:
    """Writes the format into `folder` / `name`; returns the value for clip_weights= or sam_weights=."""
    model, save, file = (CLIP_FORMATS | SAM_FORMATS)[name]
    (folder / name).mkdir(parents=True)
    save(model(), folder / name)
    return folder / name / file


def relative_error(ours: list, theirs: list) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def clip_error(name: str, clip: CLIP) -> float:
    """The largest relative error of f_cls, the four taps and f_txt against the saved model."""
    peer, image = CLIP_FORMATS[name][0](), torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[49406, *range(320, 326), 49407] + [0] * 69, [49406, 9, 49407] + [0] * 74])
    pixels = clip.visual.normalize(image)
    if hasattr(peer, "vision_model"):
        out = peer.vision_model(pixels, output_hidden_states=True)
        f_cls = peer.visual_projection(out.pooler_output)
        taps = [out.hidden_states[i + 1][:, 1:] for i in (3, 5, 7, 11)]
        f_txt = peer.text_projection(peer.text_model(tokens).pooler_output)
    else:
        out = peer.visual.forward_intermediates(pixels, indices=[3, 5, 7, 11], intermediates_only=False,
                                                output_fmt="NLC", normalize_intermediates=False)
        f_cls, taps, f_txt = out["image_features"], out["image_intermediates"], peer.encode_text(tokens)
    ours, our_taps = clip.visual(image)
    return relative_error([ours, clip.encode_text(tokens), *(tap.flatten(1, 2) for tap in our_taps)],
                          [normalize(f_cls, dim=-1), normalize(f_txt, dim=-1), *taps])


@torch.no_grad()
def sam_error(name: str, sam: SAMViT) -> float:
    """The largest relative error of the four outputs against the saved encoder, at a small grid."""
    model, h, w = SAM_FORMATS[name][0](), 6, 10
    encoder = model.vision_encoder if hasattr(model, "vision_encoder") else model.image_encoder
    blocks = encoder.layers if hasattr(encoder, "layers") else encoder.blocks
    table = encoder.pos_embed                              # the reference encoders accept one size only
    small = interpolate(table.permute(0, 3, 1, 2), (h, w), mode="bicubic").permute(0, 2, 3, 1)
    encoder.pos_embed, encoder.patch_embed.image_size = nn.Parameter(small, requires_grad=False), (16 * h, 16 * w)
    image, theirs = torch.rand(1, 3, 16 * h, 16 * w, generator=torch.Generator().manual_seed(1)), []
    hooks = [block.register_forward_hook(lambda _, __, out: theirs.append(out[0] if isinstance(out, tuple) else out))
             for block in blocks[2::3]]
    encoder(sam.normalize(image))
    for hook in hooks:
        hook.remove()
    encoder.pos_embed = table
    return relative_error(sam(image), theirs)


if __name__ == "__main__":
    for each in (*CLIP_FORMATS, *SAM_FORMATS):
        path = write(each, Path(sys.argv[1]))
        error = clip_error(each, load_clip(path)) if each in CLIP_FORMATS else sam_error(each, load_sam(path, "vit_b"))
        key = "clip_weights" if each in CLIP_FORMATS else "sam=vit_b sam_weights"
        size = sum(file.stat().st_size for file in (Path(sys.argv[1]) / each).iterdir()) / 1e6
        print(f"{key}={path}  {size:.0f} MB, relative error {error:.1e}", flush=True)
