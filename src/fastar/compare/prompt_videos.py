"""A video of every prompt of a file, named as VBench wants them; experiments/rollout.py on data with prompts."""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from fastar.compare import methods as method_nodes
from fastar.compare.command import CAN_BE_PUT_RIGHT, check_writable, progress_bar, wide_console
from fastar.compare.free import free_run
from fastar.compare.prompt_clips import (
    PromptClips,
    avoided_by,
    given_frames,
    identity_of,
    part_of_set,
    prompt_clips,
)
from fastar.compare.scores import Scorer
from fastar.compare.session import Session, open_session
from fastar.compare.single import one_method, run_arguments, store_of
from fastar.compare.starts import image_encoder_of
from fastar.data.prompt_sets import PromptEntry, PromptSet
from fastar.data.video import write_mp4
from fastar.results import Run, run_id
from fastar.results.files import Unwritable, atomic
from fastar.results.lock import RunLocked
from fastar.results.logtail import sentence_of, unwrapped
from fastar.sweep.records import JobRecord

log = logging.getLogger(__name__)

LONGEST_STEM = 220  # bytes of a prompt in a file name: file systems take 255 in all
VIDEO = "rollout.mp4"  # in the folder of its run
INDEX = ("file", "prompt", "id", "seed", "run_id", "prompts_sha256")


@dataclass(frozen=True)
class Video:
    """One video to be made: which prompt, from which noise, and the file it becomes."""

    entry: PromptEntry
    seed: int
    file: str


def roll_prompts(config: DictConfig, record: JobRecord | None = None) -> Path:
    """The folder with the videos. Each is a run of the store, found, resumed or made; prompts are encoded first.

    Raises:
        FileNotFoundError, ValueError: settings or files that make no sense; or, when the rest is done, the reason why
            some video could not be made.
    """
    name, node = one_method(config)
    if config.backbone.transformer.get("text_dim") is None:
        raise ValueError(
            f"the backbone '{config.backbone.name}' reads no prompts: leave data={config.data.name} out"
        )
    console = wide_console()
    check_writable(Path(config.paths.outputs) / config.name)
    chosen = part_of_set(config.data)
    wanted = videos_of(chosen, config.seed, config.videos_per_prompt)
    encoder = instantiate(config.data.encoder)
    avoided = avoided_by(config)
    negative = [] if avoided is None else [avoided]
    encoder.prepare(
        [entry.text for entry in chosen.entries] + negative
    )  # before the backbone takes its memory
    images = image_encoder_of(config.data, config.backbone)
    session = open_session(config)
    session.eyes()
    generated = session.backbone.config.context_frames if config.frames is None else config.frames
    settings: dict[str, Any] = {"generated": generated, "prefill": config.prefill_frames}

    def arguments(video: Video) -> dict[str, Any]:
        given = given_frames([video.entry], session.backbone.config, **settings)
        known = None if images is None else images.sha256
        clip = identity_of([video.entry], encoder.sha256, known, avoided, generated=generated, prefill=given)
        labels = {"prompt": video.entry.id, "prompts_sha256": chosen.sha256[:12]}
        return run_arguments(config, session, name, node, clip, video.seed, labels)

    if record is not None:
        record.plan([_planned(arguments(video), video) for video in wanted])
    folder = _folder(config, session, name, node)
    problems, made = [], dict[str, str]()
    with progress_bar(console) as progress:
        task = progress.add_task(name, total=len(wanted) * generated // session.chunk)
        for video in wanted:
            start = progress.tasks[task].completed
            try:
                with store_of(config).open(**arguments(video), device=session.device) as run:
                    if not run.finished:
                        backbone, stride = session.backbone.config, session.stride
                        clips = prompt_clips(
                            [video.entry],
                            encoder,
                            backbone,
                            stride=stride,
                            images=images,
                            avoided=avoided,
                            **settings,
                        )
                        advance = partial(progress.advance, task)
                        _make(config, session, name, node, clips, video, run, advance=advance)
                made[video.file] = run.run_id
                _link(run.videos / VIDEO, folder / video.file)
            except RunLocked as error:
                log.info("%s", error)
            except Unwritable:
                raise
            except Exception as error:  # the other prompts are not to blame
                if not isinstance(unwrapped(error), (*CAN_BE_PUT_RIGHT, RuntimeError, MemoryError)):
                    log.exception("%s", video.file)  # a fault of the code
                problems.append(f"{video.file}: {sentence_of(error)}")
                progress.console.print(problems[-1], highlight=False, markup=False)
            progress.update(task, completed=start + generated // session.chunk)
    _write_index(folder, wanted, made, chosen)
    _tell(console, folder, made, wanted)
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(wanted)} videos could not be made; the first, {problems[0]}"
        )
    return folder


