"""The forward processes of training: a noise schedule (SD1.5, SDXL) or a flow (the others).

Shapes: B examples, P images of an example, latents of C channels, H rows and W columns.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from deradiff.method.schedulers import flow_shift


class Noising(Protocol):
    """A forward process, as training draws from it.

    T timesteps can be drawn.
    """

    @property
    def timesteps(self) -> Tensor:
        """The timesteps (T,) that can be drawn, as the denoiser takes them."""

    @property
    def shares(self) -> Tensor:
        """The probability (T,) with which `draw` gives each timestep, in double precision."""

    @property
    def kl_weights(self) -> Tensor:
        """w (T,) of the step that leaves each timestep, in double precision.

        The KL of one step is w / 2 times the squared difference of two networks' outputs. The last
        step, to the data, has none.
        """

    @property
    def kl_weight(self) -> float:
        """The sum of `kl_weights`."""

    @property
    def key(self) -> str:
        """A text that names all that the noisy latents and the targets depend on."""

    def draw(self, generator: torch.Generator) -> Tensor:
        """A random timestep (1,), as the denoiser takes it."""

    def time(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) as a time in [0, 1]: 0 is data, 1 is noise."""

    def __call__(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Add noise to clean latents.

        Args:
            latents: (P, B, C, H, W).
            noise: (B, C, H, W), shared by the P images of an example.
            timesteps: (B,), shared likewise.

        Returns:
            The noisy latents and the network's target, (P, B, C, H, W) each.
        """


def noising_of(scheduler: Any) -> Noising:
    """The forward process behind a pipeline's scheduler, whatever sampler that is.

    Raises:
        ValueError: for a prediction type that cannot be trained.
    """
    is_flow_class = "Flow" in type(scheduler).__name__
    if is_flow_class or scheduler.config.get("prediction_type") == "flow_prediction":
        return Flow(scheduler)
    return Diffusion(scheduler)


class Diffusion:
    """A noise schedule (Ho et al. 2020): sqrt(abar) x + sqrt(1 - abar) noise.

    Timesteps are uniform. The target is the noise, or v (Salimans & Ho 2022).

    Args:
        scheduler: the pipeline's scheduler, of which the config is read.
    """

    def __init__(self, scheduler: Any) -> None:
        # The pipeline's scheduler may be a sampler whose `add_noise` is scaled for that sampler
        # (SDXL's Euler is one). DDPM's is meant.
        self.schedule = DDPMScheduler.from_config(scheduler.config)
        self.prediction = self.schedule.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"a base model that predicts {self.prediction} cannot be trained: "
                "epsilon, v_prediction and flow models can"
            )

    @property
    def timesteps(self) -> Tensor:
        """0 (data) to T - 1 (noise)."""
        return torch.arange(self.schedule.config.num_train_timesteps)

    @property
    def shares(self) -> Tensor:
        """1 / T each."""
        count = self.schedule.config.num_train_timesteps
        return torch.full((count,), 1 / count, dtype=torch.float64)

    @property
    def kl_weights(self) -> Tensor:
        """w_t = SNR_{t-1} / SNR_t - 1 (docs/method.md, *Beta has one convention*).

        Of a network that predicts v, abar_t times that: eps is sqrt(abar) v and what the network
        has read.
        """
        signal = self.schedule.alphas_cumprod.double()
        snr = signal / (1 - signal)
        weights = torch.zeros_like(snr)
        weights[1:] = snr[:-1] / snr[1:] - 1
        return weights if self.prediction == "epsilon" else signal * weights

    @property
    def kl_weight(self) -> float:
        """The sum of `kl_weights`: 13.06 on Stable Diffusion's schedule."""
        return float(self.kl_weights.sum())

    @property
    def key(self) -> str:
        """Prediction type, sum and length of the schedule."""
        signal = self.schedule.alphas_cumprod
        return f"{self.prediction} {signal.double().sum().item()!r} {len(signal)}"

    def draw(self, generator: torch.Generator) -> Tensor:
        """A timestep (1,), uniform over the schedule."""
        return torch.randint(self.schedule.config.num_train_timesteps, (1,), generator=generator)

    def time(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) as a time in [0, 1]."""
        return timesteps / self.schedule.config.num_train_timesteps

    def __call__(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and targets, (P, B, C, H, W) each."""
        # The scheduler takes one axis of images: the P images of all examples, one after another.
        images = len(latents)
        clean = latents.flatten(0, 1)
        noise = noise.expand_as(latents).flatten(0, 1)
        timesteps = timesteps.repeat(images)

        # What the network reads, and what it should answer.
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        if self.prediction == "epsilon":
            target = noise
        else:
            target = self.schedule.get_velocity(clean, noise, timesteps)
        return noisy.unflatten(0, (images, -1)), target.unflatten(0, (images, -1))


class Flow:
    """Rectified flow (Esser et al. 2024): (1 - t) x + t noise; the target is noise - x.

    Times are drawn as diffusers' SD3 and FLUX trainers draw them: the sigmoid of a standard normal
    picks a position in the schedule. A static shift (SD3's 3) is in the schedule's timesteps;
    FLUX shifts by the size of the image when it samples, and not here.

    Args:
        scheduler: the pipeline's scheduler, of which the config is read.
    """

    def __init__(self, scheduler: Any) -> None:
        published = scheduler.config
        self.schedule = FlowMatchEulerDiscreteScheduler.from_config(
            published, **flow_shift(published)
        )
        self.timesteps = self.schedule.timesteps  # descending; sigma times their number

    @property
    def shares(self) -> Tensor:
        """A standard normal's, between the logits of i / T and (i + 1) / T."""
        edges = torch.linspace(0, 1, len(self.timesteps) + 1, dtype=torch.float64)
        return torch.special.ndtr(edges.logit()).diff()

    @property
    def kl_weights(self) -> Tensor:
        """w_t = 2 [ln(t / t_next) - (t - t_next)]; docs/method.md, *Beta has one convention*."""
        times = self.time(self.timesteps).double()
        weights = torch.zeros_like(times)
        weights[:-1] = 2 * ((times[:-1] / times[1:]).log() - (times[:-1] - times[1:]))
        return weights

    @property
    def kl_weight(self) -> float:
        """The sum of `kl_weights`, which telescopes."""
        return float(self.kl_weights.sum())

    @property
    def key(self) -> str:
        """Sum and length of the schedule."""
        return f"flow {self.timesteps.double().sum().item()!r} {len(self.timesteps)}"

    def draw(self, generator: torch.Generator) -> Tensor:
        """A timestep (1,), logit-normal over the schedule."""
        # A sigmoid that rounds to 1 would be one past the last timestep.
        position = torch.sigmoid(torch.randn(1, generator=generator)) * len(self.timesteps)
        return self.timesteps[position.long().clamp(max=len(self.timesteps) - 1)]

    def time(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) as a time in [0, 1]."""
        return timesteps / self.schedule.config.num_train_timesteps

    def __call__(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and targets, (P, B, C, H, W) each."""
        # (B,) becomes (B, 1, 1, 1), which broadcasts over the P images of each example.
        time = self.time(timesteps).to(latents.dtype).reshape(-1, *[1] * (noise.dim() - 1))
        return (1 - time) * latents + time * noise, noise - latents
