"""Clips without pixels: random latents and prompts, for measuring speed and for backbones without an autoencoder."""

import hashlib
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor


class NoiseClip(TypedDict, total=False):
    """One clip: latents [F, C, h, w]; prompt [L, D] and prompt_tokens (); actions [F + generated] int64."""

    latents: Tensor
    prompt: Tensor
    prompt_tokens: Tensor
    actions: Tensor


class NoiseClips:
    """Standard normal latents as the true beginning, with what else the backbone is conditioned on. No truth follows.

    Args:
        channels, frame_size: of the latents; (height, width) in pixels, eight to a latent.
        text_dim: width of prompt embeddings; None for backbones without text.
        text_len: embeddings are padded with zeros to so many tokens; None: to the longest prompt there may be.
        prompt_tokens: least and most tokens of a prompt; each clip draws its own number.
        num_actions: actions to draw from; None for backbones without.
        seed: of everything; clips are told apart by their index.

    Raises:
        ValueError: prompts longer than `text_len`.
    """

    def __init__(
        self,
        *,
        channels: int,
        frame_size: Sequence[int],
        text_dim: int | None = None,
        text_len: int | None = None,
        prompt_tokens: Sequence[int] = (8, 16),
        num_actions: int | None = None,
        seed: int = 0,
    ) -> None:
        self.shape = (channels, frame_size[0] // 8, frame_size[1] // 8)
        self.text_dim, self.num_actions, self.seed = text_dim, num_actions, seed
        self.shortest, self.longest = prompt_tokens
        self.text_len = self.longest if text_len is None else text_len
        if text_dim is not None and not 1 <= self.shortest <= self.longest <= self.text_len:
            raise ValueError(
                f"prompt_tokens must rise within 1..{self.text_len}, the text length, got {list(prompt_tokens)}"
            )

    def clip(self, index: int, *, history: int, future: int) -> NoiseClip:
        """Clip number `index`: `history` latent frames, and actions for `future` more."""
        clip = NoiseClip(
            latents=torch.randn(history, *self.shape, generator=self._generator(index, "latents"))
        )
        if self.text_dim is not None:
            generator = self._generator(index, "prompt")
            tokens = torch.randint(self.shortest, self.longest + 1, (), generator=generator)
            clip["prompt"] = torch.zeros(self.text_len, self.text_dim)
            clip["prompt"][:tokens] = torch.randn(int(tokens), self.text_dim, generator=generator)
            clip["prompt_tokens"] = tokens
        if self.num_actions is not None:
            generator = self._generator(index, "actions")
            clip["actions"] = torch.randint(self.num_actions, (history + future,), generator=generator)
        return clip

    def _generator(self, index: int, what: str) -> torch.Generator:
        digest = hashlib.sha256(f"{what} {self.seed} {index}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
