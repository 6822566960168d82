"""The graders that compare texts: ExactMatch, Contains and Regex. They share what makes no difference between two texts
(`Normalisation`) and what a row's column may hold (`references`)."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune_core.api.task import Ignorable, TaskSpec
from finetune_core.errors import UserError
from finetune_core.tasks import CONTAINS, EXACT_MATCH, REGEX
from finetune_trainer.evaluation.graders.grades import Grade

PATTERN_BYTES = 1 << 20
"""Largest memory in bytes of a compiled regular expression. RE2 refuses a pattern that needs more."""
NO_TEXT = "the row has no text to compare with"


@dataclass(frozen=True)
class Normalisation:
    """What makes no difference between two texts, besides white space around them."""

    ignored: frozenset[Ignorable]

    def of(self, text: str) -> str:
        """Return the form of ``text`` in which it is compared. The form of a form is the same form."""
        if "UnicodeForm" in self.ignored:
            text = unicodedata.normalize("NFKC", text)
        if "Case" in self.ignored:
            text = _without_case(text)
            text = unicodedata.normalize("NFKC", text) if "UnicodeForm" in self.ignored else text
        if "Punctuation" in self.ignored:
            text = "".join(character for character in text if not unicodedata.category(character).startswith("P"))
        if "WhiteSpace" in self.ignored:
            text = " ".join(text.split())
        return text.strip()


def _without_case(text: str) -> str:
    """Return ``text`` without case. Folding may bring forth letters that can be folded again, so it is repeated."""
    folded = text.casefold()
    while folded != (again := folded.casefold()):
        folded = again
    return folded


def references(value: object) -> list[str] | None:
    """Return the texts that a row's column holds: a text, a number, True or False, or a list of these. None where the
    column holds something else, nothing, or an empty list."""
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [_text(item) for item in values]
    return [text for text in texts if text is not None] if texts and None not in texts else None


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, (bool, int, float)) else None


def _normalised(value: object, normalisation: Normalisation) -> list[str]:
    """Return the forms of the texts in a row's column. Empty where a form is empty, because every answer would contain
    it, or where the column holds no text."""
    forms = [normalisation.of(text) for text in references(value) or ()]
    return forms if all(forms) else []


def _normalisation(spec: TaskSpec) -> Normalisation:
    return Normalisation(frozenset(spec.ignore or ()))


def exact_match_grader(spec: TaskSpec) -> Callable[[str, Mapping[str, object]], Grade]:
    """Return the grader of the task ExactMatch with the arguments of ``spec``."""
    normalisation = _normalisation(spec)

    def grade(answer: str, row: Mapping[str, object]) -> Grade:
        right = _normalised(row.get("answer"), normalisation)
        if not right:
            return Grade.left_out(NO_TEXT)
        return Grade.of(EXACT_MATCH, {"exact": normalisation.of(answer) in right})

    return grade


def contains_grader(spec: TaskSpec) -> Callable[[str, Mapping[str, object]], Grade]:
    """Return the grader of the task Contains with the arguments of ``spec``."""
    normalisation = _normalisation(spec)

    def grade(answer: str, row: Mapping[str, object]) -> Grade:
        wanted = _normalised(row.get("answer"), normalisation)
        if not wanted:
            return Grade.left_out(NO_TEXT)
        text = normalisation.of(answer)
        found = sum(_stands_in(text, part) for part in wanted)
        return Grade.of(CONTAINS, {"contains": found == len(wanted), "found": found / len(wanted)})

    return grade


def _stands_in(text: str, part: str) -> bool:
    """Return whether ``part`` stands in ``text`` and is not a part of a longer word or number there."""
    place = text.find(part)
    while place >= 0:
        end = place + len(part)
        if not _joined(text[place - 1 : place], part[0]) and not _joined(part[-1], text[end : end + 1]):
            return True
        place = text.find(part, place + 1)
    return False


def _joined(left: str, right: str) -> bool:
    """Return whether two characters that stand side by side belong to one word or number. Letters without upper and
    lower case do not join, because scripts with such letters may put no space between words."""
    return all(side and (side.isdigit() or side.upper() != side.lower()) for side in (left, right))


def regex_grader(spec: TaskSpec) -> Callable[[str, Mapping[str, object]], Grade]:
    """Return the grader of the task Regex with the arguments of ``spec``. Raises UserError where RE2 can't read the
    pattern."""
    # RE2 searches in time proportional to the length of the text, whatever the pattern. It is imported here, because
    # only this task needs it.
    import re2

    options = re2.Options()
    options.max_mem = PATTERN_BYTES
    options.log_errors = False
    try:
        pattern = re2.compile(spec.pattern or "", options)
    except (re2.error, UnicodeEncodeError) as error:
        detail = error.args[0] if error.args else ""
        detail = detail.decode("utf-8", "replace") if isinstance(detail, bytes) else str(detail)
        raise UserError(
            "dataset.task.pattern", f"must be a regular expression in the syntax of RE2: {detail}"
        ) from None
    normalisation = _normalisation(spec)

    def find(text: str) -> str | None:
        """Return what the pattern finds in ``text``, in the form in which it is compared."""
        found = pattern.search(text.encode("utf-8", "replace").decode())
        if found is None:
            return None
        return normalisation.of((found[1] if pattern.groups else found[0]) or "")

    def grade(answer: str, row: Mapping[str, object]) -> Grade:
        right = _right(references(row.get("answer")) or (), find, normalisation)
        if not right:
            return Grade.left_out(NO_TEXT)
        found = find(answer)
        if found is None:
            return Grade.of(REGEX, {}, problem="the pattern finds nothing in the answer")
        return Grade.of(REGEX, {"exact": found in right, "found": True})

    return grade


def _right(texts: Sequence[str], find: Callable[[str], str | None], normalisation: Normalisation) -> list[str]:
    """Return what is right for a row: what the pattern finds in each of its texts, or the whole text where the pattern
    finds nothing. Empty where one of these is empty."""
    right = [normalisation.of(text) if (found := find(text)) is None else found for text in texts]
    return right if all(right) else []
