"""Decoding by itself: what pixels cost, whatever made the latents. Weights are random, sizes are real."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from fastar.backbones.codec import VideoCodec
from fastar.backbones.wan.autoencoder import WanAutoencoder
from fastar.backbones.wan.light_decoder import LightAutoencoder
from fastar.benchmark.page import Page, Rows
from fastar.benchmark.timing import timed
from fastar.benchmark.workload import Workload
from fastar.cache.base import check_choice

WIDTHS = (256, 128, 64)  # of the light decoder's stages, each of which doubles height and width
GROWTH = (1, 2, 2)  # frames that a stage makes of one


def decode_rows(config: DictConfig, workload: Workload, page: Page) -> Rows:
    """Rows decoder, parameters, ms (a chunk of latents in the stream's steady state), fps (video frames a second).

    Raises:
        ValueError: a decoder is neither `wan` nor `light`.
    """
    rows = []
    for name in config.decoders or []:
        codec = _decoder(name, page)
        stream = codec.stream()
        stream.decode(workload.motion.chunk(0, workload.session.chunk, page.device))
        latents = workload.motion.chunk(workload.session.chunk, workload.session.chunk, page.device)
        # A stream that stands still would do less than one that goes on: each repeat decodes from the same place.
        time = timed(lambda: stream.fork().decode(latents), device=page.device, repeats=config.repeats)  # noqa: B023
        rows.append(
            {
                "decoder": name,
                "parameters": sum(p.numel() for p in codec.parameters()),
                "ms": 1e3 * time.median,
                "ms_low": 1e3 * time.low,
                "ms_high": 1e3 * time.high,
                "fps": workload.video_frames / time.median,
                "weights": "random",
            }
        )
    return rows


def _decoder(name: str, page: Page) -> Any:
    check_choice("decoder", name, ("wan", "light"))
    dtype = str(page.dtype).removeprefix("torch.")
    if name == "wan":
        codec: VideoCodec = WanAutoencoder.load("random", device=page.device, dtype=dtype)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            codec = LightAutoencoder(SmallDecoder(), device=page.device, dtype=dtype)
    return codec


class SmallDecoder(nn.Module):
    """A decoder of TAEHV's size (github.com/madebyollin/taehv; 9.8 M parameters), for timings with random weights.

    Three stages of three blocks that see their own features of the frame before; each stage doubles height and width,
    the last two also the frames. The first latent frame shows the last of the four frames that are made of it.

    Args:
        widths: of the stages.
        channels: of the latents.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, channels: int = 16) -> None:
        super().__init__()
        following = (*widths[1:], widths[-1])
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width) for width in widths for _ in range(3))
        self.grow = nn.ModuleList(
            nn.Conv2d(width, width * times, 1) for width, times in zip(widths, GROWTH, strict=True)
        )
        self.narrow = nn.ModuleList(
            nn.Conv2d(width, after, 3, padding=1) for width, after in zip(widths, following, strict=True)
        )
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def start(self) -> tuple[Tensor, ...]:
        """Nothing is remembered."""
        return ()

    def decode(self, latents: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `fastar.backbones.wan.light_decoder.LightDecoder`."""
        batch, x, kept = latents.shape[0], F.relu(self.first(latents.flatten(0, 1))), []
        for stage, (grow, narrow) in enumerate(zip(self.grow, self.narrow, strict=True)):
            for number in range(3 * stage, 3 * stage + 3):
                frames = x.unflatten(0, (batch, -1))
                before = memory[number] if memory else torch.zeros_like(frames[:, 0])
                kept.append(frames[:, -1])
                past = torch.cat([before[:, None], frames[:, :-1]], 1).flatten(0, 1)
                x = self.blocks[number](x, past)
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = grow(x).unflatten(1, (GROWTH[stage], -1)).flatten(0, 1)
            x = narrow(x)
        pixels = self.last(F.relu(x)).unflatten(0, (batch, -1)).clamp(-1, 1)
        return pixels if memory else pixels[:, 3:], tuple(kept)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.layers(torch.cat([x, past], 1)) + x)
