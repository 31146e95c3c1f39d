"""Simulators, prompts and video input and output."""
