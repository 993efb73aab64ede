"""Diffusion whose networks are exact, with what any aligned model and any lambda should give.

The data are mixtures of Gaussians, tilted by a reward: a model aligned at strength s = 1 / beta is
p_s(x) ~ p_ref(x) exp(s r(x)). Its output at any noise level follows from E[x0 | x]. So every
sampler of diffusers can be run through `realigned_chain` and be compared with the tilt that lambda
stands for, p_(lam s).

Shapes: N samples in d dimensions (on the line (N, 1), or (N,) where a function says so), M
Gaussians of a mixture, G points of the grid of data, V nodes of the grid of noisy samples, S
strengths. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deradiff.method.steps import Step, prediction_type, step_at

GRID = torch.linspace(-3.5, 4, 751, dtype=torch.float64)
"""Points of the line, (G,), at which densities of data are known."""

NODES = torch.linspace(-6, 6, 1201, dtype=torch.float64)
"""Noisy samples, (V,), at which E[x0 | x] is known; their scale is 1."""

BINS = 120
"""Bins of a histogram of samples."""

BIN_RANGE = 3.0
"""The bins go from minus this to this."""


# Exact networks


class Model:
    """A network's function of (x, t), exact.

    It turns E[x0 | x] into what the scheduler's prediction type asks for.

    Attributes:
        scheduler: a diffusers scheduler; its steps are set.
    """

    scheduler: Any

    def x0(self, x: Tensor, step: Step, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] at a step.

        Args:
            x: (N, d), noisy samples.
            step: of the scheduler.
            alpha: factor of the signal in x.
            sigma: standard deviation of the noise in x.

        Returns:
            (N, d).
        """
        raise NotImplementedError

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's output.

        Args:
            x: (N, d), noisy samples, as the scheduler passes them to a network.
            t: a timestep of the scheduler.

        Returns:
            (N, d), of the scheduler's prediction type.
        """
        step = step_at(self.scheduler, t)
        kind = prediction_type(self.scheduler)

        # Euler's networks see x at unit scale; a flow's see it as it is.
        scale = torch.ones(())
        if kind != "flow":
            scale = (step.alpha**2 + step.sigma**2).sqrt()
        alpha = step.alpha / scale
        sigma = step.sigma / scale

        x0 = self.x0(x, step, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        outputs = {
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * x0,
            "sample": x0,
            "flow": eps - x0,
        }
        return outputs[kind]


class _Tables:
    """E[x0 | x] at the nodes, for each step and density: integrals over the grid.

    Args:
        scheduler: a diffusers scheduler; its steps are set.
        densities: (S, G).
    """

    def __init__(self, scheduler: Any, densities: Tensor) -> None:
        self.scheduler = scheduler
        self.densities = densities
        self._by_step: dict[int, Tensor] = {}

    def posterior_means(self, step: Step, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] at the nodes, (S, V). Each step's is integrated once."""
        if step.index not in self._by_step:
            # p(x | x0) up to a factor of each node, which cancels, (V, G).
            squares = (NODES[:, None] - alpha * GRID).square()
            least = squares.amin(1, keepdim=True)
            kernel = ((least - squares) / (2 * sigma**2)).exp()
            means = kernel @ (self.densities * GRID).T / (kernel @ self.densities.T)
            self._by_step[step.index] = means.T
        return self._by_step[step.index]


