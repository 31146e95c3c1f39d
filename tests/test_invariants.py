"""The seven invariants of the design, each as one test over every engine, cache and selector there is.

A method enters by its file in conf/cache or conf/self_attention. Finer tests lie where the parts do:

1. cached equals uncached: tests/rollout, tests/training/test_teacher_forcing.py, tests/backbones
2. merging duplicates: tests/cache, tests/sparsity/test_annca.py, tests/engines
3. density 1 and room for everything: tests/sparsity/test_selectors.py, tests/cache/test_policies.py
4. bounds: tests/cache/test_policies.py
5. same bits: tests/cache/test_policies.py, tests/rollout, tests/results/test_store.py
6. Wan weights: tests/backbones/test_wan_keys.py and test_wan_parity.py
7. experiments: tests/test_repository.py (they compose), tests/experiments (they run)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from torch import Tensor

from fastar import engines
from fastar.attention.context import PassKind
from fastar.attention.events import AttendEvent
from fastar.attention.rope import grid_positions
from fastar.backbones import Backbone
from fastar.backbones.reference import BlockCausalAttend
from fastar.backbones.wan.keys import key_pairs
from fastar.cache import CachePolicy, DenseCache, EmptyCache, TempCache
from fastar.metrics.density import executed_pairs
from fastar.results.store import RunStore
from tests.backbones.test_wan_keys import WAN_1_3B
from tests.small import (
    CHUNK,
    DIM,
    GRID,
    HEADS,
    LAYERS,
    TOKENS,
    clip,
    configs,
    make,
    poses,
    run,
    small_backbone,
    small_loop,
    small_rollout,
    small_state,
    uncached,
)
from tests.test_repository import EXPERIMENTS, command_of, debug_of, name_of

CACHES, SELECTORS = configs("cache"), configs("self_attention")
BUDGETED = [name for name, config in CACHES.items() if "budget_frames" in config]
TIGHT = 8  # frames of budget: too few for what the tests below generate


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


def budgeted(config: DictConfig, frames: float, **changes: Any) -> CachePolicy:
    """The policy of a file with room for `frames` dense frames, if it has a budget at all."""
    budget = {"budget_share": None, "budget_frames": frames} if "budget_frames" in config else {}
    return make(config, **budget, **changes)


# -- 1 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["sdpa", "reference"])
@pytest.mark.parametrize("renoise", [False, True], ids=["euler", "renoise"])
@torch.inference_mode()
def test_1_cached_rollout_equals_uncached_block_causal_forward(
    backbone: Backbone, renoise: bool, engine: str
) -> None:
    history, generated, seeds = 4, 6, (3, 11)
    loop = small_loop(renoise=renoise)
    latents, actions = clip(history + generated, batch=2)
    rollout = small_rollout(backbone, seeds=seeds, engine=engine, loop=loop)
    rollout.prefill(latents[:, :history], actions[:, :history])
    cached = torch.cat(list(rollout.generate(generated, actions[:, history:])), dim=1)

    attend = BlockCausalAttend(rope=backbone.transformer.rope, grid=GRID, chunk_frames=CHUNK)
    conditions = {"actions": actions, "poses": poses(backbone, actions)}

    def told(frames: int) -> dict[str, Tensor]:
        return {name: value[:, :frames] for name, value in conditions.items()}

    expected = uncached(backbone, attend, loop, seeds, latents[:, :history], generated, told)
    assert (run(small_rollout(backbone, EmptyCache)) - run(small_rollout(backbone))).abs().max() > 0.1
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=2e-5)


# -- 2 -------------------------------------------------------------------------------------------------------------


# flex compiles, and those of foreign kernels want a GPU: tests/engines
ENGINES_HERE = [
    name
    for name in engines.names()
    if name != "flex" and engines.get(name).unfit_for_device(torch.device("cpu")) is None
]


@pytest.mark.parametrize("engine", ENGINES_HERE)
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 9999))
def test_2_merged_duplicates_change_nothing_in_any_engine(engine: str, sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 2, 5, 16, generator=generator)
    k, v = 2 * torch.randn(2, 1, 2, len(sizes), 16, generator=generator)
    group = torch.repeat_interleave(torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    expected, _ = engines.attend(q, k[:, :, group], v[:, :, group], engine="reference")
    merged, _ = engines.attend(q, k, v, log_count=torch.tensor(sizes).log(), engine=engine)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=5e-6)


MERGING = {
    name: config
    for name, config in CACHES.items()
    if config.get("log_count") and config.get("slot_bits") == 16
}


@pytest.mark.parametrize("name", MERGING)
@settings(max_examples=6, deadline=None)
@given(order=st.lists(st.integers(0, 2), min_size=10, max_size=10), seed=st.integers(0, 9999))
def test_2_merged_duplicates_change_nothing_in_a_rollouts_state(
    name: str, order: list[int], seed: int
) -> None:
    """Three frames that come again and again, with equal *roped* keys, in a cache with room for about five."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(3, 3, 1, HEADS, TOKENS, DIM, generator=generator)  # q, k, v of each
    options: dict[str, Any] = {"storage": "float32", "match_space": "roped"}
    if "threshold" in MERGING[name]:
        options |= {"threshold": 0.9999, "match_by": "key"}
    states = [
        small_state(budgeted(MERGING[name], 12, **options)),
        small_state(DenseCache(storage="float32")),
    ]
    for frame, content in enumerate([*order, 0, 1, 2]):
        q, k, v = frames[:, content]
        raw = states[0].rope.unrotate(k, grid_positions(frame, 1, GRID))
        outs = []
        for state in states:
            state.begin_pass(small_loop(chunk_frames=1).commit_pass(frame))
            outs.append([state.attend("self", layer, q, raw, v) for layer in range(LAYERS)])
            state.end_pass()
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    assert states[0].cache.slots_used() < 6 * TOKENS < states[1].cache.slots_used()


