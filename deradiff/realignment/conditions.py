"""Which branch of guidance a guider evaluates.

Modular pipelines have their guidance in an object, diffusers' guider, which evaluates the network
for one branch after the other. So a lambda for each branch of guidance acts on the network's own
output there, and is exact under any guidance, be it linear or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.guiders import BaseGuidance

from deradiff.method.branches import BranchStrengths
from deradiff.method.lambdas import Strength
from deradiff.models.family import unwrapped

SECOND = ("transformer_2", "guider_2")
"""A second denoiser, as Wan 2.2 has for late steps, and the attribute of its guider."""


def lams_of_condition(
    lams: Sequence[Strength | BranchStrengths], pipe: Any, network: Any
) -> list[Any]:
    """The strength of each anchor in the branch that is being evaluated.

    Args:
        lams: of each anchor.
        pipe: the pipeline that evaluates the network.
        network: the denoiser.

    Returns:
        `lams` as they are where no guider tells the branch.
    """
    if not any(isinstance(lam, BranchStrengths) for lam in lams):
        return list(lams)
    guider = _guider_of(pipe, network)
    count = guider.get_state()["count_prepared"] if guider else 0
    if count == 0:
        return list(lams)

    # All of diffusers' guiders begin a step with the prompt alone.
    strengths: list[Any] = []
    for lam in lams:
        if isinstance(lam, BranchStrengths):
            lam = lam.conditional if count == 1 else lam.unconditional
        strengths.append(lam)
    return strengths


def _guider_of(pipe: Any, network: Any) -> BaseGuidance | None:
    """The guider of a denoiser; None where its pipeline has none."""
    denoiser_2, guider_2 = SECOND
    own_guider = getattr(pipe, guider_2, None)
    is_second = unwrapped(getattr(pipe, denoiser_2, None)) is unwrapped(network)
    guider = own_guider if is_second and own_guider is not None else getattr(pipe, "guider", None)
    return guider if isinstance(guider, BaseGuidance) else None
