"""The autoencoder of a latent diffusion model, for those who start from a folder of images.

Shapes: B images of 3 x R x R pixels; latents of C channels, H rows and W columns.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.data.pairs import CaptionedImages, Item, image_tensor
from deradiff.training.objectives.base import Batch, Parts
from deradiff.worlds import networks

# Of the saved posterior, in standard deviations of the latents. A variance learned from scratch at
# this size loses the hues.
POSTERIOR_STD = 0.06
MOMENTS_FROM = 1024  # images that the mean and covariance of the latents are taken from
SLICE = 64  # images of one forward pass of that


class _NoisyAutoencoder(nn.Module):
    """Encode, add noise of a fixed share of each channel's standard deviation, decode.

    The noise scales with the latents, so scaling them up does not lower the loss.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        mean = self.vae.encode(images).latent_dist.mean
        # Of each channel, over the whole batch.
        std = mean.std(dim=(0, 2, 3), keepdim=True)
        return self.vae.decode(mean + POSTERIOR_STD * std * noise).sample


class Autoencoder:
    """Reconstruction of images: the mean absolute plus the mean squared error.

    What is saved has latents of mean 0 and covariance 1, so that its scaling factor is 1.

    Args:
        vae: an AutoencoderKL.
        resolution: pixels of an image's side.
        data: the images, from which `save` takes the moments of the latents.

    Attributes:
        latent_shape: (C, H, W) of one image.
    """

    def __init__(self, vae: Any, resolution: int, data: CaptionedImages) -> None:
        self.network: Any = _NoisyAutoencoder(vae)
        self.resolution = resolution
        self.data = data
        self.frozen: list[nn.Module] = []
        side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (vae.config.latent_channels, side, side)

    @classmethod
    def from_parts(cls, parts: Parts) -> Autoencoder:
        """A new autoencoder."""
        return cls(networks.make_vae(), parts.resolution, parts.data)

    def collate(self, items: list[Item]) -> Batch:
        """images (B, 3, R, R) and noise (B, C, H, W)."""
        images = [image_tensor(item.images[0], self.resolution) for item in items]
        noise = [torch.randn(self.latent_shape, generator=item.generator) for item in items]
        return {"images": torch.stack(images), "noise": torch.stack(noise)}

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The error of the reconstruction; logs the PSNR."""
        images = batch["images"]
        error = network(images, batch["noise"]).float() - images
        mse = error.square().mean()
        psnr = -10 * (mse.detach() / 4).log10()  # images span 2, from -1 to 1
        return error.abs().mean() + mse, {"psnr": psnr}

    def prepare_checkpoint(self) -> None:
        """Nothing is held back."""

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Make the latents white, fix the posterior's variance, and write the autoencoder."""
        vae = self.network.vae

        # The first images; training has met, and marked, the broken ones.
        count = min(MOMENTS_FROM, len(self.data))
        rows = [row for row in range(count) if row not in self.data.broken]
        first_images = [self.data.images(row)[0] for row in rows]
        images = torch.stack([image_tensor(image, self.resolution) for image in first_images])

        # The moments of their latents, by which the autoencoder's own 1 x 1 layers are adapted.
        means = []
        for part in images.split(SLICE):
            means.append(vae.encode(part.to(vae.device)).latent_dist.mean)
        latents = torch.cat(means)
        networks.standardise_latents(vae, latents.transpose(0, 1).flatten(1).T)

        # The second half of the output channels is the posterior's log-variance.
        channels = self.latent_shape[0]
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = 2 * math.log(POSTERIOR_STD)
        vae.save_pretrained(folder)
