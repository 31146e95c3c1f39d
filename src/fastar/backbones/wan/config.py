"""Sizes of a causal Wan transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fastar.backbones.odometry import FIELD_OF_VIEW, HARMONICS, WAVELENGTHS

Numerics = Literal["wan", "diffusers", "self_forcing"]


@dataclass(frozen=True, kw_only=True)
class ActionModuleConfig:
    """Sizes of Matrix-Game 2.0's action module, which the first `layers` blocks have.

    A latent frame is told the mouse (`mouse_dim` numbers, 0: there is none) and the keys (`keyboard_dim`) of
    `window_frames` latent frames, `pixel_frames` pixel frames each. Attention is over time, in `num_heads` heads of
    `head_dim`, to the last `attention_frames` latent frames, those of the current chunk included. `rope_dims` of a
    head turn with the frame, the row and the column; the latter two are always 0.
    """

    layers: int = 15
    mouse_dim: int = 2
    keyboard_dim: int = 4
    key_embedding: int = 128
    num_heads: int = 16
    head_dim: int = 64
    window_frames: int = 3
    pixel_frames: int = 4
    attention_frames: int = 6
    rope_dims: tuple[int, int, int] = (8, 28, 28)
    rope_theta: float = 256.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_dims", tuple(self.rope_dims))  # YAML and JSON hold lists
        if sum(self.rope_dims) != self.head_dim:
            raise ValueError(
                f"rope_dims {self.rope_dims} must sum to head_dim {self.head_dim}; change either."
            )
        if self.mouse_dim < 0 or self.keyboard_dim < 1:
            raise ValueError(
                "An action module needs keys (keyboard_dim at least 1) and mouse_dim at least 0, got "
                f"{self.keyboard_dim} and {self.mouse_dim}."
            )

    @property
    def window(self) -> int:
        """Pixel frames whose actions one latent frame is told."""
        return self.window_frames * self.pixel_frames


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes of a causal Wan transformer.

    `text_dim` None means no text cross-attention, `image_dim` None none to an image's tokens; with both, the image has
    keys and values of its own (Wan I2V), alone it takes those that text would (Matrix-Game 2.0). Where `in_channels`
    exceed `out_channels`, the rest tells of known frames: 4 of a mask, then their latents. `num_actions` None means no
    action input; `action_module` is that of Matrix-Game, whose actions are numbers. `fps` is what a model that tells
    16 frames a second from others is told (SkyReels-V2-DF 1.3B; 24), None for the rest. `action_motions` gives
    (steps forward, degrees to the left) of each action; with it queries and keys also hold their token's ray by
    dead reckoning, in features of these `heading_harmonics` and `position_wavelengths`, for a camera of this
    `field_of_view` in degrees (`fastar.backbones.odometry`). Text shorter than `text_len` is padded with zero
    embeddings, as Wan does; None takes any length as it is. `numerics` says where float32 is used in a
    bfloat16 model: `wan` keeps the residual stream, norms, time, modulation and head in float32; `diffusers`
    computes norms, the time's embedding and modulation in float32 and stores the stream in the model's dtype;
    `self_forcing` stays in the model's dtype. In a float32 model all three are the same.
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
    image_dim: int | None = None
    num_actions: int | None = None
    action_module: ActionModuleConfig | None = None
    fps: int | None = None
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
        if isinstance(self.action_module, Mapping):  # from JSON
            object.__setattr__(self, "action_module", ActionModuleConfig(**self.action_module))
        if self.action_module is not None and self.num_actions is not None:
            raise ValueError("num_actions and action_module exclude each other; leave one out.")
        if self.in_channels < self.out_channels:
            raise ValueError(
                f"in_channels {self.in_channels} hold the out_channels {self.out_channels} and more; change either."
            )
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

    @property
    def condition_channels(self) -> int:
        """Input channels that tell of known frames: a mask, then their latents; 0 for most backbones."""
        return self.in_channels - self.out_channels
