"""A run that is killed at random moments ends with the weights of one that nobody disturbed.

Some of the kills come in the middle of the write of a checkpoint.
"""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from deradiff.training.checkpoints import Checkpoints
from deradiff.training.loop import train
from tests.support.processes import start, succeeds
from tests.support.regression import Regression, examples, options
from tests.support.train_runs import go


def killed_run(work, kills: int, run_dir: Path, seed: int = 0) -> tuple[int, int]:
    """Start a process and kill it, several times, then let it end.

    A kill waits until the run has got further than it was, and then for a random moment; every
    second one waits until a checkpoint is being written. By the clock alone a busy machine would
    kill all of them before the first step.

    Args:
        work: what the process does.
        kills: how often it is killed.
        run_dir: the run directory of `work`.
        seed: of the random moments.

    Returns:
        How many kills left half a checkpoint, and how many processes left a whole one.
    """
    moments = random.Random(seed)
    half = 0
    whole = 0
    for kill in range(kills):
        process = start(work)
        before = newest(run_dir)
        wait_until(lambda before=before: newest(run_dir) != before)
        if kill % 2:
            wait_until((run_dir / "checkpoints/.part").exists)
        else:
            time.sleep(moments.uniform(0, 0.02))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), "it ended before all kills were made: ask for more steps"
        half += (run_dir / "checkpoints/.part").exists()
        whole += newest(run_dir) is not None

    assert succeeds(work)
    half += (run_dir / "checkpoints/.part").exists()
    whole += newest(run_dir) is not None
    return half, whole


def newest(run_dir):
    return Checkpoints(run_dir, 2).newest()


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.0005)


def test_five_kills(tmp_path):
    wanted = options(steps=100, checkpoint_every=1, keep_best=1)
    run_dir = tmp_path / "killed"

    def work():
        train(Regression(), examples(), wanted, run_dir, Accelerator(cpu=True))

    whole = Regression()
    train(whole, examples(), wanted, tmp_path / "whole", Accelerator(cpu=True))
    half_written, written = killed_run(work, 5, run_dir)
    assert half_written >= 1
    assert written == 6
    killed = load_file(newest(run_dir) / "weights.safetensors")
    assert all(torch.equal(killed[name], p) for name, p in whole.network.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, file",
    [
        ("lora", "pytorch_lora_weights.safetensors"),
        ("full", "unet/diffusion_pytorch_model.safetensors"),
    ],
)
def test_twenty_kills_of_the_stage(train_config, method, file):
    tuned = replace(train_config.finetune, method=method)
    config = replace(train_config, steps=120, checkpoint_every=1, finetune=tuned)
    killed = replace(config, name="killed")
    run_dir = Path(config.runs) / "train/killed"
    whole = go(replace(config, name="whole"))
    half_written, written = killed_run(lambda: go(killed), 20, run_dir, seed=1)
    assert half_written >= 5
    assert written == 21
    expected = load_file(whole / file)
    ended = load_file(run_dir / "anchor" / file)
    assert expected.keys() == ended.keys()
    assert all(torch.equal(expected[key], ended[key]) for key in expected)
