"""Cells of tables, as images."""

import io

import pytest
from PIL import Image

from deradiff.image_tables import decode_image


def test_an_image_of_another_mode_becomes_rgb():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 20, 30, 128)).save(buffer, format="PNG")
    assert decode_image({"bytes": buffer.getvalue()}).mode == "RGB"


@pytest.mark.parametrize("cell", [b"not an image", None])
def test_what_is_not_an_image_is_refused(cell):
    with pytest.raises(OSError):
        decode_image(cell)
