"""files/images.py: photos of every pixel format, damaged files, retries, labels."""

import contextlib
import errno
import itertools
import struct
import warnings
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from files import images
from files.images import ALL_FORMATS, read_label, read_photo

GREY = np.random.default_rng(1).integers(0, 4, (30, 40), np.uint8)

def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def numbers(seed, size=(40, 30), classes=4):
    return Image.fromarray(np.random.default_rng(seed).integers(0, classes, (size[1], size[0]), np.uint8))


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def chunk(kind, data, damage=0):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


def png(values, depth=8, before=b"", after=b""):
    """A PNG with `depth` bits per channel of values (h, w) or (h, w, 2 to 4); Pillow writes few kinds."""
    (h, w), kind = values.shape[:2], {1: 0, 3: 2, 2: 4, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    values = values.reshape(h, -1)
    if depth == 16:
        rows = values.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth:].reshape(h, -1)
        rows = np.packbits(bits, axis=1)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, kind, 0, 0, 0)) + before
            + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b""))


def bmp(rgb, alpha, header):
    """A 32-bit BMP with a header of 40 (no alpha), 108 (V4, written by clipboards) or 124 bytes (V5)."""
    bgra = np.dstack([rgb[..., ::-1], alpha])[::-1].astype(np.uint8).tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) if header > 40 else b""
    info = struct.pack("<IiiHHII16x", header, rgb.shape[1], rgb.shape[0], 1, 32, 3 if masks else 0, len(bgra))
    info = (info + masks).ljust(header, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(bgra), 0, 0, 14 + len(info)) + info + bgra


def written(path, content):
    path.write_bytes(content)
    return path


def tiff(values: np.ndarray, bits: int, **tags: int) -> bytes:
    """An uncompressed grey TIFF; `tags`: further tags by number, as in t254=1."""
    data, (height, width) = values.astype("<u2").tobytes(), values.shape
    if bits == 12:
        every = np.unpackbits(values.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., 4:]
        data = np.packbits(every.reshape(height, -1), axis=1).tobytes()
    known = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    known |= {int(tag[1:]): value for tag, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(known.items()))
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(known)) + entries + bytes(4)


def test_grey_tiffs_of_12_and_16_bits_and_camera_raw_files(tmp_path):
    values = np.tile(np.arange(60, dtype=np.uint16) * 68, (30, 1))
    for bits, more in ((12, {}), (16, {}), (16, {"t262": 0})):
        written(tmp_path / "x.tif", tiff(values << (bits - 12), bits, **more))
        expected = values >> 4 if not more else 255 - (values >> 4)      # 0 is white
        assert np.array_equal(read_photo(tmp_path / "x.tif", ALL_FORMATS)[..., 1], expected), (bits, more)
    for name, tags in (("thumbnail.nef", {"t254": 1}), ("x.dng", {"t50706": 0x0401}), ("canon.cr2", {"t259": 6})):
        with pytest.raises(UserError, match=f"{name}: .*raw"):
            read_photo(written(tmp_path / name, tiff(values, 8, **tags)), ALL_FORMATS)
    pages = [picture(1), picture(2, (20, 15))]             # a thumbnail as second page
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_photo(tmp_path / "pages.tif", ALL_FORMATS), pages[0])


@pytest.mark.parametrize("channels, depth", [(1, 1), (1, 4), *itertools.product((1, 2, 3, 4), (8, 16))])
def test_pngs_of_every_depth_with_transparent_pixels_white(tmp_path, channels, depth):
    values = np.random.default_rng(0).integers(0, 2**depth, (30, 40, channels))
    colour = values[..., :-1 + channels % 2 or None]
    as_8_bits = colour >> 8 if depth == 16 else colour * 255 // (2**depth - 1)
    if channels % 2:                                       # no alpha: one transparent colour
        clear = (values == values[3, 3]).all(-1)
        before = chunk(b"tRNS", values[3, 3].astype(">u2").tobytes())
    else:
        clear = np.arange(30 * 40).reshape(30, 40) % 3 == 0
        values[..., -1] = np.where(clear, 0, 2**depth - 1)
        before = b""
    keyed = (channels, depth) not in ((1, 4), (3, 16))     # where Pillow knows the transparent colour in 8 bits
    for chunks, white in ((before, clear), (b"", clear & (channels % 2 == 0)))[not keyed:]:
        stored = written(tmp_path / "x.png", png(values.squeeze(), depth, chunks))
        expected = np.where(white[..., None], 255, as_8_bits)
        assert np.array_equal(read_photo(stored), np.broadcast_to(expected, (30, 40, 3)))
    stored = written(tmp_path / "x.png", png(np.array([[0x1234, 0x1235, 0x1200]]), 16, chunk(b"tRNS", b"\x12\x34")))
    assert read_photo(stored)[0, :, 0].tolist() == [255, 0x12, 0x12]     # one of 65,536 greys


