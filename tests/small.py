"""A random causal transformer that is fast enough for hundreds of passes a second, rollouts of it, and conf/ groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fastar.attention.events import Recorder
from fastar.attention.rope import RotaryEmbedding
from fastar.attention.state import AttentionState
from fastar.backbones import Backbone, Prompts, WanConfig, build_backbone
from fastar.backbones.reference import BlockCausalAttend
from fastar.cache import CachePolicy, DenseCache
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.noise import chunk_noise
from fastar.rollout.rollout import Rollout
from fastar.rollout.schedules import uniform_timesteps
from fastar.sparsity import CrossSelector, Dense, DenseCross, Selector

CONF = Path(__file__).resolve().parent.parent / "conf"
CHUNK, CHANNELS, GRID, ACTIONS = 2, 4, (2, 3), 5
LAYERS, HEADS, DIM = 2, 2, 16
TOKENS = GRID[0] * GRID[1]  # of a frame
LATENT = (CHANNELS, 2 * GRID[0], 2 * GRID[1])


def small_backbone(seed: int = 0, *, text_dim: int | None = None) -> Backbone:
    """Two layers, two heads of 16, six tokens a frame, float32; no parameter is zero, so that all of it matters."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sizes = {"dim": HEADS * DIM, "num_layers": LAYERS, "num_heads": HEADS, "ffn_dim": 48, "freq_dim": 32}
    actions = {"num_actions": ACTIONS, "action_motions": ((0, 0), (1, 0), (0, 30), (0, -30), (-1, 0))}
    backbone = build_backbone(
        name="small",
        transformer=WanConfig(
            **sizes, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=text_dim, **actions
        ),
        autoencoder=None,
        frame_size=(16 * GRID[0], 16 * GRID[1]),
        chunk_frames=CHUNK,
        context_frames=8,
    )
    with torch.no_grad():
        for parameter in backbone.transformer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    backbone.transformer.eval()
    return backbone


def text_backbone(**sizes: int) -> Backbone:
    """The tiny stand-in for Wan, with a text stream, or one of other `sizes`; no parameter is zero."""
    torch.manual_seed(0)
    config = configs("backbone")["tiny_text"]
    config.transformer.update(sizes)
    made: Backbone = instantiate(config)
    with torch.no_grad():
        for parameter in made.transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    made.transformer.eval()
    return made


def image_backbone(**streams: Any) -> Backbone:
    """One that starts from an image of 6 numbers a token, and has these other streams; no parameter is zero."""
    torch.manual_seed(0)
    sizes = {"dim": HEADS * DIM, "num_layers": LAYERS, "num_heads": HEADS, "ffn_dim": 48, "freq_dim": 32}
    channels = {"in_channels": 2 * CHANNELS + 4, "out_channels": CHANNELS}
    made = build_backbone(
        name="image",
        transformer=WanConfig(**sizes, **channels, image_dim=6, **streams),
        autoencoder=None,
        frame_size=(16 * GRID[0], 16 * GRID[1]),
        chunk_frames=CHUNK,
        context_frames=6,
    )
    with torch.no_grad():
        for parameter in made.transformer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    made.transformer.eval()
    return made


def poses(backbone: Backbone, actions: Tensor) -> Tensor:
    """Poses [B, F, 3] of a video that starts at the origin."""
    odometer = backbone.transformer.odometer
    assert odometer is not None
    return odometer.advance(odometer.start(len(actions), actions.device), actions)


def small_loop(**options: Any) -> ChunkLoop:
    """Four Euler steps, of which AnnSA's schedule leaves the last two sparse."""
    return ChunkLoop(**{"chunk_frames": CHUNK, "timesteps": uniform_timesteps(4)} | options)


def small_rollout(
    backbone: Backbone,
    cache: Callable[[], CachePolicy] = lambda: DenseCache(storage="float32"),
    selector: Callable[[], Selector] = Dense,
    *,
    seeds: Sequence[int] = (7,),
    engine: str = "auto",
    recorders: Sequence[Recorder] = (),
    loop: ChunkLoop | None = None,
    prompts: Prompts | None = None,
) -> Rollout:
    """A rollout at frame 0, with an exact dense cache unless told otherwise."""
    method = Method(name="small", cache=cache, self_attention=selector, engine=engine)
    return start_rollout(
        backbone, method, loop=loop or small_loop(), seeds=seeds, recorders=recorders, prompts=prompts
    )


def small_state(
    cache: CachePolicy,
    selector: Selector | None = None,
    cross_selector: CrossSelector | None = None,
    *,
    recorders: Sequence[Recorder] = (),
) -> AttentionState:
    """The state of a rollout of the small backbone, without the backbone."""
    return AttentionState(
        cache=cache,
        self_selector=selector or Dense(),
        cross_selector=cross_selector or DenseCross(),
        engine="auto",
        rope=RotaryEmbedding(DIM),
        grid=GRID,
        num_layers=LAYERS,
        num_heads=HEADS,
        head_dim=DIM,
        batch=1,
        chunk_frames=CHUNK,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        recorders=recorders,
    )


def clip(frames: int, *, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents [B, F, C, h, w] and actions [B, F] of a made-up video."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, frames, *LATENT, generator=generator)
    return latents, torch.randint(ACTIONS, (batch, frames), generator=generator)


def run(rollout: Rollout, *, history: int = 6, generated: int = 6, seed: int = 0) -> Tensor:
    """Push `history` frames of `clip` through the rollout, then generate: [B, generated, C, h, w]."""
    latents, actions = clip(history + generated, batch=len(rollout.seeds), seed=seed)
    rollout.prefill(latents[:, :history], actions[:, :history])
    return torch.cat(list(rollout.generate(generated, actions[:, history:])), dim=1)


def uncached(
    backbone: Backbone,
    attend: BlockCausalAttend,
    loop: ChunkLoop,
    seeds: Sequence[int],
    history: Tensor,
    generated: int,
    told: Callable[[int], dict[str, Tensor]],
) -> Tensor:
    """What a rollout generates after `history`, by forwards over the whole video with no state between them.

    `told(n)` are the transformer's conditions of the first n frames.
    """
    video, levels = history, [*loop.timesteps, 0.0]
    for first in range(history.shape[1], history.shape[1] + generated, loop.chunk_frames):
        shape = (loop.chunk_frames, *history.shape[2:])
        noise = [chunk_noise(seeds, first, draw, shape, "cpu") for draw in range(len(levels))]
        chunk = noise[0]
        for step, (now, after) in enumerate(pairwise(levels)):
            timesteps = torch.zeros(len(seeds), first + loop.chunk_frames)
            timesteps[:, first:] = now
            whole = torch.cat([video, chunk], dim=1)
            velocity = backbone.transformer(whole, timesteps, attend=attend, **told(whole.shape[1]))[
                :, first:
            ]
            clean = chunk - now / 1000 * velocity
            again = (
                noise[step + 1] if loop.renoise else clean + velocity
            )  # the noise that the velocity points to
            chunk = (1 - after / 1000) * clean + after / 1000 * again
        video = torch.cat([video, chunk], dim=1)
    return video[:, history.shape[1] :]


def configs(group: str) -> dict[str, DictConfig]:
    """The composed YAML files of a group of conf/, by name: a method that is added there is tested."""
    with initialize_config_dir(config_dir=str(CONF), version_base=None):
        names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        return {name: compose(f"{group}/{name}")[group] for name in names}


def make(config: DictConfig, **changes: Any) -> Any:
    """What a YAML file describes, with some fields changed."""
    return instantiate(config, **changes)
