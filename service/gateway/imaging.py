"""Pictures in and out: anything a client sends becomes uint8 HWC bytes of the model's shape.

Rules (docs/api.md): PNG, JPEG and WebP only, the first frame of an animation; the pixel count is read from
the header and checked before anything is decoded; EXIF orientation is applied; transparency is
composited on black; 16-bit grey keeps its upper 8 bits; then L or RGB as the model has 1 or 3
channels. A picture of another size is scaled, aspect kept, to fit the model's size (bilinear with
antialiasing) and centred on black; one of the right size is passed on untouched. The size in bytes
is bounded by the limit on the request body (middleware.BodyLimit).
"""

from __future__ import annotations

import base64
import binascii
import math
import warnings
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from starlette.concurrency import run_in_threadpool

from models.api import ImageFormat
from service.errors import NotAnImage, TooLarge

FORMATS = ("PNG", "JPEG", "WEBP")
CHANNEL_MODES = {1: "L", 3: "RGB"}
SMALL = 32_768  # bytes as sent
ORIENTED = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where Pillow looks for an orientation
MAGIC: dict[ImageFormat, bytes] = {"png": b"\x89PNG", "webp": b"RIFF", "npy": b"\x93NUMPY"}

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def from_base64(text: str, field: str) -> bytes:
    """Bytes of standard base64, white space and a `data:...;base64,` prefix allowed; NotAnImage otherwise."""
    if text.startswith("data:"):
        text = text.partition(";base64,")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise NotAnImage(f"{field} is not valid base64", field=field) from None


def decode(data: bytes, shape: tuple[int, int, int], max_pixels: int, field: str) -> bytes:
    """uint8 HWC bytes of `shape` (height, width, channels) from an encoded picture.

    Raises:
        NotAnImage: not a PNG, JPEG or WebP picture, or a broken one.
        TooLarge: more than `max_pixels` pixels by its header; nothing was decoded.
    """
    height, width, channels = shape
    if not data:
        raise NotAnImage(f"{field} is empty", field=field)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise _too_many_pixels(field, max_pixels)
            picture.load()  # a PNG may tell its orientation after its pixels
            upright = ImageOps.exif_transpose(picture) if ORIENTED & picture.info.keys() else picture
            plain = _flatten(upright, CHANNEL_MODES[channels])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(field, max_pixels) from None
    except TooLarge:
        raise
    except Exception as error:  # Pillow's parsers raise whatever they stumble over
        reason = "no PNG, JPEG or WebP picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise NotAnImage(f"{field} cannot be read: {reason}", field=field) from None
    return _fit(plain, width, height).tobytes()


def decode_all(encoded: Sequence[tuple[str, bytes | str]], shape: tuple[int, int, int], max_pixels: int) -> list[bytes]:
    """`decode` for (field name, bytes or base64 text) pairs; large ones are slow enough to belong on a thread."""
    return [
        decode(from_base64(data, field) if isinstance(data, str) else data, shape, max_pixels, field)
        for field, data in encoded
    ]


async def decoded(
    encoded: Sequence[tuple[str, bytes | str]], shape: tuple[int, int, int], max_pixels: int
) -> list[bytes]:
    """`decode_all`, on a thread unless it is done sooner than a thread wakes up."""
    if sum(len(data) for _, data in encoded) <= SMALL:
        return decode_all(encoded, shape, max_pixels)
    return await run_in_threadpool(decode_all, encoded, shape, max_pixels)


def encoding_of(data: bytes) -> ImageFormat:
    """How a worker's image is encoded, by its first bytes."""
    return next((name for name, magic in MAGIC.items() if data.startswith(magic)), "png")


def grid(images: Sequence[bytes], encoding: str) -> bytes:
    """Equally sized encoded images (png, webp, npy) side by side, row by row, as near to square as can be; lossless.

    Args:
        encoding: `png` or `webp`.
    """
    tiles = [_opened(data) for data in images]
    columns = math.ceil(math.sqrt(len(tiles)))
    width, height = tiles[0].size
    sheet = Image.new(tiles[0].mode, (columns * width, math.ceil(len(tiles) / columns) * height))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    out = BytesIO()
    sheet.save(out, encoding, **({"lossless": True} if encoding == "webp" else {}))
    return out.getvalue()


def _opened(data: bytes) -> Image.Image:
    if encoding_of(data) == "npy":
        pixels = np.load(BytesIO(data), allow_pickle=False)
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return Image.open(BytesIO(data), formats=FORMATS)


def _too_many_pixels(field: str, limit: int) -> TooLarge:
    return TooLarge(f"{field} has more than {limit} pixels", field=field)


def _flatten(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I"):
        wide = np.asarray(picture).clip(0, 2**16 - 1)
        picture = Image.fromarray((wide >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB")
    return picture.convert(mode)


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    if picture.size == (width, height):
        return picture
    scale = min(width / picture.width, height / picture.height)
    size = (min(width, max(1, round(picture.width * scale))), min(height, max(1, round(picture.height * scale))))
    sheet = Image.new(picture.mode, (width, height))
    sheet.paste(picture.resize(size, Image.Resampling.BILINEAR), ((width - size[0]) // 2, (height - size[1]) // 2))
    return sheet
