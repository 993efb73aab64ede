"""`realign`: any call of a stock diffusers pipeline samples a realigned model while it lasts.

How the parts work together, at every evaluation of the denoiser inside the context:

    pipeline -> hook -> clock   which step is this?
                     -> dial    lambda of each anchor at this step
                     -> mode    evaluates the networks, and mixes their outputs
             <- the mixed output, which carries what each model predicted through the guidance
             -> scheduler.step -> guided steps   trust region, path KL and particles
             <- the next latents
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from deradiff.anchors.anchor import Anchor, check_anchor
from deradiff.anchors.live import live_anchor
from deradiff.method.branches import ByBranch
from deradiff.method.lambdas import Lambda
from deradiff.models.cuda_graphs import Recordings
from deradiff.models.family import unwrapped
from deradiff.models.pipelines import (
    known_family,
)
from deradiff.realignment.attachment import (
    HOOK,
    attach_all,
    check_not_realigned,
    check_parts,
    realigned_denoisers,
)
from deradiff.realignment.caller import calling_pipeline
from deradiff.realignment.carriers import all_plain
from deradiff.realignment.clock import Clock
from deradiff.realignment.compilation import compiled_blocks
from deradiff.realignment.conditions import lams_of_condition
from deradiff.realignment.dial import Dial, validated_lams
from deradiff.realignment.guided_steps import GuidedSteps
from deradiff.realignment.modes import Mode, ModeParts, carried
from deradiff.realignment.networks import Call, Cost, Networks, parameters_of
from deradiff.realignment.path_kl import PathKL
from deradiff.realignment.registry import (
    MEMORY,
    MODES,
    NEEDS,
    modes_with,
    unsupported_option,
)
from deradiff.realignment.resampling import Resampling
from deradiff.realignment.scheduler_tap import SchedulerTap

Source = str | Path | Anchor | DiffusionPipeline | nn.Module
"""What `load_anchor` takes, or an aligned model in memory."""


def realign(
    pipe: Any,
    anchor: Source | Sequence[Source],
    lam: Lambda | ByBranch | Sequence[Lambda | ByBranch],
    mode: str = "exact",
    path_kl: bool = False,
    *,
    every: int = 4,
    particles: int = 1,
    trust_region: float | None = None,
    batched: bool = False,
    shared_start: bool = False,
    memory: str = "auto",
    compile: bool = False,
) -> Dial:
    """Realign a diffusers pipeline, until its context ends or its dial is closed.

    DeRaDiff, Algorithm 1. Every call of the pipeline inside the context samples from
    p_ref^(1 - lam) p_anchor^lam, mixed step by step. This imitates a model that was aligned at
    beta / lam, where beta is the anchor's. With several anchors it is
    p_ref^(1 - sum lam_i) prod p_i^(lam_i).

    All networks see the same input. Guidance, clipping and the scheduler's step act once, on the
    mixture. Moving, saving, compiling and offloading the pipeline work inside the context as
    usual; switch on sequential offloading before it if the anchor is a LoRA. Leaving the context
    gives the pipeline back as it was, bit for bit.

    Args:
        pipe: a diffusers pipeline that calls one denoiser step by step, of whatever family.
        anchor: a path, a hub id or a loaded `Anchor` (see `deradiff.load_anchor`); an aligned
            pipeline or network in memory; a loaded LoRA (`deradiff.adapter_anchor`); or a list of
            these.
        lam: lambda: 0 is the reference, 1 the anchor; below 0 it goes away from the anchor. A
            number, a tensor with a number for each image, a mask over the latents, a schedule over
            time (see `deradiff.Dial`), or a `deradiff.ByBranch` of these, for each branch of
            guidance; with a list of anchors, a list. It can be changed later: `dial.lam = ...`.
        mode: how the realigned network is evaluated:

            - `exact` mixes the outputs of the reference and the anchor. For every sampler whose
              step is linear in the output, this is the closed form. Two evaluations a step, and one
              at lam 0 and 1.
            - `reuse` evaluates the difference of the two at every `every`-th step, and
              extrapolates it between. 1 + 1/k evaluations a step, with k = `every`.
            - `weights` evaluates one network, at theta_ref + lam (theta_anchor - theta_ref), which
              is the first order of mixing. One evaluation a step.
            - `sampled` draws the reference or an anchor for each step, with lam as probability.
              One evaluation a step; it works where weights cannot be summed.
        path_kl: evaluate the reference also where the mode does not need it (`exact` at lam = 1,
            `weights` always), so that `dial.path_kl` is known there.
        every: of mode `reuse`: steps from one evaluation of the difference to the next.
        particles: K above 1 corrects the error of mixing step by step: K rows of the batch are the
            particles of one image, which are weighed and resampled (Feynman-Kac). Call the
            pipeline with `num_images_per_prompt=K` and take `images[::K]`. For mode `exact`.
        trust_region: for lam above 1: nats of KL that the chain may go from the anchor's chain,
            shared evenly by the steps. For modes `exact` and `reuse`, and one anchor.
        batched: run the rows of a LoRA anchor and of the reference as one batch. For mode `exact`.
        shared_start: remember the first step of a chain, for a sweep of lambdas from the same
            noise. Nothing but lam may change between the calls.
        memory: whether the layers that a LoRA anchor changes get a second set of weights, which
            saves the host the LoRA's own products: `high` where that is possible, `low` never, and
            `auto` on a GPU of which that takes less than half. At lam = 1 there is no need for it,
            and the LoRA acts as in the stock pipeline, bit for bit.
        compile: compile the blocks that repeat in the network (`torch.compile`), until the context
            ends, and on a GPU replay evaluations of the same shapes as CUDA graphs. Compiled code
            rounds otherwise: lam 0 and 1 are then equal to the stock pipeline but for that.

    Returns:
        The dial: set `dial.lam` at any time; read `dial.path_kl`, `dial.evaluations` and `dial.ess`
        after a call. `with` gives the pipeline back at the end of its block, and `dial.close()` at
        any time, for a notebook.

    Raises:
        ValueError: for an unsupported mode, lam, anchor, scheduler or combination of options, in
            one sentence, before any weight is read where that is possible.

    Warns:
        BeyondAnchorWarning: for a lam above 1, once.
        NegativeLambdaWarning: for a lam below 0, once.
        GuidedParticlesWarning: for particles under classifier-free guidance, once.
        NonlinearStepWarning: for a scheduler that clips its predictions, once.
        UnknownPathKLWarning: where `dial.path_kl` is read and cannot be known, once.

    Example:
        ```python
        with deradiff.realign(pipe, "runs/train/mine/anchor", lam=0.5) as dial:
            image = pipe("a red fox in the snow").images[0]
            dial.lam = 0.25
            weaker = pipe("a red fox in the snow").images[0]
        ```
    """
    # Mistakes first, before a weight is read.
    sources = sources_of(anchor)
    _check_numbers(every, particles, trust_region)
    _check_mode(mode, len(sources), particles, trust_region, batched)
    _check_execution(memory, batched, compile)
    names = realigned_denoisers(pipe)
    _check_pipeline(pipe, names)
    lams = validated_lams(lam, len(sources))
    anchors = [check_anchor(source, pipe) for source in sources]
    check_parts(pipe, names, anchors)

    # What is put into the pipeline below is taken out in reverse order.
    with ExitStack() as stack:
        # The measures: the step that the pipeline is at, its path KL, its particles and its cost.
        clock = Clock()
        kl = PathKL(clock)
        resampling = Resampling(particles, clock) if particles > 1 else None
        cost = Cost()

        # The user's side.
        dial = Dial(len(anchors), cost, clock, kl, resampling, MODES[mode].branches)
        dial.lam = lams  # type: ignore[assignment]

        # The scheduler's side: it shows its steps.
        traits = _Traits.of(pipe)
        steps = GuidedSteps(clock, kl, dial, resampling, trust_region, traits.patch_size)
        tap = SchedulerTap(steps)
        stack.callback(tap.release)
        steps.follow(pipe, tap)

        # The networks' side: the mode evaluates in place of a reference's own forward.
        for name in names:
            network = unwrapped(getattr(pipe, name))
            recordings = None
            if compile:
                stack.enter_context(compiled_blocks(network))
                recordings = Recordings(network, own_hook=HOOK)
            attached = attach_all(pipe, name, anchors, stack, on_cpu=MODES[mode].sums_weights)
            networks = Networks(
                network,
                attached,
                cost,
                batched=batched,
                memory=memory,
                is_compiled=compile,
                checks_batches=not traits.is_known,
                shared_start=shared_start,
            )
            parts = ModeParts(network, networks, clock, traits.patch_size, path_kl, every)
            evaluator: Mode = MODES[mode].load()(parts)
            hook = _Hook(
                pipe, dial, networks, evaluator, steps, tap, traits.shared_arguments, recordings
            )
            stack.enter_context(_installed(getattr(pipe, name), hook))
        dial.hold(stack.pop_all())
    return dial


class _Traits(NamedTuple):
    """What realignment reads of a pipeline's family; of no known family, what most have.

    Attributes:
        is_known: whether it is of a known family.
        patch_size: side of the patches of latents that the network returns.
        shared_arguments: arguments of the network that belong to all rows of a batch alike.
    """

    is_known: bool = False
    patch_size: int = 1
    shared_arguments: tuple[str, ...] = ("img_ids", "txt_ids")

    @classmethod
    def of(cls, pipe: Any) -> _Traits:
        """The traits of a pipeline."""
        family = known_family(pipe)
        if family is None:
            return cls()
        return cls(True, family.patch_size, family.shared_arguments)


def sources_of(anchor: Source | Sequence[Source]) -> list[str | Path | Anchor]:
    """One anchor or several, as a list of what `load_anchor` takes.

    Raises:
        ValueError: for what is no anchor.
    """
    sources = list(anchor) if isinstance(anchor, list | tuple) else [anchor]
    named: list[str | Path | Anchor] = []
    for source in sources:
        is_named = isinstance(source, str | Path | Anchor)
        named.append(source if is_named else live_anchor(source))  # type: ignore[arg-type]
    return named


def _check_numbers(every: int, particles: int, trust_region: float | None) -> None:
    """Raise ValueError for a number out of its range."""
    for name, count in (("every", every), ("particles", particles)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}")
    if trust_region is not None and not trust_region > 0:
        raise ValueError(f"trust_region must be a number of nats above 0, not {trust_region!r}")


def _check_mode(
    mode: str, anchors: int, particles: int, trust_region: float | None, batched: bool
) -> None:
    """Raise ValueError for an unknown mode, and for options that it does not go together with."""
    if mode not in MODES:
        *names, last = MODES
        raise ValueError(f"mode must be {', '.join(names)} or {last}, not {mode!r}")
    option = unsupported_option(mode, particles, batched, trust_region)
    if option:
        modes = " or ".join(f"mode={name!r}" for name in modes_with(option))
        raise ValueError(f"{option} {NEEDS[option]}: use {modes}, not {mode!r}")
    if anchors > 1 and not MODES[mode].several_anchors:
        raise ValueError(f"mode {mode} is for one anchor, and there are {anchors}")
    if anchors > 1 and trust_region is not None:
        raise ValueError(f"trust_region is for one anchor, and there are {anchors}")


def _check_execution(memory: str, batched: bool, compile: bool) -> None:
    """Raise ValueError for an unknown word, and for options that do not go together."""
    if memory not in MEMORY:
        raise ValueError(f"memory must be {' or '.join(map(repr, MEMORY))}, not {memory!r}")
    if batched and compile:
        raise ValueError(
            "batched=True and compile=True do not go together: compiled blocks would not see which "
            "row belongs to which model; remove one of the two"
        )


def _check_pipeline(pipe: Any, names: Sequence[str]) -> None:
    """Raise ValueError for a scheduler that cannot be realigned, and for a realigned pipeline.

    Args:
        pipe: the pipeline.
        names: of its denoisers.
    """
    scheduler = getattr(pipe, "scheduler", None)
    config = getattr(scheduler, "config", {})
    if str(config.get("variance_type", "")).startswith("learned"):
        raise ValueError(
            f"{type(scheduler).__name__} has a learned variance, whose mixture is not one of "
            "outputs: use a scheduler with a fixed variance"
        )
    check_not_realigned(pipe, names)


class _Hook(ModelHook):
    """Runs in place of the reference network's forward, in whatever pipeline calls it."""

    def __init__(
        self,
        pipe: Any,
        dial: Dial,
        networks: Networks,
        mode: Mode,
        steps: GuidedSteps,
        tap: SchedulerTap,
        shared_arguments: tuple[str, ...],
        recordings: Recordings | None,
    ) -> None:
        super().__init__()
        self.pipe = pipe
        self.dial = dial
        self.networks = networks
        self.mode = mode
        self.steps = steps
        self.tap = tap
        self.shared_arguments = shared_arguments
        self.recordings = recordings
        # The chain that the networks have been made ready for.
        self._chain = 0
        # The network's forward, compiled, where the network was compiled in place.
        self.compiled_forward: Any = None
        # Whether the evaluation that is asked for is one to realign; None: all are.
        self.gate: Callable[[], bool] | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """One evaluation that the pipeline asks for."""
        forward: Any = self.compiled_forward or self.fn_ref.original_forward
        if self.gate is not None and not self.gate():
            return forward(*args, **kwargs)
        args, kwargs = all_plain((args, kwargs))
        if self.recordings is not None:
            forward = partial(self._recorded, self.recordings, forward)
        network_class: Any = type(unwrapped(module))
        parameters = parameters_of(network_class)
        call = Call(forward, args, kwargs, parameters, self.shared_arguments)

        # Which step is this, and what is lambda there?
        caller = calling_pipeline(self.pipe)
        self.steps.follow(caller, self.tap)
        clock = self.steps.clock
        clock.tick(call.timestep)
        if clock.chain != self._chain or clock.index is None:
            self.networks.begin_chain()
            if self.recordings is not None:
                self.recordings.refresh()
            self._chain = clock.chain
        lams = lams_of_condition(self.dial.begin_evaluation(call.rows), caller, module)

        # What is not on its way to a step of the scheduler needs no companions.
        mixed = self.mode.evaluate(call, lams)
        if not self.tap.is_attached:
            self.steps.note_unseen_evaluation()
            return mixed.output.whole()
        if clock.index is None:
            self.steps.note_outside_evaluation()
            return mixed.output.whole()
        self.steps.note_evaluation(call.rows, mixed.blocks)
        return carried(mixed, self.steps.track, self.steps.needs_anchors)

    def _recorded(
        self, recordings: Recordings, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """An evaluation as a CUDA graph; a LoRA beside the network changes its modules."""
        if self.networks.has_active_adapter:
            return forward(*args, **kwargs)
        return recordings.run(forward, *args, **kwargs)


@contextmanager
def _installed(denoiser: nn.Module, hook: _Hook) -> Iterator[None]:
    """Have the hook run in place of the denoiser's forward; then remove all traces of it."""
    network = unwrapped(denoiser)
    had_own_forward = "forward" in vars(denoiser)
    had_registry = hasattr(denoiser, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(hook, HOOK)
    hooked_forward = denoiser.forward
    original_forward: Any = hook.fn_ref.original_forward

    # `.compile()` in place would trace the hook as well. What is to be traced is the network.
    compiled = network._compiled_call_impl
    if compiled is not None and denoiser is network:
        network._compiled_call_impl = None
        hook.compiled_forward = torch.compile(original_forward)
    try:
        yield
    finally:
        if hook.compiled_forward:
            network._compiled_call_impl = compiled
        current_forward = vars(denoiser).get("forward")
        registry.remove_hook(HOOK, recurse=False)
        if getattr(denoiser, "_old_forward", None) is hooked_forward:
            # accelerate's offloading, which was switched on inside the context, goes on.
            denoiser._old_forward = original_forward
            denoiser.forward = current_forward  # type: ignore[assignment]
        elif not registry.hooks and not had_own_forward:
            # diffusers leaves a bound forward behind.
            vars(denoiser).pop("forward", None)
        if not had_registry and not registry.hooks:
            del denoiser._diffusers_hook
