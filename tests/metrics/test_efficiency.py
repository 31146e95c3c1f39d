"""Timers, rates and peak memory."""

import mmap
import time

import pytest
import torch

from fastar.metrics.efficiency import ChunkTimes, PassTimer, PeakMemory, rates


def test_rates_by_hand() -> None:
    chunks = [
        ChunkTimes(4, {"denoise": 0.5, "commit": 0.25, "decode": 0.25}, wall) for wall in (1.0, 1.5, 1.5)
    ]
    found = rates(chunks)
    assert (found.denoise, found.commit, found.decode) == pytest.approx((12 / 1.5, 12 / 2.25, 12 / 3))
    assert found.end_to_end == pytest.approx(3) and found.latency_p50 == 1.5
    assert found.rows("/steady").keys() >= {"fps/steady", "fps_denoise/steady", "latency_p99/steady"}
    parts = {"denoise_s": 0.5, "commit_s": 0.25, "decode_s": 0.25}
    assert chunks[0].rows() == {**parts, "chunk_s": 1.0, "fps_chunk": 4.0}


def test_p99_is_near_the_slowest() -> None:
    chunks = [ChunkTimes(1, {}, 1.0 if number < 99 else 5.0) for number in range(100)]
    found = rates(chunks)
    assert found.latency_p50 == 1 and 1 < found.latency_p99 < 5


def test_parts_add_up_and_stay_apart(device: torch.device) -> None:
    timer = PassTimer(device, warmup=1)
    with timer.measure("commit"):  # prefill: outside of any chunk
        time.sleep(0.05)
    work = torch.ones(64, 64, device=device)
    for pause in (0.1, 0.02):
        with timer.chunk(frames=4):
            for _ in range(2):
                with timer.measure("denoise"):
                    time.sleep(pause)
                    work = work @ work * 1e-2
            with timer.measure("commit"):
                time.sleep(0.01)
            time.sleep(0.01)
    first, second = timer.chunks
    assert first.parts.keys() == {"denoise", "commit"} and first.frames == 4
    for chunk, pause in ((first, 0.1), (second, 0.02)):
        # CUDA starts its clock some milliseconds after the host does
        assert 2 * pause - 0.01 <= chunk.parts["denoise"] < 2 * pause + 0.09
        assert chunk.wall >= chunk.parts["denoise"] + chunk.parts["commit"] + 0.009
    assert timer.steady_state().latency_p50 == second.wall
    assert timer.whole_run().end_to_end == pytest.approx(8 / (first.wall + second.wall))
    assert timer.steady_state().denoise > timer.steady_state().commit > timer.steady_state().end_to_end


def test_a_chunk_that_failed_is_not_counted() -> None:
    timer = PassTimer(warmup=0)
    with pytest.raises(ZeroDivisionError), timer.chunk(frames=4), timer.measure("denoise"):
        raise ZeroDivisionError
    with (
        timer.chunk(frames=4),
        pytest.raises(RuntimeError, match="inside another chunk"),
        timer.chunk(frames=4),
    ):
        pass
    with pytest.raises(ValueError, match="no chunk was timed"):
        PassTimer(warmup=0).whole_run()


def passing_tensor(device: torch.device, mebibytes: int) -> torch.Tensor:
    """Fresh memory: on the CPU, malloc might hand out what an earlier test left resident."""
    if device.type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, mebibytes * 2**20), dtype=torch.uint8).fill_(1)
    return torch.ones(mebibytes, 2**18, device=device)


def test_peak_memory_sees_a_passing_tensor(device: torch.device) -> None:
    peak = PeakMemory(device)
    peak.start()
    before = peak.rows()["peak_allocated"]
    block = passing_tensor(device, 64)
    del block
    assert peak.rows()["peak_allocated"] - before > 50 * 2**20
    peak.start()
    if peak.since_start:
        assert peak.rows()["peak_allocated"] - before < 50 * 2**20


def test_peak_memory_by_chunk_keeps_the_largest(device: torch.device) -> None:
    peak, found = PeakMemory(device), []
    peak.start()
    for size in (64, 256, 64):
        block = passing_tensor(device, size)
        del block
        found.append(peak.chunk_rows().get("peak_chunk"))
    whole = peak.rows()["peak_allocated"]
    if not peak.since_start:
        assert found == [None] * 3
        return
    assert found[1] is not None and found[2] is not None and whole >= found[1]
    assert found[1] - found[2] > 100 * 2**20
