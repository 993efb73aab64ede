"""The command that runs a stage on all accelerators of this machine.

A module of its own, because Hydra imports the launcher for every command, and this one loads torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate.commands.config import config_args


def gpu_count() -> int:
    """GPUs of this machine."""
    return torch.cuda.device_count()


def core_count() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stage_command(stage: str, gpus: int, config_file: str | None = None) -> list[str]:
    """`python -m <stage>`, on a machine with GPUs started by `accelerate launch`.

    Args:
        stage: its name.
        gpus: of this machine.
        config_file: of `accelerate config`; None: the stored one, if there is one.
    """
    if not gpus:
        return [sys.executable, "-m", stage]

    # A process for each GPU.
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config_file:
        command += ["--config_file", str(Path(config_file).absolute())]
    command += ["--num_machines", "1", "--num_processes", str(gpus)]
    # accelerate takes --multi_gpu for plain DDP, whatever its config says.
    if gpus > 1 and not _is_sharded(config_file):
        command += ["--multi_gpu"]
    # The stage's own config decides the precision.
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    # Port 0 takes a free one, so another launch on this machine does no harm.
    command += ["--main_process_port", "0"]
    return [*command, "-m", stage]


def _is_sharded(config_file: str | None) -> bool:
    """Whether the accelerate config that will be used asks for FSDP or DeepSpeed."""
    file = config_file or config_args.default_config_file
    if not Path(file).is_file():
        return False
    kind = str(config_args.load_config_from_file(file).distributed_type)
    return kind.rpartition(".")[2] in ("FSDP", "DEEPSPEED")
