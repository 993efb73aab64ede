"""The reference's errors: kept by the first run, read by the others, with the same losses."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deradiff.data.pairs import Pairs
from deradiff.data.reference_errors import RECORD, ReferenceErrors, reference_key
from deradiff.worlds import shapes
from tests.support.objectives import disturb, items, make
from tests.support.train_runs import go
from train.config import DPOConfig, FinetuneConfig


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twelve pairs of the shapes world."""
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    shapes.write_pairs(path, 12, seed=0)
    return Pairs(str(path))


# The store


def test_what_was_kept_is_read_and_the_rest_is_unknown(tmp_path):
    errors = ReferenceErrors(tmp_path, "key")
    assert errors.get([(0, 3)]).isnan().all()
    assert not errors.covers(np.array([0]), np.array([3]))
    errors.add([(0, 3), (2, 7)], torch.tensor([[0.5, 1.5], [2.5, torch.pi]]))
    errors.add([(1, 3)], torch.tensor([[9.0], [8.0]]))
    errors.flush()

    again = ReferenceErrors(tmp_path, "key")
    stored = again.get([(2, 7), (0, 7), (1, 3)])
    assert torch.equal(stored[:, [0, 2]], torch.tensor([[1.5, 9.0], [torch.pi, 8.0]]))
    assert stored[:, 1].isnan().all()
    assert again.covers(np.array([0, 2, 1]), np.array([3, 7, 3]))
    assert not again.covers(np.array([0, 0]), np.array([3, 7]))
    assert ReferenceErrors(tmp_path, "another key").get([(0, 3)]).isnan().all()


def test_errors_that_are_not_finite_are_not_kept(tmp_path):
    errors = ReferenceErrors(tmp_path, "key")
    errors.add([(0, 0), (0, 1), (0, 2)], torch.tensor([[1.0, torch.inf, 3.0], [1.0, 2.0, 3.0]]))
    errors.flush()
    assert len(errors.file.read_bytes()) == 2 * RECORD.itemsize
    assert ReferenceErrors(tmp_path, "key").covers(np.zeros(2, int), np.array([0, 2]))


def test_a_record_that_was_cut_or_changed_is_not_read(tmp_path):
    errors = ReferenceErrors(tmp_path, "key")
    errors.add([(0, 0), (0, 2)], torch.tensor([[1.0, 3.0], [1.0, 3.0]]))
    errors.flush()
    complete = errors.file.read_bytes()
    cut = complete[:-1]
    empty = complete[: RECORD.itemsize] + b"\0" * RECORD.itemsize
    changed = complete[:-6] + b"?" + complete[-5:]
    for content in (cut, empty, changed):
        errors.file.write_bytes(content)
        stored = ReferenceErrors(tmp_path, "key").get([(0, 0), (0, 2)])
        assert not stored[:, 0].isnan().any()
        assert stored[:, 1].isnan().all()


def test_errors_of_many_batches_are_written_together(tmp_path, monkeypatch):
    """And all that is held back by `flush`."""
    monkeypatch.setattr("deradiff.data.reference_errors.HELD_BACK", 2)
    errors = ReferenceErrors(tmp_path, "key")
    sizes = []
    for index in range(4):
        errors.add([(0, index)], torch.tensor([[1.0], [2.0]]))
        size = errors.file.stat().st_size if errors.file.is_file() else 0
        sizes.append(size // RECORD.itemsize)
    assert sizes == [0, 0, 3, 3]
    errors.flush()
    assert ReferenceErrors(tmp_path, "key").covers(np.zeros(4, int), np.arange(4))


KEY_PARTS = {
    "reference": "w",
    "encodings": "e",
    "noising": "n",
    "seed": 0,
    "caption_dropout": 0.1,
    "flip": False,
    "precision": "no cpu",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reference", "x"),
        ("encodings", "x"),
        ("noising", "x"),
        ("seed", 1),
        ("caption_dropout", 0.2),
        ("flip", True),
        ("precision", "bf16 cpu"),
    ],
)
def test_the_key_names_all_that_the_errors_depend_on(name, value):
    assert reference_key(**KEY_PARTS | {name: value}) != reference_key(**KEY_PARTS)


# The objective


def loss_of(objective, pairs, count=4, epoch=0):
    """Loss and metrics of the first pairs."""
    batch = objective.collate(items(pairs, count, epoch))
    return objective.loss(objective.network, batch)


