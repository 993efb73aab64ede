"""Learning rates over time, the optimisers of the recipes, and 8-bit moments."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from deradiff.training.loop import train
from deradiff.training.optimizers import learning_rate_at, make_optimizer
from tests.support.regression import Regression, examples, options, weights


def test_learning_rate_over_time():
    constant = options(warmup=4, steps=100)
    rates = [learning_rate_at(step, constant) for step in (0, 1, 4, 99)]
    assert rates == pytest.approx([0.01, 0.02, 0.05, 0.05])
    cosine = options(steps=100, decay="cosine")
    rates = [learning_rate_at(step, cosine) for step in (0, 50)]
    assert rates == pytest.approx([0.05, 0.025])
    assert learning_rate_at(99, cosine) < 1e-4


def test_optimisers_of_the_recipes():
    parameters = list(nn.Linear(2, 2).parameters())
    adamw = make_optimizer(parameters, options()).param_groups[0]
    assert (adamw["betas"], adamw["weight_decay"], adamw["eps"]) == ((0.9, 0.999), 1e-2, 1e-8)
    adafactor = make_optimizer(parameters, options(optimizer="adafactor")).param_groups[0]
    assert not adafactor["scale_parameter"]
    assert not adafactor["relative_step"]
    assert adafactor["clip_threshold"] == 1.0


def test_eight_bit_moments_resume_to_identical_weights(tmp_path):
    pytest.importorskip("torchao", reason="pip install 'deradiff[optim8bit]'")

    class Wide(Regression):
        """Wide enough for moments that are stored in 8 bits."""

        def __init__(self, stop_at=None):
            super().__init__(stop_at)
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(3, 256), nn.Linear(256, 256), nn.Linear(256, 1))

    def train_here(objective, run_dir):
        wanted = options(optimizer="adamw8bit_torchao", learning_rate=1e-3)
        train(objective, examples(), wanted, run_dir, Accelerator(cpu=True))

    whole = Wide()
    train_here(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_here(Wide(stop_at=30), tmp_path / "killed")
    resumed = Wide()
    train_here(resumed, tmp_path / "killed")
    assert len(resumed.seen) == 28
    assert torch.equal(weights(whole), weights(resumed))
