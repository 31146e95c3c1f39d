"""What layers hand in for a commit: whether it fits, and in which pieces it is taken in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fastar.cache.base import CacheSpec, Staged
from fastar.cache.slots import MAX_FRAME, MAX_SIDE


def check_staged(spec: CacheSpec, layer: int, staged: Staged) -> None:
    """Raise a ValueError if there is no such layer, or tensors are not of the sizes of `spec`."""
    if not 0 <= layer < spec.num_layers:
        raise ValueError(f"layer {layer} is outside this cache's {spec.num_layers} layers")
    tokens = staged.k.shape[2] if staged.k.dim() == 4 else -1
    expected = (spec.batch, spec.num_heads, tokens, spec.head_dim)
    for name in ("q_raw", "k_raw", "k", "v"):
        shape = tuple(getattr(staged, name).shape)
        if shape != expected:
            raise ValueError(
                f"staged {name} must be {expected} (batch, heads, tokens, head dim), got {shape}"
            )
    if tuple(staged.positions.shape) != (tokens, 3):
        raise ValueError(f"staged positions must be ({tokens}, 3), got {tuple(staged.positions.shape)}")


def check_commit(
    spec: CacheSpec, staged: Mapping[int, Staged], first_frame: int, num_frames: int, next_frame: int
) -> None:
    """Raise a ValueError if what is `staged`, by layer, is not all of these frames, or they are not to come now.

    Args:
        next_frame: the one after those that are cached; 0: there are none.
    """
    missing = [layer for layer in range(spec.num_layers) if layer not in staged]
    if missing:
        raise ValueError(f"commit needs every layer staged; missing: {missing}")
    if num_frames < 1 or (next_frame and first_frame != next_frame):
        raise ValueError(
            f"cannot commit {num_frames} frames from frame {first_frame}: the next one is {next_frame} "
            "(call drop_from first to commit frames again)"
        )
    tokens = num_frames * spec.tokens_per_frame
    for layer, handed in staged.items():
        if handed.k.shape[2] != tokens:
            raise ValueError(
                f"layer {layer} staged {handed.k.shape[2]} tokens, but {num_frames} frames have {tokens}"
            )
    if first_frame + num_frames > MAX_FRAME or spec.tokens_per_frame > MAX_SIDE**2:
        raise ValueError(f"positions hold frames below {MAX_FRAME} of at most {MAX_SIDE} x {MAX_SIDE} tokens")
    if next_frame == 0:  # once a rollout, since it waits for the device
        last = staged[0].positions.amax(0).tolist()
        if last[0] != first_frame + num_frames - 1 or max(last[1:]) >= MAX_SIDE:
            raise ValueError(
                f"staged positions end at {last}, but the commit ends at frame {first_frame + num_frames - 1} "
                f"and rows and columns must stay below {MAX_SIDE}"
            )


def blocks_of(spec: CacheSpec, staged: Staged) -> Iterator[Staged]:
    """The staged tokens in blocks of at most `chunk_frames` frames."""
    step = spec.chunk_frames * spec.tokens_per_frame
    for start in range(0, staged.k.shape[2], step):
        part = slice(start, start + step)
        q_raw, k_raw, k, v = (x[:, :, part] for x in (staged.q_raw, staged.k_raw, staged.k, staged.v))
        yield Staged(q_raw=q_raw, k_raw=k_raw, k=k, v=v, positions=staged.positions[part])
