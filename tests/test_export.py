"""export.py: ONNX against PyTorch, metadata, the example, and no file if something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SMALL

import export
import inference
from config import Config
from engine import checkpoint
from errors import UserError
from files.labels import LABEL_SETS
from model import build_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZE = (64, 96)                                            # tokens 4 x 6: windows of 3 are cut, tables resampled
CFG = Config(**SMALL | {"crop_size": SIZE, "base_size": 96, "precision": "fp32"})
LIP = LABEL_SETS["lip"]
EXAMPLE = Path(export.__file__).parent / "examples/onnx_predict.py"


def save_run(model, folder: Path) -> str:
    folder.mkdir(parents=True)
    checkpoint.write(folder / checkpoint.BEST, checkpoint.pack(model, LIP, {}, {}))
    return str(folder)


def session(path: Path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def parsed(path: Path, image: np.ndarray) -> np.ndarray:
    return session(path).run(None, {"image": image[None]})[0][0].argmax(0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """A small random network in which every part has an effect, its file with large weights."""
    if torch.__version__ < export.OLDEST_TORCH:
        pytest.skip("this torch cannot export the network")
    torch.manual_seed(0)
    model = build_model(CFG, LIP.classes).eval()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():                                # what is initialised to zero would hide mistakes
                p.normal_(std=0.1)
        model.head.conv_seg.weight.normal_(std=2.0)
    folder = tmp_path_factory.mktemp("exported")
    run, translate, programs = save_run(model, folder / "run"), export._translate, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "ONE_FILE_BYTES", 1000)
        patch.setattr(export, "_translate", lambda *args: (programs.append(translate(*args)), programs[0])[1])
        export.main(["--run", run, "--size", "64x96"])
    return SimpleNamespace(model=model, run=Path(run), program=programs[0],
                           file=folder / "run/model.onnx")


@pytest.fixture
def translated(exported, monkeypatch):
    """Further files of the same network without half a minute of translation each."""
    monkeypatch.setattr(export, "_translate", lambda *_: exported.program)


def images(count: int, height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(count).integers(0, 256, (count, 5, 6, 3), np.uint8)
    return np.stack([cv2.resize(x, (width, height), interpolation=cv2.INTER_CUBIC) for x in small])


@pytest.mark.parametrize("count", [1, 3])
def test_probabilities_are_pytorchs(exported, count: int):
    x = images(count, *SIZE)
    with torch.no_grad():
        expected = exported.model(torch.from_numpy(x).permute(0, 3, 1, 2) / 255).softmax(1).numpy()
    run = session(exported.file).run
    found, other = run(None, {"image": x})[0], run(None, {"image": x[:, ::-1].copy()})[0]
    assert found.shape == (count, 20, *SIZE) and found.dtype == np.float32
    assert len(np.unique(expected.argmax(1))) > 3          # not one class everywhere
    assert np.abs(found - expected).max() <= 1e-4 and (found.argmax(1) == expected.argmax(1)).mean() >= 0.999
    assert np.abs(other - found).max() > 0.05              # the comparison notices a wrong input


def test_files_are_valid_and_describe_themselves(exported):
    onnx.checker.check_model(str(exported.file), full_check=True)
    assert onnx.load(exported.file).ir_version == 8        # onnxruntime 1.17 reads up to 9; opset 18 came with 8
    assert sorted(os.listdir(exported.run)) == ["best.pt", "model.onnx", "model.onnx.data"]
    metadata = session(exported.file).get_modelmeta().custom_metadata_map
    about = {key: json.loads(text) for key, text in metadata.items()}
    assert tuple(about["classes"]) == LIP.classes and tuple(map(tuple, about["palette"])) == LIP.palette
    assert about["flip_pairs"] == [[14, 15], [16, 17], [18, 19]]
    assert (about["height"], about["width"], about["base_size"]) == (64, 96, 96)
    given = session(exported.file).get_inputs()[0]
    assert given.shape[1:] == [64, 96, 3] and given.type == "tensor(uint8)"


@pytest.mark.parametrize("height, width, share", [(64, 96, 0.999), (48, 96, 0.999), (100, 150, 0.9)])
def test_example_gives_the_labels_of_predict(exported, tmp_path: Path, height: int, width: int, share: float):
    """A photo of the network's own size is not resized: the same labels, by PyTorch and by the example alone."""
    image = images(1, height, width)[0]
    Image.fromarray(image).save(tmp_path / "photo.png")
    command = [sys.executable, EXAMPLE, exported.file, tmp_path / "photo.png", tmp_path / "labels.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    label = np.asarray(Image.open(tmp_path / "labels.png"))
    assert label.shape == (height, width)
    assert (label == inference.predict_labels(exported.model, [image])[0]).mean() >= share


def test_small_weights_are_in_the_file_and_a_wrong_file_is_not_written(exported, translated, tmp_path: Path):
    export.main(["--run", str(exported.run), "--size", "64x96", "--out", str(tmp_path / "one/small.onnx")])
    assert os.listdir(tmp_path / "one") == ["small.onnx"]
    image = images(1, *SIZE)[0]
    assert (parsed(tmp_path / "one/small.onnx", image) == parsed(exported.file, image)).all()
    content = checkpoint.read(exported.run / checkpoint.BEST)
    content["model"]["head.conv_seg.bias"] += torch.linspace(0, 5, 20)   # the translation is now of other weights
    (tmp_path / "other").mkdir()
    checkpoint.write(tmp_path / "other" / checkpoint.BEST, content)
    with pytest.raises(UserError, match="two/model.onnx was not written"):
        export.main(["--run", str(tmp_path / "other"), "--size", "64x96", "--out", str(tmp_path / "two/model.onnx")])
    assert os.listdir(tmp_path / "two") == []


def test_mistakes_are_one_line_before_the_work(monkeypatch, capsys):
    for argv, words in ((["--size", "480"], "multiples of 32"), (["--size", "100x100"], "multiples of 32"),
                        (["--size", "0x32"], "multiples of 32"), (["--out", "."], "is a folder")):
        with pytest.raises(SystemExit, match="2"):
            export.main(argv)
        assert words in capsys.readouterr().err
    assert export.default_size(CFG) == (96, 96) and export.default_size(Config(base_size=500)) == (512, 512)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnxruntime is missing: pip install"):
        export.main([])
    monkeypatch.setattr(export, "OLDEST_TORCH", (99, 1))
    with pytest.raises(UserError, match="torch>=99.1"):
        export.main([])
