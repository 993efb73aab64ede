"""One pipeline under test, and its calls."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from deradiff.models.pipelines import denoiser_name, denoiser_names

Change = Callable[[dict[str, Any], Mapping[str, Any]], None]
"""Changes arguments of a call, by the parameters that the pipeline takes."""

STEPS = 3
"""Denoising steps of a call, or 2 where the test has fewer."""

STRENGTH = 0.8
"""Of a call that begins at an image: of three steps it takes two."""

GUIDANCE_ARGUMENTS = ("true_cfg_scale", "guidance_scale")
GUIDANCE_SCALE = 4.0

MORE_INPUTS: dict[str, dict[str, Any]] = {
    # In place of what its language model would draw, token by token.
    "GlmImagePipeline": {"prior_token_ids": torch.tensor([[3, 14, 15, 92]])},
}
"""Arguments that tests leave to a large model, by the pipeline."""

GATE = 0.1
"""Standard deviation of weights that a network begins with as 0."""

LARGEST_DRAWN = 100.0
"""No weight that was drawn is larger."""

IMAGES_ARGUMENTS = ("num_images_per_prompt", "num_videos_per_prompt")
"""What pipelines call the number of images that they make of a prompt."""

SECOND_OF_CHAIN = "transformer_2"
"""The attribute of a second denoiser in one chain, as Wan 2.2 has it."""


class Subject:
    """A pipeline of diffusers' tests with its arguments. Each call has the same noise.

    Where the pipeline takes it, a call ends with latents, which show a difference that 8-bit images
    and a random decoder may hide; it has three steps, and guidance.

    Args:
        test_class: the class of diffusers' tests.

    Attributes:
        pipe: the pipeline.
        images_argument: the argument for the number of images of a prompt; None: there is none.
    """

    def __init__(self, test_class: Any) -> None:
        self._test = test_class()
        _seed()
        self.pipe = test_class.pipeline_class(**self._test.get_dummy_components())
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval()
        for network in self.networks.values():
            _fill_zeros(network)
        self.pipe.set_progress_bar_config(disable=True)
        self._parameters = inspect.signature(self.pipe.__call__).parameters
        names = [name for name in IMAGES_ARGUMENTS if name in self._parameters]
        self.images_argument = names[0] if names else None

        # All that we would have of a call, or as much of it as the pipeline takes.
        self._changes: list[Change] = [_as_latents, _with_steps, _with_guidance]
        if not self._samples():
            wanted = self._changes
            self._changes = []
            for change in wanted:
                self._changes.append(change)
                if not self._samples():
                    self._changes.pop()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The denoisers of one chain by their attribute; empty where the pipeline has none."""
        names = denoiser_names(self.pipe)
        if not names:
            return {}
        of_chain = (denoiser_name(self.pipe), SECOND_OF_CHAIN)
        return {name: getattr(self.pipe, name) for name in names if name in of_chain}

    def sample(self, **options: Any) -> Tensor:
        """What one call makes, as one row of numbers in double precision.

        Args:
            options: other arguments of the pipeline.
        """
        return numbers_of(self._output(options))

    def _output(self, options: Mapping[str, Any]) -> Any:
        """What one call returns."""
        _seed()
        with torch.no_grad():
            # Those that edit an image first go back to its noise.
            if hasattr(self._test, "get_dummy_inversion_inputs"):
                self.pipe.invert(**_given(self._test.get_dummy_inversion_inputs))
            return self.pipe(**self._arguments() | options)

    def sample_each(self, images: int, **options: Any) -> list[Tensor]:
        """What one call makes, as a row of numbers for each image.

        Args:
            images: that the call makes.
            options: other arguments of the pipeline.
        """
        parts: list[list[Tensor]] = [[] for _ in range(images)]
        for value in self._output(options).values():
            length = 0 if value is None else len(value)
            if not length or length % images:
                continue
            each = length // images
            for image, own in enumerate(parts):
                own.append(numbers_of(value[image * each : (image + 1) * each]))
        return [torch.cat(own) for own in parts]

    def longer(self) -> dict[str, Any]:
        """Arguments for twice the steps, where the pipeline takes a number of steps."""
        steps = self._arguments().get("num_inference_steps")
        return {"num_inference_steps": 2 * steps} if isinstance(steps, int) else {}

    def _samples(self) -> bool:
        """Whether the pipeline takes its arguments."""
        try:
            self.sample()
        except Exception:
            return False
        return True

    def _arguments(self) -> dict[str, Any]:
        """The arguments of a call, anew: pipelines change some of them."""
        arguments = _given(self._test.get_dummy_inputs)
        arguments |= MORE_INPUTS.get(type(self.pipe).__name__, {})
        for change in self._changes:
            change(arguments, self._parameters)
        return arguments

    @contextmanager
    def replaced(self, networks: Mapping[str, nn.Module]) -> Iterator[None]:
        """The stock pipeline with other networks.

        Args:
            networks: by the attribute of the denoiser.
        """
        own = {name: getattr(self.pipe, name) for name in networks}
        # A pipeline of several stages has a pipeline for each.
        stages = [part for part in vars(self.pipe).values() if isinstance(part, DiffusionPipeline)]
        pipes = [self.pipe, *stages]
        for pipe in pipes:
            pipe.register_modules(**networks)
        try:
            yield
        finally:
            for pipe in pipes:
                pipe.register_modules(**own)


def _given(make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Arguments of a test, some of which ask for the device."""
    takes_device = "device" in inspect.signature(make).parameters
    return make("cpu") if takes_device else make()


def _as_latents(arguments: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    """Have a call end with latents."""
    if "output_type" in parameters:
        arguments["output_type"] = "latent"


def _with_steps(arguments: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    """Have a call take three steps, or two where the test has fewer."""
    steps = arguments.get("num_inference_steps")
    if isinstance(steps, int):
        arguments["num_inference_steps"] = min(max(steps, 2), STEPS)
        # Sana Sprint names a time between for two steps alone.
        if "intermediate_timesteps" in parameters:
            arguments["intermediate_timesteps"] = None
        if "strength" in parameters:
            arguments |= {"num_inference_steps": STEPS, "strength": STRENGTH}


def _with_guidance(arguments: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    """Switch guidance on where the test leaves it off."""
    for name in GUIDANCE_ARGUMENTS:
        if name not in parameters:
            continue
        scale = arguments.get(name, parameters[name].default)
        if isinstance(scale, int | float) and scale <= 1:
            arguments[name] = GUIDANCE_SCALE
            if "negative_prompt" in parameters and "negative_prompt_embeds" not in arguments:
                arguments.setdefault("negative_prompt", "blurry")


def _fill_zeros(network: nn.Module) -> None:
    """Draw the weights that are all 0: gates that are closed hide the layers behind them.

    And those that nobody draws, which are whatever lay in memory: Lumina's pad_token.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.is_floating_point():
            continue
        largest = float(parameter.detach().abs().max()) if len(parameter.flatten()) else 0.0
        if largest == 0 or not largest < LARGEST_DRAWN:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (GATE * noise).to(parameter.dtype)


def numbers_of(value: Any) -> Tensor:
    """All numbers of a pipeline's output in one row, in double precision."""
    if isinstance(value, Tensor):
        return value.detach().double().flatten()
    if hasattr(value, "convert"):
        return numbers_of(np.asarray(value))
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(value.astype(np.float64)).flatten()
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, int | float):
        value = torch.tensor([float(value)])
        return value.double()
    parts = [numbers_of(part) for part in value if part is not None]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _seed() -> None:
    """Begin every stream of random numbers anew."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
