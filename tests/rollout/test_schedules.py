"""Noise levels against the published constants, and the passes that loops make of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastar.attention.context import PassKind
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.schedules import shifted_sigma, uniform_timesteps, warped_timesteps


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([1000, 750, 500, 250], [1000, 937.5, 833.33, 625]),  # Self-Forcing
        ([1000, 800, 600, 400, 200], [1000, 952.38, 882.35, 769.23, 555.56]),  # Rolling-Forcing
        ([1000, 666, 333], [1000, 908.84, 713.98]),  # Matrix-Game 2.0
    ],
)
def test_warped_steps_are_the_published_ones(steps: list[int], expected: list[float]) -> None:
    assert warped_timesteps(steps, shift=5.0) == pytest.approx(expected, abs=0.006)
    assert warped_timesteps(steps)[0] == 1000.0


def test_warped_steps_are_entries_of_the_shifted_table() -> None:
    """Wan's table: s = 1 - i / 1000, sigma = shift s / (1 + (shift - 1) s); step n is its entry 1000 - n."""
    table = [1000 * 8 * s / (1 + 7 * s) for s in (1 - i / 1000 for i in range(1000))]
    steps = [1000, 901, 500, 77, 1]
    assert warped_timesteps(steps, shift=8.0) == pytest.approx([table[1000 - n] for n in steps], rel=1e-12)


def test_uniform_steps() -> None:
    assert uniform_timesteps(4) == (1000.0, 750.0, 500.0, 250.0)
    assert uniform_timesteps(4, shift=5.0) == pytest.approx(warped_timesteps([1000, 750, 500, 250]))
    assert uniform_timesteps(1, shift=3.0) == (1000.0,)


@given(steps=st.integers(1, 100), shift=st.floats(0.05, 20))
def test_every_schedule_starts_at_pure_noise_and_fits_a_loop(steps: int, shift: float) -> None:
    loop = ChunkLoop(chunk_frames=1, timesteps=uniform_timesteps(steps, shift=shift))
    assert loop.timesteps[0] == 1000.0 and loop.passes_per_chunk == steps + 1
    assert shifted_sigma(0.0, shift) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform_timesteps(0), "num_steps >= 1 and shift > 0, got 0 and 1.0"),
        (lambda: uniform_timesteps(4, shift=0.0), "shift > 0"),
        (lambda: warped_timesteps([]), "must fall strictly within 1..1000"),
        (lambda: warped_timesteps([1000, 500, 500]), "must fall strictly"),
        (lambda: warped_timesteps([250, 500]), "must fall strictly"),
        (lambda: warped_timesteps([1000, 0]), r"within 1..1000, got \[1000, 0\]"),
        (lambda: warped_timesteps([1001]), "within 1..1000"),
        (lambda: ChunkLoop(chunk_frames=0, timesteps=[1000]), "chunk_frames must be at least 1, got 0"),
        (lambda: ChunkLoop(chunk_frames=1, timesteps=[]), "must fall from 1000"),
        (lambda: ChunkLoop(chunk_frames=1, timesteps=[900, 500]), "must fall from 1000"),
        (lambda: ChunkLoop(chunk_frames=1, timesteps=[1000, 500, 600]), "must fall from 1000"),
        (lambda: ChunkLoop(chunk_frames=1, timesteps=[1000, 0]), "stay above 0"),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be_run_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_chunk_is_denoising_passes_and_one_commit() -> None:
    loop = ChunkLoop(chunk_frames=3, timesteps=(1000, 600, 300), commit_timestep=20.0)
    passes = list(loop.denoise_passes(9))
    assert [p.timesteps for p in passes] == [(1000.0,) * 3, (600.0,) * 3, (300.0,) * 3]
    assert [(p.step, p.num_steps, p.share_done) for p in passes] == [(0, 3, 0), (1, 3, 1 / 3), (2, 3, 2 / 3)]
    assert all(p.kind == PassKind.DENOISE and not p.commits for p in passes)
    assert all((p.first_frame, p.num_frames) == (9, 3) for p in passes)
    for kind in (PassKind.COMMIT, PassKind.PREFILL, PassKind.REWRITE):
        commit = loop.commit_pass(9, kind)
        assert commit.commits and commit.kind == kind and commit.timesteps == (20.0,) * 3
