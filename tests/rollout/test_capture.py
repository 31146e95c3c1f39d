"""Captured passes give the bits of those that are not, and wait for nothing inside a chunk."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar import engines
from fastar.ann import KMeansBucketizer, LSHBucketizer
from fastar.attention.state import AttentionState
from fastar.backbones import Backbone, Prompts
from fastar.cache import (
    CachePolicy,
    DenseCache,
    HeadwiseCache,
    RandomCache,
    StockWindow,
    TempCache,
    WindowCache,
)
from fastar.rollout import capture
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.rollout import NonFiniteError, Rollout
from fastar.sparsity import AnnSA, Dense, RandomBlocks, Selector
from tests.small import ACTIONS, small_backbone, small_loop, text_backbone

CHUNK = 3
FRAMES = 14 * CHUNK
BUDGET = {"budget_frames": 14, "storage": "float32"}

POLICIES: dict[str, Callable[[], CachePolicy]] = {
    "tempcache": lambda: TempCache(**BUDGET),
    "stock": lambda: StockWindow(attended_frames=3 * CHUNK, storage="float32"),
    "window": lambda: WindowCache(sink_frames=1, **BUDGET),
    "random": lambda: RandomCache(recent_frames=2, **BUDGET),
    "int4": lambda: WindowCache(budget_frames=3, slot_bits=4),
    "dense": lambda: DenseCache(storage="float32"),
}
SCHEDULE = {"density": 0.4, "block_q": 16, "block_k": 16, "warmup_share": 0.0, "min_dense_steps": 0}

SELECTORS: dict[str, Callable[[], Selector]] = {
    "dense": Dense,
    "lsh": lambda: AnnSA(bucketizer=LSHBucketizer(bits=3), **SCHEDULE),
    "kmeans": lambda: AnnSA(bucketizer=KMeansBucketizer(clusters=8, iterations=2), commit_dense=False, **SCHEDULE),
    "every pass": lambda: AnnSA(bucketizer=LSHBucketizer(bits=3), rebuild="pass", **SCHEDULE),
}  # fmt: skip


class OnCpu:
    """In place of `capture.Graphs`: runs everything, always."""

    def __init__(self, device: torch.device) -> None:
        self.keys: list[Any] = []

    def run(self, key: Any, body: Callable[[], Any]) -> Any:
        self.keys.append(key)
        return body()

    def clear(self) -> None:
        self.keys.clear()


@pytest.fixture
def reader() -> Backbone:
    """A backbone that reads text and is told nothing else."""
    return text_backbone()


def rollout_of(
    backbone: Backbone,
    policy: Callable[[], CachePolicy],
    selector: Callable[[], Selector] = Dense,
    *,
    capture: bool,
    engine: str = "auto",
) -> Rollout:
    generator = torch.Generator().manual_seed(3)
    words = Prompts(torch.randn(1, 5, 48, generator=generator), lengths=torch.tensor([5]))
    return start_rollout(
        backbone, Method(name="x", cache=policy, self_attention=selector, engine=engine),
        loop=small_loop(renoise=True, chunk_frames=CHUNK), seeds=[7], prompts=words, capture=capture,
    )  # fmt: skip


def video(rollout: Rollout, frames: int = FRAMES) -> Tensor:
    return torch.cat([chunk.cpu() for chunk in rollout.generate(frames)], 1)


@pytest.mark.parametrize(("name", "selector"), [
    *((name, "dense") for name in POLICIES), ("tempcache", "lsh"), ("stock", "lsh"), ("window", "kmeans"),
    ("tempcache", "every pass"),
])  # fmt: skip
def test_the_bits_are_those_of_plain_passes(
    name: str, selector: str, reader: Backbone, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(capture, "Graphs", OnCpu)
    reader.transformer.to(device)
    plain, captured = (
        rollout_of(reader, POLICIES[name], SELECTORS[selector], capture=flag) for flag in (False, True)
    )
    assert torch.equal(video(plain), video(captured))
    saved = [rollout.state_dict()["attention"]["cache"] for rollout in (plain, captured)]
    assert saved[0].keys() == saved[1].keys()
    for key, value in saved[0].items():
        same = torch.equal(value, saved[1][key]) if isinstance(value, Tensor) else value == saved[1][key]
        assert same, key


@pytest.mark.parametrize("rebuild", ["chunk", "commit"])
def test_sparse_commits_of_keys_that_carry_their_log_counts(rebuild: str, reader: Backbone) -> None:
    """What is staged is as wide as a head, whatever lies in memory."""
    make = partial(
        AnnSA, bucketizer=KMeansBucketizer(clusters=8), commit_dense=False, rebuild=rebuild, **SCHEDULE
    )
    carried, beside = (
        video(rollout_of(reader, POLICIES["tempcache"], make, capture=False, engine=engine), 8 * CHUNK)
        for engine in ("augmented", "sdpa")
    )
    assert torch.allclose(carried, beside, atol=1e-4)


def test_actions_are_read_anew_in_every_pass(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(capture, "Graphs", OnCpu)
    backbone = small_backbone()
    backbone.transformer.to(device)
    actions = torch.randint(ACTIONS, (1, 24), generator=torch.Generator().manual_seed(2))
    policy = partial(WindowCache, budget_frames=8, storage="float32")
    videos = []
    for captured in (False, True):
        rollout = start_rollout(
            backbone, Method(name="x", cache=policy), loop=small_loop(), seeds=[7], capture=captured
        )
        videos.append(torch.cat([chunk.cpu() for chunk in rollout.generate(24, actions)], 1))
    assert torch.equal(*videos)


def test_a_saved_rollout_goes_on(
    reader: Backbone, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(capture, "Graphs", OnCpu)
    reader.transformer.to(device)
    whole = video(rollout_of(reader, POLICIES["tempcache"], capture=True))
    first = rollout_of(reader, POLICIES["tempcache"], capture=True)
    begun = video(first, 8 * CHUNK)
    second = rollout_of(reader, POLICIES["tempcache"], capture=True)
    second.load_state_dict(first.state_dict())
    assert torch.equal(whole, torch.cat([begun, video(second, FRAMES - 8 * CHUNK)], 1))


def test_full_caches_repeat_their_passes(reader: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "Graphs", OnCpu)
    rollout = rollout_of(reader, POLICIES["tempcache"], capture=True)
    video(rollout)
    assert rollout.passes.captured is not None
    keys = rollout.passes.captured._graphs.keys
    per_chunk = len(rollout.loop.timesteps) + 2  # a commit has two: the pass, and the cache's work
    assert len(set(keys[-per_chunk:])) == per_chunk and keys[-per_chunk:] == keys[-2 * per_chunk : -per_chunk]


def test_what_is_not_finite_is_not_committed(
    reader: Backbone, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(capture, "Graphs", OnCpu)
    reader.transformer.to(device)
    rollout = rollout_of(reader, POLICIES["tempcache"], capture=True)
    video(rollout, 12 * CHUNK)
    before = rollout.state_dict()
    chunk = rollout.denoise()
    with pytest.raises(NonFiniteError, match="commit pass"):
        rollout.commit(chunk * torch.nan)
    after = rollout.state_dict()
    assert after["next_frame"] == before["next_frame"]
    for key, value in before["attention"]["cache"].items():
        assert not isinstance(value, Tensor) or torch.equal(value, after["attention"]["cache"][key])
    assert torch.isfinite(video(rollout, CHUNK)).all(), "and then it goes on"


def test_what_cannot_be_captured_is_refused(reader: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="on a CUDA device only, not on cpu"):
        rollout_of(reader, POLICIES["dense"], capture=True)
    monkeypatch.setattr(capture, "Graphs", OnCpu)
    headwise = partial(HeadwiseCache, policy=partial(WindowCache), budget_frames=8)
    with pytest.raises(ValueError, match="HeadwiseCache, whose work depends"):
        rollout_of(reader, headwise, capture=True)
    with pytest.raises(ValueError, match="RandomBlocks, which draws"):
        rollout_of(reader, POLICIES["dense"], RandomBlocks, capture=True)


@pytest.mark.gpu
@pytest.mark.parametrize("selector", ["dense", "lsh", "kmeans"])
def test_no_chunk_waits_for_the_device(selector: str, reader: Backbone) -> None:
    """From the second chunk of a full cache on, the host looks once a chunk: at whether it is finite."""
    reader.transformer.to("cuda")
    rollout = rollout_of(reader, POLICIES["tempcache"], SELECTORS[selector], capture=True)
    video(rollout, 12 * CHUNK)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunk = rollout.denoise()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rollout.commit(chunk)
    assert isinstance(rollout.state, AttentionState)


@pytest.mark.gpu
@pytest.mark.timeout(300)  # FlashAttention-4 compiles for a few seconds for each kind of call
@pytest.mark.parametrize("commit_dense", [True, False], ids=["dense commits", "sparse commits"])
@pytest.mark.parametrize(
    "policy",
    [partial(TempCache, budget_frames=14), partial(StockWindow, attended_frames=3 * CHUNK)],
    ids=["tempcache", "stock"],
)
def test_block_sparse_calls_of_flash_attention_are_captured(
    policy: Callable[[], CachePolicy], commit_dense: bool
) -> None:
    """Heads of 128 in bfloat16, log-counts in the keys: the kernels and widths of Wan2.1-1.3B."""
    backbone = text_backbone(dim=256)
    backbone.transformer.to("cuda", torch.bfloat16)
    reason = engines.get("fa4").unfit_for_device(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    annsa = partial(
        AnnSA, bucketizer=KMeansBucketizer(clusters=8, iterations=2, samples=128), density=0.4, block_q=64,
        block_k=64, warmup_share=0.0, min_dense_steps=0, commit_dense=commit_dense,
    )  # fmt: skip
    plain, captured = (
        rollout_of(backbone, policy, annsa, capture=flag, engine="fa4") for flag in (False, True)
    )
    assert torch.equal(video(plain), video(captured))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.denoise()
    finally:
        torch.cuda.set_sync_debug_mode("default")
