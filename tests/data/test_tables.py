"""Tables of every kind, opened."""

import numpy as np

from deradiff.data.pairs import CaptionedImages
from tests.support.tables import png


def test_a_folder_of_captioned_images(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(50 * i))
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "caption": "dark"}\n{"file_name": "1.png", "caption": "light"}\n'
    )
    images = CaptionedImages(str(tmp_path))
    assert sorted(images.captions) == ["dark", "light"]
    (light,) = images.images(images.captions.index("light"))
    assert np.asarray(light).max() == 50
