"""The dial: `with realign(pipe, anchor, lam) as dial:` realigns any call of a stock diffusers pipeline to beta / lam while it samples."""

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
from deradiff.realignment.modes import Exact, Mode, Reuse, Weights
from deradiff.realignment.networks import Call, FullAnchor, Networks, check_own_loras
from deradiff.realignment.path_kl import PathKL
from deradiff.realignment.resampling import Resampling

MODES = ("exact", "reuse", "weights")
HOOK = "deradiff_realign"

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
    """Realign a diffusers pipeline to p_ref^(1-lam) p_anchor^lam, step by step (DeRaDiff, Algorithm 1), until the context is left.

    anchor: what `load_anchor` takes, or several with as many lams: p_ref^(1 - sum lam_i) prod p_i^(lam_i). lam: see `Dial`.
    mode: `exact` mixes the outputs of reference and anchor, which for every sampler whose step is linear in the output is the closed form
    (two evaluations a step; one at lam 0 and 1); `reuse` evaluates their difference at each `every`-th step and extrapolates it between;
    `weights` evaluates once, at theta_ref + lam (theta_anchor - theta_ref), its first order.
    path_kl: also evaluate the reference where the mode itself does not need it (exact: lam = 1; weights: always), so that
    `dial.path_kl` is known there.
    particles: K consecutive rows are one image's particles, weighed and resampled so that they follow the exact tilt and not the steps'
    mixtures (Feynman-Kac): call the pipeline with num_images_per_prompt=K and take images[::K]. Needs mode `exact`.
    trust_region: for lam > 1, how many nats of KL the chain may go from the anchor's chain, shared evenly by the steps.
    batched: a LoRA anchor's rows and the reference's as one batch of the network.
    shared_start: remember a chain's first step, for a sweep of lambdas from the same noise; nothing but lam may change meanwhile.

    Both networks see the same input: guidance and the scheduler's step act once, on the mixture (`guidance_rescale` and clipping too).
    Moving, saving, compiling and offloading the pipeline go on as ever; switch on sequential offloading before, where the anchor is a LoRA.
    Raises ValueError, in one sentence, for a mode, lam, anchor or scheduler that cannot be.
    """
    sources = (
        list(anchor) if isinstance(anchor, Sequence) and not isinstance(anchor, str) else [anchor]
    )
    _check(pipe, len(sources), mode, every, particles, trust_region, batched)
    lams = checked_lams(lam, len(sources))
    family = family_of(pipe)
    found = [check_anchor_family(source, family.name) for source in sources]
    denoiser = getattr(pipe, family.denoiser)
    with ExitStack() as stack:
        networks = Networks(
            [_attach(pipe, anchor, i, stack) for i, anchor in enumerate(found)],
            batched,
            shared_start,
        )
        if mode != "weights" and any(isinstance(anchor, FullAnchor) for anchor in networks.anchors):
            check_own_loras(denoiser)
        for attached in networks.anchors:
            if isinstance(attached, Adapter):
                stack.enter_context(attached.folded())
        clock = Clock(pipe, family.timestep_scale)
        kl = PathKL(pipe, clock)
        resampling = Resampling(particles, clock, kl) if particles > 1 else None
        dial = Dial(networks, clock, kl, resampling, trust_region)
        dial.lam = lams  # type: ignore[assignment]
        evaluate: Mode
        if mode == "exact":
            evaluate = Exact(networks, clock, dial.bounded, with_reference=path_kl)
        elif mode == "reuse":
            evaluate = Reuse(networks, clock, dial.bounded, every)
        else:
            evaluate = Weights(unwrapped(denoiser), networks, clock, with_reference=path_kl)
            stack.callback(
                unwrapped(denoiser).register_state_dict_pre_hook(evaluate.restore).remove
            )
            stack.callback(evaluate.restore)
        if resampling:
            stack.callback(resampling.release)
        stack.enter_context(_hooked(denoiser, _Hook(dial, clock, kl, resampling, evaluate)))
        yield dial


