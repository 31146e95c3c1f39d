"""Causal video diffusion transformer in Wan 2.1's layout; Wan2.1, Matrix-Game 2.0 and our models are configs of it.

Parameter names are those of the original Wan checkpoints. The forward pass knows frames, not history: every
attention goes through the `attend` it is given, which alone decides what a token sees.

Shapes: B batch, F latent frames, C latent channels, h x w latent pixels, n tokens a frame, L = F * n tokens,
H heads, D head dim, S tokens of a prompt or an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastar.attention.context import Attend, Stream
from fastar.attention.rope import RotaryEmbedding
from fastar.backbones.odometry import Odometer
from fastar.backbones.wan.config import WanConfig
from fastar.backbones.wan.layers import (
    ImageEmbedding,
    KeysValues,
    WanBlock,
    WanHead,
    WanSelfAttention,
    run_in,
)

if TYPE_CHECKING:
    from fastar.backbones.wan.fused import FusedPass

ProjectedTokens = tuple[KeysValues, ...]
"""Each layer's keys and values of a prompt, or of an image."""

# Of ray_q = ray_k at the start: 34 features in a head of 64 then add about 3 to the logit of an equal ray.
RAY_STD = 0.15


class CausalWanTransformer(nn.Module):
    """Velocity field over latent frames, each frame at its own noise level and with its own action."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = RotaryEmbedding(config.head_dim, config.rope_theta)
        dim = config.dim
        # A Conv3d for the checkpoints' weight shape; as kernel = stride, it is applied as a matrix product.
        self.patch_embedding = nn.Conv3d(
            config.in_channels,
            dim,
            kernel_size=(1, config.patch, config.patch),
            stride=(1, config.patch, config.patch),
        )
        if config.text_dim is not None:
            self.text_embedding = nn.Sequential(
                nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
            )
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.fps is not None:
            self.fps_embedding = nn.Embedding(2, dim)
            self.fps_projection = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.num_actions is not None:
            self.action_embedding = nn.Embedding(config.num_actions, dim)
        self.action_rope: RotaryEmbedding | None = None
        if config.action_module is not None:
            module = config.action_module
            self.action_rope = RotaryEmbedding(module.head_dim, module.rope_theta, axis_dims=module.rope_dims)
        self.odometer: Odometer | None = None
        if config.action_motions is not None:
            self.odometer = Odometer(
                config.action_motions,
                config.heading_harmonics,
                config.position_wavelengths,
                config.field_of_view,
            )
        num_rays = 0 if self.odometer is None else self.odometer.num_features
        self.blocks = nn.ModuleList(WanBlock(config, layer, num_rays) for layer in range(config.num_layers))
        self.head = WanHead(config)
        self.fused: FusedPass | None = None  # set by `fastar.backbones.wan.fused.fuse`
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start for training: Xavier linears, normal(0.02) time and text, zero actions and head; equal rays attend."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv3d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, WanSelfAttention) and module.num_rays:
                nn.init.normal_(module.ray_q.weight, std=RAY_STD)
                module.ray_k.weight.copy_(module.ray_q.weight)
        embeddings = [self.time_embedding, self.time_projection]
        if self.config.text_dim is not None:
            embeddings.append(self.text_embedding)
        for embedding in embeddings:
            for module in embedding:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        if self.config.num_actions is not None:
            nn.init.zeros_(self.action_embedding.weight)
        nn.init.zeros_(self.head.head.weight)

    def grid_of(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens in one frame of `latents` [..., h, w]."""
        height, width = latents.shape[-2:]
        patch = self.config.patch
        if height % patch or width % patch:
            raise ValueError(
                f"Latent frames of {height}x{width} do not divide into {patch}x{patch} patches; resize."
            )
        return height // patch, width // patch

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        *,
        attend: Attend,
        actions: Tensor | None = None,
        poses: Tensor | None = None,
        text: Tensor | ProjectedTokens | None = None,
        image: Tensor | ProjectedTokens | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Velocity (noise - clean) [B, F, out_channels, h, w] of `latents` [B, F, out_channels, h, w].

        `timesteps` [B, F] are noise levels, 0 (clean) to 1000 (noise), one per frame; `actions` [B, F] int64
        is what led to each frame, or for an action module float [B, F, W, dims] (`action_windows`), `poses` [B, F, 3]
        where that leaves the camera (`self.odometer`). `text` [B, S, text_dim] are the prompt's token embeddings and
        `image` [B, S, image_dim] the first frame's, or what `project_text` and `project_image` made of them;
        `condition` [B, F, condition_channels, h, w] is read beside the latents. Raises ValueError on shapes that do
        not fit, and when an input the config asks for is missing or one it has no use for is given.
        """
        self._check(latents, timesteps, actions, poses, condition)
        grid = self.grid_of(latents)
        told = actions if self.config.action_module is not None else None
        e = self._embed_time(timesteps, actions if told is None else None)
        modulation = self._project_time(e)
        tokens = self._patchify(latents if condition is None else torch.cat([latents, condition], 2), grid)
        rays = None if poses is None else self._rays(poses, grid, tokens.dtype)
        given: dict[Stream, Tensor | ProjectedTokens | None] = {"text": text, "image": image}
        contexts = {stream: self._context(stream, tokens) for stream, tokens in given.items()}
        if self.fused is not None:
            return self._unpatchify(self.fused(tokens, e, modulation, contexts, attend, rays), grid)
        for layer, block in enumerate(self.blocks):
            read = {s: c[layer] if isinstance(c, tuple) else c for s, c in contexts.items() if c is not None}
            tokens = block(tokens, modulation, read, attend, rays, told)
        return self._unpatchify(self.head(tokens, e), grid)

    def project_text(self, text: Tensor) -> ProjectedTokens:
        """Each layer's keys and values of a prompt [B, S, text_dim]: they depend on nothing else, once will do."""
        return self._project("text", text)

    def project_image(self, image: Tensor) -> ProjectedTokens:
        """The same of the tokens of the first frame [B, S, image_dim]."""
        return self._project("image", image)

    def _project(self, stream: Stream, tokens: Tensor) -> ProjectedTokens:
        embedded = self._context(stream, tokens)
        assert isinstance(embedded, Tensor)
        blocks = cast(Iterable[WanBlock], self.blocks)
        return tuple(block.cross_attn.project(stream, embedded) for block in blocks)

    def _context(
        self, stream: Stream, tokens: Tensor | ProjectedTokens | None
    ) -> Tensor | ProjectedTokens | None:
        """Tokens of a prompt or an image, embedded unless they are projected already; ValueError if they do not fit."""
        width = self.config.text_dim if stream == "text" else self.config.image_dim
        if (tokens is None) != (width is None):
            raise ValueError(f"Pass {stream} exactly when the backbone reads it: {stream}_dim is {width}.")
        if isinstance(tokens, tuple) and len(tokens) != self.config.num_layers:
            raise ValueError(
                f"projected {stream} must be of {self.config.num_layers} layers, got {len(tokens)}: use "
                f"project_{stream}."
            )
        if not isinstance(tokens, Tensor):
            return tokens
        if tokens.dim() != 3 or tokens.shape[-1] != width:
            raise ValueError(f"{stream} must be [batch, tokens, {width}], got {tuple(tokens.shape)}.")
        if stream == "image":
            return self.img_emb(tokens.to(self.patch_embedding.weight.dtype))
        return self._embed_text(tokens)

    def _check(
        self,
        latents: Tensor,
        timesteps: Tensor,
        actions: Tensor | None,
        poses: Tensor | None,
        condition: Tensor | None,
    ) -> None:
        config, frames = self.config, latents.shape[:2]
        if latents.dim() != 5 or latents.shape[2] != config.out_channels:
            raise ValueError(
                f"latents must be [batch, frames, {config.out_channels}, h, w], got {tuple(latents.shape)}."
            )
        if timesteps.shape != frames:
            raise ValueError(
                f"timesteps must be one per frame, {tuple(frames)}, got {tuple(timesteps.shape)}."
            )
        self._check_actions(actions, frames)
        if (poses is None) != (self.odometer is None):
            raise ValueError("Pass poses exactly when the backbone has an odometer (config.action_motions).")
        if poses is not None and poses.shape != (*frames, 3):
            raise ValueError(
                f"poses must be one row of three per frame, {(*frames, 3)}, got {tuple(poses.shape)}."
            )
        expected = (*frames, config.condition_channels, *latents.shape[3:])
        if (condition is None) != (config.condition_channels == 0) or (
            condition is not None and condition.shape != expected
        ):
            raise ValueError(
                f"condition must be {expected}, nothing where that has no channels, got "
                f"{None if condition is None else tuple(condition.shape)}."
            )

    def _check_actions(self, actions: Tensor | None, frames: torch.Size) -> None:
        config, module = self.config, self.config.action_module
        if (actions is None) != (config.num_actions is None and module is None):
            raise ValueError(
                f"Pass actions exactly when the backbone has them: num_actions is {config.num_actions}, "
                f"action_module {'None' if module is None else 'there'}."
            )
        told = () if module is None else (module.window, module.mouse_dim + module.keyboard_dim)
        if actions is not None and actions.shape != (*frames, *told):
            raise ValueError(
                f"actions must be one per frame, {(*frames, *told)}, got {tuple(actions.shape)}"
                f"{': use action_windows' if told else ''}."
            )

    def _embed_time(self, timesteps: Tensor, actions: Tensor | None) -> Tensor:
        """Embedding of each frame's noise level, plus that of its action: [B, F] -> [B, F, dim]."""
        with torch.autocast(timesteps.device.type, enabled=False):
            waves, stored = sinusoid(timesteps, self.config.freq_dim), self.patch_embedding.weight.dtype
            e = run_in(
                stored if self.config.numerics == "self_forcing" else torch.float32,
                self.time_embedding,
                waves,
            )
            if actions is not None:
                e = e + self.action_embedding(actions)
            return e if self.config.numerics == "wan" else e.to(stored)

    def _rays(self, poses: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Features of the ray of each token: [B, F, 3] -> [B, L, num_rays]."""
        assert self.odometer is not None
        rows, columns = grid
        rays = self.odometer.features(poses, columns).to(dtype)
        return rays[:, :, None].expand(-1, -1, rows, -1, -1).flatten(1, 3)

    def _project_time(self, e: Tensor) -> Tensor:
        with torch.autocast(e.device.type, enabled=False):
            projected = run_in(e.dtype, self.time_projection, e)
            if self.config.fps is not None:
                rate = self.fps_embedding.weight[0 if self.config.fps == 16 else 1]
                projected = projected + run_in(e.dtype, self.fps_projection, rate)
            return projected.unflatten(-1, (6, -1))

    def _embed_text(self, text: Tensor) -> Tensor:
        text_len = self.config.text_len
        if text_len is not None:
            if text.shape[1] > text_len:
                raise ValueError(
                    f"The prompt has {text.shape[1]} tokens and the backbone reads {text_len}; truncate it."
                )
            text = F.pad(text, (0, 0, 0, text_len - text.shape[1]))
        return self.text_embedding(text.to(self.patch_embedding.weight.dtype))

    def _patchify(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, F, C, h, w] -> [B, L, dim]."""
        p = self.config.patch
        patches = latents.unflatten(-1, (grid[1], p)).unflatten(-3, (grid[0], p))  # B F C rows p columns p
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, L, p * p * C] -> [B, F, C, h, w]."""
        p = self.config.patch
        patches = patches.unflatten(-1, (p, p, -1)).unflatten(1, (-1, *grid))  # B F rows columns p p C
        return patches.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of `timesteps` [...] at dim/2 frequencies 10000^(-2i/dim): float64 [..., dim]."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.to(torch.float64).unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