class GridModel(Model):
    """The exact network of one density on the line, interpolated in tables.

    Args:
        tables: of several densities.
        index: which of them.
    """

    def __init__(self, tables: _Tables, index: int) -> None:
        self.tables = tables
        self.index = index
        self.scheduler = tables.scheduler

    def x0(self, x: Tensor, step: Step, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] (N, 1) of samples x (N, 1); see `Model.x0`."""
        table = self.tables.posterior_means(step, alpha, sigma)[self.index]
        spacing = NODES[1] - NODES[0]
        position = ((x - NODES[0]) / spacing).clamp(0, len(NODES) - 1.001)
        left = position.long()
        return torch.lerp(table[left], table[left + 1], position - left)


# Mixtures of Gaussians


@dataclass(frozen=True)
class Mixture:
    """A mixture of M Gaussians with diagonal covariances in d dimensions.

    It is closed under rewards r(x) = b.x - q.x^2 / 2.

    Attributes:
        log_weights: (M,).
        means: (M, d).
        variances: (M, d).
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor

    def tilted(self, b: Tensor, q: Tensor) -> Mixture:
        """The mixture p(x) exp(b.x - q.x^2 / 2), normalised.

        Args:
            b: (d,), slope of the reward at 0.
            q: (d,), minus the curvature of the reward.
        """
        precision = 1 / self.variances + q
        means = (self.means / self.variances + b) / precision

        # What each Gaussian's integral is multiplied by, twice its logarithm, (M, d).
        square_terms = precision * means**2 - self.means**2 / self.variances
        logs = square_terms - (self.variances * precision).log()
        log_weights = (self.log_weights + 0.5 * logs.sum(1)).log_softmax(0)
        return Mixture(log_weights, means, 1 / precision)

    def log_density(self, x: Tensor) -> Tensor:
        """ln p (N,) at x (N, d)."""
        return self.log_joint(x).logsumexp(1)

    def log_joint(self, x: Tensor) -> Tensor:
        """ln of each Gaussian's part of the density, its weight included, (N, M) at x (N, d)."""
        squares = (x[:, None] - self.means) ** 2 / self.variances  # (N, M, d)
        logs = -0.5 * (squares + (2 * torch.pi * self.variances).log()).sum(2)
        return self.log_weights + logs

    def model(self, scheduler: Any) -> MixtureModel:
        """The exact network of this mixture, for the steps that `scheduler` is set to."""
        return MixtureModel(self, scheduler)


@dataclass(frozen=True)
class MixtureModel(Model):
    """The exact network of a mixture of Gaussians.

    Attributes:
        mixture: the distribution of the data.
        scheduler: a diffusers scheduler; its steps are set.
    """

    mixture: Mixture
    scheduler: Any

    def x0(self, x: Tensor, step: Step, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x]: each Gaussian's posterior mean by its posterior weight; see `Model.x0`."""
        data = self.mixture
        noisy = Mixture(data.log_weights, alpha * data.means, alpha**2 * data.variances + sigma**2)
        weights = noisy.log_joint(x).softmax(1)  # (N, M)
        gains = alpha * data.variances / noisy.variances  # (M, d)
        return weights @ (data.means - gains * noisy.means) + x * (weights @ gains)


def mixture(weights: Sequence[float], means: Any, stds: Any) -> Mixture:
    """The mixture of M Gaussians from plain numbers.

    Args:
        weights: M weights, which sum to 1.
        means: M numbers for a mixture on the line, or M rows of d.
        stds: standard deviations, in the form of the means.
    """
    count = len(weights)
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    mean_rows = torch.tensor(means, dtype=torch.float64).view(count, -1)
    std_rows = torch.tensor(stds, dtype=torch.float64).view(count, -1)
    return Mixture(log_weights, mean_rows, std_rows**2)


# The beds


PRIOR = mixture((0.5, 0.3, 0.2), (-1.2, 0.4, 1.5), (0.25, 0.2, 0.3))
"""The reference of the beds on the line."""


