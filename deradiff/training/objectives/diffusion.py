"""The objectives that train a denoiser: the denoising loss, and Diffusion-DPO.

Shapes: B examples, P images of an example (DPO: 2, the winner first; pretraining: 1), and latents
of C channels, H rows and W columns. Tensors of several images are (P, B, C, H, W). R: pixels of an
image's side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deradiff.anchors.anchor import AnchorCard, save_anchor
from deradiff.data.cache import Cache, encode_images
from deradiff.data.pairs import Item, image_tensor
from deradiff.data.reference_errors import ReferenceErrors
from deradiff.models.families import FAMILIES, family_of
from deradiff.models.flops import denoiser_flops, dpo_step_flops
from deradiff.training.dpo import dpo_terms, kl_strength, pair_error
from deradiff.training.noising import noising_of
from deradiff.training.objectives.base import Batch, Parts
from deradiff.training.safeguards import loser_scale, with_scaled_loser
from deradiff.training.sharding import is_shard


class DenoiserObjective:
    """What both objectives share: an example becomes latents, a timestep, noise and a caption.

    Args:
        pipe: a text-to-image pipeline, whose denoiser is trained.
        resolution: pixels of an image's side.
        cache: latents and text embeddings of the data; None: they are encoded at every step.
        caption_dropout: the share of examples whose caption is replaced by "".
        flip: mirror all images of an example, every other time.

    Attributes:
        network: the denoiser.
        frozen: the other networks of the pipeline that a step needs.
        noising: the forward process.
        latent_shape: (C, H, W) of one image.
    """

    def __init__(
        self,
        pipe: Any,
        resolution: int,
        cache: Cache | None = None,
        caption_dropout: float = 0.0,
        flip: bool = False,
    ) -> None:
        self.pipe = pipe
        self.resolution = resolution
        self.cache = cache
        self.caption_dropout = caption_dropout
        self.flip = flip

        # What the pipeline says: its denoiser, its forward process and the shape of its latents.
        self.family = family_of(pipe)
        self.network: Any = getattr(pipe, self.family.denoiser)
        self.noising = noising_of(pipe.scheduler)
        self.latent_shape = self.family.latent_shape(pipe, resolution)

        # Without a cache, a step needs the autoencoder and the text encoders.
        self.frozen: list[nn.Module] = []
        if cache is None:
            for part in pipe.components.values():
                if isinstance(part, nn.Module) and part is not self.network:
                    self.frozen.append(part)

    def collate(self, items: list[Item]) -> Batch:
        """Draw all random choices of a batch, and prepare its images.

        Returns:
            timesteps (B,); time (B,), the same in [0, 1]; noise (B, C, H, W), one for all images
            of an example; captions, some of them dropped; index (B,) and epoch_indices, which tell
            what the examples are; and either latents (P, B, C, H, W) and conditioning from the
            cache, or images (P, B, 3, R, R), which `encoded` encodes.
        """
        # An example draws from its own generator, in this order: a change would change every run.
        timesteps = torch.cat([self.noising.draw(item.generator) for item in items])
        noise = torch.stack([self._noise(item) for item in items])
        captions = [self._caption(item) for item in items]
        flips = [self._flips(item) for item in items]
        batch: Batch = {
            "timesteps": timesteps,
            "time": self.noising.time(timesteps),
            "noise": noise,
            "captions": captions,
            "index": torch.tensor([item.index for item in items]),
            "epoch_indices": [item.epoch_index for item in items],
        }

        # What the cache holds, or else the images, from which `encoded` makes the same.
        if self.cache is not None:
            latents = [self.cache.latents(item.index, flip) for item, flip in zip(items, flips)]
            batch["latents"] = torch.stack(latents, dim=1)
            batch["conditioning"] = self.cache.embeddings(captions)
        else:
            images = [self._images(item, flip) for item, flip in zip(items, flips)]
            batch["images"] = torch.stack(images, dim=1)
        return batch

    def _noise(self, item: Item) -> Tensor:
        """(C, H, W)."""
        return torch.randn(self.latent_shape, generator=item.generator)

    def _caption(self, item: Item) -> str:
        dropped = torch.rand(1, generator=item.generator) < self.caption_dropout
        return "" if dropped else item.caption

    def _flips(self, item: Item) -> bool:
        return self.flip and bool(torch.rand(1, generator=item.generator) < 0.5)

    def _images(self, item: Item, flip: bool) -> Tensor:
        """(P, 3, R, R)."""
        return torch.stack([image_tensor(image, self.resolution, flip) for image in item.images])

    @torch.no_grad()
    def encoded(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The latents (P, B, C, H, W) and the conditioning rows of a batch, on its device."""
        if self.cache is not None:
            return batch["latents"].float(), batch["conditioning"]

        # From the images, whose first two axes become one for the autoencoder.
        images = batch["images"]
        latents = encode_images(self.pipe, images.flatten(0, 1)).unflatten(0, images.shape[:2])
        # Autoencoders may put channels last in memory; as from a cache, they come before the sides.
        latents = latents.contiguous().float()
        return latents, self.family.encode_prompts(self.pipe, batch["captions"])

    def prepare_checkpoint(self) -> None:
        """Nothing is held back."""

    def predict(
        self,
        network: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: dict[str, Tensor],
    ) -> Tensor:
        """A network's output for all images of a batch.

        Args:
            network: a denoiser.
            noisy: noisy latents (P, B, C, H, W).
            timesteps: (B,), the same for all images of an example.
            conditioning: rows of `encode_prompts`, (B, ...) each.

        Returns:
            (P, B, C, H, W).
        """
        # The network takes one axis of images, with a row of conditioning for each.
        images = len(noisy)
        rows = {}
        for name, row in conditioning.items():
            rows[name] = row.repeat(images, *[1] * (row.dim() - 1))
        output = self.family.denoise(
            network, noisy.flatten(0, 1), timesteps.repeat(images), rows, self.resolution
        )
        return output.unflatten(0, (images, -1))


