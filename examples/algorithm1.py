"""The paper's Algorithm 1 in a page: one prompt, one lambda, two networks, no pipeline.

    python examples/algorithm1.py                      # the shapes world, seconds on a CPU
    python examples/algorithm1.py --anchor runs/train/mine/anchor --lam 0.5

`deradiff.realign` does the same within a pipeline, and more cheaply where it can. The last line
compares the two. The anchor's card names the base model, an SD1.5 or the shapes world's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from realign import make_anchor
from torch import Tensor, nn

import deradiff
from deradiff.method.gaussian import Gaussian, geometric_mixture
from deradiff.models.base_model import BaseModel

GUIDANCE_SCALE = 2.5


@torch.no_grad()
def guided_noise(network: nn.Module, latents: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
    """The noise that a network predicts, with classifier-free guidance. latents: (1, C, H, W)."""
    output = network(torch.cat([latents, latents]), t, encoder_hidden_states=prompts).sample
    without, with_prompt = output.chunk(2)
    return without + GUIDANCE_SCALE * (with_prompt - without)


def transition(scheduler: Any, noise: Tensor, t: Tensor, latents: Tensor) -> Gaussian:
    """p(x_{t-1} | x_t) of one model: DDIM with eta = 1, whose variance both models share."""
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    mean = scheduler.step(noise, t, latents, eta=1.0, variance_noise=torch.zeros_like(latents))
    variance = scheduler._get_variance(int(t), int(previous))
    return Gaussian(mean.prev_sample, variance)


def algorithm1(pipe: Any, anchor: nn.Module, prompt: str, lam: float, steps: int) -> Tensor:
    """Latents of one prompt: every step is drawn from p_ref^(1 - lam) p_anchor^lam."""
    text, no_text = pipe.encode_prompt(prompt, pipe.device, 1, True)
    prompts = torch.cat([no_text, text])
    generator = torch.Generator().manual_seed(0)
    side = pipe.unet.config.sample_size
    latents = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=generator)

    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        # Where each of the two models would go from here.
        by_reference = guided_noise(pipe.unet, latents, t, prompts)
        by_anchor = guided_noise(anchor, latents, t, prompts)
        reference_step = transition(pipe.scheduler, by_reference, t, latents)
        anchor_step = transition(pipe.scheduler, by_anchor, t, latents)

        # Their geometric mixture is a Gaussian, and the next latents are drawn from it.
        step = geometric_mixture(reference_step, anchor_step, lam)
        noise = torch.randn(latents.shape, generator=generator)
        latents = step.mean + step.variance**0.5 * noise
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--anchor", help="one with a card; default: a new one")
    parser.add_argument("--prompt", default="a large red circle on a white background")
    parser.add_argument("--lam", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/algorithm1"))
    arguments = parser.parse_args()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    anchor = arguments.anchor or make_anchor(arguments.folder)
    card = deradiff.load_anchor(anchor).card
    pipe = BaseModel(card.base_model, card.base_revision).load_pipeline()

    # The anchor as a network of its own.
    aligned = BaseModel(card.base_model, card.base_revision).load_pipeline()
    with deradiff.realign(aligned, anchor, lam=1.0, mode="weights"):
        latents = algorithm1(pipe, aligned.unet, arguments.prompt, arguments.lam, arguments.steps)

    # The same by the dial: the same start, the same noise, the same steps.
    with deradiff.realign(pipe, anchor, lam=arguments.lam):
        by_dial = pipe(
            arguments.prompt,
            num_inference_steps=arguments.steps,
            guidance_scale=GUIDANCE_SCALE,
            eta=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    print(f"largest difference to the dial: {(latents - by_dial).abs().max().item():.2g}")

    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    file = arguments.folder / f"lam={arguments.lam:g}.png"
    pipe.image_processor.postprocess(image.detach())[0].save(file)
    print(f"see {file}")


if __name__ == "__main__":
    main()
