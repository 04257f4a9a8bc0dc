"""Every knob of SCHNet once: one frozen dataclass, one loader.

    cfg = load_config("configs/cihp.yaml", ["lr=3e-4", "batch_size=8"])

A YAML file lists only what differs from the defaults below, which are the paper's network and training.
The comment behind a field says where its value comes from: a section of the paper (§), a named source, or "ours".
An unknown key, a wrong type or values that contradict each other raise `UserError`: one line that names the key.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from engine.errors import UserError

DATASETS = ("lip", "cihp", "ppp", "synthetic", "custom")
IGNORE = 255                                               # label of pixels that neither loss nor score counts
SIZES = ("sam_dim", "sam_depth", "sam_heads", "sam_window", "sam_grid", "clip_dim", "clip_depth", "clip_heads",
         "clip_grid", "clip_embed", "text_dim", "text_depth", "text_heads")         # keys of the encoders' sizes
PATHS = ("data_root", "train_images", "train_labels", "val_images", "val_labels", "train_list", "val_list",
         "sam_weights", "clip_weights", "vocab", "out")    # keys in which ~ is the home folder

TWICE = ("crop_size", "synthetic_size", "scale_range")     # of which 480 means 480, 480
CUSTOM = ("train_images", "train_labels", "val_images", "val_labels", "train_list", "val_list", "classes", "palette",
          "flip_pairs")                                    # what the published data sets know by themselves

# What each number may be, ends included: more than anybody needs, less than what memory or a counter cannot hold.
RANGES = (
    (1, 16_384, "base_size synthetic_size sam_dim sam_heads sam_window sam_grid clip_dim clip_heads clip_grid "
                "clip_embed text_dim text_heads ftm_tokens prior_dim deform_heads deform_points head_dim aux_dim"),
    (32, 16_384, "crop_size"),
    (1, 1_000, "sam_depth clip_depth text_depth"),
    (0, 999, "clip_taps workers"),
    (4, 5, "srm_sites"),
    (1, 1_000_000_000, "synthetic_train synthetic_val log_every eval_every save_every"),
    (0, 1_000_000_000, "iters warmup_iters"),
    (1, 4_096, "batch_size accum_steps loss_group"),
    (0, 2**31 - 3, "seed"),                                # the next two seeds draw validation and demo figures
    (0.01, 16, "scale_range tta_scales srm_ratio ftm_ratio deform_ratio cffn_ratio"),
    (0, 1, "flip_prob max_class_share"),
    (0, 0.999, "drop_path head_dropout"),                  # what is left is divided by 1 - p
    (0, 0.999_999, "betas"),
    (1e-12, 1_000_000, "lr"),
    (0, 1_000_000, "patch_embed_lr_mult warmup_ratio poly_power weight_decay lovasz_weight aux_weight rho_init "
                   "sim_scale"),
)


@dataclass(frozen=True)
class Config:
    # data (§4.1, §4.2)
    dataset: str = "synthetic"                             # lip | cihp | ppp | synthetic | custom
    data_root: str = ""                                    # folder of the data set (unused by synthetic)
    train_images: str = "images/train"                     # the next six: custom only, below data_root
    train_labels: str = "labels/train"
    val_images: str = "images/val"
    val_labels: str = "labels/val"
    train_list: str = ""                                   # a text file of names, one a line; "": every photo of the folder
    val_list: str = ""
    classes: tuple[str, ...] = ()                          # custom only: names, label 0 first
    palette: tuple[tuple[int, int, int], ...] = ()         # custom only: RGB per class; (): distinct colours are made
    flip_pairs: tuple[tuple[int, int], ...] = ()           # custom only: labels that change places in a mirror
    synthetic_size: tuple[int, int] = (480, 480)           # synthetic only: height, width in pixels
    synthetic_train: int = 100_000                         # synthetic only: figures; drawn when asked for, so the number is free
    synthetic_val: int = 200
    crop_size: tuple[int, int] = (480, 480)                # §4.2: height, width of a training sample
    base_size: int = 480                                   # ours: long side of a photo at scale 1, in training and testing
    scale_range: tuple[float, float] = (0.5, 2.0)          # §4.2
    max_class_share: float = 0.75                          # mmsegmentation: crop again while one class fills more than this
    photometric: bool = True                               # §4.2: photometric distortion
    flip_prob: float = 0.5                                 # §4.2: random left-right flipping
    workers: int = 4                                       # loader processes per training process

    # network (§3, §4.2)
    backbone: str = "sam"                                  # sam | clip: "CLIP alone" is row 1 of Table 6
    srm: bool = True                                       # Eqs. 1, 2, 4 (rows 3 and 4 of Table 6)
    ftm: bool = True                                       # Eqs. 5, 6 (row 4 of Table 6)
    sam_weights: str = "weights/sam_vit_l_0b3195.pth"      # §4.2; "": random weights
    clip_weights: str = "weights/ViT-B-16.pt"              # §4.2; "": random weights
    vocab: str = "weights/bpe_simple_vocab_16e6.txt.gz"    # CLIP's merges; "": bytes, for random weights only
    freeze: bool = True                                    # §4.3: SAM (but its patch embedding) and CLIP stay as they are
    # An encoder's size: null is what the weight file has (without a file ViT-L's and ViT-B/16's, §4.2); a number that
    # the file has otherwise is refused. No file tells CLIP's number of heads: null is OpenAI's, a 64th of the width.
    sam_dim: int | None = None                             # ViT-L: 1024
    sam_depth: int | None = None                           # 24
    sam_heads: int | None = None                           # 16
    sam_window: int | None = None                          # 14
    sam_grid: int | None = None                            # side of the absolute position table: 64, a 1024 px image
    clip_dim: int | None = None                            # ViT-B/16: 768
    clip_depth: int | None = None                          # 12
    clip_heads: int | None = None                          # 12
    clip_grid: int | None = None                           # side of the position table: 14, a 224 px image
    clip_embed: int | None = None                          # width of f_cls and f_txt: 512
    text_dim: int | None = None                            # 512
    text_depth: int | None = None                          # 12
    text_heads: int | None = None                          # 8
    clip_taps: tuple[int, ...] = (3, 5, 7, 11)             # §3.1, 0-based: DenseCLIP's indices, block 11 is the last
    prompt: str = "a photo of a {class}."                  # ours: the paper has "a text prompt T from labels"
    sim_scale: float | None = None                         # Eq. 1; null: CLIP's learned scale (100); 1.0: as printed
    srm_sites: int = 5                                     # Eq. 2: i in 1..5; 4 leaves out the one after the last layer
    srm_ratio: float = 0.25                                # Eq. 4's bottleneck; ours: ViT-Adapter's FFN ratio
    ftm_tokens: int = 100                                  # m of Eq. 5; Rein
    ftm_ratio: float = 0.25                                # Eq. 6's bottleneck; ours: as srm_ratio
    ftm_scale_logits: bool = False                         # Eq. 5 prints no 1/sqrt(C); Rein has it
    ftm_residual: str = "f'"                               # Eq. 6: Rein's; "f" as printed, by which tokens hardly learn
    rho_init: float = 1e-3                                 # Eq. 5: "begins from a very small value"; Rein
    prior_dim: int = 64                                    # ViT-Adapter-L: spatial prior's first width
    deform_heads: int = 16                                 # ViT-Adapter-L
    deform_points: int = 4                                 # ViT-Adapter-L
    deform_ratio: float = 0.5                              # ViT-Adapter-L
    cffn_ratio: float = 0.25                               # ViT-Adapter-L
    drop_path: float = 0.3                                 # ViT-Adapter's BEiT-L: in the extractors' FFN only
    head_dim: int = 512                                    # UperNet of ViT-Adapter's AugReg-L, Uni-Perceiver-L
    aux_dim: int = 256                                     # UperNet's auxiliary FCN head
    head_dropout: float = 0.1                              # mmsegmentation

    # optimisation (§4.3, §4.5)
    iters: int = 60_000                                    # §4.3: LIP 60k, PPP 30k, CIHP 80k; 0: a dry run
    batch_size: int = 16                                   # §4.3: the total over all processes and accumulation steps
    accum_steps: int = 1                                   # micro-batches per step, for fewer or smaller GPUs
    loss_group: int = 4                                    # images per loss: the authors' 16 on 4 GPUs; keeps the loss
    #                                                        the same for any number of processes and accumulation steps
    lr: float = 6e-4                                       # §4.3
    patch_embed_lr_mult: float = 1.0                       # ours: the paper names one rate
    warmup_iters: int = 1500                               # §4.3
    warmup_ratio: float = 1e-5                             # §4.3
    poly_power: float = 1.0                                # ViT-Adapter
    betas: tuple[float, float] = (0.9, 0.999)              # ViT-Adapter
    weight_decay: float = 0.05                             # ViT-Adapter
    lovasz_weight: float = 1.0                             # §4.5 "mIoU loss"; weight: CDGNet, by the same first author
    aux_weight: float = 0.4                                # UperNet's auxiliary loss; 0: no auxiliary head
    precision: str = "bf16"                                # bf16 | fp16 | fp32
    checkpointing: bool = False                            # recompute the encoder layers in the backward pass: less memory
    sync_bn: bool = True                                   # ViT-Adapter: BatchNorm over all GPUs (no effect on a CPU)
    seed: int = 0

    # the run
    out: str = ""                                          # folder of the run; "": runs/<name of the config file>
    log_every: int = 50                                    # iterations
    eval_every: int = 5_000
    save_every: int = 1_000

    # inference (§4.4)
    tta_scales: tuple[float, ...] = (0.75, 1.0, 1.25, 1.5)

    def __post_init__(self):
        _check(self)


def user_path(path: str | Path) -> Path:
    """A path as people write it: a shell knows ~ at the start of a word, but not in `--out=~/x` or a config file."""
    return Path(os.path.expanduser(path))


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration of a YAML file with `key=value` overrides on top. `path` None: the defaults alone."""
    values = {}
    if path is not None:
        path = user_path(path)
        values = _typed(_read_config(path), str(path))
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
        if not equals:
            raise UserError(f"override {item!r} is not of the form key=value")
        try:
            value = yaml.safe_load(text) if text.strip() else ""
        except yaml.YAMLError:
            raise UserError(f"override {item!r}: the value is not valid YAML") from None
        values |= _typed({key.strip(): value}, f"override {item!r}")
    return values


