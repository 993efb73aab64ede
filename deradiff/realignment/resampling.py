"""The particle corrector inside a stock pipeline.

The rows of its batch are weighed while they are denoised, and resampled between steps.

Shapes: K particles an image; the scheduler's samples are (images * K, ...), an image's particles
one after the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deradiff.method.lambdas import Strength
from deradiff.method.particles import Particles, log_weight
from deradiff.realignment.clock import Clock

GUIDED_PARTICLES = "with classifier-free guidance the weights of particles are a heuristic"
"""What there is to say of particles with guidance."""


class GuidedParticlesWarning(UserWarning):
    """Particles under classifier-free guidance. It is given once for each `realign`."""


class Resampling:
    """Weighs and resamples K particles of each image (Feynman-Kac; `deradiff.method.particles`).

    Args:
        count: K.
        clock: the step that the pipeline is at.

    Attributes:
        particles: the weights.
    """

    def __init__(self, count: int, clock: Clock) -> None:
        self.count = count
        self.clock = clock
        self.particles = Particles(count)
        self._has_warned = False
        self._log_w: Tensor | None = None

    @property
    def ess(self) -> Tensor:
        """The effective sample size of each image, at its smallest so far (images,)."""
        return self.particles.ess

    def begin_chain(self, sample: Tensor) -> None:
        """Begin a chain, at its first step.

        Args:
            sample: the noisy latents (images * K, ...).

        Raises:
            ValueError: for a number of rows that is no multiple of K.
        """
        if len(sample) % self.count:
            raise ValueError(
                f"the pipeline samples {len(sample)} rows, no multiple of "
                f"particles={self.count}: give num_images_per_prompt={self.count}, and take "
                f"images[::{self.count}]"
            )
        self.particles.start(sample)

    def weigh(
        self,
        factor: float,
        lams: Sequence[Strength],
        differences: Sequence[Tensor] | None,
        is_guided: bool,
    ) -> None:
        """Compute the log weights of one step, for the resampling after it.

        Args:
            factor: c of the step.
            lams: of each anchor, in shapes that broadcast to the latents.
            differences: each anchor's guided output minus the reference's (images * K, ...); None:
                the reference was not evaluated because lam is 1, and there is nothing to weigh.
            is_guided: whether the network was evaluated on more rows than there are latents.
        """
        if differences is None:
            self._log_w = None
            return
        if is_guided and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{GUIDED_PARTICLES}: with guidance, a step is not the step of any single model",
                GuidedParticlesWarning,
                stacklevel=2,
            )
        self._log_w = log_weight(factor, lams, differences)

    def resample(self, scheduler: Any, stepped: Any) -> Any:
        """Resample what a step returned, and what the scheduler remembers.

        Args:
            scheduler: that took the step.
            stepped: what its `step` returned.
        """
        x = stepped[0]
        log_w = self._log_w
        if log_w is None:
            log_w = torch.zeros(len(x), device=x.device)
        self.particles.reweigh(log_w)
        index = self.particles.resample(last=self.clock.is_last_step)
        if index is None:
            return stepped

        index = index.to(x.device)
        for name, value in vars(scheduler).items():
            setattr(scheduler, name, _reordered(value, index, x.shape))
        if isinstance(stepped, tuple):
            others = [_reordered(value, index, x.shape) for value in stepped[1:]]
            return (x[index], *others)
        values = {name: _reordered(value, index, x.shape) for name, value in stepped.items()}
        return type(stepped)(**values)


def _reordered(value: Any, index: Tensor, shape: torch.Size) -> Any:
    """A batch of latents, or a list of some, in the order of `index`; anything else as it is."""
    if isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
        return [_reordered(item, index, shape) for item in value]
    if isinstance(value, Tensor) and value.shape == shape:
        return value[index]
    return value
