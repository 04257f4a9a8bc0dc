"""export.py: ONNX against PyTorch, metadata, the example, and nothing under the final name when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import export
import inference
from config import Config
from datasets import LABEL_SETS
from engine import checkpoint
from model import build_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CFG = Config(
    dataset="synthetic", crop_size=(64, 96), base_size=96, sam_weights="", clip_weights="", vocab="", sam_dim=32,
    sam_depth=4, sam_heads=2, sam_window=3, sam_grid=4, clip_dim=32, clip_depth=4, clip_heads=2, clip_grid=3,
    clip_taps=(0, 1, 2, 3), clip_embed=16, text_dim=16, text_depth=1, text_heads=2, ftm_tokens=8, prior_dim=8,
    deform_heads=2, head_dim=16, aux_weight=0.0, precision="fp32")
SIZE = (64, 96)                                            # tokens 4 x 6: windows of 3 are cut, tables resampled


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """(run folder, file, PyTorch network, translation) of a small random network in which every part does something."""
    if torch.__version__ < export.OLDEST_TORCH:
        pytest.skip("this torch's exporter cannot translate the network")
    torch.manual_seed(0)
    labels = LABEL_SETS["lip"]
    model = build_model(CFG, labels.classes).eval()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():                                # what starts at zero, so that it would pass unseen
                p.normal_(std=0.1)
        model.head.conv_seg.weight.normal_(std=2.0)
    run = tmp_path_factory.mktemp("runs") / "small"
    run.mkdir()
    checkpoint.write(run / checkpoint.BEST, checkpoint.pack(model, labels, {}, {}))
    kept = []
    translate = export._translate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_translate", lambda *args: (kept.append(translate(*args)), kept[0])[1])
        export.main(["--run", str(run), "--size", "64x96"])
    return run, run / "model.onnx", model, kept[0]


def images(count: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    small = rng.integers(0, 256, (count, 5, 6, 3), np.uint8)
    return np.stack([cv2.resize(x, (width, height), interpolation=cv2.INTER_CUBIC) for x in small])


@pytest.mark.parametrize("count", [1, 3])
def test_probabilities_are_pytorchs(exported, count: int):
    _, path, model, _ = exported
    x = images(count, *SIZE)
    with torch.no_grad():
        expected = model(torch.from_numpy(x).permute(0, 3, 1, 2) / 255).softmax(1).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": x})[0]
    assert found.shape == (count, 20, *SIZE) and found.dtype == np.float32
    assert len(np.unique(expected.argmax(1))) > 3          # not one class everywhere
    assert np.abs(found - expected).max() <= 1e-4 and (found.argmax(1) == expected.argmax(1)).mean() >= 0.999
    other = session.run(None, {"image": x[:, ::-1].copy()})[0]
    assert np.abs(other - found).max() > 0.05              # the comparison sees a wrong input


def test_file_is_valid_and_says_what_it_is(exported):
    run, path, _, _ = exported
    onnx.checker.check_model(str(path), full_check=True)
    assert sorted(p.name for p in run.iterdir()) == ["best.pt", "model.onnx"]      # one file, no litter
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    labels = LABEL_SETS["lip"]
    assert tuple(about["classes"]) == labels.classes and tuple(map(tuple, about["palette"])) == labels.palette
    assert about["flip_pairs"] == [[14, 15], [16, 17], [18, 19]]
    assert (about["height"], about["width"], about["base_size"]) == (64, 96, 96)
    assert session.get_inputs()[0].shape[1:] == [64, 96, 3] and session.get_inputs()[0].type == "tensor(uint8)"


def test_example_gives_the_labels_of_predict(exported, tmp_path: Path):
    """On a photo of the network's own size nothing is resized: the same labels, by PyTorch and by the example alone."""
    _, path, model, _ = exported
    script = Path(export.__file__).parent / "examples/onnx_predict.py"
    for height, width, share in ((64, 96, 0.999), (48, 96, 0.999), (100, 150, 0.9)):
        image = images(1, height, width)[0]
        Image.fromarray(image).save(tmp_path / "photo.png")
        command = [sys.executable, script, path, tmp_path / "photo.png", tmp_path / "labels.png"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        label = np.asarray(Image.open(tmp_path / "labels.png"))
        assert label.shape == (height, width)
        assert (label == inference.predict_labels(model, [image])[0]).mean() >= share


def test_a_wrong_file_never_gets_the_name(exported, tmp_path: Path, monkeypatch):
    run, _, model, program = exported
    monkeypatch.setattr(export, "_translate", lambda *_: program)
    target = tmp_path / "out" / "model.onnx"
    with torch.no_grad():                                  # the translation is now of other weights
        model.head.conv_seg.bias.add_(torch.linspace(0, 5, 20))
    try:
        with pytest.raises(export.UserError, match="was not written"):
            export.export(model, LABEL_SETS["lip"], run / "best.pt", target, SIZE, 18)
    finally:
        with torch.no_grad():
            model.head.conv_seg.bias.sub_(torch.linspace(0, 5, 20))
    assert os.listdir(target.parent) == []


def test_large_weights_lie_beside_the_file(exported, tmp_path: Path, monkeypatch):
    run, _, model, program = exported
    monkeypatch.setattr(export, "_translate", lambda *_: program)
    monkeypatch.setattr(export, "ONE_FILE_BYTES", 1000)
    export.export(model, LABEL_SETS["lip"], run / "best.pt", tmp_path / "big.onnx", SIZE, 18)
    assert sorted(os.listdir(tmp_path)) == ["big.onnx", "big.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "big.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": images(1, *SIZE)})[0].shape == (1, 20, *SIZE)


def test_missing_packages_and_wrong_sizes_are_one_line(exported, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(export.UserError, match="onnxruntime is missing: pip install onnx onnxruntime onnxscript"):
            export.main(["--run", str(exported[0])])
    for size in ("480", "100x100", "0x32", "axb"):
        with pytest.raises(SystemExit):
            export.main(["--size", size])
        assert "multiples of 32" in capsys.readouterr().err
    assert export.default_size(CFG) == (96, 96) and export.default_size(Config(base_size=500)) == (512, 512)


def test_a_torch_that_cannot_export_is_one_line(monkeypatch):
    monkeypatch.setattr(export, "OLDEST_TORCH", (99, 1))
    with pytest.raises(export.UserError, match='cannot export .* pip install "torch>=99.1"'):
        export.main([])


def test_the_file_asks_for_no_newer_runtime_than_it_needs(exported):
    """onnxruntime 1.17 reads IR versions up to 9; opset 18 came with 8."""
    assert onnx.load(exported[1]).ir_version == 8


@pytest.mark.parametrize("argv, words", [
    (["--opset", "17"], "between 18 and 23"), (["--opset", "40"], "between 18 and 23"), (["--out", "."], "is a folder")])
def test_mistakes_are_said_before_the_work(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        export.main(argv)
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.fixture
def translated(exported, monkeypatch):
    """Half a minute less for each further file of the same network."""
    monkeypatch.setattr(export, "_translate", lambda *_: exported[3])


def test_int8_keeps_the_labels_and_what_the_file_says(exported, translated, tmp_path: Path, capsys):
    run, path, model, _ = exported
    export.main(["--run", str(run), "--out", str(tmp_path / "m.onnx"), "--size", "64x96", "--int8"])
    said = capsys.readouterr().out.splitlines()[-1]
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m_int8.onnx"]
    small = onnxruntime.InferenceSession(tmp_path / "m_int8.onnx", providers=["CPUExecutionProvider"])
    about, before = (onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
                     for file in (tmp_path / "m_int8.onnx", path))
    assert before.items() <= about.items()                 # also of what training wrote into the fp32 file
    weights = {x.name: x.data_type for x in onnx.load(tmp_path / "m_int8.onnx").graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for kind in weights.values()) > 50
    image = export.draw(1, 0, SIZE)[0][None]
    with torch.no_grad():
        expected = model(torch.from_numpy(image).permute(0, 3, 1, 2) / 255).argmax(1).numpy()
    share = (small.run(None, {"image": image})[0].argmax(1) == expected).mean()
    assert 0.97 < share < 1 and str(tmp_path / "m_int8.onnx") in said and "MiB (fp32: " in said
    photo, labels = tmp_path / "photo.png", tmp_path / "labels.png"
    Image.fromarray(image[0]).save(photo)
    script = Path(export.__file__).parent / "examples/onnx_predict.py"
    done = subprocess.run([sys.executable, script, tmp_path / "m_int8.onnx", photo, labels], capture_output=True, text=True)
    assert done.returncode == 0 and (np.asarray(Image.open(labels)) == expected[0]).mean() > 0.97


def test_int8_that_loses_labels_is_not_written(exported, translated, tmp_path: Path, capsys):
    run = exported[0]
    with pytest.raises(export.UserError, match=r"m_int8.onnx was not written: 9\d.\d\d% .* --min-agreement wants 100.00%"):
        export.main(["--run", str(run), "--out", str(tmp_path / "m.onnx"), "--size", "64x96", "--int8", "--min-agreement", "1"])
    assert os.listdir(tmp_path) == ["m.onnx"]
    for wrong in ("0", "1.5", "-1"):
        with pytest.raises(SystemExit):
            export.main(["--int8", "--min-agreement", wrong])
        assert "share of pixels" in capsys.readouterr().err


def test_int8_of_large_weights_lies_in_two_files_too(exported, translated, tmp_path: Path, monkeypatch):
    run = exported[0]
    monkeypatch.setattr(export, "ONE_FILE_BYTES", 1000)
    export.main(["--run", str(run), "--out", str(tmp_path / "m.onnx"), "--size", "64x96", "--int8", "--min-agreement", "0.5"])
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data", "m_int8.onnx", "m_int8.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "m_int8.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": images(1, *SIZE)})[0].shape == (1, 20, *SIZE)
