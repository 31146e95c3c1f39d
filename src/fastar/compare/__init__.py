"""Methods x seeds x protocols on one backbone: what `experiments/compare.py` and `experiments/rollout.py` run."""
