"""What a comparison does in one go, and what the runs of a group of seeds share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastar.compare.clips import AnyClips
from fastar.results.logtail import sentence_of

REFERENCE = "dense"
"""The method whose free-running rollout is the trajectory of A and B and the truth of fidelity scores."""

LATENTS = "latents.safetensors"
"""Where a dense run keeps its trajectory."""


@dataclass(eq=False)
class Group:
    """Seeds that share rollouts, and what their runs have in common, made when the first of them needs it.

    Attributes:
        reference: latents [B, n, C, h, w] of the dense rollout.
        waits: the dense rollout has not been made or found yet.
        problem: why there is no reference.
    """

    seeds: list[int]
    load: Callable[[Sequence[int]], AnyClips]
    waits: bool
    reference: Tensor | None = None
    problem: str = f"the method '{REFERENCE}' failed for these seeds"

    @cached_property
    def clips(self) -> AnyClips:
        return self.load(self.seeds)


def read_latents(path: Path) -> Tensor:
    """The dense trajectory of a finished run, [B, n, C, h, w].

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return load_file(path)["latents"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"the dense run {path.parent} has no readable {LATENTS} ({sentence_of(error)}): remove the folder"
        ) from error


@dataclass(frozen=True)
class Task:
    """Runs that are done in one go: a protocol and group of seeds, for one method or, in protocol A, several.

    `reference` marks the dense rollout that the others are held against.
    """

    methods: tuple[str, ...]
    protocol: str
    group: Group
    reference: bool = False

    def __str__(self) -> str:
        return f"{', '.join(self.methods)}, protocol {self.protocol}, seeds {self.group.seeds}"
