"""`hydra/launcher=submitit_local`: what the Slurm launcher does, on this machine.

A job for each value of a sweep, with two tasks that form one process group.
"""

import pytest

pytest.importorskip(
    "hydra_plugins.hydra_submitit_launcher", reason="pip install 'deradiff[cluster]'"
)

SWEEP = (
    "--multirun",
    "hydra/launcher=submitit_local",
    "hydra.launcher.timeout_min=5",
    "dpo.beta=5,7",
)


def test_each_task_of_a_cluster_job_knows_its_rank_and_runs_the_stage(toy):
    done = toy(*SWEEP, "hydra.launcher.tasks_per_node=2", "data=ranks")
    assert done.returncode == 0, done.err
    files = sorted(file.name for file in toy.folder.glob("rank-*"))
    assert files == ["rank-5-0-of-2", "rank-5-1-of-2", "rank-7-0-of-2", "rank-7-1-of-2"]


def test_a_value_that_fails_in_its_job_is_told(toy):
    done = toy(*SWEEP, "data=none")
    assert done.returncode != 0
    assert "there is no data" in done.err
