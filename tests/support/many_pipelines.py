"""Tiny pipelines of families that deradiff does not train: a denoiser and a scheduler, no more.

They stand for all of diffusers' pipelines where anchors are read. None of them can sample: there is
no text encoder and no autoencoder.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

PIPELINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen": (
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
    ),
    "sana": (
        "SanaPipeline",
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
    ),
    "z-image": (
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {
            "in_channels": 16,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [64, 32, 32],
        },
    ),
    "flux2": (
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": [4, 4, 4, 4],
        },
    ),
    "chroma": (
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": [4, 4, 8],
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
            "approximator_num_channels": 16,
        },
    ),
    "wan": (
        "WanPipeline",
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 1,
            "rope_max_seq_len": 32,
        },
    ),
    "pixart": (
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 32,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
        },
    ),
}
"""By name: the pipeline's class, its denoiser's, and the config of a tiny denoiser."""

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def bare_pipeline(name: str, **parts: Any) -> Any:
    """A pipeline of PIPELINES with a denoiser of random weights and a scheduler.

    Args:
        name: a key of PIPELINES.
        parts: other components by name.
    """
    pipeline, network, config = PIPELINES[name]
    torch.manual_seed(0)
    denoiser = getattr(diffusers, network)(**config).eval()
    components = {"transformer": denoiser, "scheduler": FlowMatchEulerDiscreteScheduler()} | parts
    pipeline_class = getattr(diffusers, pipeline)
    for argument, parameter in inspect.signature(pipeline_class.__init__).parameters.items():
        if parameter.default is inspect.Parameter.empty and argument != "self":
            components.setdefault(argument, None)
    return pipeline_class(**components)


def with_random_lora(network: Any, rank: int = 4, alpha: float = 16) -> Any:
    """A copy of a network with a peft adapter `default` whose matrices are both random."""
    copied = copy.deepcopy(network)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS)
    inject_adapter_in_model(config, copied, adapter_name="default")
    copied.peft_config = {"default": config}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return copied


def added_weights(network: Any, adapter: str = "default") -> dict[str, Tensor]:
    """What an adapter adds to the weight of each layer, by the layer's name."""
    added = {}
    for name, module in network.named_modules():
        if hasattr(module, "lora_A"):
            added[name] = module.get_delta_weight(adapter).detach()
    return added


def weights_of_lora(weights: Any, denoiser: str = "transformer") -> dict[str, Tensor]:
    """What the matrices of a `LoraWeights` add to the weight of each layer, by the layer's name.

    Computed by hand: alpha / rank B A, with the settings as peft reads them.
    """
    added = {}
    settings = weights.metadata or {}
    for key, a in weights.state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removesuffix(".lora_A.weight")
        b = weights.state[f"{layer}.lora_B.weight"]
        rank = a.shape[0]
        alpha = settings.get(f"{denoiser}.lora_alpha", rank)
        patterns = settings.get(f"{denoiser}.alpha_pattern", {})
        alpha = patterns.get(f"^{layer.removeprefix(f'{denoiser}.')}", alpha)
        added[layer.removeprefix(f"{denoiser}.")] = alpha / rank * (b @ a)
    return added
