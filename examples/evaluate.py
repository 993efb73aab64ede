"""Score sample runs and print how close realigned models are to models aligned from scratch.

    make demo                                                  # two anchors and their sample runs
    python examples/evaluate.py runs/sample/shapes-dpo-lora-* --scorers vivid crisp

This is the table of `python -m eval`, from Python: the comparison can be asked for more.
"""

from __future__ import annotations

import argparse

from deradiff.evaluation.comparison import Options, compare
from deradiff.evaluation.tables.errors import approximation_errors
from deradiff.evaluation.tables.means import mean_scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run directories of the sample stage")
    parser.add_argument("--scorers", nargs="+", default=["pickscore"])
    arguments = parser.parse_args()

    # Every image is scored once; a second run finds the scores in runs/cache/scores.
    comparison = compare(arguments.runs, scorers=arguments.scorers, options=Options(margin=5.0))
    for missing in comparison.missing:
        print(f"no target: {missing}")

    # A cell is an anchor and a lambda whose target, the model at beta / lambda, was sampled too.
    for cell in comparison.cells:
        print(f"beta {cell.beta:g} at lambda {cell.lam:g} imitates beta {cell.beta_target:g}")
    for table in (mean_scores(comparison), approximation_errors(comparison)):
        print(f"\n{table.title}\n{table.display.to_string(index=False)}")


if __name__ == "__main__":
    main()
