"""Checks whether the answers of a job can be graded: the columns that its grader reads, and the first rows.
`row_check.py` uses `TaskCheck` for each data source."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_core.row_templates import Piece
from finetune_trainer.data.dataset import GRADED_FIELDS
from finetune_trainer.data.files.row import NamedColumn
from finetune_trainer.evaluation.gradable import asked_rows, needed_by, why_ungradable
from finetune_trainer.evaluation.graders import Grading

TRIED_SECONDS = 20.0
"""Longest time in seconds for which the grader is tried on the rows of a data source. All checks together have
PREFLIGHT_SECONDS (two minutes)."""


class TaskCheck:
    """Checks whether the data sources have what the grader of a job needs. Without a task every source passes."""

    def __init__(self, config: RunConfig, grading: Grading | None) -> None:
        """Check for the job with the run file ``config``. ``grading`` grades the job's answers; it is None if the job
        has no task."""
        self._evaluation = config.evaluation
        self._scored = "dataset.test" if config.dataset.test is not None else "dataset.validation"
        self._grading = grading

    def columns(self, field: str) -> Sequence[NamedColumn]:
        """Return the columns that the rows of ``field`` must have for the grader, with the fields of the spec that name
        them. ``field`` is the path of a data source in the spec, for example `dataset.validation`. The result is
        empty where no answers to the rows of ``field`` are graded."""
        return self._grading.required_columns if self._grading is not None and field in GRADED_FIELDS else ()

    @property
    def columns_read(self) -> Collection[str]:
        """All columns that the grader reads in the rows that are graded."""
        return self._grading.columns_read if self._grading is not None else ()

    def notices(
        self,
        field: str,
        rows: Sequence[Mapping[str, object]],
        read_completion: Callable[[Iterable[Piece]], str],
        *,
        whole: bool,
    ) -> list[str]:
        """Return a notice where no answer to ``rows``, the first rows of ``field``, can be graded. Rows beyond
        `evaluation.generation.maxExamples` are left out, because no answers to them are generated. ``read_completion``
        is the argument of `Grading.reading`. ``whole`` says whether ``rows`` are all rows of ``field``.

        Raises UserError instead where the job needs a score of its task and no other rows are graded, because ``rows``
        are all rows or reach `maxExamples`.
        """
        if self._grading is None or field not in GRADED_FIELDS:
            return []
        asked = asked_rows(self._evaluation, rows)
        whole = whole or len(asked) == self._evaluation.generation.max_examples
        problem = why_ungradable(self._grading.reading(read_completion), asked, seconds=TRIED_SECONDS)
        if not problem:
            return []
        needing = needed_by(self._evaluation, field, self._scored)
        if needing and whole:
            raise UserError(field, f"{problem}, and {needing} needs a score of dataset.task")
        return [f"{field}: {problem}"]
