"""Losses of the two stages: what the targets are, what history looks like, and that they fall."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastar.data.pixels import to_model_range
from fastar.training.autoencoder import measure_latents, vary_appearance
from fastar.training.module import TimedModule
from tests.training.small import MovingBars, autoencoder_model, fresh_backbone, world_model


def batch(clips: int = 4) -> dict[str, Tensor]:
    made = list(MovingBars().numbered(range(clips)))
    return {name: torch.stack([clip[name] for clip in made]) for name in ("frames", "actions")}


def descend(module: TimedModule, data: dict[str, Tensor], steps: int) -> list[float]:
    """Plain optimisation without a trainer."""
    optimizers, losses = module.configure_optimizers(), []
    module.train()
    for _ in range(steps):
        loss = module.compute_loss(data)["loss"]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_a_fresh_world_model_is_off_by_the_target_itself() -> None:
    """It predicts zero, so its loss is the mean square of noise - clean: 1 + the latents' own."""
    backbone, data = fresh_backbone(), batch()
    assert backbone.autoencoder is not None
    measure_latents(backbone.autoencoder, [data["frames"]], temper=0.0)
    with torch.no_grad():
        clean = backbone.autoencoder.encode(to_model_range(data["frames"]))
        loss = world_model(backbone).compute_loss(data)["loss"]
    assert clean.square().mean() == pytest.approx(1.0, abs=0.05)
    assert loss == pytest.approx(1 + float(clean.square().mean()), rel=0.1)


def test_training_lowers_the_loss_of_the_world_model() -> None:
    backbone, data = fresh_backbone(), batch()
    assert backbone.autoencoder is not None
    measure_latents(backbone.autoencoder, [data["frames"]], temper=0.0)
    frozen = {name: tensor.clone() for name, tensor in backbone.autoencoder.state_dict().items()}
    losses = descend(world_model(backbone), data, 40)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(
        torch.equal(frozen[name], tensor) for name, tensor in backbone.autoencoder.state_dict().items()
    )


def test_every_piece_of_a_clip_is_trained_with_the_clip_s_prompt() -> None:
    """Cut in two, with the prompt of each clip; losses of the pieces are those of clips with that prompt."""
    backbone, data = fresh_backbone(text_dim=6), batch(2)
    with torch.no_grad():
        backbone.transformer.head.head.weight.normal_(std=0.1)  # a fresh one answers nothing
    data["prompt"] = torch.randn(2, 5, 6).half()
    seen: list[Tensor] = []
    embed = backbone.transformer._embed_text
    backbone.transformer._embed_text = lambda text: seen.append(text) or embed(text)  # type: ignore[func-returns-value, method-assign]
    world_model(backbone, short_until=1.0, short_frames=4).compute_loss(data)["loss"].backward()
    assert torch.equal(seen[0], data["prompt"][[0, 0, 1, 1]])
    gradient = backbone.transformer.text_embedding[0].weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_training_lowers_the_loss_of_the_autoencoder() -> None:
    losses = descend(autoencoder_model(fresh_backbone()), batch(), 40)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_noise_levels_are_one_a_chunk_and_shifted() -> None:
    module = world_model(fresh_backbone(), shift=3.0)
    sigma = module._draw_sigma(torch.zeros(2000, 8, 1, 1, 1))
    assert torch.equal(sigma[:, ::2], sigma[:, 1::2]) and not torch.equal(sigma[:, 0], sigma[:, 2])
    assert sigma.min() >= 0 and sigma.max() <= 1
    for share in (0.25, 0.5, 0.75):  # quantiles of 3 u / (1 + 2 u)
        assert float(sigma.quantile(share)) == pytest.approx(3 * share / (1 + 2 * share), abs=0.02)


def test_half_of_the_histories_are_clean_and_the_rest_carry_labelled_noise() -> None:
    module = world_model(fresh_backbone(), history_noise=0.2)
    clean = torch.zeros(1000, 4, 2, 3, 3)
    history, sigma = module._noised_history(clean)
    noisy = sigma[:, 0] > 0
    assert 0.45 < noisy.float().mean() < 0.55 and 0.19 < sigma.max() <= 0.2
    assert torch.equal(sigma, sigma[:, :1].expand_as(sigma))
    assert (history[~noisy] == 0).all()
    measured = history[noisy].flatten(1).std(dim=1)
    torch.testing.assert_close(measured, sigma[noisy, 0], rtol=0.4, atol=1e-3)


