"""Lines that tell a person what takes long: which step of how many, and for how many seconds it has been running."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

REPEAT_SECONDS = 20


@contextlib.contextmanager
def step(label: str) -> Iterator[None]:
    """Print ``label`` when the block starts, again every 20 s with the time elapsed, and once more at its end."""
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
    """Print one line of progress to standard error, so that standard output stays for results."""
    print(line, file=sys.stderr, flush=True)
