"""Whole pipelines of under a megabyte in the formats of SD1.5, SDXL, SD3 and FLUX, with random weights: made in a second."""

from __future__ import annotations

import copy
import inspect
import string
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from peft import LoraConfig
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from deradiff.models.families import FAMILIES, family_of

WIDTH = 32  # of a text encoder

VISIBLE = 0.3
"""The `scale` of `tiny_lora` that can be seen in an image and does not make a network chaotic.

It changes an image by 8 to 14 grey levels on average. A change of the initial noise grows no more
than in the base model: by a factor of 4 at most over 3 steps of DDIM. At a scale of 1 it grows by
10^4 to 10^7, and two processors that round differently make different images
(`tests/test_tiny_pipelines.py`).
"""

SIDE = 8  # of the latents; images are 64 px, as the autoencoder shrinks by 8 like the real ones
KINDS = {  # what a family's name is followed by: the same components in another order, and a ControlNet where one is named
    "text2img": "",
    "img2img": "Img2Img",
    "inpaint": "Inpaint",
    "controlnet": "ControlNet",
    "controlnet_img2img": "ControlNetImg2Img",
    "controlnet_inpaint": "ControlNetInpaint",
}


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer over single bytes: 256 symbols, the same as ends of words, and the two markers; no merges."""
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(s + "</w>" for s in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], model_max_length=77
    )


def tiny_t5_tokenizer() -> T5Tokenizer:
    """T5's own tokenizer over the printable characters of ASCII; one that it does not know is the unknown token."""
    letters = [(character, -3.0) for character in string.printable if not character.isspace()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_text_encoder(projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text tower of two layers; `projection`: with the pooled, projected output of SDXL's second encoder, and both of SD3's."""
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_t5() -> T5EncoderModel:
    """A T5 encoder of one layer, as wide as two CLIP towers together: SD3 sets their tokens side by side."""
    config = T5Config(
        vocab_size=128,
        d_model=2 * WIDTH,
        d_kv=16,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def tiny_unet(family: str, **overrides: Any) -> UNet2DConditionModel:
    """A UNet of 0.1 M parameters with the conditioning of its family."""
    config: dict[str, Any] = {
        "sample_size": SIDE,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
    }
    if family == "sdxl":
        config |= {
            "cross_attention_dim": 2 * WIDTH,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
        }
    return UNet2DConditionModel(**(config | overrides)).eval()


def tiny_transformer(
    family: str, **overrides: Any
) -> SD3Transformer2DModel | FluxTransformer2DModel:
    """A transformer of two blocks with the conditioning of its family: SD3.5 medium's dual attention, FLUX.1-dev's distilled guidance."""
    shared = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 2 * WIDTH,
    }
    if family == "sd3":
        config = shared | {
            "sample_size": SIDE,
            "in_channels": 16,
            "out_channels": 16,
            "pooled_projection_dim": 2 * WIDTH,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 2 * SIDE,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        }
        return SD3Transformer2DModel(**(config | overrides)).eval()
    config = shared | {
        "num_layers": 1,
        "num_single_layers": 1,
        "in_channels": 64,
        "pooled_projection_dim": WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**(config | overrides)).eval()


def tiny_denoiser(family: str) -> Any:
    """The denoiser alone, of any family."""
    return (tiny_transformer if FAMILIES[family].flow else tiny_unet)(family)


def tiny_pipeline(family: str, seed: int = 0) -> Any:
    """A text-to-image pipeline of a family, in float32 on the CPU, progress bar off; on Stable Diffusion's noise schedule with DDIM, or
    a flow with its family's shift. FLUX has no size of its own: call it with height=64, width=64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = FAMILIES[family].flow
        parts = {
            "vae": _vae(flow),
            FAMILIES[family].denoiser: tiny_denoiser(family),
            "scheduler": _scheduler(family),
        }
        parts |= {
            "text_encoder": tiny_text_encoder(projection=family == "sd3"),
            "tokenizer": tiny_tokenizer(),
        }
        if family in ("sdxl", "sd3"):
            parts |= {
                "text_encoder_2": tiny_text_encoder(projection=True),
                "tokenizer_2": tiny_tokenizer(),
            }
        if flow:
            place = 3 if family == "sd3" else 2
            parts |= {f"text_encoder_{place}": tiny_t5(), f"tokenizer_{place}": tiny_t5_tokenizer()}
        plain = {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        options = {"sd15": plain, "sdxl": {"add_watermarker": False}}
        pipe = getattr(diffusers, FAMILIES[family].pipeline)(**parts, **options.get(family, {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _vae(flow: bool) -> AutoencoderKL:
    """The flow models': 16 channels, shifted, and without the 1x1 convolutions around the latents."""
    latents = {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        sample_size=8 * SIDE,
        **(latents if flow else {"latent_channels": 4}),
    ).eval()


def _scheduler(family: str) -> Any:
    if FAMILIES[family].flow:
        return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=family == "flux")
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tiny_controlnet(family: str, denoiser: Any, seed: int = 2, inpaint: bool = False) -> Any:
    """A ControlNet beside `denoiser`, that does something: as they are made, all begin as nothing. inpaint: SD3's, that sees the mask."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not FAMILIES[family].flow:
            net = ControlNetModel.from_unet(denoiser, conditioning_channels=3)
        elif family == "sd3":
            config = {k: v for k, v in denoiser.config.items() if not k.startswith("_")} | {
                "num_layers": 1
            }
            net = SD3ControlNetModel(
                **config,
                force_zeros_for_pooled_projection=False,
                extra_conditioning_channels=int(inpaint),
            )
        else:
            config = {
                k: v
                for k, v in denoiser.config.items()
                if not k.startswith("_") and k != "out_channels"
            }
            net = FluxControlNetModel(**config)
        for parameter in net.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return net.eval()


def tiny_variant(pipe: Any, kind: str, controlnet: Any = None) -> Any:
    """A pipeline of another kind (a key of KINDS) around the components of a text-to-image one, which it shares; for SD3 diffusers has
    no `controlnet_img2img`. controlnet: in place of a new one."""
    family = family_of(pipe)
    if kind == "text2img":
        return pipe
    name = family.pipeline.replace("Pipeline", f"{KINDS[kind]}Pipeline").replace(
        "3ControlNetInpaintP", "3ControlNetInpaintingP"
    )
    parts = {**pipe.components, "requires_safety_checker": False, "add_watermarker": False}
    if "controlnet" in kind:
        parts["controlnet"] = controlnet or tiny_controlnet(
            family.name, getattr(pipe, family.denoiser), inpaint="inpaint" in kind
        )
    made = getattr(diffusers, name)
    variant = made(
        **{
            name: parts[name]
            for name in inspect.signature(made.__init__).parameters
            if name in parts
        }
    )
    variant.set_progress_bar_config(disable=True)
    return variant


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """A tiny pipeline as a diffusers folder, as `DiffusionPipeline.from_pretrained` loads it."""
    tiny_pipeline(family, seed).save_pretrained(folder)
    return folder


def perturbed_denoiser(denoiser: Any, scale: float = 0.1, seed: int = 1) -> Any:
    """A full anchor: a copy whose weights each moved by `scale` times the spread of their tensor."""
    anchor, generator = copy.deepcopy(denoiser), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in anchor.parameters():
            spread = parameter.std(unbiased=False).clamp(min=0.05)
            parameter += scale * spread * torch.randn(parameter.shape, generator=generator)
    return anchor


def tiny_lora(
    denoiser: Any, rank: int = 4, alpha: float = 8, seed: int = 1, scale: float = 0.1, **config: Any
) -> Any:
    """A LoRA anchor: a copy with a peft adapter "default" whose B, zero in peft's own initialisation, is drawn at random."""
    anchor, generator = copy.deepcopy(denoiser), torch.Generator().manual_seed(seed)
    targets = list(
        next(
            f for f in FAMILIES.values() if f.denoiser_class == type(denoiser).__name__
        ).lora_targets
    )
    anchor.add_adapter(
        LoraConfig(**({"r": rank, "lora_alpha": alpha, "target_modules": targets} | config)),
        adapter_name="default",
    )
    with torch.no_grad():
        for name, parameter in anchor.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return anchor
