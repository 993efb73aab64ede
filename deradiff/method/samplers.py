"""Flow matching sampled as a stochastic differential equation: the scheduler of Flow-GRPO, for any pipeline with a flow Euler scheduler."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """Steps of the SDE that has the flow's marginals (Liu et al. 2025, "Flow-GRPO", Eq. 9), for `FlowMatchSDEScheduler.from_config(...)`.

    x_n = x + (t_n - t) [v + s^2 / (2 t) (x + (1 - t) v)] + s sqrt(t - t_n) noise, with s = noise_level sqrt(t / (1 - t)); at t = 1, where s
    is infinite, the next time stands in the denominator, as in the authors' code. As there, the last step is stochastic too.
    noise_level: 0 is the ODE; the authors train with 0.7. Pipelines of SD3 and FLUX hand no generator to their scheduler: the noise is
    then torch's global one (`torch.manual_seed`), as with `stochastic_sampling`.
    """

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
        """Standard deviation of the noise that step `index` adds."""
        t, t_next = self.sigmas[index], self.sigmas[index + 1]
        return (
            self.config["noise_level"]
            * (t / (1 - torch.where(t == 1, t_next, t)) * (t - t_next)).sqrt()
        )

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The sample one step nearer to the data, (B, ...), in the output's precision; model_output: the predicted velocity."""
        if self._step_index is None:
            self._init_step_index(timestep)  # type: ignore[arg-type]
        index: int = self._step_index  # type: ignore[assignment]
        t, t_next, std = self.sigmas[index], self.sigmas[index + 1], self.noise_std(index)
        x = sample.to(torch.float32)
        eps = x + (1 - t) * model_output
        mean = x + (t_next - t) * model_output - std**2 / (2 * t) * eps
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        self._step_index = index + 1  # type: ignore[assignment]
        prev_sample = (mean + std * noise).to(model_output.dtype)
        return (
            FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample)
            if return_dict
            else (prev_sample,)
        )
