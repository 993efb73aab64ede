"""What is being trained, as a picture: prompts down, lambdas across."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw

from deradiff.anchors.anchor import Anchor
from deradiff.realignment.context import realign

LINE = 14  # pixels of a line of text
LARGEST = 256  # pixels of a cell's side


def sample_panel(
    pipe: Any,
    anchor: Anchor,
    prompts: Sequence[str],
    lambdas: Sequence[float],
    *,
    resolution: int,
    steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Image.Image:
    """One image for each prompt and lambda, all lambdas of a prompt on the same noise, drawn from generators of its own.

    pipe: the reference's pipeline. Epsilon models are sampled with Euler ancestral, flow models with the pipeline's own sampler.
    """
    from diffusers import EulerAncestralDiscreteScheduler

    if "beta_schedule" in pipe.scheduler.config:
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "height": resolution,
        "width": resolution,
    }
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    rows: list[list[Image.Image]] = []
    with warnings.catch_warnings(), realign(pipe, anchor, lambdas[0]) as dial:
        warnings.simplefilter("ignore")  # beyond the anchor on purpose
        for i, prompt in enumerate(prompts):
            rows.append([])
            for lam in lambdas:
                dial.lam = lam
                rows[-1] += pipe(
                    prompt, generator=torch.Generator().manual_seed(seed + i), **options
                ).images
    return tile(rows, prompts, [f"lambda {lam:g}" for lam in lambdas])


def tile(
    rows: Sequence[Sequence[Image.Image]], left: Sequence[str], top: Sequence[str]
) -> Image.Image:
    """Images in rows, a line of text above each row and above each column."""
    side = min(LARGEST, max(96, rows[0][0].width))
    sheet = Image.new("RGB", (side * len(top), LINE + (side + LINE) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, text in enumerate(top):
        draw.text((j * side + 3, 1), text, fill="black")
    for i, row in enumerate(rows):
        y = LINE + i * (side + LINE)
        draw.text((3, y + 1), left[i], fill="black")
        for j, image in enumerate(row):
            sheet.paste(
                image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS),
                (j * side, y + LINE),
            )
    return sheet
