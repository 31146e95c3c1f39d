"""Prompts: from a text encoder's embeddings through a rollout to the text stream, and into saved states."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from fastar.attention.events import AttendEvent
from fastar.backbones import Backbone, Prompts
from fastar.backbones.reference import BlockCausalAttend
from fastar.cache import CachePolicy, DenseCache, TempCache
from fastar.metrics.density import DensityRecorder
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.noise import chunk_noise
from fastar.rollout.rollout import Rollout
from tests.small import configs, text_backbone

CHUNK, GRID, TEXT, WIDTH = 3, (4, 6), 24, 48
SHAPE = (16, 8, 12)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return text_backbone()


def prompts(*lengths: int, seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    return Prompts(torch.randn(len(lengths), 20, WIDTH, generator=generator), torch.tensor(lengths))


def started(backbone: Backbone, given: Prompts | None, *, recorders: Any = (), **method: Any) -> Rollout:
    """A rollout with fresh noise between its four steps, as Self-Forcing has it."""
    loop = ChunkLoop(chunk_frames=CHUNK, timesteps=(1000.0, 937.5, 833.3, 625.0), renoise=True)
    exact = {"cache": lambda: DenseCache(storage="float32")} | method
    seeds = [11 + video for video in range(1 if given is None else len(given.lengths))]
    return start_rollout(
        backbone, Method(name="test", **exact), loop=loop, seeds=seeds, prompts=given, recorders=recorders
    )


def history(batch: int = 1) -> Tensor:
    return torch.randn(batch, CHUNK, *SHAPE, generator=torch.Generator().manual_seed(5))


def video(backbone: Backbone, given: Prompts, **options: Any) -> Tensor:
    rollout = started(backbone, given, **options)
    rollout.prefill(history(len(given.lengths)))
    return torch.cat(list(rollout.generate(2 * CHUNK)), dim=1)


@torch.inference_mode()
def test_a_cached_rollout_with_text_equals_the_uncached_forward(backbone: Backbone) -> None:
    given = prompts(20, 7)
    cached = video(backbone, given)
    words = given.embeddings.clone()
    words[1, 7:] = 0
    attend = BlockCausalAttend(rope=backbone.transformer.rope, grid=GRID, chunk_frames=CHUNK)
    whole, levels = history(2), (1000.0, 937.5, 833.3, 625.0, 0.0)
    for first in (CHUNK, 2 * CHUNK):
        noise = [chunk_noise([11, 12], first, draw, (CHUNK, *SHAPE), "cpu") for draw in range(4)]
        chunk = noise[0]
        for step, (now, after) in enumerate(pairwise(levels)):
            timesteps = torch.zeros(2, first + CHUNK)
            timesteps[:, first:] = now
            frames = torch.cat([whole, chunk], dim=1)
            velocity = backbone.transformer(frames, timesteps, attend=attend, text=words)[:, first:]
            clean = chunk - now / 1000 * velocity
            chunk = clean if after == 0 else torch.lerp(clean, noise[step + 1], after / 1000)
        whole = torch.cat([whole, chunk], dim=1)
    torch.testing.assert_close(cached, whole[:, CHUNK:], rtol=1e-4, atol=1e-4)


def test_prompts_matter_and_padding_does_not(backbone: Backbone) -> None:
    given = prompts(9)
    first = video(backbone, given)
    assert (video(backbone, prompts(9, seed=1)) - first).abs().max() > 1e-2
    assert (video(backbone, Prompts(given.embeddings, torch.tensor([8]))) - first).abs().max() > 1e-4
    dirty = given.embeddings.clone()
    dirty[:, 9:] = 100.0
    for same in (dirty, given.embeddings[:, :9]):
        assert torch.equal(video(backbone, Prompts(same, given.lengths)), first)


@pytest.mark.parametrize(
    "cache", [DenseCache, lambda: TempCache(budget_frames=5)], ids=["dense", "tempcache"]
)
def test_a_saved_rollout_goes_on_with_its_own_prompts_to_the_same_bits(
    backbone: Backbone, cache: Any, tmp_path: Any
) -> None:
    given = prompts(20, 5)
    rollout = started(backbone, given, cache=cache)
    rollout.prefill(history(2))
    rollout.step()
    torch.save(rollout.state_dict(), tmp_path / "state.pt")
    wanted = torch.cat([rollout.step(), rollout.step()], dim=1)
    fresh = started(backbone, prompts(3, 4, seed=9), cache=cache)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.cat([fresh.step(), fresh.step()], dim=1), wanted)


def test_prompts_can_be_switched(backbone: Backbone) -> None:
    given, other = prompts(9), prompts(9, seed=1)
    rollout, twin = started(backbone, given), started(backbone, given)
    for each in (rollout, twin):
        each.prefill(history())
    rollout.use_prompts(other)
    assert (rollout.step() - twin.step()).abs().max() > 1e-2


def test_what_does_not_fit_is_one_sentence(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="reads text and none was given: pass prompts of 1 videos, 48 wide"):
        started(backbone, None)
    narrow = Prompts(torch.zeros(1, 4, 8), torch.tensor([4]))
    with pytest.raises(ValueError, match=r"prompts must be \[1, tokens, 48\], got \[1, 4, 8\]"):
        started(backbone, narrow)
    rollout = started(backbone, prompts(4))
    saved = rollout.state_dict() | {"prompts": None}
    with pytest.raises(ValueError, match="none was given"):
        rollout.load_state_dict(saved)
    for lengths in ([0], [21], [4, 4]):
        with pytest.raises(ValueError, match="lengths"):
            Prompts(torch.zeros(1, 20, WIDTH), torch.tensor(lengths))


def test_a_backbone_without_text_wants_no_prompts() -> None:
    from tests.small import small_backbone, small_loop

    with pytest.raises(ValueError, match="reads no text: leave its prompts out"):
        start_rollout(small_backbone(), Method(name="test"), loop=small_loop(), seeds=[0], prompts=prompts(4))


class TextKeys:
    """Prompt tokens that cross-attention reads, by denoising step."""

    def __init__(self) -> None:
        self.live: dict[int, list[float]] = {}

    def on_attend(self, event: AttendEvent) -> None:
        if event.stream == "text" and event.context.kind == "denoise":
            counts = torch.zeros(event.k.shape[:3]) if event.log_count is None else event.log_count
            self.live.setdefault(event.context.step, []).append(
                float((counts > -torch.inf).sum(-1).double().mean())
            )


@pytest.mark.parametrize("name", [name for name in configs("cross_attention") if name.startswith("annca")])
def test_annca_drops_prompt_tokens_on_the_text_stream(backbone: Backbone, name: str) -> None:
    node, seen = configs("cross_attention")[name], TextKeys()
    density = DensityRecorder(tokens_per_frame=GRID[0] * GRID[1], stream="text")
    out = video(backbone, prompts(20), cross_attention=lambda: instantiate(node), recorders=[seen, density])
    assert torch.isfinite(out).all() and (out - video(backbone, prompts(20))).abs().max() > 1e-4
    assert set(seen.live[0]) == {TEXT}, "the first step is dense"
    assert 0 < max(seen.live[3]) < TEXT and 0.3 < density.mean() < 1


# -- a change of prompts in mid-rollout ----------------------------------------------------------------------------

CACHES = configs("cache")
REFUSES = {"tempcache_paper", "tempcache_paper_error"}
"""Caches that merge frames as they arrive and keep none apart."""
FORGETS_NOTHING_ELSE = {"dense", "empty", "stock"}
"""Caches of which any number of frames can be taken back."""


def tight(name: str) -> CachePolicy:
    """The policy of a file of conf/cache; if it has a budget, one of about ten frames, the last chunk of them exact."""
    config = CACHES[name]
    frames = 10 * {4: 0.4, 8: 0.7, 16: 1.0}[config.get("policy", config).get("slot_bits", 16)]
    budget: Any = {"budget_share": None, "budget_frames": frames} if "budget_frames" in config else {}
    if "recent_share" in config.get("policy", {}):
        budget["policy"] = {"recent_share": 0.5}  # a tenth of so few frames is no chunk
    made: CachePolicy = instantiate(config, **budget)
    return made


def keys(rollout: Rollout) -> list[Tensor]:
    layers = range(rollout.state.cache.spec.num_layers)
    return [rollout.state.cache.view(layer).k.clone() for layer in layers]


def same_state(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def made_so_far(rollout: Rollout, chunks: int) -> Tensor:
    """History and `chunks` generated ones: all latents so far."""
    rollout.prefill(history(len(rollout.seeds)))
    made = list(rollout.generate(chunks * CHUNK))
    return torch.cat([history(len(rollout.seeds)), *made], dim=1)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_rewriting_under_the_same_prompt_changes_no_bit(backbone: Backbone, chunks: int) -> None:
    rollout, twin = started(backbone, prompts(9, 20)), started(backbone, prompts(9, 20))
    made, _ = (made_so_far(each, 3) for each in (rollout, twin))
    before = keys(rollout)
    rollout.change_prompts(prompts(9, 20), made[:, -chunks * CHUNK :])
    assert all(torch.equal(now, then) for now, then in zip(keys(rollout), before, strict=True))
    assert same_state(rollout.state_dict(), twin.state_dict())
    assert torch.equal(rollout.step(), twin.step())


def test_rewriting_under_another_prompt_changes_the_recent_keys_alone_and_what_follows(
    backbone: Backbone,
) -> None:
    kinds: list[str] = []
    seen = SimpleNamespace(on_attend=lambda event: kinds.append(event.context.kind))
    rollout, twin = started(backbone, prompts(9), recorders=[seen]), started(backbone, prompts(9))
    made, _ = (made_so_far(each, 3) for each in (rollout, twin))
    before, other = keys(rollout), prompts(9, seed=1)
    kinds.clear()
    rollout.change_prompts(other, made[:, -2 * CHUNK :])
    assert set(kinds) == {"rewrite"} and rollout.next_frame == twin.next_frame
    kept = 2 * CHUNK * GRID[0] * GRID[1]  # tokens of the frames before
    deep = zip(keys(rollout)[1:], before[1:], strict=True)  # keys of the first layer come before any prompt
    assert torch.equal(keys(rollout)[0], before[0])
    for now, then in deep:
        assert torch.equal(now[:, :, :kept], then[:, :, :kept]) and now.shape == then.shape
        assert (now[:, :, kept:] - then[:, :, kept:]).abs().max() > 1e-2
    twin.change_prompts(other)
    assert twin.prompts is other and all(torch.equal(*pair) for pair in zip(keys(twin), before, strict=True))
    assert (rollout.step() - twin.step()).abs().max() > 1e-3


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_rewrites_its_last_chunk_or_says_why_not(
    backbone: Backbone, name: str, tmp_path: Any
) -> None:
    def start() -> Rollout:
        return started(backbone, prompts(20, 9), cache=lambda: tight(name))

    other = prompts(7, 8, seed=1)
    rollout, fresh = start(), start()
    made = made_so_far(rollout, 6)
    torch.save(rollout.state_dict(), tmp_path / "before.pt")
    before = torch.load(tmp_path / "before.pt", weights_only=True)
    if name not in FORGETS_NOTHING_ELSE:
        with pytest.raises(ValueError, match="cannot be rewritten"):
            rollout.change_prompts(other, made[:, -CHUNK:] if name in REFUSES else made)
        assert same_state(rollout.state_dict(), before), "nothing has changed"
    if name in REFUSES:
        return
    rollout.change_prompts(other, made[:, -CHUNK:])
    torch.save(rollout.state_dict(), tmp_path / "after.pt")
    wanted = torch.cat([rollout.step(), rollout.step()], dim=1)
    assert torch.isfinite(wanted).all() and rollout.next_frame == 9 * CHUNK
    bound = rollout.state.cache.capacity_bytes()
    assert bound is None or rollout.state.cache.bytes_used() <= bound
    fresh.load_state_dict(before)
    fresh.change_prompts(other, made[:, -CHUNK:])
    assert torch.equal(torch.cat([fresh.step(), fresh.step()], dim=1), wanted), "saved before the change"
    later = start()
    later.load_state_dict(torch.load(tmp_path / "after.pt", weights_only=True))
    assert torch.equal(torch.cat([later.step(), later.step()], dim=1), wanted), "saved after it"


def test_a_change_that_makes_no_sense_is_one_sentence_and_changes_nothing(backbone: Backbone) -> None:
    rollout = started(backbone, prompts(9))
    made = made_so_far(rollout, 2)
    before, other = rollout.state_dict(), prompts(9, seed=1)
    with pytest.raises(ValueError, match="12 frames cannot be rewritten: only 9 have been made"):
        rollout.change_prompts(other, torch.cat([made, made[:, :3]], dim=1))
    with pytest.raises(ValueError, match="2 frames are not a whole number of 3-frame chunks"):
        rollout.change_prompts(other, made[:, -2:])
    with pytest.raises(ValueError, match=r"prompts must be \[1, tokens, 48\]"):
        rollout.change_prompts(prompts(9, 9), made[:, -3:])
    assert same_state(rollout.state_dict(), before)


def test_frames_of_a_backbone_that_follows_its_pose_are_not_rewritten() -> None:
    from tests.small import clip, small_backbone, small_rollout

    rollout = small_rollout(small_backbone(text_dim=WIDTH), prompts=prompts(9))
    latents, actions = clip(4)
    rollout.prefill(latents, actions)
    with pytest.raises(ValueError, match="follows its pose"):
        rollout.change_prompts(prompts(9, seed=1), latents[:, -2:], actions[:, -2:])
    rollout.change_prompts(prompts(9, seed=1))
