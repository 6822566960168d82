"""The grader of Choice: the answer names one of several options, by its letter, by its text, or by both."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from finetune_core.row_templates import text_or_none
from finetune_core.tasks import CHOICE
from finetune_trainer.evaluation.graders.grades import Grade
from finetune_trainer.evaluation.graders.json_value import NoValueError, parse
from finetune_trainer.evaluation.graders.texts import Normalisation

_FORM = Normalisation(frozenset({"Case", "WhiteSpace", "UnicodeForm"}))
_SAID = re.compile(
    r"(?:(?:so|therefore|thus)[, ]+)?(?:it is\b|it['\u2019]s\b|i (?:would )?(?:choose|pick|select|say)|(?:(?:the|my) )?"
    r"(?:(?:correct|right|best|final) )?(?:answer|option|choice)(?: is)?)\s*:?\s*(?=\S)"
)
"""A phrase that may come before the chosen option, such as `the answer is`."""
_MOST_SAID = 4
"""How many phrases of `_SAID` may come before the option. For example, `the answer is option B` has two."""
_IS_RIGHT = r" is (?:the )?(?:right|correct|best)(?: (?:answer|option|choice|one))?"
_CALLED_RIGHT = re.compile(rf"{_IS_RIGHT}\Z")
"""Words that may come behind the chosen option, such as `is the right answer`."""
_LETTER = r"(?:option |choice )?[(\[]?(?P<{}>[a-z])[)\]]?"
_OTHER_SENTENCE = re.compile(
    r"(?:\A|(?<=[.,;:!?] ))(?:(?:no|so|but|wait|actually|therefore|thus)[, ]+){0,3}"
    r"(?:it is|it['\u2019]s|(?:(?:the|my) )?(?:(?:correct|right|best|final) )?(?:answer|option|choice) is):? "
    + _LETTER.format("said")
    + r"(?=\Z|[.;!])|(?<=[.;:!?] )"
    + _LETTER.format("right")
    + _IS_RIGHT
    + r"(?=\Z|[.,;!])"
)
"""A sentence that chooses an option by its letter, such as `no, it is B` or `wrong. B is right`. A letter alone chooses
nothing, since the text of an option may have letters too (`C. Plan B`, `D. Only A is correct`)."""
_JOINED = re.compile(r"(?:or|and|but|also|maybe)[, ]+")
"""A word that joins a line to the one before."""
_EDGES = " \t\n*_`\"'“”‘’.,;!"
_OPENING = "(["
_SEPARATOR = re.compile(r"[)\].:]+\s*(?:[-\u2013\u2014]\s+)?")
"""Characters that separate a label from the text that follows. If the row has texts of options, this text must be the
one of the label's own option."""
_WEAK_SEPARATOR = re.compile(r",\s+|\s*[-\u2013\u2014]\s+|\s+")
"""A comma, a dash or white space. It separates a label from the text that follows only if the row has texts of options.
The text that follows must then be the one of the label's own option."""
_OWN_SEPARATOR = re.compile(r"[)\].:]+\s+(?:[-\u2013\u2014]\s+)?")
"""Characters between a label and a text, where a row's own text of an option begins with the label. White space must
follow, so that the option `1.5` does not become 5."""
_BOXED = re.compile(
    r"\$+(?P<math>[^$]*)\$+|\\[(\[](?P<display>.*)\\[)\]]"
    r"|\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf)\s*\{(?P<inner>.*)\}",
    re.DOTALL,
)
"""Markup of LaTeX that encloses a whole text."""
_MOST_BOXES = 4
"""Largest number of layers of the markup in `_BOXED` that are removed."""


