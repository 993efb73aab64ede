"""What `python -m eval` is told. Imports nothing heavy: a typo is refused before torch is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configs.tracking import TrackingConfig
from deradiff.files import slug


@dataclass
class ScorerConfig:
    """One column of scores. name: which scorer it is, where its label does not say so; checkpoint, tokenizer, model_config: hub id, path or
    `asset:` name. head: of the aesthetic scorer; null: the published one. file: a Python file of yours with one scorer class in it."""

    name: str = ""
    file: str | None = None
    head: str | None = None
    checkpoint: str | None = None
    tokenizer: str | None = None
    model_config: str | None = None


@dataclass
class SelectConfig:
    """score: the scorer to choose lambda by; null: the first. path_kl: the largest mean path KL to the reference, in nats; null: any."""

    score: str | None = None
    path_kl: float | None = None

    def __post_init__(self) -> None:
        if self.path_kl is not None and not self.path_kl >= 0:
            raise ValueError(
                f"select.path_kl is a budget in nats of at least 0, not {self.path_kl:g}"
            )


@dataclass
class EvalConfig:
    """What is evaluated, by whom, and what counts as close.

    samples: run directories of the sample stage, whose realigned models are evaluated. references: more of them, whose models at lam = 1
    serve as from-scratch targets and at lam = 0 as the reference, and as nothing else. scorers: by label. select: how lambda is chosen.
    margin: in % of the distance from reference to target, within which a realigned model counts as equivalent to its target.
    threshold: in % of the mean score; the share of errors at most that is reported. batch_size: images scored at once.
    """

    samples: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    scorers: dict[str, ScorerConfig] = field(default_factory=dict)
    select: SelectConfig = field(default_factory=SelectConfig)
    margin: float = 5.0
    threshold: float = 0.217
    batch_size: int = 32
    runs: str = "runs"
    name: str | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(
                "no samples to evaluate; type samples=[runs/sample/<a>,runs/sample/<b>]"
            )
        given = [str(Path(s)) for s in [*self.samples, *self.references]]
        twice = sorted({s for s in given if given.count(s) > 1})
        if twice:
            raise ValueError(
                f"samples and references name {', '.join(twice)} more than once; name each run directory once, in one of them"
            )
        if not self.scorers:
            raise ValueError(
                "no scorers to score with; type scorers=shapes, scorers=published or scorers=[clip,pickscore]"
            )
        for label, scorer in self.scorers.items():
            scorer.name = scorer.name or label
        if self.select.score is None:
            self.select.score = next(iter(self.scorers))
        if self.select.score not in self.scorers:
            raise ValueError(
                f"select.score={self.select.score} is not among the scorers {', '.join(self.scorers)}; name one of them"
            )
        for name in ("margin", "threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 %, not {getattr(self, name):g}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")

    def run_name(self) -> str:
        """The first sample's name, how many more there are, and a digest of which samples and scorers they are."""
        if self.name:
            return slug(self.name)
        runs = [
            sorted(str(Path(s)) for s in named)
            for named in (self.samples, self.references)
            if named
        ]
        told = json.dumps([*runs, {k: asdict(v) for k, v in self.scorers.items()}], sort_keys=True)
        more = f"+{len(self.samples) - 1}" if len(self.samples) > 1 else ""
        return f"{slug(Path(self.samples[0]).name)}{more}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
