"""From a command line to `run(config, run_dir)`: Hydra, and mistakes answered in one sentence.

The stage itself is imported after its config is valid, so a typo is answered before torch loads.
"""

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

from configs.functions import function_at
from configs.keys import groups_of, help_text, is_list, suggestion
from deradiff.training.preemption import REQUEUE, Preempted

CONFIGS = str(Path(__file__).parent)

MISTAKES = (ValueError, OSError, FloatingPointError, HydraException, OmegaConfBaseException)
"""What a user can mend: it ends the process with a sentence, not with a traceback."""

MISTAKE_STATUS = 2
INTERRUPTED_STATUS = 130


def entry(stage: str, schema: type, run: str, configs: str = CONFIGS) -> Callable[[], None]:
    """The `main` of a stage.

    It composes `<configs>/<stage>.yaml` over the schema and calls `run` with plain dataclasses.
    What a user can mend ends the process with a sentence and status 2; a signal that asks for a
    stop, once the work is safe, with status 75; anything else with a traceback. Under submitit,
    Hydra calls the task itself, in the cluster's job.

    Args:
        stage: its name: of the command, the config file and the folder of its runs.
        schema: the config's dataclass.
        run: where the stage's function is, `module:name`. It takes the config and the run
            directory, and is imported after the config is valid.
        configs: the folder of the config files.
    """
    ConfigStore.instance().store(name=f"{stage}_schema", node=schema)
    # One config; none in a multirun, whose launcher starts a process for each value.
    composed: list[DictConfig] = []

    def call(cfg: DictConfig) -> None:
        # Merged into the schema once more, because Hydra lets +key=... add what no field would read
        typed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(cfg))
        config: Any = OmegaConf.to_object(typed)
        run_dir = Path(config.runs) / stage / config.run_name()
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
            _print_help(help_text(stage, schema, Path(configs)))
            return

        # transformers advises torchvision, which we do without.
        logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
        # Hydra would print a shortened traceback and exit; so it raises, and we print the sentence.
        os.environ["HYDRA_FULL_ERROR"] = "1"

        # The run, and how it ends.
        try:
            composed.clear()
            compose()
            for cfg in composed:
                call(cfg)
        except Preempted as stop:
            print(f"{stage}: {stop}", file=sys.stderr)
            sys.exit(REQUEUE)
        except MISTAKES as error:
            print(f"{stage}: {_sentence(error, schema, Path(configs))}", file=sys.stderr)
            sys.exit(MISTAKE_STATUS)
        except KeyboardInterrupt:
            print(f"{stage}: interrupted; the same command resumes", file=sys.stderr)
            sys.exit(INTERRUPTED_STATUS)

    return main


def _print_help(text: str) -> None:
    """Print a help text, also into a pipe that is closed early, as by `--help | head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at exit: there it must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


def _sentence(error: BaseException, schema: type, configs: Path) -> str:
    """An error as one sentence: what is wrong, where, and what was probably meant."""
    # Hydra and OmegaConf wrap an error in others, of which the innermost says most.
    cause = error
    while cause.__cause__ is not None and isinstance(
        cause, HydraException | OmegaConfBaseException
    ):
        cause = cause.__cause__
    text = str(cause).strip() or type(cause).__name__
    first_line = text.splitlines()[0]

    # Mistakes that Hydra words for its own developers, in the user's words.
    if isinstance(cause, OverrideParseException):
        return (
            f"cannot read {cause.override}: write key=value, and quote a value that holds a comma "
            "or a bracket: \"prompts=['a fox, red']\""
        )
    full_key = re.search(r"full_key: (\S+)", text)
    if full_key:
        return _sentence_about_key(full_key[1], cause, first_line, schema, configs)
    if "Ambiguous value" in first_line:
        return (
            f"{first_line}: for a sweep put --multirun before the overrides, "
            "for a list write key=[1,2]"
        )

    # An unknown choice of a group: which ones there are.
    options = _options(text, configs)
    if options:
        return f"{first_line.removesuffix('.')}; there are {', '.join(options)}"
    return first_line


def _options(text: str, configs: Path) -> list[str]:
    """The choices of the group that an error is about, or none where it is about no group."""
    listed = re.search(
        r"Available options in '.*?':\s+(.*?)\n\s*Config search path", text, re.DOTALL
    )
    if listed:
        return listed[1].split()
    # A choice among several of one group, scorers=[...]: Hydra does not say what there is.
    group = re.search(r"Could not load '(.+?)/", text)
    if group:
        return groups_of(configs).get(group[1], [])
    return []


def _sentence_about_key(
    key: str, cause: BaseException, first_line: str, schema: type, configs: Path
) -> str:
    """A mistake in one key, by the key's full name."""
    if isinstance(cause, MissingMandatoryValue):
        return f"{key} is missing: give {key}=..."
    if is_list(key, schema):
        return f"{key} is a list: give {key}=[{_typed_value(key)}]"
    meant = suggestion(key, schema, configs) if first_line.startswith("Key ") else ""
    return f"{first_line} ({key}){meant}"


def _typed_value(key: str) -> str:
    """The value that the user typed for a key."""
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name.lstrip("+") == key:
            return value
    return "..."
