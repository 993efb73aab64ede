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
from deradiff.evaluation.tables.costs import compute, published, saved
from deradiff.evaluation.tables.errors import approximation_errors, modes, summary
from deradiff.evaluation.tables.means import mean_scores
from deradiff.evaluation.tables.mixtures import mixtures
from deradiff.evaluation.tables.paper import agreement, by_target, paper_errors
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
    "by_target",
    "compare",
    "compute",
    "ecdf",
    "evaluate",
    "mean_scores",
    "mixtures",
    "modes",
    "paper_errors",
    "published",
    "read_samples",
    "reversal",
    "reward_against_kl",
    "saved",
    "scatter",
    "score_against_lambda",
    "select",
    "simplex",
    "summary",
    "trade_off",
    "win_rates",
    "write",
]
