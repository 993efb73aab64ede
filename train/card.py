"""What an anchor's card and its README say about a run: where it comes from, and what it costs."""

from __future__ import annotations

import math
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deradiff.models.families import FAMILIES
from deradiff.models.family import Family
from deradiff.training.dpo import BETA_CONVENTION, kl_strength
from train.config import TrainConfig
from train.data import told

if TYPE_CHECKING:
    from deradiff.anchors.anchor import AnchorCard


def make_card(config: TrainConfig, family: Family, pairs_per_step: int, device: str) -> AnchorCard:
    """The anchor's card, but for what the run costs."""
    import accelerate
    import diffusers
    import peft
    import transformers

    from deradiff.anchors.anchor import AnchorCard

    versions = {
        m.__name__: m.__version__ for m in (torch, diffusers, transformers, peft, accelerate)
    } | {"python": platform.python_version()}
    return AnchorCard(
        base_model=str(config.model.base),
        base_revision=config.model.revision,
        vae=config.model.vae,
        family=family.name,
        method=config.finetune.method,
        beta=config.dpo.beta,
        beta_convention=BETA_CONVENTION,
        objective=config.objective,
        steps=config.steps,
        pairs_seen=config.steps * pairs_per_step,
        dataset=told(config.data),
        seed=config.seed,
        git_commit=git_commit(),
        versions=versions,
        device=device,
    )


def flops_per_step(
    objective: Any, config: TrainConfig, pairs_per_step: int, recomputed: bool
) -> float:
    """FLOPs of an optimiser step, counted on the denoiser's own config. recomputed: gradient checkpointing's second forward too."""
    from deradiff.models.flops import denoiser_flops, dpo_step_flops

    _, height, width = objective.latent_shape
    family = FAMILIES[objective.card.family]  # whose T5 is told no length by its tokenizer
    tokens = family.prompt_tokens if family.flow else objective.pipe.tokenizer.model_max_length
    forward = denoiser_flops(objective.network.config, height, width, tokens)
    checkpointing = recomputed and config.model.gradient_checkpointing
    return dpo_step_flops(
        forward, pairs_per_step, config.finetune.method, checkpointing, objective.stored_reference
    )


def recipe(config: TrainConfig, pairs_per_step: int, learning_rate: float) -> dict[str, object]:
    """What the model card tells about a run besides the card."""
    optim, tune = config.optim, config.finetune
    told = {
        "pairs per step": pairs_per_step,
        "learning rate": f"{learning_rate:.4g} ({optim.rule}), {optim.decay} after {optim.warmup} steps",
        "optimiser": f"{optim.name}, weight decay {optim.weight_decay:g}, clip {optim.clip:g}",
        "precision": config.precision,
        "resolution": config.model.resolution,
        "caption dropout": config.data.caption_dropout,
    }
    return told | (
        {"LoRA": f"rank {tune.rank}, alpha {tune.alpha}"} if tune.method == "lora" else {}
    )


def kl_strength_of(objective: Any, config: TrainConfig) -> float:
    """The KL strength that the run's beta stands for, on its latents and noise schedule."""
    return kl_strength(config.dpo.beta, math.prod(objective.latent_shape), objective.noising)


def git_commit() -> str | None:
    """The commit of the checkout that runs, or None outside one."""
    here = Path(__file__).parents[1]
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except OSError:  # no git
        return None
    top, _, commit = found.stdout.strip().partition("\n")
    return commit if commit and Path(top) == here else None
