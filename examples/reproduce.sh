#!/usr/bin/env bash
# The paper's experiment on the shapes world, from scratch: every table and figure of RESULTS.md.
# About half an hour on two CPU cores. The same command resumes.
#
#   make reproduce                  or, with the packages on the path,   bash examples/reproduce.sh
set -euo pipefail
PYTHON=${PYTHON:-python}
BETAS=(500 1000 2000 5000 8000 10000)

# join a b c -> a,b,c: a list as Hydra writes it
join() { local IFS=,; echo "$*"; }

# anchors -seed0 -> the anchors of every beta, trained with that rule and seed
anchors() { printf "runs/train/shapes-dpo-full-beta%s$1/anchor\n" "${BETAS[@]}"; }

# samples -seed0 -> the sample runs of those anchors
samples() { printf "runs/sample/shapes-dpo-full-beta%s$1-exact-euler_ancestral\n" "${BETAS[@]}"; }

# Train: six betas, two seeds; and once more with one learning rate for every beta
$PYTHON -m train --multirun finetune=full dpo.beta="$(join "${BETAS[@]}")" seed=0,1
$PYTHON -m train --multirun finetune=full dpo.beta="$(join "${BETAS[@]}")" optim.rule=fixed

# Realign every anchor to every beta. The second seed is sampled as it is: it gives the seed floor
$PYTHON -m sample --multirun anchor="$(join $(anchors -seed0) $(anchors -fixed-seed0))" \
  lambdas=[0] targets="[$(join "${BETAS[@]}")]" seeds=[0,1,2]
$PYTHON -m sample --multirun anchor="$(join $(anchors -seed1))" lambdas=[1] seeds=[0,1,2]

# The other modes, on one anchor
first=runs/train/shapes-dpo-full-beta500-seed0/anchor
$PYTHON -m sample anchor=$first lambdas=[0.1,0.25,0.5] mode=weights
$PYTHON -m sample anchor=$first lambdas=[0.1,0.25,0.5] mode=reuse
$PYTHON -m sample anchor=$first lambdas=[0.1,0.25,0.5] particles=4

# Evaluate: each rule by itself, and the modes beside each other
$PYTHON -m eval name=reproduce-inverse_beta select.score=vivid \
  samples="[$(join $(samples -seed0) $(samples -seed1))]"
$PYTHON -m eval name=reproduce-fixed select.score=vivid samples="[$(join $(samples -fixed-seed0))]"

modes=()
for mode in exact weights reuse4 particles4; do
  modes+=("runs/sample/shapes-dpo-full-beta500-seed0-$mode-euler_ancestral")
done
targets=()
for seed in 0 1; do
  for beta in 1000 2000 5000; do
    targets+=("runs/sample/shapes-dpo-full-beta$beta-seed$seed-exact-euler_ancestral")
  done
done
$PYTHON -m eval name=reproduce-modes select.score=vivid samples="[$(join "${modes[@]}")]" \
  references="[$(join "${targets[@]}")]"
