"""GSM8K: a word problem is answered step by step, and only the number after `####` counts.

The gold row's `answer` holds such an answer (`... 48+24 = 72 clips altogether.\\n#### 72`); so does the generated text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from finetune_trainer.evaluation.graders.grades import Grade, graded, ungradable

GOLD_FIELD = "answer"
EXACT = "exact"
SCORES = (EXACT,)

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
"""`#### {answer}` (the data set's own convention, Cobbe et al. 2021), on one line, digits in ASCII.

Thousands in groups of three, by comma or space. What follows may be a unit, a full stop or a sentence, but nothing that
makes another number of it: an exponent, a fraction, a range, a calculation, a list.
"""


def extract(text: str) -> Decimal | None:
    """Return the number after the first `####` that a number follows, None where there is none.

    Commas, currency signs, spaces, a trailing dot and a unit behind the number are left out, as in the study. The first
    marker counts, as in the data set's published grader: a model that goes on writing after its answer has answered.
    """
    match = _ANSWER.search(text)
    if match is None:
        return None
    number = Decimal(re.sub(r"[^0-9.]", "", match["number"]))
    signs = match["sign"] + match["inner"]
    if len(signs) > 1:
        return None
    return -number if signs in {"-", "\u2212"} else number


def grade(answer: str, gold_row: Mapping[str, object]) -> Grade:
    """Return whether ``answer`` and the row's `answer` end in the same number, compared as decimals (5 = 5.00).

    An answer without a marker is wrong, a gold row without one ungradable.
    """
    gold = extract(str(gold_row.get(GOLD_FIELD, "")))
    if gold is None:
        return ungradable("the gold row has no number after ####")
    said = extract(answer)
    if said is None:
        return graded(SCORES, problem="the answer has no number after ####")
    return graded(SCORES, right=[EXACT] if said == gold else [])
