"""What training costs, and what realignment saves: FLOPs counted on the model's own config, GPU-hours from the clock.

A multiply-add counts as 2 FLOPs, as torch's counter has it; only matrix products, convolutions and attention are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def meta_denoiser(config: Mapping[str, Any]) -> Any:
    """The network of a diffusers config, without weights (meta device); its class is the config's `_class_name`, by default a UNet."""
    import diffusers
    import torch

    with torch.device("meta"):
        return getattr(diffusers, config.get("_class_name", "UNet2DConditionModel")).from_config(
            dict(config)
        )


def denoiser_inputs(
    config: Mapping[str, Any], height: int, width: int, tokens: int = 77
) -> dict[str, Any]:
    """Meta tensors for one forward on one latent image (pixels / 8), under the names of the denoiser's forward."""
    import torch

    zeros = lambda *shape: torch.zeros(1, *shape, device="meta")  # noqa: E731
    kind = config.get("_class_name", "UNet2DConditionModel")
    if (
        kind == "FluxTransformer2DModel"
    ):  # rows of 2 x 2 latents; every row and token has three coordinates
        rows = (height // 2) * (width // 2)
        ids = {"img_ids": zeros(rows, 3)[0], "txt_ids": zeros(tokens, 3)[0]} | (
            {"guidance": zeros()} if config["guidance_embeds"] else {}
        )
        image, text = (
            zeros(rows, config["in_channels"]),
            zeros(tokens, config["joint_attention_dim"]),
        )
        pooled = {"pooled_projections": zeros(config["pooled_projection_dim"])}
        return (
            {"hidden_states": image, "encoder_hidden_states": text, "timestep": zeros()}
            | pooled
            | ids
        )
    image = zeros(config["in_channels"], height, width)
    if kind == "SD3Transformer2DModel":
        text, pooled = (
            zeros(tokens, config["joint_attention_dim"]),
            {"pooled_projections": zeros(config["pooled_projection_dim"])},
        )
        return {"hidden_states": image, "encoder_hidden_states": text, "timestep": zeros()} | pooled
    added = {}
    if config.get("addition_embed_type") == "text_time":
        width_pooled = (
            config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        )
        added = {"added_cond_kwargs": {"text_embeds": zeros(width_pooled), "time_ids": zeros(6)}}
    return {
        "sample": image,
        "timestep": zeros(),
        "encoder_hidden_states": zeros(tokens, config["cross_attention_dim"]),
    } | added


def denoiser_flops(config: Mapping[str, Any], height: int, width: int, tokens: int = 77) -> float:
    """FLOPs of one forward of a denoiser on one latent image, counted by torch without memory or arithmetic (meta device).

    config: of a `UNet2DConditionModel` (SD1.5's or SDXL's kind), `SD3Transformer2DModel` or `FluxTransformer2DModel`. height, width: of
    the latents (pixels / 8 for the published autoencoders). tokens: length of the prompt. SDXL at 128 x 128: 6.76e12; SD1.5 at 64 x 64:
    0.80e12.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    denoiser = meta_denoiser(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(**denoiser_inputs(denoiser.config, height, width, tokens))
    return float(counter.get_total_flops())


def encoder_flops(config: Mapping[str, Any], height: int, width: int) -> float:
    """FLOPs of encoding one picture of height x width pixels with an `AutoencoderKL` of this config. SDXL's at 1024 x 1024: 4.88e12."""
    import torch
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoencoderKL.from_config(dict(config)).encode(torch.zeros(1, 3, height, width))
    return float(counter.get_total_flops())


def dpo_step_flops(
    forward_flops: float,
    pairs: int,
    method: str,
    checkpointing: bool = False,
    stored_reference: bool = False,
    encoder: float = 0.0,
) -> float:
    """FLOPs of one optimiser step of Diffusion-DPO on `pairs` pairs: 2 * pairs images, each counted in `forward_flops`.

    The reference's forward costs 1 (0 where its errors are stored), ours 1, its backward 2 (`full`: gradients of activations and of
    weights) or 1 (`lora`: of activations alone; measured 1.14 on SD1.5, 1.09 on SDXL, as attention has no weights), gradient checkpointing
    1 (the forward again). encoder: FLOPs of encoding one image, where the autoencoder runs in the loop. The text encoders (under 2 % of
    a forward) are not counted. Raises ValueError.
    """
    backward = {"full": 2, "lora": 1}
    if method not in backward:
        raise ValueError(f"method must be lora or full, not {method!r}")
    forwards = int(not stored_reference) + 1 + backward[method] + int(checkpointing)
    return 2 * pairs * (forwards * forward_flops + encoder)


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


@dataclass(frozen=True)
class PublishedCost:
    """The paper's row beside a count of the same recipe.

    published_flops: stated; flops: counted, of the denoiser alone; ratio: counted over stated; with_everything: what the published
    launcher executes, gradient checkpointing and autoencoder too. why: they differ, in words.
    """

    gpu_hours: float
    published_flops: float
    flops: float
    ratio: float
    with_everything: float
    why: str


def published_dpo(family: str = "sdxl") -> PublishedCost:
    """What the paper states that one SDXL anchor costs (336 GPU-hours, 188.7 EFLOP), derived from the recipe. Raises ValueError."""
    from deradiff.models.published import (
        AUTOENCODER,
        DENOISERS,
        GPUS,
        PAPER_EFLOPS,
        PAPER_GPU,
        PAPER_GPU_HOURS,
        PAPER_UTILISATION,
        RECIPES,
    )

    if family != "sdxl":
        raise ValueError(f"the paper states the cost of an anchor for sdxl alone, not for {family}")
    recipe, side, peak = (
        RECIPES[family],
        DENOISERS[family]["sample_size"],
        GPUS[PAPER_GPU].tflops * 1e12,
    )
    forward, encoder = (
        denoiser_flops(DENOISERS[family], side, side),
        encoder_flops(AUTOENCODER, 8 * side, 8 * side),
    )
    flops = recipe.steps * dpo_step_flops(forward, recipe.pairs, "full")
    executed = recipe.steps * dpo_step_flops(
        forward, recipe.pairs, "full", recipe.checkpointing, encoder=encoder
    )
    stated, available = PAPER_EFLOPS * 1e18, PAPER_GPU_HOURS * 3600 * peak
    why = (
        f"{PAPER_EFLOPS:g} EFLOP is no count: it is {PAPER_GPU_HOURS:g} h at {PAPER_UTILISATION:.0%} of an A100's {peak / 1e12:g} TFLOP/s. "
        f"The recipe is {recipe.steps} steps of {recipe.pairs} pairs, and an image costs four forwards of {forward / 1e12:.2f} TFLOP "
        f"(the reference's 1, ours 1, backward 2): {flops / 1e18:.1f} EFLOP, {flops / stated - 1:+.0%}, which in {PAPER_GPU_HOURS:g} h is "
        f"{flops / available:.0%} of the peak. With the launcher's gradient checkpointing (one forward more) and its autoencoder in the "
        f"loop ({encoder / 1e12:.2f} TFLOP an image) it executes {executed / 1e18:.1f} EFLOP, {executed / available:.0%} of the peak, "
        "which such training hardly reaches: the hours and the recipe are unlikely to be both as stated."
    )
    return PublishedCost(PAPER_GPU_HOURS, stated, flops, flops / stated, executed, why)
