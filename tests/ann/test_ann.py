"""Matchers against a plain search, buckets against what they promise, similarities against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastar import ann
from fastar.ann.base import Metric

MATCHERS: dict[str, ann.Matcher] = {
    "exact": ann.ExactMatcher(),
    "blocks": ann.ExactMatcher(max_scores=100),
    "lsh": ann.LSHMatcher(bits=5, tables=10, radius=0),
    "quantized": ann.QuantizedMatcher(),
}


def plain_search(queries: Tensor, keys: Tensor, valid: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    if metric == "dot":
        scores = torch.einsum("Nqd,Nkd->Nqk", queries, keys)
    else:
        scores = -(queries[:, :, None] - keys[:, None]).square().sum(-1)
    best = scores.masked_fill(~valid[:, None], -math.inf).max(-1)
    return best.indices, best.values


def near_pairs(problems: int = 3, queries: int = 40, keys: int = 90, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Queries that are noisy copies of some keys, all about a common mean, as in a cache."""
    mean = torch.randn(problems, 1, dim)
    k = torch.randn(problems, keys, dim)
    return k[:, :queries] + 0.2 * torch.randn(problems, queries, dim) + mean, k + mean


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("name", ["exact", "blocks"])
def test_exact_matcher_is_a_plain_search(name: str, metric: Metric) -> None:
    queries, keys = near_pairs()
    valid = torch.rand(3, 90) > 0.3
    index, score = MATCHERS[name].nearest(queries, keys, valid=valid, metric=metric)
    expected, value = plain_search(queries, keys, valid, metric)
    assert torch.equal(index, expected)
    torch.testing.assert_close(score, value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "metric", "least"), [
    ("lsh", "euclidean", 0.9), ("lsh", "dot", 0.3), ("quantized", "euclidean", 0.99), ("quantized", "dot", 0.97),
])  # fmt: skip
def test_approximate_matchers_recall_the_exact_answer(name: str, metric: Metric, least: float) -> None:
    queries, keys = near_pairs(problems=4, queries=100, keys=300, dim=32)
    exact, _ = ann.ExactMatcher().nearest(queries, keys, metric=metric)
    found, _ = MATCHERS[name].nearest(queries, keys, metric=metric)
    assert (found == exact).float().mean() >= least


def test_more_bits_recall_more() -> None:
    queries, keys = near_pairs(problems=4, queries=100, keys=300, dim=32)
    queries = queries + 0.6 * torch.randn_like(queries)
    exact, _ = ann.ExactMatcher().nearest(queries, keys)
    recall = [
        (ann.QuantizedMatcher(bits=b).nearest(queries, keys)[0] == exact).float().mean() for b in (2, 4, 8)
    ]
    assert recall[0] < recall[1] < recall[2]


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_faiss_agrees_with_exact(metric: Metric) -> None:
    pytest.importorskip("faiss")
    queries, keys = near_pairs()
    valid = torch.rand(3, 90) > 0.5
    exact = ann.ExactMatcher().nearest(queries, keys, valid=valid, metric=metric)
    found = ann.FaissMatcher().nearest(queries, keys, valid=valid, metric=metric)
    assert torch.equal(found[0], exact[0])
    torch.testing.assert_close(found[1], exact[1], atol=1e-3, rtol=1e-4)
    queries, keys = near_pairs(queries=60, keys=200)
    cells = ann.FaissMatcher(index="ivf", cells=4, probes=2).nearest(queries, keys, metric="euclidean")[0]
    assert (cells == ann.ExactMatcher().nearest(queries, keys, metric="euclidean")[0]).float().mean() > 0.7


def test_faiss_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ValueError, match="install faiss-cpu"):
        ann.FaissMatcher()


@pytest.mark.parametrize("name", list(MATCHERS))
def test_nothing_valid_means_no_match(name: str) -> None:
    queries, keys = near_pairs()
    valid = torch.ones(3, 90, dtype=torch.bool)
    valid[1] = False
    index, score = MATCHERS[name].nearest(queries, keys, valid=valid)
    assert (index[1] == -1).all() and (score[1] == -math.inf).all()
    assert (index[0] >= 0).any()
    empty, _ = MATCHERS[name].nearest(queries, keys[:, :0])
    assert (empty == -1).all()


