"""A comparison that is asked to stop saves, goes on later, and ends at the same bits; nothing is done twice."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from fastar.compare import comparison as comparison_module
from fastar.compare.comparison import Comparison
from fastar.compare.session import open_session
from fastar.compare.tasks import LATENTS
from fastar.interruption import Interrupted, listening
from fastar.results import load, load_runs
from fastar.results.lock import RunLock
from fastar.rollout.rollout import Rollout

Tiny = Callable[..., DictConfig]


def untimed(folder: Path) -> pd.DataFrame:
    rows = load(folder).drop(columns=["time", "experiment"])
    timed = rows["metric"].str.contains("_s$|fps|latency|peak|speedup")
    keys = ["run_id", "metric", "chunk", "frame", "clip"]
    return rows[~timed].sort_values(keys).reset_index(drop=True)


def run_with_stops(
    config: DictConfig, every: int, sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Run a comparison whose process is asked to stop in the middle of every so many chunks; how often it was."""
    stops = made = 0
    denoise = Rollout.denoise

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        if not made % every:
            os.kill(os.getpid(), sent)
        return denoise(*arguments, **options)

    monkeypatch.setattr(Rollout, "denoise", count)
    while True:
        work = Comparison(config, open_session(config))
        done = sum(status == "done" for status in states(config))
        try:
            with listening():
                work.run()
            return stops
        except Interrupted:
            stops += 1
            assert stops < 40 and sum(status == "done" for status in states(config)) >= done
            assert not list(Path(config.paths.outputs).glob("*/*/lock"))


def states(config: DictConfig) -> list[str]:
    folder = Path(config.paths.outputs) / config.name
    return list(load_runs(folder)["status"]) if list(folder.glob("*/summary.json")) else []


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_stopped_by_signals_and_resumed_bit_by_bit(
    tiny: Tiny,
    tmp_path: Path,
    protocol: str,
    sent: signal.Signals,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = (
        "method=[dense,tempcache,tempcache_paper,random,annsa,int4_window_headwise]", "seeds=[3]", "save_every=100",
        f"protocols=[{protocol}]", "frames=20", f"device={device}", "videos=0",
    )  # fmt: skip
    whole = tiny(*arguments, "name=whole")
    Comparison(whole, open_session(whole)).run()
    stops = run_with_stops(tiny(*arguments, "name=parts"), 7, sent, monkeypatch)
    assert stops >= 3
    pd.testing.assert_frame_equal(untimed(tmp_path / "parts"), untimed(tmp_path / "whole"), check_exact=True)
    [one], [other] = (list((tmp_path / name).glob(f"*/{LATENTS}")) for name in ("whole", "parts"))
    assert torch.equal(load_file(one)["latents"], load_file(other)["latents"])


@pytest.mark.parametrize("protocol", ["A", "C"])
def test_chunks_in_flight_are_resumed_bit_by_bit(
    tiny: Tiny, tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense, which is held against its own trajectory in protocol A, reproduces it."""
    arguments = (
        "rollout=rolling_forcing", "method=[dense,annsa]", f"protocols=[{protocol}]", "seeds=[3]", "frames=12",
        "save_every=100", "rollout.timesteps.steps=[1000,600,200]", "attention_chunks=0", "videos=0",
    )  # fmt: skip
    whole = tiny(*arguments, "name=whole")
    Comparison(whole, open_session(whole)).run()
    assert run_with_stops(tiny(*arguments, "name=parts"), 5, signal.SIGTERM, monkeypatch) >= 1
    pd.testing.assert_frame_equal(untimed(tmp_path / "parts"), untimed(tmp_path / "whole"), check_exact=True)
    rows = load(tmp_path / "whole")
    errors = rows[(rows["metric"] == "latent_error") & (rows["protocol"] == protocol)].set_index("method")[
        "value"
    ]
    assert len(errors["annsa"]) == 3 and errors["annsa"].max() > 0
    assert protocol == "C" or (errors["dense"] == 0).all()


def test_a_run_of_another_process_is_waited_for_and_taken_from_the_store(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense trajectory is being made elsewhere: nothing fails, everything else waits, its result is used."""
    config = tiny("method=[dense,window]", "protocols=[B]", "frames=8")
    work = Comparison(config, open_session(config))
    elsewhere = tiny("method=[dense]", "protocols=[C]", "frames=8")
    other = Comparison(elsewhere, open_session(elsewhere))
    [reference] = [run["run_id"] for run in other.planned()]
    folder = tmp_path / "compare" / reference
    folder.mkdir(parents=True)
    lock = RunLock(folder)
    lock.acquire()
    said: list[str] = []
    work.say = said.append
    looks = 0

    def meanwhile(seconds: float) -> None:
        nonlocal looks
        looks += 1
        assert not (tmp_path / "compare" / reference / "summary.json").exists()
        if looks == 2:
            lock.release()
            other.run()

    monkeypatch.setattr(comparison_module, "WAIT_SECONDS", 1)
    monkeypatch.setattr(
        comparison_module.time, "sleep", lambda seconds: meanwhile(seconds) if looks < 2 else None
    )
    work.run()
    assert (
        looks == 2
        and len(said) == 1
        and said[0].startswith("waiting for runs that other processes work on: dense")
    )
    runs = load_runs(tmp_path)
    assert len(runs) == 3 and (runs["status"] == "done").all()


def test_force_does_everything_once_more_and_only_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("method=[dense,window]", "protocols=[B]", "frames=8")
    monkeypatch.setenv("FASTAR_LAUNCH", "first")

    def made(*more: str) -> int:
        config = tiny(*arguments, *more)
        chunks: list[int] = []
        session = open_session(config)
        codec = session.eyes()
        decode = codec.decode
        monkeypatch.setattr(codec, "decode", lambda latents: (chunks.append(1), decode(latents))[1])
        Comparison(config, session).run()
        return len(chunks)

    first = made()
    before = set(tmp_path.rglob("metrics.parquet"))
    assert made() == 0
    assert made("force=true") == 0, "this launch has made them itself: a requeued job does not start over"
    monkeypatch.setenv("FASTAR_LAUNCH", "second")
    assert made("force=true") == first
    assert made("force=true") == 0
    assert set(tmp_path.rglob("metrics.parquet")) == before
    assert (load_runs(tmp_path)["status"] == "done").all()
