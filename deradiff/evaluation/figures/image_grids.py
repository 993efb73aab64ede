"""Pictures for people: prompts by lambdas, small enough to stand inside one file; and how a small lambda takes reward hacking back."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import escape
from matplotlib.figure import Figure
from PIL import Image

from deradiff.evaluation.figures.style import INK_STYLE, STYLE, look, svg
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import GROUP, Group, per_prompt, short
from deradiff.evaluation.statistics import paired_bootstrap
from deradiff.evaluation.tables.table import bench

GRID_IMAGES, GRID_PROMPTS = (
    240,
    12,
)  # in all, and in each grid at most: the file stays under a few megabytes
SMALLEST, LARGEST = 128, 256  # pixels of a picture's longest side in the report
CELL, WIDTH = 128, 260  # pixels of a picture in the grid's own file, and of the prompts' column
STRIP_PROMPTS = 4


def data_uri(file: str) -> str:
    """An image file as a JPEG inside a URI, brought to 128 to 256 pixels."""
    image = Image.open(file).convert("RGB")
    side = min(max(*image.size, SMALLEST), LARGEST)
    size = (
        max(1, round(image.width * side / max(image.size))),
        max(1, round(image.height * side / max(image.size))),
    )
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def grids(samples: pd.DataFrame) -> list[dict[str, Any]]:
    """Pictures, prompts down and lambdas across, a grid for each anchor, mode and way of sampling, that of the most lambdas first."""
    models = sorted(
        samples.groupby(["anchor", "mode", *SAMPLING_COLUMNS], sort=False),
        key=lambda model: -model[1]["lam"].nunique(),
    )
    across = sum(rows["lam"].nunique() for _, rows in models)
    count = max(1, min(GRID_PROMPTS, GRID_IMAGES // across))
    found, left = [], GRID_IMAGES
    for key, rows in models:
        lambdas = sorted(rows["lam"].unique())
        lines = []
        for images in spread_out(rows, count):
            if left < len(lambdas):
                break
            left -= len(lambdas)
            files = dict(zip(images["lam"], images["file"]))
            uris = [data_uri(files[lam]) if lam in files else None for lam in lambdas]
            lines.append(
                {
                    "prompt": images["prompt"].iloc[0],
                    "uris": uris,
                    "files": [files.get(lam) for lam in lambdas],
                }
            )
        title = f"{short(key[0])}, mode {key[1]}, {bench(dict(zip(SAMPLING_COLUMNS, key[2:])))}"
        beta = rows["beta"].iloc[0]
        heads = [{"lam": f"{lam:g}", "says": _says(lam, beta)} for lam in lambdas]
        start = lambdas.index(1) if 1 in lambdas else len(lambdas) - 1
        found.append(
            {
                "title": title,
                "heads": heads,
                "lines": lines,
                "start": start,
                "prompts": rows["prompt_id"].nunique(),
            }
        )
    return found


def spread_out(rows: pd.DataFrame, count: int) -> list[pd.DataFrame]:
    """The first seed's images of `count` prompts at most, a frame a prompt, spread over all: neighbours in a list are often alike."""
    by_prompt = [
        images
        for _, images in rows[rows["seed"] == rows["seed"].min()].groupby("prompt_id", sort=False)
    ]
    return by_prompt[:: math.ceil(len(by_prompt) / count)]


def _says(lam: float, beta: float | None) -> str:
    if lam == 0:
        return "reference"
    aimed = "" if beta is None or pd.isna(beta) else f"beta {beta / lam:,.6g}"
    return f"anchor, {aimed}".rstrip(", ") if lam == 1 else aimed


