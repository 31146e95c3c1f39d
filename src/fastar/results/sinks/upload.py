"""Program of the uploader's child process: python upload.py SECONDS_TO_REACH_THE_SERVER SECONDS_TO_END

Reads lines: the folder of an offline run, a tab, the server's address; and runs `wandb beta sync --live` on each, which
follows a run until it is closed. At the end of its input (the parent is done, or dead) it has SECONDS_TO_END for the
rest. It imports nothing of fastar, so that it starts fast.
"""

import json
import os
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path


def unreachable(url: str, seconds: float) -> str | None:
    """Why nothing answers at `url`, or None if something does, be it with an error."""
    try:
        urllib.request.urlopen(url, timeout=seconds).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        # certificates are wandb's business, which knows more of them
        return None if isinstance(reason, ssl.SSLError) else str(reason) or type(reason).__name__
    return None


def send(run: str, url: str, seconds: float) -> str:
    """Upload one run; what went wrong, or "" (also if wandb has only printed it)."""
    reason = unreachable(url, seconds)
    if reason is not None:
        return f"{url} cannot be reached ({reason})"
    try:
        from wandb.cli.cli import cli

        cli.main(["beta", "sync", "--live", run], standalone_mode=False)
    except Exception as error:  # noqa: BLE001 - told to the parent, whatever it is
        return f"{type(error).__name__}: {error}"
    return ""


def work(run: str, url: str, seconds: float) -> None:
    reason = send(run, url, seconds)
    sent = any(Path(run).glob("*.wandb.synced"))  # the mark that wandb leaves
    answer = json.dumps({"run": run, "sent": sent, "reason": reason.split("\n")[0]})
    sys.stdout.write(f"\n{answer}\n")  # wandb may be in the middle of a line
    sys.stdout.flush()


def main() -> None:
    to_reach, to_end = float(sys.argv[1]), float(sys.argv[2])
    os.environ["WANDB_RESUME"] = "allow"  # the second part of a resumed run follows its first
    threads = []
    for line in sys.stdin:
        thread = threading.Thread(target=work, args=(*line.rstrip("\n").split("\t"), to_reach), daemon=True)
        thread.start()
        threads.append(thread)
    deadline = time.monotonic() + to_end
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    os._exit(0)  # without wandb's exit handlers, which would wait for a server that does not answer


if __name__ == "__main__":
    main()
