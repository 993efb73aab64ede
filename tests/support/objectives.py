"""Diffusion-DPO objectives on tiny pipelines, and the examples that they are given."""

from __future__ import annotations

from typing import Any

import torch

from deradiff.anchors.anchor import AnchorCard
from deradiff.data.pairs import CaptionedImages, Examples, Item
from deradiff.models.families import family_of
from deradiff.training.objectives.diffusion import DPO
from deradiff.worlds import networks
from tests.support.tiny_pipelines import tiny_lora, tiny_pipeline

RESOLUTION = 64


def items(data: CaptionedImages, count: int = 4, epoch: int = 0) -> list[Item]:
    """The first examples of a data set, as training gets them in an epoch."""
    return [Examples(data, seed=0).item(epoch, index) for index in range(count)]


def dpo(
    pipe: Any, method: str, cache: Any = None, dropout: float = 0.0, flip: bool = False, **more: Any
) -> DPO:
    """Diffusion-DPO at beta 500 of what is trained in a tiny pipeline."""
    card = AnchorCard(base_model="x", family="sd15", method=method, beta=500.0)
    return DPO(pipe, RESOLUTION, cache, dropout, flip, **more, card=card)


def make(family: str, method: str, lora_scale: float = 0.0, **options: Any) -> tuple[Any, DPO]:
    """A tiny pipeline with what `method` trains in it, and the objective around it."""
    pipe = tiny_pipeline(family)
    name = family_of(pipe).denoiser
    if method == "lora":
        setattr(pipe, name, tiny_lora(getattr(pipe, name), scale=lora_scale))
    return pipe, dpo(pipe, method, **options)


def disturb(objective: DPO, method: str) -> None:
    """Move the trained weights, as an optimiser step would."""
    with torch.no_grad():
        for name, parameter in objective.network.named_parameters():
            if method == "full" or "lora_" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def small_clip(captions: list[str]) -> tuple[Any, Any, Any]:
    """A CLIP of the shapes world with random weights, its tokenizer and its image processor."""
    tokenizer = networks.make_tokenizer(captions)
    torch.manual_seed(0)
    clip = networks.make_clip(tokenizer, 32, width=32)
    return clip, tokenizer, networks.make_image_processor(32)
