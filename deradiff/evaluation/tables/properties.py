"""What every model's images are like."""

from __future__ import annotations

import pandas as pd

from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.pairing import SampledModel, by_model, per_prompt
from deradiff.evaluation.tables.means import gain_of, mean_of, reference_of, sorted_rows
from deradiff.evaluation.tables.table import LAM, NO_ESTIMATE, SAMPLED, Column, ResultTable, Row

TITLE = "What the images are like"

NOTE = """These are not scores: more is not better. They show what changes first where a reward is
hacked. Values: means over prompts. Change: the paired difference to lam = 0. Brackets: 95 %
bootstrap intervals over prompts. Diversity: the mean distance between the images of a prompt, over
pairs of seeds; it falls where all of them become alike. Edges: the mean steepness of the luminance.
Saturation: that of HSV. Colour entropy: of the histogram of colours, eight levels a channel. Images
larger than 256 pixels are averaged down first. Units: """

COLUMNS = (
    Column("property"),
    Column("anchor", text=lambda row: anchor_name(row["anchor"])),
    Column("beta"),
    LAM,
    Column("mode"),
    SAMPLED,
    Column("prompts", text=lambda row: str(row["prompts"])),
    Column("value", "mean"),
    Column("change from the reference", "change"),
)


def image_properties(comparison: Comparison) -> ResultTable:
    """Every model's properties, and how far they are from the reference's.

    A row a property and model; no row where none was measured.
    """
    properties = comparison.properties
    if properties is None:
        return ResultTable.from_rows("properties", TITLE, "", [], COLUMNS)
    betas = dict(zip(comparison.samples["anchor"], comparison.samples["beta"]))
    rows = []
    for name in properties.units:
        own = properties.values[properties.values["property"] == name]
        values = by_model(own.rename(columns={"property": "scorer", "value": "score"}))
        by_property = []
        for model in values:
            row = _row(name, model, values)
            if row:
                by_property.append(row | {"beta": betas[model.anchor]})
        rows += sorted_rows(by_property)

    units = "; ".join(f"{name} {unit}" for name, unit in properties.units.items())
    note = f"{NOTE}{units}."
    if properties.missing:
        note += f" {properties.missing[0].upper()}{properties.missing[1:]}."
    return ResultTable.from_rows("properties", TITLE, note, rows, COLUMNS)


def _row(name: str, model: SampledModel, values: dict[SampledModel, pd.DataFrame]) -> Row:
    """One property of one model; empty where it has no image of the reference's."""
    reference = reference_of(model, list(values))
    compared = [model] if reference is None else [model, reference]
    paired, images = per_prompt(values, compared, name)
    if not images:
        return {}
    return {
        "property": name,
        **model._asdict(),
        "prompts": len(paired),
        "mean": mean_of(paired),
        "change": NO_ESTIMATE if reference is None else gain_of(paired),
    }
