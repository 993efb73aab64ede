"""The same random numbers for every model that is evaluated on an input.

Some networks draw random numbers: AutoGuidance drops out parts of a layer, and so does a network in
training mode. The difference of two models is theirs alone where both draw the same numbers. What
is drawn afterwards is then the same for every lambda, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class RandomNumbers:
    """torch's global random numbers, from the same place for each of several evaluations.

    Args:
        device: that the networks run on.
    """

    def __init__(self, device: torch.device) -> None:
        # The CPU has numbers of its own beside those of an accelerator.
        self._has_accelerator = device.type not in ("cpu", "meta")
        self._device = device
        self._start: list[Tensor] | None = None
        self._end: list[Tensor] = []

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Draw what the first of these contexts drew."""
        if self._start is None:
            self._start = self._states()
            yield
            self._end = self._states()
            return
        is_drawn = any(not torch.equal(a, b) for a, b in zip(self._start, self._end))
        if is_drawn:
            self._set_states(self._start)
        yield
        if is_drawn:
            self._set_states(self._end)

    def _states(self) -> list[Tensor]:
        """Where the generators of the CPU and of the accelerator are."""
        states = [torch.get_rng_state()]
        if self._has_accelerator:
            states.append(self._module().get_rng_state(self._device))
        return states

    def _set_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._has_accelerator:
            self._module().set_rng_state(states[1], self._device)

    def _module(self) -> Any:
        """torch's module of the accelerator, such as `torch.cuda`."""
        return torch.get_device_module(self._device)
