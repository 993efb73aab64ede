"""Images of one process: a stock diffusers pipeline inside `deradiff.realign`, batch by batch, all lambdas on the same noise."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deradiff import realign
from deradiff.anchors import Anchor
from deradiff.data.prompts import Prompt
from deradiff.data.tables import encode_png
from deradiff.families import family_of, load_pipeline
from deradiff.runs import locate
from sample.config import SAMPLERS, SampleConfig
from sample.manifest import Record, image_path

Wanted = tuple[Prompt, int]  # prompt and seed: an image for each lambda
EMBEDDINGS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)  # as encode_prompt returns them


def load_sampler(config: SampleConfig, device: torch.device) -> Any:
    """The reference pipeline on its device, with the scheduler that `config.sampler` names."""
    import diffusers

    dtype = getattr(torch, config.dtype or "float32")
    pipe = load_pipeline(config.model.base or "", config.model.revision, dtype)
    if config.model.vae:
        pipe.vae = diffusers.AutoencoderKL.from_pretrained(locate(config.model.vae), dtype=dtype)
    if family_of(pipe).name == "sdxl":
        pipe.vae.enable_slicing()  # four megapixels decoded at once would need more memory than two UNets
    pipe.scheduler = make_scheduler(config.sampler, pipe.scheduler.config)
    return pipe.to(device)


def make_scheduler(sampler: str, published: Any) -> Any:
    """A scheduler on the noise schedule of the base's own, from what its file says: what that leaves open is the new class's default.

    Clipping is off: it is meant for pixels in [-1, 1], which latents leave, and it would make a step non-linear in the denoiser's output.
    """
    import diffusers

    unclipped = {} if sampler == "euler_ancestral" else {"clip_sample": False}
    return getattr(diffusers, SAMPLERS[sampler]).from_config(published, **unclipped)


def timesteps_digest(scheduler: Any, steps: int) -> str:
    """Of the resolved timesteps: two runs on unlike noise levels must not be compared, whatever their configs say."""
    scheduler.set_timesteps(steps)
    return hashlib.sha256(json.dumps([float(t) for t in scheduler.timesteps]).encode()).hexdigest()[:16]


def generator_seed(prompt_id: str, seed: int) -> int:
    """63 bits that depend on prompt and seed alone, and so does the image: not on its place in a batch, nor on the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{prompt_id}\n{seed}".encode()).digest()[:8]) >> 1


def sample_images(pipe: Any, config: SampleConfig, anchor: Anchor, wanted: list[Wanted], done: set[str]) -> Iterator[tuple[bytes, Record]]:
    """Yield (PNG, record) of every image of `wanted`, over all lambdas, that is not in `done`."""
    assert config.batch_size and config.steps  # `resolve` decided them
    digest = timesteps_digest(pipe.scheduler, config.steps)
    with realign(pipe, anchor, config.lambdas[0], config.mode, config.path_kl) as dial:
        for start in range(0, len(wanted), config.batch_size):
            batch = wanted[start : start + config.batch_size]
            embeddings = _encode(pipe, config, batch)  # once for all lambdas
            for lam in config.lambdas:
                rows = [i for i, (prompt, seed) in enumerate(batch) if image_path(lam, prompt.prompt_id, seed) not in done]
                if not rows:
                    continue
                dial.lam = lam
                images = _call(pipe, config, {name: tensor[rows] for name, tensor in embeddings.items()}, [batch[i] for i in rows])
                for i, image, path_kl in zip(rows, images, dial.path_kl.tolist(), strict=True):
                    yield encode_png(image), _record(config, anchor, *batch[i], lam, digest, image, path_kl)


def _encode(pipe: Any, config: SampleConfig, batch: list[Wanted]) -> dict[str, Tensor]:
    """What the pipeline makes of the prompts: keyword arguments of its call, a row each."""
    guided = config.guidance_scale is not None and config.guidance_scale > 1  # as the pipelines decide it
    encoded = pipe.encode_prompt(
        [p.text for p, _ in batch], device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=guided
    )
    return {name: tensor for name, tensor in zip(EMBEDDINGS, encoded) if tensor is not None}


def _call(pipe: Any, config: SampleConfig, embeddings: dict[str, Tensor], images: list[Wanted]) -> list[Any]:
    """One call of the stock pipeline. Noise is drawn on the CPU, a generator for each image: the same on every device, in every batch."""
    generators = [torch.Generator().manual_seed(generator_seed(prompt.prompt_id, seed)) for prompt, seed in images]
    size = {"height": config.height, "width": config.width}
    sampling = {"num_inference_steps": config.steps, "guidance_scale": config.guidance_scale, "eta": config.eta}
    return pipe(**embeddings, **sampling, **size, generator=generators).images


def _record(
    config: SampleConfig, anchor: Anchor, prompt: Prompt, seed: int, lam: float, timesteps: str, image: Any, path_kl: float
) -> Record:
    beta = anchor.card.beta if anchor.card else None
    return {
        "image": image_path(lam, prompt.prompt_id, seed), "prompt_id": prompt.prompt_id, "prompt": prompt.text, "seed": seed,
        "anchor": config.anchor, "base_model": config.model.base,
        "beta": beta, "lam": lam, "beta_target": beta / lam if beta and lam else None,
        "mode": config.mode, "sampler": config.sampler, "eta": config.eta, "steps": config.steps, "guidance_scale": config.guidance_scale,
        "height": image.height, "width": image.width, "path_kl": path_kl if math.isfinite(path_kl) else None,
        "generator_seed": generator_seed(prompt.prompt_id, seed), "timesteps_sha256": timesteps,
    }  # fmt: skip
