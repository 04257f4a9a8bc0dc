"""classmap.py, configs/maps: the ready maps against their sources' numbering, sums against renamed labels, faults."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import classmap
import inference
from config import Config
from datasets import LABEL_SETS
from errors import UserError

MAPS = Path(__file__).parents[1] / "configs" / "maps"
LIP, CIHP = LABEL_SETS["lip"], LABEL_SETS["cihp"]

# The numberings as their sources print them (see the files): target label: names there.
ATR = ["Background", "Hat", "Hair", "Sunglasses", "Upper-clothes", "Skirt", "Pants", "Dress", "Belt", "Left-shoe",
       "Right-shoe", "Face", "Left-leg", "Right-leg", "Left-arm", "Right-arm", "Bag", "Scarf"]
ACGPN = {0: "Background", 1: "Hair", 4: "Upclothes", 5: "Left-shoe", 6: "Right-shoe", 7: "Noise", 8: "Pants",
         9: "Left-leg", 10: "Right-leg", 11: "Left-arm", 12: "Face", 13: "Right-arm"}
# ... and {target label: labels of the 20}
FROM_LIP_TO_ACGPN = {0: [0], 1: [1, 2], 2: [], 3: [], 4: [5, 6, 7], 5: [18], 6: [19], 7: [3, 8, 10, 11], 8: [9, 12],
                     9: [16], 10: [17], 11: [14], 12: [4, 13], 13: [15]}
VITON_HD = {0: ("background", [0, 10]), 1: ("hair", [1, 2]), 2: ("face", [4, 13]), 3: ("upper", [5, 6, 7]),
            4: ("bottom", [9, 12]), 5: ("left_arm", [14]), 6: ("right_arm", [15]), 7: ("left_leg", [16]),
            8: ("right_leg", [17]), 9: ("left_shoe", [18]), 10: ("right_shoe", [19]), 11: ("socks", [8]),
            12: ("noise", [3, 11])}


def sources(merge: classmap.Merge) -> dict[int, list[int]]:
    return {target: sorted(labels) for target, labels in enumerate(merge)}


def voc_colours(count: int) -> list[tuple[int, int, int]]:
    """The colours of PASCAL VOC, which SCHP's extractor paints with: three bits of the label at a time."""
    return [tuple(sum(((label >> (3 * n + c)) & 1) << (7 - n) for n in range(8)) for c in range(3))
            for label in range(count)]


@pytest.mark.parametrize("labels", (LIP, CIHP), ids=("lip", "cihp"))
def test_every_ready_map_serves_lip_and_cihp(labels):
    assert sorted(path.name for path in MAPS.iterdir()) == ["atr.yaml", "coarse.yaml", "tryon.yaml", "viton_hd.yaml"]
    for path in MAPS.iterdir():
        target, merge = classmap.load(path, labels)
        assert sorted(label for found in merge for label in found) == list(range(20))
        assert len(merge) == len(target.classes)


@pytest.mark.parametrize("labels", (LIP, CIHP), ids=("lip", "cihp"))
def test_atr_has_the_numbers_of_its_models(labels):
    target, merge = classmap.load(MAPS / "atr.yaml", labels)
    assert list(target.classes) == ATR and list(target.palette) == voc_colours(18)
    for label, name in enumerate(ATR):                     # a class of the same name goes to that number
        if name in labels.classes:
            assert labels.classes.index(name) in merge[label], name
    others = {labels.classes[k]: ATR[t] for t, found in enumerate(merge) for k in found if labels.classes[k] not in ATR}
    tenth = {"Jumpsuits": "Dress"} if labels is LIP else {"Torso-skin": "Face"}
    assert others == {"Glove": "Upper-clothes", "Coat": "Upper-clothes", "Socks": "Pants", **tenth}
    assert merge[ATR.index("Belt")] == merge[ATR.index("Bag")] == ()


@pytest.mark.parametrize("labels", (LIP, CIHP), ids=("lip", "cihp"))
def test_tryon_is_the_published_table(labels):
    target, merge = classmap.load(MAPS / "tryon.yaml", labels)
    assert sources(merge) == FROM_LIP_TO_ACGPN and len(target.classes) == 14
    assert {label: name for label, name in enumerate(target.classes) if label not in (2, 3)} == ACGPN
    assert list(target.palette) == voc_colours(14)


def test_viton_hd_is_the_published_table():
    target, merge = classmap.load(MAPS / "viton_hd.yaml", CIHP)
    assert {n: (target.classes[n], found) for n, found in sources(merge).items()} == VITON_HD
    target, merge = classmap.load(MAPS / "viton_hd.yaml", LIP)           # whose 10 is no neck but Jumpsuits
    assert {n: (target.classes[n], found) for n, found in sources(merge).items()} == VITON_HD | {
        0: ("background", [0]), 3: ("upper", [5, 6, 7, 10])}


