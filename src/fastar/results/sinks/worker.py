"""The one thread in which a process talks to W&B."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fastar.results.sinks.mirror import Mirror

logger = logging.getLogger(__name__)

LONGEST_QUEUE = 100_000
"""Calls that may wait, under 1 kB each: hours of a rollout. A W&B that is further behind hangs."""


class Worker:
    """Makes the calls of all mirrors, in order, in a thread of its own.

    That thread is a daemon, so that a call that hangs cannot keep the process. A second thread waits for the end of the
    main thread and then gives the first, and the upload, at most the mirrors' `flush_seconds`. It is no daemon: Python
    waits for it, before any exit handler runs (among them wandb's own), and in processes made by multiprocessing, too.
    """

    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(LONGEST_QUEUE)
        self._open: list[Mirror] = []
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        threading.Thread(target=self._at_exit, name="wandb-exit").start()

    def adopt(self, mirror: Mirror) -> Callable[..., None]:
        """`put(name, *arguments)`, which has `mirror` called that way some time later."""
        self._open = [other for other in self._open if not other.over]
        self._open.append(mirror)
        return partial(self._put, mirror)

    def flush(self, seconds: float) -> bool:
        """Wait until all that was put so far is done; False if that takes longer than `seconds`."""
        done = threading.Event()
        try:
            self._calls.put(done.set, timeout=seconds)
        except queue.Full:
            return False
        return done.wait(seconds)

    def _put(self, mirror: Mirror, name: str, *arguments: Any) -> None:
        try:
            self._calls.put_nowait(partial(mirror.call, name, *arguments))
        except queue.Full:
            mirror.give_up(f"it is {LONGEST_QUEUE} calls behind")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def _at_exit(self) -> None:
        threading.main_thread().join()
        left = [mirror for mirror in self._open if not mirror.over]
        if not left:
            return
        seconds = max(mirror.options.flush_seconds for mirror in left)
        deadline = time.monotonic() + seconds
        written = self.flush(seconds)
        for uploader in {mirror.uploader for mirror in left if mirror.uploader is not None}:
            uploader.close(max(0.0, deadline - time.monotonic()))
        late = [mirror for mirror in left if not mirror.over]
        if late:
            folder = late[0].folder if len(late) == 1 else f"{late[0].folder.parent}/*"
            what = "sent" if written else "written"
            logger.warning(
                "W&B: %d run(s) could not be %s within %g s, and the process ends without them (the store has all of "
                "them); what there is can be uploaded with `wandb sync %s/wandb/offline-run-*`",
                len(late), what, seconds, folder,
            )  # fmt: skip
