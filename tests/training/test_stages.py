"""Signals, kills and wrong settings at every point of the whole training: the same command ends with the same files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from fastar.interruption import Interrupted, listening
from fastar.results.lock import RunLock
from fastar.training import stages
from fastar.training.autoencoder import AutoencoderModule
from fastar.training.run import CHECKPOINT, METRICS
from fastar.training.world_model import WorldModelModule
from tests.training.small import moving_bars

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice on loaders
]


Compose = Callable[..., DictConfig]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def files(output: Path) -> dict[str, bytes]:
    """The result of a training, and its metrics."""
    names = ["checkpoint/model.safetensors", "checkpoint_float32/model.safetensors", f"transformer/{METRICS}"]
    return {name: (output / name).read_bytes() for name in names}


def trained(config: DictConfig) -> None:
    """A training that is to reach its end."""
    with listening():
        stages.train(config)


@pytest.fixture(scope="module")
def whole(on_cpu: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted training ends with."""
    output = tmp_path_factory.mktemp("whole")
    conf = str(Path(__file__).resolve().parents[2] / "conf")
    with initialize_config_dir(config_dir=conf, version_base=None):
        config = compose("train", overrides=moving_bars(output))
    trained(config)
    return files(output)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[DictConfig, Any, str, int], None]:
    """`stopping(config, owner, name, call)`: train until a signal comes in that call of the function `owner.name`."""

    def run(config: DictConfig, owner: Any, name: str, call: int) -> None:
        function, calls = getattr(owner, name), []

        def signalled(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGUSR1)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, signalled)
        with pytest.raises(Interrupted), listening():
            stages.train(config)
        monkeypatch.setattr(owner, name, function)
        assert len(calls) == call, "it stopped there"

    return run


def test_a_training_stopped_at_every_point_ends_with_the_same_files(
    composed: Compose, whole: dict[str, bytes], tmp_path: Path, stopping: Callable[..., None]
) -> None:
    config = composed("train", *moving_bars(tmp_path))
    first, second = (tmp_path / stage / CHECKPOINT for stage in stages.STAGES)
    stopping(config, stages, "to_model_range", 1)  # while the first clips are prepared
    assert not first.exists()
    stopping(config, AutoencoderModule, "compute_loss", 3)
    assert first.exists()
    stopping(config, AutoencoderModule, "compute_loss", 2)
    stopping(config, stages, "measure_latents", 1)
    assert (tmp_path / stages.AUTOENCODER / "config.json").exists() and not first.exists()
    stopping(config, stages, "fit", 1)  # before the first step of stage 2
    assert not second.exists()
    stopping(config, WorldModelModule, "compute_loss", 26)
    assert second.exists() and not (tmp_path / stages.RESULT).exists()
    trained(config)
    assert files(tmp_path) == whole
    assert not second.exists() and not (tmp_path / "lock").exists()


