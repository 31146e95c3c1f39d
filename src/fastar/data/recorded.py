"""Recorded video as latents: a folder of clips, and a fixed linear map to the shape of Wan's latents.

Measurements of speed and memory want real motion in their caches and no trained weights: a latent frame is made of four
video frames by a cosine transform, which keeps what moves and what stays. It is no autoencoder's latent, and nothing
decodes it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastar.results.files import write_json

MANIFEST = "recording.json"
STRIDE, BLOCK = 4, 8  # video frames of a latent frame; pixels of a latent, each way
COEFFICIENTS = (
    *(
        (0, 0, row, column)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1))
    ),
    *((plane, 0, row, column) for plane in (1, 2) for row, column in ((0, 0), (0, 1), (1, 0))),
    *((0, 1, row, column) for row, column in ((0, 0), (0, 1))),
)
"""Channels: (plane of Y Cb Cr, frequency in time, in rows, in columns) of a cosine transform of 4 x 8 x 8 pixels."""
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # ITU-R BT.601


@dataclass(frozen=True)
class Recording:
    """A folder of video files and what is known of them; `fastar.data.doom.walking.record` makes one.

    Attributes:
        folder: where they lie.
        clips: by file: its name, frames and sha256. Motion is continuous within a clip.
        frame_size: (height, width).
        source: how it was made.
    """

    folder: Path
    clips: tuple[dict[str, Any], ...]
    frame_size: tuple[int, int]
    source: dict[str, Any]

    @classmethod
    def write(
        cls, folder: Path, clips: Sequence[dict[str, Any]], frame_size: Sequence[int], source: dict[str, Any]
    ) -> Recording:
        """Write the manifest of the clips that lie in `folder`."""
        record = {"clips": list(clips), "frame_size": list(frame_size), "source": source}
        write_json(folder / MANIFEST, record)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """The recording in `folder`.

        Raises:
            ValueError: there is none.
        """
        path = Path(folder) / MANIFEST
        try:
            record = json.loads(path.read_text())
            height, width = record["frame_size"]
            return cls(path.parent, tuple(record["clips"]), (height, width), record["source"])
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"there is no recording in {folder}: make one with `python experiments/benchmark.py mode=record`"
            ) from error

    @property
    def frames(self) -> int:
        """Video frames of all clips."""
        return sum(clip["frames"] for clip in self.clips)

    @property
    def latent_frames(self) -> int:
        """Latent frames of all clips; what is left of a clip makes none."""
        return sum(clip["frames"] // STRIDE for clip in self.clips)

    @property
    def sha256(self) -> str:
        """Of the files' hashes."""
        return hashlib.sha256("".join(clip["sha256"] for clip in self.clips).encode()).hexdigest()

    def read(self) -> Iterator[Tensor]:
        """The frames of each clip, uint8 [F, H, W, 3].

        Raises:
            ValueError: a file is missing or another than was recorded.
        """
        for clip in self.clips:
            path = self.folder / clip["file"]
            if not path.is_file() or sha256_of(path) != clip["sha256"]:
                raise ValueError(f"{path} is not the file that was recorded: record again")
            frames = _read_video(path)
            if frames.shape != (clip["frames"], *self.frame_size, 3):
                raise ValueError(f"{path} holds {list(frames.shape)}: record again")
            yield frames


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Motion:
    """A recording as latents.

    Attributes:
        latents: float16 [N, 16, h, w] on the CPU; each channel has mean 0 and variance 1 over all of them.
        distinct: share of the recording's video frames that equal no earlier one.
        sha256: of the recording.
    """

    latents: Tensor
    distinct: float
    sha256: str

    def chunk(self, first_frame: int, frames: int, device: torch.device) -> Tensor:
        """Latents float32 [1, frames, 16, h, w] from latent frame `first_frame` on.

        Raises:
            ValueError: the recording ends before: it is never begun again, since what comes back would be found.
        """
        if first_frame + frames > len(self.latents):
            raise ValueError(
                f"the recording ends after {len(self.latents)} latent frames and {first_frame + frames} are needed: "
                f"record more, motion.frames={STRIDE * (first_frame + frames)} or above"
            )
        return self.latents[first_frame : first_frame + frames].to(device).float()[None]


