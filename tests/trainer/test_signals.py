"""The flag that remembers a SIGTERM: other threads know of the signal while the main thread waits in a call that never
returns, and a forked process keeps its own signals for itself."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

HANGING = """
import ctypes, os, signal, threading
from finetune_trainer.pod.signals import STOP_SIGNALS, StopFlag

stop = StopFlag()

def watch():
    while not stop():
        pass
    os._exit(7)

threading.Thread(target=watch, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
reader, writer = os.pipe()
print("ready", flush=True)
ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)
"""
FORKING = """
import os, signal, threading
from finetune_trainer.pod.signals import StopFlag

stop = StopFlag()

def fork():
    if os.fork() == 0:
        signal.raise_signal(signal.SIGTERM)
        os._exit(7 if stop() else 1)
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 7

fork()
thread = threading.Thread(target=fork)
thread.start()
thread.join()
assert not stop()
signal.raise_signal(signal.SIGTERM)
assert stop()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_another_thread_knows_of_the_signal_while_the_main_thread_never_returns(number: int) -> None:
    """Python runs no signal handler in this process, because its main thread waits in the C library's `read`."""
    with subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.readline() == b"ready\n"
        os.kill(process.pid, number)
        try:
            assert process.wait(60) == 7
        finally:
            process.kill()


def test_the_signal_of_a_forked_process_is_not_one_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], timeout=60, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
