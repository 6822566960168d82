"""The grader of GSM8K. In this task, the model solves a word problem in arithmetic step by step. Only the number after
`####` counts.

The row's column `answer` holds the reference answer, for example `48+24 = 72 clips altogether.\\n#### 72`. The model
answers in the same form. `evaluation/scorer.py` calls `grade` for every generated answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from finetune_core.row_templates import text_or_none
from finetune_core.tasks import GSM8K
from finetune_trainer.evaluation.graders.grades import Grade
from finetune_trainer.evaluation.graders.number import read_number_behind

MARKER = "####"
"""The text behind which the data set's answers state their number (Cobbe et al. 2021)."""


def extract(text: str) -> Decimal | None:
    """Return the first number that is stated after `####`, or None if there is none or the statement names several.

    As in Anyscale's study of LoRA, these are ignored: commas, currency signs, spaces, a full stop and a unit behind the
    number. As in the data set's published grader, the first number counts, because a base model often goes on with
    another problem after its answer.
    """
    return read_number_behind(MARKER, text)


def grade(answer: str, row: Mapping[str, object]) -> Grade:
    """Return the grade of ``answer``. It is right if the number after `####` equals that of the row's column `answer`,
    as decimals (5 = 5.00).

    An answer without such a number is wrong. A row without such a number can't be used.
    """
    reference = extract(text_or_none(row.get("answer")) or "")
    if reference is None:
        return Grade.left_out("the gold row has no number after ####")
    number = extract(answer)
    if number is None:
        return Grade.of(GSM8K, {}, problem="the answer has no number after ####")
    return Grade.of(GSM8K, {"exact": number == reference})
