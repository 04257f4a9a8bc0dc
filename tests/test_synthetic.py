"""Drawn people: purity, exact labels, frequencies of the classes, and that left and right are the person's."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from synthetic import canvas, draw as drawing
from synthetic.draw import draw
from synthetic.skeleton import Dice, Figure

SIZE = (160, 128)
LEFT, RIGHT = (14, 16, 18), (15, 17, 19)


def digest(seed: int, index: int, size: tuple[int, int]) -> str:
    image, label = draw(seed, index, size)
    return hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def drawn() -> list:
    return [draw(11, i, SIZE) for i in range(400)]


@pytest.fixture(scope="module")
def counts(drawn) -> np.ndarray:
    return np.array([np.bincount(label.ravel(), minlength=20) for _, label in drawn])


def test_same_bytes_in_any_order_process_and_thread_count():
    cases = [(0, 0, SIZE), (3, 17, (96, 96)), (5, 123456, (200, 330)), (0, 1, (480, 480))]
    here = [digest(*case) for case in cases]
    assert [digest(*case) for case in reversed(cases)] == here[::-1]
    root = Path(__file__).parents[1]
    for threads in (1, 4):
        code = f"import cv2, sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]; " \
               f"cv2.setNumThreads({threads}); import test_synthetic as t; print([t.digest(*c) for c in {cases!r}])"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             env={**os.environ, "PYTHONHASHSEED": str(threads)})
        assert run.stdout.strip() == str(here), threads


def test_numpys_and_opencvs_global_generators_are_neither_read_nor_moved():
    np.random.seed(1)
    cv2.setRNGSeed(1)
    before = np.random.get_state()[1].copy()
    first = digest(2, 5, SIZE)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    cv2.setRNGSeed(2)
    assert digest(2, 5, SIZE) == first


def test_pictures_and_streams_are_all_different():
    digests = {digest(seed, index, (64, 64)) for seed in (0, 1, 2) for index in range(60)}
    assert len(digests) == 180


@pytest.mark.parametrize("size", [(160, 128), (96, 96), (480, 480), (64, 200), (333, 121)])
def test_sizes_types_and_values(size):
    for index in range(6):
        image, label = draw(1, index, size)
        assert image.shape == (*size, 3) and label.shape == size
        assert image.dtype == label.dtype == np.uint8
        assert image.flags.c_contiguous and label.flags.c_contiguous and image.flags.writeable and label.flags.writeable
        assert label.max() < 20 and image.std() > 5


def test_the_label_is_what_is_painted(monkeypatch):
    """With one flat colour a class and no exposure, the picture is the label, but for smooth edges."""
    fill = canvas.Canvas.fill

    def flat(self, sections, cls, cloth, shade=True):
        fill(self, sections, cls, ((cls * 12.0,) * 3, None), False)
    monkeypatch.setattr(canvas.Canvas, "fill", flat)
    monkeypatch.setattr(drawing, "backdrop", lambda d, rng, h, w: np.zeros((h, w, 3), np.uint8))
    monkeypatch.setattr(drawing, "out_of_focus", lambda image, d: image)
    monkeypatch.setattr(drawing, "expose", lambda image, pieces, d, rng: image)
    for index in range(40):
        image, label = draw(4, index, SIZE)
        square = np.ones((3, 3), np.uint8)
        inside = cv2.dilate(label, square) == cv2.erode(label, square)
        assert inside.mean() > 0.5
        wrong = np.abs(image[..., 0].astype(int) - label.astype(int) * 12) > 6
        assert wrong[inside].mean() < 0.003 and wrong.mean() < 0.1, index


def test_every_class_is_frequent_and_large_enough(counts):
    share = (counts > 0).mean(0)
    low = [1, .2, .8, .2, .2, .5, .12, .2, .3, .35, .12, .15, .15, .65, .7, .7, .5, .5, .8, .8]
    high = [1, .5, 1, .5, .5, .8, .35, .45, .65, .75, .35, .4, .4, .95, .95, .95, .85, .85, 1, 1]
    for cls in range(20):
        assert low[cls] <= share[cls] <= high[cls], (cls, share[cls])
        assert np.median(counts[counts[:, cls] > 0, cls]) >= 60, cls
    for left, right in zip(LEFT, RIGHT):
        assert abs(share[left] - share[right]) < 0.06


def test_every_picture_has_a_person(counts):
    assert (counts[:, 1:].sum(1) > 0.01 * SIZE[0] * SIZE[1]).all()


def test_the_side_of_the_picture_tells_little(drawn, counts):
    """Seven in ten people look at the viewer, and they stand anywhere: who guesses the side from the half of the
    picture is wrong more than one time in three. Left and right limbs are equally large."""
    labels = np.stack([label for _, label in drawn])
    for left, right in zip(LEFT, RIGHT):
        for cls in (left, right):
            in_left_half = (labels[:, :, :64] == cls).sum() / (labels == cls).sum()
            assert 0.34 < in_left_half < 0.66, (cls, in_left_half)
        assert 0.85 < counts[:, left].sum() / counts[:, right].sum() < 1.18, left


def test_left_is_the_persons_left():
    """The left shoulder and hip are on the picture's right exactly when the person looks at the viewer."""
    rng = np.random.default_rng(0)
    towards = 0
    for _ in range(300):
        fig = Figure(Dice(rng))
        fig.place(100.0, np.zeros(2))
        ahead = fig.view[2, 2]                             # cosine between the person's forward axis and the viewer's
        if abs(ahead) > 0.5:
            towards += ahead > 0
            assert (fig.leg[0][0, 0] > fig.leg[1][0, 0]) == (ahead > 0)
            assert (fig.arm[0][0, 0] > fig.arm[1][0, 0]) == (ahead > 0)
    assert 170 < towards < 225                             # and both kinds are common


def test_faces_tell_the_side(drawn):
    """In the labels: with a large face the right shoe is mostly on the picture's left, with hair alone on its right."""
    right_first = {True: [], False: []}
    for _, label in drawn:
        face, hair = (label == 13).sum(), (label == 2).sum()
        shoes = [np.nonzero(label == cls)[1] for cls in (18, 19)]
        if min(map(len, shoes)) > 40 and (face > 60 and face > hair / 2 or face == 0 and hair > 60):
            right_first[bool(face)].append(shoes[1].mean() < shoes[0].mean())
    assert min(map(len, right_first.values())) > 30
    assert np.mean(right_first[True]) > 0.8 and np.mean(right_first[False]) < 0.2
