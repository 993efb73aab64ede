#!/usr/bin/env bash
# Two anchors of two rewards, mixed, beside anchors of the mixed reward: on the shapes world.
# About twenty minutes on two CPU cores. The same command resumes.
#
#   make mixtures                   or, with the packages on the path,   bash examples/mixtures.sh
set -euo pipefail
PYTHON=${PYTHON:-python}
SHARES=(0.25 0.5 0.75)

# mix 0.25 -> the reward of this share of vivid, as Hydra writes it
mix() { $PYTHON -c "print(f'{{vivid:{$1},crisp:{1 - $1}}}')"; }

# name 0.25 -> what runs of it are called
name() { $PYTHON -c "print(f'shapes-dpo-full-beta500-crisp{1 - $1}-vivid{$1}')"; }

# Train: an anchor of each reward, and of each mixed reward two, which differ in the training seed
$PYTHON -m train --multirun finetune=full dpo.beta=500 data.scorer=vivid,crisp
for share in "${SHARES[@]}"; do
  $PYTHON -m train --multirun finetune=full dpo.beta=500 data.scorer="$(mix $share)" seed=0,1
done

# Mix the two anchors, from one to the other; sample the others as they are
vivid=runs/train/shapes-dpo-full-beta500-seed0/anchor
crisp=runs/train/shapes-dpo-full-beta500-crisp-seed0/anchor
$PYTHON -m sample anchor="[$vivid,$crisp]" seeds=[0,1,2] name=mixtures
references=()
for share in "${SHARES[@]}"; do
  for seed in 0 1; do
    run=$(name $share)-seed$seed
    $PYTHON -m sample anchor=runs/train/$run/anchor lambdas=[0,1] seeds=[0,1,2] name=$run
    references+=("runs/sample/$run")
  done
done

# Evaluate
IFS=,
$PYTHON -m eval name=mixtures scorers=[vivid,crisp] select.score=vivid \
  samples=[runs/sample/mixtures] references="[${references[*]}]"