def load_motion(
    folder: str | Path, size: tuple[int, int], device: torch.device, limit: int | None = None
) -> Motion:
    """Latents of the recording in `folder`, shown at `size` (height, width) pixels, the first `limit` of them.

    Raises:
        ValueError: there is no recording, or a damaged one.
    """
    recording, parts, seen, made = Recording.load(folder), [], 0, 0
    found: set[bytes] = set()
    for frames in recording.read():
        found.update(hashlib.sha256(frame.numpy().tobytes()).digest() for frame in frames)
        seen += len(frames)
        parts += [latents_of(part.to(device), size).cpu() for part in frames.split(8 * STRIDE)]
        made += len(frames) // STRIDE
        if limit is not None and made >= limit:
            break
    latents = torch.cat(parts)[:limit]
    mean, std = _statistics(latents)
    normal = torch.cat([((part - mean) / std).half() for part in latents.split(64)])
    return Motion(normal, len(found) / seen, recording.sha256)


def latents_of(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """`COEFFICIENTS` of video frames uint8 [4 n + rest, H, W, 3] shown at `size`: float32 [n, 16, h / 8, w / 8].

    The frames are resized (bilinear, smoothed where they shrink) and cut into boxes of 4 frames x 8 x 8 pixels, each of
    which is told by the coefficients of its orthonormal cosine transform: linear in the pixels, not normalised.
    """
    count = len(frames) // STRIDE
    pixels = frames[: count * STRIDE].permute(0, 3, 1, 2).float() / 255
    pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    planes = torch.einsum("pc,fchw->fphw", pixels.new_tensor(_YCBCR), pixels)
    boxes = planes.unflatten(0, (count, STRIDE)).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    time, space = (_cosines(length).to(boxes) for length in (STRIDE, BLOCK))
    spectrum = torch.einsum("ft,uy,vx,ntphywx->npfuvhw", time[:2], space[:3], space[:3], boxes)
    return torch.stack([spectrum[(slice(None), *where)] for where in COEFFICIENTS], 1)


def _cosines(length: int) -> Tensor:
    """Orthonormal cosine transform (DCT-II): [frequency, place]."""
    place = (torch.arange(length) + 0.5) * math.pi / length
    rows = torch.cos(torch.arange(length)[:, None] * place) * math.sqrt(2 / length)
    rows[0] /= math.sqrt(2)
    return rows


def _statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [16, 1, 1] of each channel, in float64."""
    sums = [
        (part.double().sum((0, 2, 3)), part.double().square().sum((0, 2, 3))) for part in latents.split(64)
    ]
    total, squares = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    numbers = latents.numel() / latents.shape[1]
    mean = total / numbers
    std = (squares / numbers - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]


def _read_video(path: Path) -> Tensor:
    import cv2

    video = cv2.VideoCapture(str(path))
    frames: list[Tensor] = []
    try:
        while True:
            more, frame = video.read()
            if not more:
                return torch.stack(frames) if frames else torch.empty(0, 0, 0, 3, dtype=torch.uint8)
            frames.append(torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
    finally:
        video.release()


def nearest_shares(
    latents: Tensor, *, patch: int = 2, window: int = 6, within: float = 0.1, samples: int = 64
) -> float:
    """Share of tokens that nearly equal one of the frames before: how much there is for a cache to find.

    A token is a patch of `patch` x `patch` latents, as the transformer reads it. It counts if some token of the
    `window` latent frames before is nearer, in squared distance, than `within` of the tokens' mean squared distance to
    their mean. `samples` latent frames are looked at, drawn evenly.

    Args:
        latents: [N, C, h, w].

    Raises:
        ValueError: N is not above `window`.
    """
    if len(latents) <= window:
        raise ValueError(f"{len(latents)} latent frames have none after {window} others: give more")
    tokens = latents.float().unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # N C rows p columns p
    tokens = tokens.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    frames = (
        torch.linspace(window, len(tokens) - 1, min(samples, len(tokens) - window)).round().long().tolist()
    )
    spread = (tokens - tokens.mean((0, 1))).square().sum(-1).mean()
    shares = []
    for frame in frames:
        past = tokens[frame - window : frame].flatten(0, 1)
        distance = torch.cdist(tokens[frame], past, compute_mode="use_mm_for_euclid_dist").amin(-1)
        shares.append((distance.square() < within * spread).float().mean())
    return float(torch.stack(shares).mean())
