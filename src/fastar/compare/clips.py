"""The clips that seeds stand for: true frames to start from, actions, and the truth about the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fastar.backbones import BackboneConfig, Prompts
from fastar.compare.latents import LatentClips, noise_clips
from fastar.compare.played import PLAYED, PlayedClip
from fastar.compare.prompt_clips import SOURCE, PromptClips
from fastar.data.doom.dataset import DoomClips, render_clip
from fastar.data.doom.env import DoomWorlds
from fastar.data.doom.policy import Walk
from fastar.data.doom.returns import ReturnClips
from fastar.data.scenes.dataset import ScenesClips
from fastar.data.scenes.detector import presence
from fastar.data.scenes.script import Script
from fastar.data.scenes.truth import PhraseTokens
from fastar.metrics.revisit import masked_psnr
from fastar.sparsity.base import check_choice

RENDERED = ("returns", "heldout")
SOURCES = (*RENDERED, "noise", SOURCE, PLAYED)


@dataclass
class Clips:
    """A batch of clips, on the CPU; B videos of F = prefill + generated frames.

    Attributes:
        frames: uint8 [B, F, H, W, 3]. actions: int64 [B, F].
        prefill: frames that a rollout is given.
        return_frames: int64 [B, R], absolute indices of frames in which seen pixels return; None for other clips.
        return_masks: bool [B, R, H, W], those pixels.
        prompts: one per video; None for a backbone that reads no text.
        scripts: what each video shows, of scripted scenes; None for other clips.
        relevance: bool [B, F, S], whether a prompt token matters to a frame, of scripted scenes.
        phrases: what each prompt says and by which tokens, of scripted scenes.
    """

    frames: Tensor
    actions: Tensor
    prefill: int
    return_frames: Tensor | None = None
    return_masks: Tensor | None = None
    prompts: Prompts | None = None
    scripts: tuple[Script, ...] | None = None
    relevance: Tensor | None = None
    phrases: tuple[Sequence[PhraseTokens], ...] | None = None

    @property
    def batch(self) -> int:
        return len(self.frames)

    @property
    def end(self) -> int:
        """Frames of the whole clip, the generated ones included."""
        return self.frames.shape[1]

    def actions_in(self, part: slice) -> Tensor | None:
        """Actions of the frames of `part`."""
        return self.actions[:, part]

    @property
    def truth(self) -> Tensor:
        """The frames that were not given: uint8 [B, F - prefill, H, W, 3]."""
        return self.frames[:, self.prefill :]

    def revisit_psnr(self, generated: Tensor) -> Tensor | None:
        """PSNR on returning pixels per clip [B], of frames [B, F - prefill, H, W, 3]; None without that truth."""
        if self.return_frames is None or self.return_masks is None:
            return None
        rows = torch.arange(len(self.frames))[:, None]
        picked = generated[rows, self.return_frames - self.prefill]
        return masked_psnr(picked, self.frames[rows, self.return_frames], self.return_masks)

    def presence(self, generated: Tensor) -> list[float] | None:
        """Share of the scripted things found in generated frames [B, F - prefill, H, W, 3]; None without scripts.

        It is looked for where `generated` is.
        """
        if self.scripts is None:
            return None
        given = self.frames[:, : self.prefill].to(generated.device)
        whole = torch.cat([given, generated], dim=1).permute(0, 1, 4, 2, 3)
        return [
            presence(frames, script).share_from(self.prefill)
            for frames, script in zip(whole, self.scripts, strict=True)
        ]


AnyClips = Clips | LatentClips | PromptClips | PlayedClip


def check_source(data: DictConfig, source: str, backbone: BackboneConfig) -> None:
    """Raise a ValueError if `data` has no clips of that `source`, or the backbone cannot see their pixels."""
    check_choice("source", source, SOURCES)
    if source in RENDERED and backbone.autoencoder is None:
        raise ValueError(
            f"the backbone '{backbone.name}' has no autoencoder to see the pixels of source={source} with: use "
            "source=noise, or a workload that is made for it (conf/workload)"
        )
    if source == PLAYED and backbone.transformer.action_module is None:
        raise ValueError(
            f"the backbone '{backbone.name}' has no mouse and keyboard to be played with: use source=prompts or "
            "source=noise"
        )
    if source not in data:
        raise ValueError(f"data={data.name} has no clips of source={source}: choose another one of conf/data")


def load_clips(
    data: DictConfig, source: str, seeds: Sequence[int], *, prefill: int, generated: int
) -> AnyClips:
    """The clips number `seeds` of a source in conf/data, made now.

    Raises:
        ValueError: an unknown source, or no such clip has enough returning frames.
    """
    check_choice("source", source, SOURCES)
    if source == "noise":
        return noise_clips(data.noise, seeds, prefill=prefill, generated=generated)
    return render_clips(data, source, seeds, prefill=prefill, generated=generated)


def render_clips(
    data: DictConfig, source: str, seeds: Sequence[int], *, prefill: int, generated: int
) -> Clips:
    """The clips number `seeds` of a source with pixels.

    The last ones stay in memory: jobs of a sweep that follow each other in one process mostly share them.
    """
    return _rendered(OmegaConf.to_yaml(data, resolve=True), source, tuple(seeds), prefill, generated)


@lru_cache(maxsize=1)
def _rendered(data_yaml: str, source: str, seeds: tuple[int, ...], prefill: int, generated: int) -> Clips:
    data: Any = OmegaConf.create(data_yaml)
    scripts: tuple[Script, ...] | None = None
    phrases: tuple[Sequence[PhraseTokens], ...] | None = None
    if source == "returns":
        dataset = instantiate(data.returns, history=prefill, future=generated, clips=max(seeds) + 1)
        items = [_render_return(dataset, seed) for seed in seeds]
    else:
        datasets = [
            instantiate(data.heldout, frames=prefill + generated, first_index=seed, clips=1) for seed in seeds
        ]
        items = [next(iter(dataset)) for dataset in datasets]
        if isinstance(datasets[0], ScenesClips):
            scripts = tuple(dataset.script(seed) for dataset, seed in zip(datasets, seeds, strict=True))
            if datasets[0].encoder is not None:
                phrases = tuple(dataset.phrases(seed) for dataset, seed in zip(datasets, seeds, strict=True))
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return Clips(
        frames=batch["frames"],
        actions=batch["actions"],
        prefill=prefill,
        return_frames=batch.get("return_frames"),
        return_masks=batch.get("return_masks"),
        prompts=prompts_of(batch),
        scripts=scripts,
        relevance=batch.get("relevance"),
        phrases=phrases,
    )


def prompts_of(batch: Mapping[str, Tensor]) -> Prompts | None:
    """The prompts of a batch of clips; None if its data set has none."""
    return Prompts(batch["prompt"].float(), batch["prompt_tokens"]) if "prompt" in batch else None


def _render_return(dataset: ReturnClips, index: int) -> dict[str, Tensor]:
    walk, truth = dataset.plan(index)
    with DoomWorlds([walk.world]) as engine:
        return {**render_clip(engine, 0, walk), **truth}


def steered_clip(dataset: DoomClips, index: int, actions: Sequence[int], *, prefill: int) -> Clips:
    """Clip `index` of a dataset up to frame `prefill`, then what the simulator shows for the given `actions`."""
    world, walk = dataset.plan(index)
    steered = Walk(world, walk.poses[0], frames=prefill + len(actions))
    steered.poses, steered.actions = walk.poses[:prefill], walk.actions[:prefill]
    for action in actions:
        steered.act(action)
    with DoomWorlds([world]) as engine:
        item = render_clip(engine, 0, steered)
    return Clips(frames=item["frames"][None], actions=item["actions"][None], prefill=prefill)
