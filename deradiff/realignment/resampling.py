"""The particle corrector inside a stock pipeline: rows are weighed, and resampled between steps.

Shapes: P images, K particles of an image, rows of the network's batch R.
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


class GuidedParticlesWarning(UserWarning):
    """With classifier-free guidance the weights of particles are a heuristic."""


class Resampling:
    """K consecutive rows are the particles of one image (Feynman-Kac; `deradiff.method.particles`).

    Pipelines keep their latents to themselves, so the scheduler's `step` is wrapped while the
    context lasts: what it returns, and what a multistep scheduler remembers of the chain, is
    resampled. With classifier-free guidance the weights are a heuristic; that is said once.

    Args:
        count: K.
        clock: the pipeline's position in the chain.
        kl: for the step's factor and guidance.
    """

    def __init__(self, count: int, clock: Clock, kl: PathKL) -> None:
        self.particles = Particles(count)
        self.count = count
        self.clock = clock
        self.kl = kl
        self._warned = False
        self._log_w: Tensor | None = None
        self._wrapped: Any = None

    @property
    def ess(self) -> Tensor:
        """Effective sample size of each image at its smallest so far: (P,)."""
        return self.particles.ess

    def weigh(self, lams: Sequence[Strength], differences: Sequence[Tensor] | None) -> None:
        """Compute one evaluation's log weights.

        Args:
            lams: one of each anchor.
            differences: of the anchors' outputs from the reference's, (R, ...); None where lam is 0
                or 1, and all weights are equal.

        Raises:
            ValueError: where the pipeline evaluates the denoiser twice in a step.
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
        self._warn_of_guidance()
        rows = len(differences[0]) // self.kl.rows_per_image
        lams_of_rows = [lam[:rows] if isinstance(lam, Tensor) else lam for lam in lams]
        guided = [self.kl.guided(difference) for difference in differences]
        self._log_w = log_weight(self.kl.factor, lams_of_rows, guided)

    def _warn_of_guidance(self) -> None:
        if self.kl.rows_per_image == 1 or self._warned:
            return
        self._warned = True
        warnings.warn(
            "with classifier-free guidance the weights of particles are a heuristic: a guided step "
            "is not the step of any single model",
            GuidedParticlesWarning,
            stacklevel=3,
        )

    def release(self) -> None:
        """Give the scheduler its own `step` back."""
        if self._wrapped is not None:
            vars(self._wrapped).pop("step", None)
            self._wrapped = None

    def _wrap(self, scheduler: Any) -> None:
        """Resample after each of the scheduler's steps. A pipeline may get another scheduler."""
        if scheduler is self._wrapped:
            return
        self.release()
        step = scheduler.step

        # Pipelines read the signature, and pass a generator and an eta where it has them
        @wraps(step)
        def resampling_step(
            model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self._start(sample)
            stepped = step(model_output, timestep, sample, *args, **kwargs)
            return self._resample(scheduler, stepped)

        scheduler.step = resampling_step
        self._wrapped = scheduler

    def _start(self, sample: Tensor) -> None:
        """At a chain's first step, begin with equal weights."""
        if self.clock.index != self.clock.start_index:
            return
        if len(sample) % self.count:
            raise ValueError(
                f"the pipeline samples {len(sample)} rows, no multiple of particles={self.count}: "
                f"give num_images_per_prompt={self.count}, and take images[::{self.count}]"
            )
        self.particles.start(sample)

    def _resample(self, scheduler: Any, stepped: Any) -> Any:
        """The step's result, and the scheduler's memory, in the order that resampling drew."""
        x = stepped[0]
        weights = self._log_w
        if weights is None:
            weights = torch.zeros(len(x), device=x.device)
        self.particles.reweigh(weights)
        index = self.particles.resample(last=self.clock.is_last_step)
        if index is None:
            return stepped

        index = index.to(x.device)
        for name, value in vars(scheduler).items():
            setattr(scheduler, name, _reordered(value, index, x.shape))
        if isinstance(stepped, tuple):
            others = [_reordered(value, index, x.shape) for value in stepped[1:]]
            return (x[index], *others)
        fields = {name: _reordered(value, index, x.shape) for name, value in stepped.items()}
        return type(stepped)(**fields)


def _reordered(value: Any, index: Tensor, shape: torch.Size) -> Any:
    """A batch of latents, or a list of some, in the order of `index`; anything else as it is."""
    if isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
        return [_reordered(item, index, shape) for item in value]
    is_batch = isinstance(value, Tensor) and value.shape == shape
    return value[index] if is_batch else value
