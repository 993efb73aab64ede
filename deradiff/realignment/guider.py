"""`RealignGuidance`: the dial as a component of a modular pipeline, around its guider.

A call of the pipeline goes through these states:

    set_state, first step  -> the pipeline is realigned: `deradiff.realign` is entered
    every evaluation       -> is mixed, as in the context, and guided by the wrapped guider
    the last step          -> the context is left, and the network is as it was

An interrupted call leaves the context open. It ends with the next call of the pipeline, or with the
next evaluation that is none of this guider's.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from diffusers import guiders
from diffusers.guiders import BaseGuidance

from deradiff.anchors.anchor import Anchor, load_anchor
from deradiff.method.branches import ByBranch
from deradiff.method.lambdas import Lambda
from deradiff.realignment.attachment import HOOK
from deradiff.realignment.caller import calling_pipeline
from deradiff.realignment.context import Source, realign, sources_of
from deradiff.realignment.dial import Dial, validated_lams

Lam = Lambda | ByBranch
"""What lambda of one anchor may be."""


class RealignGuidance(BaseGuidance):
    """A guider of diffusers' modular pipelines that realigns the pipeline it is in.

    It wraps another guider, and does what `deradiff.realign` does, without a context:

        pipe.update_components(guider=deradiff.RealignGuidance(pipe.guider, anchor, lam=0.5))

    While the pipeline runs, its denoiser is realigned; between two calls it is as it was. Another
    guider in its place ends it: `pipe.update_components(guider=realigned.guider)`. Attributes of
    the wrapped guider are read and set through this one (`pipe.guider.guidance_scale = 4`).

    Anchors are attached to the network at the beginning of each call, which `deradiff.realign` does
    once for all calls within its context.

    Args:
        guider: the guider to wrap: any of diffusers', or its config, as `config` has it.
        anchor: as of `deradiff.realign`.
        lam: as of `deradiff.realign`. It can be changed at any time: `pipe.guider.lam = ...`.
        mode: as of `deradiff.realign`, and so are the arguments that follow.
        path_kl: evaluate the reference also where the mode does not need it.
        every: of mode `reuse`: steps from one evaluation of the difference to the next.
        particles: rows of the batch that are the particles of one image.
        trust_region: nats of KL that the chain may go from the anchor's chain.
        batched: run the rows of a LoRA anchor and of the reference as one batch.

    Attributes:
        guider: the wrapped guider.
        dial: of the last call of the pipeline, or of the one that is running: `dial.path_kl`,
            `dial.evaluations` and `dial.ess`; None before the first.

    Raises:
        ValueError: for an unsupported lam or guider. What `deradiff.realign` refuses is refused at
            the first step of a call.

    Example:
        ```python
        pipe.update_components(guider=deradiff.RealignGuidance(pipe.guider, "anchor", lam=0.5))
        image = pipe(prompt="a red fox in the snow", output="images")[0]
        pipe.guider.lam = 0.25
        weaker = pipe(prompt="a red fox in the snow", output="images")[0]
        ```
    """

    def __init__(
        self,
        guider: BaseGuidance | Mapping[str, Any],
        anchor: Source | Sequence[Source],
        lam: Lam | Sequence[Lam],
        mode: str = "exact",
        path_kl: bool = False,
        every: int = 4,
        particles: int = 1,
        trust_region: float | None = None,
        batched: bool = False,
    ) -> None:
        # The base class's own state is that of the wrapped guider.
        own_guider = _guider_from(guider)
        sources = sources_of(anchor)
        self._lams = validated_lams(lam, len(sources))
        self._options: dict[str, Any] = {
            "mode": mode,
            "path_kl": path_kl,
            "every": every,
            "particles": particles,
            "trust_region": trust_region,
            "batched": batched,
        }
        self._sources = sources
        self._anchors: list[Anchor] = []
        self._release: Callable[[], Any] | None = None
        self._is_last_step = False
        self.dial: Dial | None = None
        self.register_to_config(
            guider=_config_of(own_guider),
            anchor=[_name_of(source) for source in sources],
            lam=_plain_lams(self._lams),
            **self._options,
        )
        self.guider = own_guider

    @property
    def lam(self) -> Lam | list[Lam]:
        """Lambda, as of `deradiff.Dial`.

        Raises:
            ValueError: for a value that is no lambda, or another number of them than anchors.
        """
        return self._lams[0] if len(self._lams) == 1 else list(self._lams)

    @lam.setter
    def lam(self, lam: Lam | Sequence[Lam]) -> None:
        lams = validated_lams(lam, len(self._sources))
        if self._release is not None and self.dial is not None:
            self.dial.lam = lams  # type: ignore[assignment]
        self._lams = lams
        self.register_to_config(lam=_plain_lams(lams))

    def release(self) -> None:
        """Give the pipeline back as it was, after a call that was interrupted."""
        if self._release is not None:
            release = self._release
            self._release = None
            release()

    def new(self, **kwargs: Any) -> RealignGuidance:
        """A copy, with other arguments where they are given.

        Args:
            kwargs: arguments of the constructor.
        """
        arguments = {
            "guider": _config_of(self.guider),
            "anchor": list(self._sources),
            "lam": list(self._lams),
            **self._options,
        }
        return type(self)(**(arguments | kwargs))

    def save_config(self, *args: Any, **kwargs: Any) -> None:
        """Save the arguments as JSON, anchors by their path.

        Raises:
            ValueError: for a lambda that is not a number.
        """
        if self.config["lam"] is None:
            raise ValueError(
                "the config of RealignGuidance holds numbers as lam, and no tensor, schedule or "
                "lam of a branch: set guider.lam to a number before saving"
            )
        super().save_config(*args, **kwargs)

    # What a pipeline asks of its guider: all is answered by the wrapped one.

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step of the pipeline, and realign the pipeline at the first one.

        Raises:
            ValueError: for a pipeline that cannot be realigned.
        """
        self.guider.set_state(step=step, num_inference_steps=num_inference_steps, timestep=timestep)
        if step == 0:
            self.release()
        if self._release is None:
            self._realign_caller()
        self._is_last_step = step >= num_inference_steps - 1

    def get_state(self) -> dict[str, Any]:
        """The wrapped guider's state."""
        return self.guider.get_state()

    def enable(self) -> None:
        """Switch the wrapped guider's guidance on. Lambda is as it is."""
        self.guider.enable()

    def disable(self) -> None:
        """Switch the wrapped guider's guidance off. Lambda is as it is."""
        self.guider.disable()

    def prepare_models(self, denoiser: Any) -> None:
        """Prepare the denoiser for an evaluation."""
        self.guider.prepare_models(denoiser)

    def cleanup_models(self, denoiser: Any) -> None:
        """Undo what `prepare_models` did."""
        self.guider.cleanup_models(denoiser)

    def prepare_inputs(self, data: Any) -> Any:
        """The inputs of each evaluation of a step."""
        return self.guider.prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> Any:
        """The inputs of each evaluation of a step, out of a block's state."""
        return self.guider.prepare_inputs_from_block_state(data, input_fields)

    def __call__(self, data: Any) -> Any:
        """Guide the outputs of a step."""
        return self.guider(data)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Guide the outputs of a step."""
        return self.guider.forward(*args, **kwargs)

    @property
    def is_conditional(self) -> bool:
        """Whether the evaluation that was prepared last is one for the prompt."""
        return self.guider.is_conditional

    @property
    def num_conditions(self) -> int:
        """The number of evaluations of a step."""
        return self.guider.num_conditions

    @property
    def _input_predictions(self) -> Any:  # type: ignore[override]
        return self.guider._input_predictions

    def __getattr__(self, name: str) -> Any:
        """What the wrapped guider has, such as `guidance_scale`."""
        guider = vars(self).get("guider")
        if guider is None or name.startswith(("__", "_diffusers")):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(guider, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute here, or on the wrapped guider where it is one of its own."""
        guider = vars(self).get("guider")
        is_own = name in vars(self) or hasattr(type(self), name) or name.startswith("_diffusers")
        if is_own or guider is None or not hasattr(guider, name):
            super().__setattr__(name, value)
        else:
            setattr(guider, name, value)

    # Entering and leaving `deradiff.realign`.

    def _realign_caller(self) -> None:
        """Realign the pipeline whose call this is. Raises ValueError."""
        pipe = calling_pipeline(None)
        self.check_pipeline(pipe)
        self._anchors = self._anchors or [load_anchor(source) for source in self._sources]
        stack = ExitStack()
        dial = stack.enter_context(realign(pipe, self._anchors, self._lams, **self._options))
        for component in pipe.components.values():
            registry = getattr(component, "_diffusers_hook", None)
            hook: Any = registry.get_hook(HOOK) if registry else None
            if hook is not None:
                # The network does not keep the guider alive.
                hook.gate = _weakly(self._is_called, False)
                hook.steps.on_step = _weakly(self._end_step, None)
        self.dial = dial
        self._release = weakref.finalize(self, stack.close)

    def check_pipeline(self, pipe: Any) -> None:
        """Check that this guider can realign a pipeline.

        Args:
            pipe: the pipeline.

        Raises:
            ValueError: for one whose guider this is not, or that has another guider beside it.
        """
        if not self._is_part_of(pipe):
            raise ValueError(
                "RealignGuidance acts in calls of the modular pipeline whose guider it is: call "
                "pipe.update_components(guider=...) with it"
            )
        names = []
        for name, component in pipe.components.items():
            if isinstance(component, BaseGuidance):
                names.append(name)
        if len(names) > 1:
            raise ValueError(
                f"{type(pipe).__name__} has several guiders ({', '.join(names)}), each for a part "
                "of what is sampled: use deradiff.realign, which realigns all of it"
            )

    def _is_part_of(self, pipe: Any) -> bool:
        """Whether this is a component of a pipeline."""
        components = getattr(pipe, "components", {})
        return any(component is self for component in components.values())

    def _is_called(self) -> bool:
        """Whether the network is evaluated for this guider; otherwise the context is left."""
        if self._is_part_of(calling_pipeline(None)):
            return True
        self.release()
        return False

    def _end_step(self, is_last_of_chain: bool) -> None:
        """Leave the context after the last step of a call."""
        scheduler = getattr(calling_pipeline(None), "scheduler", None)
        takes_single_steps = getattr(scheduler, "order", 1) == 1
        if is_last_of_chain or (self._is_last_step and takes_single_steps):
            self.release()


