"""Whole pipelines of every family, with random weights: under two megabytes, and made in a second.

`TINY` has a row for each family. A new family adds one, and the tests for every family run for it.
"""

from __future__ import annotations

import copy
import inspect
import json
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    SD3ControlNetModel,
)
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from deradiff.models.families import FAMILIES, family_of

WIDTH = 32
"""Of a text encoder."""

SIDE = 8
"""Of the latents; images have 64 px, because the autoencoder shrinks by 8 like the real ones."""

VISIBLE = 0.3
"""The `scale` of `tiny_lora` that can be seen in an image and does not make a network chaotic.

It changes an image by 8 to 14 grey levels on average. A change of the initial noise grows no more
than in the base model: by a factor of 4 at most over 3 steps of DDIM. At a scale of 1 it grows by
10^4 to 10^7, and two processors that round differently make different images
(`tests/test_tiny_pipelines.py`).
"""

OVERFLOWING = 6e4
"""Largest weight of a layer whose output overflows in float16, whose largest number is 65504."""

QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The part of Qwen's chat template that a prompt goes through."""

KINDS = {
    "text2img": "",
    "img2img": "Img2Img",
    "inpaint": "Inpaint",
    "controlnet": "ControlNet",
    "controlnet_img2img": "ControlNetImg2Img",
    "controlnet_inpaint": "ControlNetInpaint",
}
"""Pipelines of a family, by what stands before `Pipeline` in the names of their classes."""


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer over single bytes, without merges.

    It has 256 symbols, the same as ends of words, and the two markers.
    """
    alphabet = sorted(ByteLevel.alphabet())
    ends = [symbol + "</w>" for symbol in alphabet]
    symbols = [*alphabet, *ends, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """T5's own tokenizer over the printable characters of ASCII; any other is the unknown token."""
    letters = [(character, -3.0) for character in string.printable if not character.isspace()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_text_encoder(projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text tower of two layers.

    Args:
        projection: with the pooled, projected output of SDXL's second encoder and both of SD3's.
    """
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
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(config).eval()


def tiny_t5() -> T5EncoderModel:
    """A T5 encoder of one layer, as wide as two CLIP towers side by side, as SD3 needs it."""
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


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's own tokenizer over single bytes, without merges, and the marks of a chat."""
    symbols = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    marks = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], extra_special_tokens=marks, chat_template=QWEN_CHAT
    )


def tiny_qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of one layer for text and one for images, which is never called."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 259,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": rope,
            "bos_token_id": 256,
            "eos_token_id": 256,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_qwen3(layers: int, head: bool = False) -> Qwen3Model | Qwen3ForCausalLM:
    """A Qwen3. Z-Image reads the last layer but one, FLUX.2-klein layers 9, 18 and 27."""
    config = Qwen3Config(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=256,
        eos_token_id=256,
    )
    kind = Qwen3ForCausalLM if head else Qwen3Model
    return kind(config).eval()


MISTRAL_MARKS = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% set text = message.content[0].text %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)
"""The part of Mistral's chat template that a prompt goes through."""


def tiny_mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral's tokenizer over single bytes, without merges.

    FLUX.2-dev has it inside a processor of texts and images, which needs torchvision. A prompt goes
    through the tokenizer alone.
    """
    symbols = ["<unk>", "<s>", "</s>", "<pad>", *MISTRAL_MARKS, *sorted(ByteLevel.alphabet())]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=MISTRAL_MARKS,
        chat_template=MISTRAL_CHAT,
    )


def tiny_mistral() -> Mistral3ForConditionalGeneration:
    """A Mistral 3 of 30 narrow layers, of which FLUX.2-dev reads the layers 10, 20 and 30."""
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": 265,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 30,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=8,
    )
    return Mistral3ForConditionalGeneration(config).eval()


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's own tokenizer over the printable characters of ASCII."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", "\n"]
    letters = [character for character in string.printable if not character.isspace()]
    vocabulary = {symbol: i for i, symbol in enumerate([*marks, *letters])}
    return GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)


def tiny_gemma() -> Gemma2Model:
    """A Gemma 2 of one layer."""
    config = Gemma2Config(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    return Gemma2Model(config).eval()


def _sd15_encoders() -> dict[str, Any]:
    return {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}


def _sdxl_encoders() -> dict[str, Any]:
    return {
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(),
        "text_encoder_2": tiny_text_encoder(projection=True),
        "tokenizer_2": tiny_tokenizer(),
    }


def _sd3_encoders() -> dict[str, Any]:
    return {
        "text_encoder": tiny_text_encoder(projection=True),
        "tokenizer": tiny_tokenizer(),
        "text_encoder_2": tiny_text_encoder(projection=True),
        "tokenizer_2": tiny_tokenizer(),
        "text_encoder_3": tiny_t5(),
        "tokenizer_3": tiny_t5_tokenizer(),
    }


def _flux_encoders() -> dict[str, Any]:
    return {
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(),
        "text_encoder_2": tiny_t5(),
        "tokenizer_2": tiny_t5_tokenizer(),
    }


def _qwen_image_encoders() -> dict[str, Any]:
    return {"text_encoder": tiny_qwen_vl(), "tokenizer": tiny_qwen_tokenizer()}


def _z_image_encoders() -> dict[str, Any]:
    return {"text_encoder": tiny_qwen3(layers=2), "tokenizer": tiny_qwen_tokenizer()}


def _chroma_encoders() -> dict[str, Any]:
    return {"text_encoder": tiny_t5(), "tokenizer": tiny_t5_tokenizer()}


def _flux2_klein_encoders() -> dict[str, Any]:
    return {
        "text_encoder": tiny_qwen3(layers=27, head=True),
        "tokenizer": tiny_qwen_tokenizer(),
    }


def _flux2_encoders() -> dict[str, Any]:
    return {"text_encoder": tiny_mistral(), "tokenizer": tiny_mistral_tokenizer()}


def _sana_encoders() -> dict[str, Any]:
    return {"text_encoder": tiny_gemma(), "tokenizer": tiny_gemma_tokenizer()}


def _noise_schedule() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _flow_schedule(by_size: bool) -> FlowMatchEulerDiscreteScheduler:
    """A flow, shifted by a constant or by the image's size."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=by_size)


