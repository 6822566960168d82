"""A `ChatTemplate` that makes the same texts and ids with less work. The process of the template renders several texts
of a row with one call, one call of the tokenizer makes their ids, and marks of control tokens are looked for only in
rows that have one.

Whatever this module can't do in the short way, `ChatTemplate` does in its own way, also each error. `batch_functions`
makes the functions for `prepared_rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_core.api.dataset import MessagesFormat
from finetune_core.template_arguments import template_arguments
from finetune_trainer.data.chat.chat_template import ChatTemplate
from finetune_trainer.data.chat.messages import Message
from finetune_trainer.data.chat.row_texts import RowTexts
from finetune_trainer.data.chat.template_process import TemplateLimitError
from finetune_trainer.data.formats import TokenizeFunctions
from finetune_trainer.data.piece_tokens import PieceTokenizer
from finetune_trainer.data.prepared.expected_texts import (
    Asked,
    BatchProcess,
    Made,
    Wanted,
    first_texts,
    next_texts,
    simple_messages,
)
from finetune_trainer.data.prepared.piece_batches import BatchPieceTokenizer
from finetune_trainer.data.tokenizer import tokenize_functions

CALL_SECONDS = 0.2
"""About how much processor time the process of the template should take for one call, far less than a single text may
take."""
MOST_ROWS = 64
"""Texts of at most this many rows are rendered with one call."""


def batch_functions(
    tokenizer: PreTrainedTokenizerBase,
    added_tokens: Sequence[str] = (),
    *,
    ends: Sequence[int] = (),
    today: date | None = None,
) -> TokenizeFunctions:
    """Return the functions that `tokenize_functions` returns for the same arguments, in the form that makes many
    examples with less work."""
    functions = tokenize_functions(tokenizer, added_tokens, ends=ends, today=today, make_pieces=BatchPieceTokenizer)
    if functions.chat is None:
        return functions
    assert isinstance(functions.pieces, BatchPieceTokenizer)
    return functions._replace(
        chat=BatchChatTemplate(
            tokenizer, functions.pieces, ends=ends or [functions.end], today=today, added_tokens=added_tokens
        )
    )


class BatchChatTemplate(ChatTemplate):
    """Renders conversations with the chat template of a tokenizer, several texts at once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pieces: BatchPieceTokenizer,
        *,
        ends: Sequence[int],
        today: date | None = None,
        added_tokens: Sequence[str] = (),
    ) -> None:
        """Take the arguments of `ChatTemplate`."""
        super().__init__(tokenizer, pieces, ends=ends, today=today, added_tokens=added_tokens)
        self._batch_pieces = pieces
        self._marks = self.row_texts = BatchRowTexts(pieces, added_tokens)
        self._process: BatchProcess = BatchProcess(self._process)
        self._ahead: dict[TextKey, str] = {}
        """Texts of the rows that are expected."""
        self._ahead_arguments = ""
        self._texts_of: tuple[object, ...] = ()
        """The messages, tools and arguments of the row that has the texts `_texts`."""
        self._texts: Mapping[Wanted, str] = {}
        self._is_quick = True
        """Whether several texts may be rendered at once. False once that has failed."""
        self.calls = 0
        """How many texts were rendered in the way of `ChatTemplate`, each with a call of its own."""
        self.rows_at_once = 1
        """For how many rows `expect` should be called next, so that the call takes about CALL_SECONDS."""

    def expect(self, rows: Iterable[Mapping[str, Any]], form: MessagesFormat) -> None:
        """Render the texts that will be asked for in the rows with the columns ``rows``, and let the tokenizer make
        their ids. Rows that are no simple conversations are left out. The texts are kept until the next call."""
        self._ahead = {}
        arguments = template_arguments(form.template_arguments)
        self._ahead_arguments = repr(arguments)
        found = [messages for row in rows if (messages := simple_messages(row, form)) is not None]
        every = [Asked(messages, first_texts(messages, form.learn)) for messages in found]
        asked = [each for each in every if each.wanted]
        if not self._is_quick or not asked:
            return
        made = self._made(asked, None, arguments)
        if made is None:
            return
        per_row = max(made.seconds / len(asked), CALL_SECONDS / MOST_ROWS)
        self.rows_at_once = max(1, int(CALL_SECONDS / per_row))
        for (messages, _), texts in zip(asked, made.texts, strict=True):
            for wanted, text in texts.items():
                key = _key(messages[: wanted.messages], wanted.answer_next)
                assert key is not None
                self._ahead[key] = text

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        *,
        answer_next: bool,
    ) -> str:
        """Return the text of a conversation, and raise the errors of `ChatTemplate.text`."""
        # The notation of the arguments is compared, because a template can tell values apart that are equal, such as
        # True and 1.
        if self._ahead and not tools and repr(arguments) == self._ahead_arguments:
            key = _key(messages, answer_next)
            if key in self._ahead:
                return self._ahead[key]
        row, wanted = self._marks.messages, Wanted(len(messages), answer_next)
        if self._is_quick and _is_same(messages, row[: len(messages)]):
            if not _is_same(self._texts_of, (row, tools, arguments)):
                self._texts_of, self._texts = (row, tools, arguments), {}
            if wanted not in self._texts:
                asked = Asked(row, next_texts(row, wanted))
                made = self._made(
                    [asked], [dict(tool) for tool in tools] or None, arguments, are_encoded=not self._marks.has_marks
                )
                self._texts = made.texts[0] if made is not None else {}
            if wanted in self._texts:
                return self._texts[wanted]
        self.calls += 1
        return super().text(messages, tools, arguments, answer_next=answer_next)

    def forget(self) -> None:
        """Forget all texts that are known. Several texts may be rendered at once again."""
        self._ahead, self._texts_of, self._texts, self._is_quick = {}, (), {}, True

    def _made(
        self,
        asked: Sequence[Asked],
        tools: list[dict[str, Any]] | None,
        arguments: Mapping[str, Any],
        *,
        are_encoded: bool = True,
    ) -> Made | None:
        """Return the texts that the template renders of those that are asked for. With ``are_encoded``, let the
        tokenizer make their ids. Nobody asks for the ids of a text with marks. Return None if the template reaches a
        limit or ends its process."""
        try:
            made = self._process.several(asked, tools, arguments)
        except (TemplateLimitError, ValueError):
            # The limits hold for one text. If several texts reach a limit together, each of them may be within it.
            self._is_quick, self.rows_at_once = False, 1
            return None
        if are_encoded:
            self._batch_pieces.follow_ahead([text for texts in made.texts for text in texts.values()])
        return made


