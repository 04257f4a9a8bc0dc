"""`init`: a new run starts from a trained network, with other classes or sizes."""

import dataclasses
import shutil

import pytest
import torch
import train
from tiny import TINY, Killed, assert_same_run, before_step, fails, throw

from config import Config
from engine import checkpoint
from errors import UserError
from files.labels import LabelSet
from model import build_model

CFG = Config(**TINY)
OLD, NEW = ("ground", "left", "right"), ("right", "hat", "ground", "shoe")


def build(seed: int, classes: tuple[str, ...], **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build_model(dataclasses.replace(CFG, **changes), classes)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))       # zeros would hide missing copies
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """The folder of a run with the classes OLD."""
    folder, model = tmp_path_factory.mktemp("trained"), build(0, OLD)
    labels = LabelSet("custom", OLD, ((0, 0, 0), (255, 0, 0), (0, 0, 255)), ())
    checkpoint.write(folder / "last.pt", checkpoint.pack(model, labels, {}, {}))
    return str(folder)


def test_every_weight_is_copied_and_class_rows_by_name(trained):
    model, untouched = (build(1, NEW, crop_size=(64, 96)) for _ in range(2))
    line = checkpoint.init_from(model, trained, NEW)
    assert f"{trained}/last.pt" in line and "2 of 4 classes" in line and line.endswith("hat, shoe") and "\n" not in line
    old, new, own = torch.load(f"{trained}/last.pt")["model"], model.state_dict(), untouched.state_dict()
    by_class = {"head.conv_seg.weight", "head.conv_seg.bias", "aux.conv_seg.weight", "aux.conv_seg.bias",
                "srm.expand.weight"}
    assert {name for name in new if name != "f_txt" and new[name].shape != old[name].shape} == by_class
    for name, tensor in new.items():
        if name in ("f_txt", "sim_scale"):
            assert torch.equal(tensor, own[name])
        elif name in by_class:
            rows = [t.movedim(int(name == "srm.expand.weight"), 0) for t in (tensor, old[name], own[name])]
            assert torch.equal(rows[0], torch.stack([rows[1][2], rows[2][1], rows[1][0], rows[2][3]])), name
        else:
            assert torch.equal(tensor, old[name]), name


@pytest.mark.parametrize("changes, words", [
    ({"ftm_tokens": 5}, "ftm.tokens"), ({"srm": False}, "clip."), ({"aux_weight": 0.0}, "aux."),
    ({"sam": "tests"}, "sam.")])
def test_another_architecture_is_refused_naming_the_first_tensor(trained, changes, words):
    with pytest.raises(UserError, match=f"^init: {trained}/last.pt .*: {words}"):
        checkpoint.init_from(build(1, NEW, **changes), trained, NEW)


def test_resuming_does_not_need_the_initial_run(config, trained, tmp_path, capsys):
    old = shutil.copytree(trained, tmp_path / "old")
    argv = ["--cfg", config, f"init={old}", "freeze=false"]
    train.main([*argv, f"out={tmp_path / 'uninterrupted'}"])
    printed = capsys.readouterr().out
    assert printed.count("init from ") == 1 and f"{old / 'last.pt'}: all weights; 3 of 3 classes\n" in printed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Learner, "gradient", before_step(2, lambda: throw(Killed())))
        train.main([*argv, f"out={tmp_path / 'run'}"])
    shutil.rmtree(old)
    train.main([*argv, f"out={tmp_path / 'run'}", "--resume"])
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
    assert "init from " not in capsys.readouterr().out.partition("resuming from")[2]
    assert f"{old}: " in fails(capsys, *argv, f"out={tmp_path / 'other'}")
