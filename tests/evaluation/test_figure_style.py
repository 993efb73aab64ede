"""Colours of figures: seen on either page, in a grey print, and by the colour-blind."""

import itertools

import numpy as np
import pytest

from deradiff.evaluation.figures.style import COLOURS, DARK_COLOURS, DARK_INK, INK

WHITE = "#ffffff"
DARK_PAGE = "#12161c"

TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
"""From linear sRGB, white D65."""

COLOUR_BLIND = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
"""Linear sRGB as it looks to eyes without one kind of cones. Machado, Oliveira, Fernandes 2009."""


def linear(colour):
    """Linear sRGB (3,) of #rrggbb."""
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """The contrast of two colours as WCAG 2 has it."""
    luminances = sorted(TO_XYZ[1] @ linear(colour) for colour in (one, other))
    return (luminances[1] + 0.05) / (luminances[0] + 0.05)


def lab(rgb):
    """CIELAB (3,) of linear sRGB."""
    ratios = TO_XYZ @ rgb / (TO_XYZ @ np.ones(3))
    x, y, z = np.where(ratios > 0.008856, np.cbrt(ratios), 7.787 * ratios + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(
    ("colours", "page"),
    [([INK, *COLOURS], WHITE), ([DARK_INK, *DARK_COLOURS], DARK_PAGE)],
    ids=["light", "dark"],
)
def test_every_colour_stands_out_from_its_page(colours, page):
    assert min(contrast(colour, page) for colour in colours) >= 3


@pytest.mark.parametrize("colours", [COLOURS, DARK_COLOURS], ids=["light", "dark"])
def test_every_two_colours_differ_in_a_grey_print(colours):
    lightness = sorted(lab(linear(colour))[0] for colour in colours)
    assert np.diff(lightness).min() > 7


@pytest.mark.parametrize("colours", [COLOURS, DARK_COLOURS], ids=["light", "dark"])
@pytest.mark.parametrize("eyes", [None, *COLOUR_BLIND])
def test_every_two_colours_differ_for_the_colour_blind(colours, eyes):
    matrix = np.eye(3) if eyes is None else np.array(COLOUR_BLIND[eyes])
    seen = [lab(np.clip(matrix @ linear(colour), 0, 1)) for colour in colours]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 20