TextKey = tuple[object, ...]


def _key(messages: Sequence[Message], answer_next: bool) -> TextKey | None:
    """Return a value that is equal for equal conversations of texts only, also in the order of the fields of their
    messages. None for other conversations."""
    if not all(type(value) is str for message in messages for value in message.values()):
        return None
    return (answer_next, *(tuple(message.items()) for message in messages))


def _is_same(ones: Sequence[object], others: Sequence[object]) -> bool:
    """Return whether two sequences have the same objects. Their content need not be compared then."""
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))


class BatchRowTexts(RowTexts):
    """Marks control tokens in the texts of one row after the other. `marked_messages` begins a row, and all other
    methods are called with values and renderings of this row."""

    def __init__(self, pieces: PieceTokenizer, added_tokens: Sequence[str] = ()) -> None:
        """Take the arguments of `RowTexts`."""
        super().__init__(pieces, added_tokens)
        self._all_endings, self._all_beginnings = tuple(self._endings), tuple(self._beginnings)
        self.messages: Sequence[Message] = ()
        """The messages of the row, with marks."""
        self.has_marks = False
        """Whether a text of the row has marks."""

    def marked_messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return what `RowTexts.marked_messages` returns."""
        self.has_marks = False
        self.messages = found = super().marked_messages(messages)
        return found

    def is_marked(self, value: Any) -> bool:
        """Return what `RowTexts.is_marked` returns."""
        return self.has_marks and super().is_marked(value)

    def tokens(self, value: Any) -> list[str]:
        """Return what `RowTexts.tokens` returns."""
        return super().tokens(value) if self.has_marks else []

    def _with_marks(self, text: str) -> str:
        inner = text.strip()
        has_part = inner.startswith(self._all_endings) or inner.endswith(self._all_beginnings)
        if not (has_part or self._tokens.search(text) or self._tokenizer.other_forms(text)):
            return text
        found = super()._with_marks(text)
        self.has_marks = self.has_marks or found != text
        return found
