"""Particles: fair resampling within each image, as a function of that image alone.

The weights are held against the normaliser of a mixture.

Shapes: K particles an image; rows = images * K, an image's particles one after the other.
"""

from __future__ import annotations

import math

import pytest
import torch

from deradiff.method.gaussian import Gaussian, log_normaliser
from deradiff.method.particles import Particles, log_weight


def started(images: int, count: int) -> Particles:
    particles = Particles(count)
    start = torch.randn(images * count, 3, generator=torch.Generator().manual_seed(0))
    particles.start(start)
    return particles


def test_the_last_draws_first_row_follows_the_weights():
    images = 20_000
    weights = torch.tensor([0.1, 0.5, 0.05, 0.35])
    particles = started(images, 4)
    particles.reweigh(weights.log().repeat(images))
    index = particles.resample(last=True)
    survivors = index.view(-1, 4) - 4 * torch.arange(images)[:, None]
    for column in (0, 3):
        shares = survivors[:, column].bincount(minlength=4) / images
        # 4 standard errors.
        torch.testing.assert_close(shares, weights, atol=0.015, rtol=0)

    # Systematic: each particle has its share of copies, rounded up or down.
    copies = torch.stack([(survivors == particle).sum(1) for particle in range(4)], 1)
    assert ((copies - 4 * weights).abs() < 1).all()
    expected_ess = 1 / weights.square().sum().item()
    assert particles.ess[0].item() == pytest.approx(expected_ess, rel=1e-6)


def test_only_images_under_half_are_resampled_and_their_weights_start_anew():
    equal = [0.0, 0.0, 0.0, 0.0]
    one_has_all = [0.0, -9.0, -9.0, -9.0]
    three_share = [0.0, 0.0, 0.0, -9.0]
    second_is_resampled = [0, 1, 2, 3, 4, 4, 4, 4, 8, 9, 10, 11]
    particles = started(3, 4)
    particles.reweigh(torch.tensor(equal + one_has_all + three_share))
    assert particles.resample().tolist() == second_is_resampled
    assert particles.resample() is None

    # The second image's weights were used up; the third's were kept, and are 0, 0, -9, 0 now.
    particles.reweigh(torch.tensor([*equal, *one_has_all, 0.0, 0.0, -9.0, 9.0]))
    assert particles.resample().tolist() == second_is_resampled
    assert particles.ess[0] == 4
    assert 1 < particles.ess[1] < 1.01
    assert 2 < particles.ess[2] < 3.01


def test_an_image_does_not_depend_on_its_batch():
    x = torch.randn(12, 5)
    # The first image is not resampled before the last step.
    strengths = torch.tensor([0.01, 1.0, 1.0]).repeat_interleave(4)
    log_w = torch.randn(12) * strengths

    def indices(rows: slice) -> torch.Tensor:
        """The index of each of three steps (steps, rows)."""
        particles = Particles(4)
        particles.start(x[rows])
        steps = []
        for last, strength in ((False, 3), (False, 0.1), (True, 1)):
            particles.reweigh(strength * log_w[rows])
            index = particles.resample(last)
            steps.append(torch.arange(len(x[rows])) if index is None else index)
        return torch.stack(steps)

    together = indices(slice(0, 12))
    for image in range(3):
        rows = slice(4 * image, 4 * image + 4)
        assert torch.equal(together[:, rows], indices(rows) + 4 * image)
    assert torch.equal(together, indices(slice(0, 12))), "the same at every call"


def test_numbers_are_uniform_and_differ_between_images_and_draws():
    particles = started(5_000, 2)
    numbers = torch.cat([particles._uniforms(2), particles._uniforms(2)], 1)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert ((numbers.mean(0) - 0.5).abs() < 4 / math.sqrt(12 * 5_000)).all()
    assert (torch.corrcoef(numbers.T) - torch.eye(4)).abs().max() < 4 / math.sqrt(5_000)


def test_one_particle_stays_itself():
    particles = started(3, 1)
    particles.reweigh(torch.tensor([0.0, -5.0, 3.0]))
    assert particles.resample() is None
    assert particles.resample(last=True).tolist() == [0, 1, 2]
    assert particles.ess.tolist() == [1, 1, 1]


def test_log_weight_is_the_mixtures_normaliser_at_a_steps_noise():
    """Of models of variance 1 whose means differ by sqrt(2 c) D, for any number of anchors."""
    factor = 0.7
    lams = [0.3, 0.5]
    differences = [torch.randn(4, 2, 3, dtype=torch.float64) for _ in lams]
    means = [torch.zeros_like(differences[0])]
    for difference in differences:
        means.append(math.sqrt(2 * factor) * difference)
    models = [Gaussian(mean, torch.ones((), dtype=torch.float64)) for mean in means]
    expected = log_normaliser(models, [1 - sum(lams), *lams])
    torch.testing.assert_close(log_weight(factor, lams, differences), expected)


def test_log_weight_of_one_anchor_is_the_short_formula():
    factor = 0.7
    difference = torch.randn(4, 2, 3, dtype=torch.float64)
    short = -factor * 0.3 * 0.7 * difference.square().flatten(1).sum(1)
    torch.testing.assert_close(log_weight(factor, [0.3], [difference]), short)
    assert (log_weight(factor, [1.0], [difference]).abs() < 1e-15).all()
    assert (log_weight(factor, [2.0], [difference]) > 0).all()


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
