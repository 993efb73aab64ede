"""The loop: order, resume, ranks, averages, checkpoints."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from deradiff.data.pairs import Examples, Item
from deradiff.training.checkpoints import Checkpoints
from deradiff.training.loop import train
from deradiff.training.optimizers import TrainingOptions, learning_rate_at, make_optimizer
from deradiff.training.preemption import Preempted


class Regression:
    """A linear model whose example is its index: enough to see order, accumulation and resume."""

    def __init__(self, stop_at=None):
        torch.manual_seed(0)
        self.network, self.frozen = nn.Linear(3, 1), []
        self.seen, self.stop_at = [], stop_at

    def collate(self, items: list[Item]):
        x = torch.stack([torch.randn(3, generator=i.generator) for i in items])
        return {
            "x": x,
            "y": x.sum(1, keepdim=True),
            "index": torch.tensor([i.index for i in items]),
        }

    def loss(self, network, batch):
        self.seen += batch["index"].tolist()
        if self.stop_at is not None and len(self.seen) > self.stop_at:
            raise KeyboardInterrupt
        return (network(batch["x"]) - batch["y"]).square().mean(), {"twice": torch.tensor(2.0)}


class Rows:
    """Of the data, the loop itself asks only how much there is."""

    instead_of = staticmethod(lambda index: index)

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def examples(count=10):
    return Examples(Rows(count), seed=0)


def options(**changes):
    return TrainingOptions(
        **(
            {
                "steps": 12,
                "batch_size": 4,
                "learning_rate": 0.05,
                "checkpoint_every": 5,
                "log_every": 2,
            }
            | changes
        )
    )


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
    progress = train(
        resumed, examples(), options(ema=ema), tmp_path / "killed", Accelerator(cpu=True)
    )
    assert progress.step == 12 and len(resumed.seen) == 7 * 4
    assert torch.equal(weights(whole), weights(resumed))
    lines = [
        [json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
        for d in ("whole", "killed")
    ]
    assert [x["step"] for x in lines[1]] == [2, 4, 6, 8, 10, 12] and [
        x["lr"] for x in lines[0]
    ] == [x["lr"] for x in lines[1]]
    assert all(x["twice"] == 2 for x in lines[0])


def test_accumulation_is_one_larger_batch(tmp_path):
    large, small = Regression(), Regression()
    train(large, examples(), options(batch_size=4), tmp_path / "a", Accelerator(cpu=True))
    train(
        small,
        examples(),
        options(batch_size=2, accumulation=2),
        tmp_path / "b",
        Accelerator(cpu=True, gradient_accumulation_steps=2),
    )
    assert large.seen == small.seen
    torch.testing.assert_close(weights(large), weights(small), rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_left_in_the_network(tmp_path):
    plain, averaged = Regression(), Regression()
    train(plain, examples(), options(), tmp_path / "a", Accelerator(cpu=True))
    train(averaged, examples(), options(ema=0.99), tmp_path / "b", Accelerator(cpu=True))
    assert not torch.equal(weights(plain), weights(averaged))
    by_hand, steps = weights(Regression()), []
    for n in range(1, 13):  # the same trajectory, stopped after each step
        train(
            again := Regression(),
            examples(),
            options(steps=n),
            tmp_path / f"c{n}",
            Accelerator(cpu=True),
        )
        steps.append(weights(again))
    for n, value in enumerate(steps, 1):
        by_hand = torch.lerp(by_hand, value, 1 - min(0.99, (1 + n) / (10 + n)))
    torch.testing.assert_close(weights(averaged), by_hand, rtol=1e-4, atol=1e-5)


class Pairs(Regression):
    """The same with a loss per example, an index and a time, as the diffusion objectives have them."""

    def __init__(self, broken=None):
        super().__init__()
        self.broken = broken

    def collate(self, items):
        return super().collate(items) | {
            "time": torch.tensor([(i.index + 0.5) / 10 for i in items])
        }

    def loss(self, network, batch):
        rows = (network(batch["x"]) - batch["y"]).square().mean(1)
        if self.broken is not None:
            rows = torch.where(batch["index"] == self.broken, math.inf, 1.0) * rows
        return rows.mean(), {"loss": rows, "implicit_accuracy": (batch["index"] < 5).float()}


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_checkpoint(tmp_path):
    class Broken(Regression):
        def loss(self, network, batch):
            loss, terms = super().loss(network, batch)
            return loss.square().sqrt() if len(self.seen) <= 24 else (
                network(batch["x"]) * 0
            ).sqrt().mean(), terms

    with pytest.raises(
        FloatingPointError,
        match=r"step 6: the gradient is not finite; .*step-000005 holds the last good weights",
    ):
        train(Broken(), examples(), options(), tmp_path, Accelerator(cpu=True))


def test_a_loss_that_is_not_finite_is_traced_to_its_pair_and_time(tmp_path):
    with pytest.raises(
        FloatingPointError,
        match=r"step \d: the loss is not finite, from pair 7 at t 750 .*no checkpoint yet",
    ):
        train(Pairs(broken=7), examples(), options(), tmp_path, Accelerator(cpu=True))


def test_accuracy_is_told_by_band_of_time_and_terms_are_means_over_pairs(tmp_path):
    train(
        Pairs(), examples(20), options(steps=5, log_every=5), tmp_path, Accelerator(cpu=True)
    )  # one epoch: 20 indices
    (row,) = (json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["implicit_accuracy"] == 0.25
    bands = [row[f"implicit_accuracy/t{a}-{a + 250}"] for a in (0, 250, 500, 750)]
    assert bands == pytest.approx([1.0, 1.0, 0.0, 0.0]), (
        "time is (index + .5) / 10, held at 1: 0 to 2, 3 and 4, 5 to 7, the rest"
    )
    assert row["memory_gb"] > 0 and row["pairs_per_second"] > 0 and "mfu" not in row


def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capsys):
    whole = Regression()
    train(whole, examples(), options(), tmp_path, Accelerator(cpu=True))
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert [c.name for c in checkpoints.whole()] == ["step-000010", "step-000012"]
    (checkpoints.folder / ".part").mkdir()
    (checkpoints.folder / "step-000099").mkdir()
    assert checkpoints.newest().name == "step-000012"
    for file in ("weights.safetensors", "optimizer.pt", "progress.json"):
        content = (checkpoints.newest() / file).read_bytes()
        (checkpoints.newest() / file).write_bytes(content[:-20])
        again = Regression()
        train(again, examples(), options(), tmp_path, Accelerator(cpu=True))
        assert (
            "step-000012 is torn and is skipped" in capsys.readouterr().err and len(again.seen) == 8
        ), file
        assert torch.equal(weights(whole), weights(again))


def test_the_newest_and_the_best_checkpoints_stay(tmp_path):
    class Rising(Regression):
        def loss(self, network, batch):
            loss, terms = super().loss(network, batch)
            return loss * 0 + abs(len(self.seen) / 4 - 4), terms  # the lowest at step 4

    train(
        Rising(),
        examples(),
        options(checkpoint_every=2, keep_last=1, keep_best=1),
        tmp_path,
        Accelerator(cpu=True),
    )
    assert [c.name for c in Checkpoints(tmp_path, 1).whole()] == ["step-000004", "step-000012"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_checkpoints_and_stops_between_two_steps(tmp_path, number):
    class Told(Regression):
        def loss(self, network, batch):
            if len(self.seen) == 28:
                os.kill(os.getpid(), number)
            return super().loss(network, batch)

    before, whole = signal.getsignal(number), Regression()
    with pytest.raises(Preempted, match="at step 8; checkpoint written, the same command resumes"):
        train(Told(), examples(), options(), tmp_path / "told", Accelerator(cpu=True))
    assert (
        signal.getsignal(number) == before
        and Checkpoints(tmp_path / "told", 2).newest().name == "step-000008"
    )
    train(resumed := Regression(), examples(), options(), tmp_path / "told", Accelerator(cpu=True))
    train(whole, examples(), options(), tmp_path / "whole", Accelerator(cpu=True))
    assert torch.equal(weights(whole), weights(resumed))


def test_showing_pictures_does_not_disturb_what_is_trained(tmp_path):
    class Dropout(Regression):
        def loss(self, network, batch):
            batch["x"] = torch.nn.functional.dropout(batch["x"], 0.2)
            return super().loss(network, batch)

    shown, results = [], []
    for every in (0, 3):
        objective = Dropout()
        train(
            objective,
            examples(),
            options(show_every=every),
            tmp_path / str(every),
            Accelerator(cpu=True),
            show=lambda network, step: shown.append((step, torch.rand(3).sum())),
        )
        results.append(weights(objective))
    assert [step for step, _ in shown] == [3, 6, 9, 12] and torch.equal(*results)


def test_learning_rate_over_time():
    constant, cosine = options(warmup=4, steps=100), options(steps=100, decay="cosine")
    assert [learning_rate_at(s, constant) for s in (0, 1, 4, 99)] == pytest.approx(
        [0.01, 0.02, 0.05, 0.05]
    )
    assert [learning_rate_at(s, cosine) for s in (0, 50)] == pytest.approx(
        [0.05, 0.025]
    ) and learning_rate_at(99, cosine) < 1e-4


def test_optimisers_of_the_recipes():
    parameters = list(nn.Linear(2, 2).parameters())
    adamw = make_optimizer(parameters, options()).param_groups[0]
    assert (adamw["betas"], adamw["weight_decay"], adamw["eps"]) == ((0.9, 0.999), 1e-2, 1e-8)
    adafactor = make_optimizer(parameters, options(optimizer="adafactor")).param_groups[0]
    assert (
        not adafactor["scale_parameter"]
        and not adafactor["relative_step"]
        and adafactor["clip_threshold"] == 1.0
    )


def ranks(script, tmp_path, *arguments):
    """Run a script on two processes; its own imports come from here."""
    root = Path(__file__).parents[2]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    (tmp_path / "ranks.py").write_text(script)
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "ranks.py"),
    ]
    done = subprocess.run(
        [*run, *arguments], env=env, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


RANKS = """
import json, sys, torch
from accelerate import Accelerator
from deradiff.training.loop import train
from tests.training.test_training import *
from pathlib import Path
"""


def test_eight_bit_moments_resume_to_identical_weights(tmp_path):
    pytest.importorskip("torchao", reason="pip install 'deradiff[optim8bit]'")

    class Wide(Regression):  # wide enough for moments that are stored in 8 bits
        def __init__(self, stop_at=None):
            super().__init__(stop_at)
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(3, 256), nn.Linear(256, 256), nn.Linear(256, 1))

    wanted = options(optimizer="adamw8bit_torchao", learning_rate=1e-3)
    train(whole := Wide(), examples(), wanted, tmp_path / "whole", Accelerator(cpu=True))
    with pytest.raises(KeyboardInterrupt):
        train(Wide(stop_at=30), examples(), wanted, tmp_path / "killed", Accelerator(cpu=True))
    train(resumed := Wide(), examples(), wanted, tmp_path / "killed", Accelerator(cpu=True))
    assert len(resumed.seen) == 28 and torch.equal(weights(whole), weights(resumed))


def test_two_ranks_share_the_data_and_end_with_the_weights_of_one(tmp_path):
    script = (
        RANKS
        + """
