"""Artifacts have names that W&B takes, whatever a folder is called."""

import pytest

from configs.wandb_tracker import WandbTracker


class Run:
    """A run that keeps what is logged."""

    def __init__(self):
        self.names = []

    def log_artifact(self, artifact):
        self.names.append(artifact.name)


@pytest.mark.parametrize("name", ["samples-epoch=3-step=500", "a b/c:d@e", "日本", "x" * 300])
def test_an_artifact_is_logged_whatever_its_name(tmp_path, name):
    (tmp_path / "card.json").write_text("{}")
    run = Run()
    WandbTracker(run).artifact(name, "anchor", tmp_path)
    assert len(run.names) == 1