def _solver_schedule() -> DPMSolverMultistepScheduler:
    """A flow for DPM-Solver++, as Sana has it."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def _unet_controlnet(denoiser: Any, inpaint: bool) -> ControlNetModel:
    return ControlNetModel.from_unet(denoiser, conditioning_channels=3)


def _sd3_controlnet(denoiser: Any, inpaint: bool) -> SD3ControlNetModel:
    """One that inpaints also sees the mask."""
    return SD3ControlNetModel(
        **_public(denoiser.config) | {"num_layers": 1},
        force_zeros_for_pooled_projection=False,
        extra_conditioning_channels=1 if inpaint else 0,
    )


def _flux_controlnet(denoiser: Any, inpaint: bool) -> FluxControlNetModel:
    config = _public(denoiser.config)
    del config["out_channels"]
    return FluxControlNetModel(**config)


def _public(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


UNET = {
    "sample_size": SIDE,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TRANSFORMER = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 2 * WIDTH,
}
KL_AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8,) * 4,
    "norm_num_groups": 4,
    "sample_size": 8 * SIDE,
}
AUTOENCODER = {"latent_channels": 4}
FLOW_AUTOENCODER = {  # more channels, shifted, and no 1x1 convolutions around the latents
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


FLUX2_TRANSFORMER = {
    "num_layers": 1,
    "num_single_layers": 1,
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * 16,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
DEEP_AUTOENCODER = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "scaling_factor": 0.41407,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (8,) * 6,
    "decoder_block_out_channels": (8,) * 6,
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "encoder_qkv_multiscales": ((),) * 6,
    "decoder_qkv_multiscales": ((),) * 6,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
}


@dataclass(frozen=True)
class TinyFamily:
    """How the tests make a family with few random weights.

    Attributes:
        denoiser: config of its denoiser class, for latents with sides of SIDE.
        autoencoder: config of its autoencoder; of an AutoencoderKL, or FLUX.2's, as far as it is
            not the same for all.
        encoders: makes the text encoders and tokenizers, by component of the pipeline.
        scheduler: makes its scheduler.
        latents: shape of one image's latents in a call of its pipeline.
        controlnet: makes a ControlNet beside a denoiser; the second argument: for inpainting. None:
            diffusers has none, or the tests make none.
        options: further arguments of its pipeline's constructor.
        missing_kinds: those of KINDS that diffusers does not have.
    """

    denoiser: dict[str, Any]
    autoencoder: dict[str, Any]
    encoders: Callable[[], dict[str, Any]]
    scheduler: Callable[[], Any]
    latents: tuple[int, ...]
    controlnet: Callable[[Any, bool], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    missing_kinds: tuple[str, ...] = ()


TINY = {
    "sd15": TinyFamily(
        denoiser=UNET | {"cross_attention_dim": WIDTH},
        autoencoder=AUTOENCODER,
        encoders=_sd15_encoders,
        scheduler=_noise_schedule,
        controlnet=_unet_controlnet,
        latents=(4, SIDE, SIDE),
        options={
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        },
    ),
    "sdxl": TinyFamily(
        denoiser=UNET
        | {
            "cross_attention_dim": 2 * WIDTH,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
        },
        autoencoder=AUTOENCODER,
        encoders=_sdxl_encoders,
        scheduler=_noise_schedule,
        controlnet=_unet_controlnet,
        latents=(4, SIDE, SIDE),
        options={"add_watermarker": False},
    ),
    "sd3": TinyFamily(
        denoiser=TRANSFORMER
        | {
            "num_layers": 2,
            "sample_size": SIDE,
            "in_channels": 16,
            "out_channels": 16,
            "pooled_projection_dim": 2 * WIDTH,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 2 * SIDE,
            "dual_attention_layers": (0,),  # as SD3.5 medium
            "qk_norm": "rms_norm",
        },
        autoencoder=FLOW_AUTOENCODER,
        encoders=_sd3_encoders,
        scheduler=lambda: _flow_schedule(by_size=False),
        controlnet=_sd3_controlnet,
        latents=(16, SIDE, SIDE),
        missing_kinds=("controlnet_img2img",),
    ),
    "flux": TinyFamily(
        denoiser=TRANSFORMER
        | {
            "num_layers": 1,
            "num_single_layers": 1,
            "in_channels": 64,
            "pooled_projection_dim": WIDTH,
            "guidance_embeds": True,  # as FLUX.1-dev
            "axes_dims_rope": (4, 6, 6),
        },
        autoencoder=FLOW_AUTOENCODER,
        encoders=_flux_encoders,
        scheduler=lambda: _flow_schedule(by_size=True),
        controlnet=_flux_controlnet,
        latents=(SIDE // 2 * SIDE // 2, 64),
    ),
    "qwen_image": TinyFamily(
        denoiser={
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "in_channels": 16,
            "out_channels": 4,
            "axes_dims_rope": (4, 6, 6),
        },
        autoencoder={
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [0.5, 1.0, 1.5, 2.0],
        },
        encoders=_qwen_image_encoders,
        scheduler=lambda: _flow_schedule(by_size=True),
        latents=(SIDE // 2 * SIDE // 2, 16),
    ),
    "z_image": TinyFamily(
        denoiser={
            "in_channels": 16,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 6, 6],
            "axes_lens": [1024, 64, 64],
        },
        autoencoder=FLOW_AUTOENCODER,
        encoders=_z_image_encoders,
        scheduler=lambda: _flow_schedule(by_size=False),
        latents=(16, SIDE, SIDE),
    ),
    "chroma": TinyFamily(
        denoiser=TRANSFORMER
        | {
            "num_layers": 1,
            "num_single_layers": 1,
            "in_channels": 64,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
        },
        autoencoder=FLOW_AUTOENCODER,
        encoders=_chroma_encoders,
        scheduler=lambda: _flow_schedule(by_size=True),
        latents=(SIDE // 2 * SIDE // 2, 64),
    ),
    "flux2_klein": TinyFamily(
        denoiser=FLUX2_TRANSFORMER | {"guidance_embeds": False},
        autoencoder=AUTOENCODER,
        encoders=_flux2_klein_encoders,
        scheduler=lambda: _flow_schedule(by_size=True),
        latents=(16, SIDE // 2, SIDE // 2),
    ),
    "flux2": TinyFamily(
        denoiser=FLUX2_TRANSFORMER,
        autoencoder=AUTOENCODER,
        encoders=_flux2_encoders,
        scheduler=lambda: _flow_schedule(by_size=True),
        latents=(16, SIDE // 2, SIDE // 2),
    ),
    "sana": TinyFamily(
        denoiser={
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": WIDTH,
            "sample_size": 32,
        },
        autoencoder=DEEP_AUTOENCODER,
        encoders=_sana_encoders,
        scheduler=_solver_schedule,
        latents=(4, 2, 2),
    ),
}

EVERY_KIND = tuple(name for name, tiny in TINY.items() if tiny.controlnet)
"""The families whose pipelines of every kind the tests make; of the others, text-to-image alone."""


def tiny_denoiser(family: str, **overrides: Any) -> Any:
    """The denoiser alone, of about 0.1 M parameters, with its family's conditioning.

    Args:
        family: its name.
        overrides: other values of its config.
    """
    kind = getattr(diffusers, FAMILIES[family].denoiser_class)
    return kind(**(TINY[family].denoiser | overrides)).eval()


def tiny_autoencoder(family: str) -> Any:
    """The autoencoder alone."""
    kind = getattr(diffusers, FAMILIES[family].autoencoder_class)
    has_kl_config = kind in (AutoencoderKL, AutoencoderKLFlux2)
    shared = KL_AUTOENCODER if has_kl_config else {}
    vae = kind(**shared, **TINY[family].autoencoder).eval()
    if kind is AutoencoderKLFlux2:
        # Its statistics are learned, and a new network's would change nothing
        vae.bn.running_mean.uniform_(-0.5, 0.5)
        vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def tiny_pipeline(family: str, seed: int = 0) -> Any:
    """A text-to-image pipeline in float32 on the CPU, progress bar off.

    FLUX has no size of its own: call it with height=64, width=64.

    Args:
        family: its name.
        seed: of the weights, which depend on the order in which the networks are made.
    """
    tiny = TINY[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        components = {
            "vae": tiny_autoencoder(family),
            FAMILIES[family].denoiser: tiny_denoiser(family),
            "scheduler": tiny.scheduler(),
            **tiny.encoders(),
        }
    pipe = getattr(diffusers, FAMILIES[family].pipeline)(**components, **tiny.options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_controlnet(family: str, denoiser: Any, seed: int = 2, inpaint: bool = False) -> Any:
    """A ControlNet that has an effect: all begin with weights of zero where they are added.

    Args:
        family: of the denoiser.
        denoiser: the network that it stands beside.
        seed: of the weights.
        inpaint: whether it is for inpainting.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make = TINY[family].controlnet
        assert make is not None, f"diffusers has no ControlNet of {family}"
        network = make(denoiser, inpaint)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


