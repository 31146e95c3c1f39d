"""The last log lines of a run, kept in memory for the case that it fails."""

import logging
from collections import deque
from pathlib import Path

KEPT_LINES = 20


class LogTail(logging.Handler):
    """Keeps the last lines of everything that is logged between `attach` and `detach`."""

    def __init__(self) -> None:
        super().__init__(level=logging.INFO)
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))

    def attach(self) -> None:
        """Start listening."""
        logging.getLogger().addHandler(self)

    def detach(self) -> None:
        """Stop listening."""
        logging.getLogger().removeHandler(self)

    def lines(self) -> list[str]:
        """Oldest first."""
        return [without_paths(line) for line in self._lines]


def without_paths(text: str) -> str:
    """`text` with this machine's working and home folder written as `.` and `~`."""
    for folder, sign in ((Path.cwd(), "."), (Path.home(), "~")):
        if folder != Path(folder.anchor):
            text = text.replace(str(folder), sign)
    return text
