"""Z-Image: a transformer whose time runs backwards, text from Qwen3.

The network gets lists of tensors, an image and a prompt an item, so prompts of unlike lengths need
no padding. Its time is 0 for noise and 1 for data, and its output is the negative velocity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deradiff.models.family import Family, SamplingDefaults, Shapes, pad

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor, nn


class ZImageFamily(Family):
    """The tokens of a prompt as a message of a chat; a mask, as far as they are kept together."""

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (N, L, channels), `encoder_hidden_states_mask` (N, L)."""
        texts = []
        masks = []
        for embedding in self._encode(pipe, prompts):
            text, mask = pad(embedding.unsqueeze(0), None, self.prompt_tokens)
            texts.append(text[0])
            masks.append(mask[0])
        return {
            "encoder_hidden_states": stack(texts),
            "encoder_hidden_states_mask": stack(masks),
        }

    def call_arguments(self, pipe: Any, prompts: Sequence[str], guided: bool) -> dict[str, Any]:
        """Lists of embeddings (L, channels); those of the empty prompt only with guidance."""
        arguments = {"prompt_embeds": self._encode(pipe, prompts)}
        if guided:
            arguments["negative_prompt_embeds"] = self._encode(pipe, [""] * len(prompts))
        return arguments

    def _encode(self, pipe: Any, prompts: Sequence[str]) -> list[Tensor]:
        embeddings, _ = pipe.encode_prompt(
            list(prompts),
            device=pipe.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.prompt_tokens,
        )
        return embeddings

    def denoise(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        resolution: int,
    ) -> Tensor:
        """The predicted velocity (B, C, H, W)."""
        lengths = conditioning["encoder_hidden_states_mask"].sum(1).tolist()
        rows = zip(conditioning["encoder_hidden_states"], lengths, strict=True)
        texts = [text[:length] for text, length in rows]
        frames = list(noisy.unsqueeze(2).unbind(0))  # an image is a video of one frame
        time = (self.timestep_scale - timesteps) / self.timestep_scale
        predicted = denoiser(frames, time, texts, return_dict=False)[0]
        return -stack(predicted).squeeze(2)

    def prompt_shapes(self, config: Mapping[str, Any], tokens: int) -> Shapes:
        """`encoder_hidden_states` and `encoder_hidden_states_mask`."""
        return {
            "encoder_hidden_states": (1, tokens, config["cap_feat_dim"]),
            "encoder_hidden_states_mask": (1, tokens),
        }

    def input_shapes(
        self, config: Mapping[str, Any], height: int, width: int, tokens: int
    ) -> Shapes:
        """`x` and `cap_feats` as lists, and `t`."""
        return {
            "x": [(config["in_channels"], 1, height, width)],
            "t": (1,),
            "cap_feats": [(tokens, config["cap_feat_dim"])],
        }


def stack(rows: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as rows of one tensor."""
    stacked = rows[0].new_empty(len(rows), *rows[0].shape)
    for number, row in enumerate(rows):
        stacked[number] = row
    return stacked


Z_IMAGE = ZImageFamily(
    name="z_image",
    pipeline="ZImagePipeline",
    denoiser="transformer",
    denoiser_class="ZImageTransformer2DModel",
    sampling=SamplingDefaults(steps=50, guidance_scale=4.0, batch_size=1, sampler="flow_euler"),
    prompt_tokens=512,
    original_sign="x_pad_token",
    flow=True,
    timestep_scale=1000.0,
    multiple=16,
    latents_argument="x",
    no_guidance=0.0,
)
