"""Several ranks, each a process: they share the data, and shards are saved as whole tensors."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from deradiff.data.pairs import Examples, Pairs
from deradiff.training.loop import train
from deradiff.training.optimizers import make_optimizer
from deradiff.worlds import shapes
from tests.support.collectives import Collectives
from tests.support.processes import on_ranks
from tests.support.regression import Regression, examples, options, train_until, weights


def test_two_ranks_share_the_data_and_end_with_the_weights_of_one(tmp_path):
    def rank():
        accelerator = Accelerator(cpu=True)
        objective = Regression()
        train(objective, examples(), options(batch_size=2), tmp_path / "two", accelerator)
        result = json.dumps([objective.seen, weights(objective).tolist()])
        (tmp_path / f"two/rank{accelerator.process_index}.json").write_text(result)

    on_ranks(rank)
    one = Regression()
    train(one, examples(), options(batch_size=4), tmp_path / "one", Accelerator(cpu=True))
    seen0, weights0 = json.loads((tmp_path / "two/rank0.json").read_text())
    seen1, weights1 = json.loads((tmp_path / "two/rank1.json").read_text())
    assert weights0 == weights1

    # Ranks take turns: two examples of rank 0, two of rank 1, ...
    seen = []
    for start in range(0, 24, 2):
        seen += seen0[start : start + 2] + seen1[start : start + 2]
    assert seen == one.seen
    torch.testing.assert_close(torch.tensor(weights0), weights(one), rtol=1e-5, atol=1e-6)


class Sharding(Accelerator):
    """Shards the network by FSDP2's own `fully_shard`, which accelerate calls on GPUs."""

    def prepare(self, network, optimizer):
        fully_shard(network)
        optimizer = make_optimizer(list(network.parameters()), options())
        return network, self.prepare_optimizer(optimizer)


def sharded_runs(folder):
    """What each rank does: a whole run, and runs that are stopped and go on, sharded or not."""

    def go(name, stop_at=None, kind=Sharding):
        objective = Regression(stop_at)
        run = options(batch_size=2, ema=0.5)
        try:
            train(objective, examples(), run, folder / name, kind(cpu=True))
        except KeyboardInterrupt:
            return None
        return type(objective.network).__name__, weights(objective).tolist()

    name, whole = go("whole")
    go("stopped", stop_at=15)
    again = go("stopped")
    assert again == (name, whole) and name == "Linear", (again, name, whole)

    # What shards have begun goes on whole, and the other way round.
    for first, last in ((Sharding, Accelerator), (Accelerator, Sharding)):
        go(first.__name__, 15, first)
        _, moved = go(first.__name__, None, last)
        torch.testing.assert_close(torch.tensor(moved), torch.tensor(whole), rtol=1e-5, atol=1e-6)
    (folder / "sharded.json").write_text(json.dumps(whole))


def test_sharded_weights_are_saved_whole_and_resumed_by_shards(tmp_path):
    """Two CPU ranks end with the weights of one process, also when they are stopped and resumed."""
    on_ranks(lambda: sharded_runs(tmp_path))
    one = Regression()
    train(one, examples(), options(ema=0.5), tmp_path / "one", Accelerator(cpu=True))
    sharded = torch.tensor(json.loads((tmp_path / "sharded.json").read_text()))
    torch.testing.assert_close(sharded, weights(one), rtol=1e-5, atol=1e-6)


def orders(folder):
    """Examples in two orders: of data in memory, and of a streamed table, block by block."""
    streamed = Pairs(str(folder / "pairs.parquet"), streaming=True)
    return {"memory": examples(), "streamed": Examples(streamed, 0, in_blocks=True)}


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_ranks(tmp_path):
    """Two ranks and then one; one and then three, which four pairs of a step do not come out on."""
    shapes.write_pairs(tmp_path / "pairs.parquet", 10, seed=0)

    def begin(begun, stop_at=None):
        for name, data in orders(tmp_path).items():
            train_until(tmp_path / f"{begun}-{name}", data, stop_at)

    # Both are stopped in their third step, by when each rank has seen so many examples.
    on_ranks(lambda: begin("fewer", 4))
    for name, data in orders(tmp_path).items():
        train_until(tmp_path / f"more-{name}", data, stop_at=8)
    on_ranks(lambda: begin("more"), count=3)

    for name, data in orders(tmp_path).items():
        whole = tmp_path / f"whole-{name}"
        train_until(whole, data)
        fewer = train_until(tmp_path / f"fewer-{name}", data)
        assert len(fewer.seen) == 2 * 4
        for begun in ("fewer", "more"):
            assert_same_end(tmp_path / f"{begun}-{name}", whole)


def assert_same_end(run_dir, whole):
    """Two runs end with the same weights, averages and metrics, but for the order of sums."""
    end = "checkpoints/step-000004"
    for name in ("weights", "average"):
        of_run = load_file(run_dir / end / f"{name}.safetensors")
        expected = load_file(whole / end / f"{name}.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(of_run[key], tensor, rtol=1e-5, atol=1e-6)
    losses = []
    for folder in (run_dir, whole):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 4


def count_calls(folder):
    """What each rank does: how often it talks in three steps of one or four micro-batches."""
    calls = {}
    for turns in (1, 4):
        run = options(
            steps=3, pairs_per_step=2 * turns, batch_size=1, log_every=99, checkpoint_every=99
        )
        with Collectives() as counter:
            train(Regression(), examples(), run, folder / str(turns), Accelerator(cpu=True))
        calls[turns] = dict(counter.calls)
    rank = Accelerator(cpu=True).process_index
    (folder / f"{rank}.json").write_text(json.dumps(calls))


@pytest.mark.slow
def test_ranks_talk_once_a_step_besides_their_gradients(tmp_path):
    on_ranks(lambda: count_calls(tmp_path))
    for rank in (0, 1):
        calls = json.loads((tmp_path / f"{rank}.json").read_text())
        assert calls["1"] == calls["4"]
        # The flags of three steps; before the first one what DDP asks, and whether all ranks train
        # the same: the lengths of their answers, and these.
        assert calls["1"]["allgather_"] == 3 + 1 + 2
        # The gradients of three steps, the sums of one row and the loss of one checkpoint.
        assert calls["1"]["allreduce_"] == 3 + 2
