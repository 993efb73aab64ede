"""`--multirun dpo.beta=500,1000`: one process group per value, instead of Hydra's one process for all of them.

Two jobs in one process would share what lives once per process (accelerate's state, the CUDA allocator, the random state), so each
value gets processes of its own: on a CUDA machine `accelerate launch` over all local GPUs, one value after another; elsewhere
single-thread processes, as many side by side as there are cores.
"""

# No `from __future__ import annotations`: Hydra executes a plugin before it is in sys.modules, where dataclasses look strings up.
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.deradiff_launcher._jobs import Job, run_jobs


@dataclass
class ProcessGroupConf:
    """workers: how many values run side by side; null: one on a CUDA machine, one per core elsewhere. config_file: of `accelerate config`,
    for FSDP or DeepSpeed; null: the stored one, if there is one."""

    _target_: str = "hydra_plugins.deradiff_launcher.process_group.ProcessGroupLauncher"
    workers: int | None = None
    config_file: str | None = None


ConfigStore.instance().store(
    group="hydra/launcher", name="process_group", node=ProcessGroupConf, provider="deradiff"
)


class ProcessGroupLauncher(Launcher):
    """Starts `python -m <hydra.job.name> <overrides of one value>` per value; goes on after a failed one and names it at the end.

    The stage's config has `runs` and `run_name()`, from which follows the run directory, and there `launch.log`.
    """

    def __init__(self, workers: int | None = None, config_file: str | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"hydra.launcher.workers must be at least 1, not {workers}")
        if config_file is not None and not Path(config_file).is_file():
            raise ValueError(
                f"hydra.launcher.config_file={config_file} does not exist: type accelerate config to write one"
            )
        self.workers, self.config_file = workers, config_file

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config
        self.stage = str(config.hydra.job.name)
        if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
            again = shlex.join(
                ["python", "-m", self.stage, "--multirun", *config.hydra.overrides.task]
            )
            raise ValueError(
                f"--multirun starts the process groups itself and cannot run inside torchrun or accelerate launch: type {again}"
            )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        names = [_varying(overrides, job_overrides) for overrides in job_overrides]
        run_dirs = [self._run_dir(overrides) for overrides in job_overrides]
        for i, run_dir in enumerate(run_dirs):
            if run_dir in run_dirs[:i]:
                same = names[run_dirs.index(run_dir)]
                raise ValueError(
                    f"{same} and {names[i]} would both write to {run_dir}: put what varies into name=..."
                )
        import torch

        gpus = torch.cuda.device_count()
        command = _command(self.stage, gpus, self.config_file) + self._flags()
        jobs = [
            Job(name, command + list(overrides), run_dir)
            for name, overrides, run_dir in zip(names, job_overrides, run_dirs)
        ]
        failed = run_jobs(jobs, self.workers or (1 if gpus else _cores()), one_thread=not gpus)
        if failed:
            raise HydraException(f"{len(failed)} of {len(jobs)} runs failed: " + "; ".join(failed))
        return []

    def _run_dir(self, overrides: Sequence[str]) -> Path:
        """Of one value's config, composed and checked in full here, so that no value starts where another one is refused."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            del config["hydra"]
        stage_config: Any = OmegaConf.to_object(config)
        return Path(stage_config.runs) / self.stage / stage_config.run_name()

    def _flags(self) -> list[str]:
        """What else the user's command said to Hydra that a value's config depends on: --config-dir."""
        return [
            f"--config-dir={source.path}"
            for source in self.config.hydra.runtime.config_sources
            if source.provider == "command-line"
        ]


def _varying(overrides: Sequence[str], everyone: Sequence[Sequence[str]]) -> str:
    """The overrides that not all values share: what a value is called."""
    return " ".join(
        o for o in overrides if not all(o in others for others in everyone)
    ) or " ".join(overrides)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _command(stage: str, gpus: int, config_file: str | None = None) -> list[str]:
    if not gpus:
        return [sys.executable, "-m", stage]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if config_file:
        launch += ["--config_file", str(Path(config_file).absolute())]
    launch += ["--num_machines", "1", "--num_processes", str(gpus)]
    if gpus > 1 and not _shards(
        config_file
    ):  # accelerate takes --multi_gpu for plain DDP, whatever its config says
        launch += ["--multi_gpu"]
    # The stage's own config decides the precision; port 0 takes a free one, so that another launch on this machine is no obstacle.
    return [
        *launch,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        stage,
    ]


def _shards(config_file: str | None) -> bool:
    """Whether the accelerate config that will be used asks for FSDP or DeepSpeed."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    file = config_file or default_config_file
    return Path(file).is_file() and str(load_config_from_file(file).distributed_type).rpartition(
        "."
    )[2] in ("FSDP", "DEEPSPEED")
