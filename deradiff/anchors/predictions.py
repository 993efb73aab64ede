"""What a network predicts, as far as a scheduler's config or a file of weights says it.

Networks of one architecture may predict the noise (`epsilon`), v (`v_prediction`) or the velocity
of a flow (`flow_prediction`). Their outputs mean different things, and cannot be mixed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers

FLOW = "flow_prediction"

V_MARKER = "v_pred"
"""A tensor of this name, empty, marks a checkpoint in its authors' layout that predicts v."""

HEADER_KEY = "modelspec.prediction_type"
HEADER_VALUES = {"epsilon": "epsilon", "v": "v_prediction"}
"""What trainers write into the header of a checkpoint."""


def prediction_of(config: Mapping[str, Any]) -> str | None:
    """What networks predict that go with a scheduler.

    Args:
        config: of the scheduler.

    Returns:
        `epsilon`, `v_prediction`, `flow_prediction` or `sample`; None where it is not said.
    """
    class_name = str(config.get("_class_name", ""))
    if class_name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return FLOW
    if "prediction_type" in config:
        return config["prediction_type"]
    # A config that is older than the setting means its default.
    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None:
        return None
    setting = inspect.signature(scheduler_class.__init__).parameters.get("prediction_type")
    return setting.default if setting else None


def prediction_of_file(names: Iterable[str], texts: Mapping[str, str]) -> str | None:
    """What the network in a single file predicts.

    Args:
        names: of its tensors.
        texts: in its header.

    Returns:
        `epsilon` or `v_prediction`; None where it is not said.
    """
    if V_MARKER in names:
        return "v_prediction"
    return HEADER_VALUES.get(texts.get(HEADER_KEY, ""))
