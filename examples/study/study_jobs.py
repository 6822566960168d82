"""The jobs of `make study` in their order, how long each of them takes, and where its runs lie.

`__main__.py` runs the jobs, and the test of docs/study.md shows them in a table. The functions are pure, except that
they read files.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_core.errors import UserError
from finetune_core.layout import ARTIFACT_POINTER, parse_uri

FILES = Path(__file__).parent / "smollm2"
CLAIM = "study"
"""Name of the volume in the job files. On this machine the folder of the study takes its place."""
SHORT_ANSWERS = 4
"""Number of graded answers of a shortened job."""


@dataclass(frozen=True, slots=True)
class StudyJob:
    """A job of the study."""

    name: str
    """Name of the file, and of the run in the comparison."""
    minutes: float
    """How long the job takes on two idle cores: training, evaluations, and the answers of both models. The figure is an
    estimate from 2.9 ms a trained token with LoRA, the speed of the quickstart (docs/performance.md), and 1.3 times as
    much with every parameter."""
    question: str
    """What the job is compared with, and why."""

    @property
    def file(self) -> Path:
        """The job file."""
        return FILES / f"{self.name}.yaml"


JOBS = (
    StudyJob("viggo-lora", 4, "LoRA beside `viggo-full`"),
    StudyJob("viggo-full", 5, "every parameter, with the rate of the study"),
    StudyJob("gsm8k-lora", 5, "LoRA beside `gsm8k-full`: the study's largest gap was in mathematics"),
    StudyJob("gsm8k-full", 6, "every parameter, with the rate of the study"),
    StudyJob("sql-lora", 5, "LoRA beside `sql-full`; the base of the next jobs"),
    StudyJob("sql-full", 6, "every parameter, with the rate of the study"),
    StudyJob("sql-full-5e-5", 6, "ten times the rate of the study, because the training is short"),
    StudyJob("sql-lora-3e-5", 5, "the lower rate, which the study took where 1e-4 was unstable"),
    StudyJob("sql-lora-plain", 4.5, "no description of the task: the study saw 1e-4 become unstable"),
    StudyJob("sql-lora-tokens", 4.5, "four added tokens in place of a description of the task"),
    StudyJob("sql-lora-rank-64", 5.5, "eight times as many trained values as with rank 8"),
    StudyJob("sql-lora-equal-time", 6, "as long as `sql-full`, where the other jobs have equal epochs"),
)
"""All jobs, in the order in which they run: the pairs first, so that an interrupted study has something to compare."""


def chosen(names: Collection[str] | None) -> list[StudyJob]:
    """Return the jobs with ``names``, in the order of the study; None means all. Raises UserError for another name."""
    known = [job.name for job in JOBS]
    for name in names or ():
        if name not in known:
            raise UserError("--only", f"must name jobs of the study, and {name} is none of: {', '.join(known)}")
    return [job for job in JOBS if names is None or job.name in names]


def document_of(job: StudyJob, steps: int | None) -> dict[str, Any]:
    """Return the job as it runs: the content of its file, or with ``steps`` a short job to try the study out, which has
    that many optimizer steps and few answers."""
    document: dict[str, Any] = yaml.safe_load(job.file.read_text(encoding="utf-8"))
    if steps is None:
        return document
    short = copy.deepcopy(document)
    spec = short["spec"]
    spec["training"].pop("epochs", None)
    spec["training"] |= {"maxSteps": steps, "warmupSteps": min(spec["training"]["warmupSteps"], steps // 2)}
    # Two evaluations and one checkpoint before the last step: as many as the claims of the comparison need.
    spec["evaluation"]["everySteps"] = max(1, steps // 2)
    spec["evaluation"]["generation"] |= {"maxExamples": SHORT_ANSWERS}
    spec["storage"]["checkpoint"]["everySteps"] = max(1, steps - 1)
    return short


def run_folder(store: Path, document: Mapping[str, Any]) -> Path | None:
    """Return the folder of all runs of a job below ``store``, or None where the job has not begun. `finetune run` puts
    a namespace between the address and the name of the job."""
    storage = document["spec"]["storage"]
    place = parse_uri(storage["uri"])
    above = store / place.bucket / place.prefix
    found = sorted(above.glob(f"*/{document['metadata']['name']}/{storage['runId']}"))
    return found[0] if found else None


def is_finished(folder: Path | None) -> bool:
    """Return whether the job whose runs lie in ``folder`` has its artifact."""
    return folder is not None and (folder / ARTIFACT_POINTER).is_file()


def minutes_of(jobs: Sequence[StudyJob]) -> float:
    """Return how long ``jobs`` take on two idle cores, one after the other."""
    return sum(job.minutes for job in jobs)
