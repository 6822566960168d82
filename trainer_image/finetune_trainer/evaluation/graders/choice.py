"""The grader of Choice: the answer names one of several options, by its letter, by its text, or by both."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_core.tasks import CHOICE
from finetune_trainer.evaluation.graders.grades import Grade
from finetune_trainer.evaluation.graders.texts import Normalisation

_FORM = Normalisation(frozenset({"Case", "WhiteSpace", "UnicodeForm"}))
_SAID = re.compile(
    r"(?:(?:so|therefore|thus)[, ]+)?(?:the )?(?:(?:correct|right|best|final) )?(?:answer|option|choice)(?: is)?"
    r"\s*:?\s*(?=\S)"
)
"""What may stand before the chosen option, such as `the answer is`."""
_EDGES = " \t\n*_`\"'“”‘’.,;!"
_LETTER = re.compile(r"[(\[]?(?P<label>[a-z]|[0-9]{1,2})(?:[)\].:]+\s*(?P<text>.*))?", re.DOTALL)
"""A label alone, or a label that a bracket, a full stop or a colon separates from the text of the option."""


@dataclass(frozen=True)
class Options:
    """The options of a row. `texts` is empty where the row has no texts of options, so that only letters count."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def is_ambiguous(self) -> bool:
        """Whether the text of an option is the label of another one, or of two options alike."""
        pairs = list(zip(self.labels, self.texts, strict=False))
        return len(set(self.texts)) < len(self.texts) or any(
            text in self.labels and text != label for label, text in pairs
        )

    def chosen(self, answer: str) -> str | None:
        """Return the label of the option that ``answer`` names; None where it names none, or two different ones."""
        text = _FORM.of(answer).strip(_EDGES)
        said = _SAID.match(text)
        for candidate in (text, text[said.end() :].strip(_EDGES)) if said else (text,):
            if (label := self._named(candidate)) is not None:
                return label
        return None

    def _named(self, text: str) -> str | None:
        for label, own in zip(self.labels, self.texts, strict=False):
            if text == own or text == own.strip(_EDGES):
                return label
        found = _LETTER.fullmatch(text)
        if found is None or found["label"] not in self.labels:
            return None
        behind = (found["text"] or "").strip(_EDGES)
        if not behind:
            return found["label"]
        own = self.texts[self.labels.index(found["label"])] if self.texts else behind
        return found["label"] if behind in (own, own.strip(_EDGES)) else None


def grade(answer: str, row: Mapping[str, object]) -> Grade:
    """Return the grade of ``answer``, which is right if it names the option that the row's column `answer` names."""
    options = _options(row.get("choices"))
    if options is None:
        return Grade.left_out("the row's options are no list of texts")
    if options.is_ambiguous:
        return Grade.left_out("the text of an option is also the letter or the text of another one")
    own = row.get("answer")
    if isinstance(own, int) and not isinstance(own, bool) and options.texts:
        right = options.labels[own] if 0 <= own < len(options.labels) else None
    else:
        right = options.chosen(own) if isinstance(own, str) else None
    if right is None:
        return Grade.left_out("the row's own answer names no option")
    chosen = options.chosen(answer)
    if chosen is None:
        return Grade.of(CHOICE, {}, problem="the answer names no option")
    return Grade.of(CHOICE, {"exact": chosen == right})


def _options(value: object) -> Options | None:
    """Return the options that a row's column holds; None where it holds no texts of options."""
    letters = tuple(string.ascii_lowercase)
    if value is None:
        return Options(letters, ())
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    labels = None
    if isinstance(value, dict):
        labels, value = value.get("label"), value.get("text")
    texts = _texts(value)
    own = _texts(labels) if labels is not None else letters[: len(texts or ())]
    if not texts or not own or len(texts) != len(own) or len(set(own)) < len(own):
        return None
    return Options(own, texts)


def _texts(value: object) -> tuple[str, ...] | None:
    """Return the forms of a list of texts or numbers; None where ``value`` is something else."""
    if not isinstance(value, (list, tuple)):
        return None
    if not all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in value):
        return None
    forms = tuple(_FORM.of(str(item)) for item in value)
    return forms if all(forms) else None
