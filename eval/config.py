"""What `python -m eval` is told. Imports nothing heavy: a typo is refused before torch is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configs.tracking import TrackingConfig
from deradiff.runs import slug


@dataclass
class ScorerConfig:
    """One column of scores. name: which scorer it is, where its label does not say so; the others: hub id, path or `asset:` name."""

    name: str = ""
    checkpoint: str | None = None
    tokenizer: str | None = None
    model_config: str | None = None


@dataclass
class EvalConfig:
    """samples: run directories of the sample stage. scorers: by label. batch_size: images scored at once. name: of the run directory."""

    samples: list[str] = field(default_factory=list)
    scorers: dict[str, ScorerConfig] = field(default_factory=dict)
    batch_size: int = 32
    runs: str = "runs"
    name: str | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("no samples to evaluate; type samples=[runs/sample/<a>,runs/sample/<b>]")
        given = [str(Path(s)) for s in self.samples]
        twice = sorted({s for s in given if given.count(s) > 1})
        if twice:
            raise ValueError(f"samples names {', '.join(twice)} more than once; name each run directory once")
        if not self.scorers:
            raise ValueError("no scorers to score with; type scorers=shapes, scorers=published or scorers=[clip,pickscore]")
        for label, scorer in self.scorers.items():
            scorer.name = scorer.name or label
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")

    def run_name(self) -> str:
        """The first sample's name, how many more there are, and a digest of which samples and scorers they are."""
        if self.name:
            return slug(self.name)
        told = json.dumps([sorted(str(Path(s)) for s in self.samples), {k: asdict(v) for k, v in self.scorers.items()}], sort_keys=True)
        more = f"+{len(self.samples) - 1}" if len(self.samples) > 1 else ""
        return f"{slug(Path(self.samples[0]).name)}{more}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