def _form(text: str) -> str:
    """Return ``text`` in the form in which answers and options are compared. A minus sign is written as a hyphen."""
    return _bare(_FORM.of(text).replace("\u2212", "-"))


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
    spellings: tuple[tuple[str, ...], ...] = ()
    """Other spellings of all `texts`: without the option's own label, and without markup of LaTeX."""

    @classmethod
    def of(cls, labels: tuple[str, ...], texts: tuple[str, ...]) -> Options:
        """Return the options with those other spellings of their texts by which no two options can be confused."""
        options, last = cls(labels, texts), texts
        for made in (_without_labels, _without_boxes):
            spelled = made(labels, last)
            if spelled == last:
                continue
            known = (texts, *options.spellings)
            others = {text for row in known for place, text in enumerate(row) if spelled[place] != text}
            if all(spelled) and not cls(labels, spelled).is_ambiguous and not others & set(spelled):
                options, last = replace(options, spellings=(*options.spellings, spelled)), spelled
        return options

    @property
    def is_ambiguous(self) -> bool:
        """Whether the text of an option is the label of another one, or whether two options have the same text."""
        pairs = list(zip(self.labels, self.texts, strict=False))
        return len(set(self.texts)) < len(self.texts) or any(
            text in self.labels and text != label for label, text in pairs
        )

    def chosen(self, answer: str) -> str | None:
        """Return the label of the option that ``answer`` names. None where it names no option, several options, or the
        label of an option with a text that is not the option's own. Where the whole answer names no option, its first
        line counts, if no later line names another option."""
        label = self._chosen(answer)
        lines = [line for line in answer.splitlines() if line.strip()]
        if label is not None or len(lines) < 2:
            return label
        label = self._chosen(lines[0], exact=True)
        if label is None or any(self._chooses_another(line, label) for line in lines[1:]):
            return None
        return label

    def _chosen(self, answer: str, *, exact: bool = False) -> str | None:
        text = _form(answer)
        for _ in range(_MOST_SAID + 1):
            for candidate in (text, _unboxed(text)):
                if (label := self._named(candidate, exact=exact)) is not None:
                    return label
            called_right = _CALLED_RIGHT.search(text)
            if called_right is not None:
                label = self._named(_unboxed(_bare(text[: called_right.start()])), exact=True)
                if label is not None:
                    return label
            said = _SAID.match(text)
            if said is None:
                return None
            text = _bare(text[said.end() :])
        return None

    def _chooses_another(self, line: str, label: str) -> bool:
        """Return whether ``line``, which stands below a line that names the option ``label``, chooses another one."""
        text = _form(line)
        if joined := _JOINED.match(text):
            text = text[joined.end() :]
        # A line such as `C) is possible too` chooses another option whatever texts the options have.
        lettered = Options(self.labels, ())
        chosen = {self._chosen(text), lettered._chosen(text), label, None}
        return len(chosen) > 2 or self._says_another(text, label)

    def _named(self, text: str, *, exact: bool) -> str | None:
        """Return the label of the option that ``text`` names. With ``exact`` nothing but the option's own text may
        follow a label. Otherwise other text may follow it where the row has no texts of options."""
        for texts in (self.texts, *self.spellings):
            if text in texts:
                return self.labels[texts.index(text)]
        body = text[1:] if text[:1] in _OPENING else text
        for place, label in enumerate(self.labels):
            if body.startswith(label):
                behind = self._behind(body[len(label) :])
                if behind is None:
                    continue
                if behind == "" or (not self.texts and not exact and not self._says_another(behind, label)):
                    return label
                own = {texts[place] for texts in (self.texts, *self.spellings) if texts}
                if own & {behind, _unboxed(behind)}:
                    return label
        return None

    def _says_another(self, text: str, label: str) -> bool:
        """Return whether a sentence in ``text`` chooses another option than ``label`` by its letter."""
        found = _OTHER_SENTENCE.finditer(re.sub(r"[*_`]", "", text))
        chosen = {sentence["said"] or sentence["right"] for sentence in found}
        return not chosen.isdisjoint(set(self.labels) - {label})

    def _behind(self, rest: str) -> str | None:
        """Return the text behind the separator in ``rest``, which is the text behind a label. Return an empty text
        where ``rest`` is empty, and None where ``rest`` is other text that does not begin with a separator."""
        separator = _SEPARATOR.match(rest) or (_WEAK_SEPARATOR.match(rest) if self.texts else None)
        if separator is None:
            return None if rest else ""
        return rest[separator.end() :].strip(_EDGES) and _bare(rest[separator.end() :])


def _without_labels(labels: tuple[str, ...], texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``texts`` without the labels of their own options at the beginning. If one text has none, return ``texts``
    as they are."""
    found = []
    for label, text in zip(labels, texts, strict=True):
        body = text[1:] if text[:1] in _OPENING else text
        separator = _OWN_SEPARATOR.match(body, len(label)) if body.startswith(label) else None
        if separator is None:
            return texts
        found.append(_bare(body[separator.end() :]))
    return tuple(found)


def _without_boxes(labels: tuple[str, ...], texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(_unboxed, texts))


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
        return Grade.of(CHOICE, {}, problem="the answer names no option, or several")
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
    return Options.of(own, texts)


def _texts(value: object) -> tuple[str, ...] | None:
    """Return the values of a list in the form in which they are compared. None where ``value`` is no list, or where one
    of its values is empty or can't be shown by a template."""
    if not isinstance(value, (list, tuple)):
        return None
    shown = [text for text in map(text_or_none, value) if text is not None]
    forms = tuple(map(_form, shown))
    return forms if len(shown) == len(value) and all(forms) else None
