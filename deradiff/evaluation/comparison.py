"""A comparison: sample runs, their scores, and which models are compared with which.

Every table and figure of the evaluation is made from one:

    from deradiff import evaluation

    comparison = evaluation.compare(["runs/sample/a", "runs/sample/b"], scorers=["pickscore"])
    evaluation.approximation_errors(comparison).data      # a DataFrame
    evaluation.score_against_lambda(comparison)           # a matplotlib Figure
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from deradiff.anchors.anchor import AnchorCard
from deradiff.evaluation.assessment import Assessors, assess
from deradiff.evaluation.manifest import read_cards, read_samples
from deradiff.evaluation.pairing import Cell, SampledModel, by_model, pair_up, per_prompt
from deradiff.evaluation.properties import ImageProperties, measure_images
from deradiff.evaluation.votes import read_votes
from deradiff.scorers.spec import PairwiseSpec, ScorerSpec


@dataclass(frozen=True)
class Options:
    """What counts as close, and how lambda is chosen.

    Attributes:
        margin: of the equivalence test, in percent of the distance from reference to target.
        threshold: in percent of the mean score; the share of errors at most that is reported.
        score: the scorer to choose lambda by; None: the first.
        path_kl: the largest mean path KL of a model that may be chosen, in nats; None: any.
    """

    margin: float = 5.0
    threshold: float = 0.217
    score: str | None = None
    path_kl: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Scored samples, and which models are compared with which.

    Attributes:
        samples: a row an image (`read_samples`).
        scores: a row per image and scorer (`score_images`).
        cells: every realigned model of one anchor with its target.
        missing: sentences that say what could not be compared, and why.
        cards: of the anchors.
        scorers: their labels, in the order that tables show.
        options: what counts as close.
        mixtures: every mixture of several anchors with its target.
        model_scores: the scores of each model, where they are not simply those of `scores`.
        properties: what the images are like (`measure_images`); None: not measured.
        votes: which image of people's votes each scorer prefers (`score_votes`); None: no votes.
        judgements: which image of each pair a judge prefers (`PairJudging.prefer`); None: no judge.
    """

    samples: pd.DataFrame
    scores: pd.DataFrame
    cells: Sequence[Cell]
    missing: Sequence[str]
    cards: Mapping[str, AnchorCard]
    scorers: Sequence[str]
    options: Options = field(default_factory=Options)
    mixtures: Sequence[Cell] = ()
    model_scores: dict[SampledModel, pd.DataFrame] | None = None
    properties: ImageProperties | None = None
    votes: pd.DataFrame | None = None
    judgements: pd.DataFrame | None = None

    @cached_property
    def by_model(self) -> dict[SampledModel, pd.DataFrame]:
        """The scores of each model: rows (prompt_id, seed), a column a scorer."""
        return by_model(self.scores) if self.model_scores is None else self.model_scores

    @cached_property
    def scales(self) -> dict[str, str]:
        """The scale of each scorer."""
        first = self.scores.drop_duplicates("scorer").set_index("scorer")["scale"]
        return {scorer: first[scorer] for scorer in self.scorers}

    @property
    def chosen_score(self) -> str:
        """The scorer that lambda is chosen by."""
        return self.options.score or self.scorers[0]

    def per_prompt(self, models: Sequence[SampledModel], scorer: str) -> tuple[pd.DataFrame, int]:
        """Mean scores over seeds of the images that all models share; see `pairing.per_prompt`."""
        return per_prompt(self.by_model, models, scorer)

    def restrict(
        self, cells: Sequence[Cell], scores: dict[SampledModel, pd.DataFrame]
    ) -> Comparison:
        """The same with fewer cells and images."""
        return replace(self, cells=cells, model_scores=scores)


def compare(
    samples: Sequence[str | Path],
    references: Sequence[str | Path] = (),
    scorers: Sequence[str] | Mapping[str, ScorerSpec] = ("pickscore",),
    options: Options | None = None,
    batch_size: int = 32,
    cache: str | Path = "runs/cache/scores",
    votes: str | Path | None = None,
    pairwise: PairwiseSpec | None = None,
) -> Comparison:
    """Score sample runs and pair their models, from Python.

    Args:
        samples: run directories of the sample stage, whose realigned models are evaluated.
        references: run directories that serve as targets and as the reference, and as nothing else.
        scorers: names that `deradiff.load_scorer` knows, or specs by label.
        options: what counts as close.
        batch_size: images scored at once.
        cache: the folder of the scores of all runs; nothing is scored twice.
        votes: people's votes, a parquet file with the columns of Pick-a-Pic, which the scorers are
            held against; None: none.
        pairwise: a judge that chooses between images of two models; None: none.

    Raises:
        ValueError: where a run, an image or a scorer is not what it should be.
    """
    specs = scorers
    if not isinstance(specs, Mapping):
        specs = {name: ScorerSpec(name) for name in specs}
    options = options or Options()
    assessors = Assessors(specs, None if votes is None else read_votes(votes), pairwise)
    table = read_samples([str(run) for run in samples], [str(run) for run in references])
    cards = read_cards(table)
    pairs = pair_up(table, cards)
    assessment = assess(table, [*pairs.cells, *pairs.mixtures], assessors, batch_size, Path(cache))
    chosen = options.score or next(iter(specs))
    properties = measure_images(table, specs, chosen, batch_size, Path(cache))
    assert assessment is not None, "only the main process of several has the scores"
    return Comparison(
        samples=table,
        scores=assessment.scores,
        cells=pairs.cells,
        missing=pairs.missing,
        cards=cards,
        scorers=list(specs),
        options=options,
        mixtures=pairs.mixtures,
        properties=properties,
        votes=assessment.votes,
        judgements=assessment.judgements,
    )
