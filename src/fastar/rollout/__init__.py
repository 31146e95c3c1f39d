"""Noise schedules, loops and the rollout that owns a backbone and a method's state."""