def from_dict(values: dict, source: str) -> Config:
    """A `Config` from plain values; `source` is named in the errors."""
    return Config(**_typed(values, source))


def _typed(values: dict, source: str) -> dict:
    """Plain values as the fields' types."""
    fields = {field.name: field.type for field in dataclasses.fields(Config)}
    checked = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            raise UserError(f"{source}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if key in TWICE and type(value) in (int, float):
            value = [value, value]
        checked[key] = _coerce(value, fields[key], f"{source}: {key}")
        if key in PATHS:
            checked[key] = os.path.expanduser(checked[key])
    return checked


def to_yaml(cfg: Config) -> str:
    """The whole configuration as YAML, in the order of the dataclass; `load_config` reads it back."""
    plain = {key: _plain(value) for key, value in dataclasses.asdict(cfg).items()}
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)


def to_overrides(cfg: Config) -> dict[str, str]:
    """{key: text}, the whole configuration as it can be given on a command line."""
    return {key: "null" if value is None else str(_plain(value)) for key, value in dataclasses.asdict(cfg).items()}


def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


class Loader(yaml.SafeLoader):
    """YAML in which no key may stand twice: of two the last would win without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for n, key in enumerate(keys):
            if key.value in [other.value for other in keys[:n]]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str, ready: str):
    """The content of a YAML file, whose kind is `what`; `ready` is the folder of those that come with SCHNet."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} (the ready ones are in {ready}/)") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}: not valid YAML, line {error.problem_mark.line + 1}: {error.problem}") from None
    except yaml.YAMLError:
        raise UserError(f"{path}: not valid YAML") from None


