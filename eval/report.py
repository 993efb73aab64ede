"""report.html: one file that needs no network, for a person to read."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from PIL import Image

from eval.errors import RANGES
from eval.pairing import GROUP, short
from eval.samples import BENCH
from eval.tables import Table, bench, number

GRID_IMAGES, GRID_PROMPTS = 240, 8  # in all, and in each grid at most: the file stays under a few megabytes
SMALLEST, LARGEST = 128, 256  # pixels of a picture's longest side in the report


def data_uri(file: str) -> str:
    """An image file as a JPEG inside a URI, brought to 128 to 256 pixels."""
    image = Image.open(file).convert("RGB")
    side = min(max(*image.size, SMALLEST), LARGEST)
    size = (max(1, round(image.width * side / max(image.size))), max(1, round(image.height * side / max(image.size))))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def grids(samples: pd.DataFrame) -> list[dict[str, Any]]:
    """Pictures, prompts down and lambdas across, a grid for each anchor, mode and way of sampling, that of the most lambdas first."""
    models = sorted(samples.groupby(["anchor", "mode", *BENCH], sort=False), key=lambda model: -model[1]["lam"].nunique())
    across = sum(rows["lam"].nunique() for _, rows in models)
    count = max(1, min(GRID_PROMPTS, GRID_IMAGES // across))
    found, left = [], GRID_IMAGES
    for key, rows in models:
        lambdas = sorted(rows["lam"].unique())
        first = rows[rows["seed"] == rows["seed"].min()]
        lines = []
        by_prompt = list(first.groupby("prompt_id", sort=False))
        for _, images in by_prompt[:: math.ceil(len(by_prompt) / count)]:  # spread out: neighbours are often alike
            if left < len(lambdas):
                break
            left -= len(lambdas)
            files = dict(zip(images["lam"], images["file"]))
            uris = [data_uri(files[lam]) if lam in files else None for lam in lambdas]
            lines.append({"prompt": images["prompt"].iloc[0], "uris": uris})
        title = f"{short(key[0])}, mode {key[1]}, {bench(dict(zip(BENCH, key[2:])))}"
        beta = rows["beta"].iloc[0]
        heads = [{"lam": f"{lam:g}", "says": _says(lam, beta)} for lam in lambdas]
        found.append({"title": title, "heads": heads, "lines": lines, "prompts": rows["prompt_id"].nunique()})
    return found


def _says(lam: float, beta: float | None) -> str:
    if lam == 0:
        return "reference"
    aimed = "" if beta is None or pd.isna(beta) else f"beta {beta / lam:,.6g}"
    return f"anchor, {aimed}".rstrip(", ") if lam == 1 else aimed


def verdict(summary: pd.DataFrame, missing: list[str]) -> str:
    """The first sentence of the report: how close, how much closer than doing nothing, and what may not be claimed."""
    if summary.empty:
        why = f" ({missing[0]})" if missing else ""
        return f"Nothing to compare yet: no realigned model has its target, aligned from scratch, among the samples{why}."
    name = next(r for r in RANGES if (summary["range"] == r).any())
    mode = "exact" if (summary["mode"] == "exact").any() else summary["mode"].iloc[0]
    rows = summary[(summary["range"] == name) & (summary["mode"] == mode)]
    own, idle = rows[rows["what"] == "realigned"], rows[rows["what"] == "anchor as is"]
    clear = own["share"].notna().any()
    column = "share" if clear else "percent_of_mean"
    unit = "of the way from the reference to it" if clear else "of its mean score"
    text = f"For {name}, a realigned model misses the model aligned from scratch by {_span(own, column)} {unit}"
    cells, kept = int(own["cells"].sum()), int(own["clear_cells"].sum()) if clear else int(own["cells"].sum())
    left_out = f" ({cells - kept} more have a distance that is not clear of 0)" if kept < cells else ""
    text += f", on average over {kept} comparisons{left_out}"
    text += f"; the anchor left as it is would miss by {_span(idle, column)}." if idle[column].notna().any() else "."
    floored, under = int(own["cells_with_floor"].sum()), int(own["cells_under_floor"].sum())
    if floored:
        return f"{text} {under} of {floored} errors lie under the seed floor, the difference that a second training seed makes."
    return f"{text} No second training seed of a target was given, so how much of this is training noise is not known."


def _span(rows: pd.DataFrame, column: str) -> str:
    rows = rows[rows[column].notna()].sort_values(column)
    low, high = rows.iloc[0], rows.iloc[-1]
    if len(rows) == 1:
        return f"{number(low[column])} % ({low['scorer']})"
    return f"{number(low[column])} % ({low['scorer']}) to {number(high[column])} % ({high['scorer']})"


def render(
    title: str,
    samples: pd.DataFrame,
    scorers: list[dict[str, str]],
    tables: dict[str, Table],
    figures: dict[str, str],
    missing: list[str],
) -> str:
    """The report. Prompts, paths and labels are others' text: all of it is escaped; only our own SVG goes in as markup."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=folder, autoescape=True, **options)
    return environment.get_template("report.html.j2").render(
        title=title,
        verdict=verdict(tables["summary"].data, missing),
        counts={"models": len(samples.drop_duplicates(GROUP)), "images": len(samples), "prompts": samples["prompt_id"].nunique()},
        grids=grids(samples),
        figures={name: Markup(svg) for name, svg in figures.items()},
        tables=tables,
        missing=missing,
        scorers=scorers,
    )
