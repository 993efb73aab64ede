"""What a training run will need before it is started: FLOPs, hours, memory and disk, counted on the denoiser's config without a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deradiff.models.flops import denoiser_flops, denoiser_inputs, dpo_step_flops, meta_denoiser

UTILISATION = (
    0.4  # of a GPU's peak, assumed; measure it with `python -m benchmarks.train` on the GPU itself
)
HALF, SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Needs:
    """flops: of the whole run, recomputation too. hours: device-hours, at the assumed utilisation. The others: bytes on one device.

    weights: frozen ones in half precision, trained ones in single, and autocast's copies of these. activations: what autograd keeps of one
    micro-batch for its backward, all of it in half precision: a lower bound, since autocast keeps norms in single precision, and kernels'
    workspaces, the recomputation of one block and fragmentation come on top.
    """

    parameters: int
    trained: int
    flops: float
    hours: float
    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def memory(self) -> float:
        """Bytes on one device without sharding."""
        return self.weights + self.gradients + self.optimizer + self.activations


def dpo_needs(
    config: Mapping[str, Any],
    height: int,
    width: int,
    steps: int,
    pairs: int,
    tflops: float,
    *,
    method: str = "full",
    optimizer: str = "adamw",
    checkpointing: bool = False,
    stored_reference: bool = False,
    batch: int = 1,
    tokens: int = 77,
    lora: Any = None,
    utilisation: float = UTILISATION,
) -> Needs:
    """Needs of Diffusion-DPO in mixed precision, latents and text embeddings cached, on devices of `tflops` x 10^12 FLOP/s.

    config, height, width, tokens: as `denoiser_flops`. pairs: of one optimiser step. batch: pairs of one micro-batch. lora: a peft
    LoraConfig, for method `lora`. optimizer: adamw, adafactor (its second moment factored) or adamw8bit. Raises ValueError.
    """
    network = meta_denoiser(config)
    parameters = sum(p.numel() for p in network.parameters())
    if method == "lora":
        network.requires_grad_(False)
        network.add_adapter(lora)
    trained = [p for p in network.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    forward = denoiser_flops(config, height, width, tokens)
    flops = steps * dpo_step_flops(forward, pairs, method, checkpointing, stored_reference)
    if method == "lora":  # one network, reference with its adapter off
        weights = HALF * parameters + (HALF + SINGLE) * count
    else:
        weights = (HALF + SINGLE) * parameters + (0 if stored_reference else HALF * parameters)
    return Needs(
        parameters=parameters,
        trained=count,
        flops=flops,
        hours=flops / (tflops * 1e12 * utilisation) / 3600,
        weights=weights,
        gradients=SINGLE * count,
        optimizer=_optimizer_bytes([p.shape for p in trained], optimizer),
        activations=2
        * batch
        * _kept(network, denoiser_inputs(network.config, height, width, tokens), checkpointing),
    )


def _optimizer_bytes(shapes: list[Any], optimizer: str) -> float:
    if (
        optimizer == "adafactor"
    ):  # Shazeer and Stern 2018: a row and a column for each matrix, as transformers has it; no first moment
        return SINGLE * sum(
            s.numel() // s[-1] + s.numel() // s[-2] if len(s) > 1 else s.numel() for s in shapes
        )
    each = {"adamw": 2 * SINGLE, "adamw8bit": 2}
    if optimizer not in each:
        raise ValueError(f"the optimizer must be adamw, adafactor or adamw8bit, not {optimizer!r}")
    return each[optimizer] * sum(s.numel() for s in shapes)


def _kept(network: Any, inputs: dict[str, Any], checkpointing: bool) -> float:
    """Bytes that one image's forward keeps for the backward, in half precision, attention fused (no matrix of weights is kept)."""
    import torch
    from torch.nn import functional as F

    kept: dict[int, int] = {}
    torch.nn.Module.to(
        network.train(), torch.bfloat16
    )  # diffusers' own `to` would warn of its fp32 modules
    if checkpointing:
        network.enable_gradient_checkpointing()
    weights = {p.untyped_storage()._cdata for p in network.parameters()}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    class Fused(torch.autograd.Function):
        """Stands for a fused attention kernel: it keeps query, key, value and its output."""

        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            out = query.new_empty(*query.shape[:-1], value.shape[-1])
            ctx.save_for_backward(query, key, value, out)
            return out

    half = {k: _halved(v) for k, v in inputs.items()}
    usual = F.scaled_dot_product_attention
    try:
        F.scaled_dot_product_attention = lambda query, key, value, *a, **k: Fused.apply(
            query, key, value
        )  # type: ignore[assignment]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(**half)
    finally:
        F.scaled_dot_product_attention = usual
    return float(sum(kept.values()))


def _halved(value: Any) -> Any:
    import torch

    return (
        {k: _halved(v) for k, v in value.items()}
        if isinstance(value, dict)
        else value.to(torch.bfloat16)
    )


def cache_bytes(
    config: Mapping[str, Any], height: int, width: int, images: int, captions: int, tokens: int = 77
) -> float:
    """Disk, in bytes, of the cached latents of `images` pictures and the text embeddings of `captions` captions, in half precision."""
    inputs = denoiser_inputs(meta_denoiser(config).config, height, width, tokens)
    latents = inputs["sample" if "sample" in inputs else "hidden_states"].numel()
    pooled = inputs.get(
        "pooled_projections", inputs.get("added_cond_kwargs", {}).get("text_embeds")
    )
    text = inputs["encoder_hidden_states"].numel() + (0 if pooled is None else pooled.numel())
    return HALF * (float(images) * latents + float(captions) * text)


PROMPT_TOKENS = {"sd15": 77, "sdxl": 77, "sd3": 77 + 256, "flux": 512}  # as the pipelines encode
