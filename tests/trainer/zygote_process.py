"""The process that has imported torch and forks programs: `python -m tests.trainer.zygote_process`. `zygote.py` starts
the process and sends it orders.

The process reads one JSON line from standard input for each program to start. When a program has been forked, the
process writes one JSON line with the process id. When a program has ended, the process writes one JSON line with the
exit status.

A forked program finds what a started Python interpreter finds: the environment, arguments, working folder and files
that it was given, the signal handlers and the signal mask of a new process, and a single thread. There is one
difference: the modules in `PRELOADED`, and all modules that these import, have been imported already. A module that
read an environment variable when it was imported, as `huggingface_hub.constants` does, has the value of the forking
process.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import logging
import os
import runpy
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from finetune_trainer import processes
from finetune_trainer.pod.imports import importing
from finetune_trainer.ranks import process

PRELOADED = (
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "finetune_trainer.launcher",
    "finetune_trainer.preflight.entrypoint",
    "finetune_trainer.train",
    "peft",
    "peft.utils.transformers_weight_conversion",
    "tests.trainer.faults",
    "transformers.models.llama.modeling_llama",
)
"""Modules that are imported before the first fork: those of the trainer and of its tests, and those that DeepSpeed,
peft and transformers import while they train the tiny model."""


def main() -> None:
    """Fork programs and report their ends until standard input ends."""
    process.prepare_environment(Path(tempfile.mkdtemp(prefix="zygote-")))
    with importing():
        for module in PRELOADED:
            importlib.import_module(module)
    # Each program configures its own log, as a started process does.
    logging.root.handlers.clear()
    logging.getLogger("finetune_trainer").setLevel(logging.NOTSET)
    # A launcher that was forked here forks its workers too, where it would otherwise start them.
    processes.subprocess = SimpleNamespace(Popen=ForkedWorker)  # type: ignore[attr-defined, assignment]
    # `freeze` makes the garbage collector ignore all objects that exist so far. In the forked programs the collector
    # then writes to fewer pages of memory, so the kernel copies fewer pages.
    gc.collect()
    gc.freeze()
    _serve()


def _serve() -> None:
    # The signal SIGCHLD wakes `select`. Python writes a byte into the pipe whenever the signal arrives.
    ends, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup)
    running: dict[int, int] = {}
    pending = b""
    while True:
        ready, _, _ = select.select([0, ends], [], [])
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                order = json.loads(line)
                number, child = order.pop("number"), fork(lambda order=order: _run_order(**order))  # type: ignore[misc]
                running[child] = number
                _tell(number=number, process=child)
        if ends in ready:
            os.read(ends, 65536)
            while running:
                ended, status = os.waitpid(-1, os.WNOHANG)
                if not ended:
                    break
                _tell(number=running.pop(ended), status=os.waitstatus_to_exitcode(status))


def _tell(**values: int) -> None:
    os.write(1, f"{json.dumps(values)}\n".encode())


def fork(program: Callable[[], None]) -> int:
    """Fork a process that calls ``program`` and then ends. Return its process id.

    The forked process has the standard streams and the signal mask of this process, as a started process has, but
    neither the other open files nor the signal handlers. In the forked process this function never returns.
    """
    child = os.fork()
    if not child:
        _call_and_end(program)
    return child


def _call_and_end(program: Callable[[], None]) -> NoReturn:
    """Call ``program`` in this process, which was just forked, and end the process as the interpreter would."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            # A signal that is ignored stays ignored in a started process too.
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        gc.freeze()
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        tempfile.tempdir = None
        program()
        status = 0
    except SystemExit as error:
        if isinstance(error.code, int | None):
            status = error.code or 0
        else:
            print(error.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  (the process ends, so there is nobody to whom the error could be raised)
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            # `os._exit` leaves the inherited objects of the parent process untouched.
            os._exit(status)


def run_module(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Do in this process, which was just forked, what `python -m` does with ``module`` and ``arguments``."""
    os.environ.clear()
    os.environ.update(environment)
    unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (open until the process ends)
    sys.stdout = _text_stream(1, unbuffered=unbuffered)
    sys.stderr = _text_stream(2, unbuffered=unbuffered)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _text_stream(descriptor: int, *, unbuffered: bool) -> io.TextIOWrapper:
    """Return a text stream that writes to ``descriptor`` as the stream of a new Python process does: at once if it is
    ``unbuffered``, and otherwise standard error line by line and standard output in blocks."""
    raw = io.FileIO(descriptor, "w", closefd=False)
    binary = raw if unbuffered else io.BufferedWriter(raw)
    by_line = descriptor == 2 and not unbuffered
    return io.TextIOWrapper(binary, "utf-8", "backslashreplace", line_buffering=by_line, write_through=unbuffered)


def _run_order(module: str, arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """Run ``module`` in the working folder ``folder``, without input, and with the file ``log`` as its output."""
    for path, flags, descriptors in ((os.devnull, os.O_RDONLY, [0]), (log, os.O_WRONLY | os.O_APPEND, [1, 2])):
        opened = os.open(path, flags)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    run_module(module, arguments, environment)


class ForkedWorker:
    """Takes the place of `subprocess.Popen` in a forked launcher: its workers are forked from the launcher."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str]) -> None:
        """Fork the program of ``command``, which is `python -m MODULE ARGUMENTS`."""
        _, option, module, *arguments = command
        assert option == "-m", command
        self.returncode: int | None = None
        self.pid = fork(lambda: run_module(module, arguments, env))

    def poll(self) -> int | None:
        """Return the exit status, negative after a signal; None while the process runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


if __name__ == "__main__":
    main()
