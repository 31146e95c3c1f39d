"""Teacher-forced flow matching of a causal video transformer in the latents of a frozen autoencoder."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastar.backbones.autoencoder import Autoencoder
from fastar.backbones.wan.transformer import CausalWanTransformer
from fastar.data.pixels import to_model_range
from fastar.engines.training import TeacherForcingAttend
from fastar.training.module import TimedModule


class WorldModelModule(TimedModule):
    """Velocity loss on every chunk of a clip, each given the clean history before it.

    v = noise - x0, x_t = (1 - sigma) x0 + sigma * noise as in Wan 2.1; one sigma per chunk. Two remedies
    against drift: some clips carry *labelled* noise on their history, and in some steps a part of the history is
    the model's own one-step prediction, *not* labelled, as it will be in a free rollout.

    Args:
        transformer: the backbone, trained.
        autoencoder: frozen; frames become latents here.
        chunk_frames: frames denoised together.
        shift: timestep shift s of sigma = s u / (1 + (s - 1) u), u uniform.
        history_noise: largest sigma of the labelled noise; half of the clips carry none.
        self_history_share: share of steps whose history is partly predicted, once the predictions are worth it:
        self_history_from: share of the run after which that starts.
        short_frames, short_until: until this share of the run is done, clips are cut into pieces of so many frames: the
            same frames at a fraction of the attention, for what needs no long memory to be learnt. 0 for never.
        max_first_frame: the absolute index of a clip's first frame is uniform in [0, max_first_frame].
        compile: torch.compile the transformer.
    """

    def __init__(
        self,
        transformer: CausalWanTransformer,
        autoencoder: Autoencoder,
        *,
        chunk_frames: int,
        shift: float,
        history_noise: float,
        self_history_share: float,
        self_history_from: float,
        short_frames: int,
        short_until: float,
        max_first_frame: int,
        compile: bool,
        **limits: Any,
    ) -> None:
        super().__init__(**limits)
        self.transformer = transformer
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        if short_until > 0 and (short_frames < chunk_frames or short_frames % chunk_frames):
            raise ValueError(
                f"training.transformer.short_frames must be a multiple of {chunk_frames} frames, got {short_frames}"
            )
        self.chunk_frames, self.shift = chunk_frames, shift
        self.short_frames, self.short_until = short_frames, short_until
        self.history_noise = history_noise
        self.self_history_share, self.self_history_from = self_history_share, self_history_from
        self.max_first_frame, self.compile_transformer = max_first_frame, compile
        self._attend: TeacherForcingAttend | None = None

    def on_fit_start(self) -> None:
        if self.compile_transformer:
            torch._dynamo.config.optimize_ddp = False  # DDP's graph splitting refuses FlexAttention
            self.transformer.compile(dynamic=False)  # clips have one of two lengths

    def train(self, mode: bool = True) -> "WorldModelModule":
        super().train(mode)
        self.autoencoder.eval()
        return self

    def compute_loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels, actions, text = batch["frames"], batch["actions"], batch.get("prompt")
        if self.share_done < self.short_until:
            clips = len(pixels)
            pixels, actions = (_in_pieces(x, self.short_frames) for x in (pixels, actions))
            text = None if text is None else text.repeat_interleave(len(pixels) // clips, dim=0)
        with torch.no_grad():
            clean = self.autoencoder.encode(to_model_range(pixels)).float()
        frames = clean.shape[1]
        attend = self._attend_for(clean)
        attend.place(int(torch.randint(self.max_first_frame + 1, ()).item()))

        conditions = self._conditions(actions)
        sigma = self._draw_sigma(clean)
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, _per_frame(sigma))
        history, history_sigma = self._noised_history(clean)
        if self.share_done >= self.self_history_from and self.draw_for_all() < self.self_history_share:
            with torch.no_grad():
                velocity = self._velocity(history, history_sigma, noisy, sigma, conditions, text, attend)
                predicted = noisy - _per_frame(sigma) * velocity
                chunk_is_predicted = torch.rand_like(sigma[:, :: self.chunk_frames]) < 0.5
                replaced = chunk_is_predicted.repeat_interleave(self.chunk_frames, dim=1)
                history = torch.where(_per_frame(replaced), predicted, history)
            torch.clear_autocast_cache()  # it holds weights cast without a graph
        velocity = self._velocity(history, history_sigma, noisy, sigma, conditions, text, attend)
        errors = functional.mse_loss(velocity, noise - clean, reduction="none").mean(dim=(2, 3, 4))
        late = errors[:, frames // 2 :].mean().detach()
        return {"loss": errors.mean(), "loss_second_half": late}

    def _velocity(
        self,
        history: Tensor,
        history_sigma: Tensor,
        noisy: Tensor,
        sigma: Tensor,
        conditions: dict[str, Tensor],
        text: Tensor | None,
        attend: TeacherForcingAttend,
    ) -> Tensor:
        timesteps = 1000.0 * torch.cat([history_sigma, sigma], dim=1)
        latents = torch.cat([history, noisy], dim=1)
        twice = {name: torch.cat([value, value], dim=1) for name, value in conditions.items()}
        out = self.transformer(latents, timesteps, attend=attend, text=text, **twice)
        return out[:, noisy.shape[1] :].float()

    def _conditions(self, actions: Tensor) -> dict[str, Tensor]:
        """What the transformer is told of each frame: its action and, if it has an odometer, where it is seen from."""
        odometer = self.transformer.odometer
        if odometer is None:
            return {"actions": actions}
        start = odometer.random_start(len(actions), actions.device)
        return {"actions": actions, "poses": odometer.advance(start, actions)}

    def _attend_for(self, clean: Tensor) -> TeacherForcingAttend:
        if self._attend is None or self._attend.num_frames != clean.shape[1]:
            self._attend = TeacherForcingAttend(
                self.transformer.rope,
                grid=self.transformer.grid_of(clean),
                num_frames=clean.shape[1],
                chunk_frames=self.chunk_frames,
                device=clean.device,
            )
        return self._attend

    def _draw_sigma(self, clean: Tensor) -> Tensor:
        chunks = clean.shape[1] // self.chunk_frames
        uniform = torch.rand(clean.shape[0], chunks, device=clean.device)
        sigma = self.shift * uniform / (1 + (self.shift - 1) * uniform)
        return sigma.repeat_interleave(self.chunk_frames, dim=1)

    def _noised_history(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        clips = torch.rand(clean.shape[0], 1, device=clean.device)
        sigma = (2 * clips - 1).clamp(min=0) * self.history_noise  # zero for half of the clips
        sigma = sigma.expand(-1, clean.shape[1])
        return torch.lerp(clean, torch.randn_like(clean), _per_frame(sigma)), sigma


def _in_pieces(clips: Tensor, frames: int) -> Tensor:
    """[B, F, ...] -> [B * (F / frames), frames, ...]."""
    if clips.shape[1] % frames:
        raise ValueError(
            f"clips of {clips.shape[1]} frames do not divide into pieces of {frames} (short_frames)"
        )
    return clips.unflatten(1, (-1, frames)).flatten(0, 1)


def _per_frame(values: Tensor) -> Tensor:
    """[B, F] -> [B, F, 1, 1, 1]."""
    return values[:, :, None, None, None]
