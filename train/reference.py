"""The reference's errors of a run: which store they are in, and whether it holds all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from deradiff.data.cache import Cache, encodings_key
from deradiff.data.pairs import CaptionedImages, Examples
from deradiff.data.reference_errors import ReferenceErrors, network_digest, reference_key
from deradiff.models.families import family_of
from deradiff.training.noising import noising_of
from train.config import TrainConfig
from train.pipelines import encoders_of


def reference_errors(
    config: TrainConfig,
    pipe: Any,
    data: CaptionedImages,
    cache: Cache | None,
    accelerator: Accelerator,
) -> tuple[ReferenceErrors | None, bool]:
    """The store of this run's reference errors, and whether it holds every one that the run will need; (None, False) where they are not
    kept. All ranks must find them complete: they read at different moments, and another run may be writing."""
    if not config.dpo.reference_errors:
        return None, False
    network = getattr(pipe, family_of(pipe).denoiser)
    encodings = (
        cache.key if cache else encodings_key(encoders_of(config), data, config.model.resolution)
    )
    key = reference_key(
        network_digest(network),
        encodings,
        noising_of(pipe.scheduler).key,
        config.seed,
        config.data.caption_dropout,
        config.data.flip,
        f"{config.precision} {accelerator.device.type}",
    )
    errors = ReferenceErrors(Path(config.runs) / "cache", key)
    examples = Examples(data, config.seed, in_blocks=cache is None)
    per_step = config.optim.batch_size * config.optim.accumulation * accelerator.num_processes
    found = errors.covers(*examples.span(0, config.steps * per_step))
    complete = bool(
        accelerator.reduce(torch.tensor(float(found), device=accelerator.device), "mean") == 1
    )
    if complete:
        accelerator.print(
            "train: the reference's errors are all known from an earlier run, so that it is not evaluated"
        )
    return errors, complete
