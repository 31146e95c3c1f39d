"""A stage through Lightning: limits, exports, interruption, and what bad settings say; then the command itself."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import load_backbone, save_backbone
from fastar.backbones.checkpoint import read_config
from fastar.training.callbacks import warming_average
from fastar.training.module import SYNC_EVERY, TimedModule
from fastar.training.run import CHECKPOINT
from fastar.training.stages import export
from fastar.training.stages import train as command
from tests.training.small import MovingBars, autoencoder_model, fresh_backbone, train, world_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on loaders and loggers


def weights(module: TimedModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Diary:
    """Weights, step and learning rate at every step of a module, read where the loss is computed."""

    def __init__(self, module: TimedModule) -> None:
        self.module, self.compute = module, module.compute_loss
        self.weights: list[dict[str, Tensor]] = []
        self.steps: list[int] = []
        self.rates: list[float] = []
        module.compute_loss = self  # type: ignore[assignment]

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.weights.append(weights(self.module))
        self.steps.append(self.module.steps_done)
        optimizers = self.module.trainer.optimizers
        (rate,) = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
        self.rates.append(rate)  # one for all
        return self.compute(batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """The EMA copies the module; its copy computes no loss."""


def test_a_stage_ends_with_its_average_in_hand_and_exported(tmp_path: Path) -> None:
    backbone = fresh_backbone()
    module = world_model(backbone, max_steps=12)
    diary = Diary(module)
    train(module, backbone, tmp_path)
    assert diary.steps == list(range(12)) and module.steps_done == 12
    assert diary.rates[:5] == pytest.approx([3e-3 * n / 5 for n in range(1, 6)]), "warm-up"
    assert not (tmp_path / "transformer" / CHECKPOINT).exists()
    exported = load_backbone(tmp_path / "transformer_ema")
    assert same(dict(exported.transformer.named_parameters()), dict(backbone.transformer.named_parameters()))

    # the average by hand: the first step's weights, then a decay that grows with the number of updates
    name = "transformer.blocks.0.ffn.0.weight"
    history = [step[name] for step in diary.weights[1:]]
    average = history[0]
    for updates, value in enumerate(history[1:], start=1):
        kept = min(0.9, (1 + updates) / (10 + updates))
        average = kept * average + (1 - kept) * value
    gap = (module.get_parameter(name) - average).abs().max()  # the last step alone is not in the diary
    assert 0 < gap < 0.15 * (history[-1] - history[0]).abs().max()


def test_the_average_of_a_short_run_forgets_its_start() -> None:
    average = warming_average(0.999)
    value, updates = torch.zeros(3), torch.tensor(1)
    for _ in range(600):
        value, updates = average(value, torch.ones(3), updates), updates + 1
    assert value.min() > 0.99  # a fixed decay would have 0.45 here
    late = average(torch.zeros(1), torch.ones(1), torch.tensor(10**6))
    assert late.item() == pytest.approx(0.001, rel=1e-3)


def test_an_interrupted_stage_goes_on_where_its_checkpoint_stands(tmp_path: Path) -> None:
    steps = 3 * SYNC_EVERY
    backbone = fresh_backbone()
    first = world_model(backbone, max_steps=steps, decay_share=1.0)
    before = Diary(first)
    with pytest.raises(ConnectionError, match="power"):
        train(first, backbone, tmp_path, clips=MovingBars(fails_at=2 * 26), export_every_minutes=1e-9)
    assert len(before.steps) == 25
    assert (tmp_path / "transformer" / CHECKPOINT).exists()
    load_backbone(tmp_path / "transformer_ema")  # what was exported on the way is usable

    resumed_backbone = fresh_backbone()
    second = world_model(resumed_backbone, max_steps=steps, decay_share=1.0)
    after = Diary(second)
    train(second, resumed_backbone, tmp_path)
    assert after.steps == list(range(2 * SYNC_EVERY, steps)) and second.steps_done == steps
    assert same(after.weights[0], before.weights[2 * SYNC_EVERY])
    assert after.rates == before.rates[20:21] * SYNC_EVERY, "the rate goes on falling from where it was"
    moved = (
        after.weights[1]["transformer.head.head.weight"] - after.weights[0]["transformer.head.head.weight"]
    ).abs()
    usual = (
        before.weights[21]["transformer.head.head.weight"]
        - before.weights[20]["transformer.head.head.weight"]
    )
    assert moved.mean() < 1.5 * usual.abs().mean(), "AdamW's moments came along: a fresh one would jump"
    assert not (tmp_path / "transformer" / CHECKPOINT).exists()


def test_the_rate_of_a_run_resumed_between_readings_of_the_clock_is_that_of_its_share(tmp_path: Path) -> None:
    module = world_model(fresh_backbone())
    module.steps_done, module.share_done = 27, 0.9
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    resumed = world_model(fresh_backbone())
    resumed.on_load_checkpoint(checkpoint)
    assert (resumed.steps_done, resumed.share_done) == (27, 0.9)


def test_a_stage_limited_by_time_stops_and_ends_with_a_low_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("fastar.training.optim.time.monotonic", lambda: now)
    backbone = fresh_backbone()
    module = autoencoder_model(backbone, max_steps=10_000, max_minutes=1.0, warmup_steps=0)
    diary = Diary(module)

    def tick(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal now
        now += 2.0
        return diary(batch)

    module.compute_loss = tick  # type: ignore[assignment]
    train(module, backbone, tmp_path, name="autoencoder")
    assert len(diary.steps) == 31, "30 steps of two seconds, and the one that reads the clock"
    assert diary.rates[0] == 3e-3 and 0 < diary.rates[25] < 3e-3 and diary.rates[-1] == 0.0


# -- the command -----------------------------------------------------------------------------------------------------


def test_unknown_values_name_the_choices(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    quick = ["backbone=tiny", "data=doom_tiny", "training=tiny", f"output={tmp_path}"]
    with pytest.raises(
        ValueError, match="unknown training stage 'decoder': choose from autoencoder, transformer"
    ):
        command(composed("train", *quick, "training.stages=[decoder]"))
    with pytest.raises(FileNotFoundError, match=r"No checkpoint in nowhere: config\.json is missing"):
        command(composed("train", *quick, "training.init_from=nowhere"))
    assert not list(tmp_path.iterdir())


def test_weights_of_other_sizes_are_refused(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    save_backbone(tmp_path / "other", fresh_backbone())
    config = composed("train", "backbone=tiny", "training=tiny", f"output={tmp_path / 'run'}")
    config.training.init_from = str(tmp_path / "other")
    with pytest.raises(ValueError, match="has other sizes than backbone=tiny"):
        command(config)


def test_an_export_tells_which_weights_it_started_from(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    sha256 = save_backbone(tmp_path / "start", fresh_backbone())
    config = composed("train", "backbone=tiny", "training=tiny", f"training.init_from={tmp_path / 'start'}")
    export(config, fresh_backbone(), tmp_path / "end")
    assert read_config(tmp_path / "end")["training"]["training"]["init_from"] == f"sha256 {sha256}"
    assert config.training.init_from == str(tmp_path / "start")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("vizdoom") is None, reason="needs the simulator (pip install -e '.[doom]')"
)
def test_the_tiny_backbone_trains_from_the_command_line(repository: Path, tmp_path: Path) -> None:
    steps = [f"training.{stage}.max_steps=4" for stage in ("autoencoder", "transformer")]
    subprocess.run(
        [sys.executable, "experiments/train.py", "backbone=tiny", "data=doom_tiny", "training=tiny", *steps,
         "training.autoencoder.statistics_clips=1", f"output={tmp_path}"],
        cwd=repository, check=True, capture_output=True, timeout=110,
    )  # fmt: skip
    backbone = load_backbone(tmp_path / "checkpoint")
    assert backbone.config.name == "tiny" and backbone.autoencoder is not None
    assert (backbone.autoencoder.latent_std != 1).all(), "the latents were measured"
    assert backbone.transformer.head.head.weight.abs().max() > 0, "the head starts at zero"
    record = read_config(tmp_path / "checkpoint")["training"]
    assert record["seed"] == 0 and record["data"]["name"] == "doom_tiny"
    assert record["training"]["transformer"]["max_steps"] == 4
