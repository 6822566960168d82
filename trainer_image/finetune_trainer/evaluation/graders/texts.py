"""The graders that compare texts: ExactMatch, Contains and Regex. They share two rules: which differences between two
texts do not count (`Normalisation`), and what a row's column may hold (`references`)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune_core.api.task import Ignorable, TaskSpec
from finetune_core.patterns import compile_pattern
from finetune_core.row_templates import text_or_none
from finetune_core.tasks import CONTAINS, EXACT_MATCH, REGEX
from finetune_trainer.evaluation.graders.grades import Grade

NO_TEXT = "the row has no text to compare with"
EMPTY_GROUP = "the first group of the pattern finds no text in the row's own text"
EMPTY_MATCH = "the pattern finds an empty text in the row's own text"

_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))
"""Characters without width, such as the byte order mark. With this table `str.translate` removes them."""
_LEADING_POINT = r"(?<![\w.,)])(?<![\w)]-)[.\u066b](?=\d)"
"""A decimal point before the first digit of a number, as in `.5`. In `1-.5` and `1,.5` the point could belong to both
numbers, so it is left out."""
_OF_NUMBERS = re.compile(rf"(?<=\d)[.\u066b](?=\d)|{_LEADING_POINT}|(?<![\w)])-(?=[.\u066b]?\d)")
"""Punctuation that belongs to a number: a decimal point, and the sign before a number. Digits may be those of any
script. U+066B is the decimal point of Arabic numbers."""


@dataclass(frozen=True)
class Normalisation:
    """Which differences between two texts do not count. White space around a text never counts."""

    ignored: frozenset[Ignorable]

    def of(self, text: str) -> str:
        """Return the form of ``text`` in which texts are compared. A text that is in this form already is returned as
        it is."""
        form = self._once(text)
        # Where one step has removed a character, its two neighbours are side by side, and an earlier step may change
        # them. So the steps are repeated until nothing changes.
        while form != (again := self._once(form)):
            form = again
        return form

    def _once(self, text: str) -> str:
        if "UnicodeForm" in self.ignored:
            text = unicodedata.normalize("NFKC", text.translate(_INVISIBLE))
        if "Case" in self.ignored:
            text = text.casefold()
        if "Punctuation" in self.ignored:
            text = _without_punctuation(text)
        if "WhiteSpace" in self.ignored:
            text = " ".join(text.split())
        return text.strip()


def _without_punctuation(text: str) -> str:
    """Return ``text`` without punctuation, except for the signs and the decimal points of numbers, so that 3.5 does not
    become 35."""
    kept = {found.start() for found in _OF_NUMBERS.finditer(text)}
    return "".join(
        character
        for place, character in enumerate(text)
        if place in kept or not unicodedata.category(character).startswith("P")
    )


def references(value: object) -> list[str] | None:
    """Return the texts in ``value``, the value of a row's column. It may be a value that a template can show, such as a
    text or a number, or a list of such values. None where the column holds nothing, an empty list or something else."""
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [text for text in map(text_or_none, values) if text is not None]
    return texts if texts and len(texts) == len(values) else None


def _normalised(value: object, normalisation: Normalisation) -> list[str]:
    """Return the texts in ``value``, the value of a row's column, in the form in which they are compared. Empty where
    the column holds no text, or where one of the forms is an empty text, which every answer would contain."""
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
        found = sum(_parts_in(normalisation.of(answer), wanted))
        return Grade.of(CONTAINS, {"contains": found == len(wanted), "found": found / len(wanted)})

    return grade


_IN_NUMBERS = re.compile(r"(?<=\d)(?:[.\u066b](?=\d)|[,\u066c](?=\d{3}(?!\d)))")
"""A decimal point or a comma that joins the digits of a number. U+066B and U+066C are those of Arabic numbers."""
_SIGN = re.compile(rf"(?<![\w.,)])[-\u2212](?=[.\u066b]?\d)|{_LEADING_POINT}")
"""The sign of a number, or a decimal point before its first digit."""


def _parts_in(text: str, parts: Sequence[str]) -> list[bool]:
    """Return for each of ``parts`` whether ``text`` contains it, and not only within a longer word or number."""
    used = set(text).union(*parts)
    mark = next(character for character in map(chr, range(0xE000, 0x110000)) if character not in used)
    # Each part is searched together with the marks at its ends, in a single search. A search for the part alone would
    # have to begin anew behind each place at which the part is within a longer word.
    marked = _marked(text, mark)
    return [_marked(part, mark) in marked for part in parts]


def _marked(text: str, mark: str) -> str:
    """Return ``text`` with ``mark`` at its ends, and between each two neighbouring characters that do not belong to the
    same word or number."""
    joined = {place for found in _IN_NUMBERS.finditer(text) for place in (found.start(), found.end())}
    joined |= {found.end() for found in _SIGN.finditer(text)}
    return mark + "".join(
        character if place in joined or _joined(character, text[place : place + 1]) else character + mark
        for place, character in enumerate(text, start=1)
    )


def _joined(left: str, right: str) -> bool:
    """Return whether two characters that stand side by side belong to one word or number. Letters without upper and
    lower case do not join, because scripts with such letters may put no space between words."""
    if right and unicodedata.category(right).startswith("M"):
        return not left.isspace()
    return all(side and (side.isdigit() or side.upper() != side.lower()) for side in (left, right))


def regex_grader(spec: TaskSpec) -> Callable[[str, Mapping[str, object]], Grade]:
    """Return the grader of the task Regex with the arguments of ``spec``. Raises UserError where RE2 can't read the
    pattern."""
    pattern = compile_pattern(spec.pattern or "")
    normalisation = _normalisation(spec)

    def find(text: str) -> str | None:
        """Return the part of ``text`` that the pattern finds, or only its first group where the pattern has groups, in
        the form in which parts are compared. None where the pattern finds nothing."""
        part = find_in(text)
        # In RE2 a `$` is the end of the text, so white space behind the answer can keep a pattern from finding
        # anything. Patterns that look for white space find it first.
        return part or (again if (again := find_in(text.strip())) is not None else part)

    def find_in(text: str) -> str | None:
        found = pattern.search(text.encode("utf-8", "replace").decode())
        if found is None:
            return None
        return normalisation.of((found[1] if pattern.groups else found[0]) or "")

    def grade(answer: str, row: Mapping[str, object]) -> Grade:
        own = _normalised(row.get("answer"), normalisation)
        if not own:
            return Grade.left_out(NO_TEXT)
        right = _right(references(row.get("answer")) or (), find, normalisation)
        if not right:
            return Grade.left_out(EMPTY_GROUP if pattern.groups else EMPTY_MATCH)
        found = find(answer)
        if found is None:
            return Grade.of(REGEX, {}, problem="the pattern finds nothing in the answer")
        return Grade.of(REGEX, {"exact": found in right, "found": True})

    return grade


def _right(texts: Sequence[str], find: Callable[[str], str | None], normalisation: Normalisation) -> list[str]:
    """Return the right answers for a row with ``texts``: for each text, the part that the pattern finds in it, or the
    whole text where the pattern finds nothing. Empty where one of these answers is empty."""
    right = [normalisation.of(text) if (found := find(text)) is None else found for text in texts]
    return right if all(right) else []
