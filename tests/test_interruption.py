"""Being asked to stop: signals in this process, and what is said to Slurm (a `scontrol` that notes what it is told)."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastar import interruption
from fastar.interruption import Interrupted, check, is_cancelled, listening, requested, requeue, slurm_job

SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)


class Scontrol:
    """A program `scontrol` on PATH: says `shown` when asked for a job, and refuses to requeue if `refusal` is set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        self.shows("JobState=RUNNING Reason=None")

    def shows(self, shown: str, refusal: str = "") -> None:
        refuse = f"echo '{refusal}' >&2; exit 1" if refusal else "exit 0"
        program = self.folder / "scontrol"
        program.write_text(
            f"#!/bin/sh\necho \"$@\" >> '{self.calls_file}'\n"
            f"if [ \"$2\" = show ]; then echo 'JobId=12 {shown} TimeLimit=00:10:00'; exit 0; fi\n{refuse}\n"
        )
        program.chmod(0o755)

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scontrol:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return Scontrol(tmp_path)


# -- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_signal_is_kept_until_the_work_asks(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with listening():
        check()
        assert not requested()
        os.kill(os.getpid(), number)
        assert requested()
        with pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught:
            check()
    assert caught.value.code == 128 + number and caught.value.received is number
    assert signal.getsignal(number) is before
    assert f"{number.name}: stopping at the next safe point" in capfd.readouterr().err


def test_an_earlier_signal_does_not_stop_later_work() -> None:
    with listening():
        os.kill(os.getpid(), signal.SIGUSR1)
    with listening():
        assert not requested()
        check()


def test_listening_inside_listening_is_one_and_the_same() -> None:
    with listening():
        with listening():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert requested(), "the inner block neither forgets the signal nor stops listening"
        os.kill(os.getpid(), signal.SIGTERM)  # would end pytest


def test_other_threads_leave_signals_alone() -> None:
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    during: list[object] = []

    def work() -> None:
        with listening():
            during.extend(signal.getsignal(number) for number in interruption.SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == before


def test_a_process_that_nobody_asks_ends_by_the_signals_exit_code() -> None:
    program = (
        "import os, signal\nfrom fastar.interruption import check, listening\n"
        "with listening():\n    os.kill(os.getpid(), signal.SIGUSR1)\n    check()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert done.returncode == 128 + signal.SIGUSR1
    assert b"Traceback" not in done.stderr


# -- back to the queue -------------------------------------------------------------------------------------------------


def test_without_slurm_nothing_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert requeue() == "not a Slurm job: start the same command again"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no scontrol here" in requeue()


def test_a_running_job_goes_back(scontrol: Scontrol) -> None:
    assert requeue() == "Slurm job 12 was put back into the queue"
    assert scontrol.calls() == ["-o show job 12", "requeue 12"]


def test_a_task_of_an_array_goes_back_alone(scontrol: Scontrol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_job() == "12_3"
    assert "12_3" in requeue()
    assert scontrol.calls() == ["-o show job 12_3", "requeue 12_3"]


def test_only_the_first_task_of_a_job_asks(scontrol: Scontrol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert requeue() == "left to the first task of this job"
    assert not scontrol.calls()


# What a real Slurm 22.05 said at each of these moments.
MOMENTS = {
    "signal before the end": ("JobState=RUNNING Reason=None", "back"),
    "grace time of a preemption": ("JobState=RUNNING Reason=None PreemptTime=2026-11-23T19:03:11", "back"),
    "after a preemption": ("JobState=PENDING Reason=None", "there already"),
    "time limit": ("JobState=COMPLETING Reason=TimeLimit", "back"),
    "time limit, batch script ended": ("JobState=TIMEOUT Reason=TimeLimit", "back"),
    "batch script died of the signal": ("JobState=FAILED Reason=JobLaunchFailure", "back"),
    "scancel": ("JobState=COMPLETING Reason=None", "stays"),
    "scancel, batch script ended": ("JobState=CANCELLED Reason=None", "stays"),
}


@pytest.mark.parametrize(("shown", "end"), MOMENTS.values(), ids=MOMENTS)
def test_a_cancelled_job_stays_away(shown: str, end: str, scontrol: Scontrol) -> None:
    scontrol.shows(shown)
    answer = requeue()
    assert is_cancelled(shown) == (end == "stays")
    assert ("requeue 12" in scontrol.calls()) == (end == "back")
    assert {"back": "was put back", "there already": "has put job 12 back", "stays": "cancelled"}[
        end
    ] in answer


def test_a_refusal_is_passed_on(scontrol: Scontrol) -> None:
    scontrol.shows("JobState=RUNNING Reason=None", refusal="Requested operation is presently disabled")
    assert requeue() == (
        "Slurm did not take job 12 back (Requested operation is presently disabled): submit it again"
    )


# -- submitit -------------------------------------------------------------------------------------------------------


class Submitit:
    """Stands where submitit's signal handler stands in its jobs."""

    def __init__(self) -> None:
        self.calls: list[signal.Signals] = []

    def checkpoint_and_try_requeue(self, number: signal.Signals, frame: object) -> None:
        self.calls.append(number)
        raise SystemExit(-1)


@pytest.fixture
def submitit() -> Iterator[Submitit]:
    stand_in = Submitit()
    before = signal.signal(signal.SIGUSR2, stand_in.checkpoint_and_try_requeue)
    yield stand_in
    signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("listens", [True, False])
def test_submitit_puts_its_jobs_back_itself(listens: bool, scontrol: Scontrol, submitit: Submitit) -> None:
    if listens:
        with listening(), pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGUSR1)
            requeue()
        assert submitit.calls == [signal.SIGUSR1]
    else:  # after the block, and without a signal
        with listening():
            pass
        with pytest.raises(SystemExit):
            requeue()
        assert submitit.calls == [signal.SIGUSR2]
    assert scontrol.calls() == ["-o show job 12"]


def test_submitit_does_not_bring_back_a_cancelled_job(scontrol: Scontrol, submitit: Submitit) -> None:
    scontrol.shows("JobState=COMPLETING Reason=None")
    with listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert "cancelled" in requeue()
    assert not submitit.calls
