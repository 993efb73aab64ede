"""The two diffusion objectives: the denoising loss (pretraining, and SFT), and Diffusion-DPO against a frozen reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.anchors.anchor import AnchorCard, save_anchor
from deradiff.data.cache import Cache, encode_images
from deradiff.data.pairs import Item, pixels
from deradiff.data.reference_errors import ReferenceErrors
from deradiff.models.families import family_of
from deradiff.training.dpo import dpo_terms, pair_error
from deradiff.training.noising import noising_of
from deradiff.training.objectives import Batch


class _Diffusion:
    """What both share: examples become latents, a timestep, noise and the text's embedding."""

    def __init__(
        self,
        pipe: Any,
        resolution: int,
        cache: Cache | None,
        caption_dropout: float,
        flip: bool = False,
    ) -> None:
        self.pipe, self.resolution, self.cache = pipe, resolution, cache
        self.caption_dropout, self.flip = caption_dropout, flip
        self.network: nn.Module = getattr(pipe, family_of(pipe).denoiser)
        self.noising = noising_of(pipe.scheduler)
        self.frozen = (
            []
            if cache
            else [
                m
                for m in pipe.components.values()
                if isinstance(m, nn.Module) and m is not self.network
            ]
        )
        self.latent_shape = family_of(pipe).latent_shape(pipe, resolution)

    def collate(self, items: list[Item]) -> Batch:
        """timesteps and their time in [0, 1] (B,), noise (B, C, H, W), one for all P pictures of an example, captions, some dropped,
        index (B,) and places, which example this is; and either the cached latents (B, P, C, H, W) and text embeddings, or the images
        (B, P, 3, R, R) and captions that `encoded` makes them from. A flip turns all pictures of an example, or none."""
        timesteps = torch.cat([self.noising.draw(i.generator) for i in items])
        noise = torch.stack([torch.randn(self.latent_shape, generator=i.generator) for i in items])
        captions = [
            "" if torch.rand(1, generator=i.generator) < self.caption_dropout else i.caption
            for i in items
        ]
        flipped = [self.flip and bool(torch.rand(1, generator=i.generator) < 0.5) for i in items]
        batch = {
            "timesteps": timesteps,
            "time": self.noising.time(timesteps),
            "noise": noise,
            "captions": captions,
            "index": torch.tensor([i.index for i in items]),
            "places": [i.place for i in items],
        }
        if self.cache:
            latents = torch.stack(
                [self.cache.latents(i.index, flip) for i, flip in zip(items, flipped)]
            )
            return batch | {"latents": latents, "texts": self.cache.texts(captions)}
        pictures = [
            torch.stack([pixels(p, self.resolution, flip) for p in i.images])
            for i, flip in zip(items, flipped)
        ]
        return batch | {"images": torch.stack(pictures)}

    @torch.no_grad()
    def encoded(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (P, B, C, H, W) and the text rows of a batch, on its device."""
        device = batch["noise"].device
        if self.cache:
            return batch["latents"].transpose(0, 1).float(), {
                k: v.to(device) for k, v in batch["texts"].items()
            }
        latents = encode_images(self.pipe.vae, batch["images"].flatten(0, 1)).unflatten(
            0, batch["images"].shape[:2]
        )
        return latents.transpose(0, 1).float(), family_of(self.pipe).encode_prompts(
            self.pipe, batch["captions"]
        )

    def predict(
        self, network: nn.Module, noisy: Tensor, timesteps: Tensor, texts: dict[str, Tensor]
    ) -> Tensor:
        """The network's output for (P, B, C, H, W) noisy latents, same shape; each of P pictures has its example's timestep and text."""
        pictures = len(noisy)
        rows = {k: v.repeat(pictures, *[1] * (v.dim() - 1)) for k, v in texts.items()}
        out = family_of(self.pipe).denoise(
            network, noisy.flatten(0, 1), timesteps.repeat(pictures), rows, self.resolution
        )
        return out.unflatten(0, (pictures, -1))


class Pretrain(_Diffusion):
    """The denoising loss (Ho et al. 2020, Eq. 14; of velocities for a flow, Esser et al. 2024) on captioned images. Saves a whole
    pipeline, ready to be a base model."""

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        latents, texts = self.encoded(batch)
        noisy, target = self.noising(latents, batch["noise"], batch["timesteps"])
        return (
            self.predict(network, noisy, batch["timesteps"], texts).float() - target.float()
        ).square().mean(), {}

    def save(self, run_dir: Path) -> Path:
        folder = run_dir / "pipeline"
        self.pipe.save_pretrained(folder)
        return folder


class DPO(_Diffusion):
    """Diffusion-DPO. With a LoRA the reference is the same network with its adapter off; a full fine-tune keeps a frozen copy.

    errors: the reference's errors that are known, and where new ones go. complete: they cover the whole run, so that no copy is kept.
    """

    def __init__(
        self,
        pipe: Any,
        resolution: int,
        cache: Cache | None,
        caption_dropout: float,
        flip: bool = False,
        *,
        beta: float,
        card: AnchorCard,
        errors: ReferenceErrors | None = None,
        complete: bool = False,
    ) -> None:
        super().__init__(pipe, resolution, cache, caption_dropout, flip)
        self.beta, self.card, self.errors, self.stored_reference = beta, card, errors, complete
        self.copy: nn.Module | None = None
        if card.method == "full" and not complete:
            self.copy = copy.deepcopy(self.network).requires_grad_(False).eval()
            for layer in (
                self.copy.modules()
            ):  # what autocast would cast at every step anyway: the same outputs, half the memory
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    layer.to(pipe.vae.dtype)
            self.frozen.append(self.copy)

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The reference network, without gradients."""
        with torch.no_grad():
            if self.copy is not None:
                yield self.copy
                return
            assert self.card.method == "lora", "the errors that were said to be complete are not"
            self.network.disable_adapters()  # type: ignore[operator]
            try:
                yield self.network
            finally:
                self.network.enable_adapters()  # type: ignore[operator]

    def collate(self, items: list[Item]) -> Batch:
        """As above, and where errors are kept: reference_error (2, B), and whether that is all of them."""
        batch = super().collate(items)
        if self.errors is None:
            return batch
        known = self.errors.get(batch["places"])
        return batch | {"reference_error": known, "known": not bool(known.isnan().any())}

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        latents, texts = self.encoded(batch)
        noisy, target = self.noising(latents, batch["noise"], batch["timesteps"])
        reference_error = self.reference_error(batch, noisy, target, texts)
        error = pair_error(self.predict(network, noisy, batch["timesteps"], texts), target)
        terms = dpo_terms(error, reference_error, self.beta)
        worse = terms.error - reference_error
        return terms.loss, {
            "loss": terms.losses.detach(),
            "implicit_accuracy": terms.accuracies,
            "margin": terms.margin,
            "model_mse": terms.error.mean(0),
            "reference_mse": reference_error.mean(0),
            "winner_vs_reference": worse[0],
            "loser_vs_reference": worse[1],
        }

    def reference_error(
        self, batch: Batch, noisy: Tensor, target: Tensor, texts: dict[str, Tensor]
    ) -> Tensor:
        """(2, B), read where they are known. Ranks agree on who evaluates the reference: a sharded network answers to all or none."""
        if self.errors is not None and _on_every_rank(batch["known"], noisy.device):
            return batch["reference_error"]
        with self.reference() as reference:
            errors = pair_error(self.predict(reference, noisy, batch["timesteps"], texts), target)
        if self.errors is None:
            return errors
        if not batch["known"]:
            self.errors.add(batch["places"], errors)
        return torch.where(batch["reference_error"].isnan(), errors, batch["reference_error"])

    def save(self, run_dir: Path) -> Path:
        if self.errors is not None:
            self.errors.flush()
        folder = run_dir / "anchor"
        save_anchor(folder, self.network, self.card)
        return folder


def _on_every_rank(flag: bool, device: torch.device) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    agreed = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN)
    return bool(agreed)
