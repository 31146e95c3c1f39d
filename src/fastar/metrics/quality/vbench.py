"""VBench itself (Huang et al. 2024, github.com/Vchitect/VBench), run in the environment that it is installed in.

It pins old versions of torch's companions and wants a CUDA device, so it is a process of another interpreter over a
folder of videos. Made for VBench 0.1.5; VBench-Long needs a clone of the repository: no package has its configuration.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastar.metrics.quality.vbench_score import DIMENSIONS
from fastar.sparsity.base import check_choice

MODES = {
    "custom": ("vbench.launch.evaluate", "custom_input"),
    "standard": ("vbench.launch.evaluate", "vbench_standard"),
    "long_custom": ("vbench2_beta_long.eval_long", "long_custom_input"),
    "long_standard": ("vbench2_beta_long.eval_long", "long_vbench_standard"),
}
"""Module and its mode. custom: any videos, 10 of the 16 dimensions. standard: VBench's prompts, five videos of each.
long: the same for videos of 5 s and more."""
ANSWERS = "*_eval_results.json"
MISSING = "This required video"  # of the warning that VBench prints of a prompt of its own without a video
PROBE = """
import importlib.metadata, importlib.util, sys
if importlib.util.find_spec({module!r}) is None:
    sys.exit(1)
try:
    print(importlib.metadata.version("vbench"))
except importlib.metadata.PackageNotFoundError:
    print("of no known version")
