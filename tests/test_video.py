"""files/video.py and videos in predict.py: containers, frame rates, non-square pixels, damage."""

import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from errors import UserError
from files import video
from predict import Parser


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (6, 5, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def clip(path: str | Path, count: int = 7, size: tuple[int, int] = (50, 61), code: str = "MJPG", rate: float = 12):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), rate, size[::-1])
    assert writer.isOpened()
    for n in range(count):
        writer.write(cv2.cvtColor(photo(*size, seed=n), cv2.COLOR_RGB2BGR))
    writer.release()


def read(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def opened(path: str | Path) -> tuple[int, float, tuple[int, int]]:
    """(number of frames, frames per second, (height, width)) of a video."""
    capture, frames = cv2.VideoCapture(os.path.abspath(path)), []
    rate = capture.get(cv2.CAP_PROP_FPS)
    while (frame := capture.read())[0]:
        frames.append(frame[1])
    return len(frames), rate, frames[0].shape[:2]


def test_a_video_keeps_its_length_and_rate_beside_images_of_the_same_name(parse, here: Path, small: Path):
    for name in ("a:b.avi", "walk.avi"):                   # FFmpeg could read "a:" as a protocol
        clip("x.avi")
        os.rename("x.avi", name)
    Path("walk").mkdir()
    for n in range(1, 4):
        Image.fromarray(photo(70, 90, n)).save(f"walk/{n:06d}.png")
    assert parse(".", "--out", "p:1", "--frames", "--batch", "3") == 0
    count, rate, (height, width) = opened("p:1/overlays/walk.mp4")
    assert (count, round(rate, 3)) == (7, 12) and height % 2 == width % 2 == 0 and height >= 50 and width >= 61
    assert sorted(os.listdir("p:1/labels/walk.avi")) == [f"{n:06d}.png" for n in range(1, 8)]
    assert opened("p:1/overlays/a:b.mp4")[0] == 7
    assert [read(f"p:1/labels/walk/{n:06d}.png").shape for n in range(1, 4)] == 3 * [(70, 90)]
    capture = cv2.VideoCapture("walk.avi")
    for n in range(1, 8):
        frame = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
        assert (read(f"p:1/labels/walk.avi/{n:06d}.png") == Parser(small).parse(frame)).mean() > 0.99
    Image.fromarray(photo(9, 9)).save("walk.png")          # not done although a video of this name is
    assert parse("walk.png", "--out", "p:1", "--skip-existing") == 0 and Path("p:1/labels/walk.png").exists()


VIDEOS = {"ts": "mpg2", "mts": "mp4v", "3gp": "mp4v", "flv": "FLV1", "mkv": "mp4v", "webm": "VP80", "mov": "mp4v",
          "wmv": "WMV2", "vob": "mpg2"}


def test_a_video_is_parsed_in_every_container(parse, here: Path):
    for suffix, code in VIDEOS.items():
        clip(f"in {suffix}.{suffix}", 6, (48, 64), code)
    clip("really.avi", 6, (48, 64))
    os.rename("really.avi", "a video")
    assert parse(".", "a video", "--out", "out", "--size", "32") == 0
    names = [*(f"in {suffix}" for suffix in VIDEOS), "a video"]
    assert sorted(os.listdir("out/overlays")) == sorted(f"{name}.mp4" for name in names)
    for name in names:
        count, rate, _ = opened(f"out/overlays/{name}.mp4")
        assert count == 6 and rate == pytest.approx(12, rel=2e-3), name  # some containers round to milliseconds


def join(target: str, *parts: str):
    Path(target).write_bytes(b"".join(Path(part).read_bytes() for part in parts))


@pytest.mark.parametrize("real, declared", [(5, 60), (5, 1000), (0.2, 25), (25, 5)])
def test_the_rate_follows_the_timestamps(here: Path, real: float, declared: float):
    clip("x.mkv", 40, (48, 64), "mp4v", real)
    content = bytearray(Path("x.mkv").read_bytes())
    at = content.index(b"\x23\xe3\x83")                    # DefaultDuration; the frames keep their timestamps
    size = content[at + 3] & 0x7f
    content[at + 4:at + 4 + size] = int(1e9 / declared).to_bytes(size, "big")
    Path("x.mkv").write_bytes(content)
    assert opened("x.mkv")[1] == pytest.approx(declared, rel=1e-4)
    assert video.Reader("x.mkv").rate == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("rate", [24000 / 1001, 25, 119.88, 0.5])
@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_a_correct_declared_rate_is_kept(here: Path, rate: float, suffix: str):
    clip(f"x.{suffix}", 25, (48, 64), "mp4v", rate)
    declared = opened(f"x.{suffix}")[1]
    assert video.Reader(f"x.{suffix}").rate == declared == pytest.approx(video._writable(declared), abs=1e-3)


def test_rates_of_irregular_timestamps(here: Path):
    times = [0, 100, 200, 300, 1300, 2300, 3300]           # milliseconds, as screen recorders write them
    assert video.frame_rate(times, 1000.0) == pytest.approx(6 / 3.3)
    assert video.frame_rate([40.0], 50.0) == 50 and video.frame_rate([0.0, 0.0], 0.0) == 25
    assert video.frame_rate([*times, *times], 1000.0) == pytest.approx(6 / 3.3)            # two recordings in one file
    film = [n * 1001 / 30 for n in range(20_000)]          # 11 minutes: 30 would drift by 0.7 s
    assert video.frame_rate(film, 30.0) == pytest.approx(30000 / 1001)
    assert video.frame_rate(film, 30000 / 1001) == 30000 / 1001
    for rate in (1e-4, 0.0333, 23.976, 71.23456, 655.351, 1e5):
        clip("x.mp4", 3, (48, 64), "mp4v", video._writable(rate))
        assert opened("x.mp4")[1] == pytest.approx(min(max(rate, 0.01), 1000), rel=1e-3, abs=1e-3)
    for name, count in (("a.ts", 25), ("b.ts", 75)):
        clip(name, count, (48, 64), "mpg2", 25)
    join("c.ts", "a.ts", "b.ts")                           # the timestamps restart
    assert video.Reader("c.ts").rate == 25


def test_non_square_pixels_are_stretched(parse, here: Path, small: Path):
    clip("x.ts", 5, (48, 64), "mpg2")
    content = bytearray(Path("x.ts").read_bytes())
    for match in re.finditer(b"\0\0\1\xb3", content):
        content[match.start() + 7] = content[match.start() + 7] & 15 | 3 << 4              # 16:9 display aspect
    Path("x.ts").write_bytes(content)
    assert parse("x.ts", "--out", "out", "--frames") == 0
    frame = next(iter(video.Reader("x.ts")))
    assert frame.shape == (48, 85, 3) and opened("out/overlays/x.mp4")[2][1] >= 85
    label = cv2.resize(Parser(small).parse(frame), (64, 48), interpolation=cv2.INTER_NEAREST_EXACT)          # as stored
    assert (read("out/labels/x.ts/000001.png") == label).mean() > 0.99


@pytest.mark.parametrize("code", ["mpg2", "mp4v"])
def test_a_video_whose_size_changes_is_refused(here: Path, code: str):
    for name, size in (("a.ts", (48, 64)), ("b.ts", (64, 48))):
        clip(name, 25, size, code)
        assert video.Reader(name).stored == size
    join("c.ts", "a.ts", "b.ts")
    with pytest.raises(UserError, match="c.ts: .*64x48"):
        video.Reader("c.ts")


def test_a_video_trimmed_by_an_edit_list(parse, here: Path):
    clip("x.mp4", 48, (48, 64), "mp4v")
    content = bytearray(Path("x.mp4").read_bytes())
    at = content.index(b"elst") + 12                       # halve the duration in the edit list
    content[at:at + 4] = (int.from_bytes(content[at:at + 4], "big") // 2).to_bytes(4, "big")
    Path("x.mp4").write_bytes(content)
    assert cv2.VideoCapture("x.mp4").get(cv2.CAP_PROP_FRAME_COUNT) == 48
    assert parse("x.mp4", "--out", "out", "--size", "32") == 0 and opened("out/overlays/x.mp4")[:2] == (24, 12)


@pytest.mark.parametrize("name, code", [("x.avi", "MJPG"), ("x.mkv", "mp4v")])
def test_a_truncated_video_is_parsed_up_to_the_cut(parse, here: Path, capsys, name, code):
    clip(name, 48, (48, 64), code)
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[:len(data) * 6 // 10])
    assert parse(name, "--out", "out", "--size", "32") == 1
    line, count = capsys.readouterr().err.partition("1 not parsed:")[2].strip(), opened("out/overlays/x.mp4")[0]
    assert 20 < count < 40 and re.fullmatch(rf"{name}: damaged or cut off \(.*\).* {count} frames.*", line)


def test_damaged_videos_are_reported(parse, here: Path, monkeypatch, capsys):
    clip("whole.avi", 20)
    clip("headless.mp4", 20, code="mp4v")
    for name, content in (("headless.mp4", Path("headless.mp4").read_bytes()[:9000]), ("noise.mp4", b"no video" * 99),
                          ("empty.mkv", b"")):
        Path(name).write_bytes(content)
    assert parse(".", "--out", "out") == 1 and os.listdir("out/overlays") == ["whole.mp4"]
    report = capsys.readouterr().err.partition("3 not parsed:")[2]
    assert all(re.search(rf"/{name}: no frame .*\(", report) for name in ("noise.mp4", "headless.mp4", "empty.mkv"))
    assert "moov atom not found" in report
    Path("frame_times.py").write_text("import os; os.abort()")
    monkeypatch.setattr(video, "__file__", str(here / "video.py"))
    assert parse("whole.avi", "--out", "crash") == 1 and re.search("whole.avi: .*crashed", capsys.readouterr().err)