@pytest.mark.parametrize(
    ("family", "method"), [("sd15", "full"), ("sdxl", "lora"), ("flux", "lora"), ("sd3", "full")]
)
def test_losses_are_the_same_bit_for_bit_read_or_evaluated(tmp_path, pairs, family, method):
    _, plain = make(family, method, dropout=0.5)
    _, first = make(family, method, dropout=0.5, errors=ReferenceErrors(tmp_path, family))
    plain_loss, _ = loss_of(plain, pairs, epoch=1)
    first_loss, _ = loss_of(first, pairs, epoch=1)
    assert torch.equal(plain_loss, first_loss)
    first.errors.flush()

    # A run that finds all errors keeps no reference
    errors = ReferenceErrors(tmp_path, family)
    _, second = make(family, method, dropout=0.5, errors=errors, complete=True)
    assert second.copy is None
    assert second.frozen.count(None) == 0
    second.reference = None  # whoever asks for it fails

    disturb(plain, method)
    disturb(second, method)
    loss, terms = loss_of(plain, pairs, epoch=1)
    loss_as_read, terms_as_read = loss_of(second, pairs, epoch=1)
    assert torch.equal(loss, loss_as_read)
    assert torch.equal(terms["reference_mse"], terms_as_read["reference_mse"])


def test_a_batch_that_is_half_known_is_evaluated_and_completed(tmp_path, pairs):
    _, first = make("sd15", "lora", errors=ReferenceErrors(tmp_path, "key"))
    loss_of(first, pairs, count=2)
    first.errors.flush()

    _, second = make("sd15", "lora", errors=ReferenceErrors(tmp_path, "key"))
    batch = second.collate(items(pairs, 4))
    assert not batch["known"]
    assert batch["reference_error"].isnan().sum() == 4
    second.loss(second.network, batch)
    second.errors.flush()
    assert ReferenceErrors(tmp_path, "key").covers(np.zeros(4, int), np.arange(4))


# Runs

METRICS = ("loss", "margin", "reference_mse", "winner_vs_reference", "grad_norm")


def metrics(anchor):
    """The metrics of a run, by the folder of its anchor."""
    rows = []
    for line in (anchor.parent / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        rows.append([values[name] for name in METRICS])
    return rows


def weights(anchor):
    return load_file(next(anchor.rglob("*.safetensors")))


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_another_beta_ends_with_the_weights_that_it_would_have_without_the_store(
    train_config, method, capsys
):
    config = replace(train_config, finetune=FinetuneConfig(method=method))
    without_store = DPOConfig(beta=900.0, reference_errors=False)
    plain = go(replace(config, name="off", dpo=without_store))
    first = go(config)
    assert "all known" not in capsys.readouterr().out

    second = go(replace(config, dpo=DPOConfig(beta=900.0)))
    assert "the reference's errors are all known" in capsys.readouterr().out
    assert first != second
    assert metrics(plain) == metrics(second)
    expected = weights(plain)
    for name, weight in weights(second).items():
        assert torch.equal(weight, expected[name])


RANKS = """
import sys
from pathlib import Path

from accelerate import Accelerator

from deradiff.data.pairs import Pairs
from deradiff.data.reference_errors import ReferenceErrors
from tests.support.objectives import items, make

root = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
pairs = Pairs(str(root / "pairs.parquet"))
losses = []
for sitting in range(2):
    _, objective = make("sd15", "lora", errors=ReferenceErrors(root, "key"))
    evaluations = []
    reference = objective.reference

    def counted_reference():
        evaluations.append(1)
        return reference()

    objective.reference = counted_reference
    batch = objective.collate(items(pairs)[2 * rank : 2 * rank + 2])
    losses.append(objective.loss(objective.network, batch)[0].item())
    # The first sitting evaluates the reference, the second one reads its errors.
    assert len(evaluations) == 1 - sitting
    objective.errors.flush()
    accelerator.wait_for_everyone()

# If one rank lacks errors, both evaluate, because a sharded network must be called by all.
batch["known"] = rank == 0
objective.loss(objective.network, batch)
assert len(evaluations) == 1
assert losses[0] == losses[1]
"""


@pytest.mark.slow
def test_two_ranks_keep_what_two_ranks_read(tmp_path):
    shapes.write_pairs(tmp_path / "pairs.parquet", 8, seed=0)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, "--nproc_per_node", "2", str(script), str(tmp_path)]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("reference-*/*.bin"))) == 2
