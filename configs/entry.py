"""From a command line to `run(config, run_dir)`: Hydra, one `OmegaConf.to_object`, and mistakes told in one sentence."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from configs.keys import help_text, is_list, suggestion
from deradiff.training.preemption import REQUEUE, Preempted

CONFIGS = str(Path(__file__).parent)


def entry(
    stage: str, schema: type, run: Callable[[Any, Path], Any], configs: str = CONFIGS
) -> Callable[[], None]:
    """The `main` of a stage: composes `<configs>/<stage>.yaml` over the dataclass `schema` and calls `run` with plain dataclasses.

    What a user can mend (ValueError, OSError, a loss that is not finite) ends the process with a sentence and status 2; a signal that asks
    for a stop, when the work is safe, with status 75; else: a traceback. Under submitit, Hydra calls the task itself, in the cluster's job.
    """
    ConfigStore.instance().store(name=f"{stage}_schema", node=schema)
    composed: list[
        DictConfig
    ] = []  # one; none in a multirun, whose launcher starts a process per value

    def call(cfg: DictConfig) -> None:
        # Merged into the schema once more, because Hydra lets +key=... add what no field would ever read.
        config: Any = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(cfg))
        )
        run(config, Path(config.runs) / stage / config.run_name())

    # Hydra only composes. What follows runs outside of it, because it would add lines of its own to an error of ours.
    @hydra.main(version_base="1.3", config_path=configs, config_name=stage)
    def compose(cfg: DictConfig) -> None:
        if (
            HydraConfig.get().mode == RunMode.MULTIRUN
        ):  # a launcher that is not ours, in the process that it made for this value
            _in_cluster_job(lambda: call(cfg))
        else:
            composed.append(cfg)

    def main() -> None:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(stage, schema, Path(configs)))
            return
        logging.getLogger("transformers.utils.import_utils").setLevel(
            logging.ERROR
        )  # advises torchvision, which we do without
        os.environ["HYDRA_FULL_ERROR"] = (
            "1"  # Hydra would print a trimmed traceback and exit itself; told to raise, it leaves the sentence to us
        )
        try:
            composed.clear()
            compose()
            for cfg in composed:
                call(cfg)
        except Preempted as stop:
            print(f"{stage}: {stop}", file=sys.stderr)
            sys.exit(REQUEUE)
        except (
            ValueError,
            OSError,
            FloatingPointError,
            HydraException,
            OmegaConfBaseException,
        ) as error:
            print(f"{stage}: {_sentence(error, schema, Path(configs))}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"{stage}: interrupted; the same command resumes", file=sys.stderr)
            sys.exit(130)

    return main


def _in_cluster_job(task: Callable[[], None]) -> None:
    """Run one task of a submitit job: a process per GPU, which finds the others by what submitit knows of the job."""
    from submitit.helpers import TorchDistributedEnvironment

    # accelerate chooses the GPU by its local rank, so every task must see all of its node's
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    try:
        task()
    except Preempted as stop:  # the checkpoint is written: submitit's own handler, in its place again, puts the job back into the queue
        os.kill(os.getpid(), stop.signal_number)


def _sentence(error: BaseException, schema: type, configs: Path) -> str:
    """The first cause's first line, with Hydra's field name kept: "Key 'bta' not in 'DPOConfig' (dpo.bta)"; and what was likely meant."""
    cause = error
    while cause.__cause__ is not None and isinstance(
        cause, HydraException | OmegaConfBaseException
    ):
        cause = cause.__cause__
    text = str(cause).strip() or type(cause).__name__
    first = text.splitlines()[0]
    if isinstance(cause, OverrideParseException):
        return f"cannot read {cause.override}: write key=value, and quote a value that holds a comma or a bracket: \"prompts=['a fox, red']\""
    if match := re.search(r"full_key: (\S+)", text):
        key = match[1]
        if isinstance(cause, MissingMandatoryValue):
            return f"{key} is missing: give {key}=..."
        if is_list(key, schema):
            given = next(
                (
                    a.partition("=")[2]
                    for a in sys.argv[1:]
                    if a.lstrip("+").partition("=")[0] == key
                ),
                "...",
            )
            return f"{key} is a list: give {key}=[{given}]"
        return f"{first} ({key})" + (
            suggestion(key, schema, configs) if first.startswith("Key ") else ""
        )
    if "Ambiguous value" in first:
        return (
            f"{first}: for a sweep put --multirun before the overrides, for a list write key=[1,2]"
        )
    if options := re.search(
        r"Available options in '.*?':\s+(.*?)\n\s*Config search path", text, re.DOTALL
    ):
        return f"{first}; there are {', '.join(options[1].split())}"
    return first
