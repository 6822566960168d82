"""`finetune run`, from top to bottom: the job file, the lock, the check that the operator makes before an attempt, the
training, and how it ended. `commands/run_command.py` calls `run_file`.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.live import Live

from finetune_cli.jobfiles.plan import read_job
from finetune_cli.local_run.local_job import (
    RUN_ID,
    UID,
    LocalJob,
    LocalPaths,
    checked_store,
    cpus_asked,
    local_config,
    localised,
)
from finetune_cli.local_run.progress_view import ending, is_due, line, live_view, new_notices, scores
from finetune_cli.local_run.report_receiver import ReportReceiver
from finetune_cli.local_run.state_folder import STATE, StateFolder, locked, state_folder
from finetune_cli.local_run.trainer_process import (
    StopSignals,
    Trainer,
    check_installed,
    gpus_here,
    trainer_command,
    trainer_environment,
)
from finetune_cli.terminal import SafeConsole, complain, say
from finetune_core.contract import Outcome, Report, Result, RunConfig
from finetune_core.contract.preflight_result import PreflightResult
from finetune_core.errors import UserError

DEFAULT_STORE = Path("finetune-runs")
"""The folder of the runs where the command line names none."""
BUCKET_STORE = "s3"
"""Value of `--store` for the object store of the job."""
CERTIFICATES = "AWS_CA_BUNDLE"
"""Environment variable of the AWS tools with the path of the CA certificates of an object store."""
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables of the Hugging Face Hub's libraries with an access token, the preferred one first."""
SUCCEEDED, FAILED, NOT_DONE, GATE_FAILED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
_CODES = {
    Outcome.COMPLETED: SUCCEEDED,
    Outcome.EARLY_STOPPED: SUCCEEDED,
    Outcome.GATE_FAILED: GATE_FAILED,
    Outcome.OUTSIDE_FAILURE: NOT_DONE,
}
"""Exit codes of the command. Every other outcome has the exit code FAILED."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line says."""

    file: str
    store: str | None = None
    """A folder, BUCKET_STORE, or None for DEFAULT_STORE."""
    paths: LocalPaths = field(default_factory=LocalPaths)
    processes: int | None = None
    device: str | None = None
    """`GPU`, `CPU`, or None for what the job says and this machine has."""
    endpoint: str | None = None
    every: int | None = None
    """Steps between two lines in a pipe."""


def run_file(options: RunOptions) -> int:
    """Train the job in the file, and return the exit code of the command."""
    check_installed()
    document, _ = read_job(options.file)
    store = checked_store(Path(options.store or DEFAULT_STORE))
    in_bucket = options.store == BUCKET_STORE
    base = checked_store(DEFAULT_STORE) if in_bucket else store
    resources = resources_here(document["spec"].get("resources", {}), options)
    local = localised(document, options.paths, resources, RUN_ID)
    metadata = local.job.metadata
    config = local_config(
        local.job, store=None if in_bucket else store, endpoint=options.endpoint, today=datetime.now(UTC).date()
    )
    run_id = local.job.spec.storage.run_id or RUN_ID
    folder = state_folder(base, metadata.namespace, metadata.name, run_id)
    with locked(folder, f"{metadata.namespace}/{metadata.name}") as lock:
        folder.prepare(dict(local.volumes))
        try:
            return _LocalRun(local, config, folder, base, lock, options.every).run()
        finally:
            folder.clear()


def resources_here(resources: dict[str, Any], options: RunOptions) -> dict[str, Any]:
    """Return the fields of `resources` that differ on this machine. A job for GPUs takes those that are here, or the
    CPUs where there are none. Raises UserError where there are fewer GPUs than processes."""
    asked = options.device or resources.get("device", "GPU")
    wanted = options.processes or resources.get("nodes", 1) * max(1, resources.get("gpusPerNode", 1))
    if asked == "CPU":
        changed = options.processes is not None or resources.get("device") != "CPU"
        return _on_cpus(options.processes or (wanted if resources.get("device") == "CPU" else 1)) if changed else {}
    found = gpus_here()
    if found == 0:
        if options.device == "GPU":
            raise UserError("--device", "must be cpu, because torch finds no GPU on this machine")
        complain("finetune: torch finds no GPU on this machine, so the CPU trains")
        return _on_cpus(options.processes or 1)
    if found < wanted:
        raise UserError(
            "spec.resources", f"asks for {wanted} GPUs, and this machine has {found}: run with --processes {found}"
        )
    return {"device": "GPU", "nodes": 1, "gpusPerNode": wanted}


def _on_cpus(processes: int) -> dict[str, Any]:
    return {"device": "CPU", "nodes": 1, "gpusPerNode": processes if processes > 1 else 0}