accelerator, objective = Accelerator(cpu=True), Regression()
train(objective, examples(), options(batch_size=2), Path(sys.argv[1]), accelerator)
Path(sys.argv[1], f"rank{accelerator.process_index}.json").write_text(json.dumps([objective.seen, weights(objective).tolist()]))
"""
    )
    ranks(script, tmp_path, str(tmp_path / "two"))
    one = Regression()
    train(one, examples(), options(batch_size=4), tmp_path / "one", Accelerator(cpu=True))
    (seen0, weights0), (seen1, weights1) = (
        json.loads((tmp_path / "two" / f"rank{r}.json").read_text()) for r in (0, 1)
    )
    assert weights0 == weights1
    assert [x for a in range(0, 24, 2) for x in (*seen0[a : a + 2], *seen1[a : a + 2])] == one.seen
    torch.testing.assert_close(torch.tensor(weights0), weights(one), rtol=1e-5, atol=1e-6)


def test_sharded_weights_are_saved_whole_and_resumed_by_shards(tmp_path):
    """FSDP2's own `fully_shard`, which accelerate calls on GPUs: two CPU ranks end with the weights of one process, also when stopped."""
    script = (
        RANKS
        + """
from torch.distributed.fsdp import fully_shard

class Sharding(Accelerator):
    def prepare(self, network, optimizer):
        fully_shard(network)
        optimizer = make_optimizer(list(network.parameters()), options())
        return network, self.prepare_optimizer(optimizer)

def go(name, stop_at=None, **more):
    objective = Regression(stop_at)
    try:
        train(objective, examples(), options(batch_size=2, ema=0.5, **more), Path(sys.argv[1], name), Sharding(cpu=True))
    except KeyboardInterrupt:
        return
    return type(objective.network).__name__, weights(objective).tolist()

name, whole = go("whole")
go("stopped", stop_at=15)
again = go("stopped")
assert again == (name, whole) and name == "Linear", (again, name, whole)
Path(sys.argv[1], "sharded.json").write_text(json.dumps(whole))
"""
    )
    ranks(script, tmp_path, str(tmp_path))
    one = Regression()
    train(one, examples(), options(ema=0.5), tmp_path / "one", Accelerator(cpu=True))
    sharded = torch.tensor(json.loads((tmp_path / "sharded.json").read_text()))
    torch.testing.assert_close(sharded, weights(one), rtol=1e-5, atol=1e-6)
