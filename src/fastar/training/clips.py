"""Batches of clips whose order depends on nothing but the number of processes: not on workers or interruptions."""

import os
import signal
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Protocol, runtime_checkable

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from fastar.interruption import SIGNALS
from fastar.training.module import TimedModule
from fastar.training.processes import Layout, find_layout

Batch = dict[str, Tensor]


class ClipSource(Protocol):
    """Clips that are made as they are asked for, such as `DoomClips`."""

    def numbered(self, numbers: Iterable[int]) -> Iterator[Batch]:
        """The clips of these numbers, in this order; a number fixes every bit of its clip."""
        ...


@runtime_checkable
class FinishesBatches(Protocol):
    """Clips whose batches are completed on the device that trains, such as `ScenesClips`."""

    def finish(self, batch: Batch) -> Batch:
        """The completed batch."""
        ...


class ClipBatches(IterableDataset[Batch]):
    """Endless batches of `batch_clips` clips; values gain a leading dimension.

    Batch n of rank r of R holds the clips first_clip + (n R + r) batch_clips and the ones after it. Loader worker w of
    W makes the batches w, w + W, ..., and the loader takes one of each in turn, so that their order is that of n.
    """

    def __init__(
        self, clips: ClipSource, *, batch_clips: int, first_clip: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        self.clips, self.batch_clips, self.first_clip = clips, batch_clips, first_clip
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        numbers = (
            self.first_clip + (n * self.ranks + self.rank) * self.batch_clips + k
            for n in count(worker, workers)
            for k in range(self.batch_clips)
        )
        clips = iter(self.clips.numbered(numbers))
        while batch := list(islice(clips, self.batch_clips)):
            yield default_collate(batch)


def make_loader(batches: ClipBatches, *, num_workers: int) -> DataLoader[Batch]:
    """Loader of `batches` as they are."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        prefetch_factor=2 if num_workers > 0 else None,
        worker_init_fn=_leave_signals_to_the_first,
    )


class ClipLoaders(lightning.LightningDataModule):
    """The training clips of a stage, from the first one that its module has not seen.

    Args:
        clips: the source.
        batch_clips: clips a step in each process.
        num_workers: loader processes; "auto" shares the cores between the training processes on this node.
    """

    def __init__(self, clips: ClipSource, *, batch_clips: int, num_workers: int | str) -> None:
        super().__init__()
        self.clips, self.batch_clips = clips, batch_clips
        self.num_workers = count_workers(find_layout()) if num_workers == "auto" else int(num_workers)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Called once the module is restored."""
        trainer = self.trainer
        assert trainer is not None and isinstance(trainer.lightning_module, TimedModule)
        batches = ClipBatches(
            self.clips,
            batch_clips=self.batch_clips,
            first_clip=trainer.lightning_module.clips_done,
            rank=trainer.global_rank,
            ranks=trainer.world_size,
        )
        return make_loader(batches, num_workers=self.num_workers)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Complete the batch where it is used."""
        return self.clips.finish(batch) if isinstance(self.clips, FinishesBatches) else batch


def count_workers(layout: Layout) -> int:
    """One loader process a core, less the training process itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bound = (
        "SLURM_STEP_ID" in os.environ and layout.started_elsewhere
    )  # srun gives each task cores of its own
    return max((cores if bound else cores // layout.devices) - 1, 0)


def _leave_signals_to_the_first(worker: int) -> None:
    """Slurm signals all processes of a job: loader workers and their engines work on until they are told to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