# -- 3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CACHES if name != "empty"])
def test_3_a_cache_with_room_for_everything_is_dense(backbone: Backbone, name: str) -> None:
    """In slots of the same precision. The paper's form has no budget; a threshold that nothing reaches keeps all."""
    config = CACHES[name]
    slots = config.get("policy", config)
    precision = {"slot_bits": slots.slot_bits, "storage": "float32"}
    given = {"policy": precision} if "policy" in config else precision
    nothing_merges = {"threshold": 1.5} if "threshold" in config else {}
    dense = run(small_rollout(backbone, partial(DenseCache, **precision)))
    method = run(small_rollout(backbone, partial(budgeted, config, 100, **given, **nothing_merges)))
    if "threshold" in config:  # its counts of one go through the engine, which changes the order of sums
        torch.testing.assert_close(method, dense, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(method, dense)


@pytest.mark.parametrize("name", SELECTORS)
def test_3_a_selector_at_density_1_is_dense(backbone: Backbone, name: str) -> None:
    config = SELECTORS[name]
    dense, full = run(small_rollout(backbone)), {} if name == "dense" else {"density": 1.0}
    assert torch.equal(run(small_rollout(backbone, selector=partial(make, config, **full))), dense)
    if name != "dense":  # and at a low density it is not, so that the above says something
        sparse = partial(make, config, density=0.1, block_q=4, block_k=4)
        assert (run(small_rollout(backbone, selector=sparse)) - dense).abs().max() > 1e-3


# -- 4 -------------------------------------------------------------------------------------------------------------


class WorkMeter:
    """Executed pairs and keys of each chunk, over its passes and layers."""

    def __init__(self) -> None:
        self.pairs: dict[int, int] = defaultdict(int)
        self.keys: dict[int, int] = defaultdict(int)

    def on_attend(self, event: AttendEvent) -> None:
        if event.context.kind != PassKind.PREFILL:
            self.pairs[event.context.first_frame] += int(executed_pairs(event))
            self.keys[event.context.first_frame] += event.k.shape[2]


@pytest.mark.parametrize("selector", ["dense", "annsa_lsh"])
@pytest.mark.parametrize("name", BUDGETED)
def test_4_a_bounded_cache_keeps_to_its_budget_and_work_stops_growing(
    backbone: Backbone, name: str, selector: str
) -> None:
    meter = WorkMeter()
    rollout = small_rollout(
        backbone, partial(budgeted, CACHES[name], TIGHT), partial(make, SELECTORS[selector]), recorders=[meter],
        loop=small_loop(timesteps=(1000.0, 500.0)),
    )  # fmt: skip
    cache = rollout.state.cache
    latents, actions = clip(60)
    sizes = []
    for first in range(0, 60, CHUNK):
        part = slice(first, first + CHUNK)
        if first < 36:
            rollout.prefill(latents[:, part], actions[:, part])
        else:
            rollout.step(actions[:, part])
        assert cache.bytes_used() <= cache.capacity_bytes() <= TIGHT * cache.spec.dense_frame_bytes
        sizes.append((cache.bytes_used(), cache.slots_used()))
    assert len(set(sizes[18:])) == 1 and sizes[0] < sizes[-1]
    assert len(meter.pairs) == 12 and len(set(meter.pairs.values())) == len(set(meter.keys.values())) == 1


def test_4_dense_is_what_grows(backbone: Backbone) -> None:
    meter = WorkMeter()
    rollout = small_rollout(backbone, recorders=[meter])
    run(rollout, history=2, generated=8)
    work = list(meter.pairs.values())
    assert work == sorted(set(work)) and rollout.state.cache.capacity_bytes() is None


# -- 5 -------------------------------------------------------------------------------------------------------------

METHODS = [(cache, "dense") for cache in CACHES] + [
    ("tempcache", name) for name in SELECTORS if name != "dense"
]


def tight_rollout(backbone: Backbone, cache: str, selector: str) -> Any:
    """A rollout whose cache has to merge or evict all the time."""
    merges_often = {"threshold": 0.3} if "threshold" in CACHES[cache] else {}
    config = SELECTORS[selector]
    return small_rollout(
        backbone, partial(budgeted, CACHES[cache], TIGHT, **merges_often), partial(make, config), seeds=(7, 8)
    )


@pytest.mark.parametrize(("cache", "selector"), METHODS, ids=map("-".join, METHODS))
def test_5_same_seed_same_bits_and_resumed_equals_uninterrupted(
    backbone: Backbone, cache: str, selector: str, tmp_path: Path
) -> None:
    history, generated = 12, 8
    latents, actions = clip(history + generated, batch=2)
    whole = run(tight_rollout(backbone, cache, selector), history=history, generated=generated)

    interrupted = tight_rollout(backbone, cache, selector)
    interrupted.prefill(latents[:, :history], actions[:, :history])
    chunks = list(interrupted.generate(4, actions[:, history:]))
    torch.save(interrupted.state_dict(), tmp_path / "state.pt")
    interrupted.step(actions[:, -CHUNK:])  # what happens after the save is lost
    resumed = tight_rollout(backbone, cache, selector)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    chunks += resumed.generate(4, actions[:, history + 4 :])
    assert torch.equal(torch.cat(chunks, dim=1), whole)


def test_5_a_run_in_the_results_store_resumes_with_the_same_bits(backbone: Backbone, tmp_path: Path) -> None:
    _, actions = clip(20)
    whole = run(small_rollout(backbone, partial(TempCache, budget_frames=TIGHT)), history=12, generated=8)
    store, chunks = RunStore(tmp_path, "invariants"), []
    config = {"cache": "tempcache"}
    latents, _ = clip(20)
    with pytest.raises(SystemExit), store.open(config, seed=7) as attempt:
        rollout = small_rollout(backbone, partial(TempCache, budget_frames=TIGHT))
        rollout.prefill(latents[:, :12], actions[:, :12])
        chunks += rollout.generate(4, actions[:, 12:])
        attempt.save_state({"rollout": rollout.state_dict(), "chunks": chunks})
        raise SystemExit
    with store.open(config, seed=7) as attempt:
        assert attempt.resumed and attempt.has_state
        saved = attempt.load_state()
        rollout = small_rollout(backbone, partial(TempCache, budget_frames=TIGHT))
        rollout.load_state_dict(saved["rollout"])
        chunks = saved["chunks"] + list(rollout.generate(4, actions[:, 16:]))
    assert torch.equal(torch.cat(chunks, dim=1), whole)


# -- 6 -------------------------------------------------------------------------------------------------------------


def test_6_the_wan_config_is_the_published_model_of_825_names() -> None:
    """The YAML names the sizes whose names, parameters and parity with diffusers are tested in tests/backbones."""
    wan = make(configs("backbone")["wan_1_3b"].transformer)
    assert wan == WAN_1_3B and len(list(key_pairs(wan))) == 825


# -- 7 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_7_every_experiment_composes_to_its_tiny_version(
    path: Path, composed: Callable[..., DictConfig]
) -> None:
    """debug has the last word on the backbone, whatever the file says; tests/experiments runs such configs."""
    name, overrides = command_of(path)
    debug = debug_of(composed(name, *overrides))
    config = composed(name, *overrides, f"debug={debug}")
    assert config.backbone.name == debug and config.backbone.transformer.dim <= 64
