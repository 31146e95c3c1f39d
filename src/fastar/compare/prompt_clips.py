"""Videos of the prompts of a set, that begin with an image, a video or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import BackboneConfig, Prompts
from fastar.backbones.codec import latent_frames, pixel_frames
from fastar.backbones.storage import sha256_of
from fastar.backbones.wan.clip import ImageEncoder
from fastar.backbones.wan.umt5 import PromptEncoder
from fastar.compare.starts import ImageStart, image_encoder_of, image_start
from fastar.data.prompt_sets import PromptEntry, PromptSet
from fastar.data.video import read_start

if TYPE_CHECKING:
    from fastar.compare.session import Session

SOURCE = "prompts"


@dataclass
class PromptClips:
    """A batch of B videos of which their prompts are given, and perhaps how they begin; on the CPU.

    Attributes:
        entries: the prompts in words.
        encoder: sha256 of what encoded them.
        prompts: the embeddings.
        end: latent frames of the whole video, the given ones included.
        prefill: latent frames that are given.
        frames: uint8 [B, F, H, W, 3], the given pixel frames, F = 0 without any.
        start: what they start from, on a backbone that reads an image: no frame is given then.
        images: sha256 of what encoded that.
        negative: what guidance leads away from, and `avoided` in words.
    """

    entries: tuple[PromptEntry, ...]
    encoder: str
    prompts: Prompts
    end: int
    prefill: int
    frames: Tensor
    start: ImageStart | None = None
    images: str | None = None
    negative: Prompts | None = None
    avoided: str | None = None
    actions: None = None
    truth: None = None

    @property
    def batch(self) -> int:
        return len(self.entries)

    def actions_in(self, part: slice) -> None:
        """There are none."""

    def identity(self) -> dict[str, Any]:
        """What decides the videos, as far as the clips do: texts and beginnings, not the files that they came in."""
        return identity_of(
            self.entries, self.encoder, self.images, self.avoided,
            generated=self.end - self.prefill, prefill=self.prefill,
        )  # fmt: skip


def read_set(data: DictConfig) -> PromptSet:
    """The prompts that a node of conf/data names.

    Raises:
        FileNotFoundError, ValueError: no file is named, it is missing or ill-formed.
    """
    if data.prompts.path is None:
        raise ValueError(f"data={data.name} reads a file of prompts: name it with prompts=FILE")
    found = instantiate(data.prompts)
    assert isinstance(found, PromptSet)
    return found if data.get("image") is None else found.starting_from(data.image)


def identity_of(
    entries: Sequence[PromptEntry],
    encoder: str,
    images: str | None,
    avoided: str | None,
    *,
    generated: int,
    prefill: int,
) -> dict[str, Any]:
    """What decides the videos of `entries`, as far as they do, encoded by encoders of sha256 `encoder` and `images`.

    `avoided` is the negative prompt, None without guidance.
    """
    more = {"image_encoder": images, "negative_prompt": avoided}
    starts = [None if entry.start is None else sha256_of(entry.start) for entry in entries]
    return {
        "prompts": [entry.text for entry in entries],
        "encoder": encoder,
        "starts": starts if any(starts) else None,
        "prefill_frames": prefill,
        "frames": generated,
    } | {name: value for name, value in more.items() if value is not None}


def avoided_by(config: DictConfig) -> str | None:
    """The negative prompt of a config, None unless its loop has guidance."""
    return None if config.rollout.get("guidance") is None else config.negative_prompt


def given_frames(
    entries: Sequence[PromptEntry], backbone: BackboneConfig, *, generated: int, prefill: int | None
) -> int:
    """Latent frames that videos of `entries` begin with: none, or `prefill` (None: a chunk) where there is a start.

    A backbone that reads an image makes that frame, too: nothing is given.

    Raises:
        ValueError: some begin with something and some do not, or lengths are no whole chunks; no image where the
            backbone reads one, or frames to begin with.
    """
    begins = {entry.start is not None for entry in entries}
    if len(begins) != 1:
        raise ValueError("prompts with and without a start cannot share a batch: set batch=1")
    given = (backbone.chunk_frames if prefill is None else prefill) if begins == {True} else 0
    if backbone.transformer.image_dim is not None:
        if begins != {True} or prefill:
            raise ValueError(
                f"the backbone '{backbone.name}' starts from an image and makes all frames: name it by image=FILE or "
                "in the column start of the prompts, and leave prefill_frames out"
            )
        given, begins = 0, {False}
    for setting, frames, least in (
        ("frames", generated, 1),
        ("prefill_frames", given, int(begins == {True})),
    ):
        if frames % backbone.chunk_frames or frames < least:
            raise ValueError(
                f"{setting}={frames} must be a whole number of {backbone.chunk_frames}-frame chunks"
            )
    return given


def prompt_clips(
    entries: Sequence[PromptEntry],
    encoder: PromptEncoder,
    backbone: BackboneConfig,
    *,
    generated: int,
    prefill: int | None,
    stride: int,
    images: ImageEncoder | None = None,
    avoided: str | None = None,
) -> PromptClips:
    """Clips of `entries`, whose embeddings are read or made now.

    An image stands still for the frames that are given, a video is cut to them.

    Args:
        generated: latent frames to make.
        prefill: latent frames that are given where an entry has a start; None: a chunk.
        stride: pixel frames of a latent frame.
        images: encodes what videos start from, for a backbone that reads it.
        avoided: the negative prompt, for a loop with guidance.

    Raises:
        ValueError: as `given_frames`, or a video is too short.
    """
    given = given_frames(entries, backbone, generated=generated, prefill=prefill)
    height, width = backbone.frame_size
    needed = pixel_frames(given, stride)
    beginnings = [_beginning(entry, needed, stride, height, width) for entry in entries]
    return PromptClips(
        tuple(entries),
        encoder.sha256,
        encoder.encode([entry.text for entry in entries]),
        given + generated,
        given,
        torch.stack(beginnings),
        None if images is None else image_start([e.start for e in entries if e.start], images, backbone),
        None if images is None else images.sha256,
        None if avoided is None else encoder.encode([avoided]),
        avoided,
    )


def clips_of_seeds(config: DictConfig, session: Session, seeds: Sequence[int]) -> PromptClips:
    """What seeds stand for in a comparison: seed n is prompt number n of the file, and its noise.

    Raises:
        ValueError: there are fewer prompts, or they begin with other than `prefill_frames` frames.
    """
    chosen = part_of_set(config.data)
    if max(seeds) >= len(chosen):
        raise ValueError(
            f"{chosen.path} has {len(chosen)} prompts, the first for seed 0: none for {max(seeds)}"
        )
    clips = prompt_clips(
        [chosen.entries[seed] for seed in seeds],
        instantiate(config.data.encoder),
        session.backbone.config,
        generated=config.frames,
        prefill=config.prefill_frames or None,
        stride=session.stride,
        images=image_encoder_of(config.data, config.backbone),
        avoided=avoided_by(config),
    )
    if clips.prefill != config.prefill_frames:
        raise ValueError(
            f"prefill_frames={config.prefill_frames}, but the prompts of {chosen.path} begin with {clips.prefill} "
            f"latent frames: set prefill_frames={clips.prefill}"
        )
    return clips


def set_identity(config: DictConfig) -> dict[str, Any]:
    """What decides the clips of seeds: the file's content, which part of it, and the encoder; not where they lie."""
    data = config.data
    found: dict[str, Any] = {
        "prompts": part_of_set(data).sha256[:16],
        "first": data.first,
        "encoder": instantiate(data.encoder).sha256[:16],
    }
    if data.prompts.get("dimensions") is not None:
        found["dimensions"] = list(data.prompts.dimensions)
    if (images := image_encoder_of(data, config.backbone)) is not None:
        found["image_encoder"] = images.sha256[:16]
    if (avoided := avoided_by(config)) is not None:
        found["negative_prompt"] = avoided
    return found


def part_of_set(data: DictConfig) -> PromptSet:
    """The part of the prompts that a node of conf/data asks for; errors as `read_set`."""
    return read_set(data).part(data.first, data.count)


def _beginning(entry: PromptEntry, needed: int, stride: int, height: int, width: int) -> Tensor:
    """uint8 [needed, H, W, 3]."""
    if not needed or entry.start is None:
        return torch.empty(0, height, width, 3, dtype=torch.uint8)
    frames = read_start(entry.start, height=height, width=width)
    if len(frames) == 1:
        return frames.expand(needed, -1, -1, -1)
    if len(frames) < needed:
        raise ValueError(
            f"{entry.start} has {len(frames)} frames, {latent_frames(len(frames), stride)} latent ones, and {needed} "
            "are needed: take a longer video, or set prefill_frames"
        )
    return frames[:needed]
