"""A cache that kills the process that makes it, as a lack of memory would."""

import os
import signal
from typing import Any


def killed(**settings: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
