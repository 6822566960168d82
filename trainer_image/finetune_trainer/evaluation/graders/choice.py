"""The grader of Choice: the answer names one of several options, by its letter, by its text, or by both."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from finetune_core.row_templates import text_or_none
from finetune_core.tasks import CHOICE
from finetune_trainer.evaluation.graders.grades import Grade
from finetune_trainer.evaluation.graders.json_value import NoValueError, parse
from finetune_trainer.evaluation.graders.texts import Normalisation

_FORM = Normalisation(frozenset({"Case", "WhiteSpace", "UnicodeForm"}))
_SAID = re.compile(
    r"(?:(?:so|therefore|thus)[, ]+)?(?:i (?:would )?(?:choose|pick|select|say)|(?:(?:the|my) )?"
    r"(?:(?:correct|right|best|final) )?(?:answer|option|choice)(?: is)?)\s*:?\s*(?=\S)"
)
"""A phrase that may come before the chosen option, such as `the answer is`."""
_MOST_SAID = 4
"""How many phrases of `_SAID` may come before the option. For example, `the answer is option B` has two."""
_EDGES = " \t\n*_`\"'“”‘’.,;!"
_OPENING = "(["
_SEPARATOR = re.compile(r"[)\].:]+\s*(?:[-\u2013\u2014]\s+)?")
"""Characters that separate a label from the text that follows. If the row has texts of options, this text must be the
one of the label's own option."""
_WEAK_SEPARATOR = re.compile(r",\s+|\s*[-\u2013\u2014]\s+")
"""A comma or dash. It separates a label from the text that follows only if the row has texts of options. The text that
follows must then be the one of the label's own option."""
_BOXED = re.compile(
    r"\$+(?P<math>[^$]*)\$+|\\[(\[](?P<display>.*)\\[)\]]"
    r"|\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf)\s*\{(?P<inner>.*)\}",
    re.DOTALL,
)
"""Markup of LaTeX that encloses a whole text."""
_MOST_BOXES = 4
"""Largest number of layers of the markup in `_BOXED` that are removed."""


def _bare(text: str) -> str:
    """Return ``text`` without markup and punctuation at its ends. If nothing else is left, return ``text`` itself."""
    return text.strip(_EDGES) or text


def _unboxed(text: str) -> str:
    for _ in range(_MOST_BOXES):
        found = _BOXED.fullmatch(text)
        if found is None:
            break
        text = _bare(next(part for part in found.groups() if part is not None))
    return text


@dataclass(frozen=True)
class Options:
    """The options of a row. `texts` is empty where the row has no texts of options, so that only labels count. Labels
    and texts have no markup and punctuation at their ends (`_bare`)."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def is_ambiguous(self) -> bool:
        """Whether the text of an option is the label of another one, or whether two options have the same text."""
        pairs = list(zip(self.labels, self.texts, strict=False))
        return len(set(self.texts)) < len(self.texts) or any(
            text in self.labels and text != label for label, text in pairs
        )

    def chosen(self, answer: str) -> str | None:
        """Return the label of the option that ``answer`` names. None where it names no option, or the label of an
        option with a text that is not the option's own."""
        text = _bare(_FORM.of(answer))
        for _ in range(_MOST_SAID + 1):
            for candidate in (text, _unboxed(text)):
                if (label := self._named(candidate)) is not None:
                    return label
            said = _SAID.match(text)
            if said is None:
                return None
            text = _bare(text[said.end() :])
        return None

    def _named(self, text: str) -> str | None:
        own = dict(zip(self.labels, self.texts, strict=False))
        for label, option in own.items():
            if text == option:
                return label
        body = text[1:] if text[:1] in _OPENING else text
        for label in self.labels:
            if body.startswith(label):
                behind = self._behind(body[len(label) :])
                if behind == "" or (behind is not None and behind == own.get(label, behind)):
                    return label
        return None

    def _behind(self, rest: str) -> str | None:
        """Return the text behind the separator in ``rest``, which is the text behind a label. Return an empty text
        where ``rest`` is empty, and None where ``rest`` is other text that does not begin with a separator."""
        separator = _SEPARATOR.match(rest) or (_WEAK_SEPARATOR.match(rest) if self.texts else None)
        if separator is None:
            return None if rest else ""
        return rest[separator.end() :].strip(_EDGES) and _bare(rest[separator.end() :])


def grade(answer: str, row: Mapping[str, object]) -> Grade:
    """Return the grade of ``answer``, which is right if it names the option that the row's column `answer` names."""
    options = _options(row.get("choices"))
    if options is None:
        return Grade.left_out("the row's options are no list of texts")
    if options.is_ambiguous:
        return Grade.left_out("the text of an option is also the letter or the text of another one")
    right = _right(row.get("answer"), options)
    if right is None:
        return Grade.left_out("the row's own answer names no option")
    chosen = options.chosen(answer)
    if chosen is None:
        return Grade.of(CHOICE, {}, problem="the answer names no option")
    return Grade.of(CHOICE, {"exact": chosen == right})


def _right(own: object, options: Options) -> str | None:
    """Return the label of the option that ``own``, the row's own answer, names. A number counts the options from 0, if
    the row has texts of options. None where ``own`` names no option."""
    if isinstance(own, str):
        return options.chosen(own)
    is_number = isinstance(own, (int, float)) or (isinstance(own, Decimal) and own.is_finite())
    if not is_number or isinstance(own, bool) or not options.texts:
        return None
    return next((label for place, label in enumerate(options.labels) if place == own), None)


def _options(value: object) -> Options | None:
    """Return the options in ``value``, the value of a row's column. If ``value`` is None, the labels are the letters,
    and there are no texts. Return None where ``value`` is anything but options."""
    letters = tuple(string.ascii_lowercase)
    if value is None:
        return Options(letters, ())
    if isinstance(value, str):
        try:
            value = parse(value)
        except NoValueError:
            return None
    labels = None
    if isinstance(value, dict) and "text" not in value:
        # Parquet files have all keys in every row, with nulls for the options that a row does not have.
        value = {label: text for label, text in value.items() if text is not None}
        labels, value = list(value), list(value.values())
    elif isinstance(value, dict):
        labels, value = value.get("label"), value.get("text")
    texts = _texts(value)
    own = _texts(labels) if labels is not None else letters[: len(texts or ())]
    if not texts or not own or len(texts) != len(own) or len(set(own)) < len(own):
        return None
    return Options(own, texts)


def _texts(value: object) -> tuple[str, ...] | None:
    """Return the values of a list in the form in which they are compared. None where ``value`` is no list, or where one
    of its values is empty or can't be shown by a template."""
    if not isinstance(value, (list, tuple)):
        return None
    shown = [text for text in map(text_or_none, value) if text is not None]
    forms = tuple(_bare(_FORM.of(text)) for text in shown)
    return forms if len(shown) == len(value) and all(forms) else None