class Pretrain(DenoiserObjective):
    """The denoising loss on captioned images: a new base model, or a fine-tuned one.

    Ho et al. 2020, Eq. 14, with the network's own target; for a flow, the error of the velocity
    (Esser et al. 2024). It saves a whole pipeline, ready to be a base model.
    """

    @classmethod
    def from_parts(cls, parts: Parts) -> Pretrain:
        """The objective of a run of the train stage."""
        return cls(parts.pipe, parts.resolution, parts.cache, parts.caption_dropout, parts.flip)

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error of the network's output; nothing else is logged."""
        latents, conditioning = self.encoded(batch)
        noisy, target = self.noising(latents, batch["noise"], batch["timesteps"])
        output = self.predict(network, noisy, batch["timesteps"], conditioning)
        return (output.float() - target.float()).square().mean(), {}

    def save(self, folder: Path) -> None:
        """Write the pipeline, with the network as training has left it."""
        setattr(self.pipe, self.family.denoiser, self.network)
        self.pipe.save_pretrained(folder)


class DPO(DenoiserObjective):
    """Diffusion-DPO (Wallace et al. 2023) against the frozen base model, the reference.

    With a LoRA the reference is the same network with its adapter switched off; a full fine-tune
    keeps a frozen copy of the network.

    Args:
        pipe: a text-to-image pipeline, whose denoiser has the trained weights: an adapter for
            method `lora`, all weights for method `full`.
        resolution: pixels of an image's side.
        cache: latents and text embeddings of the data; None: they are encoded at every step.
        caption_dropout: the share of examples whose caption is replaced by "".
        flip: mirror both images of a pair, every other time.
        card: the card of the anchor that training makes; its `beta` is the beta of the loss, its
            `method` says what is trained.
        errors: a store of the reference's errors: known ones are read, new ones are added; None:
            the reference is always evaluated.
        complete: the store holds all errors of the run, so that no copy of the network is kept.
        safeguard: scale the loser's gradient so that the winner's error does not rise
            (`deradiff.training.safeguards.loser_scale`).
        sft: weight of the winner's own error beside the loss, in units of beta / 2, which is what
            the loss multiplies errors by.
    """

    def __init__(
        self,
        pipe: Any,
        resolution: int,
        cache: Cache | None = None,
        caption_dropout: float = 0.0,
        flip: bool = False,
        *,
        card: AnchorCard,
        errors: ReferenceErrors | None = None,
        complete: bool = False,
        safeguard: bool = False,
        sft: float = 0.0,
    ) -> None:
        super().__init__(pipe, resolution, cache, caption_dropout, flip)
        if card.beta is None:
            raise ValueError("Diffusion-DPO needs a beta: give the card one")
        self.card = card
        self.errors = errors
        self.stored_reference = complete
        self.safeguard = safeguard
        self.sft = sft

        # A LoRA is switched off for the reference; a full fine-tune needs a second network.
        self._lora_layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        self.copy: nn.Module | None = None
        if card.method == "full" and not complete:
            self.copy = self._frozen_copy()
            self.frozen.append(self.copy)

    @classmethod
    def from_parts(cls, parts: Parts) -> DPO:
        """The objective of a run of the train stage."""
        assert parts.card is not None
        # If the store holds all errors, no copy of the network is kept for the reference.
        errors, complete = parts.reference_errors
        return cls(
            parts.pipe,
            parts.resolution,
            parts.cache,
            parts.caption_dropout,
            parts.flip,
            card=parts.card,
            errors=errors,
            complete=complete,
            safeguard=parts.settings.safeguard,
            sft=parts.settings.sft,
        )

    @property
    def beta(self) -> float:
        """The beta of the loss, in the convention of `deradiff.training.dpo`."""
        assert self.card.beta is not None
        return self.card.beta

    def _frozen_copy(self) -> nn.Module:
        frozen = copy.deepcopy(self.network).requires_grad_(False).eval()
        # Autocast would cast these layers at every step: the outputs are equal, the memory is half.
        for layer in frozen.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(self.pipe.vae.dtype)
        return frozen

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The reference network, without gradients, for the length of a `with` block."""
        with torch.no_grad():
            if self.copy is not None:
                yield self.copy
                return
            assert self.card.method == "lora", "the stored reference errors are not complete"
            # diffusers' own switch walks through all modules, and a GPU would wait for it.
            self._switch_lora(off=True)
            try:
                yield self.network
            finally:
                self._switch_lora(off=False)

    def _switch_lora(self, off: bool) -> None:
        """Switch the LoRA off for an evaluation, or on again."""
        for layer in self._lora_layers:
            vars(layer)["_disable_adapters"] = off

    def collate(self, items: list[Item]) -> Batch:
        """As `DenoiserObjective.collate`, with the reference's errors where they are stored.

        Returns:
            The batch; with a store also reference_error (2, B), NaN where one is unknown, and
            known, whether none is.
        """
        batch = super().collate(items)
        if self.errors is not None:
            stored = self.errors.get(batch["epoch_indices"])
            batch["reference_error"] = stored
            batch["known"] = not bool(stored.isnan().any())
        return batch

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of Diffusion-DPO, and per pair what `docs/training.md` explains."""
        # Winner and loser with the same noise, at the same timestep.
        latents, conditioning = self.encoded(batch)
        noisy, target = self.noising(latents, batch["noise"], batch["timesteps"])

        # How well the reference and the trained network denoise them.
        reference_error = self.reference_error(batch, noisy, target, conditioning)
        output = self.predict(network, noisy, batch["timesteps"], conditioning)
        error = pair_error(output, target)
        winner_error = error[0]
        kept = {}
        if self.safeguard:
            kept["loser_scale"] = loser_scale(output, target)
            error = with_scaled_loser(error, kept["loser_scale"])
        terms = dpo_terms(error, reference_error, self.beta)
        loss = terms.loss
        if self.sft:
            loss = loss + self.sft * self.beta / 2 * winner_error.mean()

        # What is logged; an image that is denoised worse than by the reference has more than 0.
        worse_than_reference = terms.error - reference_error
        return loss, {
            "loss": terms.losses.detach(),
            "implicit_accuracy": terms.accuracies,
            "margin": terms.margin,
            "model_mse": terms.error.mean(0),
            "reference_mse": reference_error.mean(0),
            "winner_vs_reference": worse_than_reference[0],
            "loser_vs_reference": worse_than_reference[1],
            **kept,
        }

    def reference_error(
        self, batch: Batch, noisy: Tensor, target: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        """The reference's errors (2, B) on a batch, read from the store where they are known."""
        if self.errors is not None and batch["known"] and not self._all_ranks_evaluate:
            return batch["reference_error"]

        # The reference is evaluated on the whole batch, also where a part of it is known.
        with self.reference() as reference:
            output = self.predict(reference, noisy, batch["timesteps"], conditioning)
            errors = pair_error(output, target)
        if self.errors is None:
            return errors

        # New errors are stored. Known ones count, so that a resumed run reads what it has read.
        if not batch["known"]:
            self.errors.add(batch["epoch_indices"], errors)
        return torch.where(batch["reference_error"].isnan(), errors, batch["reference_error"])

    @cached_property
    def _all_ranks_evaluate(self) -> bool:
        """Whether the reference is evaluated on known pairs, too.

        So it is where it lies in shards and some of the run's errors are unknown: all ranks must
        call a sharded network together, and to ask each time who needs it would cost more.
        """
        if self.copy is not None or self.stored_reference:
            return False
        return any(is_shard(weight) for weight in self.network.parameters())

    def prepare_checkpoint(self) -> None:
        """Write the reference's errors of the steps so far."""
        if self.errors is not None:
            self.errors.flush()

    def save(self, folder: Path) -> None:
        """Write the anchor."""
        save_anchor(folder, self.network, self.card)

    def step_flops(self, examples: int, checkpointing: bool) -> float:
        """FLOPs of one optimiser step on this many pairs.

        Args:
            examples: pairs of one optimiser step.
            checkpointing: count the forward pass that gradient checkpointing repeats.
        """
        # Tokens of a caption. The tokenizer of a flow model's T5 names no length; its family does.
        family = FAMILIES[self.card.family]
        if family.flow:
            tokens = family.prompt_tokens
        else:
            tokens = self.pipe.tokenizer.model_max_length

        # One forward pass of one image, then all passes of a step.
        _, height, width = self.latent_shape
        forward = denoiser_flops(self.network.config, height, width, tokens)
        return dpo_step_flops(
            forward, examples, self.card.method, checkpointing, self.stored_reference
        )

    def kl_strength(self) -> float:
        """The KL strength of the run's beta, on its latents and noise schedule."""
        return kl_strength(self.beta, math.prod(self.latent_shape), self.noising)
