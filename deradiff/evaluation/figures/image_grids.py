"""Images for people: grids of prompts and lambdas, small enough to stand inside one file.

And a figure of how a small lambda takes reward hacking back.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from deradiff.anchors.mixtures import BETWEEN_PARTS, anchor_name, short_names
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.figures.style import INK_STYLE, STYLE, line_style
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import SampledModel
from deradiff.evaluation.statistics import paired_bootstrap
from deradiff.evaluation.tables.table import describe_sampling
from deradiff.image_files import read_image

GRID_IMAGES = 240
"""Images of all grids together: the report stays under a few megabytes."""

GRID_PROMPTS = 12
"""Prompts of a grid, at most."""

SMALLEST = 128
LARGEST = 256
"""Pixels of the longest side of an image in the report."""

CELL = 128
"""Pixels of an image in the grid's own file."""

PROMPT_WIDTH = 260
"""Pixels of the column of prompts in the grid's own file."""

GAP = 6
HEAD_HEIGHT = 40
LINE_HEIGHT = 17
LINE_LENGTH = 34
LONGEST_PROMPT = 100
STRIP_PROMPTS = 4


@dataclass(frozen=True)
class GridHead:
    """What stands above a column.

    Attributes:
        lam: lambda; in a grid of several anchors one for each.
        meaning: what it is: the reference, the anchor, or the beta that it aims at.
    """

    lam: str
    meaning: str


@dataclass(frozen=True)
class GridLine:
    """A prompt's images, one for each lambda; None where one was not sampled.

    Attributes:
        prompt: the prompt.
        uris: the images themselves, as `data_uri` makes them.
        files: their paths.
    """

    prompt: str
    uris: Sequence[str | None]
    files: Sequence[str | None]


@dataclass(frozen=True)
class ImageGrid:
    """One anchor's images, prompts down and lambdas across.

    Attributes:
        heading: what its columns lead from and to.
        title: anchor, mode and sampling.
        heads: of the columns.
        lines: of the prompts that are shown.
        start: the column that a slider begins at.
        prompts: how many prompts there are in all.
    """

    heading: str
    title: str
    heads: Sequence[GridHead]
    lines: Sequence[GridLine]
    start: int
    prompts: int


