"""Promises about the repository as a whole: size, layers, configuration files, commands in the README."""

import ast
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "src/fastar").rglob("*.py"))
YAMLS = sorted((ROOT / "conf").rglob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "conf/experiment").glob("*.yaml"))

# Imported where the machine has them; never required, or named otherwise on the package index.
OPTIONAL = {"cutlass", "faiss", "flash_attn", "flashinfer", "ftfy", "triton", "wandb_workspaces"}

# What a layer must not import: a backbone names no method, and methods know neither backbones nor the loop.
FORBIDDEN = {
    "": {"experiments", "analysis", "tests"},
    "backbones": {"cache", "sparsity", "reuse", "ann", "engines", "rollout", "metrics", "results"},
    "engines": {"backbones", "cache", "sparsity", "reuse", "rollout", "metrics", "results"},
    "ann": {"backbones", "cache", "sparsity", "reuse", "engines", "rollout", "metrics", "results"},
    "cache": {"backbones", "sparsity", "reuse", "engines", "rollout", "metrics", "results"},
    "sparsity": {"backbones", "cache", "rollout", "metrics", "results"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def committed_files() -> list[Path]:
    """Files that are, or would be, in a commit."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def texts(files: list[Path]) -> Iterator[tuple[Path, str]]:
    for path in files:
        content = path.read_bytes()
        if b"\0" not in content:
            yield path, content.decode("utf-8")


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, inside functions too; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_committed_files_stay_small() -> None:
    sizes = {name_of(path): path.stat().st_size for path in committed_files()}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert sum(sizes.values()) < 40e6, f"over 40 MB together; the largest: {largest}"


# Folders of the machine something was made on, and hosts of package indexes.
MACHINE = r"(?<![\w.}~-])/(?:home|root|Users|work|opt/wheels|opt/pypi)\b/?"
HOSTS = r"\bpypi\.org|pythonhosted\.org|download\.pytorch\.org"


def test_committed_files_name_no_machine() -> None:
    pattern = re.compile(f"{MACHINE}|{HOSTS}")
    found = [
        f"{name_of(path)}:{number}: {match[0]}"
        for path, text in texts(committed_files())
        for number, line in enumerate(text.splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert not found
    assert pattern.search("cd /" + "work/main") and pattern.search("https://pypi." + "org/simple")
    assert not pattern.search("${paths.outputs}/work") and not pattern.search("rgb/root")


def test_every_package_has_an_init() -> None:
    folders = {path.parent for path in MODULES}
    assert not [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_is_short_and_keeps_to_its_layer(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 320, "split this module"
    imported = imports_of(path)
    layer = path.relative_to(ROOT / "src/fastar").parts[0]
    banned = FORBIDDEN[""] | {f"fastar.{name}" for name in FORBIDDEN.get(layer, set())}
    broken = {name for name in imported for ban in banned if name == ban or name.startswith(f"{ban}.")}
    assert not broken, f"the layer {layer} must not import {sorted(broken)}"


def test_third_party_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {normalised(re.split(r"[\[<>=!~; ]", line)[0]) for lines in requirements for line in lines}
    scripts = [*MODULES, *(ROOT / "experiments").rglob("*.py")]
    used = {name.split(".")[0]: name_of(path) for path in scripts for name in imports_of(path)}
    owners = packages_distributions()
    own = {"fastar", "experiments", *sys.stdlib_module_names}
    undeclared = {
        module: user
        for module, user in used.items()
        if module not in own | OPTIONAL
        and not declared & {normalised(name) for name in owners.get(module, [])}
    }
    assert not undeclared, f"imported, but not in pyproject.toml: {undeclared}"


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_config_file_is_explained_and_its_targets_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    comments = [line for line in text.splitlines()[:2] if line.startswith("#") and "@package" not in line]
    assert comments, "open with a comment: what it is and where it comes from"
    for target in targets_of(OmegaConf.to_container(OmegaConf.load(path), resolve=False)):
        assert callable(pkgutil.resolve_name(target)), target


def targets_of(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from targets_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets_of(value)


def command_of(experiment: Path) -> tuple[str, list[str]]:
    """The config name and the overrides of the command that opens an experiment file."""
    match = re.search(r"^# +python (experiments/\w+\.py)(.*)$", experiment.read_text(), re.MULTILINE)
    assert match, "open with the exact command, as in '#   python experiments/compare.py experiment=demo'"
    name = re.search(r"config_name=\"(\w+)\"", (ROOT / match[1]).read_text())
    assert name, f"{match[1]} is no Hydra entry point"
    overrides = shlex.split(match[2], comments=True)
    assert f"experiment={experiment.stem}" in overrides
    return name[1], [override for override in overrides if override != "-m"]


def debug_of(config: DictConfig) -> str:
    """The debug config of an experiment: backbones that read text have one of their own."""
    return "tiny_text" if config.backbone.transformer.get("text_dim") else "tiny"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
@pytest.mark.parametrize(
    "extra",
    [[], ["debug=tiny"], ["launcher=local"], ["launcher=slurm"]],
    ids=["as-is", "tiny", "local", "slurm"],
)
def test_experiment_composes(path: Path, extra: list[str], composed: Callable[..., DictConfig]) -> None:
    name, overrides = command_of(path)
    config = composed(name, *overrides, *extra)
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def test_readme_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = set(re.findall(r"\bmake ([a-z]+)\b(?=[`\s]*(?:$|#|`| [A-Z]+=))", readme, re.MULTILINE))
    assert {"demo", "test"} <= wanted <= targets
    files = re.findall(r"\b((?:experiments|scripts|slurm)/\w+\.(?:py|sh))\b", readme)
    assert not [name for name in files if not (ROOT / name).exists()]


def test_constraints_are_versions_only_and_leave_torch_alone() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    assert not [line for line in lines if not re.match(r"^[A-Za-z0-9_.-]+==[\w.!+]+( ; .+)?$", line)]
    assert not [line for line in lines if re.match(r"(torch|triton|nvidia-.*|cuda-.*)==", line)]


HEAVY = (
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "wandb",
    "pandas",
    "pyarrow",
    "matplotlib",
    "torchmetrics",
)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_help_waits_for_no_heavy_import(path: Path) -> None:
    """So that it answers in less than two seconds, also on a slow disk."""
    code = (
        f"import runpy, sys; sys.argv = [{str(path)!r}, '--help']\n"
        f"try:\n    runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        f"print('imported:', [name for name in {HEAVY} if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=100,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.rstrip().endswith("imported: []"), answer.stdout.splitlines()[-1]
