"""The evidence: which images are compared, how they are scored, and what is shown.

For a notebook, the names below make tables as DataFrames and figures of matplotlib from any sample
runs. See `deradiff.evaluation.comparison` for how they go together. Each is imported on first use:
who reads manifests alone, as `python -m sample` does, loads no figures.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deradiff.evaluation.comparison import Comparison, Options, compare
    from deradiff.evaluation.figures.early_stopping import along_the_training
    from deradiff.evaluation.figures.error_plots import bland_altman, ecdf, scatter
    from deradiff.evaluation.figures.image_grids import reversal
    from deradiff.evaluation.figures.lambda_curves import (
        properties_against_lambda,
        reward_against_kl,
        score_against_lambda,
    )
    from deradiff.evaluation.figures.mixture_lines import simplex, trade_off
    from deradiff.evaluation.manifest import read_samples
    from deradiff.evaluation.results import Evaluation, evaluate, write
    from deradiff.evaluation.tables.costs import (
        costs_of_anchors,
        published_cost,
        savings_of_anchors,
    )
    from deradiff.evaluation.tables.early_stopping import early_stopping
    from deradiff.evaluation.tables.errors import approximation_errors, errors_by_mode, summary
    from deradiff.evaluation.tables.means import mean_scores
    from deradiff.evaluation.tables.mixtures import mixtures_of_anchors
    from deradiff.evaluation.tables.paper import agreement, errors_by_target, paper_errors
    from deradiff.evaluation.tables.properties import image_properties
    from deradiff.evaluation.tables.selection import select
    from deradiff.evaluation.tables.table import ResultTable
    from deradiff.evaluation.tables.wins import win_rates

__all__ = [
    "Comparison",
    "Evaluation",
    "Options",
    "ResultTable",
    "agreement",
    "along_the_training",
    "approximation_errors",
    "bland_altman",
    "compare",
    "costs_of_anchors",
    "early_stopping",
    "ecdf",
    "errors_by_mode",
    "errors_by_target",
    "evaluate",
    "image_properties",
    "judged_pairs",
    "mean_scores",
    "mixtures_of_anchors",
    "paper_errors",
    "properties_against_lambda",
    "published_cost",
    "read_samples",
    "reversal",
    "reward_against_kl",
    "savings_of_anchors",
    "scatter",
    "score_against_lambda",
    "scorer_agreement",
    "select",
    "simplex",
    "summary",
    "trade_off",
    "win_rates",
    "write",
]

_MODULES = {
    "agreement": "deradiff.evaluation.tables.paper",
    "along_the_training": "deradiff.evaluation.figures.early_stopping",
    "approximation_errors": "deradiff.evaluation.tables.errors",
    "bland_altman": "deradiff.evaluation.figures.error_plots",
    "compare": "deradiff.evaluation.comparison",
    "Comparison": "deradiff.evaluation.comparison",
    "costs_of_anchors": "deradiff.evaluation.tables.costs",
    "early_stopping": "deradiff.evaluation.tables.early_stopping",
    "ecdf": "deradiff.evaluation.figures.error_plots",
    "errors_by_mode": "deradiff.evaluation.tables.errors",
    "errors_by_target": "deradiff.evaluation.tables.paper",
    "evaluate": "deradiff.evaluation.results",
    "Evaluation": "deradiff.evaluation.results",
    "image_properties": "deradiff.evaluation.tables.properties",
    "judged_pairs": "deradiff.evaluation.tables.judged",
    "mean_scores": "deradiff.evaluation.tables.means",
    "mixtures_of_anchors": "deradiff.evaluation.tables.mixtures",
    "Options": "deradiff.evaluation.comparison",
    "paper_errors": "deradiff.evaluation.tables.paper",
    "properties_against_lambda": "deradiff.evaluation.figures.lambda_curves",
    "published_cost": "deradiff.evaluation.tables.costs",
    "read_samples": "deradiff.evaluation.manifest",
    "ResultTable": "deradiff.evaluation.tables.table",
    "reversal": "deradiff.evaluation.figures.image_grids",
    "reward_against_kl": "deradiff.evaluation.figures.lambda_curves",
    "savings_of_anchors": "deradiff.evaluation.tables.costs",
    "scatter": "deradiff.evaluation.figures.error_plots",
    "scorer_agreement": "deradiff.evaluation.tables.scorer_agreement",
    "score_against_lambda": "deradiff.evaluation.figures.lambda_curves",
    "select": "deradiff.evaluation.tables.selection",
    "simplex": "deradiff.evaluation.figures.mixture_lines",
    "summary": "deradiff.evaluation.tables.errors",
    "trade_off": "deradiff.evaluation.figures.mixture_lines",
    "win_rates": "deradiff.evaluation.tables.wins",
    "write": "deradiff.evaluation.results",
}


def __getattr__(name: str) -> Any:
    """The public name, imported from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'deradiff.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return list(__all__)
