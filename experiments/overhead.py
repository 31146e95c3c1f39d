"""What the store and W&B (offline) cost a free-running rollout: one line of JSON.

    python experiments/overhead.py --seconds 600

The Doom backbone with the window cache rolls on over noise, on the CPU, for about so many seconds; every call of the
run into the store and its sinks is timed, and the CPU time of wandb's threads and of its service is added up. Imports
that the run's thread makes are over by then; wandb's own, in its thread, counts. The folder is temporary.

    run_s                wall time from opening the run to its end
    calls_s              of that, inside calls of store and sinks, by call; state: `save_state` alone
    share                calls_s / run_s: what the run waited
    threads_cpu_s, service_cpu_s    CPU time of the process's other Python threads, and of the service process
    background_share     their sum / run_s: share of one core
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMED = ("log", "save_state", "complete")
TRIAL = 12  # chunks that tell how fast this machine is


class Calls:
    """Times the run's calls into the store; a call inside another counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def wrap(self, owner: type, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return original(*arguments, **options)
            self._inside, start = True, time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                self._inside = False
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)


def main() -> None:
    """A short trial, then the measured run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the measured run")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--logger", default="wandb", help="file of conf/logger")
    parser.add_argument("--save-every", type=int, default=10, help="chunks between saved states")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments, folder)), flush=True)


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The measured run's record."""
    import psutil
    from hydra import compose, initialize_config_dir

    from fastar.compare import methods as method_nodes
    from fastar.compare.session import open_session
    from fastar.results import Run, RunStore
    from fastar.results.provenance import code_of, environment

    overrides = ["method=window", f"logger={arguments.logger}", f"threads={arguments.threads}", "device=cpu",
                 f"paths.checkpoints={ROOT / 'checkpoints'}", f"paths.outputs={folder}"]  # fmt: skip
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        config = compose("rollout", overrides=overrides)
    session = open_session(config)
    [(name, node)] = method_nodes.resolved(config).items()
    method = method_nodes.method_of(name, node)
    trial = roll(config, session, method, TRIAL, "none", arguments.save_every)
    chunks = max(TRIAL, round(TRIAL * arguments.seconds / trial))

    calls, process = Calls(), psutil.Process()
    calls.wrap(RunStore, "open")
    for call in TIMED:
        calls.wrap(Run, call)
    seconds = roll(config, session, method, chunks, arguments.logger, arguments.save_every)
    if arguments.logger == "wandb":
        from fastar.results.sinks.wandb_sink import worker

        if not worker().flush(120):
            raise SystemExit("error: wandb did not finish within 120 s")
    python = {thread.native_id for thread in threading.enumerate()} - {threading.main_thread().native_id}
    threads = sum(times.user_time + times.system_time for times in process.threads() if times.id in python)
    service = sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))
    made = environment()
    return {
        "logger": arguments.logger,
        "run_s": round(seconds, 3),
        "chunks": chunks,
        "fps": round(chunks * session.chunk / seconds, 3),
        "calls_s": {name: round(spent, 4) for name, spent in calls.seconds.items()},
        "share": round(sum(calls.seconds.values()) / seconds, 5),
        "threads_cpu_s": round(threads, 3),
        "service_cpu_s": round(service, 3),
        "background_share": round((threads + service) / seconds, 5),
        "torch_threads": arguments.threads,
        "save_every": arguments.save_every,
        **{key: made[key] for key in ("time", "cpu", "cores")},
        "code": code_of(made),
    }


def roll(config: Any, session: Any, method: Any, chunks: int, logger: str, save_every: int) -> float:
    """Seconds of a run of `chunks` chunks."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from fastar.compare.clips import Clips
    from fastar.compare.free import free_run
    from fastar.compare.scores import Scorer
    from fastar.results import RunStore

    prefill, frames = config.prefill_frames, config.prefill_frames + chunks * session.chunk
    noise = torch.randint(0, 256, (1, 1, *config.backbone.frame_size, 3), dtype=torch.uint8)
    clips = Clips(noise.expand(1, frames, -1, -1, -1), torch.ones(1, frames, dtype=torch.long), prefill)
    sink = instantiate(OmegaConf.load(ROOT / f"conf/logger/{logger}.yaml"))
    store = RunStore(config.paths.outputs, "overhead", sinks=[sink])
    start = time.perf_counter()
    with store.open({"chunks": chunks, "logger": logger}, seed=0, labels={"method": method.name}) as run:
        scorer = Scorer(run, session, clips, {}, None)
        free_run(session, method, clips, [0], run, scorer, save_every=save_every, warmup_chunks=4)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
