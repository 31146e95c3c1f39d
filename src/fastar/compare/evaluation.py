"""The numbers of a backbone's model card, on held-out clips; what experiments/evaluate.py runs."""

from collections.abc import Callable

import torch
from hydra.utils import get_class
from omegaconf import DictConfig

from fastar.compare.evaluation_base import Evaluation, autoencoder_psnr
from fastar.compare.evaluation_doom import action_following, drift, memory, next_frame_psnr
from fastar.compare.evaluation_scenes import presence_of_things, presence_with_shuffled_prompts
from fastar.data.doom.dataset import DoomClips
from fastar.data.scenes.dataset import ScenesClips

Measure = Callable[[Evaluation], None]

MEASURES: dict[type | None, dict[str, Measure]] = {
    DoomClips: {
        "autoencoder": autoencoder_psnr,
        "next_frame": next_frame_psnr,
        "actions": action_following,
        "memory": memory,
        "drift": drift,
    },
    ScenesClips: {
        "autoencoder": autoencoder_psnr,
        "presence": presence_of_things,
        "shuffled": presence_with_shuffled_prompts,
    },
}
"""What can be asked of a model, by the kind of its held-out clips."""


def run(config: DictConfig) -> None:
    """Run the measures named in `measures`, or all that fit the data set, and write their results.

    Raises:
        ValueError: a measure that nobody knows or that does not fit the data set, or data without any.
    """
    chosen = chosen_measures(config)
    torch.set_float32_matmul_precision("high")
    evaluation = Evaluation(config)
    check_prompts(evaluation)
    with torch.inference_mode():
        for measure in chosen:
            measure(evaluation)


def check_prompts(ev: Evaluation) -> None:
    """Raise a ValueError if the backbone reads prompts and the data set has none, or the other way round."""
    reads = ev.backbone.config.transformer.text_dim is not None
    if reads != (_kind(ev.config) is ScenesClips):
        raise ValueError(
            f"{ev.config.checkpoint} reads {'prompts' if reads else 'no prompts'}: choose "
            f"data={'scenes' if reads else 'doom'} for it, not data={ev.config.data.name}"
        )


def chosen_measures(config: DictConfig) -> list[Measure]:
    """The functions that `measures` and `data` ask for, before anything is loaded."""
    fitting = MEASURES.get(_kind(config))
    if fitting is None:
        raise ValueError(
            f"data={config.data.name} has no held-out clips to measure on: choose data=doom or data=scenes"
        )
    names = list(fitting) if config.measures is None else config.measures
    for name in names:
        if name not in fitting:
            choices = f"choose from {', '.join(fitting)}"
            if any(name in others for others in MEASURES.values()):
                raise ValueError(f"the measure '{name}' does not fit data={config.data.name}: {choices}")
            raise ValueError(f"unknown measure '{name}': {choices}")
    return [fitting[name] for name in names]


def _kind(config: DictConfig) -> type | None:
    """The class of the held-out clips; None for data without any."""
    return get_class(config.data.heldout._target_) if "heldout" in config.data else None
