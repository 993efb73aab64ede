"""Where a stage's numbers and images go besides its run directory: W&B, TensorBoard, or nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from configs.functions import function_at
from configs.settings import setting
from deradiff.terminal import warn

TRACKERS = {
    "wandb": "configs.wandb_tracker:start",
    "tensorboard": "configs.tensorboard_tracker:start",
}
"""From a kind to the function that starts it; its module is imported when a run starts."""

ABANDONED: list[str] = []
"""Trackers that did not end in time. What they have left to do at the process's exit is skipped."""

KINDS = (*TRACKERS, "none")
MODES = ("online", "offline")


@dataclass
class TrackingConfig:
    """Where a run is tracked."""

    kind: str = setting("wandb", "wandb, tensorboard or none")
    mode: str | None = setting(None, "of W&B: online or offline; null: online where a key is set")
    project: str = setting("deradiff", "the W&B project")
    tags: list[str] = setting([], "of W&B runs, beside the stage's name")
    group: str = setting(
        "", "runs of one experiment, linked in W&B; empty: those of one base model"
    )

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"tracking must be wandb, tensorboard or none, not {self.kind!r}")
        if self.mode not in (None, *MODES):
            raise ValueError(
                f"tracking.mode must be online or offline, not {self.mode!r}; "
                "tracking=none turns tracking off"
            )
        if self.kind == "tensorboard" and find_spec("tensorboard") is None:
            raise ValueError(
                "tracking=tensorboard needs a package that is not installed: "
                "type pip install tensorboard"
            )


class Tracker:
    """A tracker that tracks nothing; also the interface, so no stage asks whether it is tracked."""

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers of one step."""

    def curve(self, over: str, point: dict[str, float]) -> None:
        """Numbers at one place of an axis that is not the step, such as lambda.

        Args:
            over: the axis.
            point: its value, and the numbers there.
        """

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table; a cell that is a `Path` to an image is shown as the image."""

    def image(self, name: str, path: Path, caption: str = "") -> None:
        """One image file: png, or svg shown as html."""

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """A folder or file as a versioned artifact."""

    def uses(self, name: str, kind: str) -> None:
        """The artifact of an earlier stage that this run starts from."""


class GuardedTracker(Tracker):
    """A tracker whose failures are reported, each kind once, and do not stop the run.

    The run's own files hold everything that is tracked.

    Args:
        tracker: the tracker.
        stage: for the message.
    """

    def __init__(self, tracker: Tracker, stage: str) -> None:
        self.tracker = tracker
        self.stage = stage
        self._failed: set[str] = set()

    def _try(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self.tracker, method)(*arguments)
        except Exception as error:  # whatever a tracker raises
            if method not in self._failed:
                warn(f"{self.stage}: the tracker failed ({method}: {error}); going on without it")
            self._failed.add(method)

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers of one step."""
        self._try("log", values, step)

    def curve(self, over: str, point: dict[str, float]) -> None:
        """Numbers at one place of an axis."""
        self._try("curve", over, point)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table."""
        self._try("table", name, columns, rows)

    def image(self, name: str, path: Path, caption: str = "") -> None:
        """One image file."""
        self._try("image", name, path, caption)

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """A folder or file."""
        self._try("artifact", name, kind, path)

    def uses(self, name: str, kind: str) -> None:
        """An artifact of an earlier stage."""
        self._try("uses", name, kind)


class Start(Protocol):
    """A function that starts a tracker."""

    def __call__(
        self,
        tracking: TrackingConfig,
        stage: str,
        run_dir: Path,
        config: dict[str, Any],
        group: str,
        stack: ExitStack,
    ) -> Tracker:
        """Start it.

        Args:
            tracking: the stage's settings.
            stage: the stage's name.
            run_dir: of the run.
            config: nested settings, for the tracker's own record.
            group: of the run, where the settings name none.
            stack: ends the tracker at its end.
        """


@contextmanager
def tracker(
    tracking: TrackingConfig,
    stage: str,
    run_dir: Path,
    config: dict[str, Any],
    main_process: bool = True,
    group: str = "",
) -> Iterator[Tracker]:
    """The stage's tracker, while the context lasts.

    W&B writes offline where no key is set. A tracker that cannot start, or fails on the way, is
    named, and the run goes on without it.

    Args:
        tracking: which one.
        stage: the stage's name.
        run_dir: of the run.
        config: nested settings, for the tracker's own record.
        main_process: other processes are not tracked.
        group: of the run, where the config names none.
    """
    if tracking.kind == "none" or not main_process:
        yield Tracker()
        return
    # The stack ends the tracker with the context, also where the stage fails.
    stack = ExitStack()
    try:
        start: Start = function_at(TRACKERS[tracking.kind])
        started = start(tracking, stage, run_dir, config, group, stack)
    except Exception as error:
        warn(f"{stage}: the tracker {tracking.kind} did not start ({error}); going on without it")
        started = Tracker()
    try:
        yield GuardedTracker(started, stage)
    except BaseException as error:
        _end(stack, stage, error)
        raise
    _end(stack, stage)


def _end(stack: ExitStack, stage: str, error: BaseException | None = None) -> None:
    """End a tracker. What goes wrong there is reported, and is no failure of the run."""
    try:
        stack.__exit__(type(error) if error else None, error, None)
    except Exception as failure:  # whatever a tracker raises
        warn(
            f"{stage}: the tracker failed at its end ({failure}); the run's own files hold "
            "everything that it was given"
        )
