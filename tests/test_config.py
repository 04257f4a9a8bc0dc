"""config.py: YAML and overrides give a checked dataclass; every mistake is one line that names the key."""

import dataclasses
from pathlib import Path

import pytest

import config
import datasets
import download
import evaluate
import predict
from config import Config, load_config, user_path
from engine import checkpoint
from errors import UserError
from synthetic import draw

CONFIGS = Path(__file__).parent.parent / "configs"
KEYS = {field.name for field in dataclasses.fields(Config)}
PATHS = {key for key, kind in config.TYPES.items() if kind == config.Place}


@pytest.mark.parametrize("path", sorted({*CONFIGS.rglob("*.yaml")} - {*CONFIGS.glob("maps/*")}), ids=lambda p: p.stem)
def test_the_shipped_configs(path):
    """Each loads, has its own run folder and survives a round trip; the paper's have its values (§4.2, §4.3)."""
    cfg = load_config(path)
    assert cfg.out.endswith(path.stem) and config.from_dict(dataclasses.asdict(cfg), "checkpoint") == cfg
    if iters := {"lip": 60_000, "ppp": 30_000, "cihp": 80_000}.get(path.stem):
        assert (cfg.iters, cfg.batch_size, cfg.crop_size) == (iters, 16, (480, 480))
        assert (cfg.lr, cfg.warmup_iters, cfg.warmup_ratio) == (6e-4, 1500, 1e-5)
        assert cfg.scale_range == (0.5, 2.0) and cfg.tta_scales == (0.75, 1.0, 1.25, 1.5)
        assert cfg.clip_taps == (3, 5, 7, 11) and cfg.freeze and cfg.srm and cfg.ftm


def test_the_rows_of_table_6_differ_in_switches_only():
    names = "ablation/clip", "ablation/sam", "ablation/sam_clip_srm", "lip"
    rows = [load_config(CONFIGS / f"{name}.yaml") for name in names]
    switches = [(row.backbone, row.srm, row.ftm) for row in rows]
    assert switches == [("clip", False, False), ("sam", False, False), ("sam", True, False), ("sam", True, True)]
    assert {dataclasses.replace(row, out="", backbone="sam", srm=True, ftm=True) for row in rows} == {
        dataclasses.replace(rows[-1], out="")}


@pytest.mark.parametrize("override, value", [
    ("lr=6e-4", 6e-4), ("weight_decay=0", 0.0),            # for PyYAML a string and an integer
    ("crop_size=320", (320, 320)), ("scale_range=1", (1.0, 1.0)), ("scale_range=0.5", (0.5, 0.5)),
    ("scale_range=[0.5, 2]", (0.5, 2.0)), ("sim_scale=null", None), ("sim_scale=1", 1.0), ("data_root=", ""),
    (" seed =3", 3)])
def test_values_are_converted_to_the_keys_type(override, value):
    found = getattr(load_config(None, [override]), override.partition("=")[0].strip())
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("override, words", [
    ("learning_rate=1", "unknown key 'learning_rate'"), ("ites=10", "'iters'"), ("lrr=1", "'lr'"), ("seed", "'seed'"),
    ("lr=[1", "'lr=[1'"),
    # types
    ("lr=fast", "lr 'fast'"), ("lr=.nan", "lr number 1e-12 nan"), ("sim_scale=inf", "sim_scale inf"),
    ("iters=1e3", "iters whole '1e3'"), ("srm=1", "srm true false 1"), ("batch_size=true", "batch_size whole True"),
    ("crop_size=[480]", "crop_size 2 [480]"), ("tta_scales=1.0", "tta_scales list 1.0"),
    ("tta_scales=[1, x]", "tta_scales[1] 'x'"), ("flip_pairs=[1, 2]", "flip_pairs[0] list 1"),
    # ranges and choices
    ("dataset=ade20k", "dataset lip, cihp, ppp 'ade20k'"), ("precision=int8", "precision bf16 'int8'"),
    ("batch_size=0", "batch_size 1 4,096 0"), ("betas=[0.9, 1]", "betas[1] 0 0.999999 1"),
    ("srm_sites=3", "srm_sites 4 5 3"), ("sim_scale=-1", "sim_scale 0 -1"),
    ("seed=2147483646", "seed 2,147,483,645 2147483646"),  # the next two seeds are used for validation and demo images
    # combinations
    ("iters=100", "iters (100) warmup_iters (1500)"), ("crop_size=481", "crop_size 32 481"),
    ("tta_scales=[]", "tta_scales"), ("scale_range=[2, 1]", "scale_range (2.0, 1.0)"),
    ("clip_taps=[3, 5, 7, 7]", "clip_taps four (3, 5, 7, 7)"),
    ("backbone=clip", "srm backbone"), ("prompt=a photo", "prompt {class} 'a photo'"),
    ("val_list=mine.txt", "val_list custom synthetic"), ("dataset=lip classes=[a,b]", "classes custom lip"),
])
def test_mistakes_are_named(override, words):
    """In one line that has the key, the limits and the value in this order."""
    with pytest.raises(UserError) as error:
        load_config(None, override.split(" ") if override.count("=") > 1 else [override])
    message, place = str(error.value), 0
    for word in words.split(" "):
        place = message.index(word, place) + len(word)
    assert "\n" not in message


