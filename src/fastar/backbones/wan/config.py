"""Sizes of a causal Wan transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastar.backbones.odometry import FIELD_OF_VIEW, HARMONICS, WAVELENGTHS

Numerics = Literal["wan", "diffusers", "self_forcing"]


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes of a causal Wan transformer.

    `text_dim` None means no text cross-attention, `num_actions` None no action input. `action_motions` gives
    (steps forward, degrees to the left) of each action; with it queries and keys also hold their token's ray by
    dead reckoning, in features of these `heading_harmonics` and `position_wavelengths`, for a camera of this
    `field_of_view` in degrees (`fastar.backbones.odometry`). Text shorter than `text_len` is padded with zero
    embeddings, as Wan does; None takes any length as it is. `numerics` says where float32 is used in a
    bfloat16 model: `wan` keeps the residual stream, norms and modulation in float32; `diffusers` computes
    norms and modulation in float32 and stores the stream in the model's dtype; `self_forcing` stays in the
    model's dtype. In a float32 model all three are the same.
    """

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    freq_dim: int = 256
    text_dim: int | None = None
    text_len: int | None = None
    num_actions: int | None = None
    action_motions: tuple[tuple[float, float], ...] | None = None
    heading_harmonics: tuple[int, ...] = HARMONICS
    position_wavelengths: tuple[float, ...] = WAVELENGTHS
    field_of_view: float = FIELD_OF_VIEW
    patch: int = 2
    eps: float = 1e-6
    rope_theta: float = 10000.0
    numerics: Numerics = "wan"

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not divisible by num_heads {self.num_heads}; change either.")
        for name in ("heading_harmonics", "position_wavelengths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # YAML and JSON hold lists
        if self.action_motions is not None:
            motions = tuple((float(step), float(turn)) for step, turn in self.action_motions)
            object.__setattr__(self, "action_motions", motions)
            if len(motions) != self.num_actions:
                raise ValueError(
                    f"action_motions needs one pair for each of the {self.num_actions} actions, got {len(motions)}."
                )
        if self.numerics not in ("wan", "diffusers", "self_forcing"):
            raise ValueError(f"numerics must be wan, diffusers or self_forcing, got {self.numerics!r}.")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads
