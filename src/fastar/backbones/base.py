"""A backbone as the rest of the library handles it: transformer, autoencoder, and what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from fastar.backbones.autoencoder import SCALE, Autoencoder, AutoencoderConfig
from fastar.backbones.wan.config import WanConfig
from fastar.backbones.wan.transformer import CausalWanTransformer


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Sizes of a backbone and the clips it is made for.

    `frame_size` is (height, width) in pixels, `chunk_frames` the latent frames denoised together,
    `context_frames` the latent frames of history it is trained with. `autoencoder` is None for backbones
    whose latents come from elsewhere.
    """

    name: str
    transformer: WanConfig
    autoencoder: AutoencoderConfig | None
    frame_size: tuple[int, int]
    chunk_frames: int
    context_frames: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "frame_size", tuple(self.frame_size))  # YAML and JSON hold lists
        if self.chunk_frames < 1 or self.context_frames % self.chunk_frames:
            raise ValueError(
                f"context_frames {self.context_frames} must be whole chunks of {self.chunk_frames} frames."
            )
        if any(side % (SCALE * self.transformer.patch) for side in self.frame_size):
            raise ValueError(
                f"frame_size {self.frame_size} must be multiples of {SCALE * self.transformer.patch} pixels "
                f"(1/{SCALE} latents, patches of {self.transformer.patch})."
            )
        if self.autoencoder is not None and self.autoencoder.latent_channels != self.transformer.out_channels:
            raise ValueError(
                f"The autoencoder makes {self.autoencoder.latent_channels} latent channels and the "
                f"transformer makes {self.transformer.out_channels}; make them equal."
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, rows, columns) of one latent frame."""
        return self.transformer.out_channels, self.frame_size[0] // SCALE, self.frame_size[1] // SCALE

    @property
    def tokens_per_frame(self) -> int:
        _, rows, columns = self.latent_shape
        return rows * columns // self.transformer.patch**2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BackboneConfig:
        """Inverse of `to_dict`; ValueError names fields that are missing or unknown."""
        values = dict(values)
        _require_fields(cls, values)
        values["transformer"] = _build(WanConfig, values["transformer"])
        if values["autoencoder"] is not None:
            values["autoencoder"] = _build(AutoencoderConfig, values["autoencoder"])
        return cls(**values)


@dataclass
class Backbone:
    """A transformer and its autoencoder; `sha256` is that of the file they came from, None when fresh.

    With a LoRA merged in, it is a hash of both, and `lora_sha256` that of the LoRA alone.
    """

    config: BackboneConfig
    transformer: CausalWanTransformer
    autoencoder: Autoencoder | None
    sha256: str | None = None
    lora_sha256: str | None = None

    def modules(self) -> dict[str, nn.Module]:
        """The networks by the name that prefixes their tensors in a checkpoint."""
        networks: dict[str, nn.Module] = {"transformer": self.transformer}
        if self.autoencoder is not None:
            networks["autoencoder"] = self.autoencoder
        return networks


def build_backbone(
    *,
    name: str,
    transformer: WanConfig,
    autoencoder: AutoencoderConfig | None,
    frame_size: tuple[int, int],
    chunk_frames: int,
    context_frames: int,
    device: torch.device | str | None = None,
) -> Backbone:
    """A fresh backbone of a config in conf/backbone, initialised for training, on `device` or the default."""
    config = BackboneConfig(
        name=name,
        transformer=transformer,
        autoencoder=autoencoder,
        frame_size=frame_size,
        chunk_frames=chunk_frames,
        context_frames=context_frames,
    )
    return build_from_config(config, device=device)


def build_from_config(config: BackboneConfig, *, device: torch.device | str | None = None) -> Backbone:
    """A fresh backbone of `config`; `device="meta"` builds shapes without memory."""
    with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
        return Backbone(
            config=config,
            transformer=CausalWanTransformer(config.transformer),
            autoencoder=None if config.autoencoder is None else Autoencoder(config.autoencoder),
        )


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    _require_fields(kind, values, partial=True)
    return kind(**values)


def _require_fields(kind: type, values: Mapping[str, Any], *, partial: bool = False) -> None:
    """Unknown names are errors; missing ones too, unless `partial` leaves them to the defaults."""
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(values) - known)
    missing = [] if partial else sorted(known - set(values))
    if unknown or missing:
        raise ValueError(
            f"{kind.__name__} does not fit: unknown {unknown or 'none'}, missing {missing or 'none'}; "
            f"its fields are {sorted(known)}."
        )
