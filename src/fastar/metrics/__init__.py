"""Measures of speed, memory, fidelity and quality. What each word means: the module that computes it."""