"""


@dataclass(frozen=True)
class VBenchResult:
    """VBench's answer.

    Attributes:
        scores: of each dimension, over all videos.
        videos: of each dimension, by the name of the video's file; VBench scales some of these before it averages.
        missing: videos of its own prompts that VBench looked for in vain.
    """

    scores: Mapping[str, float]
    videos: Mapping[str, Mapping[str, float]]
    missing: int


@dataclass(frozen=True)
class VBench:
    """Where VBench is, and how it is asked.

    Args:
        python: interpreter of the environment that it is installed in.
        repository: a clone of Vchitect/VBench that is used in place of the installed package; needed for VBench-Long.
        weights: folder of its weights; None for VBench's own, ~/.cache/vbench.
        download: let VBench fetch weights that are missing.
        options: further arguments of its command, such as --dev_flag of VBench-Long.
    """

    python: str
    repository: str | None = None
    weights: str | None = None
    download: bool = False
    options: Sequence[str] = ()

    def check(self, mode: str, dimensions: Iterable[str]) -> str:
        """The version that is there.

        Raises:
            ValueError: interpreter, package or weights are missing; for each, the one thing to do.
        """
        check_choice("mode", mode, tuple(MODES))
        module = MODES[mode][0].split(".")[0]
        if self.repository is not None and not (Path(self.repository) / module).is_dir():
            raise ValueError(f"{self.repository} has no folder {module}: name a clone of Vchitect/VBench")
        if self.repository is None and mode.startswith("long"):
            raise ValueError("VBench-Long needs repository=..., a clone of Vchitect/VBench")
        probe = [self._interpreter(), "-c", PROBE.format(module=module)]
        try:
            answer = subprocess.run(
                probe, env=self._environment(), capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise ValueError(
                f"{self.python} does not start ({error.strerror}): say python=..., the interpreter of the environment "
                "that VBench is installed in"
            ) from error
        if answer.returncode != 0:
            raise ValueError(f"{self.python} has no package {module}: pip install vbench==0.1.5 there")
        if not self.download:
            self._check_weights(dimensions)
        return answer.stdout.strip()

    def evaluate(
        self, videos: Path, output: Path, mode: str, dimensions: Sequence[str], prompts: Mapping[str, str]
    ) -> VBenchResult:
        """Run VBench over the folder `videos`.

        Args:
            output: folder for what VBench writes, its own words in vbench.log; earlier answers there are removed.
            dimensions: names of `DIMENSIONS`.
            prompts: by the names of the files; only asked for in mode custom, and may be empty.

        Raises:
            ValueError: VBench ended with an error, or without an answer; its last line is quoted.
        """
        output.mkdir(parents=True, exist_ok=True)
        output, log = output.resolve(), output.resolve() / "vbench.log"
        for old in output.glob(ANSWERS):
            old.unlink()
        module, name = MODES[mode]
        line = [self._interpreter(), "-m", module, "--mode", name, "--videos_path", str(videos.resolve())]
        line += ["--output_path", str(output), "--dimension", *dimensions]
        if self.repository is not None:
            line += ["--full_json_dir", str(Path(self.repository).resolve() / "vbench/VBench_full_info.json")]
        if not self.download:
            line += ["--load_ckpt_from_local", "True"]
        if mode == "custom" and prompts:
            file = output / "prompts.json"
            file.write_text(json.dumps(dict(prompts), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            line += ["--prompt_file", str(file)]
        with log.open("w") as told:
            done = subprocess.run(
                [*line, *self.options], env=self._environment(), cwd=output, stdout=told, stderr=subprocess.STDOUT,
                check=False,
            )  # fmt: skip
        words = log.read_text(errors="replace")
        answers = sorted(output.glob(ANSWERS), key=lambda path: path.stat().st_mtime_ns)
        if done.returncode != 0 or not answers:
            last = (words.strip() or "no message").splitlines()[-1].strip()
            raise ValueError(f"VBench gave no scores ({last}): see {log}")
        return read_result(answers[-1], [path.name for path in videos.glob("*.mp4")], words.count(MISSING))

    def _interpreter(self) -> str:
        """Its path from anywhere: VBench runs in another folder. Links stay: an environment's interpreter is one."""
        return os.path.abspath(shutil.which(self.python) or self.python)

    def _environment(self) -> dict[str, str]:
        """Without our own packages in sight."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if self.repository is not None:
            environment["PYTHONPATH"] = str(Path(self.repository).resolve())
        if self.weights is not None:
            environment["VBENCH_CACHE_DIR"] = str(Path(self.weights).resolve())
        return environment

    def _check_weights(self, dimensions: Iterable[str]) -> None:
        known = self.weights or os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache/vbench"
        for dimension in dimensions:
            absent = [file for file in DIMENSIONS[dimension].weights if not (Path(known) / file).exists()]
            if absent:
                raise ValueError(
                    f"VBench's {dimension} needs {absent[0]}, which is not in {known}: put it there, or say "
                    "download=true"
                )


def dimensions_for(mode: str, asked: Sequence[str] | None, *, prompts: bool) -> list[str]:
    """Those of `asked`, or by default all, that a mode scores; `prompts` says whether every video has one.

    Raises:
        ValueError: one that does not exist, or that the mode or a lack of prompts rules out.
    """
    custom, reads = mode.endswith("custom"), mode != "long_custom"  # VBench-Long passes no prompts on
    able = {
        name: (not custom or one.custom) and (not custom or not one.reads or (reads and prompts))
        for name, one in DIMENSIONS.items()
    }
    for name in asked or ():
        check_choice("dimensions", name, tuple(DIMENSIONS))
        if not able[name]:
            why = "videos of any prompt" if not DIMENSIONS[name].custom else "videos without prompts"
            raise ValueError(
                f"VBench's {name} cannot score {why}: leave it out of dimensions, or use mode=standard"
            )
    return list(asked) if asked is not None else [name for name, can in able.items() if can]


def read_result(path: Path, names: Sequence[str], missing: int = 0) -> VBenchResult:
    """What VBench wrote to a file `..._eval_results.json`: of each dimension its score, and those of videos.

    Args:
        names: of the files of the videos; clips that VBench-Long cut one into count for it, with their mean.
    """
    answer: dict[str, Any] = json.loads(path.read_text())
    stems = {Path(name).stem: name for name in names}
    scores, videos = {}, {}
    for dimension, (score, details) in answer.items():
        scores[dimension] = float(score)
        found: dict[str, list[float]] = {}
        for entry in details:
            place = Path(entry["video_path"])
            owner = next(
                (stems[part] for part in (place.stem, *reversed(place.parts)) if part in stems), None
            )
            if owner is not None:
                found.setdefault(owner, []).append(float(entry["video_results"]))
        videos[dimension] = {name: sum(values) / len(values) for name, values in found.items()}
    return VBenchResult(scores, videos, missing)
