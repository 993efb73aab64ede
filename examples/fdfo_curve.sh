#!/usr/bin/env bash
# Lambda on a real model: the public training curves of SD3.5 medium by FDFO (arXiv 2603.12893).
#
# Five trainings are published as LoRAs, an epoch in every five up to 1000, under a non-commercial
# licence. No beta belongs to them: lambda of the last epoch is compared with earlier epochs at the
# same path KL (docs/early-stopping.md). Images are sampled as the authors' evaluation does: 512
# pixels, 40 steps, no guidance. The hub asks for an account that has accepted the licence of SD3.5
# medium.
#
#   bash examples/fdfo_curve.sh                          800 prompts, an image of each
#   PROMPTS=3200 SEEDS=[0,1,2,3] bash examples/fdfo_curve.sh    as many as the authors' evaluation
#   RUN=fdfo-pickscore-reward-no-cfg SCORE=pickscore bash examples/fdfo_curve.sh
#
# The same command resumes.
set -euo pipefail
PYTHON=${PYTHON:-python}
ANCHORS=${ANCHORS:-nvidia/finite-difference-flow-optimization}
RUN=${RUN:-fdfo-combined-reward-no-cfg}
EPOCHS=${EPOCHS:-20 50 100 200 400}
LAST=${LAST:-1000}
LAMBDAS=${LAMBDAS:-[0,0.1,0.2,0.35,0.5,0.75,1]}
PROMPTS=${PROMPTS:-800}
SEEDS=${SEEDS:-[0]}
SCORE=${SCORE:-pickscore}
SAMPLING=${SAMPLING:-model=sd3 prompts=hpdv2 steps=40 guidance_scale=1 height=512 width=512}
SCORERS=${SCORERS:-scorers=[pickscore,hpsv2,clip,clip-l14]}

# epoch 100 -> the folder of this epoch, and what its sample run is called
epoch() { printf "%s/%s/epoch-%07d" "$ANCHORS" "$RUN" "$1"; }
name() { printf "%s-epoch-%07d" "$RUN" "$1"; }

# The last epoch over lambdas, the others as they are
$PYTHON -m sample anchor="$(epoch "$LAST")" lambdas="$LAMBDAS" $SAMPLING \
  prompts_limit="$PROMPTS" seeds="$SEEDS" name="$(name "$LAST")"
samples=("runs/sample/$(name "$LAST")")
for number in $EPOCHS; do
  $PYTHON -m sample anchor="$(epoch "$number")" lambdas=[1] $SAMPLING \
    prompts_limit="$PROMPTS" seeds="$SEEDS" name="$(name "$number")"
  samples+=("runs/sample/$(name "$number")")
done

# Evaluate
samples=$(IFS=,; echo "${samples[*]}")
$PYTHON -m eval name="$RUN" select.score="$SCORE" samples="[$samples]" "$SCORERS"
