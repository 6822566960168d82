"""What the tests of prepared rows share: a tokenizer of words with the chat templates of `row_formats.py`, and the
comparison of `prepare_rows` with `make_examples`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune_core.api.dataset import DatasetSpec
from finetune_core.errors import UserError
from finetune_trainer.data.chat.chat_template import use_chat_template
from finetune_trainer.data.dataset import Refusal, RowOutcome, length_limit, make_examples
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.formats import TokenizeFunctions
from finetune_trainer.data.prepared.conversation_batches import batch_functions
from finetune_trainer.data.prepared.prepared_rows import prepare_rows
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, tokenize_functions
from tests.trainer import tiny
from tests.trainer.row_formats import APPENDING, REWRITING, REWRITING_FILE, WORDS

FIELD = "dataset.train"


def write_tokenizer(folder: Path) -> Path:
    """Write the tokenizer of `row_formats.write_model` into ``folder``, without a model."""
    tiny.write_word_tokenizer(folder, WORDS)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": APPENDING}))
    (folder / REWRITING_FILE).write_text(REWRITING)
    return folder


def dataset_of(form: Mapping[str, Any], **fields: Any) -> DatasetSpec:
    """Return `dataset` with the format ``form`` and other fields."""
    return DatasetSpec.model_validate({"train": {"s3": {"uri": "s3://bucket/rows.jsonl"}}, "format": form, **fields})


def as_values(outcome: RowOutcome) -> object:
    """Return an outcome in a form that can be compared."""
    if isinstance(outcome, UserError):
        return outcome.subject, outcome.problem
    if isinstance(outcome, Refusal):
        return outcome
    return [(list(each.ids), [tuple(span) for span in each.spans], list(each.read_as_text)) for each in outcome]


class Functions(NamedTuple):
    """The functions that turn rows into token ids, with both kinds of `PieceTokenizer`."""

    slow: TokenizeFunctions
    fast: TokenizeFunctions

    @classmethod
    def of(cls, folder: Path, dataset: DatasetSpec) -> Functions:
        """Return the functions for the tokenizer in ``folder``."""
        tokenizer = load_tokenizer(folder)
        use_chat_template(tokenizer, dataset.format, folder)
        return cls(tokenize_functions(tokenizer), batch_functions(tokenizer))


class Told(NamedTuple):
    """The result of a preparation: the examples and the notices, or the error."""

    digest: str
    rows: Sequence[Any]
    told: Sequence[str]
    """The notices, or the sentence of the error."""

    @classmethod
    def of(cls, examples: ExampleSet, notices: Sequence[str]) -> Told:
        return cls(examples.digest, list(examples.rows), notices)


def made_one_by_one(tokenize: TokenizeFunctions, path: Path, dataset: DatasetSpec) -> Told:
    """Return the result of `make_examples`."""
    limit = length_limit(dataset, None)
    try:
        return Told.of(
            *make_examples(read_rows(path, FIELD), path.name, FIELD, dataset, tokenize, limit=limit, keep_rows=True)
        )
    except UserError as error:
        return Told("", (), [str(error)])


def prepared(tokenize: TokenizeFunctions, path: Path, dataset: DatasetSpec, processes: int) -> Told:
    """Return the result of `prepare_rows`."""
    rows, limit = read_rows(path, FIELD), length_limit(dataset, None)
    try:
        found = prepare_rows(
            rows, path.name, FIELD, dataset, tokenize, limit=limit, keep_rows=True, processes=processes
        )
    except UserError as error:
        return Told("", (), [str(error)])
    assert [found.origins.files[file] for file in found.origins.file] == [row.file for row in found.examples.rows]
    assert list(found.origins.number) == [row.number for row in found.examples.rows]
    return Told.of(found.examples, found.notices)