@pytest.mark.parametrize("name", list(MATCHERS))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), copies=st.integers(1, 4))
def test_a_copy_is_found_and_the_first_of_equals_wins(name: str, seed: int, copies: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    unique = torch.randn(1, 8, 12, generator=generator)
    keys = unique.repeat(1, copies, 1)
    index, _ = MATCHERS[name].nearest(unique, keys, metric="euclidean")
    assert torch.equal(index[0] % 8, torch.arange(8))
    if name != "quantized":  # coarse codes may tie between different keys
        assert torch.equal(index[0], torch.arange(8))


def test_mismatched_features_are_named() -> None:
    with pytest.raises(ValueError, match="must agree"):
        ann.ExactMatcher().nearest(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="one flag a key"):
        ann.ExactMatcher().nearest(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), valid=torch.zeros(1, 5).bool())


BUCKETIZERS: dict[str, ann.Bucketizer] = {
    "lsh": ann.LSHBucketizer(bits=3),
    "quantized": ann.QuantizedBucketizer(dims=2, bits=2),
    "kmeans": ann.KMeansBucketizer(clusters=8),
}


@pytest.mark.parametrize("name", list(BUCKETIZERS))
def test_near_pairs_share_a_bucket_more_often_than_random_ones(name: str) -> None:
    queries, keys = near_pairs(problems=4, queries=100, keys=100)
    queries = queries + 3 * torch.randn(4, 1, 16)  # queries of a head are offset from its keys
    a, b = BUCKETIZERS[name].buckets(queries, keys)
    assert a.shape == b.shape == (4, 100) and a.dtype == torch.long
    together, chance = (a == b).float().mean(), (a == b.roll(1, 1)).float().mean()
    assert together > 0.4 and together > 2.5 * chance
    again = BUCKETIZERS[name].buckets(queries, keys)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])


@pytest.mark.parametrize("kind", [ann.LSHBucketizer, ann.QuantizedBucketizer])
def test_a_sides_own_mean_matters_only_to_buckets_about_the_origin(kind: type[ann.Bucketizer]) -> None:
    queries, keys = near_pairs(problems=4, queries=100, keys=100)
    aside = queries + 3 * torch.randn(4, 1, 16)
    for centre in (True, False):
        bucketizer = kind(centre=centre)  # type: ignore[call-arg]
        same = torch.equal(bucketizer.buckets(queries, keys)[0], bucketizer.buckets(aside, keys)[0])
        assert same == centre


def test_kmeans_finds_separate_clusters() -> None:
    centres = 20 * torch.randn(2, 5, 8)
    member = torch.arange(5).repeat(12)
    points = centres[:, member] + torch.randn(2, 60, 8)
    _, ids = ann.KMeansBucketizer(clusters=5, iterations=10).buckets(points, points)
    for problem in ids:
        same = problem[:, None] == problem
        assert torch.equal(same, member[:, None] == member)


def test_random_buckets_are_even_and_ignore_the_data() -> None:
    control = ann.RandomBucketizer(count=4, seed=3)
    a, b = control.buckets(torch.randn(2, 40, 8), torch.randn(2, 60, 8))
    assert (torch.nn.functional.one_hot(b, 4).sum(1) == 15).all()
    again, _ = control.buckets(torch.randn(2, 40, 8), torch.randn(2, 60, 8))
    assert torch.equal(a, again)


@pytest.mark.parametrize("bad", [
    lambda: ann.LSHMatcher(bits=0), lambda: ann.LSHMatcher(radius=8), lambda: ann.QuantizedMatcher(bits=9),
    lambda: ann.LSHBucketizer(bits=20), lambda: ann.QuantizedBucketizer(dims=9, bits=2),
    lambda: ann.KMeansBucketizer(clusters=0), lambda: ann.RandomBucketizer(count=0),
])  # fmt: skip
def test_bad_settings_are_refused(bad) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="got"):
        bad()


