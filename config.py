"""All hyperparameters of SCHNet: one frozen dataclass and its YAML loader.

    cfg = load_config("configs/cihp.yaml", ["lr=3e-4", "batch_size=8"])

A YAML file lists only what differs from the defaults below. The comment behind a field gives the source of its value: a
section of the paper (§), a named source, or "ours". A field's type has its range; an unknown key, a wrong type, a value
out of range or values that contradict each other raise a `UserError`: one line that names the key.
"""

import contextlib
import dataclasses
import difflib
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml

from errors import UserError, reading

IGNORE = 255                                               # label of pixels that neither loss nor score counts

# Types with their range, both ends included, or with the words that are allowed.
Count = Annotated[int, 1, 1_000_000_000]
Iterations = Annotated[int, 0, 1_000_000_000]
Width = Annotated[int, 1, 16_384]
Pixels = Annotated[int, 32, 16_384]
Images = Annotated[int, 1, 4_096]
Block = Annotated[int, 0, 999]
Scale = Annotated[float, 0.01, 16]
Share = Annotated[float, 0, 1]
Dropout = Annotated[float, 0, 0.999]                       # survivors are scaled by 1 / (1 - p)
Beta = Annotated[float, 0, 0.999_999]
Weight = Annotated[float, 0, 1_000_000]
Label = Annotated[int, 0, 254]
Byte = Annotated[int, 0, 255]
Place = Annotated[str, "path"]                             # ~ is expanded


