"""`optim.batch_size=auto`: what it takes, says, records and refuses."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from deradiff.worlds import shapes
from tests.support.train_runs import go
from train import batch_size
from train.build import base_model
from train.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from train.estimate import step_requirements
from train.needs_config import NeedsConfig


@pytest.fixture
def auto(train_config):
    """A run whose batch size follows from memory."""
    return replace(train_config, optim=replace(train_config.optim, batch_size="auto"))


@pytest.fixture(scope="module")
def counted():
    """The needs of steps that tests of this file have counted, by all that they follow from."""
    return {}


@pytest.fixture(autouse=True)
def needs(counted, monkeypatch):
    """`step_requirements`, which takes long, once for the same step."""

    def remembered(config, base):
        parts = (base.location, config.model, config.finetune, config.optim)
        key = repr((parts, config.steps, config.precision, config.cpu))
        if key not in counted:
            counted[key] = step_requirements(config, base)
        return counted[key]

    monkeypatch.setattr(batch_size, "step_requirements", remembered)
    return remembered


def chosen(folder):
    return json.loads((folder.parent / "batch_size.json").read_text())["batch_size"]


def test_on_a_cpu_it_follows_from_the_estimate_and_stays_with_the_run(auto, capsys, monkeypatch):
    folder = go(auto)
    assert "batches of 4 pairs, by the estimate and the free memory" in capsys.readouterr().out
    assert chosen(folder) == 4

    # The run goes on with less memory.
    (folder.parent / "finished.json").unlink()
    monkeypatch.setattr(batch_size, "device_memory", lambda device: 1.0)
    go(auto)
    assert "batches of 4 pairs, as this run has begun" in capsys.readouterr().out
    other = go(replace(auto, name="other"))
    assert chosen(other) == 1


def test_the_estimate_grows_with_the_batch(auto, needs):
    base = base_model(auto)
    memories = []
    for size in (1, 2, 4):
        memories.append(needs(batch_size.with_batch_size(auto, size), base).memory)
    assert memories[0] < memories[1] < memories[2]
    assert batch_size.sizes_that_may_fit(auto, base, 1, 1.01 * memories[1]) == [2, 1]
    assert batch_size.sizes_that_may_fit(auto, base, 1, 1.01 * memories[0]) == [1]


def test_a_device_with_an_allocator_is_tried(auto, monkeypatch, capsys):
    def attempt(objective, examples, accelerator, reserved, size):
        assert reserved > 0
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(batch_size, "attempt", attempt)
    monkeypatch.setattr(batch_size, "device_memory", lambda device: 1e12)
    monkeypatch.setattr(batch_size, "_agreed", lambda number, accelerator: number)
    accelerator = SimpleNamespace(device=device, num_processes=1, is_main_process=True)
    network = torch.nn.Linear(2, 2)
    choose = partial(batch_size.choose_batch_size, auto, base_model(auto))
    objective = SimpleNamespace(network=network)
    assert choose(objective, None, Path(auto.runs), accelerator) == 2
    assert "batches of 2 pairs, the most that fit, of 4 at most" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_network_in_shards_is_refused(auto, kind):
    with pytest.raises(ValueError, match=r"optim\.batch_size=auto tries the whole network"):
        batch_size.check_auto(auto, SimpleNamespace(distributed_type=kind))


def test_what_is_no_batch_size_is_refused():
    for wrong in ("many", 0, 1.5, True):
        with pytest.raises(ValueError, match="must be a number of pairs or auto, not"):
            OptimConfig(batch_size=wrong)
    with pytest.raises(ValueError, match=r"optim\.batch_size=auto is for objective=dpo"):
        TrainConfig(objective="contrastive", optim=OptimConfig(batch_size="auto"))
    base = ModelConfig(base="asset:shapes/base")
    with pytest.raises(ValueError, match="and here several are compared"):
        NeedsConfig(model=base, optim=OptimConfig(batch_size="auto"))


def test_a_dry_run_says_what_would_be_tried_first(auto, tmp_path, capsys):
    shapes.write_pairs(tmp_path / "pairs.parquet", 6, seed=0)
    data = DataConfig(source="table", path=str(tmp_path / "pairs.parquet"), dry_run=True)
    go(replace(auto, data=data))
    assert "the work of 4 pairs" in capsys.readouterr().out