@pytest.mark.parametrize("labels", (LIP, CIHP), ids=("lip", "cihp"))
def test_coarse_has_eight_classes(labels):
    target, merge = classmap.load(MAPS / "coarse.yaml", labels)
    assert target.classes == ("background", "hair", "face", "skin", "upper", "lower", "shoes", "other")
    names = {target.classes[t]: {labels.classes[k] for k in found} for t, found in enumerate(merge)}
    assert names["shoes"] == {"Left-shoe", "Right-shoe"} and names["hair"] == {"Hair"}
    assert names["lower"] == {"Pants", "Skirt"} and names["face"] == {"Face", "Sunglasses"}


# ---- probabilities are added

class Fixed(torch.nn.Module):
    """A network with the same logits everywhere."""

    def __init__(self, probabilities: list[float]):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())
        self.cfg = Config(crop_size=(32, 32), base_size=32, precision="fp32")

    def forward(self, image):
        return self.logits[:, None, None].expand(len(image), -1, *image.shape[-2:])


def test_the_sum_is_right_where_renamed_labels_are_wrong():
    """40 % skirt, 35 % upper clothes, 25 % coat: most likely an upper garment, but the likeliest class is none."""
    model, image = Fixed([0.4, 0.35, 0.25]), np.zeros((20, 30, 3), np.uint8)
    merge = ((), (1, 2), (0,))
    plain = inference.predict_labels(model, [image])[0]
    renamed = np.array([2, 1, 1])[plain]
    assert (renamed == 2).all()
    assert (inference.predict_labels(model, [image], merge=merge)[0] == 1).all()
    summed = inference.predict(model, image, merge=merge)
    expected = torch.tensor([0, 0.6, 0.4])[:, None, None].expand(3, 20, 30)
    torch.testing.assert_close(summed, expected)


def test_sums_are_those_of_a_loop_over_classes_and_pixels(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 5, 7, generator=generator) * 2
    monkeypatch.setattr(inference, "CPU_STRIP", 4 * 20 * 11 * 3)         # strips of three rows
    for path in MAPS.iterdir():
        _, merge = classmap.load(path, LIP)
        plain = inference.probabilities([logits], (9, 11), 0, 9)
        for top, strip, labels in inference.strips([logits], (9, 11), merge):
            for y in range(strip.shape[1]):
                for x in range(11):
                    sums = [sum(plain[k, top + y, x].item() for k in found) for found in merge]
                    np.testing.assert_allclose(strip[:, y, x], sums, atol=1e-6)
                    best = sorted(sums)
                    assert labels[y, x] == np.argmax(sums) or best[-1] - best[-2] < 1e-6


# ---- faults

ALL = {"name": "all", "colour": [1, 2, 3], "from": list(LIP.classes)}


def fault(tmp_path: Path, content) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(UserError) as error:
        classmap.load(path, LIP)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("target, says", [
    ({"from": [*LIP.classes, "Tie"]}, "all takes 'Tie', which is no class of lip"),
    ({"from": [*LIP.classes[1:], "Har"]}, "all takes 'Har', which is no class of lip; did you mean 'Hair'?"),
    ({"from": [*LIP.classes, "Hat"]}, "Hat of lip is taken 2 times; each class of the network must stand there once"),
    ({"from": [*LIP.classes[:12], *LIP.classes[13:]]}, "Skirt of lip is taken by no class; each"),
    ({"from": "Hat"}, "label 1: from must be a list of class names, not 'Hat'"),
    ({"from": [1]}, "label 1: from must be a list of class names, not [1]"),
    ({"name": False}, "label 1: name must be text, not False (quotes make it text)"),
    ({"colour": [0, 0]}, "label 1: colour must be three numbers from 0 to 255, not [0, 0]"),
    ({"colour": [0, 0, 256]}, "label 1: colour must be three numbers"), ({"colour": "red"}, "label 1: colour must be"),
    ({"color": [0, 0, 0]}, "label 1 must have name, colour, from and nothing else"),
    ({"name": "none"}, "the name 'none' stands there twice"),
    ({"colour": [9, 9, 9]}, "the colour [9, 9, 9] stands there twice")])
def test_a_fault_is_named(tmp_path, target, says):
    none = {"name": "none", "colour": [9, 9, 9], "from": []}
    assert fault(tmp_path, [none, ALL | target]).startswith(says)


@pytest.mark.parametrize("content, says", [
    ("", "a class map is a list of"), ("a: 1", "a class map is a list of"), ("[]", "a class map is a list of"),
    ("- 1", "label 0 must have name"), ("- {1: 2}", "label 0 must have name"), ("- {name: [", "not valid YAML, line 1"),
    ("- {name: a, name: b}", "not valid YAML, line 1: name stands there twice")])
def test_a_file_that_is_no_map(tmp_path, content, says):
    assert fault(tmp_path, content).startswith(says)


def test_a_map_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yaml: no such class map \(the ready ones are in configs/maps/\)"):
        classmap.load(tmp_path / "nowhere.yaml", LIP)
    with pytest.raises(UserError, match="is a folder, not a class map"):
        classmap.load(tmp_path, LIP)


def test_a_map_of_another_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="Head of ppp is taken by no class"):
        classmap.load(MAPS / "atr.yaml", LABEL_SETS["ppp"])
