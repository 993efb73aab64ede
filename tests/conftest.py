"""The whole suite runs without a network, and on one thread.

Parallel sums would differ between machines, and the cores are shared.
"""

from __future__ import annotations

import functools
import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

# The imports inside the fixtures stand there because diffusers, which they load, takes seconds:
# a test file that needs no pipeline starts at once.
torch.set_num_threads(1)

# The libraries are a million objects, which Python's collector would go through again and again.
# It is off while they are imported; then it leaves them alone, and looks less often at the others.
gc.disable()


def pytest_collection_finish() -> None:
    """Collect from now on what tests leave."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    gc.enable()


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """Tiny pipelines of both families with anchors on disk; shared, not to be changed."""
    from tests.support.realign_world import make_worlds

    return make_worlds(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(params=["sd15", "sdxl"])
def world(request, worlds):
    """A copy, for the test's own, of each family's pipeline in turn."""
    return worlds[request.param].copy()


@pytest.fixture
def sd15(worlds):
    """The same of SD1.5 alone."""
    return worlds["sd15"].copy()


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """`bases(family)` is the folder of a tiny pipeline; shared, not to be changed."""
    from tests.support.tiny_pipelines import save_tiny

    root = tmp_path_factory.mktemp("bases")
    return functools.cache(lambda family: save_tiny(family, root / family))


@pytest.fixture(scope="session")
def base_folder(bases):
    """A tiny SD1.5 pipeline on disk, the base model of training runs; not to be changed."""
    return bases("sd15")


@pytest.fixture
def train_config(base_folder, tmp_path):
    """The config of a small run of the train stage, whose runs lie below tmp_path."""
    from tests.support.train_runs import small_run

    return small_run(base_folder, tmp_path)


@pytest.fixture
def counting_scorer(monkeypatch):
    """A scorer that stands behind every name of a scorer, and counts what it scores."""
    from tests.support.sampled_runs import Colourful

    scorer = Colourful()
    monkeypatch.setattr("eval.stage.check_spec", lambda spec: None)
    for module in ("scoring", "properties"):
        monkeypatch.setattr(f"deradiff.evaluation.{module}.load_spec", lambda spec, device: scorer)
    return scorer
