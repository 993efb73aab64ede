"""The files that ship with deradiff, by name."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "worlds" / "assets"


def locate(text: str) -> str:
    """The folder of an `asset:<name>`; any other path or hub id as it is.

    Raises:
        ValueError: for an asset that does not ship with deradiff.
    """
    if not text.startswith("asset:"):
        return text
    folder = ASSETS / text.removeprefix("asset:")
    if not folder.is_dir():
        folders = [path for path in ASSETS.glob("*/*") if path.is_dir()]
        shipped = sorted(f"asset:{path.relative_to(ASSETS)}" for path in folders)
        raise ValueError(f"deradiff ships no {text}; it ships {', '.join(shipped)}")
    return str(folder)
