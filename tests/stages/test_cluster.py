"""`hydra/launcher=submitit_local`: what the Slurm launcher does, on this machine; a value, two tasks, one world."""

import pytest

from tests.stages.test_entry import toy  # noqa: F401  (a fixture)

pytest.importorskip(
    "hydra_plugins.hydra_submitit_launcher", reason="pip install 'deradiff[cluster]'"
)


def test_each_task_of_a_cluster_job_knows_its_rank_and_runs_the_stage(toy):  # noqa: F811
    done = toy(
        "--multirun",
        "hydra/launcher=submitit_local",
        "hydra.launcher.tasks_per_node=2",
        "hydra.launcher.timeout_min=5",
        "data=ranks",
        "dpo.beta=5,7",
    )
    assert done.returncode == 0, done.err
    found = sorted(p.name for p in toy.folder.glob("rank-*"))
    assert found == [f"rank-{beta}-{rank}-of-2" for beta in (5, 7) for rank in (0, 1)]


def test_a_value_that_fails_in_its_job_is_told(toy):  # noqa: F811
    done = toy(
        "--multirun",
        "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=5",
        "data=none",
        "dpo.beta=5,7",
    )
    assert done.returncode != 0 and "there is no data" in done.err
