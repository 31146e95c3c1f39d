"""The other modes at tiny size: parts and profiles of a chunk, dense beyond a card's memory, endurance."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig

from fastar.backbones.reference import BlockCausalAttend
from fastar.benchmark.command import run
from fastar.benchmark.dense import SharedCache
from fastar.benchmark.trace import CHUNK, kind_of, read_trace, traced
from tests.small import CHUNK as FRAMES
from tests.small import GRID, TOKENS

Configs = Callable[..., DictConfig]
CPU = torch.device("cpu")


def gpu_trace() -> list[dict]:
    """What a profile of a chunk looks like, waits before and after it included."""

    def event(cat: str, name: str, ts: float, dur: float) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1}

    return [
        event("cuda_runtime", "cudaDeviceSynchronize", 0, 5),
        event("kernel", "an earlier gemm", 2, 1),
        event("user_annotation", CHUNK, 10, 50),
        event("cuda_runtime", "cudaGraphLaunch", 11, 2),
        event("cuda_runtime", "cudaStreamSynchronize", 20, 9),
        event("kernel", "flash_fwd_sm90", 15, 40),
        event("kernel", "nvjet_hsh_256x128_gemm", 55, 20),
        event("kernel", "vectorized_elementwise_kernel", 80, 5),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 85, 1),
        event("kernel", "flash_fwd_sm90", 90, 10),
        event("cuda_runtime", "cudaDeviceSynchronize", 61, 50),
    ]


def test_a_trace_is_split_by_kind_and_waits_within_the_chunk_are_counted() -> None:
    trace = read_trace(gpu_trace())
    assert trace.by_kind() == {
        "attention": (0.05, 2),
        "gemm": (0.02, 1),
        "copy": (0.001, 1),
        "elementwise": (0.005, 1),
    }
    assert (trace.span_us, trace.gap_us) == (85, 85 - 76)
    assert dict(trace.waits) == {"cudaStreamSynchronize": 1}
    assert (trace.to_host, trace.to_device) == (1, 0)
    assert [row["kernel"] for row in trace.by_name()][:2] == ["flash_fwd_sm90", "nvjet_hsh_256x128_gemm"]
    with pytest.raises(ValueError, match="no annotation"):
        read_trace(gpu_trace()[:2])


def test_nested_operations_of_a_cpu_count_once() -> None:
    trace = traced(lambda: torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64)), CPU)
    total = sum(us for _, us in trace.kernels)
    assert total <= trace.span_us and "gemm" in trace.by_kind() and not trace.waits


@pytest.mark.gpu
def test_a_wait_shows_in_a_profile_on_a_gpu() -> None:
    x = torch.randn(1024, 1024, device="cuda")
    torch.mm(x, x)  # the library waits when it is first used
    assert not traced(lambda: x @ x, x.device).waits
    waiting = traced(lambda: (x @ x).sum().item(), x.device)
    assert sum(waiting.waits.values()) and waiting.to_host == 1 and "gemm" in waiting.by_kind()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("kernel_cutlass_flash_attncuteflash_fwd_sm90", "attention"),
        ("nvjet_tst_128x256_64x4", "gemm"),
        ("void cub::DeviceRadixSortOnesweepKernel", "sort"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("triton_poi_fused_add_mul_0", "elementwise"),
        ("nearest_in_buckets", "match and merge"),
        ("residual_norm", "elementwise"),
        ("choose_blocks", "plan"),
        ("move_rows", "copy"),
        ("attend_packed", "attention"),
        ("join_parts", "attention"),
        ("project", "match and merge"),
        ("something", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_parts_of_a_chunk(benchmark_config: Configs) -> None:
    config = benchmark_config(
        "mode=modules",
        "method=[stock,fast_ar]",
        "steady.fill_frames=12",
        "methods.fast_ar.self_attention.density=0.6",
    )
    rows = pd.DataFrame(run(config)["rows"])
    calls = rows[rows["how"] == "alone"].pivot(index="part", columns="method", values="calls")
    # 2 layers, 4 denoising passes (the first 2 of them dense) and a commit, which is dense
    assert calls.loc["attend self", "stock"] == 10 and calls.loc["attend text", "stock"] == 10
    assert calls.loc["attend self biased", "fast_ar"] == 6
    assert calls.loc["attend self sparse biased", "fast_ar"] == 4
    assert calls.loc["plan", "fast_ar"] == 2 and np.isnan(calls.loc["plan", "stock"])
    times = rows[rows["method"] == "stock"].set_index("part")["ms"]
    fastest = min(times[f"pass {number} of 4"] for number in range(1, 5))
    assert times["match, merge, plan"] == pytest.approx(times["commit pass"] - fastest)
    shares = rows[(rows["how"] == "profile") & (rows["part"] != "waits")].groupby("method")["share"].sum()
    assert shares.between(0.9, 1.01).all()
    kernels = pd.read_parquet(config.output + "/modules_kernels.parquet")
    assert {"attention", "gemm", "copy"} <= set(kernels["kind"])


@pytest.mark.gpu
def test_parts_of_a_chunk_on_a_gpu(benchmark_config: Configs) -> None:
    config = benchmark_config(
        "mode=modules", "method=[stock,tempcache,int4_window]", "steady.fill_frames=12", "device=cuda",
        "dtype=bfloat16", "methods.int4_window.cache.read_slots=packed",
    )  # fmt: skip
    rows = pd.DataFrame(run(config)["rows"])
    profiled = rows[rows["how"] == "profile"]
    for _, own in profiled.groupby("method"):
        assert {"attention", "gemm", "gaps", "waits"} <= set(own["part"])
        assert own[~own["part"].isin(["waits", "gaps"])]["ms"].sum() > 0
    assert "attend self" in set(rows[rows["method"] == "int4_window"]["part"]), "packed slots, timed as such"
    kernels = pd.read_parquet(config.output + "/modules_kernels.parquet")
    assert (
        not kernels["kernel"].str.startswith("aten::").any()
    )  # what the device did, not what it was asked for


def test_a_shared_cache_is_dense_attention_where_layers_are_alike(small_dense: tuple) -> None:
    cache, transformer, latents = small_dense
    frames = latents.shape[1]
    cache.hold(frames - FRAMES)
    cache.begin(frames - FRAMES, FRAMES, CPU)
    timesteps = torch.zeros(1, FRAMES)
    out = transformer(latents[:, -FRAMES:], timesteps, attend=cache.attend)
    causal = BlockCausalAttend(rope=transformer.rope, grid=GRID, chunk_frames=FRAMES)
    whole = transformer(latents, torch.zeros(1, frames), attend=causal)
    torch.testing.assert_close(out, whole[:, -FRAMES:], atol=1e-5, rtol=1e-4)


@pytest.fixture
def small_dense() -> tuple:
    """A shared cache over 3 chunks of a transformer of one layer, which is that of all layers."""
    from fastar.backbones import WanConfig, build_backbone

    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48, "freq_dim": 32}
    backbone = build_backbone(
        name="one", transformer=WanConfig(**sizes, in_channels=4, out_channels=4), autoencoder=None,
        frame_size=(32, 48), chunk_frames=FRAMES, context_frames=8,
    )  # fmt: skip
    transformer = backbone.transformer.eval().requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    latents = torch.randn(1, 3 * FRAMES, 4, 2 * GRID[0], 2 * GRID[1])
    cache = SharedCache(transformer.rope, GRID, "reference")
    for first in range(0, 2 * FRAMES, FRAMES):
        cache.begin(first, FRAMES, CPU, keep=True)
        transformer(latents[:, first : first + FRAMES], torch.zeros(1, FRAMES), attend=cache.attend)
    assert cache._k[0].shape[2] == FRAMES * TOKENS
    return cache, transformer, latents


def test_dense_beyond_what_fits(benchmark_config: Configs) -> None:
    settings = ["dense.latent_frames=[12,24]", "dense.repeats=1"]
    rows = run(benchmark_config("mode=dense", *settings, "dense.video_frames=96"))["rows"]
    assert [row.get("latent_frames") for row in rows] == [0, 12, 24, None]
    assert all("one layer's cache reused by all layers" in row["note"] for row in rows)
    assert rows[1]["cache_gib"] == pytest.approx(2 * 2 * 2 * 64 * 24 * 12 / 2**30)
    times = np.interp(np.arange(0, 24, 3), [0, 12, 24], [row["pass_ms"] for row in rows[:3]])
    assert rows[-1]["fps"] == pytest.approx(96 / (5 * times.sum() / 1000))
    far = run(benchmark_config("mode=dense", *settings, "dense.video_frames=192"))["rows"][-1]
    assert "no pass was measured at 45" in far["reason"] and "fps" not in far


def test_endurance_compares_the_last_frames_with_the_first(benchmark_config: Configs) -> None:
    settings = ["mode=endurance", "method=[stock]", "endurance.compared_frames=24"]
    config = benchmark_config(*settings, "endurance.video_frames=120")
    (row,) = run(config)["rows"]
    assert row["video_frames"] == 120 and row["latent_frames"] == 30 and row["layers"] == 2
    assert row["last_over_first"] == pytest.approx(row["fps_last"] / row["fps_first"])
    assert row["cache_spread"] == 0 and row["compared_frames"] == 24
    curve = pd.read_parquet(config.output + "/endurance_chunks.parquet")
    speed = 24 / (curve["denoise_s"] + curve["commit_s"]).tail(2).sum()
    assert row["fps_last"] == pytest.approx(speed)
    with pytest.raises(ValueError, match="too few to compare 2 after filling"):
        run(benchmark_config(*settings, "endurance.video_frames=72"))
    with pytest.raises(ValueError, match="ends after 62 latent frames"):
        run(benchmark_config(*settings, "endurance.video_frames=360"))