def _weakly(method: Callable[..., Any], default: Any) -> Callable[..., Any]:
    """A method that can be called without keeping its object alive.

    Args:
        method: a bound method.
        default: what it returns when the object is gone.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        bound = reference()
        return default if bound is None else bound(*args)

    return call


def _guider_from(guider: BaseGuidance | Mapping[str, Any]) -> BaseGuidance:
    """A guider, or the one that a config describes. Raises ValueError."""
    if isinstance(guider, RealignGuidance):
        raise ValueError(
            "RealignGuidance does not wrap another one: give one of them several anchors, or wrap "
            "its guider (guider.guider)"
        )
    if isinstance(guider, BaseGuidance):
        return guider
    name = guider.get("_class_name", "") if isinstance(guider, Mapping) else ""
    guider_class = getattr(guiders, name, None) if name else None
    if guider_class is None:
        raise ValueError(
            "RealignGuidance wraps a guider of diffusers, such as pipe.guider of a modular "
            f"pipeline, not {guider!r}"
        )
    return guider_class.from_config(dict(guider))


def _config_of(guider: BaseGuidance) -> dict[str, Any]:
    """The config of a guider with its class, in values that JSON has."""
    config: dict[str, Any] = {"_class_name": type(guider).__name__}
    for key, value in guider.config.items():
        if not key.startswith("_"):
            config[key] = _plain(value)
    return config


def _plain(value: Any) -> Any:
    """A value with dataclasses, such as the layers to be skipped, as dictionaries."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _name_of(source: Source) -> str:
    """The path or hub id of an anchor."""
    return source.source if isinstance(source, Anchor) else str(source)


def _plain_lams(lams: Sequence[Any]) -> list[float] | None:
    """Lambdas as a config holds them; None where one is not a number."""
    return list(lams) if all(isinstance(lam, float) for lam in lams) else None
