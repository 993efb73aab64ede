"""A pipeline whose guidance is any of those that pipelines of diffusers have.

Shapes: B images; latents (B, 4, 8, 8); text (B, L, 32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

GUIDANCE_SCALE = 3.0
BOUNDARY = 500
"""The time at which `TwoDenoisers` goes over to its second network."""

GuidedOutput = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
"""A guided output by a network, latents, a time, and the embeddings of a prompt and of none."""


def one_batch(network, x, t, text, empty):
    """Unconditional rows, then conditional ones."""
    out = network(torch.cat([x, x]), t, torch.cat([empty, text]), return_dict=False)[0]
    unconditional, conditional = out.chunk(2)
    return unconditional + GUIDANCE_SCALE * (conditional - unconditional)


def reversed_batch(network, x, t, text, empty):
    """Conditional rows first, as in Z-Image."""
    out = network(torch.cat([x, x]), t, torch.cat([text, empty]), return_dict=False)[0]
    conditional, unconditional = out.chunk(2)
    return conditional + (GUIDANCE_SCALE - 1) * (conditional - unconditional)


def two_calls(network, x, t, text, empty):
    """An evaluation for each branch, as in Qwen-Image and Wan."""
    conditional = network(x, t, text, return_dict=False)[0]
    unconditional = network(x, t, empty, return_dict=False)[0]
    return unconditional + GUIDANCE_SCALE * (conditional - unconditional)


def negated(network, x, t, text, empty):
    """The sign turned, as in Lumina 2 and Z-Image, in double precision."""
    guided = one_batch(network, x, t, text, empty)
    return -guided.double().float()


def rescaled(network, x, t, text, empty):
    """To the conditional norm, as in Qwen-Image: not linear."""
    conditional = network(x, t, text, return_dict=False)[0]
    unconditional = network(x, t, empty, return_dict=False)[0]
    guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
    norm = torch.norm(conditional, dim=1, keepdim=True)
    return guided * (norm / torch.norm(guided, dim=1, keepdim=True))


def three_rows(network, x, t, text, empty):
    """Three branches in one batch, as in InstructPix2Pix and PAG."""
    rows = torch.cat([text, 0.5 * text + 0.5 * empty, empty])
    out = network(torch.cat([x] * 3), t, rows, return_dict=False)[0]
    conditional, half, unconditional = out.chunk(3)
    return unconditional + 2.0 * (conditional - half) + 1.5 * (half - unconditional)


def in_place(network, x, t, text, empty):
    """Written into the output itself, as some pipelines do."""
    out = network(torch.cat([x, x]), t, torch.cat([empty, text]), return_dict=False)[0]
    unconditional, conditional = out[: len(x)], out[len(x) :]
    conditional -= unconditional
    conditional *= GUIDANCE_SCALE
    unconditional += conditional
    return unconditional


def without(network, x, t, text, empty):
    """No guidance."""
    return network(x, t, text, return_dict=False)[0]


GUIDANCES: dict[str, GuidedOutput] = {
    function.__name__: function
    for function in (
        one_batch,
        reversed_batch,
        two_calls,
        negated,
        rescaled,
        three_rows,
        in_place,
        without,
    )
}


class ToyPipeline(DiffusionPipeline):
    """A UNet, a scheduler, and a guidance of GUIDANCES.

    Args:
        unet: a UNet2DConditionModel.
        scheduler: any scheduler that it takes.
    """

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, guidance: str = "one_batch", images: int = 2, steps: int = 4, dtype: Any = None
    ) -> Tensor:
        """Latents (B, 4, 8, 8) after the last step.

        Args:
            guidance: a key of GUIDANCES.
            images: B.
            steps: of the chain.
            dtype: the precision that the network is told the time in.
        """
        x, text, empty = toy_inputs(images)
        self.scheduler.set_timesteps(steps)
        x = x * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            told = t if dtype is None else t.to(dtype)
            scaled = self.scheduler.scale_model_input(x, t)
            guided = GUIDANCES[guidance](self.unet, scaled, told, text, empty)
            x = self.scheduler.step(guided, t, x, return_dict=False)[0]
        return x


class TwoDenoisers(DiffusionPipeline):
    """One UNet for early steps and another for late ones, as the transformers of Wan 2.2.

    Args:
        transformer: for times of at least BOUNDARY.
        transformer_2: for the rest.
        scheduler: any scheduler that they take.
    """

    def __init__(self, transformer: Any, transformer_2: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, transformer_2=transformer_2, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(self, steps: int = 6) -> Tensor:
        """Latents (2, 4, 8, 8) after the last step.

        Args:
            steps: of the chain.
        """
        x, text, empty = toy_inputs(2)
        self.scheduler.set_timesteps(steps)
        x = x * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(x, t)
            network = self.transformer if t >= BOUNDARY else self.transformer_2
            guided = two_calls(network, scaled, t, text, empty)
            x = self.scheduler.step(guided, t, x, return_dict=False)[0]
        return x


def toy_inputs(images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, and the embeddings of prompts and of no prompt, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 4, 8, 8, generator=generator)
    text = torch.randn(images, 5, 32, generator=generator)
    empty = torch.randn(1, 5, 32, generator=generator).expand(images, -1, -1)
    return x, text, empty
