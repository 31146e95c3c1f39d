"""Self-attention selectors: what they execute, what they keep, and when they are on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastar import engines
from fastar.ann import (
    Bucketizer,
    KMeansBucketizer,
    LSHBucketizer,
    QuantizedBucketizer,
    RandomBucketizer,
)
from fastar.attention.context import PassContext, PassKind
from fastar.engines.reference import attention_weights
from fastar.sparsity import AnnSA, Dense, RandomBlocks, Selector, SelectRequest, calibrate_layers
from fastar.sparsity.blocks import aimed_density

from .conftest import CACHED, CURRENT, DIM, HEADS, FirstCoordinate, denoise

Make = Callable[..., SelectRequest]


def annsa(**options: object) -> AnnSA:
    return AnnSA(**({"bucketizer": FirstCoordinate(), "block_q": 4, "block_k": 8} | options))


def random_blocks(**options: object) -> RandomBlocks:
    return RandomBlocks(**({"block_q": 4, "block_k": 8} | options))


def mass_kept(selector: Selector, request: SelectRequest) -> float:
    plan = selector.plan(request)
    assert plan is not None
    weights = attention_weights(request.q, request.k, log_count=request.log_count)
    return float((weights * plan.token_mask()).sum(-1).mean())


def empty_slots(request: SelectRequest) -> Tensor:
    assert request.log_count is not None
    return request.log_count == -torch.inf


@pytest.mark.parametrize("engine", ["reference", "sdpa", "augmented"])
@pytest.mark.parametrize(
    "selector", [Dense(), annsa(density=1.0), random_blocks(density=1.0)], ids=lambda s: type(s).__name__
)
def test_density_one_is_dense(request_for: Make, selector: Selector, engine: str) -> None:
    request = request_for(empty=0.3)
    v = torch.randn(request.k.shape)
    plan = selector.plan(request)
    options = {"log_count": request.log_count, "engine": engine}
    dense, _ = engines.attend(request.q, request.k, v, **options)
    selected, _ = engines.attend(request.q, request.k, v, plan=plan, **options)
    assert torch.equal(selected, dense)


@pytest.mark.parametrize("make", [annsa, random_blocks])
def test_density_approaches_dense_without_a_jump(request_for: Make, make: Callable[..., Selector]) -> None:
    """Just below 1 the plan holds all blocks, and its output is dense's up to the order of sums."""
    request = request_for(empty=0.3)
    v = torch.randn(request.k.shape)
    plan = make(density=0.999).plan(request)
    assert plan is not None and torch.equal(plan.executed_pairs(), plan.dense_pairs())
    dense, _ = engines.attend(request.q, request.k, v, log_count=request.log_count, engine="sdpa")
    planned, _ = engines.attend(
        request.q, request.k, v, log_count=request.log_count, plan=plan, engine="sdpa"
    )
    torch.testing.assert_close(planned, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [annsa, random_blocks])
@pytest.mark.parametrize("empty", [0.0, 0.4])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_density_is_met_to_within_a_block(
    request_for: Make, make: Callable[..., Selector], density: float, empty: float
) -> None:
    plan = make(density=density).plan(request_for(empty=empty))
    assert plan is not None and plan.live_keys is not None
    assert ((plan.density() - density).abs() <= plan.block_k / plan.live_keys).all()
    assert plan.max_blocks is not None and int(plan.block_mask.sum(-1).max()) <= plan.max_blocks


@pytest.mark.parametrize("make", [annsa, random_blocks])
@pytest.mark.parametrize("empty", [0.0, 0.4])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.8, 0.999])
def test_density_of_the_past_leaves_the_chunk_out(
    request_for: Make, make: Callable[..., Selector], density: float, empty: float
) -> None:
    """Where the chunk ends with a block; of a small density of all pairs nothing of the past would be read."""
    request = request_for(empty=empty)
    plan = make(density=density, density_of="past").plan(request)
    assert plan is not None and plan.live_keys is not None and CURRENT % plan.block_k == 0
    past = plan.live_keys - CURRENT
    read = plan.executed_pairs() / plan.num_queries - CURRENT
    assert ((read - density * past).abs() <= plan.block_k).all()
    aimed = torch.stack(
        [torch.tensor(aimed_density(density, "past", CURRENT, int(n))) for n in plan.live_keys.flatten()]
    )
    assert ((plan.density().flatten() - aimed).abs() <= plan.block_k / plan.live_keys.flatten()).all()
    assert plan.max_blocks is not None and int(plan.block_mask.sum(-1).max()) <= plan.max_blocks
    assert aimed_density(density, "all", CURRENT, 100) == density


