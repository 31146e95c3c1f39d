"""Cache compression and sparse attention for autoregressive video and world models."""

__version__ = "0.1.0"
