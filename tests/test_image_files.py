"""Image files of anybody: what is opened, how it becomes RGB, and what is refused."""

import io
import os
import subprocess
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps

from deradiff import image_files
from deradiff.image_files import UnreadableImage, decode_image, read_image

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n%%EOF\n"


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def pixel(image, place=(0, 0)):
    return decode_image(encoded(image)).getpixel(place)


def quarters():
    """An image whose four quarters have different colours."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = (255, 0, 0)
    pixels[8:, :16] = (0, 255, 0)
    pixels[8:, 16:] = (0, 0, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(file_format, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = encoded(quarters(), file_format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    assert np.array_equal(decode_image(file), expected)


def test_a_photograph_with_torn_exif_is_read_as_it_stands():
    file = encoded(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xffnonsense")
    assert decode_image(file).size == (32, 16)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_values(file_format):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    grey = np.asarray(decode_image(encoded(Image.fromarray(ramp), file_format)))
    assert grey.shape == (16, 16, 3)
    assert np.array_equal(grey[..., 0].ravel(), np.arange(256))


def test_what_is_transparent_is_white():
    assert pixel(Image.new("RGBA", (4, 4), (255, 0, 0, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (4, 4), (255, 0, 0, 255))) == (255, 0, 0)
    assert pixel(Image.new("LA", (4, 4), (0, 128))) == (127, 127, 127)

    # A palette with a transparent colour.
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    file = encoded(palette, transparency=0)
    assert decode_image(file).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(file).getpixel((1, 0)) == (10, 20, 30)


def test_inks_become_colours():
    file = encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")
    assert decode_image(file).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_it_is_the_first_image(file_format):
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    file = encoded(
        images[0], file_format, save_all=True, append_images=images[1:], duration=100, **options
    )
    assert decode_image(file).getpixel((0, 0)) == (255, 0, 0)


def test_postscript_is_never_run(monkeypatch):
    """A PostScript file with an endless loop, whatever it is called."""

    def run(*args, **options):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    monkeypatch.setattr(subprocess, "Popen", run)
    with pytest.raises(UnreadableImage, match="none of JPEG, PNG"):
        decode_image(POSTSCRIPT)


@pytest.mark.parametrize("file_format", ["ICO", "PPM", "TGA", "PCX", "JPEG2000"])
def test_other_formats_are_refused(file_format):
    with pytest.raises(UnreadableImage, match="none of JPEG, PNG"):
        decode_image(encoded(Image.new("RGB", (16, 16)), file_format))


def bomb(width, height):
    """A small PNG that says it has many pixels."""
    file = bytearray(encoded(Image.new("L", (1, 1))))
    file[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    return bytes(file)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width", [9000, 12000, 200000])
def test_too_many_pixels_are_refused_before_they_are_decoded(width):
    with pytest.raises(UnreadableImage, match="pixels"):
        decode_image(bomb(width, 9000))


def test_too_many_bytes_are_refused_before_they_are_read(tmp_path, monkeypatch):
    file = tmp_path / "large.png"
    with open(file, "wb") as opened:
        opened.truncate(2**40)
    with pytest.raises(UnreadableImage, match=r"large\.png.*bytes"):
        read_image(file)
    monkeypatch.setattr(image_files, "MOST_BYTES", 10)
    with pytest.raises(UnreadableImage, match="at most 10"):
        decode_image(bytes(11))


def test_a_pipe_and_a_device_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for file in (tmp_path / "pipe.png", "/dev/zero", tmp_path / "none.png", tmp_path):
        with pytest.raises(UnreadableImage, match="no such file"):
            read_image(file)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_torn_file_is_refused_in_one_line(file_format):
    whole = encoded(quarters(), file_format)
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        try:
            decode_image(whole[:length])
        except UnreadableImage as error:
            assert "\n" not in str(error)


def test_values_without_a_known_white_are_refused():
    floats = np.ones((4, 4), np.float32)
    integers = np.full((4, 4), 2**20, np.int32)
    for values in (floats, integers):
        with pytest.raises(UnreadableImage, match="white"):
            decode_image(encoded(Image.fromarray(values), "TIFF"))
