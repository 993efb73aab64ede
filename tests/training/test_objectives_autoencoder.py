"""The autoencoder: its loss, and what it saves."""

import math

import pytest
import torch
from diffusers import AutoencoderKL

from deradiff.training.objectives.autoencoder import POSTERIOR_STD, Autoencoder
from deradiff.worlds import networks
from tests.support.objectives import items


def test_the_saved_autoencoder_has_white_latents_and_the_same_images(tmp_path, images):
    torch.manual_seed(0)
    vae = networks.make_vae()
    objective = Autoencoder(vae, 32, images)
    batch = objective.collate(items(images, 24))
    _, terms = objective.loss(objective.network, batch)
    mse = (objective.network(**batch) - batch["images"]).square().mean().item()
    assert terms["psnr"].item() == pytest.approx(-10 * math.log10(mse / 4), rel=1e-4)

    # The saved one decodes to the same images.
    before = vae.decode(vae.encode(batch["images"]).latent_dist.mean).sample.detach()
    objective.save(tmp_path)
    saved = AutoencoderKL.from_pretrained(tmp_path)
    posterior = saved.encode(batch["images"]).latent_dist
    after = saved.decode(posterior.mean).sample.detach()
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-3)

    # Its latents have mean 0 and covariance 1, and a fixed standard deviation.
    channels = posterior.mean.detach().transpose(0, 1).flatten(1)
    assert channels.mean(1).abs().max() < 0.01
    assert (torch.cov(channels) - torch.eye(4)).abs().max() < 0.02
    assert saved.config.scaling_factor == 1
    std = posterior.std.detach().flatten()[0].item()
    assert std == pytest.approx(POSTERIOR_STD, rel=1e-3)
