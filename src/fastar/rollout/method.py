"""A method is a cache, two selectors and an engine; `start_rollout` puts fresh ones behind a backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastar.attention.actions import ActionStreams
from fastar.attention.events import Recorder
from fastar.attention.state import AttentionState
from fastar.backbones import Backbone, ImageCondition, Prompts
from fastar.backbones.wan.config import WanConfig
from fastar.backbones.wan.transformer import CausalWanTransformer
from fastar.cache import CachePolicy, DenseCache
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.rollout import PassTimer, Rollout
from fastar.sparsity import CrossSelector, Dense, DenseCross, Selector


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a rollout attends. Caches and selectors serve one rollout each, so a method holds their makers.

    Attributes:
        name: as it appears in tables.
        cache, self_attention, cross_attention: make a fresh policy or selector.
        engine: name of an attention engine, or `auto`.
    """

    name: str
    cache: Callable[[], CachePolicy] = DenseCache
    self_attention: Callable[[], Selector] = Dense
    cross_attention: Callable[[], CrossSelector] = DenseCross
    engine: str = "auto"


def start_rollout(
    backbone: Backbone,
    method: Method,
    *,
    loop: ChunkLoop,
    seeds: Sequence[int],
    prompts: Prompts | None = None,
    negative: Prompts | None = None,
    timer: PassTimer | None = None,
    recorders: Sequence[Recorder] = (),
    cache: CachePolicy | None = None,
    end_frame: int | None = None,
    image: ImageCondition | None = None,
    capture: bool = False,
) -> Rollout:
    """A rollout of `len(seeds)` videos at frame 0.

    Args:
        backbone: in eval mode on the device and in the dtype to compute in.
        method: what attends.
        loop: passes and noise levels.
        seeds: of the noise, one per video.
        prompts: one per video, for a backbone that reads text.
        negative: one for all videos or each, for a loop with guidance.
        timer, recorders: measure passes and attention calls.
        cache: use this policy instead of a fresh one of `method` (protocol A shares caches).
        end_frame: where the videos end; see `Rollout`.
        image: what the videos start from, for a backbone that reads one.
        capture: run what repeats as CUDA graphs; see `Rollout`.

    Raises:
        ValueError: the method selects by a prompt and the backbone reads none, or it asks a layer that is not there.
    """
    config = backbone.config
    self_selector, cross_selector = method.self_attention(), method.cross_attention()
    _check_text(method.name, config.name, config.transformer, self_selector, cross_selector)
    weight = backbone.transformer.patch_embedding.weight
    channels, rows, columns = config.latent_shape
    patch = config.transformer.patch
    state = AttentionState(
        cache=method.cache() if cache is None else cache,
        self_selector=self_selector,
        cross_selector=cross_selector,
        engine=method.engine,
        rope=backbone.transformer.rope,
        grid=(rows // patch, columns // patch),
        num_layers=config.transformer.num_layers,
        num_heads=config.transformer.num_heads,
        head_dim=config.transformer.head_dim,
        batch=len(seeds) * (1 if loop.guidance is None else 2),
        chunk_frames=loop.chunk_frames,
        compute_dtype=weight.dtype,
        device=torch.device(weight.device),
        recorders=recorders,
        actions=_action_streams(backbone.transformer),
    )
    return Rollout(
        backbone.transformer,
        state=state,
        loop=loop,
        seeds=seeds,
        latent_shape=(channels, rows, columns),
        prompts=prompts,
        negative=negative,
        timer=timer,
        end_frame=end_frame,
        image=image,
        capture=capture,
    )


def _action_streams(transformer: CausalWanTransformer) -> ActionStreams | None:
    module, rope = transformer.config.action_module, transformer.action_rope
    return None if module is None or rope is None else ActionStreams(rope, module.attention_frames)


def _check_text(
    method: str, backbone: str, sizes: WanConfig, self_selector: Selector, cross_selector: CrossSelector
) -> None:
    """A selector of words on a backbone without any would be dense, and nobody would know."""
    selects = self_selector.wants_tags or type(cross_selector) is not DenseCross
    if selects and sizes.text_dim is None:
        raise ValueError(
            f"the method '{method}' selects by a prompt and the backbone '{backbone}' reads none: use one that does, "
            "such as backbone=scenes (debug=tiny_text instead of debug=tiny)"
        )
    tag_layer, score_layers = cross_selector.tag_layer, sorted(cross_selector.score_layers or ())
    asked = {"tag_layer": [] if tag_layer is None else [tag_layer], "score_layers": score_layers}
    for name, layers in asked.items():
        for layer in layers:
            if not 0 <= layer < sizes.num_layers:
                raise ValueError(
                    f"{name} of the method '{method}' asks for layer {layer}: the backbone '{backbone}' has layers 0 "
                    f"to {sizes.num_layers - 1}"
                )
