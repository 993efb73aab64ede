"""DeepSpeed's ZeRO trains as DDP does, on two CPU ranks; what it cannot do is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deradiff.training.zero import Zero
from tests.support.regression import options
from tests.support.train_runs import go
from tests.support.zero_runs import DDP, RUNS, Result

ROOT = Path(__file__).parents[2]
ROUNDING = 1e-3
"""How far apart two runs in float32 may end, as a share of what training moved.

Sums of two ranks differ in their last bits, and AdamW divides by the size of the gradient.
"""


def keys():
    """The runs of `tests.support.zero_runs`, each with under what it begins and ends."""
    for name, run in RUNS.items():
        for stage in run.stages:
            ways = [f"{DDP}{stage}", f"{stage}{DDP}"] if run.moved else [f"{stage}{stage}"]
            for way in ways:
                yield f"{name} {way}"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What all runs under ZeRO have in common with those under DDP."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: type pip install 'deradiff[deepspeed]'")
    folder = tmp_path_factory.mktemp("zero")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.support.zero_runs", str(folder)],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        # DeepSpeed compiles a small library when it first runs on a CPU.
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "results.json").read_text())
    return {key: Result(**values) for key, values in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("key", keys())
def test_a_run_under_zero_ends_as_under_ddp(results, key):
    result = results[key]
    assert result.loss == pytest.approx(1, rel=1e-5)
    # ZeRO 3 has a backward pass of its own for linear layers, which rounds otherwise in bf16.
    rounds_otherwise = "bf16" in key and key.endswith("3")
    assert result.norm == pytest.approx(1, rel=0.05 if rounds_otherwise else 1e-5)
    assert result.apart < (0.5 if rounds_otherwise else ROUNDING)


def fake_accelerator(precision="no", **split):
    """What `Zero` reads of an accelerator; split: of the section on ZeRO."""
    config = {"zero_optimization": {"stage": 2, **split}}
    plugin = SimpleNamespace(deepspeed_config=config)
    return SimpleNamespace(
        device=torch.device("cpu"),
        mixed_precision=precision,
        gradient_accumulation_steps=2,
        deepspeed_plugin=plugin,
    )


@pytest.mark.parametrize("clip, said", [(0.25, 0.25), (0.0, 0.0)])
def test_deepspeed_is_told_of_the_run_whatever_its_own_file_says(clip, said):
    accelerator = fake_accelerator()
    config = accelerator.deepspeed_plugin.deepspeed_config
    config |= {"gradient_clipping": 9.0, "gradient_accumulation_steps": 9}
    Zero(accelerator, options(clip=clip, batch_size=4))
    assert config["gradient_clipping"] == said
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_micro_batch_size_per_gpu"] == 4


def test_bf16_is_autocast_with_weights_and_gradients_in_float32():
    accelerator = fake_accelerator("bf16")
    zero = Zero(accelerator, options())
    config = accelerator.deepspeed_plugin.deepspeed_config
    assert config["bf16"] == {"enabled": False}
    assert config["torch_autocast"]["lower_precision_safe_modules"] == []
    with zero.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "split, message",
    [
        ({"stage": 0}, "ZeRO 0 splits nothing: take 1, 2 or 3"),
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer cannot be nvme"),
    ],
)
def test_what_zero_cannot_do_here_is_refused(split, message):
    with pytest.raises(ValueError, match=message):
        Zero(fake_accelerator(**split), options())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "remove cpu=true"),
        ({"cpu": False, "precision": "fp16"}, "take bf16"),
        ({"cpu": False, "optim": {"name": "adafactor"}}, "take the optimiser adamw"),
    ],
)
def test_a_launch_with_deepspeed_refuses_what_it_cannot_train(
    train_config, changes, message, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    optim = replace(train_config.optim, **changes.pop("optim", {}))
    with pytest.raises(ValueError, match=message):
        go(replace(train_config, optim=optim, **changes))
