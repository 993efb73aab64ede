"""The evidence: which images are compared, how they are scored, and what is shown.

For a notebook, the names below make tables as DataFrames and figures of matplotlib from any sample
runs. See `deradiff.evaluation.comparison` for how they go together.
"""

from deradiff.evaluation.comparison import Comparison, Options, compare
from deradiff.evaluation.figures.error_plots import bland_altman, ecdf, scatter
from deradiff.evaluation.figures.image_grids import reversal
from deradiff.evaluation.figures.lambda_curves import reward_against_kl, score_against_lambda
from deradiff.evaluation.figures.mixture_lines import simplex, trade_off
from deradiff.evaluation.manifest import read_samples
from deradiff.evaluation.results import Evaluation, evaluate, write
from deradiff.evaluation.tables.costs import costs_of_anchors, published_cost, savings_of_anchors
from deradiff.evaluation.tables.errors import approximation_errors, errors_by_mode, summary
from deradiff.evaluation.tables.means import mean_scores
from deradiff.evaluation.tables.mixtures import mixtures_of_anchors
from deradiff.evaluation.tables.paper import agreement, errors_by_target, paper_errors
from deradiff.evaluation.tables.selection import select
from deradiff.evaluation.tables.table import ResultTable
from deradiff.evaluation.tables.wins import win_rates

__all__ = [
    "Comparison",
    "Evaluation",
    "Options",
    "ResultTable",
    "agreement",
    "approximation_errors",
    "bland_altman",
    "compare",
    "costs_of_anchors",
    "ecdf",
    "errors_by_mode",
    "errors_by_target",
    "evaluate",
    "mean_scores",
    "mixtures_of_anchors",
    "paper_errors",
    "published_cost",
    "read_samples",
    "reversal",
    "reward_against_kl",
    "savings_of_anchors",
    "scatter",
    "score_against_lambda",
    "select",
    "simplex",
    "summary",
    "trade_off",
    "win_rates",
    "write",
]
