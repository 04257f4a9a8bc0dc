"""files/labels.py, configs/maps: label sets, class maps against their sources, merged probabilities, mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import fast
import inference
from config import Config, from_dict
from errors import UserError
from files.labels import IGNORE_GREY, LABEL_SETS, distinct_colours, label_set, load_class_map

MAPS = Path(__file__).parents[1] / "configs" / "maps"
LIP, CIHP, PPP = (LABEL_SETS[name] for name in ("lip", "cihp", "ppp"))
# Class names as their sources publish them (see the map files), and the LIP or CIHP labels merged into each.
ATR = ("Background Hat Hair Sunglasses Upper-clothes Skirt Pants Dress Belt Left-shoe Right-shoe Face Left-leg "
       "Right-leg Left-arm Right-arm Bag Scarf").split()
TRYON = ("Background Hair (2) (3) Upclothes Left-shoe Right-shoe Noise Pants Left-leg Right-leg "
         "Left-arm Face Right-arm").split()
FROM_TRYON = [[0], [1, 2], [], [], [5, 6, 7], [18], [19], [3, 8, 10, 11], [9, 12], [16], [17], [14], [4, 13], [15]]
VITON_HD = ("background hair face upper bottom left_arm right_arm left_leg right_leg "
            "left_shoe right_shoe socks noise").split()
COARSE = "background hair face skin upper lower shoes other".split()
FROM_VITON_HD = [[0, 10], [1, 2], [4, 13], [5, 6, 7], [9, 12], [14], [15], [16], [17], [18], [19], [8], [3, 11]]


def voc_colours(count: int) -> list[tuple[int, ...]]:
    """PASCAL VOC's palette, which SCHP's extractor uses: each label gives three bits at a time."""
    return [tuple(sum((k >> (3 * n + c) & 1) << (7 - n) for n in range(8)) for c in range(3)) for k in range(count)]


def test_label_sets_are_the_official_ones():
    assert [len(labels.classes) for labels in (LIP, CIHP, PPP)] == [20, 20, 7]
    assert [(a, b) for a, b in zip(LIP.classes, CIHP.classes) if a != b] == [("Jumpsuits", "Torso-skin")]
    assert LIP.classes[10] == "Jumpsuits" and LIP.palette[1::18] == ((128, 0, 0), (255, 170, 0))
    assert PPP.classes == ("Background", "Head", "Torso", "Upper-arms", "Lower-arms", "Upper-legs", "Lower-legs")
    for labels in (LIP, CIHP):
        sides = {tuple(labels.classes[k] for k in pair) for pair in labels.flip_pairs}
        assert sides == {(f"Left-{limb}", f"Right-{limb}") for limb in ("arm", "leg", "shoe")}
    assert PPP.flip_pairs == () and label_set(Config(dataset="synthetic")).classes == LIP.classes


@pytest.mark.parametrize("values, says", [
    ({"classes": ()}, "classes must be a list"), ({"classes": ("a", "a")}, "classes: duplicate"),
    ({"classes": ("a", "b"), "palette": ((0, 0, 0),)}, "palette has 1 .* 2 "),
    ({"classes": ("a", "b"), "palette": ((0, 0, 0), (0, 0, 0))}, "palette: duplicate"),
    ({"classes": ("a", "b"), "palette": ((0, 0, 0), (0, 0, 256))}, "palette.* 0 and 255"),
    ({"classes": ("a", "b"), "flip_pairs": ((0, 2),)}, "flip_pairs: .*outside"),
    ({"classes": ("a", "b"), "flip_pairs": ((0, 1), (1, 0))}, "flip_pairs: duplicate"),
    ({"classes": tuple(map(str, range(256)))}, "at most 255")])
def test_mistakes_in_label_sets_are_named(values, says):
    with pytest.raises(UserError, match=says):
        label_set(from_dict({"dataset": "custom", **values}, source="test"))


@pytest.mark.parametrize("count", [1, 2, 20, 255])
def test_generated_colours_are_distinct(count):
    colours = np.array(distinct_colours(count), float)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 999 * np.eye(count)
    assert colours.shape == (count, 3) and apart.min() > (60 if count <= 20 else 25) and not colours[0].any()
    assert np.abs(colours - IGNORE_GREY).max(1).min() > (40 if count <= 20 else 15)    # ignored pixels


@pytest.mark.parametrize("labels", (LIP, CIHP), ids=("lip", "cihp"))
def test_shipped_maps_match_their_sources(labels):
    """LIP's label 10, Jumpsuits, is CIHP's Torso-skin, the neck."""
    classes, palettes, merges = {}, {}, {}
    for path in MAPS.iterdir():
        target, merge = load_class_map(path, labels)
        classes[path.stem], palettes[path.stem] = list(target.classes), list(target.palette)
        merges[path.stem] = [sorted(sources) for sources in merge]
        assert sorted(sum(merges[path.stem], [])) == list(range(20)) and len(merge) == len(target.classes)
    names = [{labels.classes[k] for k in sources} for sources in merges["atr"]]
    tenth = {"Face": {"Torso-skin"}} if labels is CIHP else {"Dress": {"Jumpsuits"}}
    others = {"Upper-clothes": {"Coat", "Glove"}, "Pants": {"Socks"}, **tenth}
    assert names == [{name} & set(labels.classes) | others.get(name, set()) for name in ATR]
    assert classes["atr"] == ATR and palettes["atr"] == voc_colours(18)
    neck = [10] if labels is CIHP else []                  # label 18 in OOTDiffusion and IDM-VTON
    expected = [[k for k in sources if k not in neck] for sources in merges["atr"]]
    assert merges["ootd"] == [*expected, neck] and classes["ootd"] == [*ATR, "Neck"]
    assert palettes["ootd"] == voc_colours(19)
    assert classes["tryon"] == TRYON and merges["tryon"] == FROM_TRYON and palettes["tryon"] == voc_colours(14)
    neck, suit = ([10], []) if labels is CIHP else ([], [10])
    expected = [[0, *neck], *FROM_VITON_HD[1:3], [5, 6, 7, *suit], *FROM_VITON_HD[4:]]
    assert classes["viton_hd"] == VITON_HD and merges["viton_hd"] == expected
    expected = [[0], [2], [4, 13], [*neck, 14, 15, 16, 17], [5, 6, 7, *suit], [9, 12], [18, 19], [1, 3, 8, 11]]
    assert classes["coarse"] == COARSE and merges["coarse"] == expected


def test_merged_labels_are_the_argmax_of_summed_probabilities(both_forms, monkeypatch):
    """40 % skirt, 35 % upper clothes, 25 % coat: an upper garment, although the likeliest class is skirt."""
    monkeypatch.setattr(fast, "CPU_STRIP", 4 * 20 * 11 * 3)              # strips of three rows
    shares = torch.tensor([0.4, 0.35, 0.25]).log()[:, None, None].expand(3, 5, 7)
    assert (inference.label_map([shares], (9, 11)) == 0).all()
    assert (inference.label_map([shares], (9, 11), ((), (1, 2), (0,))) == 1).all()
    logits = torch.randn(20, 5, 7, generator=torch.Generator().manual_seed(0)) * 2
    plain = inference.probabilities([logits], (9, 11))
    for path in MAPS.iterdir():
        _, merge = load_class_map(path, LIP)
        sums, label = inference.probabilities([logits], (9, 11), merge), inference.label_map([logits], (9, 11), merge)
        for y, x in np.ndindex(9, 11):
            expected = [sum(plain[k, y, x].item() for k in sources) for sources in merge]
            np.testing.assert_allclose(sums[:, y, x], expected, atol=1e-6)
            assert max(expected) - expected[label[y, x]] < 1e-6


ALL = {"name": "all", "colour": [1, 2, 3], "from": list(LIP.classes)}


@pytest.mark.parametrize("content, says", [
    ({"from": [*LIP.classes[:2], "Har", *LIP.classes[3:]]}, "Hair .* 0 times"),
    ({"from": [*LIP.classes, "Hat"]}, "Hat .* 2 times"),
    ({"from": "Hat"}, "label 1 .*'Hat'"), ({"name": False}, "label 1 .*False"),
    ({"colour": [0, 0]}, r"label 1 .*\[0, 0\]"), ({"colour": [0, 0, 256]}, "colours? .*0 to 255"),
    ({"color": [0, 0, 0]}, "label 1 .*'color'"),
    ({"name": "none"}, "duplicate name"), ({"colour": [9, 9, 9]}, "duplicate colour"), ("", "class map"),
    ("a: 1", "class map"), ("[]", "class map"), ("- 1", "label 0 .*name"), ("- {1: 2}", "label 0 .*name"),
    ("- {name: [", "YAML.*line 1"), ("- {name: a, name: b}", "YAML.*name .*line 1"), ("[" * 500, "YAML")])
def test_mistakes_in_class_maps_are_one_line(tmp_path, content, says):
    none, path = {"name": "none", "colour": [9, 9, 9], "from": []}, tmp_path / "x.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump([none, ALL | content]))
    with pytest.raises(UserError, match=rf"\A[^\n]*{path}: [^\n]*{says}[^\n]*\Z"):
        load_class_map(path, LIP)


def test_missing_files_and_maps_of_other_classes(tmp_path):
    for path, says in ((tmp_path / "x", "configs/maps/"), (tmp_path, "a folder"), (MAPS / "atr.yaml", "Head of ppp")):
        with pytest.raises(UserError, match=f"{path}: .*{says}"):
            load_class_map(path, PPP)
