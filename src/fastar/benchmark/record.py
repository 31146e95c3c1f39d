"""The mode `record`: real motion for the caches of the other modes, from the simulator, once."""

from __future__ import annotations

from omegaconf import DictConfig

from fastar.benchmark.page import Page, Rows
from fastar.benchmark.workload import redundancy_of
from fastar.data.recorded import load_motion


def run_record(config: DictConfig, page: Page) -> tuple[Rows, dict[str, Rows]]:
    """Write `motion.frames` video frames to `motion.folder`, then say how redundant they are."""
    from fastar.data.doom.walking import record  # needs the simulator, which no other mode does

    motion = config.motion
    page.card(
        {"folder": motion.folder}, f"{motion.frames:,} video frames of walks through fresh Doom worlds."
    )
    recording = record(
        motion.folder,
        frames=motion.frames,
        clip_frames=motion.clip_frames,
        frame_size=tuple(motion.frame_size),
        crf=motion.crf,
        seed=config.seed,
    )
    size = sum((recording.folder / clip["file"]).stat().st_size for clip in recording.clips)
    # Judged on what a tenth of the clips shows: at full size on a CPU, all of it would take longer than rendering.
    shown = load_motion(
        motion.folder, tuple(config.backbone.frame_size), page.device, limit=motion.judged_frames
    )
    row = {
        "frames": recording.frames,
        "latent_frames": recording.latent_frames,
        "clips": len(recording.clips),
        "bytes": size,
        "sha256": recording.sha256,
        **redundancy_of(shown),
    }
    page.show([{name: str(value) for name, value in row.items()}], "recording")
    return [row], {}
