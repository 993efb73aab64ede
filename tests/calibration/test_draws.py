"""Both means over timesteps from one set of draws."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from deradiff.calibration.draws import TimeProposal
from deradiff.training.noising import noising_of

SCHEDULERS = {
    "diffusion": DDPMScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("kind", [*SCHEDULERS])
def test_weighted_means_are_those_of_training_and_of_the_path(kind):
    noising = noising_of(SCHEDULERS[kind])
    drawn = TimeProposal(noising).draw(4000, torch.Generator().manual_seed(0))
    times = noising.time(noising.timesteps).double()
    own = noising.time(drawn.timesteps).double()
    for power in (0, 1, 2):
        in_training = (noising.shares * times**power).sum()
        found = (drawn.training_weights * own**power).mean()
        assert float(found) == pytest.approx(float(in_training), rel=2e-3)
        on_the_path = (noising.kl_weights * times**power).sum() / noising.kl_weight
        found = (drawn.path_weights * own**power).mean()
        assert float(found) == pytest.approx(float(on_the_path), rel=2e-3)
    assert drawn.training_weights.max() <= 2
    assert drawn.path_weights.max() <= 2


def test_few_draws_lie_in_equal_shares():
    noising = noising_of(SCHEDULERS["diffusion"])
    drawn = TimeProposal(noising).draw(6, torch.Generator().manual_seed(1))
    assert (drawn.timesteps.diff() > 0).all()