@dataclass(frozen=True)
class Config:
    # data (§4.1, §4.2)
    dataset: Annotated[str, "lip", "cihp", "ppp", "synthetic", "custom"] = "synthetic"
    data_root: Place = ""                                  # folder of the data set (unused by synthetic)
    train_images: Place = "images/train"                   # the next nine: custom only; folders below data_root
    train_labels: Place = "labels/train"
    val_images: Place = "images/val"
    val_labels: Place = "labels/val"
    train_list: Place = ""                                 # a text file of names, one per line; "": all photos
    val_list: Place = ""
    classes: tuple[str, ...] = ()                          # names, label 0 first
    palette: tuple[tuple[Byte, Byte, Byte], ...] = ()      # RGB per class; (): distinct colours are chosen
    flip_pairs: tuple[tuple[Label, Label], ...] = ()       # labels swapped by a horizontal flip
    synthetic_size: tuple[Width, Width] = (480, 480)       # synthetic only: height, width in pixels
    synthetic_train: Count = 100_000                       # synthetic only: images; drawn on the fly, any number works
    synthetic_val: Count = 200
    crop_size: tuple[Pixels, Pixels] = (480, 480)          # §4.2: height, width of a training sample
    base_size: Width = 480                                 # ours: long side of a photo at scale 1
    scale_range: tuple[Scale, Scale] = (0.5, 2.0)          # §4.2
    max_class_share: Share = 0.75                          # mmsegmentation: crop again while one class fills more
    photometric: bool = True                               # §4.2: photometric distortion
    flip_prob: Share = 0.5                                 # §4.2: random left-right flipping
    workers: Block = 4                                     # threads that read ahead, per process

    # network (§3, §4.2)
    backbone: Annotated[str, "sam", "clip"] = "sam"        # "CLIP alone" is row 1 of Table 6
    srm: bool = True                                       # Eqs. 1, 2, 4 (rows 3 and 4 of Table 6)
    ftm: bool = True                                       # Eqs. 5, 6 (row 4 of Table 6)
    sam: str = "vit_l"                                     # §4.2; a name in sam_vit.SIZES
    clip: str = "vit_b16"                                  # §4.2; a name in clip_vit.SIZES
    sam_weights: Place = "weights/sam_vit_l_0b3195.pth"    # §4.2; "": random weights
    clip_weights: Place = "weights/ViT-B-16.pt"            # §4.2; "": random weights
    clip_activation: Annotated[str, "", "quick_gelu", "gelu"] = ""       # "": read from the file
    vocab: Place = "weights/bpe_simple_vocab_16e6.txt.gz"  # CLIP's merges; "": bytes, for random weights only
    freeze: bool = True                                    # §4.3: SAM (except its patch embedding) and CLIP are frozen
    clip_taps: tuple[Block, ...] = (3, 5, 7, 11)           # §3.1, 0-based: DenseCLIP's indices, block 11 is the last
    prompt: str = "a photo of a {class}."                  # ours: the paper has "a text prompt T from labels"
    sim_scale: Weight | None = None                        # Eq. 1; null: CLIP's learned scale (100); 1.0: as printed
    srm_sites: Annotated[int, 4, 5] = 5                    # Eq. 2: i in 1..5; 4 leaves out the one after the last layer
    srm_ratio: Scale = 0.25                                # Eq. 4's bottleneck; ours: ViT-Adapter's FFN ratio
    ftm_tokens: Width = 100                                # m of Eq. 5; Rein
    ftm_ratio: Scale = 0.25                                # Eq. 6's bottleneck; ours: as srm_ratio
    ftm_scale_logits: bool = False                         # Eq. 5 prints no 1/sqrt(C); Rein has it
    ftm_residual: Annotated[str, "f", "f'"] = "f"          # Eq. 6: as printed; "f'": as Rein
    ftm_init: Annotated[str, "zero", "torch"] = "torch"    # Eq. 6's MLPs: nn.Linear's; "zero": the third begins at 0
    rho_init: Weight = 1e-3                                # Eq. 5: "begins from a very small value"; Rein
    prior_dim: Width = 64                                  # ViT-Adapter-L: spatial prior's first width
    deform_heads: Width = 16                               # ViT-Adapter-L
    deform_points: Width = 4                               # ViT-Adapter-L
    deform_ratio: Scale = 0.5                              # ViT-Adapter-L
    cffn_ratio: Scale = 0.25                               # ViT-Adapter-L
    drop_path: Dropout = 0.3                               # ViT-Adapter's BEiT-L: in the extractors' FFN only
    head_dim: Width = 512                                  # UperNet of ViT-Adapter's AugReg-L, Uni-Perceiver-L
    aux_dim: Width = 256                                   # UperNet's auxiliary FCN head
    head_dropout: Dropout = 0.1                            # mmsegmentation

    # optimisation (§4.3, §4.5)
    iters: Iterations = 60_000                             # §4.3: LIP 60k, PPP 30k, CIHP 80k; 0: a dry run
    batch_size: Images = 16                                # §4.3: the total over all processes and accumulation steps
    accum_steps: Images = 1                                # micro-batches per step, for fewer or smaller GPUs
    loss_group: Images = 4                                 # images per loss: the authors' 16 on 4 GPUs; the loss is
    #                                                        the same for every split of the batch into multiples of it
    lr: Annotated[float, 1e-12, 1_000_000] = 6e-4          # §4.3
    patch_embed_lr_mult: Weight = 1.0                      # ours: the paper names one rate
    warmup_iters: Iterations = 1500                        # §4.3
    warmup_ratio: Weight = 1e-5                            # §4.3
    poly_power: Weight = 1.0                               # ViT-Adapter
    betas: tuple[Beta, Beta] = (0.9, 0.999)                # ViT-Adapter
    weight_decay: Weight = 0.05                            # ViT-Adapter
    lovasz_weight: Weight = 1.0                            # §4.5 "mIoU loss"; weight: CDGNet, by the same first author
    aux_weight: Weight = 0.4                               # UperNet's auxiliary loss; 0: no auxiliary head
    precision: Annotated[str, "bf16", "fp16", "fp32"] = "bf16"
    checkpointing: bool = False                            # recompute the layers in the backward pass: less memory
    sync_bn: bool = True                                   # ViT-Adapter: BatchNorm over all GPUs (no effect on a CPU)
    seed: Annotated[int, 0, 2**31 - 3] = 0                 # 2**31 - 1 draws validation images, - 2 the demo's

    # the run
    init: Place = ""                                       # a trained run to start from: a folder or checkpoint
    out: Place = ""                                        # folder of the run; "": runs/<name of the config file>
    log_every: Count = 50                                  # iterations
    eval_every: Count = 5_000
    save_every: Count = 1_000

    # inference (§4.4)
    tta_scales: tuple[Scale, ...] = (0.75, 1.0, 1.25, 1.5)

    def __post_init__(self):
        """Rejects combinations that would make a later step fail; ranges are checked where values are read."""
        def need(ok, message):
            if not ok:
                raise UserError(message)

        need(self.iters == 0 or self.iters > self.warmup_iters,
             f"iters ({self.iters}) must be more than warmup_iters ({self.warmup_iters})")
        need(not any(side % 32 for side in self.crop_size),
             f"crop_size must be multiples of 32 (the adapter's pyramid), not {self.crop_size}")
        need(self.scale_range[0] <= self.scale_range[1], f"scale_range must be rising, not {self.scale_range}")
        need(self.tta_scales, "tta_scales must name at least one scale")
        need(len(self.clip_taps) == 4 and sorted(set(self.clip_taps)) == list(self.clip_taps),
             f"clip_taps must be four rising block numbers, not {self.clip_taps}")
        need(self.backbone == "sam" or not self.srm, "srm needs backbone: sam (it adds CLIP's features to SAM's)")
        need("{class}" in self.prompt, f"prompt must contain {{class}}, it is {self.prompt!r}")


TYPES = typing.get_type_hints(Config, include_extras=True)
PAIRED = ("crop_size", "synthetic_size", "scale_range")    # a single number is repeated: 480 -> (480, 480)
CUSTOM = ("train_images", "train_labels", "val_images", "val_labels", "train_list", "val_list", "classes", "palette",
          "flip_pairs")                                    # known for the published data sets

