"""Images of one process: a stock diffusers pipeline inside `deradiff.realign`.

Batch by batch, all lambdas on the same noise. An image depends on its prompt, seed and lambda, and
neither on its place in a batch nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from deradiff import realign
from deradiff.anchors.anchor import Anchor, cards_digest
from deradiff.anchors.beta_maps import PREFERENCE, PreferenceMap
from deradiff.anchors.mixtures import MixedAnchor, as_one_anchor, mixed_beta
from deradiff.data.prompts import Prompt
from deradiff.image_tables import encode_png
from deradiff.method.schedulers import make_scheduler
from deradiff.models.base_model import BaseModel
from deradiff.models.families import family_of
from deradiff.realignment.dial import Dial
from deradiff.realignment.registry import LABELS, SETTINGS
from sample.config import SampleConfig
from sample.dial_values import dial_value
from sample.manifest import Lams, Record, image_path

DECODED_AT_ONCE = 4 * 2**20
"""Bytes of one channel of all images that are decoded at once: 3.2 GB for SDXL's autoencoder."""


NAN_IN_CAST = "invalid value encountered in cast"


class PromptSeed(NamedTuple):
    """A prompt and a seed: an image for each lambda."""

    prompt: Prompt
    seed: int

    @property
    def name(self) -> str:
        """It tells the images of a run apart, of one lambda."""
        return f"{self.prompt.prompt_id}-s{self.seed}"

    def image(self, lams: Lams) -> str:
        """The image's file at the lambda of each anchor, relative to the run directory."""
        return image_path(lams, self.prompt.prompt_id, self.seed)

    @property
    def generator_seed(self) -> int:
        """63 bits that depend on prompt and seed alone."""
        text = f"{self.prompt.prompt_id}\n{self.seed}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def load_sampler(config: SampleConfig, base: BaseModel, device: torch.device) -> Any:
    """The reference pipeline on its device, with the scheduler of `config.sampler`."""
    pipe = base.load_pipeline(getattr(torch, config.dtype or "float32"))
    if decodes_one_by_one(config, pipe):
        pipe.vae.enable_slicing()
    pipe.scheduler = make_scheduler(config.sampler or "", pipe.scheduler.config)
    return pipe.to(device)


def decodes_one_by_one(config: SampleConfig, pipe: Any) -> bool:
    """Whether the images of a batch together would take too much memory to decode.

    Args:
        config: a resolved config.
        pipe: the pipeline.
    """
    assert config.batch_size  # decided before
    default = getattr(pipe, "default_sample_size", 128) * getattr(pipe, "vae_scale_factor", 8)
    pixels = (config.height or default) * (config.width or default)
    # Half precision overflows in such an autoencoder, so that the pipeline decodes in single.
    is_upcast = getattr(pipe.vae.config, "force_upcast", False)
    itemsize = 4 if is_upcast else pipe.vae.dtype.itemsize
    return config.batch_size * config.particles * pixels * itemsize > DECODED_AT_ONCE


def timesteps_digest(scheduler: Any) -> str:
    """A digest of the timesteps that a call resolved.

    Runs on unlike noise levels must not be compared, whatever their configs say.
    """
    times = [float(time) for time in scheduler.timesteps]
    return hashlib.sha256(json.dumps(times).encode()).hexdigest()[:16]


def mode_options(config: SampleConfig) -> dict[str, Any]:
    """The options of `realign` that tell a run from another of its mode; None where unused."""
    options: dict[str, Any] = dict.fromkeys(SETTINGS)
    setting = LABELS[config.mode_name].setting
    if setting:
        options[setting] = config.mode_detail
    return options | {
        "trust_region": config.trust_region,
        "branch": None if config.branch == "both" else config.branch,
        "lam_schedule": config.lam_schedule or None,
    }


def beta_of(model: MixedAnchor, names: Sequence[str], anchors: Sequence[Anchor]) -> float | None:
    """The beta of a model's anchor, or of its mixture; None: unknown.

    Args:
        model: the model.
        names: of the anchors.
        anchors: the anchors.
    """
    betas = {}
    for name, anchor in zip(names, anchors, strict=True):
        betas[name] = anchor.card.beta if anchor.card else None
    if model.shares is None:
        return betas[model.anchor]
    conventions = {anchor.card.beta_convention for anchor in anchors if anchor.card}
    return mixed_beta(model.shares, betas) if len(conventions) == 1 else None


def beta_target(
    model: MixedAnchor, config: SampleConfig, anchors: Sequence[Anchor]
) -> float | None:
    """The beta that a realigned model imitates; None: unknown, or it imitates none.

    Args:
        model: the model.
        config: a lambda on one branch, or one that changes in time, imitates no model.
        anchors: the run's.
    """
    is_plain = config.branch == "both" and not config.lam_schedule
    if model.lam <= 0 or not is_plain:
        return None
    if config.targets_by == PREFERENCE:
        return PreferenceMap(anchors[0]).target_of(model.lam)
    beta = beta_of(model, config.anchors, anchors)
    return None if beta is None else beta / model.lam


@contextmanager
def _finite_images() -> Iterator[None]:
    """Raise FloatingPointError where an image would hold NaN: its pixels would be black."""
    with warnings.catch_warnings():
        # What numpy says when it makes bytes of NaN.
        warnings.filterwarnings("error", message=NAN_IN_CAST, category=RuntimeWarning)
        try:
            yield
        except RuntimeWarning as error:
            raise FloatingPointError(
                "an image holds numbers that are not finite, and would be black: give "
                "dtype=float32 or dtype=bfloat16, or a smaller guidance_scale or lambda"
            ) from error


