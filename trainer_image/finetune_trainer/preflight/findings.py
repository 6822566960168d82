"""Collects the findings of the preflight checks. A check raises an exception for a problem. `Findings` turns the
exception into a finding, so that the next check can run and one preflight pod finds all problems of a job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from finetune_core.contract.preflight_result import (
    FINDING_LIMIT,
    Finding,
    FindingKind,
    FoundRun,
    InputSizes,
    PlannedNeeds,
    PreflightResult,
    ordered,
)
from finetune_core.errors import UserError, valid_text
from finetune_trainer.pod.errors import OutsideFailure

T = TypeVar("T")


class Findings:
    """The findings and notices so far, and what the running check examines."""

    def __init__(self, send: Callable[[Any], None] = lambda _: None) -> None:
        """Begin without findings. Everything that is added is passed to ``send`` as a JSON value. Another process can
        pass each value to `receive` of its own `Findings`."""
        self._send = send
        self._found: list[Finding] = []
        self._notices: list[str] = []
        self.found: FoundRun | None = None
        """The run that the job takes over: its artifact or, without one, its newest checkpoint. None if there is no
        such run."""
        self._model_bytes: int | None = None
        self._data_bytes = 0
        self._planned: PlannedNeeds | None = None
        self.subject = "the run file"
        """What the running check examines, for example `dataset.train`. The message about a check that was ended names
        it."""

    def collect(self, subject: str, check: Callable[[], T]) -> T | None:
        """Run ``check`` and return its result. If it raises UserError or OutsideFailure, add a finding and return None.
        ``subject`` says what the check examines."""
        self.subject = subject
        self._send({"subject": subject})
        try:
            return check()
        except UserError as error:
            self.add(FindingKind.FINAL, str(error))
        except OutsideFailure as error:
            self.add(FindingKind.OUTSIDE, str(error))
        return None

    def add(self, kind: FindingKind, sentence: str) -> None:
        """Add a finding, unless another check has found the same. ``sentence`` is cut off after `FINDING_LIMIT`
        characters."""
        sentence = valid_text(sentence)[:FINDING_LIMIT]
        if any(found.message == sentence for found in self._found):
            return
        self._found.append(Finding(kind=kind, message=sentence))
        self._send({"kind": kind.value, "message": sentence})

    def notice(self, *sentences: str) -> None:
        """Add notices, which are sentences that users should read although the job can run."""
        valid = [valid_text(sentence) for sentence in sentences]
        self._notices += valid
        self._send({"notices": valid})

    def measured(self, *, model_bytes: int | None = None, data_bytes: int = 0) -> None:
        """Note the size of the base model, or add the size of the data files of one source to that of the sources
        before."""
        self._model_bytes = self._model_bytes if model_bytes is None else model_bytes
        self._data_bytes += data_bytes
        self._send({"model_bytes": model_bytes, "data_bytes": data_bytes})

    def plan(self, planned: PlannedNeeds) -> None:
        """Note what the training needs by its plan."""
        self._planned = planned
        self._send({"planned": planned.model_dump()})

    def receive(self, sent: Mapping[str, Any]) -> None:
        """Add a value that the `Findings` of another process passed to its function ``send``."""
        self.subject = sent.get("subject", self.subject)
        self.notice(*sent.get("notices", ()))
        self.measured(model_bytes=sent.get("model_bytes"), data_bytes=sent.get("data_bytes", 0))
        if "planned" in sent:
            self.plan(PlannedNeeds.model_validate(sent["planned"]))
        if "kind" in sent:
            self.add(FindingKind(sent["kind"]), sent["message"])

    @property
    def result(self) -> PreflightResult:
        """The findings and notices so far, in the form of the termination message."""
        sizes = None
        if self._model_bytes is not None and not self._found:
            sizes = InputSizes(model_bytes=self._model_bytes, data_bytes=self._data_bytes)
        return PreflightResult(
            findings=ordered(self._found),
            notices=self._notices,
            found=self.found,
            sizes=sizes,
            planned=self._planned if not self._found else None,
        )
