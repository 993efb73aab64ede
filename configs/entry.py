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
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

CONFIGS = str(Path(__file__).parent)


def entry(stage: str, schema: type, run: Callable[[Any, Path], Any], configs: str = CONFIGS) -> Callable[[], None]:
    """The `main` of a stage: composes `<configs>/<stage>.yaml` over the dataclass `schema` and calls `run` with plain dataclasses.

    What a user can mend (ValueError, OSError, a loss that is not finite) ends the process with a sentence and status 2; else: a traceback.
    """
    ConfigStore.instance().store(name=f"{stage}_schema", node=schema)
    composed: list[DictConfig] = []  # one; none in a multirun, whose launcher starts a process per value

    # Hydra only composes. What follows runs outside of it, because it would add lines of its own to an error of ours.
    @hydra.main(version_base="1.3", config_path=configs, config_name=stage)
    def compose(cfg: DictConfig) -> None:
        composed.append(cfg)

    def main() -> None:
        logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # advises torchvision, which we do without
        os.environ["HYDRA_FULL_ERROR"] = (
            "1"  # Hydra would print a trimmed traceback and exit itself; told to raise, it leaves the sentence to us
        )
        try:
            compose()
            for cfg in composed:
                # Merged into the schema once more, because Hydra lets +key=... add what no field would ever read.
                config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(cfg)))
                run(config, Path(config.runs) / stage / config.run_name())
        except (ValueError, OSError, FloatingPointError, HydraException, OmegaConfBaseException) as error:
            print(f"{stage}: {_sentence(error)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"{stage}: interrupted; the same command resumes", file=sys.stderr)
            sys.exit(130)

    return main


def _sentence(error: BaseException) -> str:
    """The first cause's first line, with Hydra's field name kept: "Key 'bta' not in 'DPOConfig' (dpo.bta)"."""
    cause = error
    while cause.__cause__ is not None and isinstance(cause, HydraException | OmegaConfBaseException):
        cause = cause.__cause__
    text = str(cause).strip() or type(cause).__name__
    first = text.splitlines()[0]
    if isinstance(cause, OverrideParseException):
        return (
            f"cannot read {cause.override}: write key=value, and quote a value that holds a comma or a bracket: \"prompts=['a fox, red']\""
        )
    if match := re.search(r"full_key: (\S+)", text):
        return f"{match[1]} is missing: give {match[1]}=..." if isinstance(cause, MissingMandatoryValue) else f"{first} ({match[1]})"
    if "Ambiguous value" in first:
        return f"{first}: for a sweep put --multirun before the overrides, for a list write key=[1,2]"
    if options := re.search(r"Available options in '.*?':\s+(.*?)\n\s*Config search path", text, re.DOTALL):
        return f"{first}; there are {', '.join(options[1].split())}"
    return first