def _read_config(path: Path) -> dict:
    values = read_yaml(path, "config file", "configs")
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: a config is a list of `key: value` lines")
    return values or {}


def _coerce(value, kind, where: str):
    """`value` as the field's type. PyYAML reads `6e-4` as a string and `off` as False: the first is a float here."""
    if isinstance(kind, types.UnionType):                  # float | None
        return None if value is None else _coerce(value, typing.get_args(kind)[0], where)
    if typing.get_origin(kind) is tuple:
        return _coerce_tuple(value, typing.get_args(kind), where)
    if kind is float and type(value) in (int, str):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind or kind is float and not math.isfinite(value):        # exact: True is no int
        raise UserError(f"{where} must be {_article(kind.__name__)}, not {value!r}")
    return value


def _coerce_tuple(value, kinds, where: str):
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where} must be a list, not {value!r}")
    if kinds[-1] is Ellipsis:
        return tuple(_coerce(v, kinds[0], f"{where}[{n}]") for n, v in enumerate(value))
    if len(value) != len(kinds):
        raise UserError(f"{where} must have {len(kinds)} values, not {len(value)}")
    return tuple(_coerce(v, kind, f"{where}[{n}]") for n, (v, kind) in enumerate(zip(value, kinds)))


def _article(kind: str) -> str:
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}[kind]


