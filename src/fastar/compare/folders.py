"""Videos that are there already, with their prompts: a folder of them, as of a benchmark, or those that runs kept."""

import csv
import hashlib
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastar.backbones.storage import sha256_of
from fastar.results.loading import find_runs

LONGEST_NAME = 180  # bytes of a prompt in the name of a file; file systems end at 255
SAMPLES = 5  # videos that VBench takes of a prompt


@dataclass(frozen=True)
class Video:
    """A file, its prompt if it is known, and the seed that made it, or its number in the folder."""

    path: Path
    prompt: str | None
    seed: int


@dataclass(frozen=True)
class Collection:
    """Videos that are scored together: those of one method and protocol, or of one folder.

    Attributes:
        labels: columns of the results.
        videos: in the order of their seeds.
    """

    labels: Mapping[str, Any]
    videos: Sequence[Video]

    @property
    def prompts_known(self) -> bool:
        """Whether every video has a prompt."""
        return all(video.prompt is not None for video in self.videos)

    def identity(self) -> list[list[str | None]]:
        """What decides the scores, as far as videos do: checksum and prompt of each."""
        return [[sha256_of(video.path), video.prompt] for video in self.videos]

    def link(self, folder: Path, *, exact: bool = False) -> dict[Video, str]:
        """Make `folder` anew, with links named as VBench wants them: `<prompt>-<number>.mp4`; without a prompt, after
        the file.

        `exact`: names must be the prompts to the letter, and at most five a prompt, since VBench looks for them.

        Raises:
            ValueError: names cannot be had like that.
        """
        if folder.exists():
            shutil.rmtree(folder)  # with the clips that VBench-Long cut earlier videos into
        folder.mkdir(parents=True)
        counts: dict[str, int] = defaultdict(int)
        names: dict[Video, str] = {}
        for video in self.videos:
            words = video.path.stem if video.prompt is None else video.prompt
            base = _file_name(words)
            if exact and (video.prompt is None or base != words):
                raise ValueError(
                    f"mode=standard finds videos by their prompts, and {video.path.name} has "
                    f"{'none' if video.prompt is None else 'one that no file can be named after'}: use mode=custom"
                )
            if exact and counts[base] == SAMPLES:
                raise ValueError(
                    f"VBench takes {SAMPLES} videos of a prompt, and there are more of '{words}'"
                )
            names[video] = f"{base}-{counts[base]}.mp4"
            counts[base] += 1
            (folder / names[video]).symlink_to(video.path.resolve())
        return names


def collect(place: Path, prompts: Path | None) -> list[Collection]:
    """The videos of a folder, or of the runs below it, one collection a method and protocol.

    Args:
        place: folder with `*.mp4` in it, or with runs. prompts: CSV with the columns video, a path from `place`, and
        prompt; or None. A folder's file must name every video;
            runs of experiments/rollout.py know their prompts themselves.

    Raises:
        ValueError: no videos are there, or the prompts do not fit them.
    """
    told = {} if prompts is None else read_prompts(prompts)
    files = sorted(place.glob("*.mp4"))
    if files:
        found = [
            Collection(
                {"method": place.resolve().name},
                [Video(path, told.get(path.name), number) for number, path in enumerate(files)],
            )
        ]
    else:
        found = _of_runs(place, told)
    every = {str(video.path.relative_to(place)): video for one in found for video in one.videos}
    strangers = sorted(told.keys() - every.keys())
    if strangers:
        raise ValueError(f"{prompts} has a prompt for {strangers[0]}, which is not in {place}")
    silent = [name for name, video in every.items() if video.prompt is None]
    if told and silent:
        raise ValueError(f"{prompts} has no prompt for {silent[0]}: add a line for it")
    return found


def read_prompts(path: Path) -> dict[str, str]:
    """Prompts by video of a CSV with the columns video and prompt.

    Raises:
        ValueError: no such file or columns, or a video is there twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"there is no file of prompts {path} ({error.strerror})") from error
    if not lines or not {"video", "prompt"} <= lines[0].keys():
        raise ValueError(
            f"{path} needs a first line with the columns video and prompt, and a line for each video"
        )
    found: dict[str, str] = {}
    for line in lines:
        if line["video"] in found:
            raise ValueError(f"{path} names {line['video']} twice")
        found[line["video"]] = line["prompt"].strip()
    return found


def _of_runs(place: Path, told: Mapping[str, str]) -> list[Collection]:
    groups: dict[tuple[tuple[str, Any], ...], list[Video]] = defaultdict(list)
    for run, summary in find_runs(place):
        seeds = summary["seed"] if isinstance(summary["seed"], list) else [summary["seed"]]
        for seed in seeds:
            for name in (f"generated_seed{seed}.mp4", "rollout.mp4"):
                path = run / "videos" / name
                if summary["status"] == "done" and path.exists():
                    prompt = told.get(str(path.relative_to(place)), _prompt_of(summary["config"]))
                    groups[tuple(sorted(summary["labels"].items()))].append(Video(path, prompt, seed))
    if not groups:
        raise ValueError(
            f"no videos in {place}: name a folder of .mp4 files, or of runs that kept theirs (videos=...)"
        )
    for labels, videos in groups.items():
        if len({video.seed for video in videos}) < len(videos):
            raise ValueError(
                f"several runs in {place} have the method {dict(labels).get('method')} and the same seed, and no label "
                "tells them apart: name a folder with one kind of them"
            )
    return [
        Collection(dict(labels), sorted(videos, key=lambda video: video.seed))
        for labels, videos in groups.items()
    ]


def _prompt_of(config: Mapping[str, Any]) -> str | None:
    """The words of a video that was made from one prompt (`Storyboard.plain`); None if there were none, or several."""
    prompts = config.get("prompts")
    if not prompts or len(prompts) > 1:
        return None
    return " ".join(text for _, text in prompts[0]["shots"])


def _file_name(words: str) -> str:
    """`words` if a file can be called so; or their beginning and a checksum."""
    safe = words.replace("/", " ").replace("\0", " ")
    raw = safe.encode()
    if safe == words and len(raw) <= LONGEST_NAME and not words.startswith("."):
        return words
    start = raw[: LONGEST_NAME - 9].decode(errors="ignore").lstrip(".")
    return f"{start}_{hashlib.sha256(words.encode()).hexdigest()[:8]}"
