"""What the rollouts of a benchmark share: the backbone, real motion as contents, and the methods at their budgets.

Weights are random, as a rule, and so is the prompt; neither changes what is computed. Every chunk is denoised from
noise and the *true* latents of its frames are committed: caches hold real motion whatever the weights make of it. A
trained backbone with clips of its own (`data` in conf/benchmark.yaml) commits those.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones.wan.fused import Execution
from fastar.benchmark.contents import Contents, contents_of
from fastar.benchmark.page import Page
from fastar.compare.methods import budgeted, method_of, resolved
from fastar.compare.session import RANDOM, Session, open_session
from fastar.data.recorded import Motion, nearest_shares
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.rollout import Rollout


@dataclass(frozen=True)
class Variant:
    """A method at one budget.

    Attributes:
        name: of the method.
        budget: latent frames whose dense bfloat16 bytes its cache gets; None: its own.
        share: of how many frames that is, where budgets are given so.
        method: what attends.
    """

    name: str
    budget: float | None
    method: Method
    share: float | None = None

    @property
    def label(self) -> str:
        return self.name if self.budget is None else f"{self.name} {self.budget:g}"


@dataclass(frozen=True)
class Workload:
    """See the module.

    Attributes:
        session: backbone, loop and device.
        contents: what is committed.
        variants: all methods at all budgets, those without a budget once.
        capture: whether passes that can be are captured in CUDA graphs.
        must_capture: whether a method that cannot be is an error.
        execution: how passes are run.
        random_weights: whether the weights mean nothing.
        stride: video frames that a latent frame shows.
    """

    session: Session
    contents: Contents
    variants: tuple[Variant, ...]
    capture: bool
    must_capture: bool
    execution: Execution
    random_weights: bool
    stride: int

    @property
    def device(self) -> torch.device:
        return self.session.device

    @property
    def motion(self) -> Motion:
        """The latents that are committed."""
        return self.contents.motion

    @property
    def video_frames(self) -> int:
        """Video frames of a chunk."""
        return self.stride * self.session.chunk

    @property
    def chunk_tokens(self) -> int:
        """Queries of a pass."""
        return self.session.chunk * self.session.backbone.config.tokens_per_frame

    @property
    def layers(self) -> int:
        return self.session.backbone.config.transformer.num_layers

    @property
    def weights(self) -> str:
        """`random`, or the beginning of the weights' hash."""
        return "random" if self.random_weights else self.session.weights[:8]

    def start(self, variant: Variant, *, capture: bool, **options: Any) -> tuple[Rollout, bool]:
        """A rollout of one video at frame 0, and whether its passes are captured.

        Args:
            variant: what attends.
            capture: whether they shall be. A method that cannot be captured runs as it is, unless `must_capture`.
            options: further arguments of `start_rollout`.
        """
        shared: dict[str, Any] = {
            "loop": self.session.loop,
            "seeds": [0],
            "prompts": self.contents.prompts,
            **options,
        }
        backbone = self.session.backbone
        if capture:
            try:
                return start_rollout(backbone, variant.method, **shared, capture=True), True
            except ValueError as error:
                if self.must_capture or "cannot be captured" not in str(error):
                    raise
        return start_rollout(backbone, variant.method, **shared), False

    def truth(self, rollout: Rollout) -> Tensor:
        """The true latents [1, n, C, h, w] of the chunk that `rollout` makes next."""
        return self.motion.chunk(rollout.next_frame, self.session.chunk, self.device)

    def actions(self, rollout: Rollout) -> Tensor | None:
        """Those of the chunk that `rollout` makes next, for a backbone that takes any; a recording has none."""
        if self.session.backbone.config.transformer.num_actions is None:
            return None
        given = self.contents.actions_of(rollout.next_frame, self.session.chunk)
        return torch.zeros(1, self.session.chunk, dtype=torch.long) if given is None else given

    def variant(self, name: str) -> Variant:
        """The first one of a method.

        Raises:
            ValueError: it is not among them.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise ValueError(f"the method '{name}' is measured against: name it in method=[...]")


def open_workload(config: DictConfig, page: Page, *, latent_frames: int | None = None) -> Workload:
    """What `config` names.

    Args:
        config: as conf/benchmark.yaml.
        latent_frames: of the contents, at least; more are not read. None: all of the recording.

    Raises:
        ValueError: no recording or one that is too short, an unknown method, a backbone that does not fit.
    """
    session, capture = open_session(config), _capture(config.capture, page.device)
    sizes = session.backbone.config.transformer
    if sizes.action_module is not None or sizes.image_dim is not None:
        raise ValueError(
            f"the backbone '{session.backbone.config.name}' is not measured here: it must need no images and neither "
            "mouse nor keyboard"
        )
    if session.loop.most_in_flight > 1:
        raise ValueError(
            "loops with several chunks in flight are not measured here: choose rollout=self_forcing"
        )
    execution = execution_of(config.execution, page.device)
    execution.apply(session.backbone.transformer)
    return Workload(
        session=session,
        contents=contents_of(config, session, page.device, latent_frames),
        variants=tuple(variants_of(config)),
        capture=capture,
        must_capture=config.capture is True,
        execution=execution,
        random_weights=config.checkpoint == RANDOM,
        stride=config.video_stride,
    )


def execution_of(config: DictConfig, device: torch.device) -> Execution:
    """How passes are run; fused null: where there is a GPU."""
    fused = device.type == "cuda" if config.fused is None else config.fused
    return Execution(fused=fused, linears=config.linears)


def variants_of(config: DictConfig) -> list[Variant]:
    """Every method of `config.methods`, at each budget if it follows the common one.

    Budgets are `config.budgets`, or `config.budget_shares` of `config.history_frames` frames.
    """
    follow, variants = budgeted(config.methods), []
    budgets: list[tuple[float | None, float | None]] = [(budget, None) for budget in config.budgets]
    if config.budget_shares is not None:
        budgets = [(share * config.history_frames, share) for share in config.budget_shares]
    for name, node in resolved(config).items():
        for budget, share in budgets if name in follow else [(None, None)]:
            variants.append(Variant(name, budget, method_of(name, _at_budget(node, budget)), share))
    return variants


def redundancy_of(motion: Motion) -> dict[str, float]:
    """What shows that motion is real: distinct frames, and tokens that nearly equal one of the six frames before."""
    noise = torch.randn(motion.latents[:8].shape, generator=torch.Generator().manual_seed(0))
    return {
        "distinct_frames": motion.distinct,
        "near_earlier": nearest_shares(motion.latents, samples=16),
        "near_earlier_noise": nearest_shares(noise, samples=2),
    }


def _at_budget(node: Mapping[str, Any], budget: float | None) -> dict[str, Any]:
    changed = copy.deepcopy(dict(node))
    if budget is not None:
        changed["cache"].update(budget_share=None, budget_frames=budget)
    return changed


def _capture(asked: bool | None, device: torch.device) -> bool:
    """Whether to capture: as `asked`, or, if that is None, where it can be done."""
    if asked and device.type != "cuda":
        raise ValueError("passes can be captured on CUDA alone: leave capture=true out")
    return device.type == "cuda" if asked is None else asked
