"""Renders rows of the formats promptCompletion and text as examples. A row of promptCompletion fills the job's
templates, and the pieces of the rendered texts are tokenised. Of a row of the format text, one column is tokenised as
it is. `formats.py` calls `render_prompt_completion` and `render_text`.

A row that can't be rendered raises RowError with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from finetune_core.api.dataset import DatasetSpec, PromptCompletionFormat, TextFormat
from finetune_core.errors import UserError
from finetune_core.row_templates import Piece, RowError, RowTemplate, TemplateError, is_empty, parse, text_of
from finetune_trainer.data.examples import Example
from finetune_trainer.data.files.row import NamedColumn
from finetune_trainer.data.piece_tokens import PieceTokenizer

PROMPT_COMPLETION = "dataset.format.promptCompletion"
BASE_PROMPT = "evaluation.basePrompt"


def prompt_columns(form: PromptCompletionFormat) -> list[NamedColumn]:
    """Return the columns that the templates of the format read. Raises UserError if a template is malformed."""
    template, completion = _parsed(form)
    return [
        *_named(template, f"{PROMPT_COMPLETION}.template", form),
        *_named(completion, f"{PROMPT_COMPLETION}.completion", form),
    ]


def base_prompt_columns(dataset: DatasetSpec, field: str, base_prompt: str | None) -> list[NamedColumn]:
    """Return the columns that ``base_prompt`` (`evaluation.basePrompt`) reads of the data source at the path ``field``
    of the spec, for example `dataset.test`. Empty if ``base_prompt`` is None, or if the base model is not scored on the
    rows of this source. Raises UserError if ``base_prompt`` is malformed."""
    form = dataset.format.prompt_completion
    scored = "dataset.validation" if dataset.test is None else "dataset.test"
    if base_prompt is None or form is None or field != scored:
        return []
    return _named(_parse(base_prompt, BASE_PROMPT, form), BASE_PROMPT, form)


def completion_ending(form: PromptCompletionFormat) -> str:
    """Return the text with which every completion ends: the text behind the last column or optional part of the
    template `completion`, and behind this text `completionSuffix`. Raises UserError if `completion` is malformed."""
    return _parsed(form)[1].ending + form.completion_suffix


def render_prompt_completion(
    form: PromptCompletionFormat, tokenizer: PieceTokenizer
) -> Callable[[Mapping[str, Any]], Example]:
    """Return the function that renders rows with a prompt and a completion. The function raises RowError for a bad row.

    Prompt and completion are tokenised separately, because at inference the model receives the tokens of the prompt
    alone. Only the completion and the end token behind it are supervised. Raises UserError if a template is malformed.
    """
    template, completion = _parsed(form)
    suffix = [Piece(form.completion_suffix, from_row=False)]
    named = completion.only_column
    empty = "has an empty completion" if named is None else f"has an empty {named!r}"

    def render(row: Mapping[str, Any]) -> Example:
        prompt, answer = template.pieces(row), completion.pieces(row)
        if not any(piece.from_row and piece.text.strip() for piece in answer):
            raise RowError(empty)
        before = tokenizer.begin(_meant(form, prompt))
        if not before.ids:
            raise RowError("has an empty prompt, and the model's tokenizer puts no token in front of it")
        after = tokenizer.follow(_meant(form, [*answer, *suffix]))
        ids = (*before.ids, *_ended(after.ids, tokenizer.end))
        return Example(ids, ((len(before.ids), len(ids)),), (*before.read_as_text, *after.read_as_text))

    return render


def answer_reader(
    form: PromptCompletionFormat, tokenizer: Any, added_tokens: Sequence[str], stop_ids: Sequence[int]
) -> Callable[[Iterable[Piece]], str]:
    """Return a function that takes the pieces of a rendered `completion`, and returns the text that a generated answer
    with the same tokens would have. An answer ends at the first token of ``stop_ids`` or at `completionSuffix`, and its
    text has no control tokens.

    ``tokenizer`` is a tokenizer of transformers that already has ``added_tokens`` (`model.addedTokens`).
    """
    tokens = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or number in stop_ids
    }
    # Where two tokens begin at the same place, the longer one is found, because it comes first in the regular
    # expression below.
    every = sorted(tokens, key=len, reverse=True)
    added = [token for token in every if token in added_tokens]

    def read(completion: Iterable[Piece]) -> str:
        text = ""
        for piece in _meant(form, completion):
            known = added if piece.from_row else every
            for part in re.split(f"({'|'.join(map(re.escape, known))})", piece.text) if known else [piece.text]:
                if part not in known:
                    text += part
                elif tokens[part] in stop_ids:
                    return _before(text, form.completion_suffix)
        return _before(text, form.completion_suffix)

    return read


def _before(text: str, suffix: str) -> str:
    """Return ``text`` up to ``suffix``, which may be empty."""
    return text.split(suffix)[0] if suffix else text


def _meant(form: PromptCompletionFormat, made: Iterable[Piece]) -> list[Piece]:
    """Return the pieces ``made``. If the job allows control tokens in rows, pieces from the row are marked as pieces of
    the template, so that control tokens in them are read as tokens."""
    return [Piece(piece.text, piece.from_row and not form.allow_special_tokens) for piece in made]


def render_text(form: TextFormat, tokenizer: PieceTokenizer) -> Callable[[Mapping[str, Any]], Example]:
    """Return the function that renders rows of plain text, in which every token is supervised. The function raises
    RowError for a bad row."""

    def render(row: Mapping[str, Any]) -> Example:
        text = text_of(form.text_field, row.get(form.text_field))
        if is_empty(text):
            raise RowError(f"has an empty {form.text_field!r}")
        found = tokenizer.begin([Piece(text, from_row=not form.allow_special_tokens)])
        ids = _ended(found.ids, tokenizer.end)
        return Example(ids, ((0, len(ids)),), found.read_as_text)

    return render


def _ended(ids: Sequence[int], end: int) -> Sequence[int]:
    """Return ``ids`` with the end token behind them, unless they end with it already."""
    return ids if ids and ids[-1] == end else (*ids, end)


def _parsed(form: PromptCompletionFormat) -> tuple[RowTemplate, RowTemplate]:
    completion = "{completion}" if form.completion is None else form.completion
    return (
        _parse(form.template, f"{PROMPT_COMPLETION}.template", form),
        _parse(completion, f"{PROMPT_COMPLETION}.completion", form),
    )


def _parse(text: str, field: str, form: PromptCompletionFormat) -> RowTemplate:
    try:
        return parse(text, form.aliases)
    except TemplateError as error:
        raise UserError(field, str(error)) from error


def _named(template: RowTemplate, field: str, form: PromptCompletionFormat) -> list[NamedColumn]:
    """Return the columns of ``template``, each with the path of the field that names it. This field is `promptField` or
    `completionField` for a column that the template calls `{prompt}` or `{completion}`. For any other column it is the
    template itself, whose path is ``field``."""
    short = {"prompt": "promptField", "completion": "completionField"}
    found = []
    for column, name in template.names.items():
        option = short.get(name)
        found.append(NamedColumn(f"{PROMPT_COMPLETION}.{option}" if option else field, column))
    return found
