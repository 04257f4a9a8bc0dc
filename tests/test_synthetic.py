"""Drawn people: reproducible, with exact labels, known class frequencies and the person's own left and right."""

import hashlib
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

import synthetic.draw as drawing
from synthetic.draw import Canvas, Dice, Person, draw

SIZE = (160, 128)
LEFT, RIGHT = (14, 16, 18), (15, 17, 19)


def digest(seed: int, index: int, size: tuple[int, int]) -> str:
    image, label = draw(seed, index, size)
    return hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def drawn() -> list:
    return [draw(11, i, SIZE) for i in range(250)]


@pytest.fixture(scope="module")
def counts(drawn) -> np.ndarray:
    return np.array([np.bincount(label.ravel(), minlength=20) for _, label in drawn])


def test_same_bytes_in_any_order_process_and_thread_count():
    cases = [(0, 0, SIZE), (3, 17, (96, 96)), (5, 123456, (200, 330)), (0, 1, (480, 480))]
    here = [digest(*case) for case in cases]
    assert len(set(here)) == 4
    assert [digest(*case) for case in reversed(cases)] == here[::-1]
    code = ("import cv2, test_synthetic as t\nfor threads in (1, 4):\n    cv2.setNumThreads(threads)\n"
            f"    print([t.digest(*c) for c in {cases!r}])")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert run.stdout.splitlines() == [str(here)] * 2


@pytest.mark.parametrize("size", [(96, 96), (480, 480), (64, 200), (333, 121)])
def test_sizes_types_and_values(size):
    for index in range(6):
        image, label = draw(1, index, size)
        assert image.shape == (*size, 3) and label.shape == size and label.max() < 20 and image.std() > 5
        for array in (image, label):
            assert array.dtype == np.uint8 and array.flags.c_contiguous and array.flags.writeable


def test_the_label_matches_the_painted_shapes(monkeypatch):
    """With one flat colour per class, no background and no exposure, image and label agree except at smooth edges."""
    def flat(self, circles, cls, colour):
        if cls is not None:
            fill(self, circles, cls, np.full(3, cls * 12.0))

    fill = Canvas._fill
    monkeypatch.setattr(Canvas, "_fill", flat)
    monkeypatch.setattr(Canvas, "_print", lambda *args: None)
    monkeypatch.setattr(drawing, "backdrop", lambda dice, rng, h, w: np.zeros((h, w, 3), np.uint8))
    monkeypatch.setattr(drawing, "expose", lambda image, dice, rng: image)
    for index in range(40):
        image, label = draw(4, index, SIZE)
        inside = np.equal(*(change(label, np.ones((3, 3), np.uint8)) for change in (cv2.dilate, cv2.erode)))
        wrong = np.abs(image[..., 0].astype(int) - label.astype(int) * 12) > 6
        assert inside.mean() > 0.5 and wrong[inside].mean() < 0.003 and wrong.mean() < 0.1, index


def test_every_class_is_frequent_and_large_enough(counts):
    share = (counts > 0).mean(0)
    low = [1, .2, .8, .2, .2, .5, .12, .2, .3, .35, .12, .15, .15, .65, .7, .7, .5, .5, .8, .8]
    high = [1, .5, 1, .5, .5, .8, .35, .45, .65, .75, .35, .4, .4, .95, .95, .95, .85, .85, 1, 1]
    for cls in range(20):
        assert low[cls] <= share[cls] <= high[cls], (cls, share[cls])
        assert np.median(counts[counts[:, cls] > 0, cls]) >= 60, cls
    assert np.abs(share[[*LEFT]] - share[[*RIGHT]]).max() < 0.06
    assert (counts[:, 1:].sum(1) > 0.01 * SIZE[0] * SIZE[1]).all()       # every image has a person


def test_left_is_the_persons_left():
    dice, towards = Dice(np.random.default_rng(0)), 0
    for _ in range(300):
        person = Person(dice)
        person.place(100, 100, True)
        ahead = person.view[2, 2]                          # cosine of the angle to the viewer
        if abs(ahead) > 0.5:
            towards += ahead > 0
            for left, right in (person.legs, person.arms):
                assert (person.disc(left[0], 0)[0] > person.disc(right[0], 0)[0]) == (ahead > 0)
    assert 170 < towards < 230                             # both views are common
