"""Every engine against the reference, and the reference against a double loop."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fastar import engines
from fastar.engines import BlockPlan
from fastar.engines.augmented import augment_keys, augment_queries
from fastar.engines.reference import attention_weights

from .conftest import Draw

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
# queries, keys, head dim, value dim, block_q, block_k; lengths that are no multiple of the blocks included
CASES = {
    "whole blocks": (64, 128, 32, 32, 16, 32),
    "ragged": (50, 133, 32, 32, 16, 32),
    "short": (7, 21, 16, 16, 16, 16),
    "wide values": (33, 70, 16, 40, 16, 16),
    "narrow values": (33, 70, 24, 16, 16, 32),
}


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def check_against_reference(draw: Draw, engine: str, case: str, biased: bool, planned: str) -> None:
    queries, keys, head_dim, value_dim, block_q, block_k = CASES[case]
    q, k = draw.normal(2, 3, queries, head_dim), draw.normal(2, 3, keys, head_dim)
    v = draw.normal(2, 3, keys, value_dim)
    log_count = draw.log_count(2, 3, keys) if biased else None
    plan = None
    if planned != "no plan":
        plan = draw.plan(2, 3, queries, keys, block_q, block_k, tags=planned == "tags")
    options = {"log_count": log_count, "plan": plan}
    expected, _ = engines.attend(q.float(), k.float(), v.float(), engine="reference", **options)
    out, lse = engines.attend(q, k, v, engine=engine, **options)
    assert lse is None and out.dtype == draw.dtype and out.shape == expected.shape
    assert relative_error(out, expected) < TOLERANCE[draw.dtype]
    nothing = (expected == 0).all(-1)
    assert nothing.any() == (biased or plan is not None)
    assert (out[nothing] == 0).all(), "a query with no key to attend to gets zeros"


@pytest.mark.parametrize("planned", ["no plan", "plan", "tags"])
@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["sdpa", "augmented"])
def test_sdpa_engines_equal_the_reference(
    draw: Draw, engine: str, case: str, dtype: torch.dtype, biased: bool, planned: str, device: torch.device
) -> None:
    draw = dataclasses.replace(draw, device=device, dtype=dtype)
    check_against_reference(draw, engine, case, biased, planned)


@pytest.mark.parametrize("planned", ["no plan", "plan", "tags"])
@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["whole blocks", "ragged"])
@pytest.mark.gpu
def test_flex_equals_the_reference_on_cuda(
    draw: Draw, case: str, dtype: torch.dtype, biased: bool, planned: str
) -> None:
    draw = dataclasses.replace(draw, device=torch.device("cuda"), dtype=dtype)
    check_against_reference(draw, "flex", case, biased, planned)


@pytest.mark.slow
def test_flex_equals_the_reference_on_cpu(draw: Draw) -> None:
    """One compiled variant, as each takes seconds; two lengths, to see that shapes are dynamic."""
    check_against_reference(draw, "flex", "ragged", biased=True, planned="plan")
    check_against_reference(draw, "flex", "whole blocks", biased=True, planned="plan")


@pytest.mark.gpu
def test_flex_returns_the_log_sum_exp_on_cuda(draw: Draw) -> None:
    draw = dataclasses.replace(draw, device=torch.device("cuda"))
    q, k, v = draw.normal(1, 2, 50, 32), draw.normal(1, 2, 133, 32), draw.normal(1, 2, 133, 32)
    plan, log_count = draw.plan(1, 2, 50, 133, 16, 32), draw.log_count(1, 2, 133)
    _, expected = engines.attend(q, k, v, log_count=log_count, plan=plan, engine="reference", return_lse=True)
    _, lse = engines.attend(q, k, v, log_count=log_count, plan=plan, engine="flex", return_lse=True)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


def test_reference_is_the_formula(draw: Draw) -> None:
    q, k, v = draw.normal(1, 2, 5, 8), draw.normal(1, 2, 9, 8), draw.normal(1, 2, 9, 3)
    log_count = draw.log_count(1, 2, 9)
    plan = draw.plan(1, 2, 5, 9, 2, 4, tags=True)
    out, lse = engines.attend(q, k, v, log_count=log_count, plan=plan, engine="reference", return_lse=True)
    weights = attention_weights(q, k, log_count=log_count, plan=plan)
    assert lse is not None and plan.query_tags is not None and plan.key_tags is not None
    for head in range(2):
        query_place = plan.query_order[0, head].tolist()
        key_place = plan.key_order[0, head].tolist()
        for i in range(5):
            masses = []
            for j in range(9):
                block = plan.block_mask[0, head, query_place.index(i) // 2, key_place.index(j) // 4]
                tags = (int(plan.query_tags[0, head, i]), int(plan.key_tags[0, head, j]))
                sees = bool(block) and (tags[0] == tags[1] or -1 in tags)
                logit = float(q[0, head, i] @ k[0, head, j]) / math.sqrt(8)
                masses.append(math.exp(logit + float(log_count[0, head, j])) if sees else 0.0)
            total = sum(masses)
            expected = torch.tensor([m / total if total else 0.0 for m in masses])
            torch.testing.assert_close(weights[0, head, i], expected)
            torch.testing.assert_close(out[0, head, i], expected @ v[0, head])
            assert float(lse[0, head, i]) == pytest.approx(math.log(total) if total else -math.inf, rel=1e-5)


@pytest.mark.parametrize("engine", ["reference", "sdpa", "augmented"])
def test_merged_duplicates_change_nothing(draw: Draw, engine: str) -> None:
    """The TempCache lemma: m copies of a key and value equal one of them with log m."""
    q, k, v = draw.normal(1, 2, 20, 32), draw.normal(1, 2, 12, 32), draw.normal(1, 2, 12, 32)
    sizes = torch.tensor([1, 700, 3, 2, 1, 50, 9, 1, 1, 31, 4, 2])
    whole, _ = engines.attend(
        q, k.repeat_interleave(sizes, dim=2), v.repeat_interleave(sizes, dim=2), engine="reference"
    )
    merged, _ = engines.attend(q, k, v, log_count=sizes.log(), engine=engine)
    assert relative_error(merged, whole) < 2e-6


@pytest.mark.parametrize("engine", ["reference", "sdpa", "augmented"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counts_of_one_change_no_bit(draw: Draw, engine: str, dtype: torch.dtype) -> None:
    draw = dataclasses.replace(draw, dtype=dtype)
    q, k, v = draw.normal(1, 2, 48, 64), draw.normal(1, 2, 300, 64), draw.normal(1, 2, 300, 64)
    plain, _ = engines.attend(q, k, v, engine=engine)
    counted, _ = engines.attend(q, k, v, log_count=torch.zeros(300), engine=engine)
    assert torch.equal(plain, counted)


@pytest.mark.parametrize("engine", ["reference", "sdpa", "augmented"])
def test_a_plan_of_all_blocks_is_dense(draw: Draw, engine: str) -> None:
    q, k, v = draw.normal(2, 2, 50, 32), draw.normal(2, 2, 133, 32), draw.normal(2, 2, 133, 32)
    plan = draw.plan(2, 2, 50, 133, 16, 32)
    plan = dataclasses.replace(plan, block_mask=torch.ones_like(plan.block_mask))
    dense, _ = engines.attend(q, k, v, engine=engine)
    planned, _ = engines.attend(q, k, v, plan=plan, engine=engine)
    torch.testing.assert_close(planned, dense, rtol=1e-5, atol=1e-6)
    assert torch.equal(plan.executed_pairs(), plan.dense_pairs())


def test_the_scratch_bound_changes_nothing(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw.normal(2, 2, 50, 32), draw.normal(2, 2, 133, 32), draw.normal(2, 2, 133, 32)
    plan = draw.plan(2, 2, 50, 133, 16, 32)
    at_once, _ = engines.attend(q, k, v, plan=plan, engine="sdpa")
    monkeypatch.setattr("fastar.engines.sdpa._SCRATCH_BYTES", {"cpu": 1})
    one_by_one, _ = engines.attend(q, k, v, plan=plan, engine="sdpa")
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-6, atol=1e-6)


def test_a_host_bound_on_the_blocks_changes_nothing(draw: Draw) -> None:
    q, k, v = draw.normal(2, 2, 50, 32), draw.normal(2, 2, 133, 32), draw.normal(2, 2, 133, 32)
    plan = draw.plan(2, 2, 50, 133, 16, 32)
    counted, _ = engines.attend(q, k, v, plan=plan, engine="sdpa")
    bounded, _ = engines.attend(q, k, v, plan=dataclasses.replace(plan, max_blocks=5), engine="sdpa")
    torch.testing.assert_close(bounded, counted, rtol=1e-6, atol=1e-6)


def test_unknown_engine_lists_the_choices() -> None:
    with pytest.raises(
        ValueError, match="choose one of auto, augmented, cudnn, fa4, flashinfer, flex, reference, sdpa"
    ):
        engines.resolve("fa9", "cpu")


def test_unfit_engine_names_the_reason(draw: Draw) -> None:
    q = draw.normal(1, 1, 4, 16)
    with pytest.raises(ValueError, match="'sdpa' cannot run here: it runs on cpu, cuda, not on meta"):
        engines.resolve("sdpa", "meta")
    with pytest.raises(ValueError, match="'sdpa' cannot execute this call: it returns no log-sum-exp on cpu"):
        engines.attend(q, q, q, engine="sdpa", return_lse=True)
    with pytest.raises(ValueError, match=r"'sdpa' cannot execute this call: it does not take torch\.float64"):
        engines.attend(q.double(), q.double(), q.double(), engine="sdpa")
    with pytest.raises(ValueError, match="'flex' cannot execute this call: it has no backward pass on cpu"):
        engines.attend(q.requires_grad_(), q, q, engine="flex")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 4, 16)}, r"\[batch, heads, tokens, head dim\]"),
        ({"k": (1, 2, 9, 8)}, "must agree in batch, heads, keys and head dim"),
        ({"v": (1, 2, 8, 16)}, "must agree in batch, heads, keys and head dim"),
        ({"log_count": (1, 2, 8)}, "does not broadcast"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    draw: Draw, change: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"q": (1, 2, 4, 16), "k": (1, 2, 9, 16), "v": (1, 2, 9, 16)} | change
    tensors = {name: draw.normal(*shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        engines.attend(tensors.pop("q"), tensors.pop("k"), tensors.pop("v"), **tensors)


def test_dtypes_that_differ_are_refused(draw: Draw) -> None:
    q = draw.normal(1, 1, 4, 16)
    with pytest.raises(ValueError, match="one dtype"):
        engines.attend(q, q.bfloat16(), q)


def test_a_plan_for_other_lengths_is_refused(draw: Draw) -> None:
    q = draw.normal(1, 2, 4, 16)
    plan: BlockPlan = draw.plan(1, 2, 4, 5, 2, 2)
    with pytest.raises(ValueError, match="a plan for 4 queries, 5 keys does not fit"):
        engines.attend(q, q, q, plan=plan)


@pytest.mark.parametrize("planned", ["no plan", "plan", "tags"])
@pytest.mark.parametrize("engine", ["reference", "sdpa", "augmented"])
def test_keys_that_carry_their_log_counts(
    draw: Draw, engine: str, planned: str, device: torch.device
) -> None:
    """head_dim= says that they do: the same output without a log_count, at the engine's own width."""
    draw = dataclasses.replace(draw, device=device)
    q, k, v = draw.normal(2, 3, 50, 32), draw.normal(2, 3, 133, 32), draw.normal(2, 3, 133, 32)
    plan = None if planned == "no plan" else draw.plan(2, 3, 50, 133, 16, 32, tags=planned == "tags")
    log_count = draw.log_count(2, 3, 133)
    log_count[0, 0] = 0.0
    expected, _ = engines.attend(q, k, v, log_count=log_count, plan=plan, engine="reference")
    width = engines.key_width(engine, 32)
    q, k = augment_queries(q, width), augment_keys(k, log_count, width)
    out, _ = engines.attend(q, k, v, head_dim=32, plan=plan, engine=engine)
    assert relative_error(out, expected) < 5e-6