@dataclass(frozen=True)
class Bed:
    """A test bed on the line: the reference is `PRIOR`, and the reward is any function.

    Attributes:
        reward: (N,) samples -> (N,) rewards.
        strength: s = 1 / beta of the anchor.
    """

    reward: Callable[[Tensor], Tensor]
    strength: float

    def log_density(self, strength: float, x: Tensor = GRID) -> Tensor:
        """ln p_s at x.

        It is normalised by the trapezoid rule over `GRID`.

        Args:
            strength: s; 0 for the reference.
            x: (N,).

        Returns:
            (N,).
        """
        log_mass = torch.trapezoid(self._log_tilted(strength, GRID).exp(), GRID).log()
        return self._log_tilted(strength, x) - log_mass

    def _log_tilted(self, strength: float, x: Tensor) -> Tensor:
        """ln p_ref + s r at x (N,), not normalised."""
        return PRIOR.log_density(x[:, None]) + strength * self.reward(x)

    def models(self, scheduler: Any, strengths: Sequence[float]) -> list[GridModel]:
        """The exact network of each strength, for the steps that `scheduler` is set to."""
        densities = torch.stack([self.log_density(strength).exp() for strength in strengths])
        tables = _Tables(scheduler, densities)
        return [GridModel(tables, i) for i in range(len(strengths))]

    def quantiles(self, strength: float, count: int) -> Tensor:
        """The (i + 1/2) / count quantiles of p_s, (count,)."""
        levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        cdf = _cumulative(self.log_density(strength))
        return _interpolate(levels, cdf, GRID)


LIN = Bed(lambda x: x, 2.0)
"""A linear reward: the tilted model is a mixture of Gaussians."""

QUAD = Bed(lambda x: -((x - 0.9) ** 2), 1.0)
"""A reward that is greatest at 0.9: the tilted model is a mixture of Gaussians."""

BOUNDED = Bed(lambda x: torch.sigmoid((x - 0.7) / 0.15), 4.0)
"""A reward between 0 and 1, almost a step: the tilted model is no mixture of Gaussians."""


class Plane:
    """A test bed in two dimensions with two anchors.

    The reference has four modes, one in each quadrant. One reward is linear along the first axis;
    the other is greatest on a line of the second, -0.8 (y - 1)^2.

    Attributes:
        prior: the reference.
        linear: b and q of the first anchor's reward times its strength, both (2,).
        quadratic: the same of the second anchor.
    """

    prior = mixture(
        (0.4, 0.3, 0.2, 0.1),
        ((-1, -1), (1, -1), (-1, 1), (1, 1)),
        ((0.3, 0.3), (0.25, 0.3), (0.3, 0.25), (0.3, 0.3)),
    )
    linear = (
        torch.tensor([1.5, 0.0], dtype=torch.float64),
        torch.tensor([0.0, 0.0], dtype=torch.float64),
    )
    quadratic = (
        torch.tensor([0.0, 1.6], dtype=torch.float64),
        torch.tensor([0.0, 1.6], dtype=torch.float64),
    )

    @cached_property
    def anchors(self) -> list[Mixture]:
        """The two aligned models."""
        return [self.prior.tilted(*self.linear), self.prior.tilted(*self.quadratic)]

    def target(self, lams: Sequence[float]) -> Mixture:
        """The model that is aligned to both rewards, p_ref exp(sum lam_i s_i r_i).

        Args:
            lams: one lambda for each anchor.
        """
        rewards = (self.linear, self.quadratic)
        b = torch.stack([lam * reward[0] for lam, reward in zip(lams, rewards)]).sum(0)
        q = torch.stack([lam * reward[1] for lam, reward in zip(lams, rewards)]).sum(0)
        return self.prior.tilted(b, q)

    def mode_shares(self, x: Tensor) -> Tensor:
        """Shares (4,) of the samples x (N, 2) that are nearest to each mode, by quadrant.

        The order is: left below, right below, left above, right above.
        """
        is_right = (x[:, 0] > 0).long()
        is_above = (x[:, 1] > 0).long()
        quadrant = is_right + 2 * is_above
        return quadrant.bincount(minlength=4) / len(x)

    def exact_mode_shares(self, lams: Sequence[float]) -> Tensor:
        """What `mode_shares` gives for infinitely many samples of the target, (4,).

        Args:
            lams: one lambda for each anchor.
        """
        target = self.target(lams)
        positive = torch.special.ndtr(target.means / target.variances.sqrt())  # (M, 2)
        left_right = torch.stack([1 - positive[:, 0], positive[:, 0]])  # (2, M)
        below_above = torch.stack([1 - positive[:, 1], positive[:, 1]])  # (2, M)
        weights = target.log_weights.exp()
        return torch.einsum("m,ym,xm->yx", weights, below_above, left_right).flatten()


