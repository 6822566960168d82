"""One start of a job on this machine: the check that the operator makes before an attempt, the training with its
progress, and what is said at the end. `run_job.py` makes a `LocalTraining` while it holds the lock of the job.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from rich.live import Live

from finetune_cli.localrun.local_job import UID, cpus_asked
from finetune_cli.localrun.progress_view import ending, is_due, line, live_view, new_notices, scores
from finetune_cli.localrun.report_receiver import ReportReceiver
from finetune_cli.localrun.state_folder import StateFolder
from finetune_cli.localrun.trainer_process import StopSignals, Trainer, trainer_command, trainer_environment
from finetune_cli.terminal import SafeConsole, complain, say
from finetune_core.api.job import FineTuneJob
from finetune_core.contract import Outcome, Report, Result, RunConfig
from finetune_core.contract.preflight_result import PreflightResult

CERTIFICATES = "AWS_CA_BUNDLE"
"""Environment variable of the AWS tools with the path of the CA certificates of an object store."""
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables of the Hugging Face Hub's libraries with an access token, the preferred one first."""
SUCCEEDED, FAILED, NOT_DONE, GATE_FAILED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
STOPPED = (INTERRUPTED, TERMINATED)
"""The exit codes after Ctrl-C and after SIGTERM."""
_CODES = {
    Outcome.COMPLETED: SUCCEEDED,
    Outcome.EARLY_STOPPED: SUCCEEDED,
    Outcome.GATE_FAILED: GATE_FAILED,
    Outcome.OUTSIDE_FAILURE: NOT_DONE,
}
"""Exit codes of the command. Every other outcome has the exit code FAILED."""


class LocalTraining:
    """One start of a job on this machine."""

    def __init__(
        self,
        job: FineTuneJob,
        config: RunConfig,
        folder: StateFolder,
        lock: int,
        *,
        model_cache: Path,
        every: int | None = None,
    ) -> None:
        """Prepare the start. ``config`` is the run file, without an address for reports. ``lock`` is the file
        descriptor of the lock of ``folder``, ``model_cache`` the folder that keeps fetched model files, and ``every``
        the number of steps between two lines in a pipe, None for the default."""
        metadata = job.metadata
        self._job, self._config, self._folder, self._lock, self._every = job, config, folder, lock, every
        self._cache = model_cache
        self._receiver = ReportReceiver(metadata.namespace, metadata.name)
        self._stop = StopSignals()
        self._console = SafeConsole()
        self._shown: int | None = None
        self._told: list[str] = []
        self._doing = ""
        variables = {item.name: item.value for item in job.spec.pod_template.env if item.value is not None}
        self._environment = trainer_environment(
            os.environ,
            namespace=metadata.namespace,
            name=metadata.name,
            uid=UID,
            cpus=cpus_asked(job),
            variables=variables,
        )

    def run(self) -> int:
        """Check the job, train it, and say how it ended. Return the exit code of the command."""
        self._write_inputs()
        with self._stop.caught(), self._receiver.listening():
            if self._job.spec.run_policy.preflight != "Skip" and (code := self.check()) is not None:
                return code
            config = self._config.model_copy(update={"report": self._receiver.config})
            self._folder.run_file.write_text(config.to_json())
            code = self._wait(self._start(), "", stopping=True)
            return self._say_ending(code)

    def dry_run(self, first_examples: Path) -> int | None:
        """Only check the job, and let the check write ``first_examples``. Return None without a finding, else the exit
        code of the command."""
        self._write_inputs()
        with self._stop.caught():
            return self.check(first_examples)

    def check(self, first_examples: Path | None = None) -> int | None:
        """Make the checks that the operator makes before the first attempt. Return None where the training can start,
        else the exit code of the command."""
        doing = "checking model and data"
        if not self._console.is_terminal:
            say(doing)
        code = self._wait(self._start(preflight=True, first_examples=first_examples), doing, stopping=False)
        if self._stop.received:
            return self._stopped_code()
        result = PreflightResult.from_termination_message(self._result_text())
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

    def _start(self, *, preflight: bool = False, first_examples: Path | None = None) -> Trainer:
        self._folder.result.unlink(missing_ok=True)
        certificates = os.environ.get(CERTIFICATES)
        nothing = self._folder.secrets / "none"
        command = trainer_command(
            self._folder,
            model_cache=self._cache if self._job.spec.model.volume is None else nothing,
            certificates=Path(certificates).absolute() if certificates else nothing,
            preflight=preflight,
            first_examples=first_examples,
        )
        return Trainer(command, self._environment, self._folder.log, self._lock)

    def _result_text(self) -> str:
        return self._folder.result.read_text() if self._folder.result.is_file() else ""

    def _wait(self, trainer: Trainer, doing: str, *, stopping: bool) -> int:
        """Show the progress until ``trainer`` has ended, and return its exit code. ``doing`` is what it does, empty
        where its reports say it. With ``stopping`` a stop is told, because it takes some time."""
        started, self._doing = time.monotonic(), doing
        tell_stop = self._say_stop if stopping else lambda: None
        if not self._console.is_terminal:
            return trainer.wait(self._stop, on_poll=self._write_line, on_stop=tell_stop)
        with Live(console=self._console, auto_refresh=False, transient=True) as live:

            def show() -> None:
                report = self._receiver.newest
                if report is not None:
                    self._tell(report)
                live.update(live_view(report, self._doing, time.monotonic() - started), refresh=True)

            return trainer.wait(self._stop, on_poll=show, on_stop=tell_stop)

    def _say_stop(self) -> None:
        self._doing = "stopping: a checkpoint is saved; Ctrl-C again ends the training at once"
        if not self._console.is_terminal:
            complain(f"finetune: {self._doing}")

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
        result = Result.from_termination_message(self._result_text())
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
