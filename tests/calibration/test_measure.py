"""The closed form against the project's own objective, with networks evaluated at mixed outputs.

Shapes: B pairs, latents (2, B, C, H, W): the winner, then the loser.
"""

import numpy as np
import pytest
import torch

from deradiff.anchors.anchor import load_anchor
from deradiff.calibration.draws import TimeProposal
from deradiff.calibration.measure import default_resolution, measure
from deradiff.data.pairs import Examples, generator_of, image_tensor
from deradiff.models.families import family_of
from deradiff.training.dpo import dpo_loss
from deradiff.training.objectives.diffusion import DenoiserObjective
from tests.support.tiny_pipelines import EVERY_KIND

BETA = 500.0
DRAWS = 3
RESOLUTION = 64
SETTINGS = {"resolution": RESOLUTION, "draws": DRAWS, "batch_size": 2, "progress": False}

ROUNDING = 2e-4
"""By so much a margin at beta 500 may be off: single precision rounds errors of about 1 to 1e-7,
the networks' own rounding aside."""


def measured(world, names, pairs, count=4, **settings):
    anchors = [load_anchor(world.anchors[name]) for name in names]
    return measure(world.copy().pipe, anchors, pairs, count=count, **SETTINGS | settings)


def outputs_of(world, names, pairs, index, draw):
    """The target, and the outputs of the reference and of stock pipelines with the anchors.

    Of one draw of one pair, (2, 1, C, H, W) each, in double precision.
    """
    objective = DenoiserObjective(world.pipe, RESOLUTION)
    images = [image_tensor(image, RESOLUTION) for image in pairs.images(index)]
    batch = {"images": torch.stack(images)[:, None], "captions": [pairs.captions[index]]}
    latents, conditioning = objective.encoded(batch)

    # The draws, as the measurement makes them.
    generator = generator_of(0, 0, index)
    timesteps = TimeProposal(objective.noising).draw(DRAWS, generator).timesteps
    noise = torch.randn((DRAWS, *objective.latent_shape), generator=generator)
    noisy, target = objective.noising(latents, noise[draw, None], timesteps[draw, None])

    name = family_of(world.pipe).denoiser
    pipes = [world.pipe, *(world.stock(anchor) for anchor in names)]
    outputs = []
    with torch.no_grad():
        for pipe in pipes:
            network = getattr(pipe, name)
            output = objective.predict(network, noisy, timesteps[draw, None], conditioning)
            outputs.append(output.double())
    return target.double(), outputs


@pytest.mark.parametrize("family", EVERY_KIND)
@pytest.mark.parametrize("name", ["full1", "lora1"])
def test_every_lambda_is_what_the_objective_says_of_mixed_outputs(worlds, family, name, pairs):
    world = worlds[family]
    moments = measured(world, [name], pairs)
    order = Examples(pairs, seed=0).span(0, 4)[1]
    for row, draw in ((0, 0), (3, 2)):
        target, (reference, anchor) = outputs_of(world, [name], pairs, int(order[row]), draw)
        for lam in (0.0, 0.3, 1.0, 2.5):
            mixed = (1 - lam) * reference + lam * anchor
            terms = dpo_loss(mixed, reference, target, BETA)
            margin = moments.margins([lam], BETA)[row, draw]
            assert margin == pytest.approx(terms.margin.item(), rel=1e-3, abs=ROUNDING)
            worse = (terms.error - terms.reference_error)[:, 0].numpy()
            np.testing.assert_allclose(
                moments.errors([lam])[row, draw], worse, rtol=1e-3, atol=ROUNDING / BETA
            )
        assert moments.reference_error[row, draw] == pytest.approx(
            terms.reference_error[:, 0].numpy(), rel=1e-4
        )


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_several_anchors_are_mixed_as_their_outputs_are(worlds, family, pairs):
    world = worlds[family]
    names = ["full1", "lora1", "lora2"]
    lams = [0.5, -0.2, 0.9]
    moments = measured(world, names, pairs)
    index = int(Examples(pairs, seed=0).span(0, 1)[1][0])
    target, (reference, *anchors) = outputs_of(world, names, pairs, index, 1)
    mixed = reference + sum(lam * (anchor - reference) for lam, anchor in zip(lams, anchors))
    terms = dpo_loss(mixed, reference, target, BETA)
    margin = moments.margins(lams, BETA)[0, 1]
    assert margin == pytest.approx(terms.margin.item(), rel=1e-3, abs=ROUNDING)

    # Of one anchor alone, they are what it has alone.
    alone = measured(world, ["lora1"], pairs)
    of_one = moments.of(1)
    np.testing.assert_allclose(of_one.projection, alone.projection, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(of_one.gram, alone.gram, rtol=1e-4, atol=1e-7)


def test_pairs_are_measured_alike_in_any_batch_and_the_pipeline_is_left_as_it_was(worlds, pairs):
    world = worlds["sd15"]
    small = measured(world, ["lora1", "full1"], pairs, 5, batch_size=1)
    large = measured(world, ["lora1", "full1"], pairs, 5, batch_size=5)
    np.testing.assert_array_equal(small.times, large.times)
    np.testing.assert_allclose(small.projection, large.projection, rtol=1e-3, atol=1e-6)
    assert small.pairs == 5
    assert small.draws == DRAWS

    pipe = world.copy().pipe
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    measure(pipe, [load_anchor(world.anchors["lora1"])], pairs, count=2, **SETTINGS)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_resolution_is_the_pipelines_own(worlds):
    assert default_resolution(worlds["sd15"].pipe) == 64
