"""Every file of the three config groups builds what it names, with every field of its class spelled out."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from fastar import engines
from fastar.sparsity import CrossSelector, DenseCross, PromptKeys, Selector
from fastar.sparsity.base import ScheduleOptions

from .conftest import denoise

CONF = Path(__file__).resolve().parents[2] / "conf"


def files(group: str) -> list[Path]:
    return sorted((CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("path", files("self_attention"), ids=lambda path: path.stem)
def test_self_attention(path: Path) -> None:
    assert isinstance(instantiate(OmegaConf.load(path)), Selector)


@pytest.mark.parametrize("path", files("cross_attention"), ids=lambda path: path.stem)
def test_cross_attention(path: Path) -> None:
    selector = instantiate(OmegaConf.load(path))
    assert isinstance(selector, CrossSelector)
    q, k = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 12, 16)
    prompt = PromptKeys(k, torch.ones(k.shape[:3], dtype=torch.bool))
    for context in (denoise(0, 4), denoise(3, 4)):
        selector.observe(0, context, q, prompt)
    keep = selector.select(0, denoise(3, 4), q, prompt)
    assert (keep is None) == isinstance(selector, DenseCross)
    assert keep is None or (keep.shape == k.shape[:3] and keep.dtype == torch.bool)
    assert not selector.tags_tokens or selector.tag(q, prompt).shape == q.shape[:3]


@pytest.mark.parametrize("path", files("engine"), ids=lambda path: path.stem)
def test_engine(path: Path) -> None:
    choice = instantiate(OmegaConf.load(path))
    assert choice.name == path.stem
    if path.stem in ("cudnn", "fa4", "flashinfer"):
        with pytest.raises(ValueError, match="it runs on cuda, not on cpu"):
            choice.resolve("cpu")
    else:
        assert choice.resolve("cpu") in engines.names()


@pytest.mark.parametrize(
    "path",
    [*files("self_attention"), *files("cross_attention"), *files("engine")],
    ids=lambda path: path.stem,
)
def test_fields_are_complete(path: Path) -> None:
    """A field that a file leaves out could not be swept without knowing the source."""
    config = OmegaConf.load(path)
    parameters = inspect.signature(get_class(config._target_)).parameters.values()
    fields = {given.name for given in parameters if given.kind is not given.VAR_KEYWORD}
    if len(fields) < len(parameters):  # **schedule
        fields |= set(ScheduleOptions.__annotations__)
    assert fields == set(config) - {"_target_"}
