"""`--multirun dpo.beta=500,1000`: a process group for each value.

Hydra's own launcher runs all values in one process. They would share what exists once in a process:
accelerate's state, the CUDA allocator, the random state. So each value gets processes of its own.
On a CUDA machine they are started by `accelerate launch` on all local GPUs, one value after
another; elsewhere single-thread processes run side by side, as many as there are cores.
"""

# No `from __future__ import annotations`: Hydra executes a plugin before it is in sys.modules,
# where dataclasses look up annotations that are strings.
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
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
    """The launcher's settings, `hydra.launcher.<key>`.

    Attributes:
        workers: how many values run side by side; null: one on a CUDA machine, one for each core
            elsewhere.
        config_file: of `accelerate config`, for FSDP or DeepSpeed; null: the stored one, if there
            is one.
    """

    _target_: str = "hydra_plugins.deradiff_launcher.process_group.ProcessGroupLauncher"
    workers: int | None = None
    config_file: str | None = None


ConfigStore.instance().store(
    group="hydra/launcher", name="process_group", node=ProcessGroupConf, provider="deradiff"
)


class ProcessGroupLauncher(Launcher):
    """Starts `python -m <stage> <overrides of one value>` for each value of a sweep.

    A value that fails does not stop the others, and is named at the end. The stage's config has
    `check_paths()`; its `runs` and `run_name()` give the run directory, where `launch.log` is.

    Args:
        workers: see `ProcessGroupConf`.
        config_file: see `ProcessGroupConf`.

    Raises:
        ValueError: for less than one worker, and for a config file that does not exist.
    """

    def __init__(self, workers: int | None = None, config_file: str | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"hydra.launcher.workers must be at least 1, not {workers}")
        if config_file is not None and not Path(config_file).is_file():
            raise ValueError(
                f"hydra.launcher.config_file={config_file} does not exist: "
                "type accelerate config to write one"
            )
        self.workers = workers
        self.config_file = config_file

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `launch`.

        Args:
            hydra_context: composes the configs.
            task_function: the stage's own, which is not called here.
            config: the composed config, without the values of the sweep.

        Raises:
            ValueError: inside torchrun or accelerate launch.
        """
        self.context = hydra_context
        self.config = config
        self.stage = str(config.hydra.job.name)

        # A launcher inside a launcher would start every run once for each rank.
        if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
            overrides = config.hydra.overrides.task
            command = shlex.join(["python", "-m", self.stage, "--multirun", *overrides])
            raise ValueError(
                "--multirun starts the process groups itself and cannot run inside torchrun "
                f"or accelerate launch: type {command}"
            )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run every value.

        Args:
            job_overrides: the overrides of each value.
            initial_job_idx: unused.

        Returns:
            Nothing: the results are in the run directories.

        Raises:
            ValueError: where a value's config is wrong, and where two values would write to one
                folder; no value has started then.
            HydraException: where runs failed, with the reason of each.
        """
        # Nothing starts before all run directories are known, and distinct.
        names = [_name(overrides, job_overrides) for overrides in job_overrides]
        run_dirs = [self._run_dir(overrides) for overrides in job_overrides]
        _check_distinct(names, run_dirs)

        # The commands. Their module is imported here, because it loads torch, and Hydra imports
        # this file for every command.
        commands: Any = import_module("hydra_plugins.deradiff_launcher._commands")
        gpus = commands.gpu_count()
        command = commands.stage_command(self.stage, gpus, self.config_file) + self._flags()
        jobs = []
        for name, overrides, run_dir in zip(names, job_overrides, run_dirs):
            jobs.append(Job(name, [*command, *overrides], run_dir))

        # One run at a time takes all GPUs; on a CPU, each run takes a core.
        usual_workers = 1 if gpus else commands.core_count()
        failures = run_jobs(jobs, self.workers or usual_workers, one_thread=not gpus)
        if failures:
            listed = "; ".join(failures)
            raise HydraException(f"{len(failures)} of {len(jobs)} runs failed: {listed}")
        return []

    def _run_dir(self, overrides: Sequence[str]) -> Path:
        """The run directory of one value.

        Its config is composed and checked here, so that no value starts where another is refused.
        """
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            del config["hydra"]
        stage_config: Any = OmegaConf.to_object(config)
        stage_config.check_paths()
        return Path(stage_config.runs) / self.stage / stage_config.run_name()

    def _flags(self) -> list[str]:
        """The user's flags for Hydra that a value's config depends on: --config-dir."""
        flags = []
        for source in self.config.hydra.runtime.config_sources:
            if source.provider == "command-line":
                flags.append(f"--config-dir={source.path}")
        return flags


def _name(overrides: Sequence[str], all_overrides: Sequence[Sequence[str]]) -> str:
    """What a value is called: the overrides that not all values share."""
    own = []
    for override in overrides:
        if not all(override in others for others in all_overrides):
            own.append(override)
    return " ".join(own or overrides)


def _check_distinct(names: Sequence[str], run_dirs: Sequence[Path]) -> None:
    """Raises ValueError where two values would write to one folder."""
    for position, run_dir in enumerate(run_dirs):
        if run_dir in run_dirs[:position]:
            first = names[run_dirs.index(run_dir)]
            raise ValueError(
                f"{first} and {names[position]} would both write to {run_dir}: "
                "put what varies into name=..."
            )
