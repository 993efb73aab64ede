"""FLUX.1: a guidance-distilled transformer that predicts velocity on packed latents.

The network reads latents in patches of 2 x 2: (B, C, H, W) become (B, H/2 * W/2, 4 C), with three
coordinates for each patch and each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deradiff.models.family import (
    JOINT_ATTENTION,
    Family,
    SamplingDefaults,
    Shapes,
)
from deradiff.models.patches import (
    PATCH,
    guidance_input,
    pack,
    packed_shapes,
    patch_coordinates,
    patch_grid,
    unpack,
)

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor, nn

TRAINING_GUIDANCE = 3.5
"""The guidance that the network is given in training: its pipeline's default."""

COORDINATES = 3
"""Numbers that say where a patch lies: an unused one, its row and its column."""


class FluxFamily(Family):
    """One CLIP encoder for a pooled embedding, and a T5 for the tokens."""

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (N, L, channels), `pooled_projections` (N, channels)."""
        text, pooled = self._encode(pipe, prompts)
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def call_arguments(self, pipe: Any, prompts: Sequence[str], guided: bool) -> dict[str, Tensor]:
        """Embeddings without negatives: guidance is an input of the network."""
        text, pooled = self._encode(pipe, prompts)
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}

    def _encode(self, pipe: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        text, pooled, _ = pipe.encode_prompt(
            list(prompts), None, device=pipe.device, num_images_per_prompt=1
        )
        return text, pooled

    def denoise(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        resolution: int,
    ) -> Tensor:
        """The predicted velocity (B, C, H, W)."""
        text = conditioning["encoder_hidden_states"]
        rows, columns = patch_grid(noisy)
        predicted = denoiser(
            pack(noisy),
            timestep=timesteps / self.timestep_scale,
            guidance=guidance_input(denoiser, noisy, TRAINING_GUIDANCE),
            pooled_projections=conditioning["pooled_projections"],
            encoder_hidden_states=text,
            txt_ids=noisy.new_zeros(text.shape[1], COORDINATES),
            img_ids=patch_coordinates(noisy, rows, columns),
            return_dict=False,
        )[0]
        return unpack(predicted, rows, columns)

    def prompt_shapes(self, config: Mapping[str, Any], tokens: int) -> Shapes:
        """`encoder_hidden_states` and `pooled_projections`."""
        return {
            "encoder_hidden_states": (1, tokens, config["joint_attention_dim"]),
            "pooled_projections": (1, config["pooled_projection_dim"]),
        }

    def input_shapes(
        self, config: Mapping[str, Any], height: int, width: int, tokens: int
    ) -> Shapes:
        """`hidden_states` in patches, `timestep`, the prompt, coordinates, and `guidance`."""
        guidance = config["guidance_embeds"]
        shapes = packed_shapes(config, height, width, tokens, COORDINATES, guidance)
        return shapes | self.prompt_shapes(config, tokens)


FLUX = FluxFamily(
    name="flux",
    pipeline="FluxPipeline",
    denoiser="transformer",
    denoiser_class="FluxTransformer2DModel",
    sampling=SamplingDefaults(steps=50, guidance_scale=3.5, batch_size=1, sampler="flow_euler"),
    prompt_tokens=512,
    original_sign="double_blocks.",
    flow=True,
    lora_targets=JOINT_ATTENTION,
    timestep_scale=1000.0,
    multiple=16,
    patch_size=PATCH,
    guidance_distilled=True,
    shared_arguments=("img_ids", "txt_ids"),
    reads_peft_prefix=True,
)
