"""The autoencoder of a latent diffusion model, for those who start from a folder of images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.data.pairs import CaptionedImages, Item, pixels
from deradiff.training.objectives import Batch
from deradiff.worlds.networks import standardise_latents

POSTERIOR_STD = 0.06  # of a latent's own standard deviation. A learned variance, from scratch and at this size, loses the hues.


class _NoisyAutoencoder(nn.Module):
    """Encode, disturb by a fixed share of each channel's spread, decode; the loss cannot be lowered by scaling the latents."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        mean = self.vae.encode(images).latent_dist.mean
        spread = mean.std(dim=(0, 2, 3), keepdim=True)
        return self.vae.decode(mean + POSTERIOR_STD * spread * noise).sample


class Autoencoder:
    """Reconstruction of images (L1 plus mean squared error). `save` makes the latents white and the scaling factor 1."""

    def __init__(self, vae: Any, resolution: int, data: CaptionedImages) -> None:
        self.network, self.resolution, self.data = _NoisyAutoencoder(vae), resolution, data
        self.frozen: list[nn.Module] = []
        config = vae.config
        side = resolution // 2 ** (len(config.block_out_channels) - 1)
        self.latent_shape = (config.latent_channels, side, side)

    def collate(self, items: list[Item]) -> Batch:
        images = torch.stack([pixels(i.images[0], self.resolution) for i in items])
        return {
            "images": images,
            "noise": torch.stack(
                [torch.randn(self.latent_shape, generator=i.generator) for i in items]
            ),
        }

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["images"]
        error = network(images, batch["noise"]).float() - images
        mse = error.square().mean()
        return error.abs().mean() + mse, {"psnr": -10 * (mse.detach() / 4).log10()}  # images span 2

    @torch.no_grad()
    def save(self, run_dir: Path) -> Path:
        vae = self.network.vae
        rows = [
            i for i in range(min(1024, len(self.data))) if i not in self.data.broken
        ]  # training has met, and marked, them all
        images = torch.stack([pixels(self.data.pictures(i)[0], self.resolution) for i in rows])
        latents = torch.cat(
            [vae.encode(part.to(vae.device)).latent_dist.mean for part in images.split(64)]
        )
        standardise_latents(vae, latents.transpose(0, 1).flatten(1).T)
        channels = self.latent_shape[0]
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = 2 * math.log(POSTERIOR_STD)
        folder = run_dir / "vae"
        vae.save_pretrained(folder)
        return folder
