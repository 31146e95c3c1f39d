"""Protocol C, and any rollout for its own sake: free-running, timed, resumable between chunks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastar import interruption
from fastar.compare.clips import AnyClips
from fastar.compare.prompted import PromptedClip
from fastar.compare.scores import Scorer
from fastar.compare.screen import Screen, joined
from fastar.compare.session import Session
from fastar.compare.speedup import baseline_of
from fastar.metrics.efficiency import ChunkTimes, PassTimer, PeakMemory
from fastar.results.run import Run
from fastar.rollout.method import Method
from fastar.rollout.rollout import Rollout

Advance = Callable[[], None]


@dataclass
class Generated:
    """Latents [B, n, C, h, w] and what they look like, uint8 [B, F, H, W, 3] on the CPU; None without pixels."""

    latents: Tensor
    shown: Tensor | None


def free_run(
    session: Session,
    method: Method,
    clips: AnyClips | PromptedClip,
    seeds: Sequence[int],
    run: Run,
    scorer: Scorer,
    *,
    save_every: int,
    warmup_chunks: int,
    advance: Advance = lambda: None,
    capture: bool = False,
) -> Generated:
    """Generate the rest of `clips` from their true beginning, or from their prompts alone, and log everything to `run`.

    Every `save_every` chunks (of a long run: every tenth of what is made), and when the process is asked to stop, the
    rollout's state is kept; a run that finds one goes on from there and ends at the same bits. `advance` is called
    after each chunk, also for those that an earlier process made. `capture`: as CUDA graphs, density unseen.

    Raises:
        Interrupted: the process was asked to stop, and the state is kept.
    """
    timer = PassTimer(device=session.device, warmup=warmup_chunks)
    memory, baseline = PeakMemory(session.device), baseline_of(run)
    memory.start()
    rollout = session.start(
        method, seeds, timer=timer, recorders=scorer.counters(capture), capture=capture, **session.told(clips)
    )
    scorer.started(rollout)
    screen: Screen = session.screen(clips)
    latents = _begin(session, rollout, clips, run, timer)
    shown = [screen.show(chunk) for chunk in latents]
    kept = len(latents)
    for _ in latents:
        advance()
    while rollout.next_frame < clips.end:
        interruption.check()
        first = rollout.next_frame
        with timer.chunk(frames=screen.frames_of(session.chunk)):
            if isinstance(clips, PromptedClip):
                clips.change(rollout, latents)
            chunk = rollout.step(clips.actions_in(session.needed(first)))
            pixels = screen.show(chunk, timer)
        latents.append(chunk.cpu())
        shown.append(pixels)
        number = len(latents) - 1
        took = timer.chunks[-1]
        rows = {**took.rows(), **memory.chunk_rows(), **baseline.chunk_rows(number, took.wall)}
        run.log(rows, chunk=number, frame=first)
        scorer.cost(first, rollout)
        scorer.chunk(first, chunk, pixels)
        # the state holds all that was made: kept at growing distances, so that long runs do not spend their time on it
        due = number + 1 - kept >= max(save_every, (number + 1) // 10) or interruption.requested()
        if due and rollout.next_frame < clips.end:
            kept, times = number + 1, [asdict(chunk_times) for chunk_times in timer.chunks]
            made = torch.cat(latents, dim=1)
            run.save_state({"rollout": rollout.state_dict(), "latents": made, "times": times})
        advance()
    run.log(timer.whole_run().rows())
    if len(timer.chunks) > timer.warmup:
        steady = timer.steady_state()
        run.log({**steady.rows("/steady"), **baseline.steady_rows(steady.end_to_end)})
    run.log(memory.rows())
    result = Generated(torch.cat(latents, 1), joined(shown))
    scorer.clip(result.shown)
    return result


def _begin(
    session: Session, rollout: Rollout, clips: AnyClips | PromptedClip, run: Run, timer: PassTimer
) -> list[Tensor]:
    """Bring a fresh rollout to where the run is: after the true beginning, or after the chunks already made: those."""
    if run.has_state:
        state = run.load_state()
        rollout.load_state_dict(state["rollout"])
        timer.chunks.extend(ChunkTimes(**times) for times in state["times"])
        return list(state["latents"].split(session.chunk, dim=1))
    if not clips.prefill:
        return []
    start = time.perf_counter()
    rollout.prefill(session.beginning(clips), clips.actions_in(slice(clips.prefill)))
    run.log({"prefill_s": time.perf_counter() - start})
    return []
