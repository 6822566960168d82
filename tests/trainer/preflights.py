"""Runs the preflight check as a pod does, and chooses its paths in the temporary folder of a test."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_core.contract import RESULT_LIMIT_BYTES
from finetune_core.contract.preflight_result import PREFLIGHT_SECONDS, PreflightResult
from finetune_trainer.pod.settings import Paths
from tests.trainer.objectstore import ObjectStore


def paths_in(tmp_path: Path, store: ObjectStore) -> Paths:
    """Return the paths of a preflight pod whose files lie in ``tmp_path``, but for the credentials of ``store``."""
    return Paths(
        run_file=tmp_path / "run.json",
        credentials=store.credentials,
        storage_ca_file=tmp_path / "no-ca",
        hub_token_file=tmp_path / "hub-token",
        termination_log=tmp_path / "termination-log",
        scratch=tmp_path / "scratch",
        volumes=tmp_path / "volumes",
        model_cache=tmp_path / "model-cache",
    )


@dataclass(frozen=True)
class Ended:
    """Exit code, result and log of a finished preflight process."""

    code: int
    result: PreflightResult
    log: str

    @property
    def memory_mebibytes(self) -> int:
        """The peak resident memory in MiB that the process printed."""
        (found,) = re.findall(r"with (\d+) MiB at most", self.log)
        return int(found)

    @property
    def data_memory_mebibytes(self) -> int:
        """The peak resident memory in MiB before the checks with torch began."""
        (found,) = re.findall(r"were checked within (\d+) MiB", self.log)
        return int(found)


def run_program(paths: Paths, *, interpreter: Sequence[str] = (), **environment: str) -> Ended:
    """Run `python -m finetune_trainer preflight` as a pod does, and return its result. ``interpreter`` are options of
    Python, for example ``["-X", "importtime"]``."""
    options = {"run-file": paths.run_file, "credentials": paths.credentials, "scratch": paths.scratch}
    options |= {"termination-log": paths.termination_log, "hub-token-file": paths.hub_token_file}
    options |= {"volumes": paths.volumes}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, *interpreter, "-m", "finetune_trainer", "preflight", *arguments]
    home = {"HOME": str(paths.scratch), "PATH": "/nonexistent"}
    log = paths.termination_log.with_suffix(".log")
    with log.open("wb") as stream:
        done = subprocess.run(
            command, env=home | environment, stdout=stream, stderr=stream, timeout=2 * PREFLIGHT_SECONDS, check=False
        )
    text = paths.termination_log.read_text()
    result = PreflightResult.from_termination_message(text)
    assert result is not None, log.read_text()
    assert len(text.encode()) <= RESULT_LIMIT_BYTES
    return Ended(done.returncode, result, log.read_text())


def on_a_volume(paths: Paths, name: str) -> tuple[Path, dict[str, Any]]:
    """Return the path of the file ``name`` on a volume, which the caller must write, and the keyword argument for
    `run_config` that makes this file the source `dataset.train`."""
    folder = paths.volumes / "data"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name, {"dataset__train": {"volume": {"claimName": "data", "path": name}}}
