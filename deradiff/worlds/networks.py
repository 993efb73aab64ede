"""Small networks in the published formats: the shapes world's, and anybody's who starts from a
folder of captioned images."""

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
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
)


def make_tokenizer(captions: list[str], vocabulary: int = 1024, length: int = 16) -> Any:
    """A CLIPTokenizer whose byte-pair merges are learned from captions, so that frequent words are
    one token each.

    length: tokens a prompt is cut at.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # type: ignore[assignment]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, end_of_word_suffix="</w>"),
    )  # type: ignore[call-arg]
    merges = json.loads(bpe.to_str())["model"]["merges"]
    learned = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]
    words = (
        bytes_
        + [b + "</w>" for b in bytes_]
        + ["".join(m) for m in learned]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    size: dict[str, Any] = {"merges": learned, "model_max_length": length}
    return CLIPTokenizer(vocab=vocab, **size)


def make_clip(
    tokenizer: Any,
    side: int,
    width: int = 64,
    text_layers: int = 2,
    vision_layers: int = 3,
    patch: int = 4,
) -> nn.Module:
    """A CLIPModel with random weights for square pictures of `side` pixels."""
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // 16),
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
    """CLIP's image preparation at `side` pixels."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def load_clip(folder: str) -> tuple[Any, Any, Any]:
    """CLIPModel, tokenizer and image processor of a folder that holds all three."""
    return (
        CLIPModel.from_pretrained(folder),
        CLIPTokenizer.from_pretrained(folder),
        CLIPImageProcessorPil.from_pretrained(folder),
    )


def make_vae(channels: tuple[int, ...] = (16, 32, 64), latent_channels: int = 4) -> Any:
    """An AutoencoderKL with random weights; each level after the first halves the side."""
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
    """A StableDiffusionPipeline around a trained text encoder and autoencoder, with a UNet of
    random weights and SD's noise schedule."""
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=side // 2 ** (len(vae.config.block_out_channels) - 1),
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
    """The text encoder of a CLIPModel as the CLIPTextModel that diffusers' pipelines hold, with the
    same weights."""
    tower = CLIPTextModel(clip.config.text_config)
    tower.load_state_dict(
        {
            k.removeprefix("text_model."): v
            for k, v in clip.state_dict().items()
            if k.startswith("text_model.")
        }
    )
    return tower


def standardise_latents(vae: Any, moments: torch.Tensor) -> None:
    """Fold the whitening of the latents into the autoencoder's 1x1 convolutions, so that its
    latents have covariance one, scaling factor 1.

    moments: (N, C) latents as the autoencoder makes them now. Changes `quant_conv` (mean half) and
        `post_quant_conv` in place.
    """
    mean, covariance = moments.double().mean(0), torch.cov(moments.double().T)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    restore = vectors @ torch.diag(values.sqrt()) @ vectors.T
    channels = len(mean)
    with torch.no_grad():
        out, into = vae.quant_conv, vae.post_quant_conv
        weight, bias = out.weight[:channels, :, 0, 0].double(), out.bias[:channels].double()
        out.weight[:channels, :, 0, 0] = (whiten @ weight).to(out.weight)
        out.bias[:channels] = (whiten @ (bias - mean)).to(out.bias)
        back, shift = into.weight[:, :, 0, 0].double(), into.bias.double()
        into.weight[:, :, 0, 0] = (back @ restore).to(into.weight)
        into.bias[:] = (shift + back @ mean).to(into.bias)