def select(rows: Any, numbers: Sequence[int]) -> Any:
    """Rows of a tensor, or of a list of tensors, by their numbers."""
    if isinstance(rows, list):
        return [rows[number] for number in numbers]
    return rows[list(numbers)]


class Images:
    """The images of one process, sampled batch by batch.

    Args:
        pipe: the reference pipeline.
        config: a resolved config.
        anchors: the anchors.
        done: images that are there already, relative to the run directory.
    """

    def __init__(
        self, pipe: Any, config: SampleConfig, anchors: Sequence[Anchor], done: set[str]
    ) -> None:
        self.pipe = pipe
        self.config = config
        self.anchors = anchors
        self.done = done
        self.family = family_of(pipe)

    def sample(self, batches: Iterable[Sequence[PromptSeed]]) -> Iterator[tuple[bytes, Record]]:
        """Yield the PNG and the record of each image that is not there, over all lambdas.

        Args:
            batches: what is sampled together.
        """
        config = self.config
        with realign(
            self.pipe,
            self.anchors,
            dial_value(config.points[0], config),
            config.mode,
            bool(config.path_kl),
            every=config.every,
            particles=config.particles,
            trust_region=config.trust_region,
            batched=config.batched,
            shared_start=True,  # of a sweep, only lambda changes
            memory=config.memory,
            compile=config.compile,
        ) as dial:
            for batch in batches:
                yield from self._sample_batch(dial, batch)

    def _sample_batch(
        self, dial: Dial, batch: Sequence[PromptSeed]
    ) -> Iterator[tuple[bytes, Record]]:
        """One batch of prompts and seeds, at each lambda at which one of them is missing.

        The whole batch is sampled: in a smaller one, images would differ by rounding.
        """
        embeddings = self._encode(batch)  # once for all lambdas
        for lams in self.config.points:
            if all(one.image(lams) in self.done for one in batch):
                continue

            # One call of the pipeline
            dial.lam = dial_value(lams, self.config)
            started = time.monotonic()
            images = self._call(embeddings, self._generators(batch))
            seconds = (time.monotonic() - started) / len(batch)

            # What was measured: of particles the mean, an estimate of what the steps spent before
            # they were weighed
            path_kl = dial.path_kl.view(len(batch), -1).mean(1).tolist()
            ess = dial.ess.tolist() if self.config.particles > 1 else [None] * len(batch)
            for one, image, kl, size in zip(batch, images, path_kl, ess, strict=True):
                if one.image(lams) in self.done:
                    continue
                measured = {
                    "timesteps_sha256": timesteps_digest(self.pipe.scheduler),
                    "evaluations": dial.evaluations,
                    "seconds": seconds,
                    "path_kl": kl if math.isfinite(kl) else None,
                    "ess": size,
                }
                yield encode_png(image), self._record(one, lams, image) | measured

    def _encode(self, batch: Sequence[PromptSeed]) -> dict[str, Any]:
        """The encoded prompts as keyword arguments of the pipeline's call, a row each."""
        guidance = self.config.guidance_scale
        guided = guidance is not None and guidance > self.family.no_guidance
        prompts = [image.prompt.text for image in batch]
        return self.family.call_arguments(self.pipe, prompts, guided)

    def _generators(self, images: Sequence[PromptSeed]) -> list[torch.Generator]:
        """A generator for each row, on the CPU: the same numbers on every device.

        An image's particles draw from one generator, in turn.
        """
        generators = []
        for image in images:
            generator = torch.Generator().manual_seed(image.generator_seed)
            generators += [generator] * self.config.particles
        if hasattr(self.pipe.scheduler, "generators"):
            self.pipe.scheduler.generators = generators
        return generators

    def _call(self, embeddings: dict[str, Any], generators: list[torch.Generator]) -> list[Any]:
        """One call of the stock pipeline, with a row for each particle; an image is its first."""
        config = self.config
        particles = config.particles
        numbers = [number // particles for number in range(len(generators))]
        rows = {name: select(value, numbers) for name, value in embeddings.items()}
        guidance = {self.family.guidance_argument: config.guidance_scale}
        eta = {} if self.family.flow else {"eta": config.eta}
        with _finite_images():
            output = self.pipe(
                **rows,
                **eta,
                **guidance,
                **dict(self.family.call_options),
                **dict(self.family.encoded_options),
                num_inference_steps=config.steps,
                height=config.height,
                width=config.width,
                generator=generators,
            )
        return output.images[::particles]

    def _anchors_of(self, model: MixedAnchor) -> list[Anchor]:
        """The anchors that a model is realigned to, one or the parts of a mixture."""
        names = [model.anchor] if model.shares is None else list(model.shares)
        return [a for name, a in zip(self.config.anchors, self.anchors) if name in names]

    def _record(self, one: PromptSeed, lams: Lams, image: Any) -> Record:
        """An image's line in the manifest (`evaluation.manifest.ImageRecord`), not yet measured."""
        config = self.config
        model = as_one_anchor(config.anchors, lams)
        beta = beta_of(model, config.anchors, self.anchors)
        return {
            "image": one.image(lams),
            "prompt_id": one.prompt.prompt_id,
            "prompt": one.prompt.text,
            "seed": one.seed,
            "anchor": model.anchor,
            "shares": model.shares,
            "base_model": config.model.base,
            "beta": beta,
            "lam": model.lam,
            "beta_target": beta_target(model, config, self.anchors),
            "mode": config.mode_name,
            **mode_options(config),
            "sampler": config.sampler,
            "eta": config.eta,
            "steps": config.steps,
            "guidance_scale": config.guidance_scale,
            "height": image.height,
            "width": image.width,
            "generator_seed": one.generator_seed,
            "cards": cards_digest(anchor.card for anchor in self._anchors_of(model)),
        }
