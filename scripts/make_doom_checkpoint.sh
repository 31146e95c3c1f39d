#!/usr/bin/env bash
# How checkpoints/doom is made: train on all GPUs at hand, then measure what its model card says.
#   scripts/make_doom_checkpoint.sh outputs/doom            as configured (conf/training/default.yaml)
#   scripts/make_doom_checkpoint.sh outputs/doom training.transformer.max_minutes=60
# Needs the extras doom and features. Interrupted, the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
OUTPUT=${1:?usage: $0 OUTPUT [hydra overrides]}
shift
PYTHON=${PYTHON:-python3}
GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
if [ "$GPUS" -gt 1 ]; then
  "$PYTHON" -m torch.distributed.run --nproc-per-node="$GPUS" experiments/train.py backbone=doom output="$OUTPUT" "$@"
else
  "$PYTHON" experiments/train.py backbone=doom output="$OUTPUT" "$@"
fi
"$PYTHON" experiments/evaluate.py checkpoint="$OUTPUT/checkpoint" output="$OUTPUT/evaluation"
"$PYTHON" experiments/evaluate.py checkpoint="$OUTPUT/checkpoint_float32" output="$OUTPUT/evaluation_float32" \
  'measures=[autoencoder,next_frame]'
