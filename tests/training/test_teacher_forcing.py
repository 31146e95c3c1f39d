"""The attention of a training pass over [clean | noisy]: its mask, and that inference computes the same velocities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastar.attention.context import PassContext, PassKind
from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.backbones import Prompts
from fastar.engines.training import TeacherForcingAttend
from tests.small import CHUNK, clip, poses, small_backbone, small_rollout
from tests.training.small import world_model


def sees(query: int, key: int, *, frames: int, chunk: int, tokens: int) -> bool:
    """Whether a token of [clean | noisy] attends to another, in words: see the module docstring of engines.training."""
    query_noisy, query_chunk = query >= frames * tokens, query // tokens % frames // chunk
    key_noisy, key_chunk = key >= frames * tokens, key // tokens % frames // chunk
    if not query_noisy:
        return not key_noisy and key_chunk <= query_chunk
    return key_chunk == query_chunk if key_noisy else key_chunk < query_chunk


@pytest.mark.parametrize(("frames", "chunk", "grid"), [(6, 2, (1, 2)), (3, 3, (2, 1)), (4, 1, (1, 1))])
def test_the_mask_is_that_of_the_definition(frames: int, chunk: int, grid: tuple[int, int]) -> None:
    sizes = {"num_frames": frames, "chunk_frames": chunk, "grid": grid}
    attend = TeacherForcingAttend(RotaryEmbedding(8), **sizes, device=torch.device("cpu"))
    tokens = grid[0] * grid[1]
    length = 2 * frames * tokens
    expected = [
        [sees(query, key, frames=frames, chunk=chunk, tokens=tokens) for key in range(length)]
        for query in range(length)
    ]
    assert attend.dense_mask is not None and attend.dense_mask.tolist() == expected


def test_both_halves_stand_at_the_same_positions_from_the_placed_frame_on() -> None:
    rope, grid = RotaryEmbedding(12), (2, 2)
    attend = TeacherForcingAttend(rope, grid=grid, num_frames=4, chunk_frames=2, device=torch.device("cpu"))
    attend.place(first_frame=777)
    q, k, v = torch.randn(3, 1, 2, 32, 12, dtype=torch.float64)
    positions = grid_positions(777, 4, grid).repeat(2, 1)
    logits = rope.rotate(q, positions) @ rope.rotate(k, positions).mT / 12**0.5
    expected = logits.masked_fill(~attend.dense_mask, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend("self", 0, q, k, v), expected, rtol=0, atol=1e-6)


def test_text_is_read_by_every_token() -> None:
    attend = TeacherForcingAttend(
        RotaryEmbedding(12), grid=(1, 1), num_frames=2, chunk_frames=1, device=torch.device("cpu")
    )
    q, (k, v) = torch.randn(1, 2, 4, 12), torch.randn(2, 1, 2, 5, 12)
    expected = (q @ k.mT / 12**0.5).softmax(-1) @ v
    torch.testing.assert_close(attend("text", 0, q, k, v), expected, rtol=0, atol=1e-6)


def test_a_clip_that_is_no_whole_number_of_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match="7 frames is not a whole number of 2-frame chunks"):
        TeacherForcingAttend(
            RotaryEmbedding(8), grid=(1, 1), num_frames=7, chunk_frames=2, device=torch.device("cpu")
        )


@pytest.mark.gpu
def test_the_block_mask_on_cuda_is_the_dense_mask_on_cpu() -> None:
    rope, sizes = RotaryEmbedding(32), {"grid": (4, 8), "num_frames": 8, "chunk_frames": 2}
    q, k, v = torch.randn(3, 1, 2, 512, 32)
    cpu = TeacherForcingAttend(rope, **sizes, device=torch.device("cpu"))("self", 0, q, k, v)
    cuda = TeacherForcingAttend(rope, **sizes, device=torch.device("cuda"))(
        "self", 0, q.cuda(), k.cuda(), v.cuda()
    )
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=2e-3)


@pytest.mark.parametrize("text_dim", [None, 6], ids=["silent", "prompted"])
@pytest.mark.parametrize("first_frame", [0, 300])
@torch.inference_mode()
def test_training_and_cached_inference_compute_the_same_velocities(
    first_frame: int, text_dim: int | None
) -> None:
    """One training pass over a clip against prefill and denoising passes, chunk by chunk, each at its noise level."""
    frames, backbone = 8, small_backbone(text_dim=text_dim)
    prompts = None if text_dim is None else Prompts(torch.randn(2, 5, text_dim), torch.tensor([5, 3]))
    text = None if prompts is None else prompts.text("cpu", torch.float32)
    clean, actions = clip(frames, batch=2)
    sigma = torch.tensor([1.0, 0.83, 0.4, 0.05]).repeat_interleave(CHUNK).expand(2, -1)
    noisy = torch.lerp(clean, torch.randn(clean.shape), sigma[..., None, None, None])

    module = world_model(backbone)
    attend = module._attend_for(clean)
    attend.place(first_frame)
    conditions = {"actions": actions, "poses": poses(backbone, actions)}
    trained = module._velocity(clean, torch.zeros(2, frames), noisy, sigma, conditions, text, attend)

    rollout = small_rollout(backbone, seeds=(0, 1), prompts=prompts)
    rollout.next_frame = first_frame
    cached: list[Tensor] = []
    for at in range(0, frames, CHUNK):
        part = slice(at, at + CHUNK)
        timesteps = tuple((1000 * sigma[0, part]).tolist())
        context = PassContext(PassKind.DENOISE, rollout.next_frame, CHUNK, timesteps)
        cached.append(rollout.run_pass(context, noisy[:, part], actions[:, part]))
        rollout.prefill(clean[:, part], actions[:, part])
    torch.testing.assert_close(torch.cat(cached, dim=1), trained, rtol=1e-5, atol=2e-5)
    assert trained.abs().mean() > 0.1
