"""A stage that signals interrupt: it goes on where it was, and ends with the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from fastar.interruption import Interrupted, listening
from fastar.training.clips import ClipBatches, make_loader
from fastar.training.run import CHECKPOINT, METRICS
from tests.training.small import (
    MovingBars,
    autoencoder_model,
    fresh_backbone,
    train,
    world_model,
)
from tests.training.test_run import Diary, same

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice on loaders
]


STEPS = 56  # two rows of metrics


def fitted(
    folder: Path, name: str, interruptions: Sequence[dict[int, str]]
) -> tuple[Diary, dict[str, Tensor]]:
    """A stage that each of `interruptions` stops once; the diary of its last part, and the weights it ends with."""
    for signals in [*interruptions, {}]:
        backbone = fresh_backbone()
        if name == "transformer":
            module: Any = world_model(backbone, max_steps=STEPS, self_history_from=0.3, decay_share=1.0)
        else:
            module = autoencoder_model(backbone, max_steps=STEPS, decay_share=1.0)
        diary, stopped = Diary(module), False
        torch.rand(len(folder.name))  # what was drawn before does not matter
        try:
            with listening():
                train(module, backbone, folder, name=name, clips=MovingBars(signals=signals))
        except Interrupted as interrupted:
            stopped = True
            assert interrupted.received.name in signals.values()
            assert 0 < len(diary.steps) < STEPS
        assert stopped == bool(signals)
    return diary, dict(module.named_parameters())


@pytest.mark.parametrize("name", ["autoencoder", "transformer"])
def test_an_interrupted_stage_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    whole, expected = fitted(tmp_path / "whole", name, [])
    # in the first step, in mid-stage, when a row of metrics is due, one step later
    interruptions = [{2: "SIGTERM"}, {20: "SIGUSR1"}, {2 * 25: "SIGUSR2"}, {2 * 26: "SIGTERM"}]
    last, found = fitted(tmp_path / "interrupted", name, interruptions)
    assert same(found, expected), "EMA weights"
    assert same(last.weights[-1], whole.weights[-1]), "weights before the last step"
    assert last.steps == whole.steps[last.steps[0] :] and last.steps[0] == 26
    metrics = (tmp_path / "whole" / name / METRICS).read_text()
    assert (tmp_path / "interrupted" / name / METRICS).read_text() == metrics
    assert [line.split(",")[0] for line in metrics.splitlines()] == ["step", "25", "50"]


def test_a_signal_before_the_first_step_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    backbone = fresh_backbone()
    clips = MovingBars()
    with pytest.raises(Interrupted), listening():
        os.kill(os.getpid(), signal.SIGTERM)
        train(world_model(backbone), backbone, tmp_path, clips=clips)
    assert not (tmp_path / "transformer" / CHECKPOINT).exists()


def test_a_signal_in_mid_save_waits_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = fitted(tmp_path / "whole", "autoencoder", [])
    save, saved = lightning.Trainer.save_checkpoint, []

    def interrupted_save(trainer: lightning.Trainer, path: Path, **options: Any) -> None:
        saved.append(trainer.global_step)
        if len(saved) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        save(trainer, path, **options)

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", interrupted_save)
    backbone, folder = fresh_backbone(), tmp_path / "interrupted"
    module = autoencoder_model(backbone, max_steps=STEPS, decay_share=1.0)
    with pytest.raises(Interrupted), listening():
        train(module, backbone, folder, name="autoencoder", export_every_minutes=1e-9)
    assert saved == [10, 11], "the clock's checkpoint, and the one that the signal asked for"
    _, found = fitted(folder, "autoencoder", [])
    assert same(found, expected)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path, damage: str) -> None:
    checkpoint = tmp_path / "transformer" / CHECKPOINT
    checkpoint.parent.mkdir()
    torch.save({"weights": torch.ones(1000)}, checkpoint)
    if damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:3000])
    elif damage == "empty":
        checkpoint.write_bytes(b"")
    backbone = fresh_backbone()
    with pytest.raises(
        ValueError, match=r"the checkpoint .*last.ckpt is damaged \(.*\): remove it to train this"
    ):
        train(world_model(backbone), backbone, tmp_path)


def test_clips_come_in_one_order_whatever_the_workers_and_where_they_start() -> None:
    def numbers(count: int, workers: int = 0, **options: int) -> list[list[int]]:
        loader = make_loader(ClipBatches(MovingBars(), batch_clips=3, **options), num_workers=workers)
        return [batch["index"].tolist() for batch, _ in zip(loader, range(count), strict=False)]

    assert numbers(4) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert numbers(4, workers=2) == numbers(4) and numbers(2, first_clip=6) == numbers(4)[2:]
    ranks = [numbers(2, rank=rank, ranks=2, workers=rank) for rank in range(2)]
    assert ranks == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]
