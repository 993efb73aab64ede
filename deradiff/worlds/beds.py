"""Diffusion whose networks are exact: mixtures of Gaussians, tilted by a reward, with what any
aligned model and any lambda should give.

A model aligned at strength s = 1/beta is p_s(x) ~ p_ref(x) exp(s r(x)), and its output at any noise
level follows from E[x0 | x]. So every sampler of diffusers can be run through `realigned_chain` and
be held against the tilt that lambda stands for, p_(lam s).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deradiff.method.steps import Step, prediction_type, step_at

GRID = torch.linspace(-3.5, 4, 751, dtype=torch.float64)  # of data
NODES = torch.linspace(-6, 6, 1201, dtype=torch.float64)  # of noisy samples, whose scale is 1
BINS = 120


@dataclass(frozen=True)
class Bed:
    """The beds on the line: a prior of three Gaussians, a reward, the strength of the anchor."""

    reward: Callable[[Tensor], Tensor]
    strength: float

    def log_density(self, s: float, x: Tensor = GRID) -> Tensor:
        """ln p_s at x, normalised by the trapezoid rule over GRID."""
        return (
            _log_tilted(self.reward, s, x)
            - torch.trapezoid(_log_tilted(self.reward, s, GRID).exp(), GRID).log()
        )

    def models(self, scheduler: Any, strengths: Sequence[float]) -> list[GridModel]:
        """The exact network of each strength, for the steps that `scheduler` is set to."""
        tables = _Tables(scheduler, torch.stack([self.log_density(s).exp() for s in strengths]))
        return [GridModel(tables, i) for i in range(len(strengths))]

    def quantiles(self, s: float, count: int) -> Tensor:
        """The (i + 1/2) / count quantiles of p_s, (count,)."""
        cdf = torch.cumulative_trapezoid(self.log_density(s).exp(), GRID)
        return _interpolated(
            (torch.arange(count, dtype=torch.float64) + 0.5) / count,
            torch.cat([torch.zeros(1), cdf]),
            GRID,
        )


def _log_tilted(reward: Callable[[Tensor], Tensor], s: float, x: Tensor) -> Tensor:
    return PRIOR.log_density(x[:, None]) + s * reward(x)


class _Tables:
    """E[x0 | x] at the NODES for each step and density: an integral over the GRID."""

    def __init__(self, scheduler: Any, densities: Tensor) -> None:
        self.scheduler, self.densities = scheduler, densities
        self._known: dict[int, Tensor] = {}

    def at(self, step: Step, alpha: Tensor, sigma: Tensor) -> Tensor:
        if step.index not in self._known:
            away = (NODES[:, None] - alpha * GRID).square()
            kernel = ((away.amin(1, keepdim=True) - away) / (2 * sigma**2)).exp()
            self._known[step.index] = (
                kernel @ (self.densities * GRID).T / (kernel @ self.densities.T)
            ).T
        return self._known[step.index]


class Model:
    """A network's function of (x, t), exact: from E[x0 | x] to what the scheduler's prediction type
    asks for."""

    scheduler: Any

    def x0(self, x: Tensor, step: Step, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] at a step with these factors of signal and noise; of the shape of x."""
        raise NotImplementedError

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        step = step_at(self.scheduler, t)
        kind = prediction_type(self.scheduler)
        norm = (
            torch.ones(()) if kind == "flow" else (step.alpha**2 + step.sigma**2).sqrt()
        )  # Euler's networks see x at unit scale
        alpha, sigma = step.alpha / norm, step.sigma / norm
        x0 = self.x0(x, step, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return {
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * x0,
            "sample": x0,
            "flow": eps - x0,
        }[kind]


class GridModel(Model):
    """The exact denoiser of one density of a grid bed, from its tables."""

    def __init__(self, tables: _Tables, index: int) -> None:
        self.tables, self.index, self.scheduler = tables, index, tables.scheduler

    def x0(self, x: Tensor, step: Step, alpha: Tensor, sigma: Tensor) -> Tensor:
        table = self.tables.at(step, alpha, sigma)[self.index]
        place = ((x - NODES[0]) / (NODES[1] - NODES[0])).clamp(0, len(NODES) - 1.001)
        left = place.long()
        return torch.lerp(table[left], table[left + 1], place - left)


@dataclass(frozen=True)
class Mixture:
    """A mixture of M Gaussians with diagonal covariances in d dimensions, closed under rewards r(x)
    = b.x - q.x^2 / 2."""

    log_weights: Tensor  # (M,)
    means: Tensor  # (M, d)
    variances: Tensor  # (M, d)

    def tilted(self, b: Tensor, q: Tensor) -> Mixture:
        """p(x) exp(b.x - q.x^2 / 2), normalised; b, q: (d,)."""
        precision = 1 / self.variances + q
        means = (self.means / self.variances + b) / precision
        logs = (
            precision * means**2
            - self.means**2 / self.variances
            - (self.variances * precision).log()
        )
        return Mixture((self.log_weights + 0.5 * logs.sum(1)).log_softmax(0), means, 1 / precision)

    def log_density(self, x: Tensor, each: bool = False) -> Tensor:
        """ln p at x (N, d): (N,), or each component's part (N, M)."""
        logs = -0.5 * (
            (x[:, None] - self.means) ** 2 / self.variances + (2 * torch.pi * self.variances).log()
        ).sum(2)
        return self.log_weights + logs if each else (self.log_weights + logs).logsumexp(1)

    def model(self, scheduler: Any) -> MixtureModel:
        """The exact network of this mixture, for the steps that `scheduler` is set to."""
        return MixtureModel(self, scheduler)


@dataclass(frozen=True)
class MixtureModel(Model):
    """The exact denoiser of a mixture of Gaussians."""

    mixture: Mixture
    scheduler: Any

    def x0(self, x: Tensor, step: Step, alpha: Tensor, sigma: Tensor) -> Tensor:
        m = self.mixture
        noisy = Mixture(m.log_weights, alpha * m.means, alpha**2 * m.variances + sigma**2)
        shares = noisy.log_density(x, each=True).softmax(1)
        gains = alpha * m.variances / noisy.variances
        return shares @ (m.means - gains * noisy.means) + x * (shares @ gains)


def mixture(weights: Sequence[float], means: Any, stds: Any) -> Mixture:
    """The mixture of these weights, means and standard deviations, numbers for a line or (M, d)."""
    means, stds = (
        torch.tensor(v, dtype=torch.float64).view(len(weights), -1) for v in (means, stds)
    )
    return Mixture(torch.tensor(weights, dtype=torch.float64).log(), means, stds**2)


PRIOR = mixture((0.5, 0.3, 0.2), (-1.2, 0.4, 1.5), (0.25, 0.2, 0.3))
LIN = Bed(lambda x: x, 2.0)
QUAD = Bed(lambda x: -((x - 0.9) ** 2), 1.0)
BOUNDED = Bed(lambda x: torch.sigmoid((x - 0.7) / 0.15), 4.0)


class Plane:
    """Two anchors in two dimensions: four modes, a linear reward along the first axis and one that
    is greatest on a line of the second."""

    prior = mixture(
        (0.4, 0.3, 0.2, 0.1),
        ((-1, -1), (1, -1), (-1, 1), (1, 1)),
        ((0.3, 0.3), (0.25, 0.3), (0.3, 0.25), (0.3, 0.3)),
    )
    linear = torch.tensor([1.5, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    quadratic = (
        torch.tensor([0.0, 1.6], dtype=torch.float64),
        torch.tensor([0.0, 1.6], dtype=torch.float64),
    )  # -0.8 (y - 1)^2

    @cached_property
    def anchors(self) -> list[Mixture]:
        return [self.prior.tilted(*self.linear), self.prior.tilted(*self.quadratic)]

    def target(self, lams: Sequence[float]) -> Mixture:
        """p_ref exp(sum lam_i s_i r_i)."""
        b, q = (
            torch.stack([lam * part for lam, part in zip(lams, parts)]).sum(0)
            for parts in zip(self.linear, self.quadratic)
        )
        return self.prior.tilted(b, q)

    def modes(self, x: Tensor) -> Tensor:
        """Shares of the samples x (N, 2) that are nearest to each mode, by quadrant: (4,)."""
        right, above = x[:, 0] > 0, x[:, 1] > 0
        quadrant = right.long() + 2 * above.long()
        return quadrant.bincount(minlength=4) / len(x)

    def exact_modes(self, lams: Sequence[float]) -> Tensor:
        """What `modes` gives for infinitely many samples of the target: (4,)."""
        target = self.target(lams)
        above = torch.special.ndtr(target.means / target.variances.sqrt())  # (M, 2)
        x, y = (
            torch.stack([1 - above[:, 0], above[:, 0]]),
            torch.stack([1 - above[:, 1], above[:, 1]]),
        )
        return torch.einsum("m,ym,xm->yx", target.log_weights.exp(), y, x).flatten()


def kl_of_samples(x: Tensor, log_density: Tensor) -> float:
    """KL in nats of samples (N,) to the density whose logarithm is on GRID: over 120 bins, less
    their bias (bins - 1) / 2N."""
    edges = torch.linspace(-3, 3, BINS + 1, dtype=torch.float64)
    cdf = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(log_density.exp(), GRID)])
    expected = _interpolated(edges, GRID, cdf).diff()
    counts = torch.histogram(x.double().clamp(-2.999, 2.999), edges).hist
    shares = counts / len(x)
    seen = counts > 0
    terms = shares[seen] * (shares[seen] / expected[seen].clamp(min=1e-12)).log()
    return (terms.sum() - (seen.sum() - 1) / (2 * len(x))).item()


def kl_of_quantiles(x: Tensor, log_density: Tensor) -> float:
    """KL in nats of the law whose evenly spaced quantiles are x (N,), to the density whose
    logarithm is given on GRID. No chance in it."""
    x = x.sort().values
    middle = (x[1:] + x[:-1]) / 2
    return (-(len(x) * x.diff()).log() - _interpolated(middle, GRID, log_density)).mean().item()


def kl_between(x: Tensor, y: Tensor) -> float:
    """KL in nats between the laws whose evenly spaced quantiles are x (N,) and y (N,)."""
    x, y = x.sort().values, y.sort().values
    log_density = _interpolated(
        (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2, -(len(y) * y.diff()).log()
    )
    return (-(len(x) * x.diff()).log() - log_density).mean().item()


def w2(x: Tensor, quantiles: Tensor) -> float:
    """2-Wasserstein distance of samples (N,) to a law's evenly spaced quantiles (N,)."""
    return (x.double().sort().values - quantiles).square().mean().sqrt().item()


def noise(scheduler: Any, rows: int, dimensions: int = 1, seed: int = 0) -> Tensor:
    """A chain's start, (rows, dimensions)."""
    start = torch.randn(
        rows, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return start * getattr(scheduler, "init_noise_sigma", 1.0)


def even_noise(scheduler: Any, rows: int) -> Tensor:
    """The start of chains without chance: evenly spaced quantiles of the noise, (rows, 1). What
    they become are quantiles of the result."""
    places = (torch.arange(rows, dtype=torch.float64)[:, None] + 0.5) / rows
    return torch.special.ndtri(places) * getattr(scheduler, "init_noise_sigma", 1.0)


def _interpolated(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1]).clamp(min=1e-300)
    return torch.lerp(ys[right - 1], ys[right], share.clamp(0, 1))
