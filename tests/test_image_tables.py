"""Cells of tables, as images."""

import base64

import pytest
from PIL import Image

from deradiff.image_files import UnreadableImage
from deradiff.image_tables import encode_png, image_of_cell

PNG = encode_png(Image.new("RGB", (4, 4), (10, 20, 30)))


@pytest.mark.parametrize(
    "cell",
    [
        PNG,
        {"bytes": PNG},
        {"bytes": PNG, "path": "elsewhere.png"},
        list(PNG),
        base64.b64encode(PNG).decode(),
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
    ],
    ids=["bytes", "record", "record with path", "list", "base64", "address"],
)
def test_an_image_stands_in_a_cell_in_these_forms(cell):
    assert image_of_cell(cell).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize(
    "cell",
    [
        b"not an image",
        b"",
        "",
        None,
        {"bytes": None},
        {"bytes": None, "path": None},
        {"url": "https://example.org/a.png"},
        [{"bytes": PNG, "path": None}],
        [PNG, PNG],
        [1, 2, 300],
        [[1, 2], [3, 4]],
        3,
        2.5,
        True,
        base64.b64encode(b"not an image").decode(),
    ],
)
def test_what_is_not_an_image_is_refused(cell):
    with pytest.raises(UnreadableImage):
        image_of_cell(cell)


@pytest.mark.parametrize("in_record", [True, False])
@pytest.mark.parametrize("address", ["{}", "file://{}", "../../{}", "https://example.org/a.png"])
def test_a_path_that_stands_in_a_table_is_never_read(tmp_path, in_record, address):
    file = tmp_path / "private.png"
    file.write_bytes(PNG)
    path = address.format(file)
    cell = {"bytes": None, "path": path} if in_record else path
    with pytest.raises(UnreadableImage, match="no file that a table names is read"):
        image_of_cell(cell)
