"""What training costs, and what realignment saves: FLOPs counted on the model's own config, GPU-hours from the clock.

A multiply-add counts as 2 FLOPs, as torch's counter has it; only matrix products, convolutions and attention are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def denoiser_flops(config: Mapping[str, Any], height: int, width: int, tokens: int = 77) -> float:
    """FLOPs of one forward of a UNet on one latent image, counted by torch without memory or arithmetic (meta device).

    config: a `UNet2DConditionModel`'s config, SD1.5's or SDXL's kind. height, width: of the latents (pixels / 8 for the published
    autoencoders). tokens: length of the prompt. SDXL at 128 x 128: 6.76e12; SD1.5 at 64 x 64: 0.80e12.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel.from_config(dict(config))
        added = {}
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {"added_cond_kwargs": {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}}
        latents = torch.zeros(1, config["in_channels"], height, width)
        unet(latents, torch.zeros(1), torch.zeros(1, tokens, config["cross_attention_dim"]), **added)
    return float(counter.get_total_flops())


def dpo_step_flops(forward_flops: float, pairs: int, method: str, checkpointing: bool = False) -> float:
    """FLOPs of one optimiser step of Diffusion-DPO on `pairs` pairs, in units of `forward_flops` for each of the 2 * pairs images.

    The reference's forward costs 1, ours 1, its backward 2 (`full`: gradients of activations and of weights) or 1 (`lora`: of
    activations alone; measured 1.14 on SD1.5, 1.09 on SDXL, as attention has no weights), gradient checkpointing 1 (the forward again).
    The autoencoder and the text encoders run once per image and caption, are cached, and are not counted. Raises ValueError.
    """
    backward = {"full": 2, "lora": 1}
    if method not in backward:
        raise ValueError(f"method must be lora or full, not {method!r}")
    reference, trained = 1, 1 + backward[method] + int(checkpointing)
    return 2 * pairs * (reference + trained) * forward_flops


def gpu_hours(seconds: float, devices: int) -> float:
    """Device-hours of a run that held `devices` devices for `seconds` of wall-clock time."""
    return seconds * devices / 3600


@dataclass(frozen=True)
class Savings:
    """What n models cost aligned from scratch, and as one anchor realigned n - 1 times. The share saved is in percent."""

    from_scratch: float
    anchor: float
    saved: float
    percent: float


def savings(anchor: float, others: Sequence[float]) -> Savings:
    """Training cost saved by realigning one anchor instead of training `others` too; the unit (GPU-hours, FLOPs) is the caller's.

    Sampling is not counted: mode `exact` evaluates two denoisers a step where a model aligned from scratch evaluates one.
    """
    total = anchor + sum(others)
    return Savings(total, anchor, total - anchor, 100 * (total - anchor) / total if total else 0.0)
