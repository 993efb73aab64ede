"""The dial: `with realign(pipe, anchor, lam) as dial:` realigns a stock diffusers pipeline.

The mixture is evaluated inside the pipeline, in place of the reference network's forward. That is
one of two implementations of the method: `deradiff.method.chain` draws from the closed form step by
step. Tests hold the two equal for every sampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from deradiff.anchors.anchor import Anchor, check_anchor_family
from deradiff.method.lambdas import Lambda
from deradiff.models.families import family_of
from deradiff.models.family import unwrapped
from deradiff.realignment.adapters import Adapter
from deradiff.realignment.clock import Clock
from deradiff.realignment.dial import Dial, checked_lams
from deradiff.realignment.mode_specs import MODES, check_options
from deradiff.realignment.modes import MODE_TYPES, Mode, ModeParts
from deradiff.realignment.networks import Call, FullAnchor, Networks, check_own_loras
from deradiff.realignment.path_kl import PathKL
from deradiff.realignment.resampling import Resampling

HOOK = "deradiff_realign"
"""The name of our hook on the reference network."""

Source = str | Path | Anchor


@contextmanager
def realign(
    pipe: Any,
    anchor: Source | Sequence[Source],
    lam: Lambda | Sequence[Lambda],
    mode: str = "exact",
    path_kl: bool = False,
    *,
    every: int = 4,
    particles: int = 1,
    trust_region: float | None = None,
    batched: bool = False,
    shared_start: bool = False,
) -> Iterator[Dial]:
    """Realign a diffusers pipeline to p_ref^(1-lam) p_anchor^lam while the context lasts.

    Every call of the pipeline is realigned, step by step (DeRaDiff, Algorithm 1). Both networks get
    the same input; guidance and the scheduler's step act once, on the mixture (`guidance_rescale`
    and clipping, too). Leaving the context gives the pipeline back as it was. Moving, saving,
    compiling and offloading the pipeline work inside. Sequential offloading is to be switched on
    before, where the anchor is a LoRA.

    Args:
        pipe: a pipeline of a known family: text-to-image, img2img, inpainting or ControlNet.
        anchor: what `load_anchor` takes, or several of them:
            p_ref^(1 - sum lam_i) prod p_i^(lam_i).
        lam: a number, a number per image, a mask over the latents or a schedule over time
            (`deradiff.method.lambdas`); for several anchors a list of these.
        mode: `exact` mixes the outputs of reference and anchor: two evaluations a step, and one at
            lam 0 and 1. For every sampler whose step is linear in the output it is the closed form.
            `reuse` evaluates their difference at every k-th step. `weights` evaluates one network,
            at theta_ref + lam (theta_anchor - theta_ref), the first order of mixing.
        path_kl: also evaluate the reference where the mode does not need it (exact: at lam = 1;
            weights: always), so that `dial.path_kl` is known there.
        every: k of mode `reuse`.
        particles: K consecutive rows are one image's particles, weighed and resampled so that they
            follow the exact target and not the mixtures of steps (Feynman-Kac). Call the pipeline
            with num_images_per_prompt=K and take images[::K]. Needs mode `exact`.
        trust_region: for lam > 1, how many nats of KL the chain may go from the anchor's chain,
            shared evenly by the steps.
        batched: evaluate a LoRA anchor's rows and the reference's as one batch.
        shared_start: remember a chain's first step, for a sweep of lambdas from the same noise.
            Nothing but lam may change in between.

    Yields:
        The dial: `dial.lam` may be set at any time, and `dial.path_kl`, `dial.evaluations` and
        `dial.ess` tell what the last call cost.

    Raises:
        ValueError: in one sentence, for an unsupported mode, lam, anchor, scheduler or combination.
    """
    is_several = isinstance(anchor, Sequence) and not isinstance(anchor, str)
    sources: list[Any] = list(anchor) if is_several else [anchor]  # type: ignore[arg-type]

    # Mistakes, before an anchor is looked for
    check_options(
        mode,
        every=every,
        particles=particles,
        trust_region=trust_region,
        batched=batched,
        anchors=len(sources),
    )
    _check_pipeline(pipe)
    lams = checked_lams(lam, len(sources))

    family = family_of(pipe)
    anchors = [check_anchor_family(source, family.name) for source in sources]
    denoiser = getattr(pipe, family.denoiser)
    with ExitStack() as stack:
        # The anchors' networks, beside the reference or on it
        attached = [_attach(pipe, found, i, stack) for i, found in enumerate(anchors)]
        networks = Networks(attached, batched, shared_start)
        has_full_anchor = any(isinstance(one, FullAnchor) for one in attached)
        if has_full_anchor and MODES[mode].separate_networks:
            check_own_loras(denoiser)
        for one in attached:
            if isinstance(one, Adapter):
                stack.enter_context(one.folded())

        # What follows the chain, and what is turned and read
        clock = Clock(pipe, family.timestep_scale)
        kl = PathKL(pipe, clock)
        resampling = Resampling(particles, clock, kl) if particles > 1 else None
        dial = Dial(networks, clock, kl, resampling, trust_region)
        dial.lam = lams  # type: ignore[assignment]
        if resampling:
            stack.callback(resampling.release)

        # The mode, in place of the reference's forward
        parts = ModeParts(
            denoiser=denoiser,
            networks=networks,
            clock=clock,
            limit_lams=dial.limit_lams,
            every=every,
            with_reference=path_kl,
        )
        evaluate: Mode = MODE_TYPES[mode].from_parts(parts)
        evaluate.enter(stack)
        hook = RealignHook(dial, clock, kl, resampling, evaluate)
        stack.enter_context(_hooked(denoiser, hook))
        yield dial


def _check_pipeline(pipe: Any) -> None:
    """Raises ValueError for a learned variance, and for a pipeline that is being realigned."""
    if str(pipe.scheduler.config.get("variance_type", "")).startswith("learned"):
        raise ValueError(
            f"{type(pipe.scheduler).__name__} has a learned variance, whose mixture is not one of "
            "outputs: use a fixed one"
        )
    registry = getattr(getattr(pipe, family_of(pipe).denoiser), "_diffusers_hook", None)
    if registry and HOOK in registry.hooks:
        raise ValueError(
            "this pipeline is being realigned already: leave that context first, or give several "
            "anchors to one"
        )


def _attach(pipe: Any, anchor: Anchor, number: int, stack: ExitStack) -> Adapter | FullAnchor:
    """The anchor's network: a LoRA on the reference's own, or a second one."""
    if anchor.method == "full":
        family = family_of(pipe)
        return FullAnchor(unwrapped(getattr(pipe, family.denoiser)), anchor, family.name)
    adapter = Adapter(pipe, anchor, number)
    stack.callback(adapter.remove)
    return adapter


class RealignHook(ModelHook):
    """Runs in place of the reference network's forward, inside whatever pipeline calls it.

    Args:
        dial: tells lambda at each step.
        clock: is moved by each evaluation.
        kl: sums up the path KL.
        resampling: the particles; None: there are none.
        mode: evaluates and mixes.

    Attributes:
        compiled: the compiled forward of a network that `.compile()` changed in place.
    """

    def __init__(
        self, dial: Dial, clock: Clock, kl: PathKL, resampling: Resampling | None, mode: Mode
    ) -> None:
        super().__init__()
        self.dial = dial
        self.clock = clock
        self.kl = kl
        self.resampling = resampling
        self.mode = mode
        self.compiled: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the denoiser, realigned."""
        forward: Any = self.fn_ref.original_forward
        call = Call(self.compiled or forward, args, kwargs)
        self.clock.tick(call.timestep)
        lams = self.dial.lams_of_step(call.x)
        mixed = self.mode(call, lams)
        self.kl.add(mixed.output[0], mixed.shift)
        if self.resampling:
            self.resampling.weigh(mixed.lams, mixed.differences)
        return mixed.output


