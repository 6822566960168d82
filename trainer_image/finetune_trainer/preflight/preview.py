"""Writes the first examples of the training rows into a file, as text and tokens: what the model learns, what it only
reads, and what is cut off. `entrypoint.py` calls `write_first_examples` where a user asks for a dry run.

The rows become examples by the functions of the training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from finetune_core.api.dataset import DatasetSpec
from finetune_core.contract.first_examples import FirstExamples, ShownExample, TextPiece, TokenUse
from finetune_trainer.data.dataset import LengthLimit, Refusal, render_row
from finetune_trainer.data.examples import Example
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.formats import TokenizeFunctions, renderer
from finetune_trainer.data.long_rows import split
from finetune_trainer.preflight.model_check import ModelFacts

SHOWN = 3
"""Number of examples that are shown."""


def write_first_examples(
    file: Path,
    rows: Sequence[Row],
    source: str,
    dataset: DatasetSpec,
    tokenize: TokenizeFunctions,
    limit: LengthLimit,
    model: ModelFacts,
) -> None:
    """Write the first `SHOWN` examples of ``rows`` into ``file``, as JSON of `FirstExamples`. ``source`` is the name of
    the data source, and the other arguments are those with which the examples of the training are made."""
    shown = list(islice(first_examples(rows, source, dataset, tokenize, limit, model.tokenizer), SHOWN))
    configuration = json.loads((model.folder / "config.json").read_bytes())
    file.write_text(FirstExamples(examples=shown, model_config_file=configuration).to_json())


def first_examples(
    rows: Sequence[Row],
    source: str,
    dataset: DatasetSpec,
    tokenize: TokenizeFunctions,
    limit: LengthLimit,
    tokenizer: Any,
) -> Iterator[ShownExample]:
    """Yield the examples of ``rows`` in their order, and the rows that are left out. ``tokenizer`` turns ids into
    text."""
    render = renderer(dataset.format, tokenize, limit.tokens)
    for row in rows:
        made = render_row(row, dataset, render, limit)
        place = row.place(source)
        if isinstance(made, Refusal):
            yield ShownExample(place=place, pieces=[], left_out=made.problem)
            continue
        for example in made:
            for kept, lost in _cut(example, dataset, limit):
                pieces = list(_pieces(kept, tokenizer))
                if lost:
                    pieces.append(_piece(TokenUse.CUT_OFF, lost, tokenizer))
                yield ShownExample(place=place, pieces=pieces)


def _cut(example: Example, dataset: DatasetSpec, limit: LengthLimit) -> Iterator[tuple[Example, Sequence[int]]]:
    """Yield the examples that an example becomes where it is too long, each with the ids that are lost behind it."""
    most = max(2, limit.tokens)
    if len(example.ids) <= limit.tokens:
        yield example, []
    elif dataset.long_rows == "Split":
        yield from ((piece, []) for piece in split(example, most))
    else:
        yield Example(example.ids[:most], ((0, most),)), [int(number) for number in example.ids[most:]]


def _pieces(example: Example, tokenizer: Any) -> Iterator[TextPiece]:
    """Yield the tokens of ``example``, cut where their use changes. The first token is never learned."""
    learned = {index for first, last in example.spans for index in range(max(first, 1), last)}
    for is_learned, numbered in groupby(enumerate(example.ids), key=lambda item: item[0] in learned):
        use = TokenUse.LEARNED if is_learned else TokenUse.READ
        yield _piece(use, [int(number) for _, number in numbered], tokenizer)


def _piece(use: TokenUse, ids: Sequence[int], tokenizer: Any) -> TextPiece:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
    return TextPiece(use=use, text=text, ids=list(ids), tokens=tokens)
