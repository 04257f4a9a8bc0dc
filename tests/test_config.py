"""config.py: YAML and overrides become one checked dataclass; every mistake is one line that names the key."""

from pathlib import Path

import pytest

import datasets
import download
import evaluate
import predict
from config import PATHS, RANGES, SIZES, Config, load_config, to_yaml, user_path
from engine import checkpoint
from errors import UserError
from synthetic import draw

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/ablation/*.yaml")]), ids=lambda p: p.stem)
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
    ("batch_size=0", "batch_size must be between 1 and 4,096, not 0"),
    ("batch_size=1", "batch_size (1) must be at least 2 for each of accum_steps (1): BatchNorm"),
    ("accum_steps=16", "batch_size (16) must be at least 2 for each of accum_steps (16): BatchNorm"),
    ("drop_path=1.5", "drop_path must be between 0 and 0.999, not 1.5"),
    ("lr=-1", "lr must be between 1e-12 and 1,000,000, not -1.0"),
    ("lr=.nan", "lr must be a number, not nan"),
    ("sim_scale=inf", "sim_scale must be a number, not inf"),
    (f"lr=1{400 * '0'}", "lr must be a number, not 1000"),
    ("betas=[0.9, 1]", "betas must be between 0 and 0.999999, not (0.9, 1.0)"),
    ("scale_range=[2, 1]", "scale_range must rise, not (2.0, 1.0)"),
    ("scale_range=[0, 1]", "scale_range must be between 0.01 and 16, not (0.0, 1.0)"),
    ("tta_scales=[]", "tta_scales must name at least one scale"),
    ("tta_scales=[1, 0]", "tta_scales must be between 0.01 and 16, not (1.0, 0.0)"),
    ("srm_sites=3", "srm_sites must be between 4 and 5, not 3"),
    ("crop_size=0", "crop_size must be between 32 and 16,384, not (0, 0)"),
    ("clip_taps=[-1, 3, 5, 7]", "clip_taps must be between 0 and 999, not (-1, 3, 5, 7)"),
    ("seed=2147483647", "seed must be between 0 and 2,147,483,645"),     # the validation figures' own
    ("sam_dim=1024 deform_heads=5", "(0.5) of sam_dim (1024) must be a multiple of deform_heads (5), it is 512"),
    ("sam_dim=16 deform_ratio=0.05", "(0.05) of sam_dim (16) must be a multiple of deform_heads (16), it is 0"),
    ("sam_dim=16 sam_heads=4 deform_heads=4 cffn_ratio=0.05", "cffn_ratio (0.05) of sam_dim (16) must be at least 1"),
    ("backbone=clip srm=false ftm=false clip_dim=100 clip_heads=4", "deform_ratio (0.5) of clip_dim (100) must be a"),
    ("prompt=a photo", "must contain {class}"),
    ("clip_taps=[3, 5, 7, 7]", "clip_taps must be four rising block numbers"),
    ("backbone=clip", "srm needs backbone: sam"),
    ("accum_steps=3", "multiple of accum_steps"),
    ("seed", "not of the form key=value"),
    ("lrr=1", "override 'lrr=1': unknown key 'lrr', did you mean 'lr'?"),
    ("lr=fast", "override 'lr=fast': lr must be a number"),
    ("betas=0.9", "betas must be a list, not 0.9"),                     # not twice the same
    ("flip_pairs=[1, 2]", "flip_pairs[0] must be a list, not 1"),       # brackets forgotten
    ("val_list=mine.txt", "val_list is for dataset: custom, synthetic has its own"),
    ("dataset=lip classes=[a,b]", "classes is for dataset: custom, lip has its own"),
    ("lr=[1", "not valid YAML"),
])
def test_mistakes_are_named(override, words):
    with pytest.raises(UserError) as error:
        load_config(None, override.split(" ") if override.count("=") > 1 else [override])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_every_number_has_a_range():
    def numbers(value) -> bool:
        return type(value) in (int, float) or isinstance(value, tuple) and all(map(numbers, value)) and value != ()

    ranged = [key for _, _, keys in RANGES for key in keys.split()]
    defaults = vars(Config())
    assert sorted(ranged) == sorted({key for key, value in defaults.items() if numbers(value)} | {*SIZES, "sim_scale"})


def test_a_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    """In every key that is a path, in a file as on the command line, and nowhere else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("dataset: custom\nout: ~/runs\ndata_root: '~'\nprompt: ~ {class}\n")
    cfg = load_config("~/my.yaml", [f"{key}=~/{key}" for key in PATHS if key not in ("out", "data_root")])
    assert (cfg.out, cfg.data_root, cfg.prompt) == (f"{tmp_path}/runs", str(tmp_path), "~ {class}")
    assert all(getattr(cfg, key) == f"{tmp_path}/{key}" for key in PATHS if key not in ("out", "data_root"))
    assert load_config(None, ["out=runs/~x"]).out == "runs/~x" and user_path("~/x") == tmp_path / "x"


def test_every_program_knows_the_home_folder(tmp_path, monkeypatch):
    """What its options hold when a shell has left the ~ to it, as most do in `--out=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    home, found = tmp_path / "x", {}
    monkeypatch.setattr(datasets, "check", lambda cfg, out: found.setdefault("datasets", out) and 0)
    datasets.main(["--out=~/x"])
    monkeypatch.setattr("sys.argv", ["draw", "--out=~/x", "--count=0"])
    draw.main()
    download_args, predict_args = download.parse(["--dir=~/x", "--from=~/x"]), predict.arguments(["~/x", "--out=~/x"])
    assert (found["datasets"], home.is_dir(), download_args.dir, download_args.source) == (home, True, home, home)
    assert (predict_args.inputs, predict_args.out, evaluate.arguments(["--out=~/x"]).out) == ([str(home)], home, home)
    with pytest.raises(UserError, match=f"{home}: holds no checkpoint"):                 # --run of three programs
        checkpoint.find("~/x")


@pytest.mark.parametrize("text, words", [
    (None, "no such config file"), ("- a\n- b\n", "`key: value` lines"), ("lr: [1\n", "not valid YAML, line"),
    (b"\xff\xfe\x00", "cannot be read"), ("lr: 1\nseed: 2\nlr: 3\n", "not valid YAML, line 3: lr stands there twice"),
    ("lrr: 1\n", "x.yaml: unknown key 'lrr'"),
])
def test_unusable_files(tmp_path, text, words):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words) as error:
        load_config(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text, overrides", [("", []), ("out: ''\n", []), ("out: there\n", ["out="]), ("", ["out="])])
def test_a_run_has_a_folder_of_its_own(tmp_path, text, overrides):
    """Also where `out` is empty, as out=$UNSET is."""
    (tmp_path / "mine.yaml").write_text(text)
    assert load_config(tmp_path / "mine.yaml", overrides).out == "runs/mine"


@pytest.mark.parametrize("given, meant", [("1", (1.0, 1.0)), ("0.5", (0.5, 0.5)), ("[0.5, 2]", (0.5, 2.0))])
def test_one_scale_is_a_range(given, meant):
    assert load_config(None, [f"scale_range={given}"]).scale_range == meant


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == Config(out="runs/empty")