def grid_svg(grid: dict[str, Any]) -> str:
    """One grid as a file of its own. Prompts are others' text: escaped, and cut to a line."""
    heads, lines = grid["heads"], grid["lines"]
    width, height = WIDTH + len(heads) * (CELL + 6), 40 + len(lines) * (CELL + 6)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-size="13" '
        f'font-family="system-ui, \'DejaVu Sans\', sans-serif" fill="currentColor">{INK_STYLE}'
    ]
    for column, head in enumerate(heads):
        x = WIDTH + column * (CELL + 6)
        parts.append(
            f'<text x="{x}" y="14" font-weight="bold">lam {escape(head["lam"])}</text><text x="{x}" y="31">{escape(head["says"])}</text>'
        )
    for row, line in enumerate(lines):
        y = 40 + row * (CELL + 6)
        words = line["prompt"] if len(line["prompt"]) <= 100 else line["prompt"][:99] + "…"
        for index in range(0, len(words), 34):
            parts.append(
                f'<text x="0" y="{y + 16 + 17 * (index // 34)}">{escape(_printable(words[index : index + 34]))}</text>'
            )
        for column, uri in enumerate(line["uris"]):
            if uri:
                parts.append(
                    f'<image x="{WIDTH + column * (CELL + 6)}" y="{y}" width="{CELL}" height="{CELL}" href="{uri}"/>'
                )
    return "".join([*parts, "</svg>"])


def _printable(text: str) -> str:
    """Without the control characters that XML has no way to write."""
    return "".join(c if c.isprintable() else " " for c in text)


def reversal(
    samples: pd.DataFrame, groups: dict[Group, pd.DataFrame], scorers: list[str]
) -> str | None:
    """The anchor of the smallest beta, pulled back from lam = 1 to the reference: every score's gain, and pictures below.

    A gain is the paired difference to the reference in standard deviations over prompts, so that all scores share one axis. None
    where no anchor was sampled at 0, 1 and between.
    """
    models = samples[samples["realigned"] & samples["lam"].between(0, 1)].sort_values(
        "beta", kind="stable"
    )
    for _, rows in models.groupby(
        [*SAMPLING_COLUMNS, "beta", "anchor", "mode"], sort=False, dropna=False
    ):
        lambdas = sorted(rows["lam"].unique(), reverse=True)
        if len(lambdas) > 2 and {0, 1} <= set(lambdas):
            own = {
                row["lam"]: tuple(row[key] for key in GROUP)
                for row in rows.drop_duplicates("lam").to_dict("records")
            }
            return _reversal(rows, [own[lam] for lam in lambdas], lambdas, groups, scorers)
    return None


def _reversal(
    rows: pd.DataFrame,
    models: list[Group],
    lambdas: list[float],
    groups: dict[Group, pd.DataFrame],
    scorers: list[str],
) -> str:
    prompts = spread_out(rows, STRIP_PROMPTS)[:STRIP_PROMPTS]
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(1.35 * len(lambdas) + 1, 3.4 + 1.3 * len(prompts)), layout="constrained"
        )
        grid = figure.add_gridspec(
            1 + len(prompts), len(lambdas), height_ratios=[2.6, *[1] * len(prompts)]
        )
        panel = figure.add_subplot(grid[0, :])
        for index, scorer in enumerate(scorers):
            paired = per_prompt(groups, models, scorer)[0]
            scale = paired[len(models) - 1].std() or 1.0
            gains = [
                paired_bootstrap(
                    paired[[i, len(models) - 1]].to_numpy() / scale, lambda m: m[..., 0] - m[..., 1]
                )
                for i in range(len(models))
            ]
            panel.plot(range(len(lambdas)), [g.value for g in gains], label=scorer, **look(index))
            panel.fill_between(
                range(len(lambdas)),
                [g.low for g in gains],
                [g.high for g in gains],
                color=look(index)["color"],
                alpha=0.15,
                lw=0,
            )
        panel.set_xlim(-0.5, len(lambdas) - 0.5)  # over the columns of the pictures
        panel.set_xticks(range(len(lambdas)), [f"lam {lam:g}" for lam in lambdas])
        panel.set_ylabel("above the reference (SD over prompts)")
        panel.set_title(f"{short(rows['anchor'].iloc[0])}, from the anchor back to the reference")
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        for line, images in enumerate(prompts, start=1):
            files = dict(zip(images["lam"], images["file"]))
            for column, lam in enumerate(lambdas):
                place = figure.add_subplot(grid[line, column])
                place.axis("off")
                if lam in files:
                    image = Image.open(files[lam]).convert("RGB")
                    image.thumbnail((CELL, CELL))
                    place.imshow(np.asarray(image), interpolation="none")
        return svg(figure)
