"""Starts the trainer as a process of this machine, waits for it, and stops it. `run_job.py` calls this module.

The trainer is the same program as in a pod, `python -m finetune_trainer`, with this Python. It runs in a session of its
own, so that Ctrl-C reaches only this process, which then tells the trainer to stop. The trainer stops by itself when
this process ends in any other way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from finetune_cli.localrun.state_folder import StateFolder
from finetune_core.api.base import LABEL_LENGTH, LABEL_VALUE_PATTERN
from finetune_core.contract import IDENTITY_VARIABLES, MASTER_ADDR_VARIABLE, MASTER_PORT_VARIABLE
from finetune_core.contract.pod import CPU_REQUEST_VARIABLE
from finetune_core.contract.preflight_result import PREFLIGHT_COMMAND
from finetune_core.errors import UserError

POLL_SECONDS = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
NEEDED = ("finetune_trainer", "torch", "transformers", "peft", "deepspeed", "safetensors")
"""Packages without which no training starts."""
INSTALL = "run `pip install '.[cli,trainer]'` in a clone of the project"
_COUNT = """
import json, torch
count = torch.cuda.device_count()
print(json.dumps([count, torch.cuda.get_device_name(0) if count else ""]))
"""
_OURS = ("FTJ_", "PET_")
"""Beginnings of the environment variables that the trainer reads as its identity."""


def check_installed() -> None:
    """Raise UserError where the packages of the trainer are not installed beside this program."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            "finetune run", f"needs the packages of the trainer, and {missing[0]} is not installed: {INSTALL}"
        )


@dataclass(frozen=True, slots=True)
class GpusHere:
    """The GPUs of this machine."""

    count: int
    product: str
    """The first GPU as the node label `nvidia.com/gpu.product` names it; empty where the name is no value of a label.
    """


def gpus_here() -> GpusHere:
    """Return the GPUs that torch finds on this machine. A process of its own asks, because this program does not import
    torch. Raises UserError where torch can't be imported."""
    command = [sys.executable, "-c", _COUNT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        answer, complaint = process.communicate()
    try:
        count, name = json.loads(answer.strip().rpartition("\n")[2])
    except ValueError:
        reason = complaint.strip().rpartition("\n")[2] or f"exit code {process.returncode}"
        raise UserError("torch", f"can't count the GPUs ({reason}); to install it, {INSTALL}") from None
    product = re.sub(r"\s+", "-", name.strip())
    is_label = re.fullmatch(LABEL_VALUE_PATTERN, product) is not None and len(product) <= LABEL_LENGTH
    return GpusHere(count, product if is_label else "")


def trainer_environment(
    given: Mapping[str, str], *, namespace: str, name: str, uid: str, cpus: int | None, variables: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of the trainer: ``given``, the ``variables`` of `podTemplate.env`, and what the operator
    sets in each pod.

    ``cpus`` is the number of CPUs that the job asks for, in thousandths; None where it asks for none.
    """
    kept = {name: value for name, value in given.items() if not name.startswith(_OURS)}
    identity = {
        "namespace": namespace,
        "name": name,
        "uid": uid,
        "attempt": "1",
        "pod_name": socket.gethostname() or name,
        # No two starts write the same run record.
        "pod_uid": str(uuid.uuid4()),
        "node_rank": "0",
    }
    own = {IDENTITY_VARIABLES[field]: value for field, value in identity.items()}
    own |= {MASTER_ADDR_VARIABLE: "127.0.0.1", MASTER_PORT_VARIABLE: str(_free_port())}
    if cpus is not None:
        own[CPU_REQUEST_VARIABLE] = str(cpus)
    return {**kept, **variables, **own}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def trainer_command(
    folder: StateFolder,
    *,
    model_cache: Path,
    certificates: Path,
    preflight: bool,
    first_examples: Path | None = None,
) -> list[str]:
    """Return the command line of the trainer, or of its check where ``preflight`` is true. ``model_cache`` and
    ``certificates`` need not exist. The check writes the first examples into ``first_examples``; None for no file."""
    options = {
        "run-file": folder.run_file,
        "nonce-file": folder.secrets / "nonce",
        "credentials": folder.secrets / "none",
        "hub-token-file": folder.secrets / "hub-token",
        "hub-data-tokens": folder.secrets / "hub-data",
        "report-token-file": folder.secrets / "report-token",
        "termination-log": folder.result,
        "scratch": folder.scratch,
        "volumes": folder.volumes,
        "model-cache": model_cache,
        "model-volume": folder.secrets / "none",
        "ca-file": folder.secrets / "none",
        "storage-ca-file": certificates,
    }
    command = [sys.executable, "-m", "finetune_trainer", *([PREFLIGHT_COMMAND] if preflight else [])]
    for name, path in options.items():
        command += [f"--{name}", str(path)]
    if first_examples is not None:
        command += ["--first-examples", str(first_examples)]
    return [*command, "--parent", str(os.getpid())]


class StopSignals:
    """Counts the SIGINT and SIGTERM that this process receives, instead of ending."""

    def __init__(self) -> None:
        self.received: list[int] = []
        """The numbers of the signals, in their order."""

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Count the signals while the block runs."""
        former = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


class Trainer:
    """A running trainer."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path, lock: int) -> None:
        """Start ``command``. Its output is appended to the file ``log``. ``lock`` is a file descriptor that the process
        keeps open."""
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )

    def wait(self, stop: StopSignals, *, on_poll: Callable[[], None], on_stop: Callable[[], None]) -> int:
        """Wait until the trainer has ended, and return its exit code.

        After the first stop signal the trainer is told to stop, and ``on_stop`` is called. After the second one it is
        killed, with all its processes. ``on_poll`` is called every POLL_SECONDS.
        """
        told = 0
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(POLL_SECONDS)
            if stop.received and told == 0:
                told = 1
                self._process.terminate()
                on_stop()
            elif len(stop.received) > 1:
                self.kill()
            on_poll()

    def kill(self) -> None:
        """Kill the trainer and all processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