def test_similarities_reduce_to_their_definitions() -> None:
    keys = torch.randn(2, 10, 6) + torch.randn(6)
    queries = torch.randn(2, 50, 6) @ torch.randn(6, 6)

    def products(similarity: ann.Similarity, **given_: Tensor) -> Tensor:
        features = ann.key_features(keys, similarity, **given_)
        return features @ features.mT

    cosine = torch.nn.functional.cosine_similarity
    pair = (keys[:, :, None], keys[:, None])
    torch.testing.assert_close(products("cosine"), cosine(*pair, dim=-1))
    centre = keys.mean(1, keepdim=True)
    centred = keys - centre
    torch.testing.assert_close(products("centred"), cosine(centred[:, :, None], centred[:, None], dim=-1))
    torch.testing.assert_close(products("dot"), keys @ keys.mT / math.sqrt(6))

    moment = queries.mT @ queries / 50
    features = ann.key_features(keys, "expected_logit_change", query_moment=moment)
    logits = queries @ keys.mT / math.sqrt(6)  # [2, queries, keys]
    change = (logits[..., None] - logits[..., None, :]).square().mean(1)
    torch.testing.assert_close(ann.squared_distance(features, features), change, rtol=2e-3, atol=2e-3)

    diagonal = ann.key_features(keys, "expected_logit_change", query_moment=moment.diagonal(dim1=-2, dim2=-1))
    only = ann.key_features(
        keys, "expected_logit_change", query_moment=torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1))
    )
    torch.testing.assert_close(diagonal, only, rtol=1e-3, atol=1e-4)


def test_a_moment_of_few_queries_still_measures() -> None:
    query, keys = torch.randn(1, 1, 8), torch.randn(1, 5, 8)
    features = ann.key_features(keys, "expected_logit_change", query_moment=query.mT @ query)
    logit = (query @ keys.mT)[0, 0] / math.sqrt(8)
    expected = (logit[:, None] - logit).square()
    torch.testing.assert_close(ann.squared_distance(features, features)[0], expected, rtol=1e-2, atol=1e-2)


def test_unknown_similarity_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="centred"):
        ann.key_features(torch.zeros(1, 2, 4), "cosin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="second moment"):
        ann.key_features(torch.zeros(1, 2, 4), "expected_logit_change")


def test_lsh_finds_the_best_of_the_keys_that_share_a_bucket() -> None:
    queries, keys = near_pairs(problems=2, queries=30, keys=50)
    matcher = ann.LSHMatcher(bits=8, tables=2, radius=0, max_scores=300)
    index, _ = matcher.nearest(queries, keys, metric="euclidean")
    planes = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    centre = keys.mean(1, keepdim=True)
    sides = [((x - centre) @ planes > 0).unflatten(-1, (2, 8)) for x in (queries, keys)]
    shares = (sides[0][:, :, None] == sides[1][:, None]).all(-1).any(-1)
    distance = torch.cdist(queries, keys).masked_fill(~shares, math.inf)
    assert torch.equal(index, torch.where(shares.any(-1), distance.argmin(-1), -1))
    wider, _ = ann.LSHMatcher(bits=8, tables=2, radius=1).nearest(queries, keys, metric="euclidean")
    assert (wider == -1).sum() < (index == -1).sum() < index.numel()


def test_lsh_buckets_centre_each_side_or_the_keys_alone() -> None:
    queries, keys = near_pairs(problems=2, queries=30, keys=50)
    queries = queries + 3
    planes = torch.randn(16, 4, generator=torch.Generator().manual_seed(7))

    def codes(x: Tensor) -> list[list[int]]:
        return [[sum(2**bit for bit in range(4) if float(row @ planes[:, bit]) > 0) for row in p] for p in x]

    centred = [x - x.mean(1, keepdim=True) for x in (queries, keys)]
    cases = {(True, None): centred, (True, False): [queries, centred[1]], (False, None): [queries, keys]}
    for (centre, centre_queries), expected in cases.items():
        lsh = ann.LSHBucketizer(bits=4, centre=centre, centre_queries=centre_queries, seed=7)
        found = lsh.buckets(queries, keys)
        assert [ids.tolist() for ids in found] == [codes(x) for x in expected]
    # what all queries ask for together stays in their codes, and keys about their mean answer to it
    kept, gone = (
        ann.LSHBucketizer(bits=4, centre_queries=c).buckets(queries + 100, keys)[0] for c in (False, True)
    )
    assert (kept == kept[:, :1]).all() and gone.unique().numel() > 4
