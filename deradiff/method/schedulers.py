"""Schedulers: the one of a name in `deradiff.method.samplers`, and the SDE of flow matching."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from deradiff.method.samplers import SAMPLERS

Generators = torch.Generator | list[torch.Generator] | None
"""A generator, one for each row of a batch, or none."""


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """Steps of the SDE that has the flow's marginals: the scheduler of Flow-GRPO.

    Liu et al. 2025, "Flow-GRPO", Eq. 9, with s = noise_level sqrt(t / (1 - t)):

        x_n = x + (t_n - t) [v + s^2 / (2 t) (x + (1 - t) v)] + s sqrt(t - t_n) noise

    At t = 1, where s is infinite, the next time stands in the denominator, as in the authors' code.
    As there, the last step is stochastic, too. Make it with `from_config` of a flow Euler
    scheduler.

    Args:
        noise_level: 0 is the ODE; the authors train with 0.7. The other arguments are those of
            `FlowMatchEulerDiscreteScheduler`.

    Attributes:
        generators: a generator, or one for each row, for calls that pass none. The pipelines of SD3
            and FLUX pass none, and an image would depend on its batch. None: torch's global one.

    Raises:
        ValueError: for a negative noise level.
    """

    generators: Generators = None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        noise_level: float = 0.7,
    ) -> None:
        if noise_level < 0:
            raise ValueError(f"noise_level must be 0 (the ODE) or more, not {noise_level!r}")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
        )

    def noise_std(self, index: int) -> Tensor:
        """Standard deviation of a step's noise: noise_level sqrt(t / (1 - t) (t - t_n)).

        Args:
            index: place of the step in `timesteps`.

        Returns:
            A number ().
        """
        t = self.sigmas[index]
        t_next = self.sigmas[index + 1]
        finite = torch.where(t == 1, t_next, t)
        return self.config["noise_level"] * (t / (1 - finite) * (t - t_next)).sqrt()

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The sample one step nearer to the data.

        Args:
            model_output: the predicted velocity (B, ...).
            timestep: one of `timesteps`.
            sample: the sample before the step (B, ...).
            generator: of the noise; None: `generators`.
            return_dict: return diffusers' output instead of a tuple.

        Returns:
            The sample (B, ...) in the precision of `model_output`.
        """
        if self._step_index is None:
            self._init_step_index(timestep)  # type: ignore[arg-type]
        index: int = self._step_index  # type: ignore[assignment]
        t = self.sigmas[index]
        t_next = self.sigmas[index + 1]
        std = self.noise_std(index)

        # The mean: the ODE's step, and the drift that keeps the marginals
        x = sample.to(torch.float32)
        eps = x + (1 - t) * model_output
        mean = x + (t_next - t) * model_output - std**2 / (2 * t) * eps

        # The noise
        source: Any = generator if generator is not None else self.generators
        noise = randn_tensor(x.shape, generator=source, device=x.device, dtype=x.dtype)
        self._step_index = index + 1  # type: ignore[assignment]
        previous = (mean + std * noise).to(model_output.dtype)
        if return_dict:
            return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=previous)
        return (previous,)


OUR_SCHEDULERS = {"FlowMatchSDEScheduler": FlowMatchSDEScheduler}
"""Schedulers that diffusers has not, by the name in `SAMPLERS`."""


def make_scheduler(sampler: str, published: Any) -> Any:
    """The scheduler of a sampler, on a base model's own noise schedule.

    Args:
        sampler: a key of `SAMPLERS`.
        published: the config of the base model's scheduler, as its file says it. What the file
            leaves open is the new class's default.

    Returns:
        A scheduler of diffusers, or of this module.
    """
    chosen = SAMPLERS[sampler]
    scheduler_type = OUR_SCHEDULERS.get(chosen.scheduler)
    if scheduler_type is None:
        scheduler_type = getattr(diffusers, chosen.scheduler)
    options = dict(chosen.options)
    if chosen.flow:
        options |= flow_shift(published)
    return scheduler_type.from_config(published, **options)


def flow_shift(published: Any) -> dict[str, float]:
    """The shift of a flow, as flow Euler takes it, where a config has it under another name.

    DPM-Solver's, which is Sana's own scheduler, calls it `flow_shift`.

    Args:
        published: the config of a base model's scheduler.
    """
    if "shift" in published or "flow_shift" not in published:
        return {}
    return {"shift": published["flow_shift"]}
