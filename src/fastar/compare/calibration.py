"""How much each head of a backbone loses by forgetting; what experiments/calibrate.py runs."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from fastar.cache import HeadErrors
from fastar.compare.clips import check_source, load_clips
from fastar.compare.command import check_writable, progress_bar, wide_console
from fastar.compare.session import open_session
from fastar.metrics.forgetting import ForgettingProbe
from fastar.results.card import made_with
from fastar.results.files import atomic
from fastar.rollout.method import Method

SHOWN = 8  # heads that are told of, those that need the past most


@torch.inference_mode()
def calibrate(config: DictConfig) -> HeadErrors:
    """The errors of all heads, also written to `output`."""
    check_writable(Path(config.output).parent, "output")
    session, console = open_session(config), wide_console()
    check_source(config.data, config.source, session.backbone.config)
    transformer, layers = session.backbone.transformer, session.backbone.config.transformer.num_layers
    probe = ForgettingProbe(
        [transformer.get_parameter(f"blocks.{layer}.self_attn.o.weight") for layer in range(layers)],
        tokens_per_frame=session.backbone.config.tokens_per_frame,
        frames=list(config.kept_frames),
        every=config.every,
    )
    with progress_bar(console) as progress:
        task = progress.add_task("clips", total=config.clips)
        for seed in range(config.clips):
            clips = load_clips(
                config.data, config.source, [seed], prefill=config.prefill_frames, generated=config.frames
            )
            rollout = session.start(
                Method(name="dense"), [seed], prompts=clips.prompts, recorders=[probe], end_frame=clips.end
            )
            rollout.prefill(session.beginning(clips), clips.actions_in(slice(clips.prefill)))
            probe.active = True
            for _ in rollout.generate(config.frames, clips.actions_in(slice(clips.prefill, None))):
                pass
            probe.active = False
            progress.advance(task)
    errors = probe.result(session.weights)
    named = ("seed", "source", "clips", "prefill_frames", "frames", "every")
    made = made_with(session.weights, session.loop.timesteps, session.device)
    with atomic(Path(config.output)) as part:
        errors.save(part, made=made, settings={name: config[name] for name in named})
    for share, layer, head in errors.shares()[:SHOWN]:
        console.print(f"layer {layer}, head {head}: {share:.1%} of the error that forgetting makes")
    console.print(f"written: {config.output}", highlight=False, soft_wrap=True)
    return errors
