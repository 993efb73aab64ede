"""Which scorer, and where its files are: what configs and callers pass around."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScorerSpec:
    """A scorer and its files. A file that is None is the published one.

    Attributes:
        name: a key of `deradiff.scorers.SCORERS`; with `file`, any label.
        checkpoint: of the network: a hub id, `org/name/file` or a path.
        tokenizer: a folder or hub id.
        model_config: an open_clip config, where the sizes are not the published ones.
        head: of the aesthetic scorer: its linear layers.
        file: a Python file of the user's with one scorer class.
    """

    name: str
    checkpoint: str | None = None
    tokenizer: str | None = None
    model_config: str | None = None
    head: str | None = None
    file: str | None = None
