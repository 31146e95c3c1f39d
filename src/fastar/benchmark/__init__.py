"""Timings of parts on one machine: what `experiments/benchmark.py` runs. Each states its ceiling before it measures."""
