"""Resampling: fair, in its own group, and a function of the image alone; weights against the
mixture's normaliser."""

from __future__ import annotations

import math

import pytest
import torch

from deradiff.method.gaussian import Gaussian, log_normaliser
from deradiff.method.particles import Particles, log_weight


def started(images: int, count: int, seed: int = 0) -> Particles:
    particles = Particles(count)
    particles.start(torch.randn(images * count, 3, generator=torch.Generator().manual_seed(seed)))
    return particles


def test_the_last_draws_first_row_follows_the_weights():
    weights = torch.tensor([0.1, 0.5, 0.05, 0.35])
    particles = started(20_000, 4)
    particles.reweigh(weights.log().repeat(20_000))
    index = particles.resample(last=True).view(-1, 4) - 4 * torch.arange(20_000)[:, None]
    for column in (0, 3):
        shares = index[:, column].bincount(minlength=4) / 20_000
        torch.testing.assert_close(shares, weights, atol=0.015, rtol=0)  # 4 standard errors
    copies = torch.stack([(index == j).sum(1) for j in range(4)], 1)
    assert ((copies - 4 * weights).abs() < 1).all(), (
        "systematic: each particle has its share of copies, rounded"
    )
    assert particles.ess[0].item() == pytest.approx(1 / weights.square().sum().item(), rel=1e-6)


def test_only_images_under_half_are_resampled_and_their_weights_start_anew():
    particles = started(3, 4)
    particles.reweigh(
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, 0.0, 0.0, 0.0, -9.0])
    )
    index = particles.resample()
    assert index.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 8, 9, 10, 11]
    assert particles.resample() is None
    particles.reweigh(
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, 0.0, 0.0, -9.0, 9.0])
    )
    index = particles.resample()
    assert index.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 8, 9, 10, 11], (
        "the second image's weights were used up, the third's were kept"
    )
    assert particles.ess[0] == 4 and 1 < particles.ess[1] < 1.01 and 2 < particles.ess[2] < 3.01


def test_an_image_does_not_depend_on_its_batch():
    x = torch.randn(12, 5)
    log_w = torch.randn(12) * torch.tensor([0.01, 1.0, 1.0]).repeat_interleave(
        4
    )  # the first image is not resampled on the way

    def chosen(rows: slice) -> torch.Tensor:
        particles = Particles(4)
        particles.start(x[rows])
        steps = []
        for last, strength in ((False, 3), (False, 0.1), (True, 1)):
            particles.reweigh(strength * log_w[rows])
            index = particles.resample(last)
            steps.append(index if index is not None else torch.arange(len(x[rows])))
        return torch.stack(steps)

    together = chosen(slice(0, 12))
    for image in range(3):
        assert torch.equal(
            together[:, 4 * image : 4 * image + 4],
            chosen(slice(4 * image, 4 * image + 4)) + 4 * image,
        )
    assert torch.equal(together, chosen(slice(0, 12))), "and not on the hour"


def test_numbers_are_uniform_and_differ_between_images_and_draws():
    particles = started(5_000, 2)
    first, second = particles._uniforms(2), particles._uniforms(2)
    numbers = torch.cat([first, second], 1)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert ((numbers.mean(0) - 0.5).abs() < 4 / math.sqrt(12 * 5_000)).all()
    assert (torch.corrcoef(numbers.T) - torch.eye(4)).abs().max() < 4 / math.sqrt(5_000)


def test_one_particle_stays_itself():
    particles = started(3, 1)
    particles.reweigh(torch.tensor([0.0, -5.0, 3.0]))
    assert particles.resample() is None
    assert particles.resample(last=True).tolist() == [0, 1, 2] and particles.ess.tolist() == [
        1,
        1,
        1,
    ]


def test_log_weight_is_the_mixtures_normaliser_at_a_steps_noise():
    """Means that differ by sqrt(2 c) D at unit variance: the normaliser of their mixture is the
    weight, for any number of anchors."""
    factor, lams = 0.7, [0.3, 0.5]
    differences = [torch.randn(4, 2, 3, dtype=torch.float64) for _ in lams]
    means = [torch.zeros_like(differences[0]), *(math.sqrt(2 * factor) * d for d in differences)]
    models = [Gaussian(m, torch.ones((), dtype=torch.float64)) for m in means]
    torch.testing.assert_close(
        log_weight(factor, lams, differences), log_normaliser(models, [1 - sum(lams), *lams])
    )
    one = log_weight(factor, [0.3], differences[:1])
    torch.testing.assert_close(one, -factor * 0.3 * 0.7 * differences[0].square().flatten(1).sum(1))
    assert (log_weight(factor, [1.0], differences[:1]).abs() < 1e-15).all() and (
        log_weight(factor, [2.0], differences[:1]) > 0
    ).all()


def test_log_weight_takes_a_mask_and_a_number_per_image():
    difference = torch.randn(2, 3, 4, 4)
    mask = torch.rand(4, 4)
    expected = -(mask * (1 - mask) * difference.square()).flatten(1).sum(1)
    torch.testing.assert_close(log_weight(1.0, [mask], [difference]), expected)
    per_image = torch.tensor([0.2, 1.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(log_weight(1.0, [per_image], [difference])[1], torch.tensor(0.0))


def test_rows_that_are_no_whole_images_are_refused():
    with pytest.raises(ValueError, match="7 rows are no multiple of particles=4"):
        Particles(4).start(torch.randn(7, 2))
    with pytest.raises(ValueError, match="at least 1"):
        Particles(0)
