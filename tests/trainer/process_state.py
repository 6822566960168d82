"""A program that prints what it finds at its start, as one JSON line, and then ends as END says: `python -m
tests.trainer.process_state END`. Where END is `worker`, the program instead starts itself again as a worker, which
prints the line. `test_zygote.py` compares the output and the end of a started and of a forked program."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

ENDS = ("return", "status", "sentence", "error", "signal", "at once")
WORKER = "worker"


def properties(stream: object) -> list[object]:
    assert isinstance(stream, io.TextIOWrapper)
    return [stream.line_buffering, stream.write_through, stream.encoding]


def state() -> dict[str, object]:
    """Return the properties of this process that `test_zygote.py` compares."""
    return {
        "arguments": sys.argv[1:],
        "name": __name__,
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "temporary folder": tempfile.gettempdir(),
        "input": sys.stdin.read(),
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "handlers": {
            number: getattr(handler, "__name__", str(handler))
            for number in sorted(signal.valid_signals())
            if (handler := signal.getsignal(number)) is not signal.SIG_DFL
        },
        "wakeup": signal.set_wakeup_fd(-1),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "threads of Python": threading.active_count(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "main thread": threading.current_thread() is threading.main_thread(),
        "log handlers": len(logging.root.handlers),
        "log level": logging.getLogger("finetune_trainer").level,
        "output": properties(sys.stdout),
        "errors": properties(sys.stderr),
    }


def start_worker() -> int:
    """Start this program as a launcher starts a worker, and return the exit status of the worker. Before the start,
    this process gets signal handlers, a thread and a pipe, and the worker must have none of them. This process also
    blocks signals, and they stay blocked in the worker."""
    # These imports are not at the top of the file, because they take a third of a second in a started program.
    from finetune_trainer import processes
    from finetune_trainer.pod.signals import STOP_SIGNALS

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    command = [sys.executable, "-m", "tests.trainer.process_state", "status"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RANK": "0"}
    worker = processes.subprocess.Popen(command, env=environment)  # type: ignore[attr-defined]
    while worker.poll() is None:
        os.read(reader, 64)
    return int(worker.returncode)


def main() -> None:
    """Print the state and end as the first argument says, or start a worker that does this."""
    end = sys.argv[1]
    if end == WORKER:
        sys.exit(start_worker())
    print(json.dumps(state()))
    if end == "status":
        sys.exit(64)
    if end == "sentence":
        sys.exit("the last words")
    if end == "error":
        raise ValueError(end)
    if end == "signal":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGTERM)
    if end == "at once":
        os._exit(75)


if __name__ == "__main__":
    main()
