"""Ranks talk to each other once a step, and read what was said a step later."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.testing._internal.distributed.fake_pg import FakeStore

from deradiff.data.reference_errors import ReferenceErrors
from deradiff.training.checkpoints import Checkpoints
from deradiff.training.loop import train
from deradiff.training.meters import EndedStep
from deradiff.training.step_flags import Exchange
from tests.support.collectives import Collectives
from tests.support.objectives import items, make
from tests.support.regression import Regression, examples, options
from tests.support.synchronisations import Synchronisations


def two_ranks(other_bad=False, other_signal=0):
    """An accelerator whose second rank sends what it is told to."""
    other = torch.tensor([[float(other_bad), float(other_signal)]])
    return SimpleNamespace(num_processes=2, gather=lambda own: torch.cat([own, other]))


def ended(step, bad=False):
    return EndedStep(step, torch.tensor(bad), [])


def test_flags_are_read_a_step_later_or_at_once_where_something_is_written():
    flags = Exchange(two_ranks())
    flags.send(ended(0, bad=True), 0)
    assert flags.read(all_steps=False) == (None, 0)
    flags.send(ended(1, bad=True), 0)
    assert flags.read(all_steps=False).failed.step == 0
    assert flags.read(all_steps=True).failed.step == 1


def test_a_signal_of_another_rank_stops_once_the_last_step_is_known_to_be_good():
    flags = Exchange(two_ranks(other_signal=signal.SIGTERM))
    flags.send(ended(0), 0)
    assert flags.read(all_steps=False).signal_number == 0
    flags.send(ended(1, bad=True), 0)
    failed, number = flags.read(all_steps=False)
    assert (failed.step, number) == (1, signal.SIGTERM)


def test_what_another_rank_has_is_said():
    flags = Exchange(two_ranks(other_bad=True))
    flags.send(ended(3), 0)
    failed, _ = flags.read(all_steps=True)
    assert failed.problem() == "another rank has a loss or gradient that is not finite"


def test_to_send_flags_reads_nothing_from_the_device():
    flags = Exchange(two_ranks())
    with Synchronisations() as counter:
        flags.send(ended(0), signal.SIGTERM)
    assert not counter.waits


class BrokenFrom(Regression):
    """Its loss is not finite from the third step on."""

    def loss(self, network, batch):
        loss, terms = super().loss(network, batch)
        return loss * (math.nan if len(self.seen) > 8 else 1.0), terms


@pytest.mark.parametrize("every", [{"log_every": 3}, {"checkpoint_every": 3}, {}])
def test_no_row_and_no_checkpoint_of_a_step_that_failed(every, tmp_path):
    periods = {"log_every": 99, "checkpoint_every": 2} | every
    with pytest.raises(FloatingPointError, match="step 2: the loss is not finite"):
        train(BrokenFrom(), examples(), options(**periods), tmp_path, Accelerator(cpu=True))
    newest = Checkpoints(tmp_path, 2).newest()
    assert newest is None or newest.name == "step-000002"
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.fixture
def group():
    """This process as the first of two ranks, whose collectives do nothing."""
    store = FakeStore()
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("known", [True, False])
def test_a_loss_talks_to_no_other_rank(method, known, group, tmp_path, pairs):
    store = ReferenceErrors(tmp_path / "errors", "key")
    if known:
        first = items(pairs)
        store.add([item.epoch_index for item in first], torch.ones(2, len(first)))
        store.flush()
        store = ReferenceErrors(tmp_path / "errors", "key")
    _, objective = make("sd15", method, errors=store)
    batch = objective.collate(items(pairs))
    with Collectives() as counter:
        loss, _ = objective.loss(objective.network, batch)
        loss.backward()
    assert batch["known"] == known
    assert not counter.calls
