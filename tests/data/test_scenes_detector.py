"""The detector finds what was rendered, also behind blur and noise, and little else."""

import pytest
import torch
from torch.nn.functional import conv2d, pad

from fastar.data.scenes.detector import Presence, correlate, detect, presence
from fastar.data.scenes.nouns import NOUNS
from fastar.data.scenes.render import render, truth
from fastar.data.scenes.script import Script, draw_script
from fastar.data.scenes.sprites import sprites


def frames_of(script: Script) -> torch.Tensor:
    return render(script).permute(0, 3, 1, 2)


def blurred_and_noisy(frames: torch.Tensor) -> torch.Tensor:
    """Half of a 3x3 blur, then noise: about 30 dB."""
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    sharp = frames.float()
    blurred = conv2d(
        pad(sharp, (1, 1, 1, 1), mode="replicate"), torch.outer(line, line).expand(3, 1, 3, 3), groups=3
    )
    noise = torch.randn(sharp.shape, generator=torch.Generator().manual_seed(0))
    return ((sharp + blurred) / 2 + 7.4 * noise).clamp(0, 255).round().to(torch.uint8)


def share(scores: list[Presence]) -> float:
    found = sum(int((score.found & score.expected).sum()) for score in scores)
    return found / sum(int(score.expected.sum()) for score in scores)


SCRIPTS = [draw_script(index, split="heldout", frames=24) for index in range(12)]


def test_things_are_found_where_they_are() -> None:
    assert share([presence(frames_of(script), script) for script in SCRIPTS]) >= 0.97


def test_things_are_found_in_worse_pictures() -> None:
    worse = [blurred_and_noisy(frames_of(script)) for script in SCRIPTS]
    error = (
        torch.cat([w.float() - frames_of(s).float() for w, s in zip(worse, SCRIPTS, strict=True)])
        .square()
        .mean()
    )
    assert 29 < 10 * torch.log10(255**2 / error) < 31
    assert share([presence(w, script) for w, script in zip(worse, SCRIPTS, strict=True)]) >= 0.97


def test_little_is_found_of_another_script() -> None:
    others = SCRIPTS[1:] + SCRIPTS[:1]
    assert share([presence(frames_of(a), b) for a, b in zip(SCRIPTS, others, strict=True)]) < 0.1


def test_scores_peak_at_the_true_place() -> None:
    script = draw_script(3, frames=24)
    found = truth(script)
    frame, actor = (found.visible == 1).nonzero()[0].tolist()
    shot, phase = script.timecode()[frame]
    thing = script.shots[shot].actors[actor]
    names = (thing.noun, next(noun for noun in NOUNS if noun != thing.noun))
    scores = detect(frames_of(script)[frame : frame + 2], names, (thing.size,))
    assert scores.shape == (2, 2, 1, 96, 128) and scores.abs().max() <= 1
    y, x = divmod(int(scores[0, 0, 0].argmax()), 128)
    side = sprites(thing.size).shape[1]
    assert (x - side // 2, y - side // 2) == thing.corner(phase, script.shots[shot].camera)
    assert scores[0, 0].max() > 0.95 > scores[0, 1].max()


def test_correlation_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = torch.ones(1, 1, 12, 14)
    inside[..., :3, :] = 0
    image = torch.rand(1, 3, 12, 14, generator=generator) * inside
    template = torch.rand(1, 2, 4, 7, 7, generator=generator)
    scores = correlate(image, inside, template)
    assert scores.shape == (1, 2, 6, 8)
    for y, x in ((0, 0), (2, 5), (5, 7)):
        window, seen = image[0, :, y : y + 7, x : x + 7], inside[0, :, y : y + 7, x : x + 7]
        colour, weight = template[0, 1, :3], (template[0, 1, 3:] * seen).expand(3, 7, 7)
        a, b = (v - (weight * v).sum() / weight.sum() for v in (window, colour))
        expected = (weight * a * b).sum() / ((weight * a * a).sum() * (weight * b * b).sum()).sqrt()
        assert scores[0, 1, y, x].item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_share_is_of_what_is_expected_from_a_frame_on() -> None:
    expected = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    found = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    score = Presence(expected, found)
    assert score.share == score.share_from(0) == pytest.approx(3 / 6)
    assert score.share_from(1) == pytest.approx(2 / 4) and score.share_from(2) == pytest.approx(2 / 3)
    assert score.share_from(3) == 0, "nothing is expected any more"


def test_a_video_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="24 frames, the video 23"):
        presence(frames_of(SCRIPTS[0])[:23], SCRIPTS[0])