@pytest.mark.parametrize(("share_done", "passes"), [(0.0, 1), (0.49, 1), (0.5, 2), (1.0, 2)])
def test_its_own_predictions_become_history_late_in_the_run(
    share_done: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = world_model(fresh_backbone(), self_history_from=0.5, self_history_share=1.0, history_noise=0.0)
    module.share_done = share_done
    histories, velocity = [], module._velocity

    def spy(history: Tensor, history_sigma: Tensor, *rest: object) -> Tensor:
        histories.append((history, history_sigma))
        return velocity(history, history_sigma, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_velocity", spy)
    module.compute_loss(batch())["loss"].backward()
    assert len(histories) == passes
    if passes == 2:
        (clean, _), (mixed, labelled) = histories
        changed = (clean != mixed).flatten(2).any(-1)
        assert torch.equal(changed[:, ::2], changed[:, 1::2]) and 0 < changed.float().mean() < 1, (
            "whole chunks, some"
        )
        assert (labelled == 0).all() and not mixed.requires_grad


@pytest.mark.parametrize(("share_done", "frames"), [(0.0, 4), (0.29, 4), (0.3, 8), (1.0, 8)])
def test_clips_are_cut_into_pieces_early_in_the_run(share_done: float, frames: int) -> None:
    module, data = world_model(fresh_backbone(), short_frames=4, short_until=0.3), batch(clips=3)
    module.share_done = share_done
    seen: list[torch.Size] = []
    module.transformer.register_forward_pre_hook(
        lambda _, inputs, given: seen.append(torch.Size([*inputs[0].shape[:2], *given["actions"].shape])),
        with_kwargs=True,
    )
    module.compute_loss(data)
    pieces = 3 * 8 // frames
    assert seen[0] == torch.Size([pieces, 2 * frames] * 2)  # history and noisy frames


def test_pieces_must_fit() -> None:
    with pytest.raises(ValueError, match="short_frames must be a multiple of 2 frames, got 3"):
        world_model(fresh_backbone(), short_frames=3, short_until=0.5)
    module = world_model(fresh_backbone(), short_frames=6, short_until=0.5)
    with pytest.raises(ValueError, match="clips of 8 frames do not divide into pieces of 6"):
        module.compute_loss(batch())


def test_appearance_varies_between_clips_and_not_within_one() -> None:
    pixels = to_model_range(batch()["frames"])
    still = pixels[:, :1].expand_as(pixels)
    varied = vary_appearance(still)
    assert varied.shape == pixels.shape and varied.abs().max() <= 1
    assert torch.equal(varied, varied[:, :1].expand_as(varied))
    assert len({tuple(clip.flatten().tolist()) for clip in varied[:, 0]}) == len(varied)


@pytest.mark.parametrize("temper", [0.0, 0.5, 1.0])
def test_latents_are_normalised_to_mean_variance_one_with_the_spread_that_temper_asks_for(
    temper: float,
) -> None:
    autoencoder, frames = fresh_backbone().autoencoder, batch(8)["frames"]
    assert autoencoder is not None
    with torch.no_grad():
        raw = autoencoder.encode_raw(to_model_range(frames)).transpose(1, 2).transpose(0, 1).flatten(1)
        measure_latents(autoencoder, list(frames.split(2)), temper=temper)
        normalised = autoencoder.encode(to_model_range(frames)).transpose(1, 2).transpose(0, 1).flatten(1)
    torch.testing.assert_close(normalised.mean(dim=1), torch.zeros(4), rtol=0, atol=1e-4)
    assert normalised.var(dim=1).mean() == pytest.approx(1.0, rel=1e-4)
    spread, wanted = normalised.std(dim=1), raw.std(dim=1) ** temper
    torch.testing.assert_close(spread / spread[0], wanted / wanted[0], rtol=1e-3, atol=1e-3)
