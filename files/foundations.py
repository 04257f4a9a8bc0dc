"""The weight files of SAM and CLIP: official names from every common format, identity, checks.

`sam_tensors` and `clip_tensors` give tensors of `files.weights.read_tensors` the official names, whichever project
wrote the file: the authors, the Hugging Face hub (transformers), open_clip, or a training program that puts a prefix
before all names (`module.`, `sam.image_encoder.`).
"""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from errors import UserError

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
INTEGERS = ("input_resolution", "context_length", "vocab_size",          # of OpenAI's archive
            "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")    # of older files of the hub
KINDS = (                                                  # a part of a name that only this kind of file has
    ("visual.layer1.0.conv1", "a CLIP with a ResNet"), ("vision_model.embeddings", "a CLIP"),
    ("visual.class_embedding", "a CLIP"),
    ("token_embedding", "the text tower of a CLIP"), ("rel_pos_h", "a SAM"), ("trunk.blocks", "SAM 2"),
    ("vision_encoder.backbone", "SAM 2"), ("attention_biases", "MobileSAM"),
    ("mask_decoder.", "EfficientSAM or another variant of SAM"))
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def sam_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of SAM's image encoder without its neck, by their official names (`blocks.0.norm1.weight`)."""
    found = _renamed(tensors, "blocks.0.attn.rel_pos_h", ()) or _renamed(tensors, "layers.0.attn.rel_pos_h", SAM_HUB)
    parts = "patch_embed.", "pos_embed", "blocks."
    return {name: tensor for name, tensor in found.items() if name.startswith(parts)} or tensors


def clip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of both towers of CLIP by their official names (`visual.conv1.weight`)."""
    tensors = {name: t for name, t in tensors.items() if not name.endswith(INTEGERS)}
    found = _renamed(tensors, "vision_model.embeddings.class_embedding", CLIP_HUB)
    if not found:
        return _renamed(tensors, "visual.class_embedding", ()) or tensors
    for name in [name for name in found if "q_proj." in name]:                       # three layers there, one here
        parts = [found.pop(name.replace("q_proj", f"{part}_proj"), torch.empty(0)) for part in "qkv"]
        found[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return {name: t.T if name in ("visual.proj", "text_projection") else t for name, t in found.items()}


def _renamed(tensors: dict[str, Tensor], anchor: str, table: tuple) -> dict[str, Tensor]:
    """The tensors with the prefix of `anchor`, which is removed, renamed by the table; {} without `anchor`."""
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


def clip_activation(path: str | Path, tensors: dict[str, Tensor]) -> str:
    """The activation that a CLIP was trained with, "quick_gelu" or "gelu", from a config beside the file or because it
    is OpenAI's archive; "": unknown."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if "input_resolution" in tensors:                      # only OpenAI's archive has it
        return "quick_gelu"
    if (folder / "open_clip_config.json").exists():
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
        return "quick_gelu" if config.get("quick_gelu") else "gelu"
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vision_config", {})
        return config.get("hidden_act", "quick_gelu")      # transformers' default
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


def load(model: nn.Module, tensors: dict[str, Tensor], path: str | Path, key: str):
    """Puts `tensors`, which must have exactly the names and shapes of the model's, into `model` in fp32; it may be on
    the meta device. `key`: the setting that chose the model, for the error."""
    state = model.state_dict()
    faults = [f"{name} is missing" for name in state if name not in tensors]
    faults += [f"{name} is unknown" for name in tensors if name not in state]
    faults += [f"{name} is {tuple(tensor.shape)} of {tensor.dtype} instead of {tuple(state[name].shape)}"
               for name, tensor in tensors.items()
               if name in state and (tensor.shape != state[name].shape or tensor.dtype not in FLOATS)]
    if faults:
        kind = next((kind for part, kind in KINDS if any(part in name for name in tensors)), "an unknown kind of file")
        raise UserError(f"{path}: this is {kind} and does not fit {key}: {faults[0]} ({len(faults)} differences)")
    tensors = {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
