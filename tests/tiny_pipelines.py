"""Whole pipelines of under a megabyte in the formats of SD1.5 and SDXL, with random weights: made in a second, never downloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from deradiff.families import FAMILIES

WIDTH = 32  # of a text encoder
SIDE = 8  # of the latents; images are 64 px, as the autoencoder shrinks by 8 like the real ones


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer over single bytes: 256 symbols, the same as ends of words, and the two markers; no merges."""
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(s + "</w>" for s in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], model_max_length=77)


def tiny_text_encoder(projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text tower of two layers; `projection`: with the pooled, projected output of SDXL's second encoder."""
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_unet(family: str, **overrides: Any) -> UNet2DConditionModel:
    """A UNet of 0.1 M parameters with the conditioning of its family."""
    config: dict[str, Any] = {
        "sample_size": SIDE, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
    }  # fmt: skip
    if family == "sdxl":
        config |= {
            "cross_attention_dim": 2 * WIDTH, "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
        }  # fmt: skip
    return UNet2DConditionModel(**(config | overrides)).eval()


def tiny_pipeline(family: str, seed: int = 0) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A pipeline of `sd15` or `sdxl`, in float32 on the CPU, DDIM on Stable Diffusion's noise schedule, progress bar off."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, sample_size=8 * SIDE,
            ).eval(),
            "text_encoder": tiny_text_encoder(),
            "tokenizer": tiny_tokenizer(),
            "unet": tiny_unet(family),
            "scheduler": DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
            ),
        }  # fmt: skip
        if family == "sdxl":
            second = {"text_encoder_2": tiny_text_encoder(projection=True), "tokenizer_2": tiny_tokenizer()}
            pipe: Any = StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
        else:
            pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    assert type(pipe).__name__ == FAMILIES[family].pipeline
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """A tiny pipeline as a diffusers folder, as `DiffusionPipeline.from_pretrained` loads it."""
    tiny_pipeline(family, seed).save_pretrained(folder)
    return folder


def perturbed_unet(unet: UNet2DConditionModel, scale: float = 0.1, seed: int = 1) -> UNet2DConditionModel:
    """A full anchor: a copy whose weights each moved by `scale` times the spread of their tensor."""
    anchor, generator = copy.deepcopy(unet), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in anchor.parameters():
            spread = parameter.std(unbiased=False).clamp(min=0.05)
            parameter += scale * spread * torch.randn(parameter.shape, generator=generator)
    return anchor


def tiny_lora(unet: UNet2DConditionModel, rank: int = 4, alpha: float = 8, seed: int = 1, scale: float = 0.1) -> UNet2DConditionModel:
    """A LoRA anchor: a copy with a peft adapter "default" whose B, zero in peft's own initialisation, is drawn at random."""
    anchor, generator = copy.deepcopy(unet), torch.Generator().manual_seed(seed)
    targets = list(FAMILIES["sd15"].lora_targets)
    anchor.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), adapter_name="default")
    with torch.no_grad():
        for name, parameter in anchor.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return anchor