def _check(cfg: Config):
    """What single fields and their combinations must satisfy, said in words: nothing built later may fail for them."""
    def need(ok, message):
        if not ok:
            raise UserError(message)

    def one_of(key, allowed):
        need(getattr(cfg, key) in allowed, f"{key} must be one of {', '.join(allowed)}, not {getattr(cfg, key)!r}")

    one_of("dataset", DATASETS)
    one_of("backbone", ("sam", "clip"))
    one_of("precision", ("bf16", "fp16", "fp32"))
    one_of("ftm_residual", ("f", "f'"))
    for low, high, keys in RANGES:
        for key in keys.split():
            value = getattr(cfg, key)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            need(all(low <= number <= high for number in numbers),
                 f"{key} must be between {low:,} and {high:,}, not {value}")
    need(cfg.iters == 0 or cfg.iters > cfg.warmup_iters,
         f"iters ({cfg.iters}) must be more than warmup_iters ({cfg.warmup_iters})")
    for side in cfg.crop_size:
        need(side % 32 == 0, f"crop_size must be multiples of 32 (the adapter's pyramid), not {cfg.crop_size}")
    need(cfg.scale_range[0] <= cfg.scale_range[1], f"scale_range must rise, not {cfg.scale_range}")
    need(cfg.tta_scales, "tta_scales must name at least one scale")
    need(cfg.batch_size % cfg.accum_steps == 0,
         f"batch_size ({cfg.batch_size}) must be a multiple of accum_steps ({cfg.accum_steps})")
    need(cfg.batch_size >= 2 * cfg.accum_steps, f"batch_size ({cfg.batch_size}) must be at least 2 for each of "
         f"accum_steps ({cfg.accum_steps}): BatchNorm cannot be trained on one image")
    need((cfg.sam_depth or 4) % 4 == 0, f"sam_depth must be a multiple of 4 (four stages), not {cfg.sam_depth}")
    for dim, heads in (("sam_dim", "sam_heads"), ("clip_dim", "clip_heads"), ("text_dim", "text_heads")):
        width, count = getattr(cfg, dim), getattr(cfg, heads)
        need(not (width and count) or width % count == 0, f"{dim} ({width}) must be a multiple of {heads} ({count})")
    encoder = "sam_dim" if cfg.backbone == "sam" else "clip_dim"
    if width := getattr(cfg, encoder):                     # null: checked again when the weight file has told it
        deform = int(width * cfg.deform_ratio)
        need(deform and deform % cfg.deform_heads == 0, f"deform_ratio ({cfg.deform_ratio}) of {encoder} ({width}) must "
             f"be a multiple of deform_heads ({cfg.deform_heads}), it is {deform}")
        need(int(width * cfg.cffn_ratio), f"cffn_ratio ({cfg.cffn_ratio}) of {encoder} ({width}) must be at least 1")
    need(len(cfg.clip_taps) == 4 and sorted(set(cfg.clip_taps)) == list(cfg.clip_taps),
         f"clip_taps must be four rising block numbers, not {cfg.clip_taps}")
    need(cfg.backbone == "sam" or not cfg.srm, "srm needs backbone: sam (it adds CLIP's features to SAM's)")
    need("{class}" in cfg.prompt, f"prompt must contain {{class}}, it is {cfg.prompt!r}")