def test_every_number_has_a_range():
    ranged = {key: value for key, value in (vars(Config()) | {"sim_scale": 1.0}).items()
              if type(value) in (int, float) or isinstance(value, tuple) and value}
    assert len(ranged) == 43
    for key, value in ranged.items():
        for beyond in (-1, 10 ** 30):
            with pytest.raises(UserError, match=rf"^a file: {key}[ \[].* between .* not "):
                config.from_dict({key: (beyond,) * len(value) if isinstance(value, tuple) else beyond}, "a file")
    assert config.RESUMABLE | config.OVERRIDABLE | {*config.PAIRED, *config.CUSTOM} <= KEYS


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("dataset: custom\nout: ~/runs\ndata_root: '~'\nprompt: ~ {class}\n")
    others = PATHS - {"out", "data_root"}
    cfg = load_config("~/my.yaml", [f"{key}=~/{key}" for key in others])
    assert (cfg.out, cfg.data_root, cfg.prompt) == (f"{tmp_path}/runs", str(tmp_path), "~ {class}")
    assert len(others) == 10 and all(getattr(cfg, key) == f"{tmp_path}/{key}" for key in others)
    assert load_config(None, ["out=runs/~x"]).out == "runs/~x" and user_path("~/x") == tmp_path / "x"
    home, found = tmp_path / "x", []
    monkeypatch.setattr(datasets, "check_data", lambda cfg, out: found.append(out))
    datasets.main(["--cfg=~/my.yaml", "--out=~/x"])
    monkeypatch.setattr("sys.argv", ["draw", "--out=~/x", "--count=0"])
    draw.main()
    assert found == [home] and home.is_dir() and download.parse(["--dir=~/x"]).dir == home
    assert predict.arguments(["photo", "--out=~/x"]).out == evaluate.arguments(["--out=~/x"]).out == home
    with pytest.raises(UserError, match=f"{home}: "):      # --run of three programs
        checkpoint.find("~/x")


@pytest.mark.parametrize("text, words", [
    (None, "no such config"), ("- a\n- b\n", "key: value"), ("lr: [1\n", "line 2"), (b"\xff\xfe\x00", "YAML"),
    ("lr: 1\nseed: 2\nlr: 3\n", "lr is given twice in \"<unicode string>\", line 3"), ("lrr: 1\n", "'lrr'")])
def test_unusable_files(tmp_path, text, words):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_config(file)
    assert words in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, overrides", [("#", []), ("out: ''", []), ("out: there", ["out="]), ("", ["out="])])
def test_out_defaults_to_the_name_of_the_config(tmp_path, text, overrides):
    """Also for an empty `out`, as in out=$UNSET."""
    (tmp_path / "mine.yaml").write_text(text)
    assert load_config(tmp_path / "mine.yaml", overrides) == Config(out="runs/mine")
