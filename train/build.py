"""From a config to the data and the objective that the training loop takes; every mistake is found before a weight is loaded."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from configs.checks import section
from deradiff.data.cache import Cache
from deradiff.data.pairs import CaptionedImages
from deradiff.files import locate
from deradiff.hub import check_push
from deradiff.models.base_model import BaseModel, check_autoencoder
from deradiff.models.families import family_of
from deradiff.models.family import Family
from deradiff.models.flops import meta_denoiser
from deradiff.training.objectives import Objective
from deradiff.training.optimizers import check_optimizer
from train.config import TrainConfig
from train.pipelines import base_pipeline, encoders_of, encoding_pipeline
from train.reference import reference_errors

if TYPE_CHECKING:
    from deradiff.anchors.anchor import AnchorCard


def check(config: TrainConfig, run_dir: Path) -> Family | None:
    """Read the indexes of everything the run needs; raises ValueError in a sentence. Returns the base model's family."""
    _check_writable(run_dir)
    check_optimizer(config.optim.name)
    if config.hub.push_to:
        with section("hub"):
            check_push(config.hub.push_to)
    if config.model.clip and not (Path(locate(config.model.clip)) / "config.json").is_file():
        raise ValueError(
            f"model.clip={config.model.clip} is no model folder: it has no config.json"
        )
    if config.model.vae:
        with section("model"):
            check_autoencoder(config.model.vae)
    if config.data.source in ("scored_pairs", "sampled_pairs"):
        from deradiff.scorers import check_scorer

        check_scorer(config.data.scorer, config.data.scorer_checkpoint)
    if not config.model.base:
        return None
    family = BaseModel(config.model.base, config.model.revision).family
    if config.objective == "dpo" and config.finetune.method == "lora":
        _check_targets(config, family)
    return family


def _check_writable(run_dir: Path) -> None:
    """No folder is made for a run that will be refused: the nearest one that exists answers."""
    there = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{run_dir} cannot be written, because of {there}: give runs=<a folder of yours>"
        )


def lora_targets(config: TrainConfig, family: Family) -> tuple[str, ...]:
    return tuple(config.finetune.targets) or family.lora_targets


def _check_targets(config: TrainConfig, family: Family) -> None:
    """On the network's config alone: no weight is read."""
    import diffusers

    kind = getattr(diffusers, family.denoiser_class)
    described = kind.load_config(
        locate(str(config.model.base)), subfolder=family.denoiser, revision=config.model.revision
    )
    layers = [
        name
        for name, module in meta_denoiser(described).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    for target in lora_targets(config, family):
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = ", ".join(family.lora_targets)
            raise ValueError(
                f"finetune.targets: {target} matches no layer of {config.model.base}; those of the family are {known}"
            )


def make_objective(
    config: TrainConfig, data: CaptionedImages, accelerator: Accelerator, card: AnchorCard | None
) -> Objective:
    """The networks of the run, ready to train."""
    from deradiff.training.objectives.autoencoder import Autoencoder
    from deradiff.training.objectives.clip import Contrastive, Preference
    from deradiff.worlds import networks

    resolution = config.model.resolution
    torch.manual_seed(config.seed)  # the initial weights of new networks
    if config.objective == "autoencoder":
        return Autoencoder(networks.make_vae(), resolution, data)
    if config.objective == "contrastive":
        tokenizer = networks.make_tokenizer(sorted(set(data.captions)))
        clip = networks.make_clip(tokenizer, resolution, width=config.model.clip_width)
        return Contrastive(clip, tokenizer, networks.make_image_processor(resolution))
    if config.objective == "preference":
        return Preference(*networks.load_clip(locate(str(config.model.clip))))
    return _diffusion(config, data, accelerator, card)


def _diffusion(
    config: TrainConfig, data: CaptionedImages, accelerator: Accelerator, card: AnchorCard | None
) -> Objective:
    from deradiff.training.objectives.diffusion import DPO, Pretrain

    full = config.finetune.method == "full"
    cache = None
    if config.data.cache:
        cache = Cache(
            Path(config.runs) / "cache",
            encoders_of(config),
            data,
            config.model.resolution,
            config.data.flip,
        )
        with torch.random.fork_rng(
            devices=[]
        ):  # what is trained begins the same, whether there was something to encode or not
            cache.build(
                partial(encoding_pipeline, config, accelerator.device), accelerator.is_main_process
            )
        accelerator.wait_for_everyone()
    pipe = base_pipeline(config, encoders=cache is None)
    network = getattr(pipe, family_of(pipe).denoiser).requires_grad_(full)
    if not full:
        add_lora(network, config, family_of(pipe))
    if config.model.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.model.compile:
        network.compile_repeated_blocks()
    if config.objective == "pretrain":
        return Pretrain(
            pipe, config.model.resolution, cache, config.data.caption_dropout, config.data.flip
        )
    assert card is not None
    errors, complete = reference_errors(config, pipe, data, cache, accelerator)
    return DPO(
        pipe,
        config.model.resolution,
        cache,
        config.data.caption_dropout,
        config.data.flip,
        beta=config.dpo.beta,
        card=card,
        errors=errors,
        complete=complete,
    )


def add_lora(network: Any, config: TrainConfig, family: Family) -> None:
    """A trainable adapter, its weights in float32."""
    from peft import LoraConfig

    tune = config.finetune
    lora = LoraConfig(
        r=tune.rank,
        lora_alpha=tune.alpha,
        target_modules=list(lora_targets(config, family)),
        init_lora_weights="gaussian",
    )
    network.add_adapter(lora)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
