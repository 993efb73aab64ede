"""Images of one process: a stock diffusers pipeline inside `deradiff.realign`, batch by batch, all lambdas on the same noise."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from deradiff import realign
from deradiff.anchors.anchor import Anchor
from deradiff.data.prompts import Prompt
from deradiff.data.tables import encode_png
from deradiff.files import locate
from deradiff.method.samplers import FlowMatchSDEScheduler
from deradiff.models.base_model import BaseModel
from deradiff.models.families import family_of
from deradiff.realignment.registry import LABELS, SETTINGS
from sample.config import SAMPLERS, SampleConfig
from sample.manifest import Record, image_path

Wanted = tuple[Prompt, int]  # prompt and seed: an image for each lambda


def load_sampler(config: SampleConfig, device: torch.device) -> Any:
    """The reference pipeline on its device, with the scheduler that `config.sampler` names."""
    import diffusers

    dtype = getattr(torch, config.dtype or "float32")
    pipe = BaseModel(config.model.base or "", config.model.revision).load_pipeline(dtype)
    if config.model.vae:
        pipe.vae = diffusers.AutoencoderKL.from_pretrained(locate(config.model.vae), dtype=dtype)
    if family_of(pipe).sliced_decoding:
        pipe.vae.enable_slicing()  # four megapixels decoded at once would need more memory than two denoisers
    pipe.scheduler = make_scheduler(config.sampler or "", pipe.scheduler.config)
    return pipe.to(device)


def make_scheduler(sampler: str, published: Any) -> Any:
    """A scheduler on the noise schedule of the base's own, from what its file says: what that leaves open is the new class's default."""
    import diffusers

    chosen = SAMPLERS[sampler]
    scheduler = (
        FlowMatchSDEScheduler if sampler == "flow_sde" else getattr(diffusers, chosen.scheduler)
    )
    return scheduler.from_config(published, **dict(chosen.options))


def timesteps_digest(scheduler: Any) -> str:
    """Of the timesteps that a call resolved: two runs on unlike noise levels must not be compared, whatever their configs say."""
    return hashlib.sha256(json.dumps([float(t) for t in scheduler.timesteps]).encode()).hexdigest()[
        :16
    ]


def generator_seed(prompt_id: str, seed: int) -> int:
    """63 bits that depend on prompt and seed alone, and so does the image: not on its place in a batch, nor on the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{prompt_id}\n{seed}".encode()).digest()[:8]) >> 1


class Noise:
    """The generators of a call's rows, also for a scheduler that its pipeline hands none: SD3's and FLUX's steps of the SDE would
    otherwise draw from torch's global generator, and an image would depend on its batch."""

    def __init__(self, scheduler: Any) -> None:
        self.generators: list[torch.Generator] = []
        if isinstance(scheduler, FlowMatchSDEScheduler):
            step = scheduler.step
            scheduler.step = wraps(step)(
                lambda *args, **kwargs: step(*args, **{**kwargs, "generator": self.generators})
            )

    def seeded(self, images: list[Wanted], particles: int) -> list[torch.Generator]:
        """A generator for each image, on the CPU: the same numbers on every device. An image's particles draw from it in turn."""
        seeds = [generator_seed(prompt.prompt_id, seed) for prompt, seed in images]
        self.generators = [
            generator
            for seed in seeds
            for generator in [torch.Generator().manual_seed(seed)] * particles
        ]
        return self.generators


def sample_images(
    pipe: Any, config: SampleConfig, anchor: Anchor, wanted: list[Wanted], done: set[str]
) -> Iterator[tuple[bytes, Record]]:
    """Yield (PNG, record) of every image of `wanted`, over all lambdas, that is not in `done`."""
    assert config.batch_size and config.steps  # `resolve` decided them
    noise, particles = Noise(pipe.scheduler), config.particles
    options: dict[str, Any] = {
        "every": config.every,
        "particles": particles,
        "trust_region": config.trust_region,
    }
    options |= {"batched": config.batched, "shared_start": True}  # of a sweep, only lambda changes
    with realign(
        pipe, anchor, config.lambdas[0], config.mode, bool(config.path_kl), **options
    ) as dial:
        for start in range(0, len(wanted), config.batch_size):
            batch = wanted[start : start + config.batch_size]
            embeddings = _encode(pipe, config, batch)  # once for all lambdas
            for lam in config.lambdas:
                rows = [
                    i
                    for i, (prompt, seed) in enumerate(batch)
                    if image_path(lam, prompt.prompt_id, seed) not in done
                ]
                if not rows:
                    continue
                dial.lam, started = lam, time.monotonic()
                generators = noise.seeded([batch[i] for i in rows], particles)
                images = _call(
                    pipe,
                    config,
                    {name: tensor[rows] for name, tensor in embeddings.items()},
                    generators,
                )
                common = {
                    "timesteps_sha256": timesteps_digest(pipe.scheduler),
                    "evaluations": dial.evaluations,
                    "seconds": (time.monotonic() - started) / len(rows),
                }
                # Of particles, the mean: an estimate of what the steps spent before they were weighed.
                path_kl = dial.path_kl.view(len(rows), -1).mean(1).tolist()
                ess = dial.ess.tolist() if particles > 1 else [None] * len(rows)
                for i, image, kl, size in zip(rows, images, path_kl, ess, strict=True):
                    measured = common | {"path_kl": kl if math.isfinite(kl) else None, "ess": size}
                    yield (
                        encode_png(image),
                        _record(config, anchor, *batch[i], lam, image) | measured,
                    )


def _encode(pipe: Any, config: SampleConfig, batch: list[Wanted]) -> dict[str, Tensor]:
    """The encoded prompts as keyword arguments of the pipeline's call, a row each."""
    guided = config.guidance_scale is not None and config.guidance_scale > 1  # as pipelines decide
    return family_of(pipe).call_arguments(pipe, [prompt.text for prompt, _ in batch], guided)


def _call(
    pipe: Any,
    config: SampleConfig,
    embeddings: dict[str, Tensor],
    generators: list[torch.Generator],
) -> list[Any]:
    """One call of the stock pipeline, with a row for each particle; an image is its first."""
    repeated = {
        name: tensor.repeat_interleave(config.particles, dim=0)
        for name, tensor in embeddings.items()
    }
    sampling = {
        "num_inference_steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "height": config.height,
        "width": config.width,
    }
    eta = {} if family_of(pipe).flow else {"eta": config.eta}
    return pipe(**repeated, **sampling, **eta, generator=generators).images[:: config.particles]


def _record(
    config: SampleConfig, anchor: Anchor, prompt: Prompt, seed: int, lam: float, image: Any
) -> Record:
    beta = anchor.card.beta if anchor.card else None
    return {
        "image": image_path(lam, prompt.prompt_id, seed),
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.text,
        "seed": seed,
        "anchor": config.anchor,
        "base_model": config.model.base,
        "beta": beta,
        "lam": lam,
        "beta_target": beta / lam if beta and lam else None,
        "mode": config.mode_name,
        **mode_options(config),
        "sampler": config.sampler,
        "eta": config.eta,
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "height": image.height,
        "width": image.width,
        "generator_seed": generator_seed(prompt.prompt_id, seed),
    }


def mode_options(config: SampleConfig) -> dict[str, Any]:
    """The options of `realign` that tell two runs of a mode apart; null for those of other modes."""
    options: dict[str, Any] = dict.fromkeys(SETTINGS)
    setting = LABELS[config.mode_name].setting
    if setting:
        options[setting] = config.mode_setting
    return options | {"trust_region": config.trust_region}