def data_uri(file: str) -> str:
    """An image file as a JPEG inside a URI, brought to 128 to 256 pixels."""
    image = read_image(file)
    longest = max(image.size)
    side = min(max(longest, SMALLEST), LARGEST)
    width = max(1, round(image.width * side / longest))
    height = max(1, round(image.height * side / longest))
    buffer = io.BytesIO()
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    resized.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_grids(samples: pd.DataFrame) -> list[ImageGrid]:
    """A grid for each anchor, mode and way of sampling, that of the most lambdas first.

    A run of several anchors is one grid. All grids together have at most `GRID_IMAGES` images, so
    later ones may have few lines or none.

    Args:
        samples: of `read_samples`.
    """
    # The images of each grid: those of an anchor, or of a run of several anchors
    mixed_runs = set(samples.loc[samples["shares"].notna(), "run"])
    is_mixed = samples["run"].isin(mixed_runs)
    source = samples["anchor"].where(~is_mixed, samples["run"])
    by_grid = samples.groupby([source, "mode", *SAMPLING_COLUMNS], sort=False)
    groups = [(key, rows, _columns(rows)) for key, rows in by_grid]
    groups.sort(key=lambda group: -len(group[2]))

    # How many prompts a grid may show
    column_count = sum(len(columns) for _, _, columns in groups)
    prompts_a_grid = max(1, min(GRID_PROMPTS, GRID_IMAGES // column_count))

    grids = []
    images_left = GRID_IMAGES
    for (_, mode, *sampling), rows, columns in groups:
        # The lines, while there are images left to show
        lines = []
        for images in evenly_spaced_prompts(rows, prompts_a_grid):
            if images_left < len(columns):
                break
            images_left -= len(columns)
            lines.append(_grid_line(images, columns))

        # What stands above them
        description = describe_sampling(dict(zip(SAMPLING_COLUMNS, sampling)))
        names = " and ".join(map(anchor_name, columns[0].anchors))
        lams = [sum(column.lams) for column in columns]
        grid = ImageGrid(
            heading=_heading(columns),
            title=f"{names}, mode {mode}, {description}",
            heads=[column.head for column in columns],
            lines=lines,
            start=lams.index(1) if 1 in lams else len(lams) - 1,
            prompts=rows["prompt_id"].nunique(),
        )
        grids.append(grid)
    return grids


@dataclass(frozen=True)
class _Column:
    """One column of a grid.

    Attributes:
        anchor: the manifest's.
        lam: the manifest's.
        anchors: of the grid.
        lams: lambda of each of these.
        head: what stands above it.
    """

    anchor: str
    lam: float
    anchors: tuple[str, ...]
    lams: tuple[float, ...]
    head: GridHead


def _heading(columns: Sequence[_Column]) -> str:
    """What the columns of a grid lead from and to."""
    if len(columns[0].anchors) > 1:
        return "Mixtures of anchors"
    past = ", and past it" if columns[-1].lam > 1 else ""
    return f"From the reference to the anchor{past}"


def _columns(rows: pd.DataFrame) -> list[_Column]:
    """The columns of a grid: by lambda, and by the share of the first anchor."""
    models = rows.drop_duplicates(["anchor", "lam"]).to_dict("records")

    # The anchors of all columns, in the order in which they come
    anchors: dict[str, None] = {}
    for model in models:
        anchors |= dict.fromkeys(_shares(model))

    # A column a model; of several anchors it says which they are
    short = dict(zip(anchors, short_names(list(anchors))))
    columns = []
    for model in models:
        shares = _shares(model)
        lams = tuple(model["lam"] * shares.get(anchor, 0.0) for anchor in anchors)
        meaning = _meaning(model)
        if len(anchors) > 1 and model["lam"]:
            parts = [f"{lam:.4g} {short[anchor]}" for anchor, lam in zip(anchors, lams) if lam]
            meaning = BETWEEN_PARTS.join(parts).removeprefix("1 ")
        head = GridHead(", ".join(f"{lam:.4g}" for lam in lams), meaning)
        columns.append(_Column(model["anchor"], model["lam"], tuple(anchors), lams, head))
    return sorted(columns, key=lambda column: (column.lam, [-lam for lam in column.lams]))


def _shares(model: Mapping[str, Any]) -> dict[str, float]:
    """The share of each anchor in a model, which is mostly one."""
    return model["shares"] or {model["anchor"]: 1.0}


def _grid_line(images: pd.DataFrame, columns: Sequence[_Column]) -> GridLine:
    """One prompt's images."""
    file_of = dict(zip(zip(images["anchor"], images["lam"]), images["file"]))
    files = [file_of.get((column.anchor, column.lam)) for column in columns]
    uris = [None if file is None else data_uri(file) for file in files]
    return GridLine(images["prompt"].iloc[0], uris, files)


def evenly_spaced_prompts(rows: pd.DataFrame, count: int) -> list[pd.DataFrame]:
    """The first seed's images of at most `count` prompts.

    The prompts are spread over all of them: neighbours in a list are often alike.

    Args:
        rows: samples of one model at several lambdas.
        count: of prompts.

    Returns:
        A table of images for each prompt.
    """
    first_seed = rows[rows["seed"] == rows["seed"].min()]
    by_prompt = [images for _, images in first_seed.groupby("prompt_id", sort=False)]
    return by_prompt[:: math.ceil(len(by_prompt) / count)]


def _meaning(model: Mapping[str, Any]) -> str:
    """What a lambda is, for the head of its column."""
    if model["lam"] == 0:
        return "reference"
    beta = model["beta_target"]
    target = "" if beta is None or pd.isna(beta) else f"beta {beta:,.6g}"
    if model["is_own"]:
        return f"anchor, {target}" if target else "anchor"
    return target


def grid_svg(grid: ImageGrid) -> str:
    """A grid as an SVG that stands alone.

    Prompts are others' text: they are escaped, and cut to a length.

    Args:
        grid: the grid.
    """
    width = PROMPT_WIDTH + len(grid.heads) * (CELL + GAP)
    meanings = [head.meaning.split(BETWEEN_PARTS) for head in grid.heads]
    head_height = HEAD_HEIGHT + LINE_HEIGHT * (max(map(len, meanings)) - 1)
    height = head_height + len(grid.lines) * (CELL + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-size="13" '
        "font-family=\"system-ui, 'DejaVu Sans', sans-serif\" "
        f'fill="currentColor">{INK_STYLE}'
    ]

    # The heads of the columns
    for column, head in enumerate(grid.heads):
        x = PROMPT_WIDTH + column * (CELL + GAP)
        parts.append(f'<text x="{x}" y="14" font-weight="bold">lam {escape(head.lam)}</text>')
        for number, meaning in enumerate(meanings[column]):
            y = 31 + LINE_HEIGHT * number
            parts.append(f'<text x="{x}" y="{y}">{escape(meaning)}</text>')

    # A line a prompt
    for row, line in enumerate(grid.lines):
        y = head_height + row * (CELL + GAP)
        parts += _prompt_svg(line.prompt, y)
        for column, uri in enumerate(line.uris):
            x = PROMPT_WIDTH + column * (CELL + GAP)
            if uri:
                place = f'x="{x}" y="{y}" width="{CELL}" height="{CELL}"'
                parts.append(f'<image {place} href="{uri}"/>')
    return "".join([*parts, "</svg>"])


def _prompt_svg(prompt: str, y: int) -> list[str]:
    """A prompt in lines beside its images."""
    if len(prompt) > LONGEST_PROMPT:
        prompt = prompt[: LONGEST_PROMPT - 1] + "…"
    lines = []
    for number, words in enumerate(textwrap.wrap(_printable(prompt), LINE_LENGTH)):
        baseline = y + 16 + LINE_HEIGHT * number
        lines.append(f'<text x="0" y="{baseline}">{escape(words)}</text>')
    return lines


def _printable(text: str) -> str:
    """Without the control characters that XML has no way to write."""
    return "".join(c if c.isprintable() else " " for c in text)


def first_grid(comparison: Comparison) -> str:
    """The grid of the most lambdas, as SVG."""
    return grid_svg(image_grids(comparison.samples)[0])


def reversal(comparison: Comparison) -> Figure | None:
    """The anchor of the smallest beta, pulled back from lam = 1 to the reference.

    The figure shows every score's gain, and images below. A gain is the paired difference to the
    reference in standard deviations over prompts, so that all scores share one axis.

    Args:
        comparison: what is compared.

    Returns:
        The figure; None where no anchor was sampled at 0, at 1 and between.
    """
    samples = comparison.samples
    is_shown = samples["realigned"] & samples["lam"].between(0, 1)
    models = samples[is_shown].sort_values("beta", kind="stable")
    keys = [*SAMPLING_COLUMNS, "beta", "anchor", "mode"]
    for _, rows in models.groupby(keys, sort=False, dropna=False):
        lams = sorted(rows["lam"].unique(), reverse=True)
        if len(lams) > 2 and {0, 1} <= set(lams):
            return _draw_reversal(comparison, rows, lams)
    return None


def _draw_reversal(comparison: Comparison, rows: pd.DataFrame, lams: Sequence[float]) -> Figure:
    prompts = evenly_spaced_prompts(rows, STRIP_PROMPTS)[:STRIP_PROMPTS]
    with matplotlib.rc_context(STYLE):
        size = (1.35 * len(lams) + 1, 3.4 + 1.3 * len(prompts))
        figure = Figure(figsize=size, layout="constrained")
        heights = [2.6, *[1] * len(prompts)]
        grid = figure.add_gridspec(1 + len(prompts), len(lams), height_ratios=heights)

        # The gains, above the columns of the images
        panel = figure.add_subplot(grid[0, :])
        _draw_gains(panel, comparison, rows, lams)
        panel.set_xlim(-0.5, len(lams) - 0.5)
        panel.set_xticks(range(len(lams)), [f"lam {lam:g}" for lam in lams])
        panel.set_ylabel("above the reference (SD over prompts)")
        name = anchor_name(rows["anchor"].iloc[0])
        panel.set_title(f"{name}, from the anchor back to the reference")
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))

        # The images
        for line, images in enumerate(prompts, start=1):
            files = dict(zip(images["lam"], images["file"]))
            for column, lam in enumerate(lams):
                place = figure.add_subplot(grid[line, column])
                place.axis("off")
                if lam in files:
                    image = read_image(files[lam])
                    image.thumbnail((CELL, CELL))
                    # Unclipped: the id of a clip path follows from coordinates, whose last bits
                    # differ from run to run, and with them would the bytes of the file
                    place.imshow(np.asarray(image), interpolation="none", clip_on=False)
        return figure


def _draw_gains(
    panel: Axes, comparison: Comparison, rows: pd.DataFrame, lams: Sequence[float]
) -> None:
    """Each score's gain over the reference, which is the last of the lambdas."""
    # The models in the order of the columns
    by_lam: dict[float, SampledModel] = {}
    for row in rows.drop_duplicates("lam").to_dict("records"):
        by_lam[row["lam"]] = SampledModel.of_row(row)
    models = [by_lam[lam] for lam in lams]
    reference = len(models) - 1

    def gain(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return means[..., 0] - means[..., 1]

    # A line a scorer, with its band
    columns: Any = range(len(lams))
    for index, scorer in enumerate(comparison.scorers):
        paired = comparison.per_prompt(models, scorer)[0]
        scale = paired[reference].std() or 1.0
        gains = []
        for i in range(len(models)):
            values = paired[[i, reference]].to_numpy() / scale
            gains.append(paired_bootstrap(values, gain))
        style = line_style(index)
        panel.plot(columns, [estimate.value for estimate in gains], label=scorer, **style)
        low = [estimate.low for estimate in gains]
        high = [estimate.high for estimate in gains]
        panel.fill_between(columns, low, high, color=style["color"], alpha=0.15, lw=0)
