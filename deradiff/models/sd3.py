"""SD3 and SD3.5: a transformer that predicts velocity, text by joint attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deradiff.models.family import (
    JOINT_ATTENTION,
    Family,
    SamplingDefaults,
    Shapes,
    call_arguments_of,
)

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor, nn


class SD3Family(Family):
    """Two CLIP encoders and a T5 side by side; their pooled embeddings are a further input."""

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (N, L, channels), `pooled_projections` (N, channels)."""
        text, _, pooled, _ = self._encode(pipe, prompts, guided=False)
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def call_arguments(self, pipe: Any, prompts: Sequence[str], guided: bool) -> dict[str, Tensor]:
        """The embeddings that `encode_prompt` returns; negative ones only with guidance."""
        return call_arguments_of(self._encode(pipe, prompts, guided))

    def _encode(self, pipe: Any, prompts: Sequence[str], guided: bool) -> tuple[Any, ...]:
        return pipe.encode_prompt(
            list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=pipe.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )

    def denoise(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        resolution: int,
    ) -> Tensor:
        """The predicted velocity (B, C, H, W)."""
        return denoiser(
            noisy,
            timestep=timesteps,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            pooled_projections=conditioning["pooled_projections"],
            return_dict=False,
        )[0]

    def prompt_shapes(self, config: Mapping[str, Any], tokens: int) -> Shapes:
        """`encoder_hidden_states` and `pooled_projections`."""
        return {
            "encoder_hidden_states": (1, tokens, config["joint_attention_dim"]),
            "pooled_projections": (1, config["pooled_projection_dim"]),
        }

    def input_shapes(
        self, config: Mapping[str, Any], height: int, width: int, tokens: int
    ) -> Shapes:
        """`hidden_states`, `timestep`, `encoder_hidden_states`, `pooled_projections`."""
        return {
            "hidden_states": (1, config["in_channels"], height, width),
            "timestep": (1,),
            **self.prompt_shapes(config, tokens),
        }


SD3 = SD3Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    denoiser="transformer",
    denoiser_class="SD3Transformer2DModel",
    sampling=SamplingDefaults(steps=40, guidance_scale=4.5, batch_size=4, sampler="flow_euler"),
    prompt_tokens=77 + 256,
    original_sign="joint_blocks.",
    flow=True,
    lora_targets=JOINT_ATTENTION,
    multiple=16,
)