class _LocalRun:
    """One start of a job on this machine."""

    def __init__(
        self, local: LocalJob, config: RunConfig, folder: StateFolder, base: Path, lock: int, every: int | None
    ) -> None:
        metadata = local.job.metadata
        self._job, self._config, self._folder, self._lock, self._every = local.job, config, folder, lock, every
        self._cache = base / STATE / "models" if local.job.spec.model.volume is None else folder.secrets / "none"
        self._receiver = ReportReceiver(metadata.namespace, metadata.name)
        self._stop = StopSignals()
        self._console = SafeConsole()
        self._shown: int | None = None
        self._told: list[str] = []
        self._stopping = ""
        self._environment = trainer_environment(
            os.environ,
            namespace=metadata.namespace,
            name=metadata.name,
            uid=UID,
            cpus=cpus_asked(local.job),
            variables={
                variable.name: variable.value
                for variable in local.job.spec.pod_template.env
                if variable.value is not None
            },
        )

    def run(self) -> int:
        """Check the job, train it, and say how it ended."""
        self._write_inputs()
        with self._stop.caught():
            if self._job.spec.run_policy.preflight != "Skip" and (code := self._check()) is not None:
                return code
            config = self._config.model_copy(update={"report": self._receiver.config})
            self._folder.run_file.write_text(config.to_json())
            with self._receiver.listening():
                code = self._train()
        return self._say_ending(code)

    def _write_inputs(self) -> None:
        self._folder.run_file.write_text(self._config.to_json())
        if self._job.spec.model.volume is None:
            self._cache.mkdir(parents=True, exist_ok=True)
        files = self._folder.secrets
        (files / "nonce").write_text(secrets.token_hex(16))
        (files / "report-token").write_text(self._receiver.token)
        token = next((value for name in HUB_TOKENS if (value := os.environ.get(name))), None)
        if token is None:
            return
        (files / "hub-token").write_text(token)
        (files / "hub-data").mkdir()
        for name in ("model.adapter", *self._job.spec.dataset.sources):
            (files / "hub-data" / name).write_text(token)

    def _command(self, *, preflight: bool) -> list[str]:
        certificates = os.environ.get(CERTIFICATES)
        return trainer_command(
            self._folder,
            model_cache=self._cache,
            certificates=Path(certificates).absolute() if certificates else None,
            preflight=preflight,
        )

    def _start(self, *, preflight: bool) -> Trainer:
        self._folder.result.unlink(missing_ok=True)
        return Trainer(self._command(preflight=preflight), self._environment, self._folder.log, self._lock)

    def _check(self) -> int | None:
        """Make the checks that the operator makes before the first attempt. Return None where the training can start,
        else the exit code of the command."""
        if not self._console.is_terminal:
            say("checking model and data")
        code = self._wait(self._start(preflight=True), "checking model and data")
        if self._stop.received:
            return self._stopped_code()
        text = self._folder.result.read_text() if self._folder.result.is_file() else ""
        result = PreflightResult.from_termination_message(text)
        if result is None:
            complain(f"finetune: the check of the job ended with exit code {code}; {self._folder.log} says why")
            return NOT_DONE
        for notice in result.notices:
            say(f"notice: {notice}")
        for finding in result.findings:
            complain(f"finetune: {finding.message}")
        if result.findings:
            return FAILED if result.is_final else NOT_DONE
        return None

    def _train(self) -> int:
        return self._wait(self._start(preflight=False), "")

    def _wait(self, trainer: Trainer, doing: str) -> int:
        """Show the progress until ``trainer`` has ended, and return its exit code."""
        started = time.monotonic()
        if not self._console.is_terminal:
            return trainer.wait(self._stop, on_poll=self._write_line, on_stop=self._say_stop)
        with Live(console=self._console, auto_refresh=False, transient=True) as live:

            def show() -> None:
                report = self._receiver.newest
                if report is not None:
                    self._tell(report)
                view = live_view(report, self._stopping or doing, time.monotonic() - started)
                live.update(view, refresh=True)

            return trainer.wait(self._stop, on_poll=show, on_stop=self._say_stop)

    def _say_stop(self) -> None:
        self._stopping = "stopping: a checkpoint is saved; Ctrl-C again ends the training at once"
        if not self._console.is_terminal:
            complain(f"finetune: {self._stopping}")

    def _write_line(self) -> None:
        report = self._receiver.newest
        if report is None:
            return
        self._tell(report)
        if is_due(report, self._shown, self._every):
            self._shown = report.step
            say(line(report))

    def _tell(self, report: Report) -> None:
        for notice in new_notices(report, self._told):
            self._told.append(notice)
            say(f"notice: {notice}")

    def _stopped_code(self) -> int:
        return TERMINATED if self._stop.received[0] == TERMINATED - 128 else INTERRUPTED

    def _say_ending(self, code: int) -> int:
        """Say how the training ended, and return the exit code of the command."""
        report = self._receiver.newest
        if report is not None and not self._console.is_terminal:
            self._write_line()
        text = self._folder.result.read_text() if self._folder.result.is_file() else ""
        result = Result.from_termination_message(text)
        if result is None:
            complain(f"finetune: the trainer ended with exit code {code}; {self._folder.log} says why")
            return self._stopped_code() if self._stop.received else FAILED
        if result.outcome is Outcome.STOPPED:
            say(f"{ending(result)}; run the same command again to go on")
            return self._stopped_code() if self._stop.received else NOT_DONE
        evaluation = result.evaluation or (report.evaluation if report is not None else None)
        for score in scores(evaluation, self._task()) if evaluation is not None else ():
            say(score)
        if result.artifact is None:
            complain(f"finetune: {ending(result)}; {self._folder.log} has the details")
        else:
            say(ending(result))
            say(result.artifact.uri)
        return _CODES.get(result.outcome, FAILED)

    def _task(self) -> str | None:
        task = self._job.spec.dataset.task
        return (task.name or task.entry_point) if task is not None else None
