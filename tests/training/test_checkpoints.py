"""Checkpoints: torn ones are skipped, and the newest and the best stay."""

import json

import pytest
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


def test_no_changed_bit_of_a_checkpoints_progress_is_believed(tmp_path, capsys):
    written = train(Regression(), examples(), options(), tmp_path, Accelerator(cpu=True))
    file = Checkpoints(tmp_path, 2).newest() / "progress.json"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        progress = Checkpoints(tmp_path, 2).resume(lambda folder: None)
        # The last digits of a number may change nothing.
        assert progress.step == 10 or progress == written, f"bit {bit}"
    assert "progress.json: it is not what was written" in capsys.readouterr().err

    # One of an earlier version has no digest.
    values = json.loads(whole)
    del values["digest"]
    file.write_text(json.dumps(values))
    assert Checkpoints(tmp_path, 2).resume(lambda folder: None).step == 12


def test_an_older_torn_checkpoint_does_not_end_the_run(tmp_path):
    train(Regression(), examples(), options(steps=10), tmp_path, Accelerator(cpu=True))
    checkpoints = Checkpoints(tmp_path, 2)
    (checkpoints.whole()[0] / "progress.json").write_text("{torn")
    (checkpoints.folder / "step-000005.bak").mkdir()
    (checkpoints.folder / "step-000005.bak/progress.json").write_text("{}")
    again = Regression()
    train(again, examples(), options(keep_best=1), tmp_path, Accelerator(cpu=True))
    assert checkpoints.newest().name == "step-000012"


def test_a_full_disk_keeps_the_older_checkpoints_and_is_one_sentence(tmp_path, monkeypatch):
    train(Regression(), examples(), options(steps=10), tmp_path, Accelerator(cpu=True))

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match=r"checkpoints/.part cannot be written .* make room"):
        train(Regression(), examples(), options(), tmp_path, Accelerator(cpu=True))
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000005", "step-000010"]
    whole = Regression()
    resumed = Regression()
    train(resumed, examples(), options(), tmp_path, Accelerator(cpu=True))
    train(whole, examples(), options(), tmp_path / "whole", Accelerator(cpu=True))
    assert torch.equal(weights(whole), weights(resumed))


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
