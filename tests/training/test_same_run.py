"""Ranks that do not train the same are refused before their first step, by the name of what
differs."""

import json

import pytest
import torch
from accelerate import Accelerator

from deradiff.training.loop import train
from deradiff.training.same_run import (
    check_same,
    first_difference,
    flattened,
    network_checksum,
)
from tests.support.processes import on_ranks
from tests.support.regression import Regression, examples, options
from tests.support.tiny_pipelines import tiny_pipeline


def test_a_rank_that_differs_is_named_with_the_key():
    first = {"dpo.beta": 2000.0, "seed": 0}
    assert first_difference([first, dict(first), dict(first)]) is None
    assert first_difference([first, first, first | {"dpo.beta": 5000.0}]) == (
        "dpo.beta is 5000.0 on rank 2 and 2000.0 on rank 0"
    )
    assert (
        first_difference([first, {"seed": 0}]) == "dpo.beta is None on rank 1 and 2000.0 on rank 0"
    )
    nan = float("nan")
    assert first_difference([{"a": nan}, {"a": nan}]) is None


def test_a_config_is_compared_key_by_key():
    config = {"optim": {"lr": 1e-3, "name": "adamw"}, "data": {"scorer": {"vivid": 1.0}}}
    assert flattened(config) == {
        "optim.lr": 1e-3,
        "optim.name": "adamw",
        "data.scorer.vivid": 1.0,
    }


def test_the_checksum_of_a_network_sees_one_bit():
    network = tiny_pipeline("sd15").unet
    before = network_checksum(network)
    assert network_checksum(network) == before
    with torch.no_grad():
        weight = next(network.parameters())
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(torch.inf))
    assert network_checksum(network) != before
    network.to(torch.bfloat16)
    network_checksum(network)


def test_one_process_compares_nothing():
    class Alone:
        num_processes = 1

    check_same({"a": 1}, Alone())


def refusal(work):
    """What is said where some work is refused; None: it is not."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return None


def differ(folder):
    """What a rank hears of another beta, of a disk of its own and of a shared one."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index

    def trained_in(run_dir):
        train(Regression(), examples(), options(batch_size=2), run_dir, accelerator)

    said = [
        refusal(lambda: check_same({"dpo.beta": 2000 + rank}, accelerator)),
        refusal(lambda: trained_in(folder / f"disk{rank}")),
        refusal(lambda: trained_in(folder / "shared")),
    ]
    (folder / f"rank{rank}.json").write_text(json.dumps(said))


@pytest.mark.slow
def test_ranks_of_different_runs_end_with_one_sentence(tmp_path):
    """Another beta; a disk for each rank, of which one has a checkpoint; one disk for both."""
    train(Regression(), examples(), options(), tmp_path / "disk0", Accelerator(cpu=True))
    on_ranks(lambda: differ(tmp_path))
    said = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    beta, disks, shared = said[0]
    assert "dpo.beta is 2001 on rank 1 and 2000 on rank 0; start every rank with" in beta
    assert "newest checkpoint is 0 on rank 1 and 12 on rank 0; give all machines one disk" in disks
    assert shared is None
