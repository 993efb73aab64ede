"""What is asked of any diffusers pipeline, whether deradiff knows its family or not.

Above all where it keeps the network that predicts noise or velocity. Light: it imports no torch.
"""

from __future__ import annotations

from typing import Any

from deradiff.models.families import class_names, family_of
from deradiff.models.family import Family, unwrapped

DENOISER_NAMES = ("unet", "transformer", "prior", "decoder")
"""The attributes of a pipeline that may hold its denoiser; the first one that does counts."""

SECOND_DENOISER_NAMES = ("transformer_2", "unconditional_transformer", "prior_prior")
"""The attributes that hold a second denoiser, beside one of DENOISER_NAMES."""


def denoiser_name(pipe: Any) -> str:
    """The attribute of a pipeline that holds its denoiser.

    Args:
        pipe: any diffusers pipeline.

    Raises:
        ValueError: where no attribute of these names is a network of diffusers.
    """
    for name in DENOISER_NAMES:
        if is_network(getattr(pipe, name, None)):
            return name
    *names, last = DENOISER_NAMES
    raise ValueError(
        f"{type(pipe).__name__} has no network of diffusers as its {', '.join(names)} or {last}: "
        "give a pipeline that was loaded with its denoiser"
    )


def denoiser_names(pipe: Any) -> list[str]:
    """All attributes of a pipeline that hold a denoiser, in the order of preference.

    More than one: Wan 2.2's two transformers, or a prior with its decoder.

    Args:
        pipe: any diffusers pipeline.
    """
    names = (*DENOISER_NAMES, *SECOND_DENOISER_NAMES)
    return [name for name in names if is_network(getattr(pipe, name, None))]


def is_network(component: Any) -> bool:
    """Whether a pipeline's component is a network of diffusers, as it is or wrapped."""
    return component is not None and "ModelMixin" in class_names(unwrapped(component))


def known_family(pipe: Any) -> Family | None:
    """The family of a pipeline; None for one of no known family."""
    try:
        return family_of(pipe)
    except ValueError:
        return None


def pipeline_label(pipe: Any) -> str:
    """How messages name a pipeline: by its family (`sd15`), or by its class (`Wan`)."""
    family = known_family(pipe)
    return family.name if family else type(pipe).__name__.removesuffix("Pipeline")
