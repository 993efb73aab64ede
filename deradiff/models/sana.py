"""Sana: a transformer with linear attention that predicts velocity, text from Gemma 2.

The autoencoder shrinks an image's sides by 32, and its encoding is not random.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deradiff.models.family import (
    MASKED_CALL_ARGUMENTS,
    Family,
    SamplingDefaults,
    Shapes,
    call_arguments_of,
    unwrapped,
)

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor, nn

INSTRUCTION = "complex_human_instruction"
"""The argument with the sentences that the pipeline puts before a prompt."""


class SanaFamily(Family):
    """The first token of instruction and prompt, and the last 299, with a mask."""

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (N, L, channels), `encoder_attention_mask` (N, L)."""
        text, mask, _, _ = self._encode(pipe, prompts, guided=False)
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    def call_arguments(self, pipe: Any, prompts: Sequence[str], guided: bool) -> dict[str, Any]:
        """Embeddings and masks; negative ones only with guidance."""
        return call_arguments_of(self._encode(pipe, prompts, guided), MASKED_CALL_ARGUMENTS)

    def _encode(self, pipe: Any, prompts: Sequence[str], guided: bool) -> tuple[Any, ...]:
        # A call's own instruction, which `encode_prompt` leaves out unless it is given
        instruction = inspect.signature(type(pipe).__call__).parameters[INSTRUCTION].default
        return pipe.encode_prompt(
            list(prompts),
            guided,
            device=pipe.device,
            max_sequence_length=self.prompt_tokens,
            complex_human_instruction=instruction,
        )

    def denoise(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        resolution: int,
    ) -> Tensor:
        """The predicted velocity (B, C, H, W), without the variances that some networks add."""
        config = unwrapped(denoiser).config
        predicted = denoiser(
            noisy,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            timestep=timesteps * config.timestep_scale,
            return_dict=False,
        )[0]
        return predicted[:, : noisy.shape[1]]

    def prompt_shapes(self, config: Mapping[str, Any], tokens: int) -> Shapes:
        """`encoder_hidden_states` and `encoder_attention_mask`."""
        return {
            "encoder_hidden_states": (1, tokens, config["caption_channels"]),
            "encoder_attention_mask": (1, tokens),
        }

    def input_shapes(
        self, config: Mapping[str, Any], height: int, width: int, tokens: int
    ) -> Shapes:
        """`hidden_states`, `timestep`, `encoder_hidden_states`, `encoder_attention_mask`."""
        return {
            "hidden_states": (1, config["in_channels"], height, width),
            "timestep": (1,),
            **self.prompt_shapes(config, tokens),
        }

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        """The encoding, scaled."""
        return vae.encode(images.to(vae.device, vae.dtype)).latent * vae.config.scaling_factor

    def pixels_per_latent(self, vae_config: Mapping[str, Any]) -> int:
        """By the number of the encoder's blocks."""
        return 2 ** (len(vae_config["encoder_block_out_channels"]) - 1)


SANA = SanaFamily(
    name="sana",
    pipeline="SanaPipeline",
    denoiser="transformer",
    denoiser_class="SanaTransformer2DModel",
    autoencoder_class="AutoencoderDC",
    # The pipeline's 20 steps are DPM-Solver++'s; its paper needs 28 of Euler
    sampling=SamplingDefaults(steps=28, guidance_scale=4.5, batch_size=4, sampler="flow_euler"),
    prompt_tokens=300,
    original_sign="attention_y_norm.",
    flow=True,
    multiple=32,
    latent_side=32,
    call_options=(("use_resolution_binning", False),),
    encoded_options=(("negative_prompt", None),),
)