def tiny_variant(pipe: Any, kind: str, controlnet: Any = None) -> Any:
    """A pipeline of another kind around the components of a text-to-image one, which it shares.

    Args:
        pipe: the text-to-image pipeline.
        kind: a key of KINDS that its family has.
        controlnet: in place of a new one.
    """
    if kind == "text2img":
        return pipe
    family = family_of(pipe)
    denoiser = getattr(pipe, family.denoiser)
    parts = {**pipe.components, "requires_safety_checker": False, "add_watermarker": False}
    if "controlnet" in kind:
        inpaint = "inpaint" in kind
        parts["controlnet"] = controlnet or tiny_controlnet(family.name, denoiser, inpaint=inpaint)

    pipeline_class = _variant_class(family.pipeline, kind)
    accepted = inspect.signature(pipeline_class.__init__).parameters
    variant = pipeline_class(**{name: parts[name] for name in accepted if name in parts})
    variant.set_progress_bar_config(disable=True)
    return variant


def _variant_class(pipeline: str, kind: str) -> Any:
    """diffusers' class of a pipeline of another kind, which sometimes ends in `Inpainting`."""
    name = pipeline.replace("Pipeline", f"{KINDS[kind]}Pipeline")
    return getattr(diffusers, name, None) or getattr(
        diffusers, name.replace("InpaintPipeline", "InpaintingPipeline")
    )


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """A tiny pipeline as a diffusers folder, as `DiffusionPipeline.from_pretrained` loads it."""
    tiny_pipeline(family, seed).save_pretrained(folder)
    return folder


