"""How realignment is sampled with two networks and no library: the paper's Algorithm 1.

`benchmarks.sample` times its sweep against this: one prompt at a time, no batch, nothing shared by
the lambdas, and both networks evaluated at every step, at lambda 0 and 1 too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def sample(
    pipe: Any,
    anchor: nn.Module,
    lam: float,
    steps: int,
    guidance_scale: float,
    shape: tuple[int, ...],
    seed: int,
    prompt: dict[str, Tensor],
) -> Tensor:
    """The latents (1, C, H, W) of one prompt.

    Args:
        pipe: the reference's pipeline.
        anchor: the anchor's UNet.
        lam: lambda.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        shape: (C, H, W) of the latents.
        seed: of the noise.
        prompt: a row of `prompt_embeds`, `negative_prompt_embeds` and SDXL's pooled ones.
    """
    # The initial noise, and what both networks read besides the latents.
    scheduler = pipe.scheduler
    generator = torch.Generator().manual_seed(seed)
    device = pipe.unet.device
    dtype = pipe.unet.dtype
    scheduler.set_timesteps(steps, device=device)
    noise = torch.randn(1, *shape, generator=generator).to(device, dtype)
    latents = noise * scheduler.init_noise_sigma
    conditioning = _conditioning(prompt, shape, device, dtype)

    for t in scheduler.timesteps:
        # One evaluation of each network, without the prompt and with it.
        model_input = scheduler.scale_model_input(torch.cat([latents, latents]), t)
        reference = pipe.unet(model_input, t, **conditioning, return_dict=False)[0]
        aligned = anchor(model_input, t, **conditioning, return_dict=False)[0]

        # The mixture, guidance, and one step of the sampler.
        unconditional, conditional = ((1 - lam) * reference + lam * aligned).chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(guided, t, latents, generator=generator, return_dict=False)[0]
    return latents


def _conditioning(
    prompt: dict[str, Tensor], shape: tuple[int, ...], device: Any, dtype: Any
) -> dict[str, Any]:
    """The networks' arguments, a row without the prompt and a row with it."""
    text = torch.cat([prompt["negative_prompt_embeds"], prompt["prompt_embeds"]])
    if "pooled_prompt_embeds" not in prompt:
        return {"encoder_hidden_states": text}

    # SDXL also reads pooled embeddings, and the size of the image.
    side = 8 * shape[-1]
    pooled = torch.cat([prompt["negative_pooled_prompt_embeds"], prompt["pooled_prompt_embeds"]])
    sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2, device=device, dtype=dtype)
    return {
        "encoder_hidden_states": text,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
    }
