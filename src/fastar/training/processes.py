"""The processes of one training: who started them, which of them writes, and how they agree.

A training runs in one process, in those that `torchrun` or `srun` (one task a GPU) started, or in those that Lightning
starts, one for each GPU at hand. In the last case the other processes run the whole command from its start once the
first one has reached its first stage; they are called helpers here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import distributed

from fastar import interruption
from fastar.interruption import Interrupted
from fastar.results.lock import RunLock, RunLocked

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """environment: who starts the processes. devices: processes on this node. nodes: how many nodes."""

    environment: ClusterEnvironment
    devices: int
    nodes: int

    @property
    def total(self) -> int:
        """Processes on all nodes."""
        return self.devices * self.nodes

    @property
    def started_elsewhere(self) -> bool:
        """By torchrun or srun, all at the same time."""
        return not isinstance(self.environment, LightningEnvironment)


def find_layout() -> Layout:
    """What the environment of this process says.

    Lightning's own requeueing under Slurm is off in any case: `fastar.interruption` does it.
    """
    if TorchElasticEnvironment.detect():
        here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return Layout(TorchElasticEnvironment(), here, everywhere // here)
    tasks, nodes = int(os.environ.get("SLURM_NTASKS", "1")), int(os.environ.get("SLURM_NNODES", "1"))
    if (
        "SLURM_STEP_ID" in os.environ and tasks > 1
    ):  # not in a batch script, whose one process is no task of srun's
        # set only if it was asked for by that name, and Lightning takes no other
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(tasks // nodes))
        return Layout(SLURMEnvironment(auto_requeue=False), tasks // nodes, nodes)
    return Layout(LightningEnvironment(), max(torch.cuda.device_count(), 1), 1)


@contextmanager
def connected(layout: Layout) -> Iterator[None]:
    """Connect processes that were started elsewhere from the beginning; Lightning takes the connection over."""
    if layout.started_elsewhere and layout.total > 1:
        environment = layout.environment
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = (
            environment.main_address,
            str(environment.main_port),
        )
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(environment.local_rank())
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo", rank=environment.global_rank(), world_size=layout.total
        )
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes files and logs."""
    if distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_helper(layout: Layout) -> bool:
    """Whether Lightning started this process for another one."""
    return not layout.started_elsewhere and os.environ.get("LOCAL_RANK", "0") != "0"


def of_first(value: T) -> T:
    """The value of the first process, in all that are connected."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set in any of the connected processes."""
    if not distributed.is_initialized():
        return flag
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    flags = torch.tensor(int(flag), device=device)
    distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
    return bool(flags.item())


def stop() -> None:
    """Raise `Interrupted`; the signal may have reached another process than this one."""
    interruption.check()
    raise Interrupted(interruption.SIGNALS[0])


def stop_if_requested() -> None:
    """Raise `Interrupted` in all processes if one of them was asked to stop."""
    if anywhere(interruption.requested()):
        stop()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Only one training at a time works in `folder`.

    Raises:
        ValueError: another one does; in all connected processes.
    """
    lock, refusal = RunLock(folder), None
    if is_first():
        try:
            lock.acquire()
        except RunLocked as error:
            refusal = str(error)
    if (refusal := of_first(refusal)) is not None:
        raise ValueError(refusal)
    try:
        yield
    finally:
        lock.release()
