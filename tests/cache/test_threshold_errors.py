"""Thresholds by layer from an error target: what is chosen of a table, and that each layer merges by its own."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastar import cache
from fastar.cache import TempCachePaper, ThresholdErrors

from .worlds import FLOAT, LAYERS, bound, scene_chunks, views_equal

SETTINGS = TempCachePaper(**FLOAT).settings()
# Layer 0 merges at hardly any cost, layer 1 hardly merges and errs.
MEASURED = ((0.08, 0.04, 0.01), (0.60, 0.40, 0.20))
SLOTS = ((0.10, 0.30, 0.60), (0.70, 0.80, 0.90))
ERRORS = ThresholdErrors(
    (0.5, 0.7, 0.9),
    {
        "measured": MEASURED,
        "first_order": tuple(tuple(2 * error for error in curve) for curve in MEASURED),
        "bound": ((3.0, 2.0, 1.0), (3.0, 3.0, 3.0)),
    },
    SLOTS,
    SETTINGS,
    "abc",
)


@pytest.mark.parametrize(
    ("target", "chosen"),
    [(0.0, [math.inf, math.inf]), (0.05, [0.7, math.inf]), (0.2, [0.5, 0.9]), (9.0, [0.5, 0.5])],
)
def test_every_layer_merges_as_much_as_keeps_it_to_the_target(target: float, chosen: list[float]) -> None:
    assert ERRORS.choose(target) == chosen


def test_fewer_slots_count_not_the_lower_threshold() -> None:
    odd = replace(ERRORS, slots=((0.4, 0.3, 0.6), SLOTS[1]))
    assert odd.choose(0.1)[0] == 0.7


def test_the_mean_spends_errors_where_they_save_most_slots() -> None:
    """What one threshold for all layers costs on average buys fewer slots."""
    for number, threshold in enumerate(ERRORS.thresholds):
        target = sum(curve[number] for curve in MEASURED) / 2
        chosen = ERRORS.choose(target, rule="mean")
        errors, slots = zip(*(option(layer, chosen[layer]) for layer in range(2)), strict=True)
        assert sum(errors) / 2 <= target + 1e-9
        assert sum(slots) <= sum(curve[number] for curve in SLOTS) + 1e-9
        assert chosen != [threshold, threshold] or threshold == 0.5  # most merging: nothing is better
    assert ERRORS.choose(0.04, rule="mean") == [0.5, math.inf]


def option(layer: int, threshold: float) -> tuple[float, float]:
    """Error and slots of a layer at a threshold."""
    if threshold == math.inf:
        return 0.0, 1.0
    number = ERRORS.thresholds.index(threshold)
    return MEASURED[layer][number], SLOTS[layer][number]


def test_a_target_may_be_set_for_the_estimate_or_the_bound() -> None:
    assert ERRORS.choose(0.2, kind="first_order") == [0.5, math.inf]
    assert ERRORS.choose(0.2, kind="bound") == [math.inf, math.inf]
    with pytest.raises(ValueError, match="unknown error_kind 'guess'"):
        ERRORS.choose(0.2, kind="guess")  # type: ignore[arg-type]


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    ERRORS.save(tmp_path / "errors.json", made="today")
    assert ThresholdErrors.load(tmp_path / "errors.json") == ERRORS
    (tmp_path / "errors.json").write_text('{"thresholds": [0.5]}')
    with pytest.raises(ValueError, match="is damaged"):
        ThresholdErrors.load(tmp_path / "errors.json")
    with pytest.raises(ValueError, match=r"measure it with `python experiments/calibrate_thresholds\.py"):
        ThresholdErrors.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"thresholds": (0.5, 0.9, 0.7)}, "ascending"),
        ({"errors": {"measured": MEASURED}}, "of the kinds measured, first_order, bound"),
        ({"slots": SLOTS[:1]}, "every layer needs 3 numbers"),
        ({"slots": ((0.1, 0.3, math.nan), SLOTS[1])}, "finite"),
    ],
)
def test_wrong_tables_are_refused(wrong: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        replace(ERRORS, **wrong)


def filled(**options: object) -> TempCachePaper:
    """A cache of two layers after a scene that returns."""
    policy = bound(TempCachePaper(**FLOAT, **options))  # type: ignore[arg-type]
    for number, chunk in enumerate(scene_chunks(6, places=2, noise=0.3)):
        for layer in range(LAYERS):
            policy.stage(layer, chunk)
        policy.commit(2 * number, 2)
    return policy  # type: ignore[no-any-return]


def test_every_layer_merges_from_its_own_threshold_on() -> None:
    mixed = filled(error_target=0.05, threshold_errors=ERRORS)
    assert mixed.thresholds == [0.7, math.inf]
    for layer, alone in enumerate((filled(threshold=0.7), filled(threshold=2.0))):
        view, expected = mixed.view(layer), alone.view(layer)
        live = min(view.k.shape[2], expected.k.shape[2])  # layers are padded to the longest
        assert torch.isneginf(view.log_count[:, :, live:]).all()
        assert torch.equal(view.log_count[:, :, :live], expected.log_count[:, :, :live])
        used = expected.log_count[:, :, :live, None] > -math.inf
        assert torch.equal(view.k[:, :, :live] * used, expected.k[:, :, :live] * used)
    assert (mixed.view(0).log_count > 0).any() and not (mixed.view(1).log_count > 0).any()


def test_without_a_measurement_all_layers_share_one_threshold(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        policy = filled(error_target=0.05, threshold=0.6)
    assert "threshold_errors=null: all layers merge from 0.6 on" in caplog.text
    assert all(views_equal(policy.view(layer), filled(threshold=0.6).view(layer)) for layer in range(LAYERS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match_space": "roped"}, "measured with match_space=raw, but this cache has roped"),
        ({"slot_bits": 8}, "measured with slot_bits=16, but this cache has 8"),
    ],
)
def test_measurements_of_another_cache_are_refused(options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        bound(TempCachePaper(error_target=0.1, threshold_errors=ERRORS, **FLOAT, **options))
    with pytest.raises(ValueError, match="speak of 2 layers, but the backbone has 3"):
        bound(TempCachePaper(error_target=0.1, threshold_errors=ERRORS, **FLOAT), layers=3)
    with pytest.raises(ValueError, match="must not be negative"):
        cache.TempCachePaper(error_target=-0.1)
