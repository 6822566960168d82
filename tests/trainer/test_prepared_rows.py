"""`prepare_rows` has the examples, notices and errors of `make_examples`: for every format of rows, with bad rows, with
any number of processes and with chunks of any size."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_core.api.dataset import DatasetFormat
from finetune_core.errors import UserError
from finetune_trainer.data.dataset import LengthLimit, Refusal, length_limit, make_examples, render_row
from finetune_trainer.data.examples import Example
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.formats import format_columns, renderer
from finetune_trainer.data.prepared import prepared_rows
from finetune_trainer.data.prepared.chunk_outcomes import ChunkRenderer, PackedOutcomes
from finetune_trainer.data.prepared.conversation_batches import batch_functions
from finetune_trainer.data.prepared.piece_batches import BatchPieceTokenizer
from finetune_trainer.data.prepared.prepared_rows import chunks_of, prepare_rows, process_count
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import tokenize_functions
from finetune_trainer.pod.errors import OutsideFailure, StopAgreed
from tests.trainer import tiny
from tests.trainer.chat import byte_tokenizer, published
from tests.trainer.pods import children
from tests.trainer.prepared import FIELD, Functions, as_values, dataset_of, made_one_by_one, prepared, write_tokenizer
from tests.trainer.published_rows import LINES
from tests.trainer.row_files import write_files
from tests.trainer.row_formats import FORMATS, RowFormat

ROWS = 23


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_rows, "CHUNK_ROWS", 4)


def spoiled(row: Mapping[str, Any], rng: random.Random) -> Mapping[str, Any]:
    """Return ``row`` with something wrong in one column, or as it is."""
    column = rng.choice(list(row))
    return {**row, column: rng.choice([None, "", "   ", "<end>", "w1 <end> w2", "w1 " * 40, row[column], row[column]])}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_format_has_the_same_examples_notices_and_errors(
    form: RowFormat, tokenizer_folder: Path, tmp_path: Path
) -> None:
    rng = random.Random(form.name)
    good = [made.row for made in form.rows(ROWS, 3)]
    bad = [
        spoiled(row, rng) if number % 3 == 1 and ".parquet" not in form.file else row for number, row in enumerate(good)
    ]
    tokenize = Functions.of(tokenizer_folder, dataset_of(form.form, **form.dataset))
    told = []
    for name, rows in (("good", good), ("bad", bad)):
        for policy in ("Fail", "Skip"):
            dataset = dataset_of(form.form, **{**form.dataset, "badRows": policy})
            for path in write_files(form, tmp_path / f"{name}-{policy}", rows):
                expected = made_one_by_one(tokenize.slow, path, dataset)
                for processes in (0, 2):
                    assert prepared(tokenize.fast, path, dataset, processes) == expected
                assert prepared(tokenize.slow, path, dataset, 0) == expected
                told.append(expected)
    assert any(each.digest for each in told)


@contextmanager
def no_child_is_left() -> Iterator[None]:
    """Assert that the child processes at the end of the block are those of its beginning. Other tests have children
    too, such as an object store."""
    before = set(children(os.getpid()))
    yield
    assert set(children(os.getpid())) <= before


def test_rows_of_published_formats_become_the_same(subtests_failures: list[str]) -> None:
    for line in LINES:
        tokenizer = byte_tokenizer(line.template if "{" in line.template else published(line.template))
        dataset = dataset_of(line.form, badRows="Skip")
        ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        fields = {name: value for name, value in line.row.items() if name in format_columns(dataset.format)}
        rows = [Row(number, fields) for number in (1, 2)]
        limit = LengthLimit(100_000, "anything")
        slow = tokenize_functions(tokenizer, ends=ends)
        fast = batch_functions(tokenizer, ends=ends)
        render = renderer(dataset.format, slow, limit.tokens)
        expected = [as_values(render_row(row, dataset, render, limit)) for row in rows]
        found = [as_values(each) for each in ChunkRenderer(dataset, fast, limit)(rows, frozenset()).outcomes()]
        if found != expected:
            subtests_failures.append(f"{line.published} {line.field}: {found} != {expected}")


@pytest.fixture
def subtests_failures() -> Iterator[list[str]]:
    """A list of failures. The test fails if there is one at its end."""
    failures: list[str] = []
    yield failures
    assert failures == []


TEXTS = st.lists(st.sampled_from(["w1 ", "w2 ", "<end> ", "\n", "é", "ask "]), max_size=12).map("".join)
ANY_ROWS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"question": TEXTS, "reply": TEXTS}),
        st.fixed_dictionaries({"question": st.none(), "reply": TEXTS}),
        st.just({"reply": "w1"}),
    ),
    min_size=1,
    max_size=24,
)


@settings(max_examples=12)
@given(
    ANY_ROWS,
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(["Fail", "Skip"]),
    st.sampled_from(["Fail", "Skip"]),
    st.integers(8, 24),
)
def test_any_rows_become_the_same_with_any_number_of_processes(
    tokenizer_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    processes: int,
    size: int,
    bad: str,
    long: str,
    most: int,
) -> None:
    path = tiny.write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    dataset = dataset_of(tiny.PROMPT_COMPLETION, badRows=bad, longRows=long, maxLength=most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared_rows, "CHUNK_ROWS", size)
        tokenize = Functions.of(tokenizer_folder, dataset)
        assert prepared(tokenize.fast, path, dataset, processes) == made_one_by_one(tokenize.slow, path, dataset)


MOODY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}answer {{ m.content }}<end> "
    "{% elif 'w3' in m.content %}ask {% else %}ask {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer {% endif %}"
)
"""A chat template that leaves out questions with the word w3."""


def conversation(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "w9"}]}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("first", ["w1", "w3"])
def test_a_template_that_treats_rows_of_one_kind_in_different_ways_makes_no_difference(
    first: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """A question that is left out makes its row a bad row, unless a row before it had a question that was shown. Each
    chunk begins with such a question, so that a process which did not know the rows before it would refuse the row."""
    rows = [conversation("w3" if number % 4 == 0 else "w1") for number in range(12)]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [conversation(first), *rows[1:]])
    dataset = dataset_of({"messages": {"chatTemplate": {"text": MOODY}}}, badRows="Skip")
    tokenize = Functions.of(tokenizer_folder, dataset)
    expected = made_one_by_one(tokenize.slow, path, dataset)
    assert len(expected.rows) == (12 if first == "w1" else 11)
    for processes in (0, 1, 3):
        assert prepared(tokenize.fast, path, dataset, processes) == expected


@pytest.mark.usefixtures("small_chunks")
def test_processes_do_not_share_the_process_that_renders_the_template(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [conversation(f"w{number}") for number in range(40)])
    dataset = dataset_of({"messages": {}})
    tokenize, limit = Functions.of(tokenizer_folder, dataset).fast, length_limit(dataset, None)
    whole, _ = make_examples(read_rows(path, FIELD), "rows", FIELD, dataset, tokenize, limit=limit)
    assert tokenize.chat is not None
    tokenize.chat.end()
    with no_child_is_left():
        found = prepare_rows(read_rows(path, FIELD), "rows", FIELD, dataset, tokenize, limit=limit, processes=3)
        tokenize.chat.end()
    assert found.examples.digest == whole.digest
    assert found.rows == 40


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("processes", [0, 2])
def test_a_bad_row_before_the_end_of_a_file_that_can_not_be_read_comes_first(
    processes: int, tokenizer_folder: Path
) -> None:
    def rows(bad: bool) -> Iterator[Row]:
        for number in range(1, 10):
            yield Row(number, {"question": "w1", "reply": "" if bad and number == 7 else "w2"})
        raise OutsideFailure("the file can't be read")

    dataset = dataset_of(tiny.PROMPT_COMPLETION)
    tokenize, limit = Functions.of(tokenizer_folder, dataset).fast, length_limit(dataset, None)
    with no_child_is_left(), pytest.raises(UserError, match=r"rows line 7 has an empty 'reply'") as raised:
        prepare_rows(rows(True), "rows", FIELD, dataset, tokenize, limit=limit, processes=processes)
    assert raised.value.subject == FIELD
    with pytest.raises(OutsideFailure, match="the file can't be read"):
        prepare_rows(rows(False), "rows", FIELD, dataset, tokenize, limit=limit, processes=processes)


@pytest.mark.parametrize("form", [tiny.PROMPT_COMPLETION, {"text": {"textField": "reply"}}, {"messages": {}}])
def test_no_text_has_a_call_of_the_tokenizer_of_its_own(form: Mapping[str, Any], tokenizer_folder: Path) -> None:
    dataset = dataset_of(form)
    tokenize = Functions.of(tokenizer_folder, dataset).fast
    rows = [
        Row(number, {"question": f"w{number}", "reply": "w2", **conversation(f"w{number}")}) for number in range(1, 30)
    ]
    ChunkRenderer(dataset, tokenize, length_limit(dataset, None))(rows, frozenset())
    assert isinstance(tokenize.pieces, BatchPieceTokenizer)
    assert tokenize.pieces.calls == 0


def test_a_stop_ends_the_preparation(tokenizer_folder: Path) -> None:
    dataset = dataset_of(tiny.PROMPT_COMPLETION)
    tokenize, limit = Functions.of(tokenizer_folder, dataset).fast, length_limit(dataset, None)
    read: list[int] = []

    def endless() -> Iterator[Row]:
        while True:
            read.append(1)
            yield Row(len(read), {"question": "w1", "reply": "w2"})

    for processes in (0, 2):
        read.clear()
        with pytest.raises(StopAgreed):
            prepare_rows(
                endless(),
                "rows",
                FIELD,
                dataset,
                tokenize,
                limit=limit,
                processes=processes,
                stop=lambda: len(read) > 5000,
            )


def test_chunks_are_bounded_by_rows_and_by_bytes() -> None:
    short, long = {"text": "a"}, {"text": "b" * prepared_rows.CHUNK_BYTES}
    rows = [Row(number, short) for number in range(1, 600)] + [Row(number, long) for number in range(600, 603)]
    sizes = [len(chunk.rows) for chunk in chunks_of(rows)]
    assert sizes == [256, 256, 88, 1, 1]
    assert [row for chunk in chunks_of(rows) for row in chunk.rows] == rows


@given(
    st.lists(
        st.one_of(
            st.builds(Refusal, st.just("badRows"), st.just("Skip"), st.text(max_size=5)),
            st.lists(
                st.tuples(
                    st.lists(st.integers(0, 2**31 - 1), max_size=6),
                    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3),
                    st.lists(st.text(max_size=3), max_size=2),
                ),
                min_size=1,
                max_size=3,
            ),
        ),
        max_size=8,
    )
)
def test_packed_outcomes_are_unpacked_as_they_were(outcomes: Sequence[Any]) -> None:
    packed, expected = PackedOutcomes(), []
    for outcome in outcomes:
        made = outcome if isinstance(outcome, Refusal) else [Example(*parts) for parts in outcome]
        packed.add(made)
        expected.append(as_values(made))
    assert [as_values(outcome) for outcome in packed.outcomes()] == expected


def test_an_error_of_the_job_is_unpacked_as_it_was() -> None:
    packed = PackedOutcomes()
    packed.add(UserError("dataset.format.messages", "the chat template takes more than 10 s for one row"))
    (found,) = packed.outcomes()
    assert isinstance(found, UserError)
    assert str(found) == "dataset.format.messages: the chat template takes more than 10 s for one row"


@pytest.mark.parametrize(("cpus", "processes"), [(0.5, 0), (1, 0), (2, 1), (16, 15), (16.7, 15), (192, 32)])
def test_the_first_process_keeps_a_cpu(cpus: float, processes: int) -> None:
    assert process_count(cpus) == processes


def test_every_format_of_the_api_is_one_that_a_chunk_can_have() -> None:
    """A new format of rows must be looked at in `chunk_outcomes.py`, so that its texts are tokenised together."""
    assert set(DatasetFormat.model_fields) == {"prompt_completion", "messages", "text"}
