"""deradiff: align a diffusion model once, then choose how strongly it is aligned while sampling (DeRaDiff, ICLR 2026)."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deradiff.anchors.anchor import Anchor, AnchorCard, load_anchor, save_anchor
    from deradiff.realignment.bake import bake
    from deradiff.realignment.context import realign

_HOME = {
    "realign": "realign",
    "bake": "bake",
    "load_anchor": "anchors",
    "save_anchor": "anchors",
    "Anchor": "anchors",
    "AnchorCard": "anchors",
}

__all__ = ["Anchor", "AnchorCard", "bake", "load_anchor", "realign", "save_anchor"]


class _Package(ModuleType):
    """`realign` names a function and the module that it lives in: an import of the module must not take the name from the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `import deradiff` costs nothing and a command line can refuse a mistake at once."""
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'deradiff' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deradiff.{_HOME[name]}"), name)
