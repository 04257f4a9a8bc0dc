"""The weight files of SAM and CLIP: official names from every common format, identity, checks.

`sam_tensors` and `clip_tensors` give the tensors of a file the names of the official ones, whichever project wrote it:
the authors, the Hugging Face hub (transformers), open_clip, or a training program that put a prefix before all names.
"""

import hashlib
import json
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from errors import UserError
from files.weights import read_tensors

# ----------------------------------------------------------------------------------------------------------------------
# names: one table per format, from its names to the official ones

SAM_HUB = ((r"patch_embed\.projection", "patch_embed.proj"), (r"^layers\.", "blocks."), (r"layer_norm(\d)", r"norm\1"))
CLIP_HUB = (
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm", "visual.ln_pre"), (r"vision_model\.post_layernorm", "visual.ln_post"),
    (r"visual_projection\.weight", "visual.proj"), (r"text_projection\.weight", "text_projection"),
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
    (r"vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"text_model\.encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), (r"self_attn\.", "attn."))
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "text_model.embeddings.position_ids",
              "vision_model.embeddings.position_ids")      # integers of OpenAI's archive and of older files of the hub


def sam_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of SAM's image encoder without its neck, by their official names (`blocks.0.norm1.weight`)."""
    tensors = read_tensors(path)
    for anchor, table in (("blocks.0.attn.rel_pos_h", ()), ("layers.0.attn.rel_pos_h", SAM_HUB)):
        found = _renamed(tensors, anchor, table)
        if found:
            return {name: t for name, t in found.items() if name.startswith(("patch_embed.", "pos_embed", "blocks."))}
    raise UserError(f"{path}: this is {describe(tensors)}, SAM's image encoder is needed")


def clip_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of both towers of CLIP by their official names (`visual.conv1.weight`)."""
    tensors = {name: t for name, t in read_tensors(path).items() if name not in NO_WEIGHTS}
    found = _renamed(tensors, "vision_model.embeddings.class_embedding", CLIP_HUB)
    if not found:
        return _renamed(tensors, "visual.class_embedding", ()) or tensors
    for name in [name for name in found if name.endswith("q_proj.weight")]:
        place = name.removesuffix("q_proj.weight")
        for kind in ("weight", "bias"):                    # three layers there, one here
            parts = [found.pop(f"{place}{part}_proj.{kind}", None) for part in "qkv"]
            if all(part is not None for part in parts):
                found[f"{place}in_proj_{kind}"] = torch.cat(parts)
    return {name: t.T if name in ("visual.proj", "text_projection") else t for name, t in found.items()}


def _renamed(tensors: dict[str, Tensor], anchor: str, table: tuple) -> dict[str, Tensor]:
    """The tensors beside `anchor`, without the prefix that it has (`module.`, `sam.image_encoder.`), renamed by the table;
    {} if there is none."""
    name = next((name for name in tensors if name == anchor or name.endswith(f".{anchor}")), None)
    if name is None:
        return {}
    prefix, renamed = name[:-len(anchor)], {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for pattern, new in table:
                name = re.sub(pattern, new, name)
            renamed[name] = tensor
    return renamed


def clip_activation(path: str | Path) -> str:
    """The activation of a CLIP: "quick_gelu" or "gelu" as a config beside the file or OpenAI's archive says; "": unknown."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    for name, key in (("open_clip_config.json", "model_cfg"), ("config.json", "vision_config")):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, KeyError):
            continue
        if key == "model_cfg":
            return "quick_gelu" if config.get("quick_gelu") else "gelu"
        return {"quick_gelu": "quick_gelu", "gelu": "gelu"}.get(config.get("hidden_act", "quick_gelu"), "")
    if path.is_file() and zipfile.is_zipfile(path):        # OpenAI's archive names the classes of its modules
        with zipfile.ZipFile(path) as archive:
            return "quick_gelu" if any(name.endswith("/QuickGELU.py") for name in archive.namelist()) or any(
                b"QuickGELU" in archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")) else ""
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# identity and checks

def content_hash(tensors: dict[str, Tensor]) -> str:
    """A SHA-256 over names, shapes and values in fp32, whatever file they came from."""
    def digest(name: str) -> bytes:
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        text = f"{name} {tuple(tensor.shape)} ".encode()
        return hashlib.sha256(text + hashlib.sha256(tensor.numpy().reshape(-1).data).digest()).digest()

    with ThreadPoolExecutor() as pool:                     # hashing releases the interpreter
        return hashlib.sha256(b"".join(pool.map(digest, sorted(tensors)))).hexdigest()


def describe(tensors: dict[str, Tensor]) -> str:
    """A state dict in words: `CLIP ViT-B/16`, `SAM ViT-L`, ..."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def any_name(*parts: str) -> bool:
        return any(part in name for name in shapes for part in parts)

    if any_name("rel_pos_h"):
        conv = next((shape for name, shape in shapes.items() if "patch_embed.proj" in name and len(shape) == 4), (0,))
        return {768: "SAM ViT-B", 1024: "SAM ViT-L", 1280: "SAM ViT-H"}.get(conv[0], f"SAM of width {conv[0]}")
    if any_name("visual.layer1.0.conv1"):
        return "a CLIP with a ResNet"
    conv = shapes.get("visual.conv1.weight", ())
    if len(conv) == 4 and "visual.class_embedding" in shapes:
        known = {(768, 32): "CLIP ViT-B/32", (768, 16): "CLIP ViT-B/16", (1024, 14): "CLIP ViT-L/14"}
        name = known.get((conv[0], conv[3]), f"CLIP ViT of width {conv[0]}, patch {conv[3]}")
        return name if "token_embedding.weight" in shapes else f"the image tower alone of a {name}"
    if any_name("vision_model.embeddings"):
        return "the image tower alone of a CLIP" if not any_name("text_model.") else "a CLIP"
    if any_name("token_embedding.weight"):
        return "the text tower alone of a CLIP"
    if any_name("trunk.blocks", "vision_encoder.backbone"):
        return "SAM 2"
    if any_name("attention_biases"):
        return "MobileSAM"
    if any_name("mask_decoder.", "prompt_encoder."):
        return "EfficientSAM or another variant of SAM"
    return "an unknown kind of file"


def count_blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    """Number of blocks `prefix`0, `prefix`1, ..."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)})


def check_keys(model: nn.Module, tensors: dict[str, Tensor], path: str | Path):
    """`tensors` must have exactly the names and shapes of `model`'s state dict, as floating-point numbers."""
    state = model.state_dict()
    wanted, found = describe(state), describe(tensors)
    if found != wanted:
        raise UserError(f"{path}: this is {found}, the model needs {wanted} ({_names(tensors)})")
    faults = [f"{len(names)} {fault} ({_names(names)})" for fault, names in (
        ("missing", [name for name in state if name not in tensors]),
        ("left over", [name for name in tensors if name not in state])) if names]
    if faults:
        raise UserError(f"{path}: the names are not those of {wanted}: {', '.join(faults)}")
    wrong = [f"{name} {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
             for name, tensor in state.items() if tensor.shape != tensors[name].shape]
    wrong += [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors of another size or type than the model's: {_names(wrong)}")


def load(model: nn.Module, tensors: dict[str, Tensor], path: str | Path):
    """Checks the tensors and puts them into `model`, which may be on the meta device, in fp32."""
    check_keys(model, tensors, path)
    model.load_state_dict({name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}, assign=True)


def _names(names, shown: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
