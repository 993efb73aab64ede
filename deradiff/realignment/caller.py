"""Which pipeline calls a network.

Pipelines share networks: one that was made with `from_pipe` has the network of the other and a
scheduler of its own. Whose steps count is a matter of who calls.
"""

from __future__ import annotations

import sys
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline


def calling_pipeline(pipe: Any) -> Any:
    """The pipeline in whose call we are.

    Args:
        pipe: the pipeline where the call comes from none.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            caller = frame.f_locals.get("self")
            if isinstance(caller, DiffusionPipeline | ModularPipeline):
                return caller
        frame = frame.f_back  # type: ignore[assignment]
    return pipe
