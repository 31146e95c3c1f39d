#!/usr/bin/env bash
# Every design question on both trained backbones, and quality free-running: the runs of scripts/study.txt on all GPUs of this machine.
#
#   bash scripts/study.sh [MINUTES] [OVERRIDES...]     stops after MINUTES (0: never); given again, it goes on where it stopped
#   bash scripts/study.sh 0 seeds=2 batch=2            fewer clips
#
#   PYTHON    interpreter                              (.venv/bin/python, or python3)
#   PER_GPU   processes that share a GPU               (3; 80 GB hold three at 20 clips each)
#   RUNS      folder of all runs                       (outputs)
#   OUT       where the numbers of finished runs go, as one small archive, study.tgz, and the log   (outputs)
#
# An archive unpacked in RUNS is gone on with; dense trajectories, which it leaves out, are made again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
RUNS=${RUNS:-outputs}
OUT=${OUT:-outputs}
minutes=${1:-0}
shift || true
limit=()
[[ $minutes == 0 ]] || limit=(--minutes "$minutes")

mkdir -p "$RUNS" "$OUT"
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
"$PYTHON" scripts/study.py ${limit[@]+"${limit[@]}"} --per-gpu "${PER_GPU:-3}" --outputs "$RUNS" "$@" 2>&1 | tee -a "$OUT/study.log"
status=$?
(cd "$RUNS" && find . \( -path './study_*/*/metrics.parquet' -o -path './quality_*/*/metrics.parquet' \) -printf '%h/summary.json\0%p\0') \
  | tar -C "$RUNS" --null --files-from=- -czf "$OUT/study.tgz"
exit $status
