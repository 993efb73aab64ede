"""Checkpoints: torn ones are skipped, and the newest and the best stay."""

import torch
from accelerate import Accelerator

from deradiff.training.checkpoints import Checkpoints
from deradiff.training.loop import train
from tests.support.regression import Regression, examples, options, weights


def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capsys):
    whole = Regression()
    train(whole, examples(), options(), tmp_path, Accelerator(cpu=True))
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert [folder.name for folder in checkpoints.whole()] == ["step-000010", "step-000012"]
    (checkpoints.folder / ".part").mkdir()
    (checkpoints.folder / "step-000099").mkdir()
    assert checkpoints.newest().name == "step-000012"

    for name in ("weights.safetensors", "optimizer.pt", "progress.json"):
        file = checkpoints.newest() / name
        file.write_bytes(file.read_bytes()[:-20])
        again = Regression()
        train(again, examples(), options(), tmp_path, Accelerator(cpu=True))
        assert "step-000012 is torn and is skipped" in capsys.readouterr().err, name
        assert len(again.seen) == 8, name
        assert torch.equal(weights(whole), weights(again))


def test_the_newest_and_the_best_checkpoints_stay(tmp_path):
    class Rising(Regression):
        def loss(self, network, batch):
            loss, terms = super().loss(network, batch)
            return loss * 0 + abs(len(self.seen) / 4 - 4), terms  # the lowest at step 4

    wanted = options(checkpoint_every=2, keep_last=1, keep_best=1)
    train(Rising(), examples(), wanted, tmp_path, Accelerator(cpu=True))
    assert [folder.name for folder in Checkpoints(tmp_path, 1).whole()] == [
        "step-000004",
        "step-000012",
    ]
