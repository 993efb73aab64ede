"""Image files of anybody, opened as RGB: the one place where encoded images are decoded.

Pillow knows many more formats than images have, and hands one of them (EPS) to a program that runs
it. Here a file has one of the formats that photographs and data sets have, and bounded numbers of
bytes and pixels, or it is refused.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from deradiff.text_files import LFS_POINTER

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What may be opened, in Pillow's names."""

MOST_BYTES = 2**28
"""Of an encoded image: 256 MiB."""

MOST_PIXELS = 2**26
"""Of a decoded one: 8192 x 8192."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its orientation in EXIF."""

PNG_START = b"\x89PNG\r\n\x1a\n"

WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of grey values of more than 8 bits."""


class UnreadableImage(ValueError):
    """What is no image, or none that is opened here; the message says why."""


def read_image(file: str | Path) -> Image.Image:
    """The image in a file; see `decode_image`.

    Args:
        file: a file of this machine.

    Raises:
        UnreadableImage: for what is no such image; the message names the file.
    """
    file = Path(file)
    try:
        # A device or a pipe would be read for ever.
        if not file.is_file():
            raise UnreadableImage("there is no such file")
        _check_bytes(file.stat().st_size)
        return decode_image(file.read_bytes())
    except (UnreadableImage, OSError) as error:
        raise UnreadableImage(f"{file} is no image that can be read: {error}") from error


def decode_image(encoded: bytes) -> Image.Image:
    """An encoded image as RGB, upright and on white.

    The orientation that EXIF says is applied. Grey values of 16 bits are brought to 8. Transparent
    parts become white. Of an animation it is the first image. Colour profiles are not applied.

    Args:
        encoded: the content of an image file.

    Raises:
        UnreadableImage: for what is no image of one of `FORMATS`, or is torn or too large.
    """
    _check_bytes(len(encoded))
    if encoded.startswith(LFS_POINTER):
        raise UnreadableImage("it is a Git LFS pointer: run git lfs pull in its folder")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UnreadableImage(
                    f"it has {image.width} x {image.height} pixels, and at most {MOST_PIXELS} "
                    "(8192 x 8192) are read"
                )
            image.load()
            return _upright(_on_white(image), image)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        names = ", ".join(FORMATS)
        raise UnreadableImage(f"it is none of {names}, or is torn") from error
    # For what is torn Pillow raises OSError, ValueError, SyntaxError, struct.error and others.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UnreadableImage(reason or type(error).__name__) from error


def is_whole_png(file: Path) -> bool:
    """Whether a file is a PNG whose every part is as it was written, by the checksums in it."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return False
    if not data.startswith(PNG_START):
        return False

    # Parts: length, name, content, and a checksum of name and content. IEND is the last one.
    start = len(PNG_START)
    while len(data) >= start + 12:
        end = start + 8 + int.from_bytes(data[start : start + 4])
        name = data[start + 4 : start + 8]
        if int.from_bytes(data[end : end + 4]) != zlib.crc32(data[start + 4 : end]):
            return False
        start = end + 4
        if name == b"IEND":
            return start == len(data)
    return False


def _check_bytes(count: int) -> None:
    """Raise UnreadableImage for more bytes than an image has."""
    if count > MOST_BYTES:
        raise UnreadableImage(f"it has {count} bytes, and at most {MOST_BYTES} are read")


def _on_white(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB."""
    if image.mode in WIDE_MODES:
        return _from_16_bits(image)
    if image.mode == "F":
        raise UnreadableImage(
            "its values are floating-point numbers, of which nobody says which one is white"
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey values of 0 to 65535 as RGB; Pillow alone makes white of all above 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage(
            "its grey values have 32 bits, of which nobody says which one is white"
        )
    grey = (values + 128) // 257
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """An image turned as its file says it is to be seen.

    Args:
        rgb: the image.
        image: as it was opened.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Torn EXIF says nothing; the image beside it is whole.
    except Exception:
        return rgb
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return rgb if turn is None else rgb.transpose(turn)
