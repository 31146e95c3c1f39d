"""A stand-in for VBench's package that the tests put on disk: its command line, its files, made-up scores."""

import sys
from pathlib import Path

COMMAND = """
import argparse, json, os, sys
parser = argparse.ArgumentParser()
for name in ("output_path", "full_json_dir", "videos_path", "load_ckpt_from_local", "mode", "prompt_file"):
    parser.add_argument("--" + name)
parser.add_argument("--dimension", nargs="+", required=True)
parser.add_argument("--dev_flag", action="store_true")
arguments = parser.parse_args()
if os.environ.get("FAKE_VBENCH_FAILS"):
    print("loading")
    sys.exit("RuntimeError: no CUDA device")
names = sorted(name for name in os.listdir(arguments.videos_path) if name.endswith(".mp4"))
assert all(os.path.getsize(os.path.join(arguments.videos_path, name)) for name in names)
prompts = {}
if arguments.prompt_file:
    prompts = json.load(open(arguments.prompt_file))
    assert set(prompts) == set(names), (prompts, names)
if "standard" in arguments.mode:
    print("WARNING!!! This required video is not found! The missing video is: a dog-0.mp4")
asked = {
    "dimensions": arguments.dimension, "mode": arguments.mode, "prompts": prompts, "names": names,
    "local": arguments.load_ckpt_from_local, "dev_flag": arguments.dev_flag, "cwd": os.getcwd(),
    "cache": os.environ.get("VBENCH_CACHE_DIR"), "full_json_dir": arguments.full_json_dir,
}
json.dump(asked, open(os.path.join(arguments.output_path, "asked.json"), "w"))
results = {}
for number, dimension in enumerate(arguments.dimension):
    details = []
    for place, name in enumerate(names):
        path = os.path.join(arguments.videos_path, name)
        value = (number + place) / 100
        if arguments.mode.startswith("long"):
            stem = name[: -len(".mp4")]
            clips = [os.path.join(arguments.videos_path, "split_clip", stem, f"{stem}_00{i}.mp4") for i in (0, 1)]
            details += [{"video_path": clip, "video_results": value + i / 100} for i, clip in enumerate(clips)]
        else:
            details.append({"video_path": path, "video_results": dimension == "dynamic_degree" or value})
    results[dimension] = [0.5 + number / 100, details]
json.dump(results, open(os.path.join(arguments.output_path, "results_2026-01-01_eval_results.json"), "w"))
"""


def write_package(folder: Path) -> Path:
    """What a clone of VBench's repository has, as far as we call it: its folder."""
    for module in ("vbench/launch/evaluate.py", "vbench2_beta_long/eval_long.py"):
        path = folder / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMMAND)
    for package in ("vbench", "vbench/launch", "vbench2_beta_long"):
        (folder / package / "__init__.py").touch()
    return folder


def write_interpreter(folder: Path, *, package: bool = True) -> Path:
    """An interpreter that finds the package, as that of an environment it is installed in; or one without it."""
    packages = write_package(folder / "packages") if package else folder
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return path
