"""The Feynman-Kac corrector: particles of one image, weighted and resampled.

Mixing step by step misses the score of the exact tilt p_ref exp(lam r / beta) by

    lam (1 - lam) / (2 beta^2) grad Var[r | x_t] + O(1 / beta^3)

K chains of each image, its particles, are weighted by what each step's mixture leaves out, and
resampled. As K grows, this corrects the error (sequential Monte Carlo; the weights of a geometric
mixture are those of Skreta et al. 2025, "Feynman-Kac Correctors in Diffusion").

Shapes: K particles an image; rows of a batch = images * K, an image's particles one after the
other; samples and differences D (rows, ...); weights (images, K).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio, made odd: the stride between the counters of splitmix64."""


def log_weight(
    kl_factor: float, lams: Sequence[Tensor | float], differences: Sequence[Tensor]
) -> Tensor:
    """The log weights of one step.

        -c [ sum lam_i |D_i|^2 - |sum lam_i D_i|^2 ],  for one anchor  -c lam (1 - lam) |D|^2

    It is the logarithm of the normaliser of the step's mixture, at the noise of the gain in
    signal-to-noise ratio; the same for every sampler, with noise or without.

    Args:
        kl_factor: c of the step, from `transitions.kl_factors`.
        lams: of each anchor: a number, or a tensor that broadcasts to D_i.
        differences: D_i = output_i - output_reference (rows, ...).

    Returns:
        (rows,), in nats.
    """
    differences = [_at_least_single(difference) for difference in differences]
    shift = sum(lam * difference for lam, difference in zip(lams, differences))
    squared_shift = torch.square(torch.as_tensor(shift))
    squares = sum(lam * difference.square() for lam, difference in zip(lams, differences))
    gap = squares - squared_shift
    return -kl_factor * gap.flatten(1).sum(1)


class Particles:
    """The weights of K particles of each image, and which of them live on.

    Every random number is a function of the first sample of the image, not of a generator. So an
    image does not depend on its batch.

    Args:
        count: K.

    Attributes:
        count: K.
        ess: the effective sample size of each image's weights, 1 to K, at its smallest since
            `start` (images,).

    Raises:
        ValueError: for a count below 1.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"particles must be a number of at least 1, not {count!r}")
        self.count = count
        self.ess = torch.zeros(0)

    def start(self, x: Tensor) -> None:
        """Begin a chain: all weights are equal.

        Args:
            x: the chain's first sample (images * K, ...).

        Raises:
            ValueError: where the rows are not a multiple of K.
        """
        if len(x) % self.count:
            raise ValueError(
                f"{len(x)} rows are no multiple of particles={self.count}: each image needs "
                f"{self.count} rows"
            )
        images = len(x) // self.count
        self._image_hashes = _hash_rows(x.reshape(images, -1))
        self._numbers_used = 0
        self._device = x.device
        self._log_w = torch.zeros(images, self.count, dtype=torch.float64)
        self.ess = torch.full((images,), float(self.count))

    def reweigh(self, log_w: Tensor) -> None:
        """Multiply the weights by those of one step.

        Args:
            log_w: the step's log weights (images * K,).
        """
        self._log_w += log_w.detach().cpu().double().view_as(self._log_w)

    def resample(self, last: bool = False) -> Tensor | None:
        """Resample the images whose effective sample size is below K / 2.

        Systematic resampling (Kitagawa 1996): a particle has its share of copies, rounded up or
        down. Afterwards the weights are equal.

        Args:
            last: resample all images, and put their particles in a random order. The first row of
                an image is then a random draw by the weights.

        Returns:
            index (images * K,), long: row i becomes row index[i], of the same image. None where no
            image is resampled.
        """
        # An image's random numbers must not depend on whether others in the batch need theirs.
        uniforms = self._uniforms(1 + self.count)
        offset = uniforms[:, :1]
        sort_keys = uniforms[:, 1:]

        # Which images are resampled.
        weights = self._log_w.softmax(1)
        ess = 1 / weights.square().sum(1)
        self.ess = torch.minimum(self.ess, ess.float())
        is_resampled = torch.ones_like(ess, dtype=torch.bool) if last else ess < self.count / 2
        if not is_resampled.any():
            return None

        # K evenly spaced points with a common offset, on the line of the cumulative weights.
        own = torch.arange(self.count)
        points = (offset + own) / self.count
        survivors = torch.searchsorted(weights.cumsum(1), points, right=True)
        survivors = survivors.clamp(max=self.count - 1)
        if last:
            survivors = survivors.gather(1, sort_keys.argsort(1))
        self._log_w[is_resampled] = 0

        # From places within an image to rows of the batch.
        place = torch.where(is_resampled[:, None], survivors, own)
        first_row = self.count * torch.arange(len(place))[:, None]
        return (first_row + place).flatten().to(self._device)

    def _uniforms(self, count: int) -> Tensor:
        """Random numbers in [0, 1) (images, count), new ones at each call."""
        counters = np.arange(self._numbers_used, self._numbers_used + count, dtype=np.uint64)
        self._numbers_used += count
        bits = _scramble(self._image_hashes[:, None] + GOLDEN_GAMMA * counters)
        return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


def _at_least_single(difference: Tensor) -> Tensor:
    """In single precision; in double where it is double."""
    return difference.double() if difference.dtype == torch.float64 else difference.float()


def _hash_rows(x: Tensor) -> np.ndarray:
    """A 64-bit hash of each row of x (rows, n), by its values in single precision."""
    values = x.detach().float().cpu().contiguous().numpy()
    bits = values.view(np.uint32).astype(np.uint64)
    places = GOLDEN_GAMMA * np.arange(1, bits.shape[1] + 1, dtype=np.uint64)
    return _scramble(_scramble(bits + places).sum(1, dtype=np.uint64))


def _scramble(z: np.ndarray) -> np.ndarray:
    """The last step of splitmix64 (Steele et al. 2014): 64 bits in, 64 well-mixed bits out.

    It works on whole arrays; a generator for each image would be slow.
    """
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
