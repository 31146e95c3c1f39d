"""Shapes, normalisation and size of the autoencoder, and that it can learn a picture."""

import pytest
import torch

from fastar.backbones.autoencoder import Autoencoder, AutoencoderConfig

SMALL = AutoencoderConfig(
    encoder_widths=(16, 16, 32),
    encoder_blocks=(1, 0, 1),
    decoder_widths=(16, 32, 32),
    decoder_blocks=(0, 1, 1),
)


def make(config: AutoencoderConfig = SMALL) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(config)


@torch.no_grad()
def test_frames_become_latents_of_an_eighth_and_come_back() -> None:
    model = make()
    latents = model.encode(torch.rand(2, 3, 3, 24, 40) * 2 - 1)
    assert latents.shape == (2, 3, 16, 3, 5)
    assert model.decode(latents).shape == (2, 3, 3, 24, 40)


@torch.no_grad()
def test_frames_are_coded_one_by_one() -> None:
    model = make()
    pixels = torch.rand(2, 3, 3, 16, 24) * 2 - 1
    latents = model.encode(pixels)
    alone = model.encode(pixels[1:, 2:])
    torch.testing.assert_close(alone, latents[1:, 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(alone), model.decode(latents)[1:, 2:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_statistics_normalise_the_latents_and_decoding_undoes_them() -> None:
    model = make()
    pixels = torch.rand(4, 8, 3, 16, 24) * 2 - 1
    raw = model.encode_raw(pixels)
    bare = model.decode_raw(raw)
    model.set_latent_statistics(raw.mean((0, 1, 3, 4)), raw.std((0, 1, 3, 4)))
    latents = model.encode(pixels)
    torch.testing.assert_close(latents.mean((0, 1, 3, 4)), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std((0, 1, 3, 4)), torch.ones(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(latents), bare, rtol=0, atol=1e-5)
    assert {"latent_mean", "latent_std"} <= set(model.state_dict())


def test_it_learns_to_copy_a_picture() -> None:
    model = make()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 4, 4, generator=generator) * 2 - 1
    pixels = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear").unsqueeze(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (model.decode_raw(model.encode_raw(pixels)) - pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_default_size_has_the_heavier_decoder_and_about_a_million_parameters() -> None:
    model = Autoencoder(AutoencoderConfig())
    encoder, decoder = (sum(p.numel() for p in m.parameters()) for m in (model.encoder, model.decoder))
    assert 0.9e6 < encoder + decoder < 1.1e6
    assert decoder > encoder


def test_shapes_and_statistics_that_do_not_fit_are_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match="multiples of 8 pixels on each side, got 20x24"):
        model.encode(torch.zeros(1, 1, 3, 20, 24))
    with pytest.raises(ValueError, match=r"pixels must be \[batch, frames, 3"):
        model.encode(torch.zeros(1, 3, 16, 24))
    with pytest.raises(ValueError, match=r"latents must be \[batch, frames, 16"):
        model.decode(torch.zeros(1, 1, 8, 2, 3))
    with pytest.raises(ValueError, match="16 finite numbers"):
        model.set_latent_statistics(torch.zeros(8), torch.ones(8))
    with pytest.raises(ValueError, match="constant"):
        model.set_latent_statistics(torch.zeros(16), torch.zeros(16))
    with pytest.raises(ValueError, match="multiples of 16, got 24"):
        AutoencoderConfig(decoder_widths=(16, 24, 32))
    with pytest.raises(ValueError, match="three numbers"):
        AutoencoderConfig(encoder_blocks=(1, 1))


def test_fit_linear_is_the_projection_on_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(192, 192, generator=generator) * torch.linspace(1, 0, 192) ** 4
    patches = (
        torch.randn(64, 192, generator=generator) @ mixing.T / 60
    )  # few directions hold most of the variance
    pixels = torch.nn.functional.fold(patches.T[None], (64, 64), 8, stride=8)
    autoencoder = Autoencoder(AutoencoderConfig(latent_channels=16))
    autoencoder.fit_linear(pixels)
    with torch.no_grad():
        restored = autoencoder.decode_raw(autoencoder.encode_raw(pixels[None]))[0]
    centred = patches - patches.mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    expected = centred @ vectors[:16].T @ vectors[:16] + patches.mean(0)
    assert torch.allclose(
        restored, torch.nn.functional.fold(expected.T[None], (64, 64), 8, stride=8)[0], atol=1e-4
    )
    assert (
        0.1 < values[16:].square().sum() / values.square().sum() < 0.9
    )  # something is kept, something is lost
