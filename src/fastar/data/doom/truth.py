"""The truth about revisits: which pixels of a frame show something that earlier frames showed.

A pixel's surface point is known (pose and depth). It was seen in an earlier frame if it projects into that
frame and the depth there agrees, so nothing hid it. Depths are compared as 1 / depth, which is affine over
the picture of any flat surface: bilinear interpolation is then exact on walls, floors and ceilings, also at
grazing angles.

`pose` is float [F, 4]: x, y, z of the eye (map units) and the heading (degrees, counter-clockwise);
`depth` is float [F, 96, 128], along the view axis (map units); both as `DoomClips(with_truth=True)` gives
them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastar.data.doom.camera import HEIGHT, WIDTH
from fastar.data.doom.raycast import FOCAL_X, FOCAL_Y

RECENT = 16  # frames before a turning point that a short window would still hold


def unproject(pose: Tensor, depth: Tensor) -> Tensor:
    """Surface points of one frame: pose [4], depth [H, W] -> map positions float32 [H * W, 3]."""
    height, width = depth.shape
    depth = depth.float().reshape(-1)
    row, column = torch.meshgrid(
        torch.arange(height, device=depth.device), torch.arange(width, device=depth.device), indexing="ij"
    )
    right = depth * (column.reshape(-1) + 0.5 - width / 2) / FOCAL_X
    up = depth * (height / 2 - row.reshape(-1) - 0.5) / FOCAL_Y
    cosine, sine = torch.cos(torch.deg2rad(pose[3])), torch.sin(torch.deg2rad(pose[3]))
    return torch.stack(
        [pose[0] + depth * cosine + right * sine, pose[1] + depth * sine - right * cosine, pose[2] + up], -1
    )


def project(points: Tensor, pose: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where points [P, 3] are in each of K pictures (pose [K, 4]), four tensors [K, P].

    x to the right and y downwards, in [-1, 1] inside the picture; depth along the view axis; and 1 / depth.
    """
    offset = points[None] - pose[:, None, :3]  # [K, P, 3]
    cosine, sine = (f(torch.deg2rad(pose[:, 3]))[:, None] for f in (torch.cos, torch.sin))
    ahead = offset[..., 0] * cosine + offset[..., 1] * sine
    right = offset[..., 0] * sine - offset[..., 1] * cosine
    nearness = 1 / ahead.clamp(min=1.0)  # a camera never comes nearer than CLEARANCE to anything it looks at
    x = FOCAL_X * right * nearness / (WIDTH / 2)
    y = -FOCAL_Y * offset[..., 2] * nearness / (HEIGHT / 2)
    return x, y, ahead, nearness


def visible(points: Tensor, pose: Tensor, depth: Tensor, *, tolerance: float = 0.03) -> Tensor:
    """Which points [P, 3] each of K frames (pose [K, 4], depth [K, H, W]) shows: bool [K, P].

    `tolerance` is the relative disagreement in depth that still counts as the same surface.
    """
    x, y, ahead, nearness = project(points, pose)
    inside = (ahead > 1.0) & (x.abs() < 1) & (y.abs() < 1)
    sampled = functional.grid_sample(
        1 / depth.float()[:, None],
        torch.stack([x, y], -1)[:, None],
        padding_mode="border",
        align_corners=False,
    )[:, 0, 0]
    return inside & ((sampled - nearness).abs() <= tolerance * nearness)


def seen_before(
    pose: Tensor,
    depth: Tensor,
    frame: int,
    earlier: range,
    *,
    among: Tensor | None = None,
    tolerance: float = 0.03,
) -> Tensor:
    """Pixels of `frame` whose surface point at least one frame of `earlier` showed: bool [H, W].

    `among` (bool [H, W]) limits the question to some pixels; the others answer False.
    """
    seen = torch.zeros(depth[frame].numel(), dtype=torch.bool, device=depth.device)
    points = unproject(pose[frame], depth[frame])
    left = (
        torch.arange(len(points), device=depth.device) if among is None else among.reshape(-1).nonzero()[:, 0]
    )
    for start in range(
        earlier.start, earlier.stop, 16
    ):  # in pieces: a point once seen needs no further frame
        piece = slice(start, min(start + 16, earlier.stop))
        if len(left) == 0:
            break
        found = visible(points[left], pose[piece], depth[piece], tolerance=tolerance).any(0)
        seen[left[found]] = True
        left = left[~found]
    return seen.view(depth.shape[-2:])


def return_mask(pose: Tensor, depth: Tensor, frame: int, *, history_end: int, recent: int = RECENT) -> Tensor:
    """Pixels of `frame` that return: seen in the history [0, history_end), but not in its last `recent`
    frames.

    A model that remembers only `recent` frames at the turning point `history_end` cannot know them. bool [H,
    W].
    """
    if not recent < history_end <= frame < len(pose):
        raise ValueError(
            f"need recent < history_end <= frame < {len(pose)}, not {recent}, {history_end}, {frame}."
        )
    fresh = seen_before(pose, depth, frame, range(history_end - recent, history_end))
    return seen_before(pose, depth, frame, range(0, history_end - recent), among=~fresh)


def return_masks(
    pose: Tensor,
    depth: Tensor,
    *,
    history_end: int,
    recent: int = RECENT,
    share: float = 0.1,
    enough: int | None = None,
) -> Tensor:
    """`return_mask` of every frame from `history_end` on: bool [F - history_end, H, W].

    With `enough`, frames after the first `enough` ones with at least `share` returning pixels are left all
    False.
    """
    masks = torch.zeros((len(pose) - history_end, *depth.shape[-2:]), dtype=torch.bool, device=depth.device)
    found = 0
    for frame in range(history_end, len(pose)):
        masks[frame - history_end] = return_mask(pose, depth, frame, history_end=history_end, recent=recent)
        found += bool(masks[frame - history_end].float().mean() >= share)
        if enough is not None and found >= enough:
            break
    return masks


def first_returns(masks: Tensor, *, share: float = 0.1, count: int = 8) -> Tensor:
    """Indices of the first `count` masks [G, H, W] with at least `share` of pixels set: int64 [<= count]."""
    return (masks.flatten(1).float().mean(1) >= share).nonzero()[:count, 0]


def long_return_share(pose: Tensor, depth: Tensor, frames: range, *, recent: int = RECENT) -> Tensor:
    """For each frame: the share of pixels seen before, but not in the last `recent` frames. float [len]."""
    shares = [return_mask(pose, depth, f, history_end=f, recent=recent).float().mean() for f in frames]
    return torch.stack(shares)
