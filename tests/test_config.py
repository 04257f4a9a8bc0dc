"""config.py: YAML and overrides become one checked dataclass; every mistake is one line that names the key."""

from pathlib import Path

import pytest

from config import Config, load_config, to_yaml
from engine.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_repository_loads(path):
    cfg = load_config(path)
    assert cfg.out


def test_the_papers_numbers():
    """§4.2 and §4.3."""
    for name, iters in (("lip", 60_000), ("ppp", 30_000), ("cihp", 80_000)):
        cfg = load_config(ROOT / f"configs/{name}.yaml")
        assert (cfg.iters, cfg.batch_size, cfg.crop_size) == (iters, 16, (480, 480))
        assert (cfg.lr, cfg.warmup_iters, cfg.warmup_ratio) == (6e-4, 1500, 1e-5)
        assert cfg.scale_range == (0.5, 2.0) and cfg.tta_scales == (0.75, 1.0, 1.25, 1.5)
        assert cfg.clip_taps == (3, 5, 7, 11) and cfg.freeze and cfg.srm and cfg.ftm


def test_rows_of_table_6_are_switches():
    rows = {name: load_config(ROOT / f"configs/ablation/{name}.yaml") for name in ("clip", "sam", "sam_clip_srm", "full")}
    assert [(r.backbone, r.srm, r.ftm) for r in rows.values()] == [
        ("clip", False, False), ("sam", False, False), ("sam", True, False), ("sam", True, True)]
    assert len({r.out for r in rows.values()}) == 4


def test_round_trip(tmp_path):
    cfg = load_config(ROOT / "configs/demo.yaml", ["lr=3e-4", "sim_scale=1.0", "tta_scales=[1]"])
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(cfg))
    assert load_config(file) == cfg


def test_what_yaml_makes_of_numbers():
    cfg = load_config(None, ["lr=6e-4", "weight_decay=0", "crop_size=320", "sim_scale=null"])
    assert cfg.lr == 6e-4 and isinstance(cfg.weight_decay, float)        # PyYAML: the string '6e-4', the integer 0
    assert cfg.crop_size == (320, 320) and cfg.sim_scale is None


@pytest.mark.parametrize("override, words", [
    ("learning_rate=1", "unknown key 'learning_rate'"),
    ("ites=10", "did you mean 'iters'?"),
    ("lr=fast", "lr must be a number, not 'fast'"),
    ("iters=1e3", "iters must be a whole number"),
    ("srm=1", "srm must be true or false"),
    ("batch_size=true", "batch_size must be a whole number"),
    ("crop_size=[480]", "crop_size must have 2 values"),
    ("crop_size=481", "multiples of 32"),
    ("tta_scales=1.0", "tta_scales must be a list"),
    ("tta_scales=[1, x]", "tta_scales[1] must be a number"),
    ("dataset=ade20k", "dataset must be one of lip, cihp, ppp"),
    ("precision=int8", "precision must be one of"),
    ("iters=100", "iters (100) must be more than warmup_iters (1500)"),
    ("batch_size=0", "batch_size must be at least 1"),
    ("drop_path=1.5", "drop_path must be between 0 and 1"),
    ("lr=-1", "lr must be positive"),
    ("prompt=a photo", "must contain {class}"),
    ("clip_taps=[3, 5, 7, 7]", "clip_taps must be four rising block numbers"),
    ("backbone=clip", "srm needs backbone: sam"),
    ("accum_steps=3", "multiple of accum_steps"),
    ("seed", "not of the form key=value"),
    ("lr=[1", "not valid YAML"),
])
def test_mistakes_are_named(override, words):
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, words", [
    (None, "no such config file"), ("- a\n- b\n", "`key: value` lines"), ("lr: [1\n", "not valid YAML"), (b"\xff\xfe\x00", "cannot be read"),
])
def test_unusable_files(tmp_path, text, words):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words) as error:
        load_config(file)
    assert str(file) in str(error.value)


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == Config(out="runs/empty")
