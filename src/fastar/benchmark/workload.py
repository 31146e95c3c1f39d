"""What the rollouts of a benchmark share: the backbone, real motion as contents, and the methods at their budgets.

Weights are random, as a rule, and so is the prompt; neither changes what is computed. Every chunk is denoised from
noise and the *true* latents of its frames are committed: caches hold real motion whatever the weights make of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import Prompts
from fastar.backbones.wan.fused import Execution
from fastar.benchmark.page import Page
from fastar.compare.methods import budgeted, method_of, resolved
from fastar.compare.session import RANDOM, Session, open_session
from fastar.data.noise import NoiseClips
from fastar.data.recorded import COEFFICIENTS, Motion, load_motion, nearest_shares
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.rollout import Rollout


@dataclass(frozen=True)
class Variant:
    """A method at one budget.

    Attributes:
        name: of the method.
        budget: latent frames whose dense bfloat16 bytes its cache gets; None: its own.
        method: what attends.
    """

    name: str
    budget: float | None
    method: Method

    @property
    def label(self) -> str:
        return self.name if self.budget is None else f"{self.name} {self.budget:g}"


@dataclass(frozen=True)
class Workload:
    """See the module.

    Attributes:
        session: backbone, loop and device.
        motion: the latents that are committed.
        prompts: random, or None for a backbone that reads none.
        variants: all methods at all budgets, those without a budget once.
        capture: whether passes that can be are captured in CUDA graphs.
        must_capture: whether a method that cannot be is an error.
        execution: how passes are run.
        random_weights: whether the weights mean nothing.
        stride: video frames that a latent frame shows.
    """

    session: Session
    motion: Motion
    prompts: Prompts | None
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
        shared: dict[str, Any] = {"loop": self.session.loop, "seeds": [0], "prompts": self.prompts, **options}
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

    def actions(self) -> Tensor | None:
        """Those of a chunk, for a backbone that takes any: none is pressed."""
        if self.session.backbone.config.transformer.num_actions is None:
            return None
        return torch.zeros(1, self.session.loop.frames_in_flight, dtype=torch.long)

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
        latent_frames: of the recording, at least; more are not read. None: all of it.

    Raises:
        ValueError: no recording or one that is too short, an unknown method, a backbone that does not fit.
    """
    session, capture = open_session(config), _capture(config.capture, page.device)
    sizes = session.backbone.config.transformer
    if (
        sizes.out_channels != len(COEFFICIENTS)
        or sizes.action_module is not None
        or sizes.image_dim is not None
    ):
        raise ValueError(
            f"the backbone '{session.backbone.config.name}' is not measured here: its latents must have "
            f"{len(COEFFICIENTS)} channels, and it must need neither images nor mouse and keyboard"
        )
    if session.loop.most_in_flight > 1:
        raise ValueError(
            "loops with several chunks in flight are not measured here: choose rollout=self_forcing"
        )
    execution = execution_of(config.execution, page.device)
    execution.apply(session.backbone.transformer)
    motion = load_motion(config.motion.folder, tuple(config.backbone.frame_size), page.device, latent_frames)
    if latent_frames is not None:
        motion.chunk(0, latent_frames, torch.device("cpu"))  # a recording that is too short says so now
    return Workload(
        session=session,
        motion=motion,
        prompts=random_prompts(session, config.seed),
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
    """Every method of `config.methods`, at each of `config.budgets` if it follows the common budget."""
    follow, variants = budgeted(config.methods), []
    for name, node in resolved(config).items():
        for budget in list(config.budgets) if name in follow else [None]:
            variants.append(Variant(name, budget, method_of(name, _at_budget(node, budget))))
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


def random_prompts(session: Session, seed: int) -> Prompts | None:
    """One prompt of random embeddings, for a backbone that reads any."""
    config = session.backbone.config
    if config.transformer.text_dim is None:
        return None
    clips = NoiseClips(
        channels=config.transformer.out_channels,
        frame_size=config.frame_size,
        text_dim=config.transformer.text_dim,
        text_len=config.transformer.text_len,
        seed=seed,
    )
    clip = clips.clip(0, history=1, future=0)
    return Prompts(clip["prompt"][None], clip["prompt_tokens"][None])


def _capture(asked: bool | None, device: torch.device) -> bool:
    """Whether to capture: as `asked`, or, if that is None, where it can be done."""
    if asked and device.type != "cuda":
        raise ValueError("passes can be captured on CUDA alone: leave capture=true out")
    return device.type == "cuda" if asked is None else asked