@contextmanager
def _hooked(denoiser: nn.Module, hook: RealignHook) -> Iterator[None]:
    """Our hook on the denoiser; at the end the denoiser is as it was."""
    network = unwrapped(denoiser)
    attributes_before = set(vars(denoiser))
    had_registry = hasattr(denoiser, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(hook, HOOK)
    our_forward = denoiser.forward
    original_forward = hook.fn_ref.original_forward

    # `.compile()` in place would trace our hook, too; only the network is to be traced
    compiled = network._compiled_call_impl
    if compiled is not None and denoiser is network:
        network._compiled_call_impl = None
        hook.compiled = torch.compile(original_forward)
    try:
        yield
    finally:
        if hook.compiled:
            network._compiled_call_impl = compiled
        outer_forward = vars(denoiser).get("forward")
        registry.remove_hook(HOOK, recurse=False)
        if getattr(denoiser, "_old_forward", None) is our_forward:
            # accelerate's offloading was switched on inside, and goes on
            denoiser._old_forward = original_forward  # type: ignore[assignment]
            denoiser.forward = outer_forward  # type: ignore[method-assign, assignment]
        elif not registry.hooks and "forward" not in attributes_before:
            # diffusers leaves a bound forward behind
            vars(denoiser).pop("forward", None)
        if not had_registry and not registry.hooks:
            del denoiser._diffusers_hook
