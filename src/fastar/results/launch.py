"""One launch of a command: all processes and requeued jobs that come of one person's pressing Enter."""

import os
import uuid

VARIABLE = "FASTAR_LAUNCH"


def launch_id() -> str:
    """The same text in every process that this launch has started, on this and, through Slurm, on other hosts.

    It is handed on in the environment, which worker processes and Slurm jobs inherit, requeued ones too.
    """
    return os.environ.setdefault(VARIABLE, uuid.uuid4().hex[:12])
