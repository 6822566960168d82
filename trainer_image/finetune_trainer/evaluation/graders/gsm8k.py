"""The grader of GSM8K: a word problem in arithmetic is answered step by step, and only the number after `####` counts.

The row's column `answer` holds the reference answer, for example `48+24 = 72 clips altogether.\\n#### 72`. The model
answers in the same form. `evaluation/scorer.py` calls `grade` for every generated answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from finetune_core.tasks import GSM8K
from finetune_trainer.evaluation.graders.grades import Grade

_ANSWER = re.compile(
    r"""
    (?<!\#)\#{4}(?!\#) [^\S\n]*
    (?P<sign>[-+\u2212]?) [^\S\n]* \\?[$€£]? [^\S\n]* (?P<inner>[-+\u2212]?)
    (?P<number>
        (?> (?: [0-9]{1,3} (?: (?:,[0-9]{3})+ | (?:[\u0020\u00a0\u202f][0-9]{3})+ ) (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
        | \.[0-9]+ )
    )
    (?! [0-9] | [.,][0-9] | [eE][-+]?[0-9] | [^\S\n]* [-+/*^:×\u2212]? [^\S\n]* [$]? [0-9] | [^\S\n]* [¼½¾] )
    """,
    re.VERBOSE,
)
"""Matches `#### {number}` on one line, with digits in ASCII. The `####` is the data set's own convention (Cobbe et al.
2021).

Commas or spaces may separate groups of three digits. Behind the number may stand a unit, a full stop or a sentence. An
exponent, a fraction, a range, a calculation or a list must not stand there, because it would mean another number.
"""


def extract(text: str) -> Decimal | None:
    """Return the first number that stands after `####`, or None if the text has no such number or the number has two
    signs.

    As in Anyscale's study of LoRA, these are ignored: commas, currency signs, spaces, a full stop and a unit behind the
    number. As in the data set's published grader, the first number counts, because a base model often goes on with
    another problem after its answer.
    """
    match = _ANSWER.search(text)
    if match is None:
        return None
    number = Decimal(re.sub(r"[^0-9.]", "", match["number"]))
    signs = match["sign"] + match["inner"]
    if len(signs) > 1:
        return None
    return -number if signs in {"-", "\u2212"} else number


def grade(answer: str, row: Mapping[str, object]) -> Grade:
    """Return the grade of ``answer``. It is right if the number after `####` equals that of the row's column `answer`,
    as decimals (5 = 5.00).

    An answer without such a number is wrong. A row without such a number can't be used.
    """
    reference = extract(str(row.get("answer", "")))
    if reference is None:
        return Grade.left_out("the gold row has no number after ####")
    number = extract(answer)
    if number is None:
        return Grade.of(GSM8K, {}, problem="the answer has no number after ####")
    return Grade.of(GSM8K, {"exact": number == reference})
