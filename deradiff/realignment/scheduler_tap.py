"""Sees every step that a scheduler takes, and the guided output that the pipeline passes to it."""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from deradiff.realignment.carriers import all_plain


class StepObserver(ABC):
    """Is told of the steps of one scheduler."""

    @abstractmethod
    def begin_chain(self) -> None:
        """The pipeline has set new timesteps."""

    @abstractmethod
    def before_step(self, output: Any, options: dict[str, Any]) -> Any:
        """A step is about to be taken.

        Args:
            output: the network's output after guidance, possibly with companions.
            options: the other arguments of `step`: `timestep`, `sample` (the noisy latents) and
                what else the scheduler takes.

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

_USERS: Counter[type] = Counter()
"""How many schedulers of each class are observed."""

_STEPPING = threading.local()
"""The schedulers that are within a step, by thread: a class's `step` may call its parent's."""

_LOCK = threading.RLock()
"""Held while a class is changed: several threads may have a pipeline each."""


class SchedulerTap:
    """Shows the steps of a pipeline's scheduler to an observer while it is attached.

    The methods of the scheduler's class are wrapped meanwhile. So an instance keeps its class and
    its attributes, `step` keeps the signature that pipelines read, and a copy of the scheduler
    steps for itself.

    Args:
        observer: is told of the steps.

    Attributes:
        scheduler: that it is attached to; None: none.
    """

    def __init__(self, observer: StepObserver) -> None:
        self.scheduler: Any = None
        self._observer = observer

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
        with _LOCK:
            _OBSERVERS[scheduler] = self._observer
            _USERS[type(scheduler)] += 1
            if _USERS[type(scheduler)] == 1:
                _wrap_class(type(scheduler))

    def release(self) -> None:
        """See no more steps."""
        if self.scheduler is None:
            return
        with _LOCK:
            _OBSERVERS.pop(self.scheduler, None)
            _USERS[type(self.scheduler)] -= 1
            if _USERS[type(self.scheduler)] == 0:
                _unwrap_class(type(self.scheduler))
        self.scheduler = None


def _wrap_class(scheduler_class: Any) -> None:
    """Have the observers of a class's instances see their steps."""
    for name, wrap in (("step", _observed_step), ("set_timesteps", _observed_timesteps)):
        method = getattr(scheduler_class, name, None)
        if method is None:
            continue
        wrapper: Any = wrap(method)
        wrapper.is_inherited = name not in vars(scheduler_class)
        setattr(scheduler_class, name, wrapper)


def _unwrap_class(scheduler_class: Any) -> None:
    """Give a class its own methods back."""
    for name in ("step", "set_timesteps"):
        wrapper = vars(scheduler_class).get(name)
        if not hasattr(wrapper, "is_inherited"):
            continue
        if wrapper.is_inherited:
            delattr(scheduler_class, name)
        else:
            setattr(scheduler_class, name, wrapper.__wrapped__)


def _observed_step(method: Callable[..., Any]) -> Callable[..., Any]:
    """A class's `step` that shows itself to the observer of the instance, if there is one."""
    signature = inspect.signature(method)

    @wraps(method)
    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        observer = _OBSERVERS.get(scheduler)
        stepping = vars(_STEPPING).setdefault("schedulers", set())
        if observer is None or id(scheduler) in stepping:
            args, kwargs = all_plain((args, kwargs))
            return method(scheduler, *args, **kwargs)

        stepping.add(id(scheduler))
        try:
            call = signature.bind(scheduler, *args, **kwargs)
            given = call.arguments
            options = _options(given)
            given["model_output"] = observer.before_step(given["model_output"], options)
            args, kwargs = all_plain((call.args, call.kwargs))
            return observer.after_step(scheduler, method(*args, **kwargs))
        finally:
            stepping.discard(id(scheduler))

    return step


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a step beside the scheduler and the output, by name."""
    options = dict(list(arguments.items())[1:])
    options.pop("model_output")
    return all_plain(options | options.pop("kwargs", {}))


def _observed_timesteps(method: Callable[..., Any]) -> Callable[..., Any]:
    """A class's `set_timesteps` that tells the observer of the instance, if there is one."""

    @wraps(method)
    def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        observer = _OBSERVERS.get(scheduler)
        if observer is not None:
            observer.begin_chain()
        return method(scheduler, *args, **kwargs)

    return set_timesteps
