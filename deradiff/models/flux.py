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
    unwrapped,
)

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor, nn

TRAINING_GUIDANCE = 3.5
"""The guidance that the network is given in training: its pipeline's default."""

PATCH = 2
"""Side of a patch of latents."""

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
        rows = noisy.shape[2] // PATCH
        columns = noisy.shape[3] // PATCH
        predicted = denoiser(
            pack(noisy),
            timestep=timesteps / self.timestep_scale,
            guidance=self._guidance(denoiser, noisy),
            pooled_projections=conditioning["pooled_projections"],
            encoder_hidden_states=text,
            txt_ids=noisy.new_zeros(text.shape[1], COORDINATES),
            img_ids=patch_coordinates(noisy, rows, columns),
            return_dict=False,
        )[0]
        return unpack(predicted, rows, columns)

    def _guidance(self, denoiser: Any, noisy: Tensor) -> Tensor | None:
        """(B,) in float32, or None for a network that was not distilled."""
        if not unwrapped(denoiser).config.guidance_embeds:
            return None
        return noisy.new_full((len(noisy),), TRAINING_GUIDANCE).float()

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
        patches = (height // PATCH) * (width // PATCH)
        shapes: Shapes = {
            "hidden_states": (1, patches, config["in_channels"]),
            "timestep": (1,),
            **self.prompt_shapes(config, tokens),
            "img_ids": (patches, COORDINATES),
            "txt_ids": (tokens, COORDINATES),
        }
        if config["guidance_embeds"]:
            shapes["guidance"] = (1,)
        return shapes


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as patches (B, H/2 * W/2, 4 C), channels first within a patch."""
    columns = latents.unflatten(3, (-1, PATCH))
    squares = columns.unflatten(2, (-1, PATCH))  # (B, C, H/2, 2, W/2, 2)
    channels = squares.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # (B, 4 C, H/2, W/2)
    return channels.flatten(2).transpose(1, 2)


def unpack(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Patches (B, rows * columns, 4 C) as latents (B, C, 2 rows, 2 columns).

    The channels come last in memory, as `torch.nn.functional.pixel_shuffle` leaves them. The order
    in memory decides in which order a loss adds the elements, and so its last bits.
    """
    channels = patches.transpose(1, 2).unflatten(2, (rows, columns))  # (B, 4 C, rows, columns)
    squares = channels.unflatten(1, (-1, PATCH, PATCH))  # (B, C, 2, 2, rows, columns)
    lines = squares.permute(0, 4, 2, 5, 3, 1)  # (B, rows, 2, columns, 2, C)
    latents = lines.flatten(3, 4).flatten(1, 2)  # (B, 2 rows, 2 columns, C)
    return latents.permute(0, 3, 1, 2)


def patch_coordinates(like: Tensor, rows: int, columns: int) -> Tensor:
    """Where each patch lies: (rows * columns, 3), of `like`'s device and precision."""
    ids = like.new_zeros(rows, columns, COORDINATES)
    ids[..., 1] = like.new_tensor(list(range(rows)))[:, None]
    ids[..., 2] = like.new_tensor(list(range(columns)))
    return ids.flatten(0, 1)


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
