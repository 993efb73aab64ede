"""FLUX.2-dev and FLUX.2-klein: transformers that predict velocity on packed latents.

Both share the network and the autoencoder, whose latents are normalised in patches of 2 x 2 by the
statistics of a batch norm. dev reads texts with Mistral and gets guidance as an input; klein reads
them with Qwen3 and is guided by a second evaluation.
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

TRAINING_GUIDANCE = 4.0
"""The guidance that dev is given in training: its pipeline's default."""

COORDINATES = 4
"""Numbers that say where a patch or a token lies: image, row, column, and place in the text."""

GUIDANCE_SIGNS = ("guidance_in.", "time_guidance_embed.guidance_embedder.")
"""How the names begin that only dev has, in its authors' layout and in diffusers'."""


class Flux2KleinFamily(Family):
    """klein: the tokens of a prompt and its padding, without a mask."""

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (N, L, channels)."""
        return {"encoder_hidden_states": self._encode(pipe, prompts)}

    def call_arguments(self, pipe: Any, prompts: Sequence[str], guided: bool) -> dict[str, Any]:
        """The embeddings; those of the empty prompt only with guidance."""
        arguments = {"prompt_embeds": self._encode(pipe, prompts)}
        if guided:
            arguments["negative_prompt_embeds"] = self._encode(pipe, [""] * len(prompts))
        return arguments

    def _encode(self, pipe: Any, prompts: Sequence[str]) -> Tensor:
        text, _ = pipe.encode_prompt(
            list(prompts), device=pipe.device, max_sequence_length=self.prompt_tokens
        )
        return text

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
        txt_ids = noisy.new_zeros(text.shape[1], COORDINATES)
        txt_ids[:, -1] = noisy.new_tensor(list(range(text.shape[1])))
        predicted = denoiser(
            pack(noisy),
            timestep=timesteps / self.timestep_scale,
            guidance=guidance_input(denoiser, noisy, TRAINING_GUIDANCE),
            encoder_hidden_states=text,
            txt_ids=txt_ids,
            img_ids=patch_coordinates(noisy, rows, columns, COORDINATES),
            return_dict=False,
        )[0]
        return unpack(predicted, rows, columns)

    def prompt_shapes(self, config: Mapping[str, Any], tokens: int) -> Shapes:
        """`encoder_hidden_states`."""
        return {"encoder_hidden_states": (1, tokens, config["joint_attention_dim"])}

    def input_shapes(
        self, config: Mapping[str, Any], height: int, width: int, tokens: int
    ) -> Shapes:
        """`hidden_states` in patches, `timestep`, the prompt, coordinates, and `guidance`."""
        guidance = gets_guidance(config)
        shapes = packed_shapes(config, height, width, tokens, COORDINATES, guidance)
        return shapes | self.prompt_shapes(config, tokens)

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        """The posterior's mean, normalised by the statistics of the autoencoder's batch norm."""
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        rows, columns = patch_grid(latents)
        deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        patches = (pack(latents) - vae.bn.running_mean) / deviation
        return unpack(patches, rows, columns)

    def owns_config(self, config: Mapping[str, Any]) -> bool:
        """A network that does not get guidance."""
        return super().owns_config(config) and not gets_guidance(config)


class Flux2Family(Flux2KleinFamily):
    """dev: as klein, and guidance is an input of the network."""

    def call_arguments(self, pipe: Any, prompts: Sequence[str], guided: bool) -> dict[str, Any]:
        """Embeddings without negatives: guidance is an input of the network."""
        return {"prompt_embeds": self._encode(pipe, prompts)}

    def owns_config(self, config: Mapping[str, Any]) -> bool:
        """A network that gets guidance."""
        return Family.owns_config(self, config) and gets_guidance(config)

    def owns_original(self, names: Sequence[str]) -> bool:
        """FLUX.2's names, and those of the layers that read the guidance."""
        return super().owns_original(names) and any(n.startswith(GUIDANCE_SIGNS) for n in names)


def gets_guidance(config: Mapping[str, Any]) -> bool:
    """Whether a network's config says that guidance is an input."""
    return config.get("guidance_embeds", True)


FLUX2_KLEIN = Flux2KleinFamily(
    name="flux2_klein",
    pipeline="Flux2KleinPipeline",
    denoiser="transformer",
    denoiser_class="Flux2Transformer2DModel",
    autoencoder_class="AutoencoderKLFlux2",
    sampling=SamplingDefaults(steps=50, guidance_scale=4.0, batch_size=1, sampler="flow_euler"),
    prompt_tokens=512,
    original_sign="single_stream_modulation.lin.",
    flow=True,
    lora_targets=(*JOINT_ATTENTION, "to_qkv_mlp_proj"),
    timestep_scale=1000.0,
    multiple=16,
    patch_size=PATCH,
    shared_arguments=("img_ids", "txt_ids"),
    reads_peft_prefix=True,
)

FLUX2 = Flux2Family(
    name="flux2",
    pipeline="Flux2Pipeline",
    denoiser="transformer",
    denoiser_class="Flux2Transformer2DModel",
    autoencoder_class="AutoencoderKLFlux2",
    sampling=SamplingDefaults(steps=50, guidance_scale=4.0, batch_size=1, sampler="flow_euler"),
    prompt_tokens=512,
    original_sign="single_stream_modulation.lin.",
    flow=True,
    lora_targets=(*JOINT_ATTENTION, "to_qkv_mlp_proj"),
    timestep_scale=1000.0,
    multiple=16,
    patch_size=PATCH,
    guidance_distilled=True,
    shared_arguments=("img_ids", "txt_ids"),
    reads_peft_prefix=True,
)
