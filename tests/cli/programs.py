"""Runs `finetune` in new processes. Each process is forked from a process that has already imported the modules of the
program.

This saves time, because the imports take longer than a command, and some tests run many commands. The environment of
each command must contain KUBECONFIG, the path of a kubeconfig.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kubernetes import config
from kubernetes.config import kube_config

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["finetune_cli.main", "kubernetes.client.api.core_v1_api", "kubernetes.client.api.custom_objects_api"]
)
SECONDS = 60.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status and what it wrote. The names are those of `subprocess.CompletedProcess`."""

    returncode: int | None
    stdout: str
    stderr: str


def run_finetune(arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> Ended:
    """Run `finetune` with ``arguments`` in the folder ``folder``, and write its output into two files in this folder.
    The program has only the environment variables in ``environment``.

    Raises AssertionError if the command still runs after `SECONDS`.
    """
    outputs = folder / "stdout", folder / "stderr"
    process = CONTEXT.Process(target=_run, args=(list(arguments), dict(environment), folder, *outputs))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"finetune {' '.join(arguments)} still runs after {SECONDS} s")
    status = process.exitcode
    process.close()
    return Ended(status, *(output.read_text(encoding="utf-8") for output in outputs))


def _run(arguments: list[str], environment: dict[str, str], folder: Path, stdout: Path, stderr: Path) -> None:
    """Run the command in this process, which was just forked."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # The library `kubernetes` reads KUBECONFIG only when it is imported. The import was before the fork, so the path is
    # set again here.
    for module in (config, kube_config):
        module.KUBE_CONFIG_DEFAULT_LOCATION = environment["KUBECONFIG"]
    sys.stdout = stdout.open("w", encoding="utf-8")
    sys.stderr = stderr.open("w", encoding="utf-8")
    sys.argv = ["finetune", *arguments]
    runpy.run_module("finetune_cli", run_name="__main__")