@pytest.mark.parametrize("engine", ["reference", "sdpa"])
@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
def test_keys_behind_a_length_are_not_attended_to(draw: Draw, engine: str, biased: bool) -> None:
    q, k, v = draw.normal(1, 3, 20, 32), draw.normal(1, 3, 60, 32), draw.normal(1, 3, 60, 32)
    log_count = draw.log_count(1, 3, 60) if biased else None
    lengths = torch.tensor([[60, 17, 0]], dtype=torch.int32)
    for head, length in enumerate(lengths[0].tolist()):
        # the definition does not look at them at all; log-counts of -inf need finite ones
        k[:, head, length:] = v[:, head, length:] = torch.nan if engine == "reference" else 1e4
    out, _ = engines.attend(q, k, v, log_count=log_count, lengths=lengths, engine=engine)
    for head, length in enumerate(lengths[0].tolist()):
        part = (q[:, [head]], k[:, [head], :length], v[:, [head], :length])
        count = None if log_count is None else log_count[:, [head], :length]
        alone, _ = engines.attend(*part, log_count=count, engine="reference")
        torch.testing.assert_close(out[:, [head]], alone, rtol=1e-5, atol=1e-6)


def test_the_width_of_log_counted_keys_is_the_engines_own() -> None:
    widths = {name: engines.key_width(name, 128) for name in engines.names()}
    narrow = dict.fromkeys(("augmented", "flex", "reference", "sdpa"), 136)
    assert widths == narrow | {"fa4": 144, "flashinfer": 192, "cudnn": 192}


