"""One pass of the reference and the anchors over preference pairs.

Shapes: B pairs of a batch, M draws, K anchors, latents of C channels, H rows and W columns. The
axis of 2 is the winner and the loser.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deradiff.anchors.anchor import Anchor
from deradiff.calibration.draws import TimeDraws, TimeProposal
from deradiff.calibration.moments import Moments, joined
from deradiff.data.pairs import BrokenImage, Examples, Pairs, generator_of, image_tensor
from deradiff.models.families import family_of
from deradiff.progress import progress_bar
from deradiff.realignment.adapters import Adapter
from deradiff.realignment.attachment import attach_all, check_not_realigned
from deradiff.realignment.full_anchor import FullAnchor
from deradiff.training.objectives.diffusion import DenoiserObjective


def default_resolution(pipe: Any) -> int:
    """Pixels of an image's side at the size that a pipeline's denoiser was made for.

    Args:
        pipe: a text-to-image pipeline of a known family.
    """
    family = family_of(pipe)
    side = getattr(pipe, family.denoiser).config.get("sample_size") or family.latent_side
    return int(side) * family.pixels_per_latent(pipe.vae.config)


@torch.no_grad()
def measure(
    pipe: Any,
    anchors: Sequence[Anchor],
    pairs: Pairs,
    *,
    resolution: int,
    count: int,
    draws: int,
    batch_size: int,
    seed: int = 0,
    progress: bool = True,
) -> Moments:
    """Evaluate the reference and the anchors on the noisy images of pairs.

    Winner and loser share timestep and noise, and all networks see the same. The random choices of
    a pair depend on the seed and on its number alone. Pairs are read in batches, and nothing but
    the moments is kept.

    Args:
        pipe: a text-to-image pipeline of a known family, whose denoiser is the reference.
        anchors: of its base model.
        pairs: that no network was trained on.
        resolution: pixels of an image's side.
        count: of the pairs; they are a random choice where there are more.
        draws: of a timestep and noise for each pair.
        batch_size: pairs whose images are evaluated at once.
        seed: of the random choices.
        progress: show a progress bar.

    Raises:
        ValueError: for anchors that do not fit the pipeline, for a pipeline that is being
            realigned, and where too many images are broken.
    """
    name = family_of(pipe).denoiser
    check_not_realigned(pipe, [name])
    indices = Examples(pairs, seed, in_blocks=True).span(0, min(count, len(pairs)))[1]
    parts = []
    with ExitStack() as stack:
        attached = attach_all(pipe, name, anchors, stack)
        bar = stack.enter_context(
            progress_bar(len(indices), "calibrating", "pair", is_shown=progress)
        )
        networks = _Networks(pipe, attached, resolution, seed)
        for batch in _batches(indices.tolist(), batch_size):
            images = _decoded(pairs, batch, resolution)
            if images:
                parts.append(networks.moments(images, pairs, draws))
            bar.update(len(batch))
    return joined(parts)


def _batches(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Lists of so many indices; the last one may have fewer."""
    left = iter(indices)
    while batch := list(itertools.islice(left, size)):
        yield batch


def _decoded(pairs: Pairs, indices: Sequence[int], resolution: int) -> dict[int, Tensor]:
    """The images (2, 3, R, R) of each pair by its number, without those that are broken."""
    decoded = {}
    for index in indices:
        try:
            images = pairs.images(index)
        except BrokenImage as broken:
            pairs.skip(index, str(broken))
            continue
        decoded[index] = torch.stack([image_tensor(image, resolution) for image in images])
    return decoded


class _Networks:
    """The reference and the anchors on it.

    Args:
        pipe: the pipeline.
        attached: its anchors.
        resolution: pixels of an image's side.
        seed: of the random choices.
    """

    def __init__(
        self, pipe: Any, attached: Sequence[Adapter | FullAnchor], resolution: int, seed: int
    ) -> None:
        self.objective = DenoiserObjective(pipe, resolution)
        self.attached = attached
        self.seed = seed
        self.proposal = TimeProposal(self.objective.noising)

    def moments(self, images: dict[int, Tensor], pairs: Pairs, draws: int) -> Moments:
        """The moments of a batch of pairs.

        Args:
            images: (2, 3, R, R) of each pair, by its number.
            pairs: the data.
            draws: M.
        """
        # The latents and the captions, once for all draws.
        device = self.objective.network.device
        batch = {
            "images": torch.stack(list(images.values()), dim=1).to(device),
            "captions": [pairs.captions[index] for index in images],
        }
        latents, conditioning = self.objective.encoded(batch)

        # The random choices of each pair.
        generators = [generator_of(self.seed, 0, index) for index in images]
        times = [self.proposal.draw(draws, generator) for generator in generators]
        noise = [self._noise(draws, generator) for generator in generators]
        timesteps = torch.stack([drawn.timesteps for drawn in times]).to(device)
        noises = torch.stack(noise).to(device)

        # One draw of all pairs at a time.
        found = [
            self._products(latents, noises[:, draw], timesteps[:, draw], conditioning)
            for draw in range(draws)
        ]
        projections, grams, errors = zip(*found)
        return Moments(
            projection=_array(torch.stack(projections, dim=1)),
            gram=_array(torch.stack(grams, dim=1)),
            reference_error=_array(torch.stack(errors, dim=1)),
            times=_array(self.objective.noising.time(timesteps)),
            training_weights=_weights(times, "training_weights"),
            path_weights=_weights(times, "path_weights"),
        )

    def _noise(self, draws: int, generator: torch.Generator) -> Tensor:
        """(M, C, H, W)."""
        return torch.randn((draws, *self.objective.latent_shape), generator=generator)

    def _products(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The inner products of one draw of all pairs.

        Args:
            latents: clean, (2, B, C, H, W).
            noise: (B, C, H, W).
            timesteps: (B,).
            conditioning: rows of `encode_prompts`, (B, ...) each.

        Returns:
            a (B, 2, K), b (B, 2, K, K) and the reference's error (B, 2).
        """
        # Outputs of the reference and the anchors on the same input.
        objective = self.objective
        network = objective.network
        noisy, target = objective.noising(latents, noise, timesteps)
        evaluate = partial(
            objective.predict, network, noisy.to(network.dtype), timesteps, conditioning
        )
        reference = evaluate().float()
        differences = [anchor.output(evaluate).float() - reference for anchor in self.attached]

        # Means over C, H and W, with the pairs in front.
        residual = target.float() - reference
        difference = torch.stack(differences, dim=-1)  # (2, B, C, H, W, K)
        elements = residual[0, 0].numel()
        projection = torch.einsum("sbchw,sbchwk->bsk", residual, difference) / elements
        gram = torch.einsum("sbchwi,sbchwj->bsij", difference, difference) / elements
        return projection, gram, residual.square().mean(dim=(2, 3, 4)).T


def _array(tensor: Tensor) -> Any:
    """A tensor as numpy has it, in double precision."""
    return tensor.double().cpu().numpy()


def _weights(times: Sequence[TimeDraws], name: str) -> Any:
    """One kind of weights of all pairs, (B, M)."""
    return _array(torch.stack([getattr(drawn, name) for drawn in times]))
