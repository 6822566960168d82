"""Runs `finetune` as a process that is forked from one that has imported the command already.

The imports of a command take longer than the command itself, and some tests run many commands. The environment that a
command gets must name the configuration of kubectl in KUBECONFIG.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kubernetes import config
from kubernetes.config import kube_config

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["finetune_cli.main", "kubernetes.client.api.core_v1_api", "kubernetes.client.api.custom_objects_api"]
)
SECONDS = 60.0


def run_finetune(arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> str:
    """Run `finetune` with ``arguments`` in ``folder`` with no other environment than ``environment``, and return what
    it wrote to standard output, and then what it wrote to standard error.

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
    process.close()
    return "".join(output.read_text(encoding="utf-8") for output in outputs)


def _run(arguments: list[str], environment: dict[str, str], folder: Path, stdout: Path, stderr: Path) -> None:
    """Become the command, in a process that was just forked."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # The client library reads KUBECONFIG when it is imported, which was before the fork.
    for module in (config, kube_config):
        module.KUBE_CONFIG_DEFAULT_LOCATION = environment["KUBECONFIG"]
    sys.stdout = stdout.open("w", encoding="utf-8")
    sys.stderr = stderr.open("w", encoding="utf-8")
    sys.argv = ["finetune", *arguments]
    runpy.run_module("finetune_cli", run_name="__main__")
