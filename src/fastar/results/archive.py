"""Recorded runs in one file: a few kilobytes each, hundreds of them, nearly alike, compress twentyfold together.

analysis/results/frontier/runs.tar.xz   what is tracked
analysis/results/frontier/<run id>/     unpacked beside it when something reads there; not tracked
"""

import hashlib
import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from fastar.results.files import PROMPT, SUMMARY, TABLE, atomic, unwritable
from fastar.results.stills import STILLS, TRUTH

ARCHIVE = "runs.tar.xz"
UNPACKED = ".runs.sha256"  # of the archive that the folders beside it came from
LOCK = ".runs.lock"


def pack(folder: Path, runs: Iterable[Path]) -> Path:
    """Write `folder`/runs.tar.xz from folders of runs in `folder`; the same runs always give the same bytes.

    What is recorded goes in: summary.json, metrics.parquet, of runs that read prompts prompt.json, and stills.
    """
    target, runs = folder / ARCHIVE, sorted(runs)
    with atomic(target) as part, tarfile.open(part, "w:xz", preset=9) as archive:
        # files of one kind side by side: likeness is what compresses
        for name in (SUMMARY, PROMPT, TABLE, STILLS, TRUTH):
            for run in runs:
                if (run / name).exists():
                    member = tarfile.TarInfo(f"{run.name}/{name}")
                    member.size, member.mode = (run / name).stat().st_size, 0o644
                    with (run / name).open("rb") as file:
                        archive.addfile(member, file)
    _stamp(folder, runs)
    return target


def unpack(folder: Path) -> None:
    """Have the runs of `folder`/runs.tar.xz, if there is one, in folders beside it, in place of an older archive's.

    Raises:
        ValueError: the archive is damaged, or nothing can be written beside it.
    """
    archive = folder / ARCHIVE
    if not archive.exists() or _is_unpacked(folder):
        return
    try:
        with FileLock(folder / LOCK):
            if not _is_unpacked(folder):  # another process may have done it meanwhile
                _extract(archive, folder)
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{archive} is damaged ({error}): take it from the repository again") from error
    except OSError as error:
        raise unwritable(folder, error) from error


def _is_unpacked(folder: Path) -> bool:
    stamp = folder / UNPACKED
    if not stamp.exists():
        return False
    digest, *names = stamp.read_text().split()
    return digest == _digest(folder / ARCHIVE) and all((folder / name / SUMMARY).exists() for name in names)


def _extract(archive: Path, folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix=".runs-", dir=folder) as part,
        tarfile.open(archive, "r:xz") as file,
    ):
        file.extractall(part, filter="data")
        runs = sorted(Path(part).iterdir())
        for run in runs:
            shutil.rmtree(folder / run.name, ignore_errors=True)
            run.rename(folder / run.name)
    _stamp(folder, runs)


def _stamp(folder: Path, runs: Iterable[Path]) -> None:
    names = [run.name for run in runs]
    (folder / UNPACKED).write_text("\n".join([_digest(folder / ARCHIVE), *names]) + "\n")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