def videos_of(chosen: PromptSet, seed: int, each: int) -> list[Video]:
    """`each` videos of every prompt, from seeds that follow each other, `seed` first unless the prompt has its own.

    A file is called `<prompt>-<seed>.mp4`. A prompt that is no file name (too long, or with a slash), or whose file
    another entry has, is called by the entry's id.

    Raises:
        ValueError: no videos were asked for.
    """
    if each < 1:
        raise ValueError(f"videos_per_prompt must be at least 1, got {each}")
    made = [
        (entry, first + number)
        for entry in chosen.entries
        for first in [seed if entry.seed is None else entry.seed]
        for number in range(each)
    ]
    uses = Counter((entry.prompt, number) for entry, number in made)

    def stem(entry: PromptEntry, number: int) -> str:
        fits = len(entry.prompt.encode()) <= LONGEST_STEM and not set(entry.prompt) & set("/\\\0\n\r")
        plain = fits and uses[entry.prompt, number] == 1 and not entry.prompt.startswith(".")
        return entry.prompt if plain else entry.id.replace("/", "_")

    return [Video(entry, number, f"{stem(entry, number)}-{number}.mp4") for entry, number in made]


def _make(
    config: DictConfig,
    session: Session,
    name: str,
    node: Mapping[str, Any],
    clips: PromptClips,
    video: Video,
    run: Run,
    *,
    advance: Any,
) -> None:
    scorer = Scorer(run, session, clips, {}, None)
    result = free_run(
        session, method_nodes.method_of(name, node), clips, [video.seed], run, scorer,
        save_every=config.save_every, warmup_chunks=config.warmup_chunks, advance=advance,
    )  # fmt: skip
    assert result.shown is not None
    path = write_mp4(run.videos / VIDEO, result.shown[0], fps=session.eyes().fps)
    for sink in run.sinks:
        sink.video(path.stem, path)


def _planned(arguments: Mapping[str, Any], video: Video) -> dict[str, Any]:
    key = {name: value for name, value in arguments.items() if name not in ("config", "labels")}
    return {"run_id": run_id(arguments["config"], **key), "seeds": [video.seed], **arguments["labels"]}


def _folder(config: DictConfig, session: Session, name: str, node: Mapping[str, Any]) -> Path:
    """Where the videos of these settings come together, whatever prompts they are of."""
    shared = run_arguments(config, session, name, node, {"frames": config.frames}, 0, {})
    digest = run_id(shared["config"], seed=0, checkpoint_sha256=session.weights)
    folder = Path(config.paths.outputs) / config.name / f"videos_{name}_{digest[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _link(video: Path, path: Path) -> None:
    """The same file under another name; a copy where the file system knows no such thing."""
    part = path.with_name(f".{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(video, part)
    except OSError:
        shutil.copyfile(video, part)
    part.replace(path)


def _write_index(folder: Path, wanted: Sequence[Video], made: Mapping[str, str], chosen: PromptSet) -> None:
    """videos.csv: which prompt, seed and run each video of the folder is; earlier commands' are kept."""
    path = folder / "videos.csv"
    rows: dict[str, Sequence[Any]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = {row[0]: row for row in list(csv.reader(file))[1:] if row}
    for video in wanted:
        if video.file in made:
            entry = video.entry
            rows[video.file] = (
                video.file,
                entry.prompt,
                entry.id,
                video.seed,
                made[video.file],
                chosen.sha256,
            )
    with atomic(path, shared=True) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([INDEX, *rows.values()])


def _tell(console: Console, folder: Path, made: Mapping[str, str], wanted: Sequence[Video]) -> None:
    console.print(f"{len(made)} of {len(wanted)} videos: {folder}", highlight=False, soft_wrap=True)
