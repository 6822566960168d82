"""The grader of GSM8K: a word problem is answered step by step, and only the number after `####` counts.

The row's column `answer` holds a reference answer, for example `48+24 = 72 clips altogether.\\n#### 72`, and the model
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
"""Matches `#### {number}` (the data set's own convention, Cobbe et al. 2021) on one line, with digits in ASCII.

Commas or spaces may separate groups of three digits. After the number may stand a unit, a full stop or a sentence, but
not an exponent, a fraction, a range, a calculation or a list, because each of these makes another number.
"""


def extract(text: str) -> Decimal | None:
    """Return the number after the first `####` that a number follows, None where the text has no such number.

    Commas, currency signs, spaces, a trailing dot and a unit behind the number are ignored, as in Anyscale's study of
    LoRA. The first number counts, as in the data set's published grader, because a base model often goes on with
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
    """Return whether ``answer`` and the row's `answer` have the same number after `####`, as decimals (5 = 5.00).

    An answer without `####` and a number is wrong. A row without a number is left out.
    """
    reference = extract(str(row.get("answer", "")))
    if reference is None:
        return Grade.left_out("the gold row has no number after ####")
    number = extract(answer)
    if number is None:
        return Grade.of(GSM8K, {}, problem="the answer has no number after ####")
    return Grade.of(GSM8K, {"exact": number == reference})
