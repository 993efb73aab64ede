"""Small networks in the published formats, with random weights.

They are the shapes world's, and anybody's who starts from a folder of captioned images. Every class
is a stock one of transformers or diffusers; only the sizes are small.

Shapes: N latent vectors of C channels.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
)

END_OF_WORD = "</w>"
"""How CLIP's vocabulary marks a token that ends a word."""

HEAD_WIDTH = 16
"""Channels of one attention head of a small CLIP."""


def make_tokenizer(captions: list[str], vocabulary: int = 1024, length: int = 16) -> Any:
    """Make a CLIPTokenizer whose merges are learned from captions.

    Frequent words become one token each; any other text is still made of bytes. The same captions
    give the same tokenizer in every process. Sennrich et al. 2016, on bytes as in GPT-2.

    Args:
        captions: the text to learn from.
        vocabulary: tokens to learn at most, the bytes that occur included.
        length: tokens at which a prompt is cut.

    Returns:
        A CLIPTokenizer.
    """
    merges = _learn_merges(captions, vocabulary)

    # CLIP's order: every byte, every byte that ends a word, what was merged, the two marks.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *alphabet,
        *[symbol + END_OF_WORD for symbol in alphabet],
        *["".join(pair) for pair in merges],
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    # Two merges can make the same token, which is then counted once.
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    settings: dict[str, Any] = {"merges": merges, "model_max_length": length}
    return CLIPTokenizer(vocab=ids, **settings)


def _learn_merges(captions: list[str], vocabulary: int) -> list[tuple[str, ...]]:
    """The byte-pair merges of captions, the most frequent first."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    normalizer = normalizers.Lowercase()
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.normalizer = normalizer  # type: ignore[assignment]
    bpe.pre_tokenizer = splitter  # type: ignore[assignment]

    # The trainer breaks a tie between two pairs by the ids of their symbols, and it numbers the
    # symbols in an order that differs from run to run. As special tokens they are numbered first,
    # in our order.
    symbols: set[str] = set()
    last_symbols: set[str] = set()
    for caption in captions:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)):
            symbols.update(word)
            last_symbols.add(word[-1] + END_OF_WORD)
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocabulary,
        show_progress=False,
        end_of_word_suffix=END_OF_WORD,
        special_tokens=[*sorted(symbols), *sorted(last_symbols)],
    )
    bpe.train_from_iterator(captions, trainer)

    # A merge is a list in newer files of tokenizers, and "left right" in older ones.
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]


def make_clip(
    tokenizer: Any,
    side: int,
    width: int = 64,
    text_layers: int = 2,
    vision_layers: int = 3,
    patch: int = 4,
) -> nn.Module:
    """Make a CLIPModel with random weights.

    Args:
        tokenizer: of its prompts; it sets the vocabulary and the length.
        side: pixels of the side of its square images.
        width: channels of both towers and of the shared space.
        text_layers: transformer layers of the text tower.
        vision_layers: transformer layers of the image tower.
        patch: pixels of a patch's side.

    Returns:
        A CLIPModel.
    """
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "projection_dim": width,
        "hidden_act": "gelu",
    }
    text = shared | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": text_layers,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = shared | {"image_size": side, "patch_size": patch, "num_hidden_layers": vision_layers}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def make_image_processor(side: int) -> Any:
    """Make CLIP's image preparation.

    Args:
        side: pixels of an image's side after it.

    Returns:
        A CLIPImageProcessorPil.
    """
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def load_clip(folder: str) -> tuple[Any, Any, Any]:
    """Load a CLIP from a folder that holds all its parts.

    Args:
        folder: as `save_pretrained` of each part wrote it.

    Returns:
        The CLIPModel, its tokenizer and its image processor.
    """
    return (
        CLIPModel.from_pretrained(folder),
        CLIPTokenizer.from_pretrained(folder),
        CLIPImageProcessorPil.from_pretrained(folder),
    )


def make_vae(channels: tuple[int, ...] = (16, 32, 64), latent_channels: int = 4) -> Any:
    """Make an AutoencoderKL with random weights.

    Args:
        channels: of each level; each level after the first halves the image's side.
        latent_channels: of the latents.

    Returns:
        An AutoencoderKL with scaling factor 1.
    """
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        latent_channels=latent_channels,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        mid_block_add_attention=False,
    )


def make_pipeline(
    text_encoder: Any, tokenizer: Any, vae: Any, side: int, channels: tuple[int, ...] = (48, 96)
) -> Any:
    """Make a pipeline around a trained text encoder and autoencoder.

    Args:
        text_encoder: a CLIPTextModel.
        tokenizer: of the text encoder.
        vae: an AutoencoderKL.
        side: pixels of an image's side.
        channels: of the UNet's levels; all but the first have cross attention.

    Returns:
        A StableDiffusionPipeline with a UNet of random weights and Stable Diffusion's noise
        schedule.
    """
    # A UNet on the autoencoder's latents.
    levels = len(channels)
    halvings = len(vae.config.block_out_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=side // 2**halvings,
        block_out_channels=channels,
        layers_per_block=1,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        norm_num_groups=8,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
    )

    # Stable Diffusion's noise schedule.
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def text_tower(clip: Any) -> nn.Module:
    """Copy the text encoder out of a CLIPModel.

    Args:
        clip: a CLIPModel.

    Returns:
        A CLIPTextModel, which diffusers' pipelines hold, with the same weights.
    """
    prefix = "text_model."
    state = clip.state_dict()
    names = [name for name in state if name.startswith(prefix)]
    tower = CLIPTextModel(clip.config.text_config)
    tower.load_state_dict({name.removeprefix(prefix): state[name] for name in names})
    return tower


@torch.no_grad()
def standardise_latents(vae: Any, latents: Tensor) -> None:
    """Whiten the latents of an autoencoder without changing its reconstructions.

    Its latents then have mean 0 and the identity as covariance, so that its scaling factor is 1.
    The whitening is folded into its 1x1 convolutions: `quant_conv`, of which the first half of the
    outputs is the posterior's mean, and `post_quant_conv`. Both are changed in place.

    Args:
        vae: an AutoencoderKL.
        latents: (N, C), posterior means as the autoencoder makes them now.
    """
    # The symmetric square root of the covariance, and its inverse, both (C, C).
    mean = latents.double().mean(0)
    covariance = torch.cov(latents.double().T)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    restore = vectors @ torch.diag(values.sqrt()) @ vectors.T

    # After the encoder: whiten (W z + b - mean).
    channels = len(mean)
    encoding = vae.quant_conv
    weight = encoding.weight[:channels, :, 0, 0].double()
    bias = encoding.bias[:channels].double()
    encoding.weight[:channels, :, 0, 0] = (whiten @ weight).to(encoding.weight)
    encoding.bias[:channels] = (whiten @ (bias - mean)).to(encoding.bias)

    # Before the decoder: V (restore z + mean) + c.
    decoding = vae.post_quant_conv
    weight = decoding.weight[:, :, 0, 0].double()
    bias = decoding.bias.double()
    decoding.weight[:, :, 0, 0] = (weight @ restore).to(decoding.weight)
    decoding.bias[:] = (bias + weight @ mean).to(decoding.bias)
