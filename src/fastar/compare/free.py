"""Protocol C, and any rollout for its own sake: free-running, timed, resumable between chunks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastar.compare.clips import Clips
from fastar.compare.scores import Scorer
from fastar.compare.session import Session
from fastar.compare.speedup import baseline_of
from fastar.metrics.efficiency import ChunkTimes, PassTimer, PeakMemory
from fastar.results.store import Run
from fastar.rollout.method import Method
from fastar.rollout.rollout import Rollout

Advance = Callable[[], None]


@dataclass
class Generated:
    """Latents [B, n, C, h, w] and what they look like, uint8 [B, n, H, W, 3] on the CPU."""

    latents: Tensor
    shown: Tensor


def free_run(
    session: Session,
    method: Method,
    clips: Clips,
    seeds: Sequence[int],
    run: Run,
    scorer: Scorer,
    *,
    save_every: int,
    warmup_chunks: int,
    advance: Advance = lambda: None,
) -> Generated:
    """Generate the rest of `clips` from their true beginning, and log everything to `run`.

    Every `save_every` chunks the rollout's state is kept; a run that finds one goes on from there and ends at the same
    bits. `advance` is called after each chunk, also for those that an earlier process made.
    """
    timer = PassTimer(device=session.device, warmup=warmup_chunks)
    memory, baseline = PeakMemory(session.device), baseline_of(run)
    memory.start()
    rollout = session.start(method, seeds, timer=timer, recorders=[scorer.density])
    scorer.started(rollout)
    latents, shown = _begin(session, rollout, clips, run, timer)
    for _ in latents:
        advance()
    while rollout.next_frame < clips.frames.shape[1]:
        first = rollout.next_frame
        with timer.chunk(frames=session.chunk):
            chunk = rollout.step(clips.actions[:, first : first + session.chunk])
            with timer.measure("decode"):
                pixels = session.decode(chunk)
        latents.append(chunk.cpu())
        shown.append(pixels)
        number = len(latents) - 1
        times = timer.chunks[-1]
        rows = {**times.rows(), **memory.chunk_rows(), **baseline.chunk_rows(number, times.wall)}
        run.log(rows, chunk=number, frame=first)
        scorer.cost(first, rollout)
        scorer.chunk(first, chunk, pixels)
        if len(latents) % save_every == 0 and rollout.next_frame < clips.frames.shape[1]:
            state = {"rollout": rollout.state_dict(), "latents": torch.cat(latents, dim=1)}
            run.save_state({**state, "times": [asdict(chunk_times) for chunk_times in timer.chunks]})
        advance()
    run.log(timer.whole_run().rows())
    if len(timer.chunks) > timer.warmup:
        steady = timer.steady_state()
        run.log({**steady.rows("/steady"), **baseline.steady_rows(steady.end_to_end)})
    run.log(memory.rows())
    result = Generated(torch.cat(latents, 1), torch.cat(shown, 1))
    scorer.clip(result.shown)
    return result


def _begin(
    session: Session, rollout: Rollout, clips: Clips, run: Run, timer: PassTimer
) -> tuple[list[Tensor], list[Tensor]]:
    """Bring a fresh rollout to where the run is: after the true beginning, or after the chunks already made."""
    if run.has_state:
        state = run.load_state()
        rollout.load_state_dict(state["rollout"])
        timer.chunks.extend(ChunkTimes(**times) for times in state["times"])
        latents = list(state["latents"].split(session.chunk, dim=1))
        return latents, [session.decode(chunk.to(session.device)) for chunk in latents]
    start = time.perf_counter()
    rollout.prefill(session.encode(clips.frames[:, : clips.prefill]), clips.actions[:, : clips.prefill])
    run.log({"prefill_s": time.perf_counter() - start})
    return [], []
