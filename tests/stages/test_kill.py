"""Killed at random moments, in the middle of checkpoint writes too, a run ends with the weights of one that nobody disturbed."""

import os
import random
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from deradiff.training.checkpoints import Checkpoints
from deradiff.training.loop import train
from tests.support.regression import Regression, examples, options
from tests.support.train_runs import go


def killed_run(work, kills: int, run_dir: Path, seed: int = 0) -> tuple[int, int]:
    """Fork `work` and kill it, as often as asked, then let it end. How many kills met half a checkpoint, and how many half a run.

    A kill waits until the run has got further than it was, and then for a random moment; every second one, until a checkpoint is being
    written: by the clock alone a busy machine would kill all of them before the first step.
    """
    moments, torn, begun = random.Random(seed), 0, 0
    for kill in range(kills + 1):
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if kill < kills:
            before = Checkpoints(run_dir, 2).newest()
            wait_for(lambda: Checkpoints(run_dir, 2).newest() != before)  # noqa: B023
            if kill % 2:
                wait_for((run_dir / "checkpoints/.part").exists)
            else:
                time.sleep(moments.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert kill == kills or os.WIFSIGNALED(status), (
            "it ended before all kills were made: ask for more steps"
        )
        torn += (run_dir / "checkpoints/.part").exists()
        begun += Checkpoints(run_dir, 2).newest() is not None
    assert os.WEXITSTATUS(status) == 0
    return torn, begun


def wait_for(seen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not seen() and time.monotonic() < end:
        time.sleep(0.0005)


def test_five_kills(tmp_path):
    steps = {"steps": 100, "checkpoint_every": 1, "keep_best": 1}
    train(
        whole := Regression(),
        examples(),
        options(**steps),
        tmp_path / "whole",
        Accelerator(cpu=True),
    )
    run_dir = tmp_path / "killed"
    torn, begun = killed_run(
        lambda: train(Regression(), examples(), options(**steps), run_dir, Accelerator(cpu=True)),
        5,
        run_dir,
    )
    assert torn >= 1 and begun == 6
    ended = load_file(Checkpoints(run_dir, 2).newest() / "weights.safetensors")
    assert all(torch.equal(ended[name], p) for name, p in whole.network.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_twenty_kills_of_the_stage(train_config, method):
    from dataclasses import replace

    train_config = replace(
        train_config,
        steps=120,
        checkpoint_every=1,
        finetune=replace(train_config.finetune, method=method),
    )
    killed = replace(train_config, name="killed")
    whole, run_dir = (
        go(replace(train_config, name="whole")),
        Path(train_config.runs) / "train/killed",
    )
    torn, begun = killed_run(lambda: go(killed), 20, run_dir, seed=1)
    assert torn >= 5 and begun == 21
    file = (
        "pytorch_lora_weights.safetensors"
        if method == "lora"
        else "unet/diffusion_pytorch_model.safetensors"
    )
    a, b = load_file(whole / file), load_file(run_dir / "anchor" / file)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
