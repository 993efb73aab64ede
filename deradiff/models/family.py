"""What a model family says of itself, and how to add one.

Nothing outside this folder asks for a family by its name. A new family is

1. a file in this folder, with a subclass of `Family` and one instance of it; `sd3.py` is a short
   one to start from;
2. the instance in `deradiff.models.families.FAMILIES`;
3. `configs/model/<name>.yaml`, `configs/optim/<name>_lora.yaml` and `..._full.yaml`;
4. a row of `TINY` in `tests/support/tiny_pipelines.py`: its networks with few random weights.

`tests/models/test_new_family.py` says what is missing or does not fit.

`realign` needs no family: it takes any pipeline of diffusers that calls a denoiser step by step
(docs/pipelines.md). Of a family it reads the size of patches, for masks over the latents, and which
arguments belong to all rows of a batch.

The files of the families import neither torch nor diffusers. The stages' configs read the names and
the sampling defaults from them, and a typo in a command is answered before torch is loaded. The
methods get tensors, and write `tensor.new_zeros(...)` where others write `torch.zeros(...)`. So all
that is known of a family stands in one file, and that file is light.

Shapes: N prompts, B images, L tokens of a prompt, C channels of a latent, H and W its sides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Linear layers of an attention block, by the end of their names."""

JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The same, with those of the text's tokens in joint attention."""

CALL_ARGUMENTS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
"""What `encode_prompt` of most pipelines returns, in its order, by arguments of their call."""

MASKED_CALL_ARGUMENTS = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
"""The same of pipelines whose prompts have a mask and no pooled embedding."""

Shapes = dict[str, Any]
"""Shapes of tensors by name, each a tuple.

A mapping, or a list, where an argument is itself a mapping or a list of tensors; a `Plain` where an
argument is no tensor.
"""


@dataclass(frozen=True)
class Plain:
    """An argument of a network that is no tensor, as it is passed.

    Attributes:
        value: the argument.
    """

    value: Any


@dataclass(frozen=True)
class SamplingDefaults:
    """How a family is sampled where the user does not say it.

    Attributes:
        steps: denoising steps.
        guidance_scale: of classifier-free guidance, or what a guidance-distilled model is given.
        batch_size: images sampled at once.
        sampler: a key of `deradiff.method.samplers.SAMPLERS`.
    """

    steps: int
    guidance_scale: float
    batch_size: int
    sampler: str = "euler_ancestral"


