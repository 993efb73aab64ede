"""The eval stage's config: what is evaluated, by which scorers, and what counts as close.

It imports nothing heavy: a mistake in a command is answered before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from configs.checks import positive
from configs.paths import CHECKPOINT, check_path, check_samples, place
from configs.settings import setting
from configs.tracking import TrackingConfig
from deradiff.files import slug
from deradiff.scorers.spec import ScorerSpec
from eval.endpoint_config import HOW_IT_IS_ASKED, SERVER_KEYS, EndpointConfig, PairwiseConfig

STAND_INS = "asset:shapes/"
TOKENIZER = "a tokenizer's folder, or a hub id such as org/name"


DERIVED = (
    "batch_size",
    "runs",
    "name",
    "tracking",
    "select",
    "margin",
    "threshold",
    "votes",
    "pairwise",
)
"""Keys that no score depends on."""

FILES = ("file", "head", "checkpoint", "tokenizer", "model_config")
"""The keys of a scorer that name its files."""

JUDGE = "judge"
"""The scorer that asks a server."""


@dataclass
class ScorerConfig(EndpointConfig):
    """One column of scores."""

    name: str = setting("", "which scorer; empty: the one that the label names")
    file: str | None = setting(None, "a Python file of yours with one scorer class")
    head: str | None = setting(None, "of the aesthetic scorer: its linear layers")
    checkpoint: str | None = setting(None, "of the network: hub id, path or asset:...")
    tokenizer: str | None = setting(None, "a folder or hub id")
    model_config: str | None = setting(None, "an open_clip config of other sizes")

    def shown(self, label: str) -> str:
        """The label in tables, figures and the report.

        The shapes world's networks stand in for published ones, and are not these.
        """
        is_stand_in = str(self.checkpoint).startswith(STAND_INS)
        return f"{label} (shapes)" if is_stand_in else label

    def spec(self, key: str) -> ScorerSpec:
        """The scorer for the library.

        Args:
            key: of this scorer, for messages.

        Raises:
            ValueError: where a judge's server is missing, or is none.
        """
        files = {name: getattr(self, name) for name in FILES}
        return ScorerSpec(self.name, endpoint=self.endpoint(key), rubric=self.rubric, **files)

    def identity(self) -> dict[str, Any]:
        """What its scores depend on, by key."""
        values = {"name": self.name, **{name: getattr(self, name) for name in FILES}}
        if self.name == JUDGE:
            for name in ("model", "rubric", "image_side", "temperature"):
                values[name] = getattr(self, name)
        return values


@dataclass
class SelectConfig:
    """How lambda is chosen."""

    score: str | None = setting(None, "the scorer to choose lambda by; null: the first")
    path_kl: float | None = setting(None, "largest mean path KL, in nats; null: any")

    def __post_init__(self) -> None:
        if self.path_kl is not None and not self.path_kl >= 0:
            raise ValueError(
                f"select.path_kl is a budget in nats of at least 0, not {self.path_kl:g}"
            )


@dataclass
class EvalConfig:
    """One run of the eval stage."""

    USUAL: ClassVar[tuple[str, ...]] = (
        "samples",
        "references",
        "select.score",
        "select.path_kl",
        "name",
    )
    samples: list[str] = setting([], "run directories of the sample stage")
    references: list[str] = setting(
        [], "more of them, that serve as targets (lam = 1) and as the reference (lam = 0) alone"
    )
    scorers: dict[str, ScorerConfig] = setting({}, "by label; the group scorers= fills it")
    votes: str | None = setting(
        None, "people's votes, which the scorers are held against: a parquet file as Pick-a-Pic's"
    )
    pairwise: PairwiseConfig = setting(
        PairwiseConfig(), "a judge that chooses between the images of two models"
    )
    select: SelectConfig = setting(SelectConfig(), "how lambda is chosen")
    margin: float = setting(
        5.0, "% of the distance within which a realigned model counts as equivalent"
    )
    threshold: float = setting(0.217, "% of the mean; the share of errors below it is reported")
    batch_size: int = setting(32, "images scored at once")
    runs: str = setting("runs", "folder of all runs")
    name: str | None = setting(None, "folder below runs/eval; null: composed from the samples")
    tracking: TrackingConfig = setting(TrackingConfig(), "where tables and figures go")

    def __post_init__(self) -> None:
        self._check_runs()
        self._check_scorers()
        self.pairwise.spec("pairwise")
        for name in ("margin", "threshold"):
            positive(name, getattr(self, name))
        positive("batch_size", self.batch_size)

    def _check_runs(self) -> None:
        """Give every run its one name; raises ValueError for none, and for one named twice."""
        if not self.samples:
            raise ValueError(
                "no samples to evaluate; type samples=[runs/sample/<a>,runs/sample/<b>]"
            )
        self.samples = [place(Path(run), self.runs) for run in self.samples]
        self.references = [place(Path(run), self.runs) for run in self.references]
        named = [*self.samples, *self.references]
        twice = sorted({run for run in named if named.count(run) > 1})
        if twice:
            raise ValueError(
                f"samples and references name {', '.join(twice)} more than once; name each run "
                "directory once, in one of them"
            )

    def _check_scorers(self) -> None:
        """Give every scorer its name; raises ValueError for none, or for an unknown choice."""
        if not self.scorers:
            raise ValueError(
                "no scorers to score with; type scorers=shapes, scorers=published or "
                "scorers=[clip,pickscore]"
            )
        for label, scorer in self.scorers.items():
            scorer.name = scorer.name or label
            self._check_judge(label, scorer)
        if self.select.score is None:
            self.select.score = next(iter(self.scorers))
        if self.select.score not in self.scorers:
            raise ValueError(
                f"select.score={self.select.score} is not among the scorers "
                f"{', '.join(self.scorers)}; name one of them"
            )

    def _check_judge(self, label: str, scorer: ScorerConfig) -> None:
        """Refuse a judge without its server, and a server of another scorer."""
        key = f"scorers.{label}"
        has_server = scorer.spec(key).endpoint is not None
        if scorer.name == JUDGE and not has_server:
            raise ValueError(
                f"{key} asks a model behind a server: give {key}.url=http://localhost:8000/v1, "
                f"the address of an OpenAI-style server, and {key}.model=<as the server names it>"
            )
        if scorer.name != JUDGE and (has_server or scorer.rubric is not None):
            raise ValueError(
                f"{key} asks no server: leave out {key}.url, {key}.model and {key}.rubric, or give "
                f"{key}.name={JUDGE}"
            )

    def derived(self) -> tuple[str, ...]:
        """Dotted keys that no score depends on."""
        asked = []
        for label, scorer in self.scorers.items():
            names = HOW_IT_IS_ASKED if scorer.name == JUDGE else SERVER_KEYS
            asked += [f"scorers.{label}.{name}" for name in names]
        return (*DERIVED, *asked)

    def check_paths(self) -> None:
        """Refuse local paths where nothing is.

        Raises:
            ValueError: with what to type.
        """
        for run in self.samples:
            check_samples("samples", run, self.runs)
        for run in self.references:
            check_samples("references", run, self.runs)
        self.pairwise.check_rubric("pairwise")
        check_path("votes", self.votes, "a parquet file of votes", depth=0)
        for label, scorer in self.scorers.items():
            key = f"scorers.{label}"
            check_path(f"{key}.file", scorer.file, "a Python file of yours", depth=0)
            check_path(f"{key}.model_config", scorer.model_config, "an open_clip config", depth=0)
            scorer.check_rubric(key)
            check_path(f"{key}.tokenizer", scorer.tokenizer, TOKENIZER, self.runs)
            for name in ("head", "checkpoint"):
                path = getattr(scorer, name)
                check_path(f"{key}.{name}", path, CHECKPOINT, self.runs, depth=99)

    def run_name(self) -> str:
        """The first sample's name, how many more there are, and a digest of all that is named."""
        if self.name:
            return slug(self.name)
        runs = []
        for named in (self.samples, self.references):
            if named:
                runs.append(sorted(named))
        scorers = {label: scorer.identity() for label, scorer in self.scorers.items()}
        text = json.dumps([*runs, scorers], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        more = f"+{len(self.samples) - 1}" if len(self.samples) > 1 else ""
        return f"{slug(Path(self.samples[0]).name)}{more}-{digest}"
