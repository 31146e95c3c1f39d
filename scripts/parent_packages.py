"""What setup.sh has to know about the packages that an interpreter already holds. Standard library only.

Run by the parent interpreter:
    torch              prints "cuda VERSION", "old VERSION" (CUDA, but before 2.11), "broken REASON" or "none"
    link VENV          lets the environment VENV see every package of this interpreter, behind its own
    constraints FILE   prints pip constraints: torch and its companions as they are here, and the pins of FILE
                       for packages that are not here; others stay as they are wherever they satisfy fastar
Run by the new environment:
    check PARENT       imports what fastar needs; fails unless a CUDA torch in PARENT is the one still in use
"""

import importlib.metadata
import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

OLDEST_TORCH = (2, 11)
KEPT = re.compile(r"torch|torchvision|torchaudio|triton|numpy|nvidia-.*|cuda-.*|pytorch-triton.*")


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def describe_torch() -> str:
    """One line on the torch of this interpreter; a CPU build counts as none: the project pins its own."""
    if importlib.util.find_spec("torch") is None:
        return "none"
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return "broken " + " ".join(str(error).split())
    if not (torch.version.cuda or getattr(torch.version, "hip", None)):
        return "none"
    numbers = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    return f"{'cuda' if numbers >= OLDEST_TORCH else 'old'} {torch.__version__}"


def package_folders() -> list[str]:
    """Folders this interpreter imports installed packages from: its own, its environment's, its user's."""
    own = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    names = {"site-packages", "dist-packages"}
    return [p for p in dict.fromkeys(sys.path) if Path(p).name in names and p not in own and Path(p).is_dir()]


def link(venv: Path) -> None:
    """A .pth line, because `--system-site-packages` skips a parent that is an environment itself."""
    (site_packages,) = venv.glob("lib/python*/site-packages")
    # addsitedir, so that the parent's own .pth files are read as well
    lines = [f"import site; site.addsitedir({folder!r})" for folder in package_folders()]
    (site_packages / "zz_parent.pth").write_text("\n".join(lines) + "\n")


def constraints(pins: Path) -> list[str]:
    found = [(d.metadata["Name"], d.version) for d in importlib.metadata.distributions()]
    here = {normalised(name): version for name, version in found if name}
    kept = [f"{name}=={version}" for name, version in sorted(here.items()) if KEPT.fullmatch(name)]
    lines = [line.strip() for line in pins.read_text().splitlines()]
    names = {line: normalised(re.split(r"[=<>!~ ;\[]", line)[0]) for line in lines if line and line[0] != "#"}
    return kept + [line for line, name in names.items() if name not in here]


def check(parent: str) -> None:
    import lightning
    import torch

    import fastar

    kind, _, version = parent.partition(" ")
    if kind == "cuda" and torch.__version__ != version:
        sys.exit(
            f"setup: torch {torch.__version__} hides the parent's {version}: run 'make clean', then try again"
        )
    device = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    versions = [f"fastar {fastar.__version__}", f"Python {sys.version.split()[0]}"]
    versions += [f"torch {torch.__version__} ({device})", f"lightning {lightning.__version__}"]
    print("setup: ready: " + ", ".join(versions))


def main() -> None:
    verb, *rest = sys.argv[1:]
    if verb == "torch":
        print(describe_torch())
    elif verb == "link":
        link(Path(rest[0]))
    elif verb == "constraints":
        print("\n".join(constraints(Path(rest[0]))))
    elif verb == "check":
        check(rest[0])
    else:
        sys.exit(f"unknown verb {verb!r}: torch, link, constraints or check")


if __name__ == "__main__":
    main()