def perturbed_denoiser(denoiser: Any, scale: float = 0.1, seed: int = 1) -> Any:
    """A full anchor: a copy whose weights moved by `scale` times the spread of their tensor."""
    anchor = copy.deepcopy(denoiser)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in anchor.parameters():
            spread = parameter.std(unbiased=False).clamp(min=0.05)
            parameter += scale * spread * torch.randn(parameter.shape, generator=generator)
    return anchor


def tiny_lora(
    denoiser: Any, rank: int = 4, alpha: float = 8, seed: int = 1, scale: float = 0.1, **config: Any
) -> Any:
    """A LoRA anchor: a copy with a peft adapter "default" whose matrices are both random.

    In peft's own initialisation B is zero.

    Args:
        denoiser: of any family.
        rank: of the adapter.
        alpha: of the adapter.
        seed: of the weights.
        scale: standard deviation of the weights.
        config: other settings of peft's LoraConfig.
    """
    anchor = copy.deepcopy(denoiser)
    generator = torch.Generator().manual_seed(seed)
    targets = list(_family_of_denoiser(denoiser).lora_targets)
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": targets} | config
    anchor.add_adapter(LoraConfig(**settings), adapter_name="default")
    with torch.no_grad():
        for name, parameter in anchor.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return anchor


def _family_of_denoiser(denoiser: Any) -> Any:
    """The first family with a denoiser of this class."""
    for family in FAMILIES.values():
        if family.denoiser_class == type(denoiser).__name__:
            return family
    raise ValueError(f"a {type(denoiser).__name__} is of no family")


def save_overflowing(family: str, folder: Path, force_upcast: bool = True) -> Path:
    """A tiny pipeline in float16 whose autoencoder overflows there, as SDXL's original one does.

    Args:
        family: of the pipeline; its autoencoder is an AutoencoderKL.
        folder: where.
        force_upcast: what the autoencoder's config says.
    """
    pipe = tiny_pipeline(family)
    with torch.no_grad():
        for part in (pipe.vae.encoder, pipe.vae.decoder):
            part.conv_in.weight *= OVERFLOWING / part.conv_in.weight.abs().max()
    pipe.to(torch.float16).save_pretrained(folder)
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text()) | {"force_upcast": force_upcast}
    file.write_text(json.dumps(config))
    return folder
