"""A run directory holds the run of one config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deradiff.digests import digest_of_text
from deradiff.files import remove_parts, write_atomic

CONFIG_DIGEST = "# digest: "
"""How the first line of a `config.yaml` begins."""


def claim(run_dir: Path, config: dict[str, Any], ignore: tuple[str, ...] = ()) -> None:
    """Write `config.yaml` into a run directory, or check that the one there is the same.

    So the same command resumes a run, and another command is refused.

    Args:
        run_dir: the run directory.
        config: nested settings.
        ignore: dotted keys, or beginnings of them, that may differ because they do not change what
            the run produces.

    Raises:
        ValueError: where another config is there; it names the keys that differ.
    """
    remove_parts(run_dir)
    file = run_dir / "config.yaml"
    if file.is_file():
        # Keys that differ, without those that do not matter.
        old = _flat(_read_config(file))
        new = _flat(config)
        changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
        changed = [key for key in changed if not key.startswith(ignore)]
        if changed:
            values = ", ".join(f"{k} ({old.get(k)} there, {new.get(k)} here)" for k in changed)
            raise ValueError(
                f"{run_dir} holds a run of another config: {values}; "
                "choose another name for this run, or remove that folder"
            )

    # What does not matter is written too, as this command has it.
    text = yaml.safe_dump(config, sort_keys=False)
    write_atomic(file, f"{CONFIG_DIGEST}{digest_of_text(text)}\n{text}")


def _read_config(file: Path) -> dict[str, Any]:
    """The settings in a `config.yaml`. Raises ValueError for one that is not as it was written."""
    try:
        text = file.read_text()
        first, _, rest = text.partition("\n")
        is_sealed = first.startswith(CONFIG_DIGEST)
        is_whole = not is_sealed or first == CONFIG_DIGEST + digest_of_text(rest)
        config = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError):
        is_whole = False
    if not is_whole or not isinstance(config, dict):
        raise ValueError(
            f"{file} is not what was written: if the run there is this command's, remove that "
            "file, and the same command goes on; otherwise choose another name for this run"
        )
    return config


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
