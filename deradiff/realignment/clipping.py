"""What a step makes of two outputs, where the scheduler clips its predictions.

Such a step is not linear in the output. How far its mean is from the reference's is then measured
on the step itself: both outputs are stepped with the same noise, and the distance is expressed as
the difference of outputs that would make it in the same step without clipping.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

CLIPPING_SETTINGS = ("clip_sample", "clip_denoised", "thresholding")
"""Settings of schedulers whose steps are not linear in the network's output."""

SMALLEST_SLOPE = 1e-5
"""Below it, an unclipped step does not depend on the output, and there is nothing to compare."""


def clipping_setting(scheduler: Any) -> str | None:
    """The setting by which a scheduler clips its predictions; None: it does not.

    A config also keeps settings of the scheduler that it was made from. These do not count.
    """
    own = inspect.signature(type(scheduler).__init__).parameters
    for setting in CLIPPING_SETTINGS:
        if setting in own and scheduler.config.get(setting):
            return setting
    return None


def effective_difference(
    scheduler: Any, options: dict[str, Any], output: Tensor, reference: Tensor
) -> Tensor:
    """The difference of outputs that moves an unclipped step as far as these move the clipped one.

    Args:
        scheduler: at the step, which it does not take.
        options: of its `step`, with the time and the sample.
        output: the guided output (images, ...).
        reference: the reference's guided output (images, ...).

    Returns:
        (images, ...); where nothing is clipped it is `output - reference`; nan at a step that would
        not move without clipping.
    """
    unclipped = copy.deepcopy(scheduler)
    settings = [setting for setting in CLIPPING_SETTINGS if setting in scheduler.config]
    unclipped.register_to_config(**dict.fromkeys(settings, False))
    zeros = torch.zeros_like(output)
    slope = (_next(unclipped, options, zeros + 1) - _next(unclipped, options, zeros)).mean()
    if slope.abs() < SMALLEST_SLOPE:
        return torch.full_like(output, torch.nan)
    moved = _next(scheduler, options, output) - _next(scheduler, options, reference)
    return moved / slope


def _next(scheduler: Any, options: dict[str, Any], output: Tensor) -> Tensor:
    """The next latents by a copy of a scheduler, with the same noise at every call."""
    arguments = {**options, "model_output": output}
    if arguments.get("generator") is not None:
        arguments["generator"] = torch.Generator(output.device).manual_seed(0)
    arguments["sample"] = arguments["sample"].to(output.dtype)
    arguments.pop("return_dict", None)
    devices = [output.device] if output.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return copy.deepcopy(scheduler).step(**arguments, return_dict=False)[0]