@dataclass(frozen=True)
class Family(ABC):
    """A family of models that are trained, sampled and stored alike.

    Attributes:
        name: what `model=` and the cards call it.
        pipeline: diffusers' text-to-image pipeline class.
        denoiser: the pipeline's attribute that predicts noise or velocity; also the folder of a
            checkpoint that holds it.
        denoiser_class: diffusers' class of that network.
        autoencoder_class: diffusers' class of the autoencoder.
        sampling: its defaults: the paper's evaluation, or the model card's example.
        prompt_tokens: tokens of a prompt, as its pipeline encodes it; the most of them, where
            prompts have unlike lengths.
        original_sign: how a name of a tensor begins in the authors' own single-file layout. Where a
            file has the signs of several families, the last of them in FAMILIES counts.
        flow: flow matching: x_t = (1 - t) x_0 + t noise, and the network predicts the velocity
            noise - x_0.
        lora_targets: the linear layers that a LoRA adapts, by the end of their names.
        timestep_scale: the scheduler's time divided by the time that the network gets.
        multiple: an image's sides are multiples of so many pixels.
        patch_size: side of the patches of latents that the network gets and returns: 2 for rows
            (B, H/2 * W/2, 4 C), 1 for (B, C, H, W).
        latent_side: side of the latents where the network's config names none.
        latents_argument: the argument of the network that takes the noisy latents.
        shared_arguments: arguments of the network that belong to all rows of a batch alike.
        guidance_distilled: guidance is an input of the network, and a guided call evaluates one row
            an image.
        guidance_argument: the argument of the pipeline's call that takes the guidance scale.
        no_guidance: the largest guidance scale with which the pipeline does not guide.
        call_options: further arguments of the pipeline's call.
        negative_prompt: what a guided call with plain prompts must be given; None: nothing.
        encoded_options: what a call with encoded prompts needs beside them.
        nested_original: diffusers reads the original layout only with the prefix of a whole
            checkpoint.
        reads_peft_prefix: diffusers' LoRA loader reads names with peft's prefix `base_model.model`.
        lora_format: names of a baked LoRA's tensors: `kohya` or `diffusers`.
    """

    name: str
    pipeline: str
    denoiser: str
    denoiser_class: str
    sampling: SamplingDefaults
    prompt_tokens: int
    original_sign: str
    autoencoder_class: str = "AutoencoderKL"

    # The network: what it predicts, what it gets, what of it a LoRA adapts
    flow: bool = False
    lora_targets: tuple[str, ...] = ATTENTION
    timestep_scale: float = 1.0
    multiple: int = 8
    patch_size: int = 1
    latent_side: int = 128
    latents_argument: str = "hidden_states"
    shared_arguments: tuple[str, ...] = ()

    # Sampling
    guidance_distilled: bool = False
    guidance_argument: str = "guidance_scale"
    no_guidance: float = 1.0
    call_options: tuple[tuple[str, Any], ...] = ()
    negative_prompt: str | None = None
    encoded_options: tuple[tuple[str, Any], ...] = ()

    # Files
    nested_original: bool = False
    reads_peft_prefix: bool = False
    lora_format: str = "diffusers"

    def owns_config(self, config: Mapping[str, Any]) -> bool:
        """Whether a network's `config.json` is that of this family's denoiser.

        Families with one denoiser class tell themselves apart by other entries of the config.
        """
        return config.get("_class_name") == self.denoiser_class

    def owns_original(self, names: Sequence[str]) -> bool:
        """Whether names of tensors are this family's, in its authors' own single-file layout.

        Args:
            names: without the prefix of a whole checkpoint.
        """
        return any(name.startswith(self.original_sign) for name in names)

    @abstractmethod
    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the denoiser reads of N prompts, without guidance: the inputs of training.

        Args:
            pipe: the family's pipeline with its text encoders.
            prompts: N prompts.

        Returns:
            `encoder_hidden_states` (N, L, channels), and what else `denoise` takes, a row a prompt.
        """

    @abstractmethod
    def call_arguments(self, pipe: Any, prompts: Sequence[str], guided: bool) -> dict[str, Any]:
        """The encoded prompts as keyword arguments of the pipeline's call, a row a prompt.

        An argument is a tensor, or a list of tensors where the pipeline takes one.

        Args:
            pipe: the family's pipeline with its text encoders.
            prompts: N prompts.
            guided: whether the call uses classifier-free guidance.
        """

    @abstractmethod
    def denoise(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        resolution: int,
    ) -> Tensor:
        """The denoiser's prediction in training.

        Args:
            denoiser: the network, possibly wrapped for distributed training.
            noisy: noisy latents (B, C, H, W).
            timesteps: the scheduler's times (B,), from 0 (data) to 1000 (noise).
            conditioning: rows of `encode_prompts`.
            resolution: the image's side in pixels.

        Returns:
            (B, C, H, W).
        """

    @abstractmethod
    def prompt_shapes(self, config: Mapping[str, Any], tokens: int) -> Shapes:
        """Shapes of what `encode_prompts` returns for one prompt, for counting without a weight.

        Args:
            config: the denoiser's config.
            tokens: of the prompt.
        """

    @abstractmethod
    def input_shapes(
        self, config: Mapping[str, Any], height: int, width: int, tokens: int
    ) -> Shapes:
        """Shapes of the denoiser's inputs for one image, for counting without a weight.

        Args:
            config: the denoiser's config.
            height: of the latents.
            width: of the latents.
            tokens: of the prompt.

        Returns:
            A shape for each argument of the network's `forward`.
        """

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        """The latents that the denoiser is trained on: the posterior's mean, shifted and scaled.

        Args:
            vae: the family's autoencoder.
            images: (B, 3, R, R) in [-1, 1].

        Returns:
            (B, C, H, W).
        """
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0
        return (latents - shift) * vae.config.scaling_factor

    def pixels_per_latent(self, vae_config: Mapping[str, Any]) -> int:
        """By how much the autoencoder shrinks an image's sides.

        Args:
            vae_config: the autoencoder's config.
        """
        return 2 ** (len(vae_config["block_out_channels"]) - 1)

    def latent_channels(self, vae_config: Mapping[str, Any]) -> int:
        """Channels of the latents that the denoiser is trained on.

        Args:
            vae_config: the autoencoder's config.
        """
        return vae_config["latent_channels"]

    def latent_shape(self, pipe: Any, resolution: int) -> tuple[int, int, int]:
        """Shape (C, H, W) of a square image's latents.

        Args:
            pipe: the family's pipeline; its autoencoder's config is read.
            resolution: the image's side in pixels.

        Raises:
            ValueError: for a side that the denoiser cannot cut into patches.
        """
        if resolution % self.multiple:
            raise ValueError(
                f"an image of {self.name} has sides that are multiples of {self.multiple} pixels, "
                f"and {resolution} is not one"
            )
        side = resolution // self.pixels_per_latent(pipe.vae.config)
        return self.latent_channels(pipe.vae.config), side, side


def call_arguments_of(
    encoded: Sequence[Tensor | None], names: Sequence[str] = CALL_ARGUMENTS
) -> dict[str, Tensor]:
    """What a pipeline's `encode_prompt` returned, by arguments of its call.

    Args:
        encoded: embeddings and masks; what is None is left out.
        names: of the arguments, in the order of `encoded`.
    """
    named = zip(names, encoded, strict=False)
    return {name: tensor for name, tensor in named if tensor is not None}


def pad(text: Tensor, mask: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
    """Embeddings and mask of prompts with zeros behind them, so that all prompts are equally long.

    Args:
        text: (N, L, channels).
        mask: (N, L), 1 for the tokens of a prompt; None: all are.
        tokens: the length to fill up to.

    Returns:
        The embeddings (N, tokens, channels), and the mask (N, tokens) of booleans.
    """
    count, length, channels = text.shape
    longer = text.new_zeros(count, tokens, channels)
    longer[:, :length] = text
    kept = text.new_zeros(count, tokens).bool()
    kept[:, :length] = True if mask is None else mask.bool()
    return longer, kept


def without_padding(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Embeddings and mask of a batch, as short as its longest prompt.

    Args:
        text: (B, L, channels).
        mask: (B, L), true for the tokens of a prompt, which stand before the padding.

    Returns:
        The embeddings, and the mask; None where all prompts are equally long.
    """
    lengths = mask.sum(1)
    longest = int(lengths.max())
    if bool((lengths == longest).all()):
        return text[:, :longest], None
    return text[:, :longest], mask[:, :longest]


def unwrapped(network: Any) -> Any:
    """The network itself where torch.compile, DDP or DeepSpeed have wrapped it."""
    while True:
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if inner is None:
            return network
        network = inner
