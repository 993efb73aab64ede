"""The Feynman-Kac corrector: particles of one image, weighed and resampled, so that a realigned
chain follows the exact tilt.

The score of the tilt p_ref exp(lam r / beta) is missed by lam (1 - lam) / (2 beta^2) grad Var[r |
x_t] + O(beta^-3) where steps are mixed. Weighing K chains of an image by what each step's mixture
leaves out, and resampling them, mends that as K grows (sequential Monte Carlo; the weights of a
geometric mixture are those of Skreta et al. 2025, "Feynman-Kac Correctors in Diffusion").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def log_weight(
    kl_factor: float, lams: Sequence[Tensor | float], differences: Sequence[Tensor]
) -> Tensor:
    """One step's log weights, (rows,): -c [sum lam_i |D_i|^2 - |sum lam_i D_i|^2]; one anchor: -c
    lam (1 - lam) |D|^2.

    kl_factor: c of the step, from `transitions.kl_factors`. lams: for each anchor a number or a
        tensor that broadcasts to D_i.
    differences: D_i = output_i - output_reference, (rows, ...). The same for every sampler of the
        chain, stochastic or not.
    """
    differences = [d.double() if d.dtype == torch.float64 else d.float() for d in differences]
    pull = sum(lam * d for lam, d in zip(lams, differences))
    spread = sum(lam * d.square() for lam, d in zip(lams, differences)) - torch.square(
        torch.as_tensor(pull)
    )
    return -kl_factor * spread.flatten(1).sum(1)


class Particles:
    """K consecutive rows of a batch as the particles of one image: their weights, and who lives on.

    Every random number is a function of the image's own first rows, not of a generator: the same
    start gives the same picture in any batch.
    ess: (images,), the effective sample size of the weights, 1 to K, at its smallest since `start`.
        Raises ValueError for count < 1.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"particles must be a number of at least 1, not {count!r}")
        self.count, self.ess = count, torch.zeros(0)

    def start(self, x: Tensor) -> None:
        """Begin a chain at its first sample x (images * K, ...). Raises ValueError for rows that
        are no multiple of K."""
        if len(x) % self.count:
            raise ValueError(
                f"{len(x)} rows are no multiple of particles={self.count}: each image needs "
                f"{self.count} rows"
            )
        images = len(x) // self.count
        self._keys, self._draws, self._device = _keys(x.reshape(images, -1)), 0, x.device
        self._log_w = torch.zeros(images, self.count, dtype=torch.float64)
        self.ess = torch.full((images,), float(self.count))

    def reweigh(self, log_w: Tensor) -> None:
        """Multiply the weights by one step's: log_w (images * K,)."""
        self._log_w += log_w.detach().cpu().double().view_as(self._log_w)

    def resample(self, last: bool = False) -> Tensor | None:
        """index (images * K,), long: row i becomes row index[i], images apart; None where nobody
        changes.

        Systematic resampling (Kitagawa 1996) of the images whose effective sample size fell under K
        / 2; then their weights are equal.
        last: of all images and in random order, so that an image's first row is a draw by the
            weights.
        """
        first, order = self._uniforms(1 + self.count).split(
            [1, self.count], 1
        )  # also where nobody needs them: others in the batch may
        weights = self._log_w.softmax(1)
        ess = 1 / weights.square().sum(1)
        self.ess = torch.minimum(self.ess, ess.float())
        chosen = torch.ones_like(ess, dtype=torch.bool) if last else ess < self.count / 2
        if not chosen.any():
            return None
        points = (first + torch.arange(self.count)) / self.count
        offspring = torch.searchsorted(weights.cumsum(1), points, right=True).clamp(
            max=self.count - 1
        )
        if last:
            offspring = offspring.gather(1, order.argsort(1))
        index = torch.where(chosen[:, None], offspring, torch.arange(self.count))
        self._log_w[chosen] = 0
        return (index + self.count * torch.arange(len(index))[:, None]).flatten().to(self._device)

    def _uniforms(self, count: int) -> Tensor:
        """(images, count) in [0, 1), new ones at each call."""
        counters = np.arange(self._draws, self._draws + count, dtype=np.uint64)
        self._draws += count
        return torch.from_numpy(
            (_mixed(self._keys[:, None] + GOLDEN * counters) >> np.uint64(11)) * 2.0**-53
        )


def _keys(x: Tensor) -> np.ndarray:
    """A 64-bit hash of each row of x (rows, n), by its values in single precision."""
    bits = x.detach().float().cpu().contiguous().numpy().view(np.uint32).astype(np.uint64)
    places = GOLDEN * np.arange(1, bits.shape[1] + 1, dtype=np.uint64)
    return _mixed(_mixed(bits + places).sum(1, dtype=np.uint64))


def _mixed(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): 64 bits in, 64 well-mixed bits out. Vectorised,
    where a generator an image is slow."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
