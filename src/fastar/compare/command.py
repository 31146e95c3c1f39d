"""What the entry points share on the command line: a progress bar, clear errors, early checks."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException, OverrideParseException
from omegaconf import MissingMandatoryValue

from fastar.interruption import INTERRUPTED
from fastar.results.files import unwritable
from fastar.results.lock import RunLocked
from fastar.results.logtail import sentence_of, unwrapped
from fastar.sweep.devices import is_worker

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


CAN_BE_PUT_RIGHT = (ValueError, FileNotFoundError, RunLocked)
"""Errors that a person can put right: told in their one sentence."""


def wide_console() -> "Console":
    """The terminal as it is; a pipe or a file has no width to respect, and tables may be wide there."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def progress_bar(console: "Console") -> "Progress":
    """Chunks done of all chunks, and the time it took."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # several processes that draw on one terminal would spoil each other's bars
    return Progress(*columns, console=console, disable=is_worker())


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a person can put right ends the command with its one sentence, without a traceback."""
    try:
        yield
    except (*CAN_BE_PUT_RIGHT, InstantiationException) as error:
        if isinstance(unwrapped(error), CAN_BE_PUT_RIGHT):
            raise SystemExit(f"error: {sentence_of(error)}") from error
        raise
    except MissingMandatoryValue as error:
        raise SystemExit(f"error: say {error.full_key}=...; --help shows an example") from error
    except KeyboardInterrupt as error:
        raise SystemExit(INTERRUPTED) from error


def check_choices(arguments: Sequence[str], folder: Path) -> None:
    """Exit with the choices if the command line asks for a config that the group's `folder` lacks.

    Hydra says so itself, except for members of a list such as method=[...].
    """
    group, choices = folder.name, sorted(path.stem for path in folder.glob("*.yaml"))
    overrides = [argument for argument in arguments if argument.startswith(f"{group}=")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException:
        return  # Hydra says what is wrong with it
    for override in parsed:
        value = override.value()
        names = value if isinstance(value, list) else [value]
        unknown = [name for name in names if str(name) not in choices]
        if unknown:
            raise SystemExit(f"error: unknown {group} '{unknown[0]}': choose from {', '.join(choices)}")


def with_all(arguments: Sequence[str], folder: Path) -> list[str]:
    """The command line with `all` of a group, as in method=all, spelt out: every config in the group's `folder`."""
    names = ",".join(sorted(path.stem for path in folder.glob("*.yaml")))
    every = f"{folder.name}=all"
    return [f"{folder.name}=[{names}]" if argument == every else argument for argument in arguments]


def check_writable(folder: Path, setting: str = "paths.outputs") -> None:
    """Make `folder`, which `setting` names; ValueError if nothing can be written there."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # other processes probe, too
    except OSError as error:
        raise unwritable(folder, error, setting) from error
