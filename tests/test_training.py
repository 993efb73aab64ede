"""The loop: order, resume, ranks, averages, checkpoints."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from deradiff.checkpoints import Checkpoints
from deradiff.data.pairs import Examples, Item
from deradiff.training import TrainingOptions, learning_rate_at, make_optimizer, train


class Regression:
    """A linear model whose example is its index: enough to see order, accumulation and resume."""

    def __init__(self, stop_at=None):
        torch.manual_seed(0)
        self.network, self.frozen = nn.Linear(3, 1), []
        self.seen, self.stop_at = [], stop_at

    def collate(self, items: list[Item]):
        x = torch.stack([torch.randn(3, generator=i.generator) for i in items])
        return {"x": x, "y": x.sum(1, keepdim=True), "index": torch.tensor([i.index for i in items])}

    def loss(self, network, batch):
        self.seen += batch["index"].tolist()
        if self.stop_at is not None and len(self.seen) > self.stop_at:
            raise KeyboardInterrupt
        return (network(batch["x"]) - batch["y"]).square().mean(), {"twice": torch.tensor(2.0)}


def examples(count=10):
    return Examples(range(count), seed=0)  # of the data, the loop itself asks only how much there is


def options(**changes):
    return TrainingOptions(**({"steps": 12, "batch_size": 4, "learning_rate": 0.05, "checkpoint_every": 5, "log_every": 2} | changes))


def weights(objective):
    return torch.cat([p.detach().flatten() for p in objective.network.parameters()])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_run_resumes_to_identical_weights(tmp_path, ema):
    whole, killed = Regression(), Regression(stop_at=30)
    train(whole, examples(), options(ema=ema), tmp_path / "whole", Accelerator(cpu=True))
    with pytest.raises(KeyboardInterrupt):
        train(killed, examples(), options(ema=ema), tmp_path / "killed", Accelerator(cpu=True))
    resumed = Regression()
    with torch.no_grad():
        resumed.network.weight.fill_(7.0)  # whatever it starts from, the checkpoint decides
    progress = train(resumed, examples(), options(ema=ema), tmp_path / "killed", Accelerator(cpu=True))
    assert progress.step == 12 and len(resumed.seen) == 7 * 4
    assert torch.equal(weights(whole), weights(resumed))
    lines = [[json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("whole", "killed")]
    assert [x["step"] for x in lines[1]] == [2, 4, 6, 8, 10, 12] and [x["lr"] for x in lines[0]] == [x["lr"] for x in lines[1]]
    assert all(x["twice"] == 2 for x in lines[0])


def test_accumulation_is_one_larger_batch(tmp_path):
    large, small = Regression(), Regression()
    train(large, examples(), options(batch_size=4), tmp_path / "a", Accelerator(cpu=True))
    train(small, examples(), options(batch_size=2, accumulation=2), tmp_path / "b", Accelerator(cpu=True, gradient_accumulation_steps=2))
    assert large.seen == small.seen
    torch.testing.assert_close(weights(large), weights(small), rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_left_in_the_network(tmp_path):
    plain, averaged = Regression(), Regression()
    train(plain, examples(), options(), tmp_path / "a", Accelerator(cpu=True))
    train(averaged, examples(), options(ema=0.99), tmp_path / "b", Accelerator(cpu=True))
    assert not torch.equal(weights(plain), weights(averaged))
    by_hand, steps = weights(Regression()), []
    for n in range(1, 13):  # the same trajectory, stopped after each step
        train(again := Regression(), examples(), options(steps=n), tmp_path / f"c{n}", Accelerator(cpu=True))
        steps.append(weights(again))
    for n, value in enumerate(steps, 1):
        by_hand = torch.lerp(by_hand, value, 1 - min(0.99, (1 + n) / (10 + n)))
    torch.testing.assert_close(weights(averaged), by_hand, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_checkpoint(tmp_path):
    class Broken(Regression):
        def loss(self, network, batch):
            loss, terms = super().loss(network, batch)
            return loss * (math.nan if len(self.seen) > 24 else 1.0), terms

    with pytest.raises(FloatingPointError, match=r"step 6: .*step-000005"):
        train(Broken(), examples(), options(), tmp_path, Accelerator(cpu=True))


def test_a_torn_checkpoint_is_not_a_checkpoint(tmp_path):
    train(Regression(), examples(), options(), tmp_path, Accelerator(cpu=True))
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest().name == "step-000012" and len(list(checkpoints.folder.iterdir())) == 2
    (checkpoints.folder / ".part-1").mkdir()
    (checkpoints.folder / "step-000099").mkdir()
    assert checkpoints.newest().name == "step-000012"


def test_learning_rate_over_time():
    constant, cosine = options(warmup=4, steps=100), options(steps=100, decay="cosine")
    assert [learning_rate_at(s, constant) for s in (0, 1, 4, 99)] == pytest.approx([0.01, 0.02, 0.05, 0.05])
    assert [learning_rate_at(s, cosine) for s in (0, 50)] == pytest.approx([0.05, 0.025]) and learning_rate_at(99, cosine) < 1e-4


def test_optimisers_of_the_recipes():
    parameters = list(nn.Linear(2, 2).parameters())
    adamw = make_optimizer(parameters, options()).param_groups[0]
    assert (adamw["betas"], adamw["weight_decay"], adamw["eps"]) == ((0.9, 0.999), 1e-2, 1e-8)
    adafactor = make_optimizer(parameters, options(optimizer="adafactor")).param_groups[0]
    assert not adafactor["scale_parameter"] and not adafactor["relative_step"] and adafactor["clip_threshold"] == 1.0


def test_two_ranks_share_the_data_and_end_with_the_weights_of_one(tmp_path):
    script = """
import json, sys, torch
from accelerate import Accelerator
from deradiff.training import train
from tests.test_training import Regression, examples, options, weights
from pathlib import Path
accelerator, objective = Accelerator(cpu=True), Regression()
train(objective, examples(), options(batch_size=int(sys.argv[1])), Path(sys.argv[2]), accelerator)
Path(sys.argv[2], f"rank{accelerator.process_index}.json").write_text(json.dumps([objective.seen, weights(objective).tolist()]))
"""
    root = Path(__file__).parent.parent
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    (tmp_path / "ranks.py").write_text(script)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "ranks.py")]
    subprocess.run([*run, "2", str(tmp_path / "two")], check=True, env=env, cwd=root, capture_output=True, timeout=120)
    one = Regression()
    train(one, examples(), options(batch_size=4), tmp_path / "one", Accelerator(cpu=True))
    (seen0, weights0), (seen1, weights1) = (json.loads((tmp_path / "two" / f"rank{r}.json").read_text()) for r in (0, 1))
    assert weights0 == weights1
    assert [x for a in range(0, 24, 2) for x in (*seen0[a : a + 2], *seen1[a : a + 2])] == one.seen
    torch.testing.assert_close(torch.tensor(weights0), weights(one), rtol=1e-5, atol=1e-6)
