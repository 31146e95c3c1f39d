"""The action module by a second, slow reading of its definition; windows of actions; what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastar.attention.rope import RotaryEmbedding
from fastar.backbones.reference import BlockCausalAttend
from fastar.backbones.wan.actions import ActionModule, action_windows
from fastar.backbones.wan.config import ActionModuleConfig, WanConfig

CONFIG = ActionModuleConfig(
    layers=1,
    keyboard_dim=3,
    key_embedding=4,
    num_heads=2,
    head_dim=16,
    rope_dims=(8, 4, 4),
    attention_frames=3,
)
DIM, GRID, FRAMES, CHUNK, FIRST = 10, (2, 2), 4, 2, 1500
PLACES, WINDOW = GRID[0] * GRID[1], 12


def make_module() -> ActionModule:
    torch.manual_seed(0)
    module = ActionModule(CONFIG, DIM).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def make_actions(frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """Mouse and keyboard of every pixel frame of two videos."""
    generator = torch.Generator().manual_seed(1)
    mouse = torch.randn(2, 4 * frames - 3, 2, generator=generator)
    return mouse, torch.randint(2, (2, 4 * frames - 3, 3), generator=generator).float()


def turned(x: Tensor, frame: int) -> Tensor:
    """A head [16] of a frame: four pairs turn by frame / 256^(i / 4), the other four stay."""
    angles = torch.tensor([frame * 256 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    numbers = torch.view_as_complex(x[:8].double().view(4, 2)) * torch.polar(torch.ones(4).double(), angles)
    return torch.cat([torch.view_as_real(numbers).flatten().float(), x[8:]])


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt()


def read(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = torch.stack([q @ k / 4 for k in keys]).softmax(dim=0)
    return sum(w * v for w, v in zip(weights, values, strict=True))  # type: ignore[return-value]


def seen_from(frame: int) -> range:
    """Up to the end of its chunk, three frames back from there."""
    end = (frame // CHUNK + 1) * CHUNK
    return range(max(0, end - CONFIG.attention_frames), end)


def told_to(actions: Tensor, frame: int) -> Tensor:
    """[12, dims] of one video: the pixel frames up to 4 f - 1; the first stands for those before it."""
    return torch.stack([actions[max(0, pixel)] for pixel in range(4 * frame - WINDOW, 4 * frame)])


def by_hand(module: ActionModule, x: Tensor, mouse: Tensor, keyboard: Tensor) -> Tensor:
    """One video [L, dim], token by token and head by head."""
    x = x.clone().unflatten(0, (FRAMES, PLACES))
    moved = x.clone()
    for place in range(PLACES):
        qkv = []
        for frame in range(FRAMES):
            hidden = torch.cat([x[frame, place], told_to(mouse, frame).flatten()])
            qkv.append(module.t_qkv(module.mouse_mlp(hidden)).view(3, 2, 16))
        for frame in range(FRAMES):
            heads = [
                read(
                    turned(unit(qkv[frame][0, h]), FIRST + frame),
                    [turned(unit(qkv[f][1, h]), FIRST + f) for f in seen_from(frame)],
                    [qkv[f][2, h] for f in seen_from(frame)],
                )
                for h in range(2)
            ]
            moved[frame, place] += module.proj_mouse(torch.cat(heads))
    kv = [
        module.keyboard_attn_kv(module.keyboard_embed(told_to(keyboard, f)).flatten()).view(2, 2, 16)
        for f in range(FRAMES)
    ]
    out = moved.clone()
    for frame in range(FRAMES):
        for place in range(PLACES):
            q = module.mouse_attn_q(moved[frame, place]).view(2, 16)
            heads = [
                read(
                    turned(unit(q[h]), FIRST + frame),
                    [turned(unit(kv[f][0, h]), FIRST + f) for f in seen_from(frame)],
                    [kv[f][1, h] for f in seen_from(frame)],
                )
                for h in range(2)
            ]
            out[frame, place] += module.proj_keyboard(torch.cat(heads))
    return out.flatten(0, 1)


@torch.no_grad()
def test_the_module_is_its_definition() -> None:
    module, (mouse, keyboard) = make_module(), make_actions()
    x = torch.randn(2, FRAMES * PLACES, DIM, generator=torch.Generator().manual_seed(2))
    attend = BlockCausalAttend(
        rope=RotaryEmbedding(16),
        grid=GRID,
        chunk_frames=CHUNK,
        first_frame=FIRST,
        action_rope=RotaryEmbedding(16, CONFIG.rope_theta, axis_dims=CONFIG.rope_dims),
        action_frames=CONFIG.attention_frames,
    )
    out = module(x, action_windows(CONFIG, mouse=mouse, keyboard=keyboard, num_frames=FRAMES), 0, attend)
    expected = torch.stack([by_hand(module, *video) for video in zip(x, mouse, keyboard, strict=True)])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (out - x).abs().max() > 0.5


def test_a_latent_frame_is_told_the_twelve_pixel_frames_before_its_last() -> None:
    keyboard = torch.arange(17.0)[None, :, None]  # of five latent frames
    config = replace(CONFIG, keyboard_dim=1, mouse_dim=0)
    told = action_windows(config, keyboard=keyboard, num_frames=5)[0, :, :, 0]
    assert told.shape == (5, 12)
    assert told[0].tolist() == [0] * 12
    assert told[1].tolist() == [0] * 9 + [1, 2, 3]
    assert told[3].tolist() == list(range(12))
    assert told[4].tolist() == list(range(4, 16))
    shorter = action_windows(config, keyboard=keyboard[:, :9], num_frames=3)[0, :, :, 0]
    assert torch.equal(shorter, told[:3])  # later actions change nothing before them


def test_actions_that_do_not_fit_are_refused() -> None:
    mouse, keyboard = make_actions()
    with pytest.raises(ValueError, match=r"Pass mouse exactly when the module has one: mouse_dim is 2"):
        action_windows(CONFIG, keyboard=keyboard, num_frames=FRAMES)
    with pytest.raises(ValueError, match=r"at least 17 pixel frames, 5\], mouse first, got \(2, 13, 5\)"):
        action_windows(CONFIG, mouse=mouse, keyboard=keyboard, num_frames=FRAMES + 1)
    with pytest.raises(ValueError, match=r"rope_dims \(8, 4, 4\) must sum to head_dim 64"):
        ActionModuleConfig(rope_dims=(8, 4, 4))
    with pytest.raises(ValueError, match="keyboard_dim at least 1"):
        ActionModuleConfig(keyboard_dim=0)
    with pytest.raises(ValueError, match="num_actions and action_module exclude each other"):
        WanConfig(dim=24, num_layers=1, num_heads=2, ffn_dim=8, num_actions=3, action_module=CONFIG)
    with pytest.raises(ValueError, match=r"axis_dims must be even and sum to 16, got \(8, 8, 4\)"):
        RotaryEmbedding(16, axis_dims=(8, 8, 4))


def test_published_norms_hold_weights_that_are_not_applied() -> None:
    module = make_module()
    x = torch.randn(1, 2, 5, 16)
    expected = functional.normalize(x, dim=-1) * 4
    torch.testing.assert_close(module._unit(x), expected, rtol=1e-4, atol=1e-4)
