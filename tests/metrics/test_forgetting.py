"""The error of a head that forgets, against attention with a mask."""

import pytest
import torch

from fastar.attention.context import PassContext
from fastar.attention.events import AttendEvent
from fastar.metrics.forgetting import ForgettingProbe
from tests.small import DIM, HEADS, TOKENS, run, small_backbone, small_rollout


class Brute:
    """The same number, call by call, with the other heads left as they are and -inf on what is forgotten."""

    def __init__(self, projections: list[torch.Tensor], kept: int) -> None:
        self.projections, self.kept, self.errors = projections, kept, {}  # type: ignore[var-annotated]

    def on_attend(self, event: AttendEvent) -> None:
        if event.stream != "self":
            return
        logits = event.q @ event.k.mT / DIM**0.5
        past = event.k.shape[2] - event.q.shape[2]
        logits[..., : max(0, past - self.kept * TOKENS)] = -torch.inf
        forgetful = logits.softmax(-1) @ event.v
        project = self.projections[event.layer]
        full = event.out.transpose(1, 2).flatten(2) @ project.T
        for head in range(HEADS):
            mixed = event.out.clone()
            mixed[:, head] = forgetful[:, head]
            change = mixed.transpose(1, 2).flatten(2) @ project.T - full
            error = change.square().sum(-1).mean(1) / full.square().sum(-1).mean(1)
            self.errors.setdefault((event.layer, head), []).append(error.mean())


@torch.inference_mode()
def test_errors_are_those_of_masked_attention() -> None:
    backbone = small_backbone()
    projections = [block.self_attn.o.weight for block in backbone.transformer.blocks]
    frames = (1, 3, 100)
    probe = ForgettingProbe(projections, tokens_per_frame=TOKENS, frames=frames, every=1)
    probe.active = True
    brutes = [Brute(projections, kept) for kept in frames]
    run(small_rollout(backbone, seeds=(3, 4), recorders=[probe, *brutes]), history=6, generated=4)
    errors = probe.result("abc")
    assert errors.weights == "abc" and errors.shape == (len(projections), HEADS)
    for layer, curves in enumerate(errors.errors):
        for head, curve in enumerate(curves):
            expected = [float(torch.stack(brute.errors[layer, head]).mean()) for brute in brutes]
            assert curve == pytest.approx(expected, rel=1e-3, abs=1e-9)
            assert curve[0] > curve[1] > 0 and curve[2] < 1e-9


def test_it_looks_only_when_told_to_and_at_self_attention() -> None:
    probe = ForgettingProbe([torch.eye(4)], tokens_per_frame=1, frames=(1,))
    x = torch.randn(1, 1, 2, 4)
    context = PassContext.__new__(PassContext)
    for stream, active in (("self", False), ("text", True)):
        probe.active = active
        probe.on_attend(AttendEvent(stream, 0, context, x, x, x, None, None, x, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing was measured"):
        probe.result(None)
