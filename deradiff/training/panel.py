"""The panel: images of the anchor in training, prompts down and lambdas across."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils._pytree import tree_map

from deradiff.anchors.anchor import Anchor
from deradiff.models.families import family_of
from deradiff.realignment.context import realign
from deradiff.realignment.dial import BeyondAnchorWarning

LINE = 14  # pixels of a line of text
SMALLEST = 96  # pixels of a cell's side, at least
LARGEST = 256  # and at most

Row = dict[str, Any]
"""A prompt, encoded: arguments of the pipeline's call."""


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str], guidance_scale: float) -> list[Row]:
    """Prompts as `sample_panel` takes them, so that no text encoder is needed any more.

    Args:
        pipe: a pipeline with its text encoders.
        prompts: one a row of the panel.
        guidance_scale: of the panel.

    Returns:
        A row of the pipeline's arguments for each prompt, on the CPU.
    """
    family = family_of(pipe)
    guided = guidance_scale > family.no_guidance
    rows = []
    for prompt in prompts:
        arguments = family.call_arguments(pipe, [prompt], guided)
        rows.append(tree_map(_to_cpu, arguments))
    return rows


def sample_panel(
    pipe: Any,
    anchor: Anchor,
    prompts: Sequence[str],
    rows: Sequence[Row],
    lambdas: Sequence[float],
    *,
    resolution: int,
    steps: int,
    guidance_scale: float,
    seed: int = 0,
) -> Image.Image:
    """One image for each prompt and lambda, as one sheet.

    All lambdas of a prompt start from the same noise, which is drawn from generators of its own.
    Epsilon models are sampled with Euler ancestral, flow models with the pipeline's own sampler.

    Args:
        pipe: the reference's pipeline, whose scheduler is replaced. It needs no text encoders.
        anchor: of the same base model.
        prompts: one a row, for the text above it.
        rows: what `encode_prompts` made of them.
        lambdas: one a column; those above 1 go beyond the anchor.
        resolution: pixels of an image's side.
        steps: of the sampler.
        guidance_scale: as in `encode_prompts`.
        seed: of the first prompt; the others count up from it.
    """
    # How each image is sampled.
    family = family_of(pipe)
    if not family.flow:
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "height": resolution,
        "width": resolution,
        family.guidance_argument: guidance_scale,
        **dict(family.call_options),
        **dict(family.encoded_options),
    }

    # One row of images for each prompt. A lambda above 1 is asked for, so its warning is no news.
    device = getattr(pipe, family.denoiser).device
    sheet: list[list[Image.Image]] = []
    expected = warnings.catch_warnings(action="ignore", category=BeyondAnchorWarning)
    with expected, realign(pipe, anchor, lambdas[0]) as dial:
        for number, row in enumerate(rows):
            arguments = tree_map(partial(_to_device, device=device), row)
            images = []
            for lam in lambdas:
                dial.lam = lam
                generator = torch.Generator().manual_seed(seed + number)
                images += pipe(**arguments, generator=generator, **options).images
            sheet.append(images)
    return tile(sheet, prompts, [f"lambda {lam:g}" for lam in lambdas])


def _to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def tile(
    rows: Sequence[Sequence[Image.Image]], left: Sequence[str], top: Sequence[str]
) -> Image.Image:
    """Images in rows, with a line of text above each row and above each column.

    Args:
        rows: images, as many in each row.
        left: a text for each row.
        top: a text for each column.
    """
    # An empty sheet of square cells, with the line above the columns.
    side = min(LARGEST, max(SMALLEST, rows[0][0].width))
    sheet = Image.new("RGB", (side * len(top), LINE + (side + LINE) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(top):
        draw.text((column * side + 3, 1), text, fill="black")

    # Each row: its line of text, and below it its images.
    for row, images in enumerate(rows):
        y = LINE + row * (side + LINE)
        draw.text((3, y + 1), left[row], fill="black")
        for column, image in enumerate(images):
            cell = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(cell, (column * side, y + LINE))
    return sheet
