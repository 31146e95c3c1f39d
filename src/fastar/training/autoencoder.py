"""Training of the small convolutional autoencoder whose latents the world model lives in."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastar.backbones.autoencoder import Autoencoder
from fastar.data.pixels import to_model_range
from fastar.training.module import TimedModule


class AutoencoderModule(TimedModule):
    """Mean squared error, with noise on the latents so that the decoder forgives a generator's small errors.

    Args:
        autoencoder: the network.
        latent_noise: standard deviation of the noise, in units of the batch's latent standard deviation.
        compile: torch.compile the encoder and the decoder.
    """

    def __init__(
        self, autoencoder: Autoencoder, *, latent_noise: float, compile: bool, **limits: Any
    ) -> None:
        super().__init__(**limits)
        self.autoencoder = autoencoder
        self.latent_noise, self.compile_networks = latent_noise, compile

    def on_fit_start(self) -> None:
        if self.compile_networks:
            self.autoencoder.encoder.compile()
            self.autoencoder.decoder.compile()

    def compute_loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = vary_appearance(to_model_range(batch["frames"]))
        raw = self.autoencoder.encode_raw(pixels)
        scale = raw.detach().float().std(dim=(0, 1, 3, 4), keepdim=True)
        noisy = raw + self.latent_noise * scale.to(raw.dtype) * torch.randn_like(raw)
        error = functional.mse_loss(self.autoencoder.decode_raw(noisy).float(), pixels)
        # a mild pull to unit scale keeps the latents from drifting; the exact statistics are measured at the end
        size = 1e-4 * raw.float().square().mean()
        psnr = 10 * torch.log10(4.0 / error.detach())  # pixels span [-1, 1]
        return {"loss": error + size, "psnr_noisy_latents": psnr}


def vary_appearance(pixels: Tensor) -> Tensor:
    """Random flips, colours and contrast, one draw for each clip of [B, F, 3, H, W] in [-1, 1].

    It is to fit pictures in general, not the training patterns: held-out worlds show others.
    """
    clips, device = pixels.shape[0], pixels.device
    for axis in (-1, -2):
        flip = torch.rand(clips, 1, 1, 1, 1, device=device) < 0.5
        pixels = torch.where(flip, pixels.flip(axis), pixels)
    order = torch.rand(clips, 3, device=device).argsort(dim=1)
    pixels = pixels.gather(2, order[:, None, :, None, None].expand_as(pixels))
    gain = torch.empty(clips, 1, 3, 1, 1, device=device).uniform_(0.6, 1.3)
    offset = torch.empty(clips, 1, 3, 1, 1, device=device).uniform_(-0.2, 0.2)
    return (pixels * gain + offset).clamp(-1, 1)


@torch.no_grad()
def measure_latents(autoencoder: Autoencoder, clips: list[Tensor], *, temper: float) -> None:
    """Store the statistics that `encode` normalises by, from `clips` ([B, F, H, W, 3] uint8 each).

    With `temper` 0 every channel gets unit variance, fine unpredictable detail as much as shapes; with 1 all channels
    share one scale, as in pixel space, and shapes drown detail. Between them a channel's normalised standard deviation
    is proportional to its own to the power `temper`; the mean variance over channels is 1.
    """
    device = next(autoencoder.parameters()).device
    latents = torch.cat(
        [autoencoder.encode_raw(to_model_range(clip.to(device))).float().flatten(0, 1) for clip in clips]
    )
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    wanted = std**temper
    autoencoder.set_latent_statistics(mean, std / (wanted / wanted.square().mean().sqrt()))
