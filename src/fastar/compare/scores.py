"""What is logged of a rollout, chunk by chunk and clip by clip, whatever the protocol."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from fastar.attention.events import Recorder
from fastar.compare import words
from fastar.compare.clips import AnyClips, Clips
from fastar.compare.prompted import PromptedClip
from fastar.compare.screen import joined, pixel_part
from fastar.compare.session import Session
from fastar.metrics.block_fill import FillRecorder
from fastar.metrics.density import DensityRecorder, dense_bytes, dense_slots
from fastar.metrics.fidelity import frame_psnr
from fastar.metrics.prompt_tokens import PromptRecorder
from fastar.metrics.quality import VideoScore, quality_rows
from fastar.results.run import Run
from fastar.rollout.rollout import NonFiniteError, Rollout

WHOLE_CLIP = frozenset({"vmaf"})
"""Metrics that look at consecutive frames, or start a program: taken once a clip, not per chunk."""


class Scorer:
    """Logs one run's quality and cost to the store; of clips without pixels, what latents tell.

    Args:
        metrics: distances to the reference video, (pred, target) -> score, and measures of a video by itself.
        reference: latents [B, n, C, h, w] of the dense rollout, or None where there is none to compare with.
        keep_words: keep which phrases of the first clip's prompt were read, for a picture.
    """

    def __init__(
        self,
        run: Run,
        session: Session,
        clips: AnyClips | PromptedClip,
        metrics: Mapping[str, Metric],
        reference: Tensor | None,
        *,
        keep_words: bool = False,
    ) -> None:
        self.run, self.session, self.clips = run, session, clips
        alone = {name: metric for name, metric in metrics.items() if isinstance(metric, VideoScore)}
        self.quality = {name: metric.to(session.device) for name, metric in alone.items()}
        self.metrics = {name: metric for name, metric in metrics.items() if name not in alone}
        self.reference, self.keep_words = reference, keep_words
        config = session.backbone.config
        self.tokens = config.tokens_per_frame
        self.density = DensityRecorder(tokens_per_frame=self.tokens)
        self.fill = FillRecorder()
        truth = clips.relevance if isinstance(clips, Clips) else None
        self.prompt = None if clips.prompts is None else PromptRecorder(truth)
        self.prompt_density = DensityRecorder(tokens_per_frame=self.tokens, stream="text")
        self._wanted = None if reference is None else session.screen(clips)

    @property
    def recorders(self) -> list[Recorder]:
        """What has to see the attention calls of protocol A."""
        always: list[Recorder] = [self.density, self.fill]
        return always if self.prompt is None else [*always, self.prompt_density, self.prompt]

    def counters(self, capture: bool) -> list[Recorder]:
        """What has to see the attention calls of protocols B and C; nothing sees those of captured passes."""
        return [] if capture else [self.density]

    def started(self, rollout: Rollout) -> None:
        """Record which engine `auto` became, why not one that is known to be faster, and how the cache is read."""
        self.run.summary["engine"] = rollout.state.engine
        if rollout.state.passed_over:
            self.run.summary["engines_passed_over"] = rollout.state.passed_over
        if rollout.state.engine_for_few_keys:
            self.run.summary["engine_for_few_keys"] = rollout.state.engine_for_few_keys
        read = rollout.state.reading.record
        self.run.summary.update({name: how for name, how in read.items() if how is not None})

    def chunk(self, first: int, latents: Tensor, shown: Tensor | None) -> None:
        """Quality of the chunk [B, n, C, h, w] at frame `first`, shown as uint8 [B, F, H, W, 3] or not at all."""
        if not torch.isfinite(latents).all():
            raise NonFiniteError(f"frames {first}-{first + latents.shape[1] - 1} contain NaN or infinity")
        start = first - self.clips.prefill
        part = slice(start, start + latents.shape[1])
        scores: dict[str, list[float]] = {}
        if shown is not None and self.clips.truth is not None:
            frames = pixel_part(first, latents.shape[1], self.clips.prefill, self.session.stride)
            scores["psnr/truth"] = frame_psnr(shown, self.clips.truth[:, frames]).mean(dim=1).tolist()
        if self.reference is not None:
            wanted = self.reference[:, part]
            if shown is not None and self._wanted is not None:
                self._wanted.follow(self.reference, first, self.clips.prefill)
                target = self._wanted.preview(wanted)
                assert target is not None
                for name in self.metrics.keys() - WHOLE_CLIP:
                    scores[name] = self._per_clip(name, shown, target)
            error = (latents - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
            scores["latent_error"] = error.tolist()
        self._log(scores, chunk=start // self.session.chunk, frame=first)

    def cost(self, first: int, rollout: Rollout) -> None:
        """Density, slots and bytes after the chunk at frame `first`; bytes are per video, with guidance both caches.

        Before anything is committed, in A and B from frame 0 on, there is nothing to have a share of: none is told.
        """
        cache, batch = rollout.state.cache, len(rollout.seeds)
        transformer = self.session.backbone.config.transformer
        slots = dense_slots(frames=rollout.next_frame, tokens_per_frame=self.tokens)
        dense = dense_bytes(
            frames=rollout.next_frame, tokens_per_frame=self.tokens, layers=transformer.num_layers,
            batch=cache.spec.batch, heads=transformer.num_heads, head_dim=transformer.head_dim,
        )  # fmt: skip
        values = {
            "cache_bytes": cache.bytes_used() / batch,
            "cache_slots": float(cache.slots_used()),
        }
        if rollout.next_frame:
            values |= {"byte_share": cache.bytes_used() / dense, "slot_share": cache.slots_used() / slots}
        if any(recorder is self.density for recorder in rollout.state.recorders):
            values["density"] = self.density.curve()[-1].density
        self.run.log(values, chunk=(first - self.clips.prefill) // self.session.chunk, frame=first)

    def selection(self, first: int) -> None:
        """What the chunk at frame `first` read: prompt tokens, and how full its blocks were."""
        scores = self.fill.scores()
        if self.keep_words and self.prompt is not None and isinstance(self.clips, Clips):
            words.keep(self.run.folder, self.clips, first, self.session.chunk, self.prompt.read())
        if self.prompt is not None:
            density = self.prompt_density.curve()[-1].density
            scores |= self.prompt.scores() | {"prompt_density": [density] * self.clips.batch}
        self._log(scores, chunk=(first - self.clips.prefill) // self.session.chunk, frame=first)

    def attention(self, first: int, scores: Mapping[str, list[float]]) -> None:
        """Recall and output error of attention in the chunk at frame `first`."""
        self._log(scores, chunk=(first - self.clips.prefill) // self.session.chunk, frame=first)

    def clip(self, shown: Tensor | None) -> None:
        """Scores of whole videos, uint8 [B, F, H, W, 3], F all generated frames; none without pixels."""
        if shown is None:
            return
        scores: dict[str, list[float]] = {}
        returned = self.clips.revisit_psnr(shown) if isinstance(self.clips, Clips) else None
        if returned is not None:
            scores["revisit_psnr"] = returned.tolist()
        present = (
            self.clips.presence(shown.to(self.session.device)) if isinstance(self.clips, Clips) else None
        )
        if present is not None:
            scores["presence"] = present
        if self.reference is not None and self.metrics.keys() & WHOLE_CLIP:
            # chunk by chunk, as they were decoded when they were generated, so that the bits are the same
            screen = self.session.screen(self.clips)
            target = joined([screen.show(part) for part in self.reference.split(self.session.chunk, dim=1)])
            assert target is not None
            scores |= {name: self._per_clip(name, shown, target) for name in self.metrics.keys() & WHOLE_CLIP}
        self._log(scores)
        self._log_quality(shown)

    def _log_quality(self, shown: Tensor) -> None:
        """What is told of each video by itself, of its windows, and of these minus the first one."""
        for start, scores in quality_rows(self.quality, shown):
            if start is None:
                self._log(scores)
            else:
                self._log(scores, chunk=start // self.session.chunk, frame=self.clips.prefill + start)

    def _per_clip(self, name: str, shown: Tensor, target: Tensor) -> list[float]:
        values, metric = [], self.metrics[name]
        for pred, wanted in zip(shown, target, strict=True):
            metric.reset()
            metric.update(pred, wanted)
            values.append(float(metric.compute()))
        return values

    def _log(
        self, scores: Mapping[str, list[float]], chunk: int | None = None, frame: int | None = None
    ) -> None:
        batch = self.clips.batch
        for clip in range(batch):
            values = {name: found[clip] for name, found in scores.items()}
            self.run.log(values, clip=clip if batch > 1 else None, chunk=chunk, frame=frame)
