"""deradiff: align a diffusion model once, then choose how strongly it is aligned while sampling.

DeRaDiff, ICLR 2026. The names below are the public ones; each is imported on first use, so that
`import deradiff` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deradiff.anchors.anchor import Anchor, AnchorCard, load_anchor, save_anchor
    from deradiff.anchors.live import adapter_anchor
    from deradiff.calibration.calibrate import Calibration, calibrate
    from deradiff.evaluation.sweep import Sweep, sweep
    from deradiff.method.branches import ByBranch
    from deradiff.method.lambdas import piecewise, ramp
    from deradiff.realignment.bake import bake
    from deradiff.realignment.context import realign
    from deradiff.realignment.dial import Dial
    from deradiff.realignment.guider import RealignGuidance
    from deradiff.scorers import load_scorer

__version__ = "0.1.0"

__all__ = [
    "Anchor",
    "AnchorCard",
    "ByBranch",
    "Calibration",
    "Dial",
    "RealignGuidance",
    "Sweep",
    "adapter_anchor",
    "bake",
    "calibrate",
    "load_anchor",
    "load_scorer",
    "piecewise",
    "ramp",
    "realign",
    "save_anchor",
    "sweep",
]

_MODULES = {
    "Anchor": "deradiff.anchors.anchor",
    "AnchorCard": "deradiff.anchors.anchor",
    "ByBranch": "deradiff.method.branches",
    "Calibration": "deradiff.calibration.calibrate",
    "Dial": "deradiff.realignment.dial",
    "RealignGuidance": "deradiff.realignment.guider",
    "Sweep": "deradiff.evaluation.sweep",
    "adapter_anchor": "deradiff.anchors.live",
    "bake": "deradiff.realignment.bake",
    "calibrate": "deradiff.calibration.calibrate",
    "load_anchor": "deradiff.anchors.anchor",
    "load_scorer": "deradiff.scorers",
    "piecewise": "deradiff.method.lambdas",
    "ramp": "deradiff.method.lambdas",
    "realign": "deradiff.realignment.context",
    "save_anchor": "deradiff.anchors.anchor",
    "sweep": "deradiff.evaluation.sweep",
}


def __getattr__(name: str) -> Any:
    """The public name, imported from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'deradiff' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return [*__all__, "__version__"]
