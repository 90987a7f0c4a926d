from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.errors import NotAnImage, TooLarge
from service.gateway.imaging import decode, from_base64, grid

GREY, COLOUR = (28, 28, 1), (28, 28, 3)
LIMIT = 4_000_000


def encoded(picture: Image.Image, encoding: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    picture.save(out, encoding, **options)
    return out.getvalue()


def pixels(data: bytes, shape: tuple[int, int, int] = GREY) -> np.ndarray:
    return np.frombuffer(decode(data, shape, LIMIT, "image"), np.uint8).reshape(shape)


def noise(height: int, width: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8).squeeze()


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels, with a tiny body."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


def webp_bomb() -> bytes:
    """A WebP whose extended header promises 16384 x 16384 pixels."""
    side = (16384 - 1).to_bytes(3, "little")
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + side + side
    vp8l = b"VP8L" + struct.pack("<I", 6) + b"\x2f\0\0\0\0\0"
    return b"RIFF" + struct.pack("<I", 4 + len(vp8x) + len(vp8l)) + b"WEBP" + vp8x + vp8l


@pytest.mark.parametrize("encoding", ["PNG", "WEBP"])
def test_the_right_size_is_passed_on_untouched(encoding: str) -> None:
    grey, colour = noise(28, 28), noise(28, 28, 3)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey), encoding, lossless=True))[..., 0], grey)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(colour), encoding, lossless=True), COLOUR), colour)


def test_jpeg_is_read() -> None:
    flat = np.full((28, 28), 90, np.uint8)
    np.testing.assert_allclose(pixels(encoded(Image.fromarray(flat), "JPEG"))[..., 0], flat, atol=2)


def test_colour_becomes_grey_and_grey_colour() -> None:
    red = Image.new("RGB", (28, 28), (255, 0, 0))
    assert set(pixels(encoded(red)).flat) == {76}
    assert set(pixels(encoded(Image.new("L", (28, 28), 9)), COLOUR).flat) == {9}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_black(mode: str) -> None:
    picture = Image.new("RGBA", (28, 28), (255, 255, 255, 255))
    picture.paste((255, 255, 255, 0), (0, 0, 14, 28))
    got = pixels(encoded(picture.convert(mode)))
    assert got[:, :14].max() == 0
    assert got[:, 14:].min() == 255


def test_sixteen_bit_grey_keeps_its_upper_bits() -> None:
    wide = (noise(28, 28).astype(np.uint16) << 8) + 255
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(wide)))[..., 0], wide >> 8)


def upside_down(kind: str) -> tuple[bytes, NDArray[np.uint8]]:
    """A picture that says it is turned by 180 degrees, and how it should look."""
    left = np.zeros((28, 28), np.uint8)
    left[:, :14] = 200
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(Image.fromarray(left), kind, exif=exif), left[::-1, ::-1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_honoured(kind: str) -> None:
    data, wanted = upside_down(kind)
    np.testing.assert_allclose(pixels(data)[..., 0], wanted, atol=0 if kind == "PNG" else 12)


def test_a_png_may_tell_its_orientation_after_its_pixels() -> None:
    data, wanted = upside_down("PNG")
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    assert start < data.index(b"IDAT")
    moved = data[:start] + data[end:last] + data[start:end] + data[last:]
    np.testing.assert_array_equal(pixels(moved)[..., 0], wanted)


@pytest.mark.parametrize(("width", "height"), [(56, 56), (14, 14), (280, 28), (28, 280), (3000, 1), (1, 1)])
def test_another_size_is_scaled_to_fit_and_centred_on_black(width: int, height: int) -> None:
    got = pixels(encoded(Image.new("L", (width, height), 200)))[..., 0]
    lit = np.argwhere(got)
    (top, left), (bottom, right) = lit.min(0), lit.max(0) + 1
    scale = 28 / max(width, height)
    assert (right - left, bottom - top) == (max(1, round(width * scale)), max(1, round(height * scale)))
    assert abs(top - (28 - bottom)) <= 1
    assert abs(left - (28 - right)) <= 1
    assert set(got[got > 0]) == {200}


def test_scaling_averages_instead_of_dropping_pixels() -> None:
    stripes = np.zeros((280, 280), np.uint8)
    stripes[::2] = 200
    inner = pixels(encoded(Image.fromarray(stripes)))[4:-4, 4:-4, 0]
    np.testing.assert_allclose(inner, 100, atol=4)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"GIF89a" + bytes(60), b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", png_bomb(28, 28)],
    ids=["empty", "text", "gif", "stub", "postscript", "truncated"],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(NotAnImage) as caught:
        decode(data, GREY, LIMIT, "images.2")
    assert caught.value.field == "images.2"


def test_real_gif_and_truncated_jpeg_are_refused() -> None:
    picture = Image.fromarray(noise(280, 280))
    for data in (encoded(picture, "GIF"), encoded(picture, "TIFF"), encoded(picture, "JPEG")[:3000]):
        with pytest.raises(NotAnImage):
            decode(data, GREY, LIMIT, "image")


@pytest.mark.parametrize(
    "bomb", [png_bomb(2001, 2000), png_bomb(12_000, 12_000), png_bomb(60_000, 60_000), webp_bomb()]
)
def test_a_decompression_bomb_is_refused_by_its_header(bomb: bytes) -> None:
    with pytest.raises(TooLarge, match="4000000 pixels") as caught:
        decode(bomb, GREY, LIMIT, "image")
    assert caught.value.field == "image"


def test_base64_with_line_breaks_and_data_urls() -> None:
    raw = bytes(range(256))
    text = b64encode(raw).decode()
    assert from_base64(text[:76] + "\n" + text[76:], "image") == raw
    assert from_base64("data:image/png;base64," + text, "image") == raw


@pytest.mark.parametrize("text", ["%%%%", "abc", "é" * 4, "_-_-"])
def test_bad_base64_is_refused(text: str) -> None:
    with pytest.raises(NotAnImage, match="base64"):
        from_base64(text, "image")


@pytest.mark.parametrize("encoding", ["png", "webp"])
@pytest.mark.parametrize(("n", "columns", "rows"), [(2, 2, 1), (5, 3, 2), (9, 3, 3), (64, 8, 8)])
def test_grid_places_every_tile(encoding: str, n: int, columns: int, rows: int) -> None:
    sheet = Image.open(BytesIO(grid([encoded(Image.new("L", (4, 6), i + 1)) for i in range(n)], encoding)))
    assert sheet.format == encoding.upper()
    assert sheet.size == (columns * 4, rows * 6)
    grey = np.asarray(sheet.convert("L"))
    for i in range(n):
        y, x = i // columns * 6, i % columns * 4
        assert set(grey[y : y + 6, x : x + 4].flat) == {i + 1}
