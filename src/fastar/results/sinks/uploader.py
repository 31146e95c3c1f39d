"""Sends offline runs to the server while they are written: a child process, so that nothing it does holds up a run."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Optional

if TYPE_CHECKING:
    from fastar.results.sinks.mirror import Mirror, Options

CHILD = Path(__file__).with_name("upload.py")


class Uploader:
    """The child process (upload.py) of this process. It ends with it, even if that is killed.

    It is told one folder and address a line, and answers one line of JSON for each that it is done with.
    """

    _of_process: ClassVar[Optional["Uploader"]] = None

    @classmethod
    def of_process(cls, options: "Options", folder: Path) -> "Uploader":
        """The one uploader; only the worker's thread may ask for it. A new one keeps wandb's logs in `folder`."""
        if cls._of_process is None or cls._of_process._owner != os.getpid():
            cls._of_process = cls(options, folder)
        return cls._of_process

    def __init__(self, options: "Options", folder: Path) -> None:
        self._owner = os.getpid()
        self._mirrors: dict[str, Mirror] = {}
        self._said = "no reason given"
        # its own wandb service, and its own session: a Ctrl-C is for the run, which has a few seconds to send the rest
        environment = {
            key: value for key, value in os.environ.items() if key not in ("WANDB_SERVICE", "WANDB_MODE")
        }
        environment["WANDB_DIR"] = str(folder)  # or its logs would land where the command was started
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD), str(options.init_timeout), str(options.flush_seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, name="wandb-upload", daemon=True)
        self._reader.start()

    def send(self, mirror: "Mirror", run: Path, server: str) -> None:
        """Send the offline run in `run`, now and as it grows, to the address `server`.

        Raises:
            OSError: the child process is gone.
        """
        self._mirrors[str(run)] = mirror
        assert self._process.stdin is not None
        self._process.stdin.write(f"{run}\t{server}\n")

    def close(self, seconds: float) -> None:
        """Wait for what is under way, at most `seconds`; then end the child."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + seconds
        try:
            self._process.stdin.close()
            self._process.wait(seconds)
        except (subprocess.TimeoutExpired, OSError):
            self._process.kill()
        self._reader.join(max(0.1, deadline - time.monotonic()))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("{"):
                self._said = line.strip().removeprefix("wandb: ") or self._said
                continue
            answer = json.loads(line)
            problem = None if answer["sent"] else answer["reason"] or self._said
            self._mirrors.pop(answer["run"]).sent(problem)
