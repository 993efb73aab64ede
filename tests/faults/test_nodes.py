"""Several machines, tried on two network namespaces: cables that are pulled, nodes that are lost.

Part of `make test-faults`. Where there is no root, the tests say so and are skipped.
"""

import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.support import nodes
from tests.support.nodes import Nodes, joined, pull

pytestmark = pytest.mark.slow

TIMEOUT = 12
TRAIN = (
    "train",
    "tracking=none",
    "panel.every=0",
    "cpu=true",
    "data.count=200",
    "optim.batch_size=2",
    "optim.pairs_per_step=4",
    "checkpoint_every=20",
    "log_every=20",
    f"ranks_timeout={TIMEOUT}",
)
RESUMES = "and the same command resumes"


@pytest.fixture(autouse=True)
def cable():
    """Two nodes with a cable between them."""
    why = nodes.why_not()
    if why:
        pytest.skip(why)
    with joined():
        yield


def shared(folder):
    """Two nodes with one disk."""
    return Nodes([folder, folder])


def apart(folder):
    """Two nodes with a disk each."""
    return Nodes([folder / "a", folder / "b"])


def weights(folder, name):
    return load_file(
        folder / "runs" / "train" / name / "anchor" / "pytorch_lora_weights.safetensors"
    )


def test_a_cable_that_is_pulled_ends_both_nodes(tmp_path):
    command = (*TRAIN, "steps=3000", "name=pulled")
    both = shared(tmp_path)
    both.start(command)
    both.wait_for("a", r" 40/3000")
    pull()
    seconds = both.end()
    assert max(seconds.values()) < 6 * TIMEOUT
    told = both.said("a") + both.said("b")
    assert "has been silent for" in told
    assert RESUMES in told


def test_a_node_that_is_refused_at_its_start_ends_the_other_with_its_number(tmp_path):
    both = shared(tmp_path)
    both.start((*TRAIN, "steps=20", "name=one"), (*TRAIN, "steps=20", "name=one", "nosuchkey=1"))
    seconds = both.end()
    assert seconds["a"] < 6 * TIMEOUT
    assert "there is no setting nosuchkey" in both.said("b")
    assert "of 2 ranks, rank 1 did not come within" in both.said("a")


def test_a_stopped_node_and_a_signal_end_the_run_at_once(tmp_path):
    command = (*TRAIN, "steps=3000", "name=stopped", "ranks_timeout=200")
    both = shared(tmp_path)
    both.start(command)
    both.wait_for("a", r" 40/3000")
    both.signal_worker("b", signal.SIGSTOP)
    both.signal_worker("a", signal.SIGTERM)
    both.processes["a"].wait(timeout=90)
    assert "rank 1 (" in both.said("a")
    assert RESUMES in both.said("a")
    both.kill()


def test_a_node_killed_without_a_shared_disk_is_not_resumed_as_another_model(tmp_path):
    command = (*TRAIN, "steps=3000", "name=apart")
    both = apart(tmp_path)
    both.start(command)
    both.wait_for("a", r" 60/3000")
    both.signal_worker("b", signal.SIGKILL)
    both.end()
    assert "rank 1 (" in both.said("a")

    # The same command again: node b has no checkpoint, and rank 0's is what counts.
    both.start(command)
    both.end()
    for side in ("a", "b"):
        assert "give all machines one disk for the runs, or copy rank 0's run directory" in (
            both.said(side)
        )


def test_two_nodes_train_what_one_machine_trains_and_sample_where_both_see_it(tmp_path):
    command = (*TRAIN, "steps=20", "name=whole")
    both = shared(tmp_path / "two")
    both.start(command)
    both.end()
    alone = shared(tmp_path / "two-again")
    alone.start(command)
    alone.end()
    first = weights(tmp_path / "two", "whole")
    second = weights(tmp_path / "two-again", "whole")
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)

    # Without a shared disk nothing is sampled.
    separate = Nodes([tmp_path / "two", tmp_path / "elsewhere"])
    anchor = tmp_path / "two" / "runs" / "train" / "whole" / "anchor"
    sample = ("sample", f"anchor={anchor}", "tracking=none", "lambdas=[0,1]", "prompts_limit=4")
    separate.start((*sample, "steps=2", "name=grid"))
    separate.end()
    for side in ("a", "b"):
        assert "process 1 of 2 does not see" in separate.said(side)
    assert not list((tmp_path / "two" / "runs" / "sample").rglob("*.png"))
