"""The particle corrector inside a stock pipeline.

The rows of its batch are weighed while they are denoised, and resampled between steps.

Shapes: K particles an image; rows of the denoiser's batch = images * K * rows_per_image; the
scheduler's samples are (images * K, ...), an image's particles one after the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from deradiff.method.lambdas import Strength
from deradiff.method.particles import Particles, log_weight
from deradiff.realignment.clock import Clock
from deradiff.realignment.path_kl import PathKL

GUIDED_PARTICLES = "with classifier-free guidance the weights of particles are a heuristic"
"""What there is to say of particles with guidance."""


class GuidedParticlesWarning(UserWarning):
    """Particles under classifier-free guidance. It is given once for each `realign`."""


class Resampling:
    """Weighs and resamples K particles of each image (Feynman-Kac; `deradiff.method.particles`).

    A pipeline does not show its latents. So the scheduler's `step` is wrapped while the context
    lasts: what it returns, and what a multistep scheduler remembers of the chain, is resampled.

    Args:
        count: K.
        clock: the step that the pipeline is at.
        kl: the path KL of the chain, for a step's factor and for guidance.

    Attributes:
        particles: the weights.
    """

    def __init__(self, count: int, clock: Clock, kl: PathKL) -> None:
        self.count = count
        self.clock = clock
        self.kl = kl
        self.particles = Particles(count)
        self._has_warned = False
        self._log_w: Tensor | None = None
        self._wrapped: Any = None

    @property
    def ess(self) -> Tensor:
        """The effective sample size of each image, at its smallest so far (images,)."""
        return self.particles.ess

    def weigh(self, lams: Sequence[Strength], differences: Sequence[Tensor] | None) -> None:
        """Compute the log weights of one evaluation, for the resampling after the step.

        Args:
            lams: of each anchor.
            differences: each anchor's output minus the reference's (rows, ...); None: the reference
                was not evaluated because lam is 1, and there is nothing to weigh.

        Raises:
            ValueError: where the pipeline evaluates the denoiser more than once a step.
        """
        if self.clock.index is None:
            return
        self._wrap(self.kl.pipe.scheduler)
        if self.clock.evaluation > 0:
            raise ValueError(
                "particles need one evaluation of the denoiser a step: switch off true guidance "
                "(FLUX) or skipped layers (SD3)"
            )
        if differences is None:
            self._log_w = None
            return
        if self.kl.rows_per_image == 2 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{GUIDED_PARTICLES}: with guidance, a step is not the step of any single model",
                GuidedParticlesWarning,
                stacklevel=2,
            )

        # The rows of one image have the same lam.
        images = len(differences[0]) // self.kl.rows_per_image
        own_lams = [lam[:images] if isinstance(lam, Tensor) else lam for lam in lams]
        guided = [self.kl.guided(difference) for difference in differences]
        self._log_w = log_weight(self.kl.factor, own_lams, guided)

    def release(self) -> None:
        """Give the scheduler its own `step` back."""
        if self._wrapped is not None:
            vars(self._wrapped).pop("step", None)
            self._wrapped = None

    def _wrap(self, scheduler: Any) -> None:
        if scheduler is self._wrapped:
            return
        self.release()
        step = scheduler.step

        # Pipelines read the signature, and pass a generator and an eta where it has them.
        @wraps(step)
        def resampling_step(
            model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self._begin(sample)
            stepped = step(model_output, timestep, sample, *args, **kwargs)
            return self._resampled(scheduler, stepped)

        scheduler.step = resampling_step
        self._wrapped = scheduler

    def _begin(self, sample: Tensor) -> None:
        """Begin a chain, at its first step."""
        if self.clock.index != self.clock.start_index:
            return
        if len(sample) % self.count:
            raise ValueError(
                f"the pipeline samples {len(sample)} rows, no multiple of "
                f"particles={self.count}: give num_images_per_prompt={self.count}, and take "
                f"images[::{self.count}]"
            )
        self.particles.start(sample)

    def _resampled(self, scheduler: Any, stepped: Any) -> Any:
        """What a step returned, and what the scheduler remembers, after resampling."""
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
