#!/usr/bin/env bash
# Stopping a training early, or turning lambda down after it: on the shapes world, three trainings.
# About forty minutes on two CPU cores. The same command resumes.
#
#   make early-stopping
#   bash examples/early_stopping.sh     the same, with the packages on the path
set -euo pipefail
PYTHON=${PYTHON:-python}
SEEDS=(0 1 2)
CHECKPOINTS=(50 100 200)
LAST=400

# name 0 50 -> what the anchor of this training seed and step is called
name() { echo "early-seed$1-steps$2"; }

samples=()
for seed in "${SEEDS[@]}"; do
  # Train: at a constant rate, a run of fewer steps is the beginning of a longer one
  for steps in "${CHECKPOINTS[@]}" "$LAST"; do
    $PYTHON -m train seed="$seed" steps="$steps" optim.decay=constant dpo.beta=500 \
      name="$(name "$seed" "$steps")"
  done

  # Sample: the last one over lambdas, the others as they are
  last=$(name "$seed" "$LAST")
  $PYTHON -m sample anchor="runs/train/$last/anchor" lambdas=[0,0.1,0.2,0.35,0.5,0.75,1] \
    seeds=[0,1,2] name="$last"
  samples+=("runs/sample/$last")
  for steps in "${CHECKPOINTS[@]}"; do
    run=$(name "$seed" "$steps")
    $PYTHON -m sample anchor="runs/train/$run/anchor" lambdas=[1] seeds=[0,1,2] name="$run"
    samples+=("runs/sample/$run")
  done
done

# Evaluate
IFS=,
$PYTHON -m eval name=early-stopping select.score=vivid samples="[${samples[*]}]"
