"""Qwen-Image: a transformer that predicts velocity on packed latents, text from Qwen2.5-VL.

The autoencoder is one of videos: an image is a video of one frame, and each channel of its latents
has a mean and a deviation of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deradiff.models.family import (
    JOINT_ATTENTION,
    Family,
    Plain,
    SamplingDefaults,
    Shapes,
    pad,
    without_padding,
)
from deradiff.models.patches import PATCH, pack, patch_grid, unpack

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor, nn

NEGATIVE_PROMPT = " "
"""The negative prompt of the model card. Without one the pipeline does not guide."""


class QwenImageFamily(Family):
    """The tokens of a prompt inside a template, with a mask: prompts have unlike lengths."""

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (N, L, channels), `encoder_hidden_states_mask` (N, L)."""
        text, mask = pad(*self._encode(pipe, prompts), self.prompt_tokens)
        return {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}

    def call_arguments(self, pipe: Any, prompts: Sequence[str], guided: bool) -> dict[str, Any]:
        """Embeddings and masks; those of the model card's negative prompt only with guidance."""
        text, mask = self._encode(pipe, prompts)
        arguments = {"prompt_embeds": text, "prompt_embeds_mask": mask}
        if guided:
            text, mask = self._encode(pipe, [NEGATIVE_PROMPT] * len(prompts))
            arguments |= {"negative_prompt_embeds": text, "negative_prompt_embeds_mask": mask}
        return arguments

    def _encode(self, pipe: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings and mask, as long as the longest prompt."""
        text, mask = pipe.encode_prompt(
            list(prompts), device=pipe.device, max_sequence_length=self.prompt_tokens
        )
        return pad(text, mask, text.shape[1])

    def denoise(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        resolution: int,
    ) -> Tensor:
        """The predicted velocity (B, C, H, W)."""
        rows, columns = patch_grid(noisy)
        text, mask = without_padding(
            conditioning["encoder_hidden_states"], conditioning["encoder_hidden_states_mask"]
        )
        predicted = denoiser(
            pack(noisy),
            timestep=timesteps / self.timestep_scale,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, rows, columns)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(predicted, rows, columns)

    def prompt_shapes(self, config: Mapping[str, Any], tokens: int) -> Shapes:
        """`encoder_hidden_states` and `encoder_hidden_states_mask`."""
        return {
            "encoder_hidden_states": (1, tokens, config["joint_attention_dim"]),
            "encoder_hidden_states_mask": (1, tokens),
        }

    def input_shapes(
        self, config: Mapping[str, Any], height: int, width: int, tokens: int
    ) -> Shapes:
        """`hidden_states` in patches, `timestep`, `encoder_hidden_states`, `img_shapes`."""
        rows = height // PATCH
        columns = width // PATCH
        return {
            "hidden_states": (1, rows * columns, config["in_channels"]),
            "timestep": (1,),
            "encoder_hidden_states": (1, tokens, config["joint_attention_dim"]),
            "img_shapes": Plain([[(1, rows, columns)]]),
        }

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        """The posterior's mean, with each channel brought to mean 0 and deviation 1."""
        video = images.to(vae.device, vae.dtype).unsqueeze(2)
        latents = vae.encode(video).latent_dist.mode().squeeze(2)
        mean = latents.new_tensor(vae.config.latents_mean).view(-1, 1, 1)
        deviation = latents.new_tensor(vae.config.latents_std).view(-1, 1, 1)
        return (latents - mean) / deviation

    def pixels_per_latent(self, vae_config: Mapping[str, Any]) -> int:
        """2 for each of the autoencoder's reductions, whether it also reduces time or not."""
        return 2 ** len(vae_config["temperal_downsample"])

    def latent_channels(self, vae_config: Mapping[str, Any]) -> int:
        """The autoencoder's `z_dim`."""
        return vae_config["z_dim"]


QWEN_IMAGE = QwenImageFamily(
    name="qwen_image",
    pipeline="QwenImagePipeline",
    denoiser="transformer",
    denoiser_class="QwenImageTransformer2DModel",
    autoencoder_class="AutoencoderKLQwenImage",
    sampling=SamplingDefaults(steps=50, guidance_scale=4.0, batch_size=1, sampler="flow_euler"),
    prompt_tokens=512,
    original_sign="txt_norm.",
    flow=True,
    lora_targets=JOINT_ATTENTION,
    timestep_scale=1000.0,
    multiple=16,
    patch_size=PATCH,
    guidance_argument="true_cfg_scale",
    negative_prompt=NEGATIVE_PROMPT,
)
