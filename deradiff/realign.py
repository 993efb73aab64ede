"""The dial: `with realign(pipe, anchor, lam) as dial:` realigns any call of a stock diffusers pipeline to beta / lam while it samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from deradiff.adapters import Adapter
from deradiff.anchors import Anchor, check_anchor_family
from deradiff.families import family_of
from deradiff.mixtures import FullAnchor, OutputMixture, WeightMixture
from deradiff.path_kl import PathKL

MODES: dict[str, type[OutputMixture] | type[WeightMixture]] = {"exact": OutputMixture, "weights": WeightMixture}
HOOK = "deradiff_realign"


class Dial:
    """How strongly a pipeline is realigned, and what that cost in KL.

    lam: a number, or one per anchor; may be set at any time, from a step callback too. 0 is the reference and 1 the anchor, bit for bit.
    """

    def __init__(self, pipe: Any, anchors: int, lam: float | Sequence[float]) -> None:
        self.kl, self._anchors, self._warned = PathKL(pipe), anchors, False
        self.lam = lam  # type: ignore[assignment]

    @property
    def lam(self) -> float | list[float]:
        return self.lams[0] if self._anchors == 1 else list(self.lams)

    @lam.setter
    def lam(self, lam: float | Sequence[float]) -> None:
        lams = list(lam) if isinstance(lam, Sequence) and not isinstance(lam, str) else [lam]
        for value in lams:
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise ValueError(f"lam must be a finite number, 0 (the reference) or more (1: the anchor), not {value!r}")
        if len(lams) != self._anchors:
            raise ValueError(f"{self._anchors} anchor(s) need as many values of lam, and there are {len(lams)}")
        if sum(lams) > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"lam {lam} lies beyond the anchor: it extrapolates, and deterministic samplers then err far more than ancestral ones "
                "(Euler ancestral, DDPM, DDIM with eta=1)",
                stacklevel=3,
            )
        self.lams = [float(value) for value in lams]

    @property
    def path_kl(self) -> Tensor:
        """KL of the realigned chain to the reference's, in nats: (images,), of the last pipeline call, or of the one that goes on.

        An estimate (PathKL). nan where a step did not evaluate the reference: see `path_kl` of `realign`.
        """
        return self.kl.total


@contextmanager
def realign(
    pipe: Any,
    anchor: str | Path | Anchor | Sequence[str | Path | Anchor],
    lam: float | Sequence[float],
    mode: str = "exact",
    path_kl: bool = False,
) -> Iterator[Dial]:
    """Realign a diffusers pipeline to p_ref^(1-lam) p_anchor^lam, step by step (DeRaDiff, Algorithm 1), until the context is left.

    anchor: what `load_anchor` takes, or several with as many lams: p_ref^(1 - sum lam_i) prod p_i^(lam_i).
    mode: `exact` mixes the outputs of reference and anchor, which for every sampler whose step is linear in the output is the closed form
    (two evaluations a step; one at lam 0 and 1); `weights` evaluates once, at theta_ref + lam (theta_anchor - theta_ref), its first order.
    path_kl: also evaluate the reference where the mode itself does not need it (exact: lam = 1; weights: always), so that
    `dial.path_kl` is known there.

    Both networks see the same input: guidance and the scheduler's step act once, on the mixture (`guidance_rescale` and clipping too).
    Switch on offloading before, not inside. Raises ValueError, in one sentence, for a mode, lam, anchor or scheduler that cannot be.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be {' or '.join(MODES)}, not {mode!r}")
    family = family_of(pipe)
    denoiser = getattr(pipe, family.denoiser)
    if str(pipe.scheduler.config.get("variance_type", "")).startswith("learned"):
        raise ValueError(f"{type(pipe.scheduler).__name__} has a learned variance, whose mixture is not one of outputs: use a fixed one")
    if hasattr(denoiser, "_diffusers_hook") and HOOK in denoiser._diffusers_hook.hooks:
        raise ValueError("this pipeline is being realigned already: leave that context first, or give several anchors to one")
    sources = list(anchor) if isinstance(anchor, Sequence) and not isinstance(anchor, str) else [anchor]
    dial = Dial(pipe, len(sources), lam)
    found = [check_anchor_family(source, family.name) for source in sources]
    with ExitStack() as stack:
        attached = [_attach(pipe, anchor, f"deradiff_{i}", stack) for i, anchor in enumerate(found)]
        mixture = MODES[mode](denoiser, attached, path_kl)
        stack.enter_context(_hooked(denoiser, _Hook(dial, mixture)))
        yield dial


def _attach(pipe: Any, anchor: Anchor, name: str, stack: ExitStack) -> Adapter | FullAnchor:
    family = family_of(pipe)
    if anchor.method == "full":
        return FullAnchor(getattr(pipe, family.denoiser), anchor, family.name)
    adapter = Adapter(pipe, anchor, name)
    stack.callback(adapter.remove)
    return adapter


class _Hook(ModelHook):
    """Runs in place of the reference network's forward, inside whatever pipeline calls it."""

    def __init__(self, dial: Dial, mixture: OutputMixture | WeightMixture) -> None:
        super().__init__()
        self.dial, self.mixture = dial, mixture

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.fn_ref.original_forward
        output, reference = self.mixture(forward, args, kwargs, self.dial.lams)
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        self.dial.kl.add(timestep, output[0], None if reference is None else reference[0])
        return output


@contextmanager
def _hooked(denoiser: nn.Module, hook: ModelHook) -> Iterator[None]:
    before = set(vars(denoiser))
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(hook, HOOK)
    try:
        yield
    finally:
        registry.remove_hook(HOOK, recurse=False)
        if not registry.hooks:  # diffusers leaves its registry and a bound forward behind
            for name in {"forward", "_diffusers_hook"} - before:
                vars(denoiser).pop(name, None)
