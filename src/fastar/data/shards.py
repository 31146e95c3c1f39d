"""Which clips of an endless data set a process makes: no two ranks or loader workers make the same."""

import os
from collections.abc import Iterable
from itertools import count

import torch
from torch.utils.data import get_worker_info


def shard() -> tuple[int, int]:
    """(number of this shard, shards) over distributed ranks and loader workers.

    The rank comes from torch.distributed when it is initialised, else from the variables RANK and WORLD_SIZE.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
    return rank * workers + worker, ranks * workers


def own_numbers(first_index: int, clips: int | None) -> Iterable[int]:
    """Numbers of this shard's clips, from `first_index` on; `clips` of all shards together, None for no end."""
    own_shard, shards = shard()
    start = first_index + own_shard
    return count(start, shards) if clips is None else range(start, first_index + clips, shards)
