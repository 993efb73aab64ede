"""The two diffusion objectives: the denoising loss (pretraining, and SFT), and Diffusion-DPO against a frozen reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from deradiff.anchors import AnchorCard, save_anchor
from deradiff.data.cache import Cache, encode_images
from deradiff.data.pairs import Item, pixels
from deradiff.dpo import dpo_loss, shared_noise
from deradiff.families import denoise, encode_prompts, family_of
from deradiff.objectives import Batch


class _Diffusion:
    """What both share: examples become latents, a timestep, noise and the text's embedding."""

    def __init__(self, pipe: Any, resolution: int, cache: Cache | None, caption_dropout: float) -> None:
        self.pipe, self.resolution, self.cache, self.caption_dropout = pipe, resolution, cache, caption_dropout
        self.network: nn.Module = getattr(pipe, family_of(pipe).denoiser)
        # The pipeline's own scheduler may be a sampler whose `add_noise` is scaled for itself (SDXL's Euler is): DDPM's is meant.
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        if self.schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"a base model that predicts {self.schedule.config.prediction_type} cannot be trained: epsilon and v_prediction can"
            )
        self.frozen = [] if cache else [m for m in pipe.components.values() if isinstance(m, nn.Module) and m is not self.network]
        side = resolution // pipe.vae_scale_factor
        self.latent_shape = (pipe.vae.config.latent_channels, side, side)

    def collate(self, items: list[Item]) -> Batch:
        """timesteps (B,), noise (B, C, H, W), one for all P pictures of an example, captions, some dropped; and either the cached latents
        (B, P, C, H, W) and text embeddings, or the images (B, P, 3, R, R) and captions that `encoded` makes them from."""
        steps = self.schedule.config.num_train_timesteps
        timesteps = torch.cat([torch.randint(steps, (1,), generator=i.generator) for i in items])
        noise = torch.stack([torch.randn(self.latent_shape, generator=i.generator) for i in items])
        dropped = [bool(torch.rand(1, generator=i.generator) < self.caption_dropout) for i in items]
        captions = ["" if drop else i.caption for i, drop in zip(items, dropped)]
        batch = {"timesteps": timesteps, "noise": noise, "captions": captions}
        if self.cache:
            return batch | {"latents": torch.stack([self.cache.latents(i.index) for i in items]), "texts": self.cache.texts(captions)}
        return batch | {"images": torch.stack([torch.stack([pixels(p, self.resolution) for p in i.images]) for i in items])}

    @torch.no_grad()
    def encoded(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (P, B, C, H, W) and the text rows of a batch, on its device."""
        device = batch["noise"].device
        if self.cache:
            return batch["latents"].transpose(0, 1).float(), {k: v.to(device) for k, v in batch["texts"].items()}
        latents = encode_images(self.pipe.vae, batch["images"].flatten(0, 1)).unflatten(0, batch["images"].shape[:2])
        return latents.transpose(0, 1).float(), encode_prompts(self.pipe, batch["captions"])

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, texts: dict[str, Tensor]) -> Tensor:
        """The network's output for (P, B, C, H, W) noisy latents, same shape; each of P pictures has its example's timestep and text."""
        pictures = len(noisy)
        rows = {k: v.repeat(pictures, *[1] * (v.dim() - 1)) for k, v in texts.items()}
        out = denoise(network, noisy.flatten(0, 1), timesteps.repeat(pictures), rows, self.resolution)
        return out.unflatten(0, (pictures, -1))


class Pretrain(_Diffusion):
    """The denoising loss (Ho et al. 2020, Eq. 14) on captioned images. Saves a whole pipeline, ready to be a base model."""

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        latents, texts = self.encoded(batch)
        noisy, target = shared_noise(latents, batch["noise"], batch["timesteps"], self.schedule)
        return (self.predict(network, noisy, batch["timesteps"], texts).float() - target.float()).square().mean(), {}

    def save(self, run_dir: Path) -> Path:
        folder = run_dir / "pipeline"
        self.pipe.save_pretrained(folder)
        return folder


class DPO(_Diffusion):
    """Diffusion-DPO. With a LoRA the reference is the same network with its adapter off; a full fine-tune keeps a frozen copy."""

    def __init__(self, pipe: Any, resolution: int, cache: Cache | None, caption_dropout: float, *, beta: float, card: AnchorCard) -> None:
        super().__init__(pipe, resolution, cache, caption_dropout)
        self.beta, self.card = beta, card
        self.copy: nn.Module | None = None
        if card.method == "full":
            self.copy = copy.deepcopy(self.network).requires_grad_(False).eval()
            for layer in self.copy.modules():  # what autocast would cast at every step anyway: the same outputs, half the memory
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
            self.network.disable_adapters()  # type: ignore[operator]
            try:
                yield self.network
            finally:
                self.network.enable_adapters()  # type: ignore[operator]

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        latents, texts = self.encoded(batch)
        noisy, target = shared_noise(latents, batch["noise"], batch["timesteps"], self.schedule)
        with self.reference() as reference:
            reference_pred = self.predict(reference, noisy, batch["timesteps"], texts)
        terms = dpo_loss(self.predict(network, noisy, batch["timesteps"], texts), reference_pred, target, self.beta)
        return terms.loss, {
            "implicit_accuracy": terms.accuracy, "margin": terms.margin.mean(),
            "model_mse": terms.error.mean(), "reference_mse": terms.reference_error.mean(),
        }  # fmt: skip

    def save(self, run_dir: Path) -> Path:
        folder = run_dir / "anchor"
        save_anchor(folder, self.network, self.card)
        return folder
