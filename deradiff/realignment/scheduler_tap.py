"""Sees every step that a scheduler takes, and the guided output that the pipeline passes to it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from functools import cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

from deradiff.realignment.carriers import all_plain


class StepObserver(ABC):
    """Is told of the steps of one scheduler."""

    @abstractmethod
    def begin_chain(self) -> None:
        """The pipeline has set new timesteps."""

    @abstractmethod
    def before_step(self, output: Any, timestep: Any, sample: Any) -> Any:
        """A step is about to be taken.

        Args:
            output: the network's output after guidance, possibly with companions.
            timestep: the scheduler's time of the step.
            sample: the noisy latents.

        Returns:
            The output to take the step with.
        """

    @abstractmethod
    def after_step(self, scheduler: Any, stepped: Any) -> Any:
        """A step was taken.

        Args:
            scheduler: that took it.
            stepped: what its `step` returned.

        Returns:
            What the pipeline gets in its place.
        """


_OBSERVERS: WeakKeyDictionary[Any, StepObserver] = WeakKeyDictionary()
"""The observer of each scheduler that has one. A copy of such a scheduler has none."""


class SchedulerTap:
    """Shows the steps of a pipeline's scheduler to an observer while it is attached.

    The scheduler becomes an instance of a subclass of its own class. So `step` has its signature,
    which pipelines read, and a copy of the scheduler steps for itself.

    Args:
        observer: is told of the steps.

    Attributes:
        scheduler: that it is attached to; None: none.
    """

    def __init__(self, observer: StepObserver) -> None:
        self.scheduler: Any = None
        self._observer = observer
        self._class: Any = None

    @property
    def is_attached(self) -> bool:
        """Whether it sees the steps of a scheduler."""
        return self.scheduler is not None

    def attach(self, scheduler: Any) -> None:
        """Show the steps of this scheduler from now on, and those of no other.

        A scheduler without a `step`, and one whose `step` somebody has replaced on the instance,
        cannot be seen: nothing is attached then.
        """
        if scheduler is self.scheduler:
            return
        self.release()
        if not hasattr(type(scheduler), "step") or "step" in vars(scheduler):
            return
        self.scheduler = scheduler
        self._class = type(scheduler)
        scheduler.__class__ = _observed_class(self._class)
        _OBSERVERS[scheduler] = self._observer

    def release(self) -> None:
        """Give the scheduler its own class back."""
        if self.scheduler is None:
            return
        _OBSERVERS.pop(self.scheduler, None)
        self.scheduler.__class__ = self._class
        self.scheduler = None


@cache
def _observed_class(scheduler_class: Any) -> Any:
    """The subclass of a scheduler's class whose steps an observer sees."""

    signature = inspect.signature(scheduler_class.step)

    class Observed(scheduler_class):
        @wraps(scheduler_class.step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            observer = _OBSERVERS.get(self)
            step = super().step
            if observer is None:
                args, kwargs = all_plain((args, kwargs))
                return step(*args, **kwargs)

            call = signature.bind(self, *args, **kwargs)
            given = call.arguments
            given["model_output"] = observer.before_step(
                given["model_output"], given.get("timestep"), given.get("sample")
            )
            args, kwargs = all_plain((call.args[1:], call.kwargs))
            return observer.after_step(self, step(*args, **kwargs))

        if hasattr(scheduler_class, "set_timesteps"):

            @wraps(scheduler_class.set_timesteps)
            def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
                observer = _OBSERVERS.get(self)
                if observer is not None:
                    observer.begin_chain()
                return super().set_timesteps(*args, **kwargs)

    Observed.__name__ = scheduler_class.__name__
    Observed.__qualname__ = scheduler_class.__qualname__
    Observed.__module__ = scheduler_class.__module__
    Observed.__doc__ = scheduler_class.__doc__
    return Observed
