"""What is logged while a run is worked on, in its folder: the last lines tell why it failed, or where it was killed."""

import logging
from pathlib import Path
from typing import TextIO

from hydra.errors import InstantiationException

KEPT_LINES = 20
LOG = "log.txt"


class RunLog(logging.Handler):
    """Appends everything that is logged between `attach` and `detach` to `log.txt` of a run's folder.

    A file and not a list in memory: it is there after a kill, too. A log that cannot be written stops nothing.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(level=logging.INFO)
        self.path = folder / LOG
        self._file: TextIO | None = None
        self.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
        )

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._file is not None:
                self._file.write(without_paths(self.format(record)) + "\n")
        except (OSError, ValueError):  # ValueError: the record does not fit its own arguments
            self.handleError(record)

    def attach(self) -> None:
        """Start listening."""
        self._file = self.path.open("a", buffering=1, errors="replace")
        logging.getLogger().addHandler(self)

    def detach(self) -> None:
        """Stop listening."""
        logging.getLogger().removeHandler(self)
        if self._file is not None:
            self._file.close()
            self._file = None


def last_lines(folder: Path) -> list[str]:
    """The last lines of a run's log, oldest first."""
    path = folder / LOG
    return path.read_text(errors="replace").splitlines()[-KEPT_LINES:] if path.exists() else []


def sentence_of(error: BaseException) -> str:
    """An error in one line: what Hydra met when it built an object, not that it met something."""
    error = unwrapped(error)
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def reason_of(error: BaseException) -> str:
    """`sentence_of` without this machine's paths, for what is kept."""
    return without_paths(sentence_of(error))


def unwrapped(error: BaseException) -> BaseException:
    """The error behind Hydra's InstantiationException, or the error itself."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return error.__cause__
    return error


def without_paths(text: str) -> str:
    """`text` with this machine's working and home folder written as `.` and `~`."""
    for folder, sign in ((Path.cwd(), "."), (Path.home(), "~")):
        if folder != Path(folder.anchor):
            text = text.replace(str(folder), sign)
    return text
