"""The types of two functions that most end-to-end tests pass around: one makes the manifest of a FineTuneJob, the other
says whether a FineTuneJob has come as far as a test waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_core.api.job import FineTuneJob

Manifest = dict[str, Any]
MakeJob = Callable[..., Manifest]
"""Takes the job's name and changes of the quickstart, such as ``spec__training__maxSteps=300``."""
JobPredicate = Callable[[FineTuneJob], bool]
"""Returns whether the job's status shows what `steps.wait_for_job` waits for."""
