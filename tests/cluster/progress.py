"""Print the progress of slow steps, such as builds, with the seconds since the step began."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

REPEAT_SECONDS = 20


@contextlib.contextmanager
def step(label: str) -> Iterator[None]:
    """Print ``label`` when the block starts, then every 20 s with the elapsed time, and once more when the block
    ends."""
    started = time.monotonic()
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(REPEAT_SECONDS):
            say(f"{label} ... {time.monotonic() - started:.0f} s")

    say(f"{label} ...")
    reporter = threading.Thread(target=repeat, daemon=True)
    reporter.start()
    try:
        yield
    except BaseException:
        say(f"{label}: failed after {time.monotonic() - started:.1f} s")
        raise
    else:
        say(f"{label}: {time.monotonic() - started:.1f} s")
    finally:
        ended.set()
        reporter.join()


def say(line: str) -> None:
    """Print a line to standard error. Standard output is only for the results of a command."""
    print(line, file=sys.stderr, flush=True)