def test_a_damaged_exif_tag_does_not_make_the_photo_unusable(tmp_path):
    turned = (0x112, 3, 1, struct.pack("<H", 6))
    for damaged in ((0x11A, 2, 4, b"abc"), (0x11A, 9, 1, struct.pack("<i", -5)), (0x128, 2, 2, b"a")):
        entries = b"".join(struct.pack("<HHI4s", *tag) for tag in (turned, damaged))
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
        Image.new("RGB", (40, 30)).save(tmp_path / "x.jpg", exif=exif)
        assert read_photo(tmp_path / "x.jpg").shape == (40, 30, 3)
    with Image.open(tmp_path / "x.jpg") as photo:          # the caller's image stays as it is
        assert read_photo(photo).shape == (40, 30, 3) and photo.info["exif"] == exif


@pytest.mark.parametrize("header", [40, 108, 124])
@pytest.mark.parametrize("alpha", ["unused", "full", "some"])
def test_32_bit_bmp(tmp_path, header, alpha):
    """Clipboard tools set alpha to 0 everywhere, which must not make the photo transparent."""
    rgb, some = np.array(picture(3)), np.arange(1200).reshape(30, 40) % 2 * 255
    given = {"unused": 0 * some, "full": 0 * some + 255, "some": some}[alpha]
    shown = np.where(given[..., None] > 0, rgb, 255) if alpha == "some" and header > 40 else rgb
    assert np.array_equal(read_photo(written(tmp_path / "x.bmp", bmp(rgb, given, header))), shown)


@pytest.mark.parametrize("place, kind, head", [("before", b"zTXt", b"workflow\0\0"),
                                               ("after", b"iTXt", b"workflow\0\1\0\0\0")])
def test_png_with_megabytes_of_compressed_text(tmp_path, kind, head, place):
    text, rgb = np.random.default_rng(0).integers(32, 127, 2_000_000, np.uint8).tobytes(), np.array(picture(3))
    content = png(rgb, **{place: chunk(kind, head + zlib.compress(text))})
    assert np.array_equal(read_photo(written(tmp_path / "x.png", content)), rgb)


@pytest.mark.parametrize("read", [read_photo, lambda path: read_label(path, 4)], ids=["photo", "label"])
def test_damaged_and_huge_images_are_refused_with_the_reason(tmp_path, read):
    """Photos of 200 megapixels, above Pillow's own limit, are accepted; none is decoded here."""
    def claiming(side):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        return png(GREY)[:8] + header + chunk(b"IDAT", zlib.compress(bytes(99)))

    for content, says in [
            (png(GREY, before=chunk(b"pHYs", bytes(9), damage=1)), "damaged"),
            (png(GREY)[:40], "damaged"), (claiming(14_200), "cut off"),
            (claiming(16_400), "too many pixels"),
            (png(GREY, before=chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(70 << 20)))), "(?i)data too large")]:
        with warnings.catch_warnings(record=True) as warned, pytest.raises(UserError, match=says) as error:
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)     # as on import
            read(written(tmp_path / "x.png", content))
        assert not warned and str(error.value).startswith(f"{tmp_path}/x.png: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("failures, delays", [(2, [1, 3]), (9, [1, 3, 10])])
def test_transient_errors_of_a_file_server_are_retried(tmp_path, monkeypatch, failures, delays):
    waits, path = [], tmp_path / "x.png"
    save(picture(1), path)
    answers = [OSError(errno.ESTALE, "Stale file handle")] * failures + [open(path, "rb")]
    monkeypatch.setattr(images, "_open", Mock(side_effect=answers))
    monkeypatch.setattr(images.time, "sleep", waits.append)
    with pytest.raises(UserError, match="x.png: .*Stale") if failures == 9 else contextlib.nullcontext():
        assert np.array_equal(read_photo(path), picture(1))
    assert waits == delays


def test_palette_labels_are_read_as_class_ids(tmp_path):
    for bits in (2, 8):
        image = numbers(0)
        image.putpalette([200, 9, 9, 3, 200, 3, 0, 0, 255, 1, 2, 3])
        image.save(tmp_path / "x.png", bits=bits)
        assert np.array_equal(read_label(tmp_path / "x.png", 4), numbers(0))