# Distances between distributions


def kl_of_samples(x: Tensor, log_density: Tensor) -> float:
    """KL divergence, in nats, of samples to a density, over bins.

    Its bias (bins - 1) / 2N is subtracted, with the bins that hold samples (Miller 1955).

    Args:
        x: (N,), samples.
        log_density: (G,), the logarithm of the density on `GRID`.
    """
    edges = torch.linspace(-BIN_RANGE, BIN_RANGE, BINS + 1, dtype=torch.float64)
    expected = _interpolate(edges, GRID, _cumulative(log_density)).diff()

    # The outermost bins also take what lies beyond them.
    inside = BIN_RANGE - 0.001
    counts = torch.histogram(x.double().clamp(-inside, inside), edges).hist
    shares = counts / len(x)

    is_filled = counts > 0
    ratios = shares[is_filled] / expected[is_filled].clamp(min=1e-12)
    terms = shares[is_filled] * ratios.log()
    bias = (is_filled.sum() - 1) / (2 * len(x))
    return (terms.sum() - bias).item()


def kl_of_quantiles(x: Tensor, log_density: Tensor) -> float:
    """KL divergence, in nats, of a distribution to a density, without chance in it.

    Args:
        x: (N,), evenly spaced quantiles of the distribution.
        log_density: (G,), the logarithm of the density on `GRID`.
    """
    middles, logs = _density_of_quantiles(x)
    return (logs - _interpolate(middles, GRID, log_density)).mean().item()


def kl_between(x: Tensor, y: Tensor) -> float:
    """KL divergence, in nats, between two distributions, without chance in it.

    Args:
        x: (N,), evenly spaced quantiles of the first.
        y: (N,), evenly spaced quantiles of the second.
    """
    x_middles, x_logs = _density_of_quantiles(x)
    y_middles, y_logs = _density_of_quantiles(y)
    return (x_logs - _interpolate(x_middles, y_middles, y_logs)).mean().item()


def w2(x: Tensor, quantiles: Tensor) -> float:
    """2-Wasserstein distance of samples to a distribution.

    Args:
        x: (N,), samples.
        quantiles: (N,), evenly spaced quantiles of the distribution.
    """
    return (x.double().sort().values - quantiles).square().mean().sqrt().item()


def _density_of_quantiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Middles (N - 1,) between neighbouring quantiles x (N,), and the log density there."""
    ordered = x.sort().values
    middles = (ordered[1:] + ordered[:-1]) / 2
    return middles, -(len(ordered) * ordered.diff()).log()


def _cumulative(log_density: Tensor) -> Tensor:
    """The distribution function on `GRID` of a density there, (G,)."""
    masses = torch.cumulative_trapezoid(log_density.exp(), GRID)
    return torch.cat([torch.zeros(1), masses])


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Values at x of the piecewise linear function through (xs, ys); constant outside."""
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1]).clamp(min=1e-300)
    return torch.lerp(ys[right - 1], ys[right], share.clamp(0, 1))


# Starts of chains


def noise(scheduler: Any, rows: int, dimensions: int = 1, seed: int = 0) -> Tensor:
    """The start of random chains.

    Args:
        scheduler: sets the scale of the noise.
        rows: N chains.
        dimensions: d of the data.
        seed: of the noise.

    Returns:
        (N, d).
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, dimensions, generator=generator, dtype=torch.float64)
    return start * _noise_scale(scheduler)


def even_noise(scheduler: Any, rows: int) -> Tensor:
    """The start of chains without chance: evenly spaced quantiles of the noise.

    What a deterministic sampler makes of them are quantiles of its result.

    Args:
        scheduler: sets the scale of the noise.
        rows: N chains.

    Returns:
        (N, 1).
    """
    levels = (torch.arange(rows, dtype=torch.float64)[:, None] + 0.5) / rows
    return torch.special.ndtri(levels) * _noise_scale(scheduler)


def _noise_scale(scheduler: Any) -> float:
    return getattr(scheduler, "init_noise_sigma", 1.0)
