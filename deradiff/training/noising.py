"""How training disturbs clean latents, and what the network is to predict: by a noise schedule (SD1.5, SDXL), or a flow (SD3, FLUX)."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor


class Noising(Protocol):
    """A forward process, as training draws from it.

    kl_weight: sum over the schedule's steps of w, where a step's KL is w/2 times the squared difference of two networks' outputs.
    key: what the noisy latents and targets depend on, in words.
    """

    @property
    def kl_weight(self) -> float: ...

    @property
    def key(self) -> str: ...

    def draw(self, generator: torch.Generator) -> Tensor:
        """(1,) a timestep, as the denoiser takes it."""

    def time(self, timesteps: Tensor) -> Tensor:
        """(B,) in [0, 1]: 0 data, 1 noise."""

    def __call__(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the network's target, each (P, B, C, H, W). The P pictures of an example share noise (B, C, H, W) and
        timesteps (B,)."""


def noising_of(scheduler: Any) -> Noising:
    """The forward process behind a pipeline's scheduler, whatever sampler that is. Raises ValueError for one that cannot be trained."""
    if (
        "Flow" in type(scheduler).__name__
        or scheduler.config.get("prediction_type") == "flow_prediction"
    ):
        return Flow(scheduler)
    return Diffusion(scheduler)


class Diffusion:
    """Ho et al. 2020: sqrt(abar) x + sqrt(1 - abar) noise, timesteps uniform; the target is the noise, or v (Salimans & Ho 2022)."""

    def __init__(self, scheduler: Any) -> None:
        # The pipeline's own scheduler may be a sampler whose `add_noise` is scaled for itself (SDXL's Euler is): DDPM's is meant.
        self.schedule = DDPMScheduler.from_config(scheduler.config)
        self.prediction = self.schedule.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"a base model that predicts {self.prediction} cannot be trained: epsilon, v_prediction and flow models can"
            )

    @property
    def kl_weight(self) -> float:
        """w_t = SNR_{t-1}/SNR_t - 1 (method.md section 7; 13.06 in all on Stable Diffusion's schedule)."""
        snr = self.schedule.alphas_cumprod.double() / (1 - self.schedule.alphas_cumprod.double())
        return float((snr[:-1] / snr[1:] - 1).sum())

    @property
    def key(self) -> str:
        return f"{self.prediction} {self.schedule.alphas_cumprod.double().sum().item()!r} {len(self.schedule.alphas_cumprod)}"

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.randint(self.schedule.config.num_train_timesteps, (1,), generator=generator)

    def time(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.schedule.config.num_train_timesteps

    def __call__(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        both, t = noise.expand_as(latents).flatten(0, 1), timesteps.repeat(len(latents))
        clean = latents.flatten(0, 1)
        noisy = self.schedule.add_noise(clean, both, t)
        target = (
            both if self.prediction == "epsilon" else self.schedule.get_velocity(clean, both, t)
        )
        return noisy.unflatten(0, (len(latents), -1)), target.unflatten(0, (len(latents), -1))


class Flow:
    """Rectified flow (Esser et al. 2024): (1 - t) x + t noise, and the target is the velocity noise - x.

    Times are drawn as diffusers' SD3 and FLUX trainers draw them: the sigmoid of a standard normal picks a place in the schedule, whose
    static shift (SD3's 3; FLUX shifts when it samples, by the picture's size, and not here) is in its timesteps already.
    """

    def __init__(self, scheduler: Any) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.schedule = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.timesteps = self.schedule.timesteps  # descending, sigma times their number

    @property
    def kl_weight(self) -> float:
        """w_t = 2 [ln(t/t_n) - (t - t_n)], which telescopes (method.md section 4); as in `Diffusion` without the last step."""
        first, last = self.schedule.sigma_max, self.schedule.sigma_min
        return 2 * (math.log(first / last) - (first - last))

    @property
    def key(self) -> str:
        return f"flow {self.timesteps.double().sum().item()!r} {len(self.timesteps)}"

    def draw(self, generator: torch.Generator) -> Tensor:
        place = torch.sigmoid(torch.randn(1, generator=generator)) * len(self.timesteps)
        return self.timesteps[place.long().clamp(max=len(self.timesteps) - 1)]

    def time(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.schedule.config.num_train_timesteps

    def __call__(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        t = self.time(timesteps).to(latents.dtype).reshape(-1, *[1] * (noise.dim() - 1))
        return (1 - t) * latents + t * noise, noise - latents