@pytest.mark.parametrize("make", [annsa, random_blocks])
@pytest.mark.parametrize("current", [CURRENT, 21])
def test_current_chunk_is_attended_and_empty_slots_are_not(
    request_for: Make, make: Callable[..., Selector], current: int
) -> None:
    """Even at a target below the current chunk's own share, and if the chunk ends inside a block."""
    request = request_for(empty=0.4, current=current)
    plan = make(density=0.01).plan(request)
    assert plan is not None
    mask = plan.token_mask()
    assert mask[..., CACHED:].all()
    assert not mask[empty_slots(request)[:, :, None].expand_as(mask)].any()
    assert torch.equal(plan.executed_pairs(), mask.sum((-1, -2)))


def test_letter_of_the_paper_attends_to_same_bucket_keys_alone(request_for: Make) -> None:
    request = request_for(empty=0.3)
    plan = annsa(density=None).plan(request)
    assert plan is not None
    queries, keys = FirstCoordinate().buckets(request.q, request.k)
    expected = queries[..., :, None] == keys[..., None, :]
    expected[..., CACHED:] = True
    expected &= ~empty_slots(request)[:, :, None]
    assert torch.equal(plan.token_mask(), expected)
    v = torch.randn(request.k.shape)
    logits = request.q @ request.k.transpose(-1, -2) / DIM**0.5 + request.log_count[:, :, None]
    by_hand = torch.softmax(logits.masked_fill(~expected, -torch.inf), dim=-1) @ v
    out, _ = engines.attend(request.q, request.k, v, log_count=request.log_count, plan=plan, engine="sdpa")
    torch.testing.assert_close(out, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", ["shared", "centroid"])
def test_content_buckets_keep_more_than_random_blocks(request_for: Make, rank: str) -> None:
    request = request_for(empty=0.2, cached=600)
    content, chance = annsa(density=0.3, rank=rank), random_blocks(density=0.3)
    densities = [float(s.plan(request).density().mean()) for s in (content, chance)]
    assert densities[0] == pytest.approx(densities[1], abs=1e-3)  # the last block is short
    assert mass_kept(content, request) > mass_kept(chance, request) + 0.2
    assert mass_kept(content, request) > 0.9


@pytest.mark.parametrize(
    "bucketizer",
    [LSHBucketizer(bits=4), QuantizedBucketizer(dims=2, bits=2), KMeansBucketizer(clusters=6)],
    ids=lambda bucketizer: type(bucketizer).__name__,
)
def test_every_content_bucketizer_beats_random_buckets(request_for: Make, bucketizer: Bucketizer) -> None:
    """In the letter of the paper, where the buckets alone decide; no empty slots or merges."""
    request = request_for(cached=600, current=48)
    kept = {}
    for name, chosen in (("content", bucketizer), ("random", RandomBucketizer(count=16))):
        plan = annsa(bucketizer=chosen, density=None).plan(request)
        assert plan is not None
        mask = plan.token_mask()[..., :600]
        weights = attention_weights(request.q, request.k)[..., :600]
        # mass kept beyond what keeping the same number of arbitrary keys would keep
        kept[name] = float((weights * mask).sum() / weights.sum() - mask.float().mean())
    assert abs(kept["random"]) < 0.1
    assert kept["content"] > kept["random"] + 0.2


def test_the_first_chunk_has_no_cache(request_for: Make) -> None:
    request = request_for(cached=0)
    for selector in (annsa(), annsa(density=None), random_blocks()):
        plan = selector.plan(request)
        assert plan is not None and plan.token_mask().all()


def test_blocks_with_shared_buckets_come_before_others(request_for: Make) -> None:
    """A chosen cached block without a same-bucket pair means that every block with one was chosen."""
    request = request_for()
    plan, letter = annsa(density=0.4).plan(request), annsa(density=None).plan(request)
    assert plan is not None and letter is not None
    spare = plan.block_mask & ~letter.block_mask
    left_out = letter.block_mask & ~plan.block_mask
    assert not (spare.any(-1) & left_out.any(-1)).any()


def test_raw_match_space_buckets_the_raw_vectors(request_for: Make) -> None:
    request = request_for()
    flipped = dataclasses.replace(request, q_raw=request.q.flip(2), k_raw=request.k.flip(2))
    plan = annsa(density=None, match_space="raw").plan(flipped)
    assert plan is not None
    queries, keys = FirstCoordinate().buckets(request.q.flip(2), request.k.flip(2))
    expected = queries[..., :, None] == keys[..., None, :]
    expected[..., CACHED:] = True
    assert torch.equal(plan.token_mask(), expected)
    with pytest.raises(ValueError, match="match_space=raw needs q_raw and k_raw"):
        annsa(match_space="raw").plan(request)


def test_shared_heads_select_alike(request_for: Make) -> None:
    plan = annsa(density=None, shared_heads=True).plan(request_for())
    assert plan is not None
    mask = plan.token_mask()
    assert torch.equal(mask[:, 0], mask[:, 1])
    queries, keys = FirstCoordinate().buckets(request_for().q[:, 0], request_for().k[:, 0])
    assert torch.equal(mask[:, 0, :, :CACHED], queries[..., :, None] == keys[:, None, :CACHED])


def test_prompt_buckets_come_from_the_tags(request_for: Make) -> None:
    request = request_for(empty=0.2)
    generator = torch.Generator().manual_seed(1)
    text_tags = torch.randint(0, 5, (1, HEADS, CURRENT), generator=generator)
    key_tags = torch.randint(-1, 5, (1, HEADS, CACHED + CURRENT), generator=generator)
    plan = annsa(source="prompt", bucketizer=None, density=None).plan(
        dataclasses.replace(request, text_tags=text_tags, key_tags=key_tags)
    )
    assert plan is not None
    expected = (text_tags[..., :, None] == key_tags[..., None, :]) | (key_tags == -1)[:, :, None]
    expected[..., CACHED:] = True
    assert torch.equal(plan.token_mask(), expected & ~empty_slots(request)[:, :, None])
    selector = annsa(source="prompt", bucketizer=None)
    assert selector.wants_tags and selector.plan(request) is None, "no tags yet: a chunk's first pass"
    with pytest.raises(ValueError, match="needs text_tags and key_tags together"):
        selector.plan(dataclasses.replace(request, text_tags=text_tags))


def test_a_query_without_a_tag_reads_everything(request_for: Make) -> None:
    request = request_for(empty=0.2)
    plan = annsa(source="prompt", bucketizer=None, density=None).plan(
        dataclasses.replace(
            request,
            text_tags=torch.full((1, HEADS, CURRENT), -1),
            key_tags=torch.arange(CACHED + CURRENT).expand(1, HEADS, -1),
        )
    )
    assert plan is not None and torch.equal(plan.executed_pairs(), plan.dense_pairs())
    assert torch.equal(plan.token_mask().any(2), ~empty_slots(request))


def test_plans_are_rebuilt_each_pass_or_each_chunk(request_for: Make) -> None:
    first = request_for(seed=1, context=denoise(2, 4))
    second = request_for(seed=2, context=denoise(3, 4))
    later = request_for(seed=2, context=denoise(3, 4, first_frame=12))
    fresh, kept = annsa(rebuild="pass"), annsa(rebuild="chunk")
    assert fresh.plan(first) is not fresh.plan(second)
    plan = kept.plan(first)
    assert kept.plan(second) is plan
    assert kept.plan(first) is not plan, "a chunk that is started over gets a new plan"
    plan = kept.plan(first)
    assert kept.plan(dataclasses.replace(second, layer=1)) is not plan
    assert kept.plan(later) is not plan


@pytest.mark.gpu
@pytest.mark.parametrize("empty", [0.0, 0.3])
def test_plans_of_a_gpu_are_those_of_a_cpu(request_for: Make, empty: float) -> None:
    """Made by kernels there; scores that are equal but for rounding may be ranked either way."""
    request = request_for(empty=empty, cached=5000)
    tensors = {"q": request.q, "k": request.k, "log_count": request.log_count}
    there = dataclasses.replace(request, **{n: None if x is None else x.cuda() for n, x in tensors.items()})
    plan, other = annsa(density=0.3).plan(request), annsa(density=0.3).plan(there)
    assert plan is not None and other is not None
    for name in ("query_order", "key_order", "live_keys"):
        assert torch.equal(getattr(other, name).cpu(), getattr(plan, name)), name
    mask = other.block_mask.cpu()
    assert (mask == plan.block_mask).float().mean() > 0.999
    counts, indices = (x.cpu() for x in other.listed())
    listed = torch.zeros_like(mask)
    for place in range(int(counts.max())):
        row = indices[..., place : place + 1].long()
        listed.scatter_(-1, row.where(place < counts[..., None], 0), True)
    assert torch.equal(counts, mask.sum(-1, dtype=torch.int32)) and torch.equal(listed, mask)


def test_random_blocks_depend_on_seed_layer_chunk_and_step_alone(request_for: Make) -> None:
    def mask(seed: int = 0, layer: int = 0, step: int = 3, frame: int = 8) -> Tensor:
        plan = random_blocks(seed=seed).plan(request_for(layer=layer, context=denoise(step, 4, frame)))
        assert plan is not None
        return plan.block_mask

    base = mask()
    assert torch.equal(base, mask())
    for changed in (mask(seed=1), mask(layer=1), mask(step=2), mask(frame=12)):
        assert not torch.equal(base, changed)


@pytest.mark.parametrize(
    ("num_steps", "dense_steps"), [(1, [0]), (2, [0]), (4, [0, 1]), (10, [0, 1, 2]), (50, list(range(15)))]
)
def test_first_steps_are_dense(num_steps: int, dense_steps: list[int]) -> None:
    selector = annsa()
    dense = [step for step in range(num_steps) if selector.is_dense(0, denoise(step, num_steps))]
    assert dense == dense_steps


def test_schedule_fields(request_for: Make) -> None:
    assert annsa(warmup_share=0.0).is_dense(0, denoise(0, 4))
    assert not annsa(warmup_share=0.0, min_dense_steps=0).is_dense(0, denoise(0, 4))
    assert annsa(warmup_share=1.0).is_dense(0, denoise(3, 4))
    assert annsa(layers=[1, 2]).is_dense(0, denoise(3, 4)) and not annsa(layers=[1, 2]).is_dense(
        1, denoise(3, 4)
    )
    assert annsa(layers=[1]).plan(request_for()) is None
    for kind in (PassKind.COMMIT, PassKind.PREFILL, PassKind.REWRITE):
        context = PassContext(kind, 0, 4, (0.0,) * 4)
        assert annsa().is_dense(0, context) and not annsa(commit_dense=False).is_dense(0, context)
    assert Dense().is_dense(0, denoise(3, 4)) and Dense().plan(request_for()) is None


def test_layers_are_chosen_by_measured_recall() -> None:
    recalls = [0.9, 0.2, 0.8, 0.8, 0.1, 0.7, 0.3, 0.95, 0.6, 0.5]
    assert calibrate_layers(recalls) == [0, 2, 3, 5, 7, 8, 9]
    assert calibrate_layers({4: 0.9, 7: 0.9, 9: 0.1}, share=0.34) == [4]
    assert calibrate_layers(recalls, share=0.0) == [] and calibrate_layers(recalls, share=1.0) == list(
        range(10)
    )
    with pytest.raises(ValueError, match=r"share of layers must be in 0\.\.1"):
        calibrate_layers(recalls, share=70)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density is a share of the dense pairs in \(0, 1\]"),
        ({"density_of": "cache"}, "density_of must be one of all, past"),
        ({"rank": "best"}, "rank must be one of shared, centroid, got 'best'"),
        ({"source": "audio"}, "source must be one of content, prompt"),
        ({"rebuild": "never"}, "rebuild must be one of pass, chunk"),
        ({"match_space": "latent"}, "match_space must be one of roped, raw"),
        ({"bucketizer": None}, "needs a bucketizer"),
        ({"warmup_share": 30}, "warmup_share is a share"),
        ({"block_q": 0}, "block sizes must be at least 1"),
    ],
)
def test_unusable_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        annsa(**options)


@pytest.mark.parametrize("rebuild", ["chunk", "commit", "pass"])
def test_which_passes_share_a_plan(request_for: Make, rebuild: str) -> None:
    """Those of a chunk's denoising, and with `commit` the sparse commit, too; a chunk that follows has its own."""
    selector = annsa(rebuild=rebuild, warmup_share=0.0, min_dense_steps=0, commit_dense=False)
    commit = PassContext(kind=PassKind.COMMIT, first_frame=8, num_frames=4, timesteps=(0.0,) * 4)
    first, second, last = (
        selector.plan(dataclasses.replace(request_for(), context=context))
        for context in (denoise(0, 4), denoise(1, 4), commit)
    )
    assert first is not None and last is not None
    assert (second is first) == (rebuild != "pass")
    assert (last is first) == (rebuild == "commit")
    selector.forget(1)
    assert selector.standing(0, commit, first.num_queries, first.num_keys) is None
