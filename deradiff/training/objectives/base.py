"""What an objective offers to the training loop and to the train stage, and what it is made from.

An objective holds its networks and turns examples into a loss; `deradiff.training.loop` does the
rest. To add one: write a class with the members of `Objective` (of `AnchorObjective`, if it makes
anchors), and add a row to `deradiff.training.objectives.registry`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from deradiff.anchors.anchor import AnchorCard
from deradiff.data.cache import Cache
from deradiff.data.pairs import CaptionedImages, Item
from deradiff.data.reference_errors import ReferenceErrors

Batch = dict[str, Any]


class Parts(Protocol):
    """What a run offers to the objective that is made for it.

    Networks are loaded when they are first asked for. The random numbers of new weights come from
    torch's global generator, which the run has seeded.

    Attributes:
        data: the examples.
        resolution: pixels of an image's side.
        caption_dropout: the share of examples whose caption is replaced by "".
        flip: mirror the images of an example at random.
        clip_width: width of a new CLIP.
        settings: the objective's own section of the config (`ObjectiveSpec.section`).
        card: the card of the anchor that the run makes; None for other objectives.
        clip: the CLIP to start from: the model, its tokenizer and its image processor.
        pipe: the pipeline to train in; its denoiser has the trained weights.
        cache: latents and text embeddings of the data; None: they are encoded at every step.
        reference_errors: a store of the reference's errors, and whether it already holds all that
            the run needs; (None, False): they are not stored.
    """

    data: CaptionedImages
    resolution: int
    caption_dropout: float
    flip: bool
    clip_width: int
    settings: Any
    card: AnchorCard | None

    @property
    def clip(self) -> tuple[Any, Any, Any]: ...

    @property
    def pipe(self) -> Any: ...

    @property
    def cache(self) -> Cache | None: ...

    @property
    def reference_errors(self) -> tuple[ReferenceErrors | None, bool]: ...


class Objective(Protocol):
    """A training objective.

    Attributes:
        network: the module that is trained: those of its parameters that require gradients.
        frozen: networks that are not trained, but have to be on the device.
    """

    network: Any
    frozen: list[nn.Module]

    @classmethod
    def from_parts(cls, parts: Parts) -> Objective:
        """The objective of a run of the train stage."""

    def collate(self, items: list[Item]) -> Batch:
        """Turn examples into one batch of CPU tensors.

        Every random choice comes from the generators of the items.
        """

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:
            network: `self.network`, as accelerate wrapped it.
            batch: what `collate` made, on the device.

        Returns:
            The scalar loss, and values to log: scalars, or tensors (B,) with a value per example.
            Two names mean more to the loop: `loss` (B,) is the loss of each example, from which a
            loss that is not finite is traced; `implicit_accuracy` (B,) is also logged per band of
            timesteps.
        """

    def prepare_checkpoint(self) -> None:
        """Write what is held back. Called before each checkpoint."""

    def save(self, folder: Path) -> None:
        """Write what was trained into a folder, in the format that the next stage loads."""


class AnchorObjective(Objective, Protocol):
    """An objective that makes an anchor.

    Attributes:
        card: the anchor's card, saved with it. The stage adds the cost to it before it saves.
    """

    card: AnchorCard

    def step_flops(self, examples: int, checkpointing: bool) -> float:
        """FLOPs of one optimiser step, counted on the denoiser's own config.

        Args:
            examples: of one optimiser step.
            checkpointing: count the forward pass that gradient checkpointing repeats.
        """

    def kl_strength(self) -> float:
        """The KL strength that the run's beta stands for; called where the objective has a beta."""