def test_head_dim_must_fit_the_call(draw: Draw) -> None:
    q = draw.normal(1, 2, 4, 16)
    with pytest.raises(ValueError, match="pass one of head_dim and log_count"):
        engines.attend(q, q, q, head_dim=14, log_count=torch.zeros(4))
    with pytest.raises(ValueError, match="heads of 16 numbers cannot hold head_dim=15"):
        engines.attend(q, q, q, head_dim=15)
    with pytest.raises(ValueError, match=r"lengths \(2,\) must be \[batch, heads\]"):
        engines.attend(q, q, q, lengths=torch.ones(2))


@pytest.mark.parametrize("engine", ["reference", "sdpa"])
@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_tokens_that_already_are_in_plan_order(draw: Draw, engine: str, given: tuple[bool, bool]) -> None:
    """A plan without an order means the identity, whatever the other order is."""
    q, k, v = draw.normal(2, 2, 50, 32), draw.normal(2, 2, 133, 32), draw.normal(2, 2, 133, 32)
    plan = draw.plan(2, 2, 50, 133, 16, 32)
    orders = [
        order if has else None for order, has in zip((plan.query_order, plan.key_order), given, strict=True)
    ]
    bare = dataclasses.replace(plan, query_order=orders[0], key_order=orders[1], lengths=(50, 133))
    places = [bare.query_index, bare.key_index]
    named = dataclasses.replace(plan, query_order=places[0], key_order=places[1])
    log_count = draw.log_count(2, 2, 133)
    expected, _ = engines.attend(q, k, v, plan=named, log_count=log_count, engine="reference")
    out, _ = engines.attend(q, k, v, plan=bare, log_count=log_count, engine=engine)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
