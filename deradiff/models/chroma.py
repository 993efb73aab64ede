"""Chroma: FLUX.1 without its distilled guidance, on packed latents, text from T5 with a mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from deradiff.models.family import (
    JOINT_ATTENTION,
    MASKED_CALL_ARGUMENTS,
    Family,
    SamplingDefaults,
    Shapes,
    call_arguments_of,
    unwrapped,
)
from deradiff.models.patches import (
    PATCH,
    pack,
    packed_shapes,
    patch_coordinates,
    patch_grid,
    unpack,
)

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor, nn

COORDINATES = 3
"""Numbers that say where a patch lies: an unused one, its row and its column."""

SINGLE_BLOCK_INPUTS = 3
"""What diffusers gives a single block where it saves memory: the mask is not among them."""


class ChromaFamily(Family):
    """T5's tokens, and a mask that keeps those of the prompt and the first one behind them.

    The pipeline gives the mask to attention as numbers, which are added to the scores. So tokens
    outside the mask still count, and all of them are kept.
    """

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (N, L, channels), `attention_mask` (N, L)."""
        text, mask, _, _ = self._encode(pipe, prompts, guided=False)
        return {"encoder_hidden_states": text, "attention_mask": mask}

    def call_arguments(self, pipe: Any, prompts: Sequence[str], guided: bool) -> dict[str, Any]:
        """Embeddings and masks; negative ones only with guidance."""
        return call_arguments_of(self._encode(pipe, prompts, guided), MASKED_CALL_ARGUMENTS)

    def _encode(self, pipe: Any, prompts: Sequence[str], guided: bool) -> tuple[Any, ...]:
        text, _, mask, negative, _, negative_mask = pipe.encode_prompt(
            list(prompts),
            device=pipe.device,
            do_classifier_free_guidance=guided,
            negative_prompt=[""] * len(prompts) if guided else None,
            max_sequence_length=self.prompt_tokens,
        )
        return text, mask, negative, negative_mask

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
        mask = _with_patches(conditioning["attention_mask"], rows * columns)
        with _mask_in_single_blocks(unwrapped(denoiser), mask):
            predicted = denoiser(
                pack(noisy),
                timestep=timesteps / self.timestep_scale,
                encoder_hidden_states=text,
                txt_ids=noisy.new_zeros(text.shape[1], COORDINATES),
                img_ids=patch_coordinates(noisy, rows, columns),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return unpack(predicted, rows, columns)

    def prompt_shapes(self, config: Mapping[str, Any], tokens: int) -> Shapes:
        """`encoder_hidden_states` and `attention_mask`."""
        return {
            "encoder_hidden_states": (1, tokens, config["joint_attention_dim"]),
            "attention_mask": (1, tokens),
        }

    def input_shapes(
        self, config: Mapping[str, Any], height: int, width: int, tokens: int
    ) -> Shapes:
        """`hidden_states` in patches, `timestep`, the prompt, coordinates, `attention_mask`."""
        shapes = packed_shapes(config, height, width, tokens, COORDINATES)
        shapes |= self.prompt_shapes(config, tokens)

        # The mask of training also covers the patches.
        _, patches, _ = shapes["hidden_states"]
        shapes["attention_mask"] = (1, tokens + patches)
        return shapes


def _with_patches(mask: Tensor, patches: int) -> Tensor:
    """The mask (B, L) of a prompt's tokens as that of tokens and patches (B, L + patches)."""
    count, tokens = mask.shape
    longer = mask.new_ones(count, tokens + patches)
    longer[:, :tokens] = mask
    return longer


@contextmanager
def _mask_in_single_blocks(network: Any, mask: Tensor) -> Iterator[None]:
    """Gradient checkpointing that gives the mask to all blocks, as the forward does without it.

    diffusers 0.42.1 leaves the mask out of the single blocks when it saves memory: the network
    would be trained on another function than the one that is sampled.
    """
    own = getattr(network, "_gradient_checkpointing_func", None)
    if own is None:
        yield
        return

    def checkpoint(block: Any, *inputs: Any) -> Any:
        if len(inputs) == SINGLE_BLOCK_INPUTS:
            inputs = (*inputs, mask)
        return own(block, *inputs)

    network._gradient_checkpointing_func = checkpoint
    try:
        yield
    finally:
        network._gradient_checkpointing_func = own


CHROMA = ChromaFamily(
    name="chroma",
    pipeline="ChromaPipeline",
    denoiser="transformer",
    denoiser_class="ChromaTransformer2DModel",
    sampling=SamplingDefaults(steps=40, guidance_scale=3.0, batch_size=1, sampler="flow_euler"),
    prompt_tokens=512,
    original_sign="distilled_guidance_layer.",
    flow=True,
    lora_targets=JOINT_ATTENTION,
    timestep_scale=1000.0,
    multiple=16,
    patch_size=PATCH,
    shared_arguments=("img_ids", "txt_ids"),
    reads_peft_prefix=True,
)
