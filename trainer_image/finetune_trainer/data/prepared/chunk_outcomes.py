"""Turns a chunk of rows into what each row becomes, and packs the result into a few arrays, which are sent from one
process to another in little time. `prepared_rows.py` and the processes of `chunk_workers.py` use this module.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from finetune_core.api.dataset import DatasetFormat, DatasetSpec
from finetune_core.errors import UserError
from finetune_core.row_templates import RowError, RowTemplate, parse, text_of
from finetune_trainer.data.dataset import LengthLimit, Refusal, RowOutcome, render_row
from finetune_trainer.data.examples import Example
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.formats import TokenizeFunctions, renderer
from finetune_trainer.data.prepared.conversation_batches import BatchChatTemplate
from finetune_trainer.data.prepared.piece_batches import AheadText, BatchPieceTokenizer
from finetune_trainer.data.prepared.recorded_kinds import Kind, RecordedKinds

NOT_USED = -1
"""Takes the place of the number of examples of a row that has none."""


class _Fault(NamedTuple):
    """A UserError, whose own form can't be pickled."""

    subject: str
    problem: str


@dataclass
class PackedOutcomes:
    """What the rows of a chunk became, in their order. After a row that ends the job there are no further rows."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    """Token ids of all examples, one example behind the other."""
    lengths: array[int] = field(default_factory=lambda: array("i"))
    """Number of tokens of each example."""
    spans: array[int] = field(default_factory=lambda: array("i"))
    """First and last place of each range of supervised tokens of all examples, as in `Example.spans`."""
    span_counts: array[int] = field(default_factory=lambda: array("i"))
    """Number of ranges of each example."""
    counts: array[int] = field(default_factory=lambda: array("i"))
    """Number of examples of each row, or NOT_USED."""
    read_as_text: dict[int, Sequence[str]] = field(default_factory=dict)
    """`Example.read_as_text`, by the number of the example in the chunk, where it is not empty."""
    unused: dict[int, Refusal | _Fault] = field(default_factory=dict)
    """Why a row is not used, by its number in the chunk."""
    found: Set[Kind] = frozenset()
    failed: Set[Kind] = frozenset()
    """See `RecordedKinds`."""

    def add(self, outcome: RowOutcome | _Fault) -> None:
        """Append what the next row became."""
        if isinstance(outcome, UserError):
            outcome = _Fault(outcome.subject, outcome.problem)
        if isinstance(outcome, Refusal | _Fault):
            self.unused[len(self.counts)] = outcome
            self.counts.append(NOT_USED)
            return
        self.counts.append(len(outcome))
        for example in outcome:
            if example.read_as_text:
                self.read_as_text[len(self.lengths)] = tuple(example.read_as_text)
            self.ids.extend(example.ids)
            self.lengths.append(len(example.ids))
            self.span_counts.append(len(example.spans))
            for span in example.spans:
                self.spans.extend(span)

    def outcomes(self) -> Iterator[RowOutcome]:
        """Yield what each row became."""
        example = first_id = first_span = 0
        for number, count in enumerate(self.counts):
            if count == NOT_USED:
                unused = self.unused[number]
                yield UserError(*unused) if isinstance(unused, _Fault) else unused
                continue
            made = []
            for _ in range(count):
                end, spans_end = first_id + self.lengths[example], first_span + 2 * self.span_counts[example]
                spans = self.spans[first_span:spans_end]
                pairs = list(zip(spans[::2], spans[1::2], strict=True))
                made.append(Example(self.ids[first_id:end], pairs, self.read_as_text.get(example, ())))
                example, first_id, first_span = example + 1, end, spans_end
            yield made


class ChunkRenderer:
    """Turns chunks of rows into what their rows become."""

    def __init__(self, dataset: DatasetSpec, tokenize: TokenizeFunctions, limit: LengthLimit) -> None:
        """Take the arguments of `make_examples`. Raises UserError as `renderer` does."""
        self._dataset, self._tokenize, self._limit = dataset, tokenize, limit
        renderer(dataset.format, tokenize, limit.tokens)
        self._texts_of = _ahead_texts(dataset.format)

    def __call__(
        self, rows: Sequence[Row], known: Set[Kind], alive: Callable[[], None] = lambda: None
    ) -> PackedOutcomes:
        """Return what ``rows`` become. ``known`` are the kinds of fields that the chat template is known to render.
        ``alive`` is called for each row.

        The files and numbers of the rows are not used.
        """
        kinds = RecordedKinds(known)
        pieces = self._tokenize.pieces
        render = renderer(self._dataset.format, self._tokenize, self._limit.tokens, kinds)
        packed = PackedOutcomes()
        if isinstance(pieces, BatchPieceTokenizer) and self._texts_of is not None:
            pieces.encode_ahead([text for row in rows if row.problem is None for text in self._texts_of(row.fields)])
        chat, form = self._tokenize.chat, self._dataset.format.messages
        first_unexpected = 0
        for number, row in enumerate(rows):
            if isinstance(chat, BatchChatTemplate) and form is not None and number == first_unexpected:
                first_unexpected += chat.rows_at_once
                group = rows[number:first_unexpected]
                chat.expect([each.fields for each in group if each.problem is None], form)
            alive()
            try:
                outcome: RowOutcome = render_row(row, self._dataset, render, self._limit)
            except UserError as error:
                outcome = error
            packed.add(outcome)
            if isinstance(outcome, UserError) or (isinstance(outcome, Refusal) and outcome.policy == "Fail"):
                break
        if isinstance(pieces, BatchPieceTokenizer):
            pieces.forget()
        if isinstance(chat, BatchChatTemplate):
            chat.forget()
        packed.found, packed.failed = kinds.found, kinds.failed
        return packed

    def end(self) -> None:
        """End the process that renders the chat template, if there is one."""
        if self._tokenize.chat is not None:
            self._tokenize.chat.end()


def _ahead_texts(form: DatasetFormat) -> Callable[[Mapping[str, Any]], Sequence[AheadText]] | None:
    """Return the function that returns the texts which the renderer of `prompts.py` will tokenise for a row: none for a
    bad row. Return None for conversations, whose texts only the chat template knows."""
    if form.prompt_completion is not None:
        given = form.prompt_completion
        prompt = parse(given.template, given.aliases)
        completion = parse("{completion}" if given.completion is None else given.completion, given.aliases)

        def of_both(row: Mapping[str, Any]) -> Sequence[AheadText]:
            try:
                asked, answer = _text(prompt, row), _text(completion, row) + given.completion_suffix
            except RowError:
                return ()
            return AheadText(asked, begins=True), AheadText(answer, begins=False)

        return of_both
    if form.text is not None:
        column = form.text.text_field

        def of_text(row: Mapping[str, Any]) -> Sequence[AheadText]:
            try:
                return (AheadText(text_of(column, row.get(column)), begins=True),)
            except RowError:
                return ()

        return of_text
    return None


def _text(template: RowTemplate, row: Mapping[str, Any]) -> str:
    return "".join(piece.text for piece in template.pieces(row))
