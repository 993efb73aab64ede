"""The particle corrector inside a stock pipeline: rows of its batch are weighed as they are denoised, and resampled between steps."""

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


class Resampling:
    """K consecutive rows are the particles of one image (Feynman-Kac; `deradiff.method.particles`).

    Pipelines keep their latents to themselves, so the scheduler's `step` is wrapped while the context lasts: what it returns, and what a
    multistep scheduler remembers of the chain, is resampled. With classifier-free guidance the weights are a heuristic; that is said once.
    """

    def __init__(self, count: int, clock: Clock, kl: PathKL) -> None:
        self.particles, self.clock, self.kl, self.count = Particles(count), clock, kl, count
        self._warned = False
        self._log_w: Tensor | None = None
        self._wrapped: Any = None

    @property
    def ess(self) -> Tensor:
        return self.particles.ess

    def weigh(self, lams: Sequence[Strength], differences: Sequence[Tensor] | None) -> None:
        """One evaluation's log weights, (images * K,), from the differences of anchors and reference (rows, ...); None: lam is 0 or 1."""
        if self.clock.index is None:
            return
        self._wrap(self.kl.pipe.scheduler)
        if self.clock.call:
            raise ValueError(
                "particles need one evaluation of the denoiser a step: switch off true guidance (FLUX) or skipped layers (SD3)"
            )
        if differences is None:
            self._log_w = None
            return
        if self.kl.copies == 2 and not self._warned:
            self._warned = True
            warnings.warn(
                "with classifier-free guidance the weights of particles are a heuristic: guided steps are no model's own",
                stacklevel=2,
            )
        images = len(differences[0]) // self.kl.copies
        self._log_w = log_weight(
            self.kl.factor,
            [lam[:images] if isinstance(lam, Tensor) else lam for lam in lams],
            [self.kl.guided(d) for d in differences],
        )

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

        @wraps(
            step
        )  # pipelines read the signature, and hand over a generator and an eta where it has them
        def resampling_step(
            model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self._begin(sample)
            return self._resampled(scheduler, step(model_output, timestep, sample, *args, **kwargs))

        scheduler.step, self._wrapped = resampling_step, scheduler

    def _begin(self, sample: Tensor) -> None:
        if self.clock.index != self.clock.first:
            return
        if len(sample) % self.count:
            raise ValueError(
                f"the pipeline samples {len(sample)} rows, no multiple of particles={self.count}: give num_images_per_prompt={self.count}, "
                f"and take images[::{self.count}]"
            )
        self.particles.start(sample)

    def _resampled(self, scheduler: Any, stepped: Any) -> Any:
        x = stepped[0]
        self.particles.reweigh(
            torch.zeros(len(x), device=x.device) if self._log_w is None else self._log_w
        )
        index = self.particles.resample(last=self.clock.last)
        if index is None:
            return stepped
        index = index.to(x.device)
        for name, value in vars(scheduler).items():
            setattr(scheduler, name, _reordered(value, index, x.shape))
        if isinstance(stepped, tuple):
            return (x[index], *(_reordered(value, index, x.shape) for value in stepped[1:]))
        return type(stepped)(
            **{name: _reordered(value, index, x.shape) for name, value in stepped.items()}
        )


def _reordered(value: Any, index: Tensor, shape: torch.Size) -> Any:
    """What is a batch of latents, or a list of some, in the order of `index`; anything else as it is."""
    if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
        return [_reordered(v, index, shape) for v in value]
    return value[index] if isinstance(value, Tensor) and value.shape == shape else value
