"""A GPU does not wait within a micro-batch: nothing reads a number from the device."""

from types import SimpleNamespace

import pytest
import torch

from deradiff.data.cache import Cache
from deradiff.data.reference_errors import ReferenceErrors
from deradiff.training import meters
from deradiff.training.batches import to_device
from deradiff.training.meters import Window
from deradiff.training.options import TrainingOptions
from tests.support.objectives import RESOLUTION, items, make
from tests.support.synchronisations import Synchronisations


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("errors", ["unknown", "known", "not stored"])
def test_a_micro_batch_reads_nothing_from_the_device(method, errors, tmp_path, pairs):
    store = None if errors == "not stored" else ReferenceErrors(tmp_path / "errors", "key")
    if errors == "known":
        first = items(pairs)
        store.add([item.epoch_index for item in first], torch.ones(2, len(first)))
        store.flush()
        store = ReferenceErrors(tmp_path / "errors", "key")
    cache = Cache(tmp_path / "cache", "sd15", pairs, RESOLUTION)
    pipe, objective = make("sd15", method, cache=cache, errors=store)
    cache.build(lambda: pipe)
    batch = objective.collate(items(pairs))
    window = window_of_one_process()

    with Synchronisations() as counter:
        moved = to_device(batch, torch.device("cpu"))
        loss, terms = objective.loss(objective.network, moved)
        loss.backward()
        window.add(loss, terms, moved)
    assert counter.operations > 100
    assert not counter.waits


def test_the_counter_sees_what_waits():
    values = torch.arange(4.0)
    with Synchronisations() as counter:
        values[values > 1]
        float(values.sum())
        (values > 1).nonzero()
    assert sum(counter.waits.values()) == 3


def window_of_one_process():
    """The meters of a run."""
    device = torch.device("cpu")
    accelerator = SimpleNamespace(device=device, num_processes=1, mixed_precision="no")
    return Window(
        TrainingOptions(1, pairs_per_step=4, batch_size=4, learning_rate=1e-4), accelerator
    )


def test_bands_of_time_hold_the_means_of_their_own_pairs():
    window = window_of_one_process()
    accuracy = torch.tensor([1.0, 0.0, 1.0, torch.nan])
    batch = {"time": torch.tensor([0.1, 0.2, 0.6, 0.9])}
    window.add(torch.tensor(0.5), {"implicit_accuracy": accuracy}, batch)
    sums = {name: tuple(pair.tolist()) for name, pair in window._sums.items()}
    assert sums["implicit_accuracy/t0-250"] == (1, 2)
    assert sums["implicit_accuracy/t250-500"] == (0, 0)
    assert sums["implicit_accuracy/t500-750"] == (1, 1)
    assert sums["implicit_accuracy/t750-1000"][1] == 1
    assert meters.BANDS == 4


def test_a_lora_is_switched_off_for_the_reference_and_on_again():
    _, objective = make("sd15", "lora", lora_scale=0.5)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 5, objective.network.config.cross_attention_dim)
    frozen = [(p, p.requires_grad) for p in objective.network.parameters()]

    def ask(network):
        with torch.no_grad():
            return network(x, 401, text)[0]

    trained = ask(objective.network)
    with objective.reference() as reference:
        own = ask(reference)
    assert torch.equal(ask(objective.network), trained)
    assert all(p.requires_grad == required for p, required in frozen)
    objective.network.disable_adapters()
    assert torch.equal(ask(objective.network), own)
    assert not torch.equal(own, trained)
