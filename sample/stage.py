"""`python -m sample`: one anchor, or several, over a list of lambdas on common random numbers.

The same command resumes, and more lambdas, prompts or seeds extend a run.
"""

from __future__ import annotations

from pathlib import Path

from deradiff.data.prompts import load_prompts
from deradiff.evaluation.shared_work import check_shared_disk, process_state, watch
from deradiff.locks import run_lock
from sample.baking import bake_and_compare
from sample.config import SampleConfig
from sample.resolve import resolve
from sample.sweep import Sweep


def run(config: SampleConfig, run_dir: Path) -> Path:
    """Sample each (prompt, seed, lambda) that is missing.

    Under torchrun or accelerate launch the processes share the prompts.

    Args:
        config: of the run.
        run_dir: where manifest.jsonl, the images and grid.png go.

    Returns:
        The run directory.

    Raises:
        ValueError: for a mistake in the config, before a weight is loaded.
    """
    # Whatever one process refuses, the others hear.
    with watch("sample", "the images so far are kept"):
        config, base, anchors = resolve(config)
        prompts = load_prompts(config.prompts, config.prompts_limit)
        state = process_state()
        check_shared_disk(run_dir, state)

        # Sample it
        sweep = Sweep(config, base, anchors, prompts, run_dir, state)
        with run_lock(run_dir, state.is_main_process):
            if config.bake:
                bake_and_compare(sweep)
            else:
                sweep.run()
    state.destroy_process_group()
    return run_dir
