"""The objectives by name, and what the train stage must know of each. Light: it imports no torch.

A new objective is a class (see `deradiff.training.objectives.base`), a row of OBJECTIVES, and
where it has settings of its own, a section of the train stage's config.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class ObjectiveSpec:
    """What is known of an objective before anything is loaded.

    Attributes:
        implementation: its class, as `module:Class`.
        folder: the name of the folder with the trained model, below the run directory.
        needs_pairs: True: it learns from preference pairs; False: from captioned images.
        makes_anchor: it leaves an anchor: a card, a README, panels, an upload to the hub.
        uses_beta: its section of the config holds a `beta`, which is part of the run's name.
        has_reference: it compares the trained network with the frozen base model, whose errors on
            the training pairs may be stored.
        trains_denoiser: it trains the denoiser of a pipeline, on latents and text embeddings that
            may be cached.
        saves_pipeline: it saves the whole pipeline. The frozen networks are therefore in float32.
        needs_base: it needs a base model (`model.base`).
        needs_parts: without a base model it needs a CLIP and an autoencoder to start from.
        needs_clip: it needs a CLIP to start from.
        needs_full: it trains all weights, so LoRA is refused.
        compares_batch: its loss compares the examples of a batch with one another, so that another
            batch size is another recipe.
        section: the section of the config with its own settings; None: it has none.
    """

    implementation: str
    folder: str
    needs_pairs: bool
    makes_anchor: bool = False
    uses_beta: bool = False
    has_reference: bool = False
    trains_denoiser: bool = False
    saves_pipeline: bool = False
    needs_base: bool = False
    needs_parts: bool = False
    needs_clip: bool = False
    needs_full: bool = False
    compares_batch: bool = False
    section: str | None = None

    def load(self) -> Any:
        """Import the class, a `deradiff.training.objectives.base.Objective`."""
        module, _, name = self.implementation.partition(":")
        return getattr(import_module(module), name)


OBJECTIVES = {
    "dpo": ObjectiveSpec(
        implementation="deradiff.training.objectives.diffusion:DPO",
        folder="anchor",
        needs_pairs=True,
        makes_anchor=True,
        uses_beta=True,
        has_reference=True,
        trains_denoiser=True,
        needs_base=True,
        section="dpo",
    ),
    "pretrain": ObjectiveSpec(
        implementation="deradiff.training.objectives.diffusion:Pretrain",
        folder="pipeline",
        needs_pairs=False,
        trains_denoiser=True,
        saves_pipeline=True,
        needs_parts=True,
        needs_full=True,
    ),
    "contrastive": ObjectiveSpec(
        implementation="deradiff.training.objectives.clip:Contrastive",
        folder="clip",
        needs_pairs=False,
        compares_batch=True,
    ),
    "preference": ObjectiveSpec(
        implementation="deradiff.training.objectives.clip:Preference",
        folder="clip",
        needs_pairs=True,
        needs_clip=True,
    ),
    "autoencoder": ObjectiveSpec(
        implementation="deradiff.training.objectives.autoencoder:Autoencoder",
        folder="vae",
        needs_pairs=False,
        compares_batch=True,
    ),
}
