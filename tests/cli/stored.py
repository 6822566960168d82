"""FineTuneJobs as the API server returns them: `examples/quickstart.yaml`, with a status from a file in
tests/cli/jobs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from finetune_core.api.job import FineTuneJob

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
FOLDER = Path(__file__).parent / "jobs"


def stored(name: str | None = None) -> dict[str, Any]:
    """Return the quickstart job as the API server's JSON, with the status in `jobs/<name>.yaml`. Without ``name`` the
    job has no status."""
    found: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text())
    found["metadata"] |= {"namespace": "research", "uid": "u", "generation": 1, "resourceVersion": "7"}
    if name is not None:
        found |= yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return found


def job(name: str | None = None) -> FineTuneJob:
    """Return the quickstart job as a FineTuneJob, with the status in `jobs/<name>.yaml`. Without ``name`` the job has
    no status."""
    return FineTuneJob.model_validate(stored(name))
