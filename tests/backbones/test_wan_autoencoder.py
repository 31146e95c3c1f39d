"""Wan's autoencoder as a stream, light decoders in its place, and where both come from."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from fastar.backbones.codec import latent_frames, pixel_frames
from fastar.backbones.wan import autoencoder as module
from fastar.backbones.wan.autoencoder import WanAutoencoder
from tests.wan_parts import tiny_vae, write_vae

# Wan 2.1's own, the last digit rounded as it was published
MEAN = [
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
]
STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382]


@pytest.fixture(scope="module")
def codec() -> WanAutoencoder:
    return WanAutoencoder(tiny_vae())


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Nine frames of two videos."""
    return torch.rand(2, 9, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def latents(codec: WanAutoencoder, pixels: Tensor) -> Tensor:
    return codec.encode(pixels)


def test_latents_are_those_of_diffusers_normalised_by_its_statistics(
    codec: WanAutoencoder, pixels: Tensor, latents: Tensor
) -> None:
    assert latents.shape == (2, 3, 16, 2, 3) and latents.dtype == torch.float32
    with torch.no_grad():
        theirs = codec.network.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        torch.testing.assert_close(latents[:, :, channel], (theirs[:, :, channel] - mean) / std)


def test_pixels_are_those_of_diffusers(codec: WanAutoencoder, latents: Tensor) -> None:
    shape = (1, -1, 1, 1, 1)
    mean, std = (
        torch.tensor(codec.network.config[f"latents_{name}"]).view(shape) for name in ("mean", "std")
    )
    with torch.no_grad():
        theirs = codec.network.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    ours = codec.decode(latents)
    assert ours.shape == (2, 9, 3, 16, 24)
    torch.testing.assert_close(ours.clamp(-1, 1), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2), (2, 1), (3,)])
def test_chunk_by_chunk_is_bit_for_bit_the_whole(
    codec: WanAutoencoder, latents: Tensor, sizes: tuple[int, ...]
) -> None:
    stream, whole = codec.stream(), codec.decode(latents)
    chunks = [stream.decode(chunk) for chunk in latents.split(list(sizes), dim=1)]
    assert torch.equal(torch.cat(chunks, 1), whole)
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    assert [chunk.shape[1] for chunk in chunks] == [
        pixel_frames(end, 4) - pixel_frames(end - size, 4) for end, size in zip(ends, sizes, strict=True)
    ]
    alone = codec.stream().decode(latents[:, 1:])
    assert not torch.equal(alone[:, -4:], whole[:, -4:]), "the past matters"


def test_a_fork_goes_its_own_way(codec: WanAutoencoder, latents: Tensor) -> None:
    stream, whole = codec.stream(), codec.decode(latents)
    stream.decode(latents[:, :1])
    for other in (torch.zeros_like(latents), latents):
        fork = stream.fork()
        fork.decode(other[:, 1:2])
        last = fork.decode(latents[:, 2:])
        assert torch.equal(last, whole[:, 5:]) == (other is latents)
    assert torch.equal(stream.decode(latents[:, 1:]), whole[:, 1:]), "the forks have changed nothing"


def test_frames_are_counted_as_wan_counts_them() -> None:
    assert [pixel_frames(n, 4) for n in (0, 1, 2, 21)] == [0, 1, 5, 81]
    assert [latent_frames(n, 4) for n in (0, 1, 4, 5, 8, 81)] == [0, 1, 1, 2, 2, 21]
    assert [pixel_frames(n, 1) for n in (0, 1, 7)] == [0, 1, 7]


@pytest.mark.parametrize(
    ("shape", "got"), [((1, 8, 3, 16, 16), "got 8 of 16x16"), ((1, 1, 3, 12, 16), "got 1 of 12x16")]
)
def test_videos_that_do_not_fit_are_refused(codec: WanAutoencoder, shape: tuple[int, ...], got: str) -> None:
    with pytest.raises(ValueError, match=got):
        codec.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"latents must be \[batch, frames, 16, rows"):
        codec.decode(torch.zeros(1, 1, 4, 2, 2))


# -- where it comes from -----------------------------------------------------------------------------------------------


def original_names(network: AutoencoderKLWan) -> dict[str, Tensor]:
    """The state dict under the names of Wan2.1_VAE.pth, found by asking diffusers what each of them becomes."""
    samples = [f"{direction}samples.{n}" for direction in ("down", "up") for n in range(16)]
    pieces = ["middle.0", "middle.1", "middle.2", "head.0", "head.2", "conv1", *samples]
    residual = [f".residual.{n}" for n in (0, 2, 3, 6)]
    layers = ["", *residual, ".shortcut", ".resample.1", ".time_conv", ".norm", ".to_qkv", ".proj"]
    names = [
        f"{half}.{piece}{layer}" for half in ("encoder", "decoder") for piece in pieces for layer in layers
    ]
    guesses = [f"{name}.{end}" for name in (*names, "conv1", "conv2") for end in ("weight", "bias", "gamma")]
    theirs = {guess: next(iter(convert_wan_vae_to_diffusers({guess: 0}))) for guess in guesses}
    state = network.state_dict()
    return {guess: state[name] for guess, name in theirs.items() if name in state and guess != name}


def test_the_original_file_and_the_diffusers_folder_give_the_same(tmp_path: Path, latents: Tensor) -> None:
    """At Wan's own numbers of blocks, which are what the original names count."""
    torch.manual_seed(0)
    network = AutoencoderKLWan(base_dim=4).eval()
    network.save_pretrained(tmp_path / "vae")
    state = original_names(network)
    assert len(state) == len(network.state_dict()) == 194
    original = tmp_path / "original"
    original.mkdir()
    torch.save(state, original / "Wan2.1_VAE.pth")
    (original / "config.json").write_text(json.dumps({"base_dim": 4}))
    (original / "diffusion_pytorch_model.safetensors").touch()
    folder, file = (WanAutoencoder.load(path, cache=tmp_path / "cache") for path in (tmp_path, original))
    assert torch.equal(folder.decode(latents), file.decode(latents))
    assert folder.sha256 != file.sha256 and len(str(folder.sha256)) == 64
    assert not any(parameter.requires_grad for parameter in file.parameters())


def test_random_weights_are_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = module._diffusers()[0]
    monkeypatch.setattr(module, "_diffusers", lambda: (lambda: kind(base_dim=4), None))
    before = torch.get_rng_state()
    first, second = (WanAutoencoder.load("random", dtype="bfloat16", fps=24) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and first.sha256 == second.sha256 and first.fps == 24
    made = [codec.decode(torch.ones(1, 1, 16, 2, 2)) for codec in (first, second)]
    assert torch.equal(*made) and made[0].dtype == torch.float32
    assert next(first.parameters()).dtype == torch.bfloat16


def test_weights_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    write_vae(tmp_path)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"does not fit AutoencoderKLWan \(Missing key") as error:
        WanAutoencoder.load(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "vae" / "config.json").write_text('{"patch_size": 2}')
    with pytest.raises(ValueError, match="does not fit AutoencoderKLWan"):
        WanAutoencoder.load(tmp_path)
    with pytest.raises(ValueError, match=r"Wan 2\.2's autoencoder"):
        WanAutoencoder(AutoencoderKLWan(base_dim=4, patch_size=2))