def test_a_signal_after_the_last_step_lets_the_training_end(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = stages.export

    def signalled(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        export(*args)

    monkeypatch.setattr(stages, "export", signalled)
    trained(composed("train", *moving_bars(tmp_path, "training.stages=[transformer]")))
    assert (tmp_path / stages.RESULT / "config.json").exists()


def killed_in_its_second_save(config: DictConfig) -> None:
    """A training that dies when half of a checkpoint is written."""
    save, saved = lightning.Trainer.save_checkpoint, []

    def half(trainer: lightning.Trainer, path: Path, **options: Any) -> None:
        saved.append(path)
        save(trainer, path, **options)
        if len(saved) == 2:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    lightning.Trainer.save_checkpoint = half  # type: ignore[method-assign]
    trained(config)


def test_a_training_killed_in_mid_save_goes_on_from_the_save_before(
    composed: Compose, whole: dict[str, bytes], tmp_path: Path
) -> None:
    often = composed("train", *moving_bars(tmp_path, "training.export_every_minutes=1e-9"))
    process = get_context("fork").Process(target=killed_in_its_second_save, args=(often,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    folder = tmp_path / "transformer"
    assert (folder / f"{CHECKPOINT}.part").exists() and (tmp_path / "lock").exists()
    checkpoint = torch.load(folder / CHECKPOINT, weights_only=False)
    assert checkpoint["progress"]["steps"] == 10
    config = composed("train", *moving_bars(tmp_path))
    trained(config)
    assert files(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_command_goes_on(
    composed: Compose, whole: dict[str, bytes], repository: Path, tmp_path: Path
) -> None:
    environment = {
        **os.environ, **NO_GPU, "PYTHONPATH": f"{repository / 'src'}:{repository}", "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    # clip 24 is made in step 11 of the second stage
    overrides = moving_bars(tmp_path, "+data.train.signals={24:SIGTERM}")
    stopped = subprocess.run(
        [sys.executable, "experiments/train.py", *overrides],
        cwd=repository, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "SIGTERM: stopping at the next safe point" in stopped.stderr
    log = (tmp_path / "train.log").read_text()
    assert "stopped by SIGTERM: the same command goes on where this one stopped" in log
    assert "not a Slurm job: start the same command again" in log
    assert (tmp_path / "transformer" / CHECKPOINT).exists()
    trained(composed("train", *moving_bars(tmp_path)))
    assert files(tmp_path) == whole


def test_two_trainings_cannot_share_a_folder(composed: Compose, tmp_path: Path) -> None:
    other = RunLock(tmp_path)
    other.acquire()
    with pytest.raises(ValueError, match=r"is being worked on by process .* wait for it, or remove .*lock"):
        stages.train(composed("train", *moving_bars(tmp_path)))
    other.release()


def test_force_begins_from_nothing_but_a_requeued_job_goes_on(
    composed: Compose, whole: dict[str, bytes], tmp_path: Path, stopping: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = composed("train", *moving_bars(tmp_path))
    stopping(config, WorldModelModule, "compute_loss", 5)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    forced = composed("train", *moving_bars(tmp_path, "force=true", "seed=1"))
    stopping(forced, AutoencoderModule, "compute_loss", 3)
    assert not (tmp_path / "transformer").exists() and not (tmp_path / stages.AUTOENCODER).exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    stopping(forced, AutoencoderModule, "compute_loss", 3)
    checkpoint = torch.load(tmp_path / "autoencoder" / CHECKPOINT, weights_only=False)
    assert checkpoint["progress"]["steps"] == 6, "it went on"
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    trained(composed("train", *moving_bars(tmp_path, "force=true")))
    assert files(tmp_path) == whole


def test_a_checkpoint_that_does_not_fit_says_so(
    composed: Compose, tmp_path: Path, stopping: Callable[..., None]
) -> None:
    stopping(composed("train", *moving_bars(tmp_path)), AutoencoderModule, "compute_loss", 3)
    with pytest.raises(
        ValueError, match=r"has a backbone of other sizes: choose another output=\.\.\., or say force"
    ):
        trained(composed("train", *moving_bars(tmp_path, "backbone.autoencoder.encoder_widths=[16,16,16]")))
    with pytest.raises(ValueError, match=r"has done 3 steps, max_steps is 2: choose another output"):
        trained(composed("train", *moving_bars(tmp_path, "training.autoencoder.max_steps=2")))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_of_two_processes_both_stop_when_one_is_signalled(repository: Path, tmp_path: Path) -> None:
    held = RunLock(tmp_path / "held")
    held.path.parent.mkdir()
    held.acquire()
    processes = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in "01":
        environment = {
            **os.environ,
            **NO_GPU,
            "PYTHONPATH": f"{repository / 'src'}:{repository}",
            "OMP_NUM_THREADS": "1",
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2"),  # from here on what torchrun sets
            **dict.fromkeys(("RANK", "LOCAL_RANK"), rank),
            **{
                "GROUP_RANK": "0",
                "TORCHELASTIC_RUN_ID": "test",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        }
        command = [sys.executable, "-m", "tests.training.two_processes", str(tmp_path)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, cwd=repository, **pipes))
    texts = [process.communicate(timeout=280)[0] for process in processes]
    held.release()
    ends = [[line[5:] for line in text.splitlines() if line.startswith("end: ")] for text in texts]
    assert ends[0] == ["done", ends[0][1], "SIGTERM", "SIGTERM", "done"], texts[0][-3000:]
    assert ends[1] == ["done", ends[0][1], "exit 0", "exit 0", "done"], "only the first one fails"
    assert f"held is being worked on by process {os.getpid()}" in ends[0][1]
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
