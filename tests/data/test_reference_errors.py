"""The reference's errors: kept by the first run, read by the others, and the losses are the same."""

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
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    shapes.write_pairs(path, 12, seed=0)
    return Pairs(str(path))


def test_what_was_kept_is_read_and_the_rest_is_not_known(tmp_path):
    errors = ReferenceErrors(tmp_path, "key")
    assert errors.get([(0, 3)]).isnan().all() and not errors.covers(np.array([0]), np.array([3]))
    errors.add([(0, 3), (2, 7)], torch.tensor([[0.5, 1.5], [2.5, torch.pi]]))
    errors.add([(1, 3)], torch.tensor([[9.0], [8.0]]))
    errors.flush()
    again = ReferenceErrors(tmp_path, "key")
    found = again.get([(2, 7), (0, 7), (1, 3)])
    assert (
        torch.equal(found[:, [0, 2]], torch.tensor([[1.5, 9.0], [torch.pi, 8.0]]))
        and found[:, 1].isnan().all()
    )
    assert again.covers(np.array([0, 2, 1]), np.array([3, 7, 3])) and not again.covers(
        np.array([0, 0]), np.array([3, 7])
    )
    assert ReferenceErrors(tmp_path, "another key").get([(0, 3)]).isnan().all()


def test_a_torn_record_and_one_that_is_not_finite_are_none(tmp_path):
    errors = ReferenceErrors(tmp_path, "key")
    errors.add([(0, 0), (0, 1), (0, 2)], torch.tensor([[1.0, torch.inf, 3.0], [1.0, 2.0, 3.0]]))
    errors.flush()
    whole = errors.file.read_bytes()
    assert len(whole) == 2 * RECORD.itemsize and ReferenceErrors(tmp_path, "key").covers(
        np.zeros(2, int), np.array([0, 2])
    )
    for torn in (
        whole[:-1],
        whole[: RECORD.itemsize] + b"\0" * RECORD.itemsize,
        whole[:-6] + b"?" + whole[-5:],
    ):
        errors.file.write_bytes(torn)
        found = ReferenceErrors(tmp_path, "key").get([(0, 0), (0, 2)])
        assert not found[:, 0].isnan().any() and found[:, 1].isnan().all()


@pytest.mark.parametrize(
    "family, method", [("sd15", "full"), ("sdxl", "lora"), ("flux", "lora"), ("sd3", "full")]
)
def test_losses_are_the_same_bit_for_bit_read_or_evaluated(tmp_path, pairs, family, method):
    _, plain = make(family, method, dropout=0.5)
    _, first = make(family, method, dropout=0.5, errors=ReferenceErrors(tmp_path, family))
    losses = [o.loss(o.network, o.collate(items(pairs, 4, epoch=1)))[0] for o in (plain, first)]
    assert torch.equal(*losses)
    first.errors.flush()
    _, second = make(
        family, method, dropout=0.5, errors=ReferenceErrors(tmp_path, family), complete=True
    )
    assert second.copy is None and second.frozen.count(None) == 0
    second.reference = None  # whoever asks for it fails
    for objective in (plain, second):
        disturb(objective, method)
    (loss, terms), (again, read) = (
        o.loss(o.network, o.collate(items(pairs, 4, epoch=1))) for o in (plain, second)
    )
    assert torch.equal(loss, again) and torch.equal(terms["reference_mse"], read["reference_mse"])


def test_a_batch_that_is_half_known_is_evaluated_and_completed(tmp_path, pairs):
    _, objective = make("sd15", "lora", errors=ReferenceErrors(tmp_path, "key"))
    objective.loss(objective.network, objective.collate(items(pairs, 2)))
    objective.errors.flush()
    _, second = make("sd15", "lora", errors=ReferenceErrors(tmp_path, "key"))
    batch = second.collate(items(pairs, 4))
    assert not batch["known"] and batch["reference_error"].isnan().sum() == 4
    second.loss(second.network, batch)
    second.errors.flush()
    assert ReferenceErrors(tmp_path, "key").covers(np.zeros(4, int), np.arange(4))


def test_the_key_tells_all_that_the_numbers_depend_on():
    whole = {
        "reference": "w",
        "encodings": "e",
        "noising": "n",
        "seed": 0,
        "caption_dropout": 0.1,
        "flip": False,
        "precision": "no cpu",
    }
    changed = {
        "reference": "x",
        "encodings": "x",
        "noising": "x",
        "seed": 1,
        "caption_dropout": 0.2,
        "flip": True,
        "precision": "bf16 cpu",
    }
    keys = {reference_key(**(whole | {name: value})) for name, value in changed.items()} | {
        reference_key(**whole)
    }
    assert len(keys) == 8


def metrics(folder):
    kept = ("loss", "margin", "reference_mse", "winner_vs_reference", "grad_norm")
    return [
        [json.loads(line)[k] for k in kept]
        for line in (folder.parent / "metrics.jsonl").read_text().splitlines()
    ]


def weights(folder):
    return load_file(next(file for file in folder.rglob("*.safetensors")))


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_another_beta_ends_with_the_weights_that_it_would_have_without_the_store(
    train_config, method, capsys
):
    tuned = replace(train_config, finetune=FinetuneConfig(method=method))
    plain, first = (
        go(replace(tuned, name="off", dpo=DPOConfig(beta=900.0, reference_errors=False))),
        go(tuned),
    )
    assert "all known" not in capsys.readouterr().out
    second = go(replace(tuned, dpo=DPOConfig(beta=900.0)))
    assert "the reference's errors are all known" in capsys.readouterr().out and first != second
    assert metrics(plain) == metrics(second)
    expected, found = weights(plain), weights(second)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.slow
def test_two_ranks_keep_what_two_ranks_read(tmp_path):
    script = """
import sys, torch
from pathlib import Path
from accelerate import Accelerator
sys.path.insert(0, "tests")
from tests.training.test_objectives import items, make
from deradiff.data.pairs import Pairs
from deradiff.data.reference_errors import ReferenceErrors
accelerator, root = Accelerator(cpu=True), Path(sys.argv[1])
pairs, losses, rank = Pairs(str(root / "pairs.parquet")), [], accelerator.process_index
for sitting in range(2):
    _, objective = make("sd15", "lora", errors=ReferenceErrors(root, "key"))
    asked = []
    reference = objective.reference
    objective.reference = lambda: (asked.append(1), reference())[1]
    batch = objective.collate(items(pairs)[2 * rank : 2 * rank + 2])
    losses.append(objective.loss(objective.network, batch)[0].item())
    assert len(asked) == 1 - sitting, asked
    objective.errors.flush()
    accelerator.wait_for_everyone()
known = {"known": rank == 0}  # one rank lacks them: both evaluate, as a sharded network needs
objective.loss(objective.network, batch | known)
assert len(asked) == 1 and losses[0] == losses[1]
"""
    shapes.write_pairs(tmp_path / "pairs.parquet", 8, seed=0)
    (tmp_path / "ranks.py").write_text(script)
    root = Path(__file__).parents[2]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "ranks.py"),
        str(tmp_path),
    ]
    done = subprocess.run(run, env=env, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("reference-*/*.bin"))) == 2
