"""The action module of Matrix-Game 2.0: mouse and keys steer the tokens by attention over time.

Parameter names are those of the published checkpoints, in which `img_attn` is the mouse's attention and `mouse_attn_q`
makes the keyboard's queries.

Shapes: B batch, F latent frames, n tokens a frame, L = F * n, H heads, D head dim, W pixel frames of a window, P pixel
frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastar.attention.context import Attend
from fastar.backbones.wan.config import ActionModuleConfig


class ActionModule(nn.Module):
    """Adds to each token what the mouse does to it, then what the keys do.

    Mouse: token and its frame's window of mouse moves make queries, keys and values; every place in the picture attends
    to itself over time. Keyboard: tokens query the frames' windows of keys, which all places share.
    """

    def __init__(self, config: ActionModuleConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        inner = config.num_heads * config.head_dim
        self.keyboard_embed = nn.Sequential(
            nn.Linear(config.keyboard_dim, config.key_embedding),
            nn.SiLU(),
            nn.Linear(config.key_embedding, config.key_embedding),
        )
        if config.mouse_dim:
            self.mouse_mlp = nn.Sequential(
                nn.Linear(dim + config.mouse_dim * config.window, inner),
                nn.GELU(approximate="tanh"),
                nn.Linear(inner, inner),
                nn.LayerNorm(inner),
            )
            self.t_qkv = nn.Linear(inner, 3 * inner, bias=False)
            self.img_attn_q_norm = nn.RMSNorm(config.head_dim, eps=config.eps)
            self.img_attn_k_norm = nn.RMSNorm(config.head_dim, eps=config.eps)
            self.proj_mouse = nn.Linear(inner, dim, bias=False)
        self.key_attn_q_norm = nn.RMSNorm(config.head_dim, eps=config.eps)
        self.key_attn_k_norm = nn.RMSNorm(config.head_dim, eps=config.eps)
        self.mouse_attn_q = nn.Linear(dim, inner, bias=False)
        self.keyboard_attn_kv = nn.Linear(config.key_embedding * config.window, 2 * inner, bias=False)
        self.proj_keyboard = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, told: Tensor, layer: int, attend: Attend) -> Tensor:
        """x [B, L, dim] whose frames are `told` actions [B, F, W, mouse_dim + keyboard_dim]: `action_windows`."""
        told = told.to(self.mouse_attn_q.weight.dtype)
        mouse, keys = told.split([self.config.mouse_dim, self.config.keyboard_dim], dim=-1)
        if self.config.mouse_dim:
            x = x + self._mouse(x.to(told.dtype), mouse, layer, attend)
        return x + self._keyboard(x.to(told.dtype), keys, layer, attend)

    def _mouse(self, x: Tensor, mouse: Tensor, layer: int, attend: Attend) -> Tensor:
        batch, frames = mouse.shape[:2]
        places = x.unflatten(1, (frames, -1)).transpose(1, 2)  # B n F dim
        moves = mouse.flatten(2)[:, None].expand(-1, places.shape[1], -1, -1)
        hidden = self.mouse_mlp(torch.cat([places, moves], dim=-1).flatten(0, 1))
        q, k, v = self._heads(self.t_qkv(hidden), 3)  # B * n, H, F, D
        out = attend("mouse", layer, self._unit(q).to(v.dtype), self._unit(k).to(v.dtype), v)
        over_time = out.transpose(1, 2).flatten(2).unflatten(0, (batch, -1))  # B n F inner
        return self.proj_mouse(over_time.transpose(1, 2).flatten(1, 2))

    def _keyboard(self, x: Tensor, keys: Tensor, layer: int, attend: Attend) -> Tensor:
        k, v = self._heads(self.keyboard_attn_kv(self.keyboard_embed(keys).flatten(2)), 2)  # B H F D
        (q,) = self._heads(self.mouse_attn_q(x), 1)  # B H L D
        out = attend("keyboard", layer, self._unit(q).to(v.dtype), self._unit(k).to(v.dtype), v)
        return self.proj_keyboard(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, L, parts * H * D] -> `parts` times [B, H, L, D]."""
        split = x.unflatten(-1, (parts, self.config.num_heads, self.config.head_dim))
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _unit(self, x: Tensor) -> Tensor:
        """Of unit mean square in each head; the published code has weights in these norms and does not apply them."""
        return F.rms_norm(x, (self.config.head_dim,), eps=self.config.eps)


def action_windows(
    config: ActionModuleConfig, *, keyboard: Tensor, mouse: Tensor | None = None, num_frames: int
) -> Tensor:
    """The actions that each of the first `num_frames` latent frames is told: [B, F, W, mouse_dim + keyboard_dim].

    Latent frame f ends at pixel frame 4 f and is told the W = 12 pixel frames up to 4 f - 1; what precedes the first
    pixel frame is like it. A rollout takes the windows of its frames as its actions.

    Args:
        keyboard: [B, P, keyboard_dim] of pixel frames from the video's first on, usually 0 and 1.
        mouse: [B, P, mouse_dim], camera moves; None exactly where the module has no mouse.

    Raises:
        ValueError: shapes that do not fit, or fewer than 4 F - 3 pixel frames.
    """
    if (mouse is None) != (config.mouse_dim == 0):
        raise ValueError(f"Pass mouse exactly when the module has one: mouse_dim is {config.mouse_dim}.")
    actions = keyboard if mouse is None else torch.cat([mouse, keyboard], dim=-1)
    width, needed = config.mouse_dim + config.keyboard_dim, 1 + config.pixel_frames * (num_frames - 1)
    if actions.dim() != 3 or actions.shape[-1] != width or actions.shape[1] < needed:
        raise ValueError(
            f"Actions of {num_frames} latent frames must be [batch, at least {needed} pixel frames, {width}], mouse "
            f"first, got {tuple(actions.shape)}."
        )
    padded = torch.cat([actions[:, :1].expand(-1, config.window, -1), actions[:, :needed]], dim=1)
    return padded.unfold(1, config.window, config.pixel_frames)[:, :num_frames].transpose(2, 3)