# Keys that may change on resume: paths, intervals, how the work is split, the length of the run.
RESUMABLE = {"iters", "data_root", "sam_weights", "clip_weights", "clip_activation", "vocab", "init", "workers",
             "log_every", "eval_every", "save_every", "out", "checkpointing", "tta_scales", "accum_steps"}
# Keys that may be overridden for a trained network: paths, data, precision, and what an ablation may switch off in it
# (ftm_residual, ftm_scale_logits, srm_sites). Its weights fix all others.
OVERRIDABLE = {*CUSTOM, "dataset", "data_root", "synthetic_size", "synthetic_train", "synthetic_val", "crop_size",
               "base_size", "workers", "sam_weights", "clip_weights", "clip_activation", "vocab", "ftm_residual",
               "ftm_scale_logits", "srm_sites", "precision", "tta_scales"}


# ----------------------------------------------------------------------------------------------------------------------
# reading

def user_path(path: str | Path) -> Path:
    """`path` with ~ expanded: the shell does that only at the start of a word, not in `--out=~/x` or a config file."""
    return Path(os.path.expanduser(path))


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration of a YAML file with `key=value` overrides on top. `path` None: the defaults alone."""
    values = {}
    if path is not None:
        path = user_path(path)
        values = read_yaml(path, "config file", "configs") or {}
        if not isinstance(values, dict):
            raise UserError(f"{path}: a config is a list of `key: value` lines")
        values = _typed(values, str(path))
    values |= parse_overrides(overrides)
    if path is not None and not values.get("out"):
        values["out"] = f"runs/{path.stem}"
    cfg = Config(**values)
    for key in CUSTOM if cfg.dataset != "custom" else ():
        if getattr(cfg, key) != getattr(Config, key):
            raise UserError(f"{key} is for dataset: custom, {cfg.dataset} has its own")
    return cfg


def parse_overrides(overrides: list[str] | tuple[str, ...]) -> dict:
    """`key=value` texts as a dict of the fields' types; the values are read as YAML."""
    values = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        try:
            value = yaml.safe_load(text) if text.strip() else ""
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise UserError(f"{item!r} is not key=value with a YAML value (--cfg names a config file, --run a run)")
        values |= _typed({key.strip(): value}, f"override {item!r}")
    return values


def from_dict(values: dict, source: str) -> Config:
    """A `Config` from plain values; `source` is named in the errors."""
    return Config(**_typed(values, source))


def _typed(values: dict, source: str) -> dict:
    """Plain values as the fields' types, within their ranges."""
    checked = {}
    for key, value in values.items():
        if key not in TYPES:
            near = difflib.get_close_matches(str(key), TYPES, n=1)
            raise UserError(f"{source}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if key in PAIRED and type(value) in (int, float):
            value = [value, value]
        checked[key] = _convert(value, TYPES[key], f"{source}: {key}")
    return checked


def _convert(value, kind, where: str):
    """`value` as the field's type. PyYAML reads `6e-4` as a string and `off` as False: the first is a float here."""
    if typing.get_origin(kind) is typing.Union:            # Weight | None
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        wanted = "a list" if kinds[-1] is Ellipsis else f"a list of {len(kinds)}"
        if isinstance(value, (list, tuple)):
            kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
            if len(kinds) == len(value):
                return tuple(_convert(v, kind, f"{where}[{n}]") for n, (v, kind) in enumerate(zip(value, kinds)))
    else:
        limits = kind.__metadata__ if typing.get_origin(kind) is Annotated else ()
        kind = typing.get_args(kind)[0] if limits else kind
        if kind is float and type(value) in (int, str):
            with contextlib.suppress(ValueError, OverflowError):
                value = float(value)
        fits = type(value) is kind                         # exact type: bool is not int
        if kind in (int, float):
            wanted = f"a {'whole ' * (kind is int)}number between {limits[0]:,} and {limits[1]:,}"
            fits = fits and limits[0] <= value <= limits[1]              # nan is in no range
        else:
            words = limits if limits != ("path",) else ()
            wanted = "one of " + ", ".join(words) if words else "true or false" if kind is bool else "text"
            fits = fits and (not words or value in words)
        if fits:
            return os.path.expanduser(value) if limits == ("path",) else value
    raise UserError(f"{where} must be {wanted}, not {value!r}")


class Loader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys (PyYAML silently keeps the last)."""

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for n, key in enumerate(keys):
            if key.value in [other.value for other in keys[:n]]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str, ready: str):
    """The content of a YAML file. `what` names the kind of file in errors, `ready` the folder with the shipped ones."""
    try:
        with reading(path, what, f" (the ready ones are in {ready}/)"):
            return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:      # the last: very deep nesting
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def to_yaml(cfg: Config) -> str:
    """The complete configuration as YAML, in the order of the dataclass; `load_config` reads it back."""
    return yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False, default_flow_style=None, width=120)
