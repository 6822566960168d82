"""The pages of the study show what its job files and the plan say.

`python -m tests.examples.test_study_pages` writes the tables into the pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from examples.study.study_jobs import JOBS, StudyJob, minutes_of
from finetune_core.api.job import FineTuneJob
from finetune_core.planned_job import gpu_of, plan_of
from finetune_core.planning.gpu_types import GIBIBYTE
from finetune_core.planning.job_plan import JobPlan
from tests.planning.memory_cases import MODELS

REPOSITORY = Path(__file__).parents[2]
LLAMA2 = REPOSITORY / "examples/study/llama2"
PLANS_PAGE = LLAMA2 / "README.md"
STUDY_PAGE = REPOSITORY / "docs/study.md"
SIZES = ("7b", "13b", "70b")
ROWS = {"ViGGO": 5_103, "GSM8K": 7_473, "SQL": 56_355}
"""Published sizes of the training sets: Juraska et al. 2019, Cobbe et al. 2021, Zhong et al. 2017."""


def job_in(file: Path) -> FineTuneJob:
    """Return the job in ``file``."""
    return FineTuneJob.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def planned(file: Path) -> JobPlan:
    """Return what `finetune plan` says of a job of Llama 2."""
    job = job_in(file)
    task = job.spec.dataset.task
    assert task is not None
    assert task.name is not None
    configuration = MODELS[f"Llama-2-{file.name.partition('-')[0].upper()}"]
    return plan_of(job.spec, configuration, gpu_of(job.spec), rows=ROWS[task.name])


def files_of_llama2() -> list[Path]:
    """Return the job files, the smallest model first."""
    return sorted(LLAMA2.glob("*.yaml"), key=lambda file: (SIZES.index(file.name.partition("-")[0]), file.stem))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def in_bytes(count: int) -> str:
    """Return a size on disk, in decimal units as the study gives them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def plans() -> str:
    """Return the table of the plans."""

    def row(file: Path) -> tuple[str, ...]:
        job, plan = job_in(file), planned(file)
        assert plan.hours is not None
        lora = job.spec.lora
        method = "every parameter" if lora is None else f"LoRA, rank {lora.rank}"
        return (
            f"[{file.stem}]({file.name})",
            method,
            str(job.spec.training.learning_rate),
            str(plan.setup.processes),
            f"{plan.memory.needed / GIBIBYTE:.1f} of {plan.gpu.memory_gibibytes:g}",
            f"{plan.speed.seconds_per_step:.1f}",
            f"{plan.hours:.1f}",
            in_bytes(plan.host.checkpoint),
            in_bytes(plan.host.artifact),
        )

    head = (
        "job",
        "trains",
        "rate",
        "GPUs",
        "memory of a GPU (GiB)",
        "s a step",
        "hours at most",
        "checkpoint",
        "artifact",
    )
    return table(head, map(row, files_of_llama2()))


def jobs() -> str:
    """Return the table of the jobs of `make study`."""

    def row(job: StudyJob) -> tuple[str, ...]:
        spec = job_in(job.file).spec
        lora, training = spec.lora, spec.training
        prompt = "added tokens" if spec.model.added_tokens else "none"
        form = spec.dataset.format.prompt_completion
        assert form is not None
        if spec.evaluation.base_prompt is None:
            prompt = "the task"
        length = f"{training.epochs} epochs" if training.epochs is not None else f"{training.max_steps} steps"
        return (
            f"[{job.name}](../examples/study/smollm2/{job.file.name})",
            "every parameter" if lora is None else f"LoRA, rank {lora.rank}",
            str(training.learning_rate),
            prompt,
            length,
            f"{job.minutes:g}",
            job.question,
        )

    head = ("job", "trains", "rate", "prompt tells", "length", "minutes", "compared with")
    total = f"Together: about {minutes_of(JOBS):.0f} minutes on two idle cores. The minutes are estimates."
    return f"{table(head, map(row, JOBS))}\n\n{total}"


PARTS: Mapping[Path, Mapping[str, Callable[[], str]]] = {PLANS_PAGE: {"plans": plans}, STUDY_PAGE: {"jobs": jobs}}


def with_tables(page: Path) -> str:
    """Return the text of ``page`` with the tables between their markers."""
    text = page.read_text(encoding="utf-8")
    for name, make in PARTS[page].items():
        shown = re.compile(f"<!-- generated: {name} -->\n.*?<!-- end -->", re.DOTALL)
        assert len(shown.findall(text)) == 1
        part = f"<!-- generated: {name} -->\n\n{make()}\n\n<!-- end -->"
        text = shown.sub(part.replace("\\", r"\\"), text)
    return text


@pytest.mark.parametrize("page", PARTS, ids=lambda page: page.parent.name)
def test_a_page_shows_what_the_job_files_and_the_plan_say(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == with_tables(page), "run: make docs"


@pytest.mark.parametrize("file", files_of_llama2(), ids=lambda file: file.stem)
def test_a_job_of_llama2_fits_its_gpus(file: Path) -> None:
    plan = planned(file)
    assert (plan.fits, plan.problems_as_written) == (True, ())


if __name__ == "__main__":
    for changed in PARTS:
        changed.write_text(with_tables(changed), encoding="utf-8")
