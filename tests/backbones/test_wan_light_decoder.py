"""A user's light decoder in place of Wan's: named by config, streamed, counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from fastar.backbones.wan.autoencoder import WanAutoencoder
from fastar.backbones.wan.light_decoder import LightAutoencoder
from tests.wan_parts import tiny_vae, write_vae


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Nine frames of two videos."""
    return torch.rand(2, 9, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def latents(pixels: Tensor) -> Tensor:
    return WanAutoencoder(tiny_vae()).encode(pixels)


class Light(nn.Module):
    """A user's decoder in small: the colours of each latent and of the one before it, without any detail."""

    def __init__(self, channels: int = 16, frames: int = 4) -> None:
        super().__init__()
        self.colours = nn.Linear(2 * channels, 3)
        self.frames = frames

    def start(self) -> Tensor | None:
        return None

    def decode(self, latents: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        first = latents[:, :1] if memory is None else memory
        pairs = torch.cat([latents, torch.cat([first, latents[:, :-1]], 1)], 2).movedim(2, -1)
        pixels = self.colours(pairs).movedim(-1, 2).repeat_interleave(self.frames, 1)
        large = pixels.repeat_interleave(8, -1).repeat_interleave(8, -2)
        return large if memory is not None else large[:, self.frames - 1 :], latents[:, -1:]


LIGHT: dict[str, Any] = {"_target_": f"{Light.__module__}.Light"}


def light(tmp_path: Path, **options: Any) -> LightAutoencoder:
    torch.manual_seed(0)
    save_file(Light().state_dict(), tmp_path / "light.safetensors")
    node = {
        "_target_": "fastar.backbones.wan.light_decoder.LightAutoencoder",
        "decoder": LIGHT,
        "checkpoint": str(tmp_path / "light.safetensors"),
    }
    made: LightAutoencoder = instantiate(OmegaConf.create(node | options))
    return made


def test_a_light_decoder_is_named_by_config_and_streams(tmp_path: Path, latents: Tensor) -> None:
    codec = light(tmp_path)
    whole = codec.decode(latents)
    assert whole.shape == (2, 9, 3, 16, 24) and codec.temporal_stride == 4 and codec.fps == 16
    stream = codec.stream()
    first = stream.decode(latents[:, :1])
    fork = stream.fork()
    assert torch.equal(torch.cat([first, stream.decode(latents[:, 1:])], 1), whole)
    assert torch.equal(fork.decode(latents[:, 1:2]), whole[:, 1:5])
    assert first.shape[1] == 1 and not codec.decoder.training
    with pytest.raises(ValueError, match=r"cannot encode a start image or video: set autoencoder\.encoder"):
        codec.encode(torch.zeros(1, 1, 3, 16, 16))


def test_wans_encoder_can_stand_before_a_light_decoder(
    tmp_path: Path, pixels: Tensor, latents: Tensor
) -> None:
    write_vae(tmp_path)
    encoder = {
        "_target_": "fastar.backbones.wan.autoencoder.WanAutoencoder.load",
        "checkpoint": str(tmp_path),
    }
    both = light(tmp_path, encoder=encoder)
    assert torch.equal(both.encode(pixels), latents)
    assert both.sha256 != light(tmp_path).sha256, "both decide what is seen"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: light(folder, decoder={"_target_": "torch.nn.Identity"}), "Identity has no start"),
        (
            lambda folder: light(folder, checkpoint=str(folder / "none.pt")),
            r"there is no checkpoint .*none\.pt",
        ),
        (lambda folder: light(folder, decoder=LIGHT | {"channels": 8}), "size mismatch"),
    ],
)
def test_decoders_that_do_not_fit_are_one_sentence(
    tmp_path: Path, make: Callable[[Path], LightAutoencoder], message: str
) -> None:
    with pytest.raises(Exception, match=message):  # Hydra wraps it, and the commands unwrap it
        make(tmp_path)


def test_frames_that_a_decoder_makes_are_counted(tmp_path: Path, latents: Tensor) -> None:
    codec = light(tmp_path, decoder=LIGHT | {"frames": 2})
    with pytest.raises(ValueError, match="of latent frames 0 to 2: they are 9 pixel frames"):
        codec.decode(latents)
