"""SD1.5 and SDXL: a UNet that predicts noise, text by cross attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deradiff.models.family import Family, SamplingDefaults, Shapes, call_arguments_of

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor, nn

SIZE_NUMBERS = 6
"""Numbers that SDXL is given beside the text: original size, crop corner, target size."""


class UNetFamily(Family):
    """SD1.5's kind: the text embeddings are all that the network gets beside the noisy latents."""

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (N, L, channels)."""
        encoded = self._encode(pipe, prompts, guided=False)
        return {"encoder_hidden_states": encoded[0]}

    def call_arguments(self, pipe: Any, prompts: Sequence[str], guided: bool) -> dict[str, Tensor]:
        """The embeddings that `encode_prompt` returns; negative ones only with guidance."""
        return call_arguments_of(self._encode(pipe, prompts, guided))

    def _encode(self, pipe: Any, prompts: Sequence[str], guided: bool) -> tuple[Any, ...]:
        return pipe.encode_prompt(
            list(prompts),
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
        """The predicted noise (B, C, H, W)."""
        return denoiser(
            noisy,
            timestep=timesteps,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            **self._added_arguments(noisy, conditioning, resolution),
            return_dict=False,
        )[0]

    def _added_arguments(
        self, noisy: Tensor, conditioning: Mapping[str, Tensor], resolution: int
    ) -> dict[str, Any]:
        """Arguments of the network beside latents, time and text."""
        return {}

    def prompt_shapes(self, config: Mapping[str, Any], tokens: int) -> Shapes:
        """`encoder_hidden_states`."""
        return {"encoder_hidden_states": (1, tokens, config["cross_attention_dim"])}

    def input_shapes(
        self, config: Mapping[str, Any], height: int, width: int, tokens: int
    ) -> Shapes:
        """`sample`, `timestep`, `encoder_hidden_states`."""
        text = self.prompt_shapes(config, tokens)["encoder_hidden_states"]
        return {
            "sample": (1, config["in_channels"], height, width),
            "timestep": (1,),
            "encoder_hidden_states": text,
        }

    def owns_config(self, config: Mapping[str, Any]) -> bool:
        """A UNet that gets nothing but text: SDXL's gets sizes, too."""
        return super().owns_config(config) and not gets_sizes(config)


class SDXLFamily(UNetFamily):
    """SDXL's kind: the network also gets a pooled text embedding and the image's size.

    Training sees whole, uncropped squares: sizes (R, R, 0, 0, R, R), as in the published recipe.
    """

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (N, L, channels) and the pooled `text_embeds` (N, channels)."""
        encoded = self._encode(pipe, prompts, guided=False)
        return {"encoder_hidden_states": encoded[0], "text_embeds": encoded[2]}

    def _added_arguments(
        self, noisy: Tensor, conditioning: Mapping[str, Tensor], resolution: int
    ) -> dict[str, Any]:
        sizes = [resolution, resolution, 0, 0, resolution, resolution]
        time_ids = noisy.new_tensor([sizes]).expand(len(noisy), -1)
        added = {"text_embeds": conditioning["text_embeds"], "time_ids": time_ids}
        return {"added_cond_kwargs": added}

    def prompt_shapes(self, config: Mapping[str, Any], tokens: int) -> Shapes:
        """`encoder_hidden_states` and `text_embeds`."""
        sizes = SIZE_NUMBERS * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - sizes
        return super().prompt_shapes(config, tokens) | {"text_embeds": (1, pooled)}

    def input_shapes(
        self, config: Mapping[str, Any], height: int, width: int, tokens: int
    ) -> Shapes:
        """SD1.5's inputs, and `added_cond_kwargs`."""
        shapes = super().input_shapes(config, height, width, tokens)
        pooled = self.prompt_shapes(config, tokens)["text_embeds"]
        shapes["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": (1, SIZE_NUMBERS)}
        return shapes

    def owns_config(self, config: Mapping[str, Any]) -> bool:
        """A UNet that gets sizes beside the text."""
        return Family.owns_config(self, config) and gets_sizes(config)


def gets_sizes(config: Mapping[str, Any]) -> bool:
    """Whether a UNet's config says that it gets a pooled text embedding and sizes."""
    return config.get("addition_embed_type") == "text_time"


SD15 = UNetFamily(
    name="sd15",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    sampling=SamplingDefaults(steps=50, guidance_scale=7.5, batch_size=8),
    prompt_tokens=77,
    original_sign="input_blocks.",
    latents_argument="sample",
    nested_original=True,
    lora_format="kohya",
)

SDXL = SDXLFamily(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    sampling=SamplingDefaults(steps=50, guidance_scale=5.0, batch_size=4),
    prompt_tokens=77,
    original_sign="label_emb.",
    latents_argument="sample",
    nested_original=True,
    lora_format="kohya",
)
