"""From a command line to `run(config, run_dir)`: Hydra, and mistakes answered in one sentence.

The stage itself is imported after its config is valid, so a typo is answered before torch loads.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.answers import Command, check_arguments, is_memory_error, sentence
from configs.checks import check_run_name
from configs.ctrl_c import INTERRUPTED_STATUS, hand_over
from configs.functions import function_at
from configs.keys import help_text
from configs.tracking import ABANDONED
from deradiff.hub import is_hub_error
from deradiff.terminal import PrintableRecord, say, warn
from deradiff.training.preemption import REQUEUE, Preempted, RanksLost

CONFIGS = str(Path(__file__).parent)

MISTAKES = (ValueError, OSError, FloatingPointError, HydraException, OmegaConfBaseException)
"""What a user can mend: it ends the process with a sentence, not with a traceback."""

MISTAKE_STATUS = 2


def entry(stage: str, schema: type, run: str, configs: str = CONFIGS) -> Callable[[], None]:
    """The `main` of a stage.

    It composes `<configs>/<stage>.yaml` over the schema and calls `run` with plain dataclasses.
    What a user can mend ends the process with a sentence and status 2; a signal that asks for a
    stop, once the work is safe, and a rank that is lost, with status 75; Ctrl-C with status 130;
    anything else with a traceback. Under submitit, Hydra calls the task itself, in the cluster's
    job.

    Args:
        stage: its name: of the command, the config file and the folder of its runs.
        schema: the config's dataclass, with `run_name()`, and with `check_paths()`, which refuses
            local paths where nothing is.
        run: where the stage's function is, `module:name`. It takes the config and the run
            directory, and is imported after the config is valid.
        configs: the folder of the config files.
    """
    ConfigStore.instance().store(name=f"{stage}_schema", node=schema)
    hand_over()
    # One config; none in a multirun, whose launcher starts a process for each value.
    composed: list[DictConfig] = []

    def call(cfg: DictConfig) -> None:
        # Merged into the schema once more, because Hydra lets +key=... add what no field would read
        typed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(cfg))
        config: Any = OmegaConf.to_object(typed)
        config.check_paths()
        name = config.run_name()
        check_run_name(name, config.runs)
        run_dir = Path(config.runs) / stage / name
        function_at(run)(config, run_dir)

    # Hydra only composes. The stage runs outside of it, because Hydra would add lines to our errors
    @hydra.main(version_base="1.3", config_path=configs, config_name=stage)
    def compose(cfg: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            # A launcher that is not ours, in the process that it made for this value.
            _run_in_cluster_job(lambda: call(cfg))
        else:
            composed.append(cfg)

    def main() -> None:
        # What needs no config.
        if {"--help", "-h"} & set(sys.argv[1:]):
            say(*help_text(stage, schema, Path(configs)).split("\n"))
            return

        # What is logged is printable, and no traceback where nobody reads it.
        logging.setLogRecordFactory(PrintableRecord)
        logging.raiseExceptions = False
        # transformers advises torchvision, which we do without.
        logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
        # It tells of each table of a font that a figure's PDF holds.
        logging.getLogger("fontTools").setLevel(logging.WARNING)
        # Hydra would print a shortened traceback and exit; so it raises, and we print the sentence.
        os.environ["HYDRA_FULL_ERROR"] = "1"

        # The run, and how it ends.
        command = Command(stage, schema, Path(configs), sys.argv[1:])

        def work() -> None:
            check_arguments(command)
            composed.clear()
            compose()
            for cfg in composed:
                call(cfg)

        status = _status_of(work, command)
        if status == INTERRUPTED_STATUS or ABANDONED:
            _end_at_once(status)
        if status:
            sys.exit(status)

    return main


def _status_of(work: Callable[[], None], command: Command) -> int:
    """Do a command's work; say on stderr why it ended early, and return the exit status."""
    stage = command.stage
    try:
        work()
    except Preempted as stop:
        warn(f"{stage}: {stop}")
        return INTERRUPTED_STATUS if stop.signal_number == signal.SIGINT else REQUEUE
    except RanksLost as lost:
        warn(f"{stage}: {lost}")
        return REQUEUE
    except KeyboardInterrupt:
        warn(f"{stage}: interrupted; the same command resumes")
        return INTERRUPTED_STATUS
    except Exception as error:
        is_mistake = isinstance(error, MISTAKES) or is_hub_error(error) or is_memory_error(error)
        if not is_mistake:
            raise
        warn(f"{stage}: {sentence(error, command)}")
        return MISTAKE_STATUS
    return 0


def _end_at_once(status: int) -> None:
    """End the process without what is left to do at its exit, such as waiting for a tracker."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run_in_cluster_job(task: Callable[[], None]) -> None:
    """Run one task of a submitit job: a process for each GPU.

    The processes find each other by what submitit knows of the job.
    """
    # An optional package: only a command that starts cluster jobs needs it.
    from submitit.helpers import TorchDistributedEnvironment

    # accelerate chooses the GPU by its local rank, so every task must see all GPUs of its node
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    try:
        task()
    except Preempted as stop:
        # The checkpoint is written. submitit's own handler is in its place again, and puts the job
        # back into the queue.
        os.kill(os.getpid(), stop.signal_number)
