"""What realignment does at a scheduler's step, where guidance has been applied to all models.

Shapes: (images, ...), those of the latents that the scheduler denoises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deradiff.method.branches import BranchStrengths
from deradiff.method.lambdas import Strength, limit_lam
from deradiff.realignment.branches import mixture_of_branches
from deradiff.realignment.carriers import LostTrack, companions_of, plain
from deradiff.realignment.clipping import effective_difference
from deradiff.realignment.clock import Clock
from deradiff.realignment.dial import Dial
from deradiff.realignment.modes import Companions
from deradiff.realignment.path_kl import PathKL, squared
from deradiff.realignment.resampling import Resampling
from deradiff.realignment.rows import check_images, lam_of_rows
from deradiff.realignment.scheduler_tap import SchedulerTap, StepObserver

LOST = "the pipeline does something to the network's output that could not be followed"
"""Why the guided output of the reference is unknown."""

NO_STEP = "the pipeline has taken no step with its own scheduler"
"""Why the path KL is unknown before the first step, and where copies of the scheduler step."""

BY_BRANCH = "a lam for each branch of guidance"
"""How an error names it."""

OUTSIDE = "the network was evaluated after the chain had ended, by another scheduler or by hand"
"""Why the path KL of the last call is no longer known."""


class GuidedSteps(StepObserver):
    """Bounds a step to the trust region, measures its path KL, and resamples the particles.

    Args:
        clock: the step that the pipeline is at.
        kl: the path KL of the chain.
        dial: lambda.
        resampling: the particles; None: there are none.
        limit: nats of KL that the chain may go from the anchor's chain; None: any number.
        patch_size: side of the patches of latents that the network returns.

    Attributes:
        track: whether the outputs of this step have lost their companions.
        on_step: is called after each step, with whether it was the last one of a chain; None:
            nobody wants to know.
    """

    def __init__(
        self,
        clock: Clock,
        kl: PathKL,
        dial: Dial,
        resampling: Resampling | None,
        limit: float | None,
        patch_size: int,
    ) -> None:
        self.clock = clock
        self.kl = kl
        self.dial = dial
        self.resampling = resampling
        self.limit = limit
        self.patch_size = patch_size
        self.track = LostTrack()
        self.on_step: Callable[[bool], None] | None = None
        self._rows_of_step = 0
        self._blocks_of_step = 0
        self._is_first_step = False
        self._has_finished_chain = False

    @property
    def needs_anchors(self) -> bool:
        """Whether it has to know what each anchor predicted, after the guidance."""
        return self.resampling is not None or self.limit is not None

    def follow(self, pipe: Any, tap: SchedulerTap) -> None:
        """See the steps of a pipeline's present scheduler; a user may exchange it.

        Args:
            pipe: the pipeline.
            tap: shows the steps of a scheduler.
        """
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is self.clock.scheduler:
            return
        self.clock.follow(scheduler)
        tap.release()
        if scheduler is not None:
            tap.attach(scheduler)
        self.clock.sees_steps = tap.is_attached

    def begin_chain(self) -> None:
        """The pipeline has set new timesteps."""
        self.clock.announce_chain()
        self._has_finished_chain = False

    def note_evaluation(self, rows: int, blocks: int = 0) -> None:
        """The network was evaluated within a chain.

        Args:
            rows: of the batch.
            blocks: of rows in it, each of them a branch of guidance; 0: not counted.
        """
        if self.clock.is_new_call:
            self._is_first_step = True
            self.kl.forget(NO_STEP)
        self._rows_of_step += rows
        self._blocks_of_step += blocks

    def note_unseen_evaluation(self) -> None:
        """The network was evaluated for a scheduler whose steps cannot be seen.

        Raises:
            ValueError: where something was asked for that needs the steps.
        """
        reason = f"the steps of {type(self.clock.scheduler).__name__} cannot be seen"
        if self.clock.scheduler is None:
            reason = "the pipeline has no scheduler whose steps could be seen"
        if self._is_by_branch:
            raise ValueError(f"{BY_BRANCH} is not possible here: {reason}")
        if self.clock.index is None and self.dial.has_schedule:
            raise ValueError(f"a lam that changes over time is not possible here: {reason}")
        self._check_is_needed(reason)
        self.kl.forget(reason)

    def note_outside_evaluation(self) -> None:
        """The network was evaluated outside a chain of the pipeline's own scheduler."""
        if self._has_finished_chain:
            self.kl.forget(OUTSIDE)

    def before_step(self, output: Any, options: dict[str, Any]) -> Any:
        """Measure the step that is about to be taken, and bound it to the trust region."""
        sample = options.get("sample")
        companions = companions_of(output)
        output = plain(output)
        if self.clock.index is None or not self._rows_of_step:
            return output
        if self._is_first_step:
            self._begin_chain(sample)
        self._check_strengths(sample)

        # What guidance made of the reference, of the mixture, and of each anchor.
        models = None
        if companions is None:
            self._check_is_needed(LOST)
            self.kl.unknown = self.kl.unknown or LOST
        else:
            anchors = len(self.dial.strengths) if self.needs_anchors else 0
            models = Companions.of(companions, anchors)
        # Where a guider tells the branches, each has been mixed by its own lambda already.
        if self._is_by_branch and self._blocks_of_step > 0:
            output, moved = self._mixed_by_branch(output, models, sample)
            self.kl.add(moved, len(output))
            return output
        shift = _shift(models)
        if not self.needs_anchors:
            if shift is not None and self.kl.clipping:
                shift = self._clipped_shift(models, options)
            self.kl.add(shift, len(output))
            return output

        # The trust region may lower lambda, and the particles are weighed by what it left.
        lams = [lam_of_rows(lam, output, self.patch_size) for lam in self.dial.strengths]
        if shift is not None and self.limit is not None:
            output, shift, lams = self._bounded(output, shift, models, lams)
        self.kl.add(shift, len(output))
        self._weigh(models, lams, sample)
        return output

    def after_step(self, scheduler: Any, stepped: Any) -> Any:
        """Resample the particles after a step, and begin the next one."""
        is_step = self.clock.index is not None and self._rows_of_step > 0
        if is_step and self.resampling is not None:
            stepped = self.resampling.resample(scheduler, stepped)
        self._has_finished_chain = is_step and self.clock.is_last_step
        self.clock.finish_step()
        self.track = LostTrack()
        self._rows_of_step = 0
        self._blocks_of_step = 0
        if self.on_step is not None:
            self.on_step(self._has_finished_chain)
        return stepped

    @property
    def _is_by_branch(self) -> bool:
        """Whether lambda differs between branches of guidance at this step."""
        return any(isinstance(lam, BranchStrengths) for lam in self.dial.strengths)

    def _check_strengths(self, sample: Any) -> None:
        """Raise ValueError where lambda does not fit the images, or the options.

        It may be set at any time, and so is checked at each step.
        """
        for lam in self.dial.strengths:
            if isinstance(lam, BranchStrengths):
                check_images(lam.conditional, sample)
                check_images(lam.unconditional, sample)
            else:
                check_images(lam, sample)
        if self._is_by_branch and (self.resampling is not None or self.limit is not None):
            raise ValueError(
                "a lam for each branch does not go together with particles or a trust region: "
                "remove these"
            )

    def _mixed_by_branch(
        self, output: Tensor, models: Companions | None, sample: Any
    ) -> tuple[Tensor, Tensor]:
        """The guided output with a lambda for each branch, and what it is beyond the reference's.

        Raises:
            ValueError: where the branches cannot be told apart.
        """
        if self._blocks_of_step * len(sample) != self._rows_of_step:
            raise ValueError(
                "the branches of guidance cannot be told apart: their rows do not hold the same "
                "latents; give one lam for all branches"
            )
        if models is None or models.reference is None or not models.blocks:
            raise ValueError(f"{BY_BRANCH} is not possible here: {LOST}")
        blocks = [block for block in models.blocks if block is not None]
        if len(blocks) < len(models.blocks):
            raise ValueError(f"{BY_BRANCH} is not possible here: {LOST}")
        mixture = mixture_of_branches(
            models.reference, blocks, self.dial.strengths, self.patch_size
        )
        return mixture.to(output.dtype), mixture - models.reference

    def _begin_chain(self, sample: Any) -> None:
        """Begin a chain at its first step."""
        self._is_first_step = False
        self.kl.begin_chain()
        if self.kl.unknown:
            self._check_is_needed(self.kl.unknown)
        if self.kl.clipping:
            self._check_is_needed(f"the scheduler clips its predictions ({self.kl.clipping}=True)")
        if self.resampling is not None:
            self.resampling.begin_chain(sample)

    def _check_is_needed(self, reason: str) -> None:
        """Raise ValueError where an option needs to know what is unknown."""
        option = None
        if self.resampling is not None:
            option = "particles"
        elif self.limit is not None:
            option = "trust_region"
        if option is not None:
            raise ValueError(f"{option} needs the KL divergence of each step: {reason}")

    def _clipped_shift(self, models: Companions | None, options: dict[str, Any]) -> Tensor | None:
        """What the realigned output is beyond the reference's, by what the clipped step does."""
        assert models is not None
        assert models.mixture is not None and models.reference is not None
        try:
            return effective_difference(
                self.clock.scheduler, options, models.mixture, models.reference
            )
        except Exception as error:
            # Schedulers are many, and nobody may have asked for the path KL.
            self.kl.unknown = f"the steps of a scheduler that clips could not be measured ({error})"
            return None

    def _bounded(
        self, output: Tensor, shift: Tensor, models: Companions | None, lams: list[Strength]
    ) -> tuple[Tensor, Tensor, list[Strength]]:
        """The output, its shift and lam, where lam is lowered to the trust region.

        Each step has an equal share of the nats.
        """
        assert models is not None and models.reference is not None
        assert self.limit is not None
        (lam,) = lams
        (anchor,) = models.anchors
        if anchor is None or not bool((torch.as_tensor(lam) > 1).any()):
            return output, shift, lams
        divergence = self.kl.factor * squared(anchor - models.reference)
        column = divergence.view(-1, *[1] * (output.ndim - 1))
        lowered = limit_lam(lam, column, self.limit / self.clock.steps)
        share = lowered / torch.as_tensor(lam, device=lowered.device)
        if bool((share == 1).all()):
            return output, shift, lams

        shift = share * shift
        bounded = (models.reference + shift).to(output.dtype)
        return torch.where(share < 1, bounded, output), shift, [lowered]

    def _weigh(self, models: Companions | None, lams: list[Strength], sample: Any) -> None:
        """Weigh the particles by this step."""
        if self.resampling is None:
            return
        differences = None
        if models is not None and models.reference is not None:
            differences = []
            for anchor in models.anchors:
                if anchor is None:
                    raise ValueError(f"particles need the anchor's guided output: {LOST}")
                differences.append(anchor - models.reference)
        is_guided = self._rows_of_step > len(sample)
        self.resampling.weigh(self.kl.factor, lams, differences, is_guided)


def _shift(models: Companions | None) -> Tensor | None:
    """The realigned output minus the reference's; None: unknown."""
    if models is None or models.reference is None or models.mixture is None:
        return None
    return models.mixture - models.reference