def _check(
    pipe: Any,
    anchors: int,
    mode: str,
    every: int,
    particles: int,
    trust_region: float | None,
    batched: bool,
) -> None:
    """ValueError for what cannot be, before an anchor is looked for."""
    if mode not in MODES:
        raise ValueError(f"mode must be {', '.join(MODES[:-1])} or {MODES[-1]}, not {mode!r}")
    for name, count in (("every", every), ("particles", particles)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}")
    if trust_region is not None and not trust_region > 0:
        raise ValueError(f"trust_region must be a number of nats above 0, not {trust_region!r}")
    if mode != "exact" and (particles > 1 or batched):
        raise ValueError(
            f"{'particles' if particles > 1 else 'batched'} needs both networks at every step: use mode='exact', not {mode!r}"
        )
    if anchors > 1 and (mode == "reuse" or trust_region is not None):
        raise ValueError(
            f"{'mode reuse' if mode == 'reuse' else 'trust_region'} is for one anchor, and there are {anchors}"
        )
    if mode == "weights" and trust_region is not None:
        raise ValueError(
            "trust_region needs the difference of both networks: use mode='exact' or mode='reuse'"
        )
    if str(pipe.scheduler.config.get("variance_type", "")).startswith("learned"):
        raise ValueError(
            f"{type(pipe.scheduler).__name__} has a learned variance, whose mixture is not one of outputs: use a fixed one"
        )
    registry = getattr(getattr(pipe, family_of(pipe).denoiser), "_diffusers_hook", None)
    if registry and HOOK in registry.hooks:
        raise ValueError(
            "this pipeline is being realigned already: leave that context first, or give several anchors to one"
        )


def _attach(pipe: Any, anchor: Anchor, number: int, stack: ExitStack) -> Adapter | FullAnchor:
    family = family_of(pipe)
    if anchor.method == "full":
        return FullAnchor(unwrapped(getattr(pipe, family.denoiser)), anchor, family.name)
    adapter = Adapter(pipe, anchor, number)
    stack.callback(adapter.remove)
    return adapter


class _Hook(ModelHook):
    """Runs in place of the reference network's forward, inside whatever pipeline calls it."""

    def __init__(
        self, dial: Dial, clock: Clock, kl: PathKL, resampling: Resampling | None, mode: Mode
    ) -> None:
        super().__init__()
        self.dial, self.clock, self.kl, self.resampling, self.mode = (
            dial,
            clock,
            kl,
            resampling,
            mode,
        )
        self.compiled: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.fn_ref.original_forward
        call = Call(self.compiled or forward, args, kwargs)
        self.clock.tick(call.timestep)
        lams = self.dial.turn(call.x)
        mixed = self.mode(call, lams)
        self.kl.add(mixed.output[0], mixed.pull)
        if self.resampling:
            self.resampling.weigh(mixed.lams, mixed.differences)
        return mixed.output


@contextmanager
def _hooked(denoiser: nn.Module, hook: _Hook) -> Iterator[None]:
    network, before = unwrapped(denoiser), set(vars(denoiser))
    fresh = not hasattr(denoiser, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(hook, HOOK)
    ours, original, compiled = (
        denoiser.forward,
        hook.fn_ref.original_forward,
        network._compiled_call_impl,
    )
    if (
        compiled is not None and denoiser is network
    ):  # `.compile()` in place would trace the hook, too: what it is to trace is the network
        network._compiled_call_impl, hook.compiled = None, torch.compile(original)
    try:
        yield
    finally:
        if hook.compiled:
            network._compiled_call_impl = compiled
        outer = vars(denoiser).get("forward")
        registry.remove_hook(HOOK, recurse=False)
        if (
            getattr(denoiser, "_old_forward", None) is ours
        ):  # accelerate's offloading, switched on inside, goes on
            denoiser._old_forward, denoiser.forward = original, outer  # type: ignore[assignment]
        elif (
            not registry.hooks and "forward" not in before
        ):  # diffusers leaves a bound forward behind
            vars(denoiser).pop("forward", None)
        if fresh and not registry.hooks:
            del denoiser._diffusers_hook
