"""Rows become examples: which tokens are supervised, which rows are refused, and which files belong to a split."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from finetune_core.api.dataset import DatasetSpec
from finetune_core.errors import UserError
from finetune_trainer.data.dataset import LengthLimit, check_columns, length_limit, make_examples
from finetune_trainer.data.examples import ExampleSet, graded_fields
from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.data.order import batches_per_epoch, global_batch
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, stop_ids, tokenize_functions
from finetune_trainer.sources.hub_datasets import card_configs, split_files
from tests.trainer import tiny
from tests.trainer.data_hub import COMMIT, Hub, served

SOURCE = {"s3": {"uri": "s3://finetune/train.jsonl"}}
CHAT = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}{{ ' ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ '<end>' + ' w58 ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = load_tokenizer(tiny.write_model(tmp_path_factory.mktemp("tokenizer")))
    found.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<system>"]})
    return found


def spec(form: dict[str, Any] = tiny.PROMPT_COMPLETION, **options: Any) -> DatasetSpec:
    return DatasetSpec.model_validate({"train": SOURCE, "format": form, "maxLength": 64} | options)


def made(
    folder: Path,
    rows: list[Any],
    tokenizer: Any,
    dataset: DatasetSpec,
    *,
    limit: LengthLimit | None = None,
    keep_rows: bool = False,
) -> tuple[ExampleSet, list[str]]:
    path = tiny.write_jsonl(folder / "train.jsonl", rows)
    return make_examples(
        read_rows(path, "dataset.train"),
        "s3://b/train.jsonl",
        "dataset.train",
        dataset,
        tokenize_functions(tokenizer),
        limit=limit or length_limit(dataset, None),
        keep_rows=keep_rows,
    )


def learned(examples: ExampleSet, tokenizer: Any) -> list[list[str]]:
    """Return the words of each example that are learned."""
    return [
        [tokenizer.decode([int(example.ids[at])]) for first, last in example.spans for at in range(max(first, 1), last)]
        for example in examples
    ]


def test_trap_7_prompt_and_padding_are_not_learned(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": "w1 w2", "reply": "w3"}, {"question": "w4", "reply": "w5 w6"}]
    examples, _ = made(tmp_path, rows, tokenizer, spec())
    assert learned(examples, tokenizer) == [["w3", "w59", "<end>"], ["w5", "w6", "w59", "<end>"]]
    share = MicroBatcher(examples, rank=0, world_size=1, pad=1, capacity=None).plan_rows([0, 1], 8)
    (batch,) = MicroBatcher(examples, rank=0, world_size=1, pad=1, capacity=None).tensors(share)
    assert batch.tokens == share.tokens == sum(example.supervised_tokens for example in examples) == 7
    other, _ = made(tmp_path, [{**row, "question": "w7 w8 w9"} for row in rows], tokenizer, spec())
    assert learned(other, tokenizer) == learned(examples, tokenizer)


def test_trap_8_the_last_learned_token_is_the_end(tmp_path: Path, tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    for form, row in (
        (tiny.PROMPT_COMPLETION, {"question": "w1", "reply": "w2"}),
        ({"text": {}}, {"text": "w1 w2 w3"}),
    ):
        examples, _ = made(tmp_path, [row], tokenizer, spec(form))
        assert int(examples[0].ids[-1]) == end
        assert examples[0].spans[-1][1] == len(examples[0].ids)


def test_every_token_of_plain_text_is_learned(tmp_path: Path, tokenizer: Any) -> None:
    examples, _ = made(tmp_path, [{"text": "w1 w2 w3"}], tokenizer, spec({"text": {}}))
    assert learned(examples, tokenizer) == [["w2", "w3", "<end>"]]
    assert int(examples[0].ids[0]) == tokenizer.convert_tokens_to_ids("w1")


def test_only_the_assistants_turns_of_a_conversation_are_learned(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    turns = [
        ("system", "w0"),
        ("user", "w1"),
        ("assistant", "w2 w3"),
        ("user", "w4"),
        ("assistant", "w5"),
        ("user", "w6"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    examples, _ = made(tmp_path, [row], tokenizer, spec({"messages": {}}))
    assert learned(examples, tokenizer) == [["w2", "w3", "<end>", "w5", "<end>"]]
    text = " ".join(tokenizer.decode([int(token)]) for token in examples[0].ids)
    assert text == "<system> w0 <user> w1 <assistant> w2 w3 <end> w58 <user> w4 <assistant> w5 <end>"


HALF = r"has a 'reply' that is not text \(half of a surrogate pair\)"
ANSWERED = [{"role": "assistant", "content": "w1"}]
FAILING_TEMPLATES = {
    "{{ 1 / 0 }}": "division by zero",
    "{{ 10.0 ** 400 }}": "",
    "{{ messages[0].content + 1 }}": "can only concatenate str",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "maximum recursion depth exceeded",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "maximum recursion depth exceeded",
    "{% include 'x' %}": "no loader",
    r"{{ '\ud800' }}": "",
    "{% for %}": "Expected an expression",
}
"""Chat templates that fail in different ways, each with the beginning of the reason that is reported."""


@pytest.mark.parametrize(
    ("template", "row", "problem"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "w1"}]}, "has no message of the assistant"),
        (CHAT, {"messages": [{"role": "assistant", "content": " "}]}, "has an empty answer in message 1"),
        (CHAT, {"messages": [{"role": "assistant"}]}, "has no text as content of message 1"),
        (CHAT, {"messages": "w1"}, "has a 'messages' that is not a list of messages"),
        (CHAT, {"other": 1}, "has no 'messages'"),
        (
            "{{ 'w' + messages | length | string + ' ' }}" + CHAT,
            {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
            "has a message 2 that the model's chat template does not put unchanged behind the messages before it",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            {"messages": [{"role": "assistant", "content": "w1"}]},
            "can't be rendered by the model's chat template: roles must alternate",
        ),
        *[
            (template, {"messages": ANSWERED}, f"can't be rendered by the model's chat template: {problem}")
            for template, problem in FAILING_TEMPLATES.items()
        ],
        (CHAT, {"messages": "[" * 100_000}, "has a 'messages' that is not a list of messages"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "\ud800"}]},
            "has no text as content of message 1 (half of a surrogate pair)",
        ),
        (
            "{{ raise_exception(messages[0].role) }}",
            {"messages": [{"role": "\ud800", "content": "w1"}, *ANSWERED]},
            r"can't be rendered by the model's chat template: \ud800",
        ),
    ],
)
def test_a_conversation_that_teaches_nothing_certain_is_a_bad_row(
    template: str, row: dict[str, Any], problem: str, tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        made(tmp_path, [row], tokenizer, spec({"messages": {}}))
    assert str(caught.value).startswith(f"dataset.train: s3://b/train.jsonl line 1 {problem}")


def test_a_tokenizer_without_chat_template_is_named(tmp_path: Path) -> None:
    plain = load_tokenizer(tiny.write_model(tmp_path / "model"))
    with pytest.raises(UserError, match=r"^dataset.format.messages: the model's tokenizer has no chat template"):
        made(tmp_path, [{"messages": []}], plain, spec({"messages": {}}))


def test_trap_10_rows_that_can_not_be_used_are_named_counted_and_skipped_or_fatal(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "w1", "reply": "w2"},
        {"question": "w1"},
        {"question": "w1", "reply": "   "},
        {"question": "w1", "reply": ["w2"]},
        {"question": "w1", "reply": " ".join(["w2"] * 70)},
        {"question": "w1", "reply": "\udfff"},
    ]
    skip = spec(badRows="Skip", longRows="Skip")
    examples, notices = made(tmp_path, rows, tokenizer, skip, keep_rows=True)
    assert len(examples) == 1
    assert examples.rows[0].fields == rows[0]
    assert notices == [
        "dataset.train: 4 rows were skipped and 1 kept (badRows: Skip); the first: s3://b/train.jsonl line 2 has no"
        " 'reply'",
        "dataset.train: 1 row was skipped and 1 kept (longRows: Skip); the first: s3://b/train.jsonl line 5 has 75"
        " tokens, more than dataset.maxLength 64",
    ]  # fmt: skip
    bad_rows = {
        1: "has no 'reply'",
        2: "has an empty 'reply'",
        3: r"has a 'reply' that is not text \(a list\)",
        5: HALF,
    }
    for index, sentence in bad_rows.items():
        with pytest.raises(UserError, match=rf"line 1 {sentence} \(set dataset.badRows to Skip"):
            made(tmp_path, rows[index : index + 1], tokenizer, spec())
    with pytest.raises(UserError, match=r"line 1 has 75 tokens, more than the model's context of 32"):
        made(tmp_path, rows[4:5], tokenizer, spec(), limit=length_limit(spec(), 32))
    with pytest.raises(UserError, match=r"^dataset.train: s3://b/train.jsonl has no row left to use; dataset.train: 1"):
        made(tmp_path, rows[1:2], tokenizer, skip)


def test_parquet_rows_are_read_and_named_by_their_number(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "train.parquet"
    table = pyarrow.table({"question": ["w1", "w2", None], "reply": ["w3", "w4", "w5"]})
    parquet.write_table(table, path, row_group_size=2)
    check_columns(path, "dataset.train", spec().format)
    rows = list(read_rows(path, "dataset.train"))
    assert [(row.number, row.unit, row.fields["reply"]) for row in rows] == [
        (1, "row", "w3"),
        (2, "row", "w4"),
        (3, "row", "w5"),
    ]
    with pytest.raises(UserError, match=r"^dataset.train: s3://b/t.parquet row 3 has no 'question'"):
        make_examples(
            rows,
            "s3://b/t.parquet",
            "dataset.train",
            spec(),
            tokenize_functions(tokenizer),
            limit=length_limit(spec(), None),
        )
    with pytest.raises(UserError, match=r"no column 'text' in train.parquet; it has 'question', 'reply'"):
        check_columns(path, "dataset.train", spec({"text": {}}).format)


def test_many_examples_are_the_same_whether_they_are_collected_in_memory_or_in_files(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory, _ = made(tmp_path, tiny.rows(20, seed=4), tokenizer, spec())
    monkeypatch.setattr("finetune_trainer.data.spooled_numbers.SPOOL_BYTES", 16)
    in_files, _ = made(tmp_path, tiny.rows(20, seed=4), tokenizer, spec())
    assert in_files.digest == in_memory.digest
    assert [example.spans for example in in_files] == [example.spans for example in in_memory]
    in_files.save(tmp_path / "tokens")
    assert ExampleSet.load(tmp_path / "tokens").digest == in_memory.digest


def test_tokens_are_kept_in_files_that_ranks_share(tmp_path: Path, tokenizer: Any) -> None:
    examples, _ = made(tmp_path, tiny.rows(20, seed=4), tokenizer, spec(), keep_rows=True)
    examples.save(tmp_path / "tokens")
    loaded = ExampleSet.load(tmp_path / "tokens")
    assert loaded.digest == examples.digest
    assert [tuple(map(int, example.ids)) for example in loaded] == [tuple(map(int, e.ids)) for e in examples]
    assert [example.spans for example in loaded] == [example.spans for example in examples]
    assert loaded.rows == examples.rows
    assert ExampleSet.empty().digest != examples.digest
    assert len(ExampleSet.empty()) == 0


def test_rows_are_kept_with_the_values_that_templates_show(tmp_path: Path, tokenizer: Any) -> None:
    """The trainer grades the rows that it has kept, and the preflight check grades rows from the file. The values of
    the kept rows must equal those from the file."""
    when = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
    odd = {"day": when.date(), "when": when, "price": Decimal("1E+2"), "bytes": b"x", "list": [Decimal("1.50")]}
    path = tmp_path / "odd.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "w1", "reply": "w2", **odd}]), path)
    (row,) = read_rows(path, "dataset.test")
    examples, _ = make_examples(
        [row],
        "odd.parquet",
        "dataset.test",
        spec(),
        tokenize_functions(tokenizer),
        limit=LengthLimit(64, "x"),
        keep_rows=True,
    )
    examples.save(tmp_path / "tokens")
    (kept,) = ExampleSet.load(tmp_path / "tokens").rows
    assert kept.fields == graded_fields(row)
    assert kept.fields == {
        "question": "w1",
        "reply": "w2",
        "day": "2026-03-01",
        "when": "2026-03-01T12:30:00+00:00",
        "price": "100",
        "bytes": "b'x'",
        "list": ["1.50"],
    }


@pytest.mark.parametrize("capacity", [None, 64])
def test_trap_28_no_row_twice_or_left_out_whatever_the_number_of_ranks(
    capacity: int | None, tmp_path: Path, tokenizer: Any
) -> None:
    """A run that resumes after step 5 on another number of ranks consumes the same rows in the same steps as a single
    process without interruption."""
    examples, _ = made(tmp_path, tiny.rows(37, seed=4), tokenizer, spec())

    def consumed(steps: range, world: int) -> list[list[int]]:
        found = []
        for step in steps:
            batch = global_batch(step, rows=37, global_batch_size=6, seed=7)
            shares = [
                MicroBatcher(examples, rank=rank, world_size=world, pad=1, capacity=capacity).plan_rows(batch, 2)
                for rank in range(world)
            ]
            assert len({len(share.micro_batches) for share in shares}) == 1
            found.append(
                sorted(row for share in shares for micro in share.micro_batches for rows in micro for row in rows)
            )
        return found

    single = consumed(range(1, 15), 1)
    assert consumed(range(1, 6), 2) + consumed(range(6, 15), 4) == single
    assert batches_per_epoch(37, 6) == 7
    for epoch in (single[:7], single[7:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(37))


def test_generation_ends_at_the_end_token_and_at_an_added_suffix(tokenizer: Any) -> None:
    assert stop_ids(tokenizer, spec().format) == [1]
    suffix = {"promptCompletion": {**tiny.PROMPT_COMPLETION["promptCompletion"], "completionSuffix": "<user>"}}
    assert stop_ids(tokenizer, spec(suffix).format) == [1, tokenizer.convert_tokens_to_ids("<user>")]
    assert stop_ids(tokenizer, spec({"text": {}}).format) == [1]


FILES = [
    "README.md",
    "main/train-00000-of-00001.parquet",
    "main/test-00000-of-00001.parquet",
    "socratic/train-0.parquet",
]
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - {split: test, path: [main/test-*]}
- config_name: socratic
  data_files: socratic/*
---
text
"""


@pytest.mark.parametrize(
    "matter",
    [
        "configs: 5",
        "configs: {a: 1}",
        "configs:\n- 5",
        "configs:\n- data_files: 5",
        "configs:\n- data_files: [{path: 5}]",
        "configs:\n- data_files: [{path: [5, null]}]",
        "a: 2026-99-99",
        "a: " + "[" * 5000,
        "- 1",
        "\ufffd",
    ],
)
def test_a_malformed_card_of_the_hub_names_no_file_and_is_no_crash(matter: str) -> None:
    configs = card_configs(f"---\n{matter}\n---\n")
    for config in configs.values():
        assert all(isinstance(path, str) for paths in (config.patterns or {}).values() for path in paths)


@pytest.mark.parametrize(
    ("card", "subset", "split", "found"),
    [
        (CARD, "main", "train", ["main/train-00000-of-00001.parquet"]),
        (CARD, "main", "test", ["main/test-00000-of-00001.parquet"]),
        (CARD, "socratic", "train", ["socratic/train-0.parquet"]),
        (CARD, None, "train", "dataset.train.huggingFace.subset: must be one of main, socratic"),
        (CARD, "main", "dev", "dataset.train.huggingFace.split: must be one of train, test"),
        ("", "main", "test", ["main/test-00000-of-00001.parquet"]),
        ("", None, "train", "dataset.train.huggingFace.subset: must be set: there are files of the split in main, soc"),
        ("", "other", "train", "dataset.train.huggingFace.subset: there is no folder 'other' with data files"),
        ("", "main", "dev", "dataset.train.huggingFace.split: no data file is called after 'dev'; there are main/"),
    ],
)
def test_the_files_of_a_split(card: str, subset: str | None, split: str, found: list[str] | str) -> None:
    def find() -> list[str]:
        return split_files(FILES, card_configs(card), subset=subset, split=split, field="dataset.train.huggingFace")

    if isinstance(found, list):
        assert find() == found
        return
    with pytest.raises(UserError) as caught:
        find()
    assert str(caught.value).startswith(found)


def test_a_split_is_downloaded_at_one_commit_from_the_hub(tmp_path: Path) -> None:
    """Each download runs in a process of its own, because huggingface_hub reads its endpoint when it is imported."""
    lines = [b'{"question": "w1", "reply": "w2"}\n', b'{"question": "w3"}\n']
    files = {"README.md": b"", "train-1.jsonl": lines[1], "train-0.jsonl": lines[0], "test.jsonl": b"{}"}
    program = """
import json, os, sys
from pathlib import Path
from finetune_core.api.sources import HuggingFaceDataSource
from finetune_trainer.data.files.index import write_index
from finetune_trainer.data.reader import read_rows
from finetune_trainer.sources.hub_datasets import HubDataFiles
from finetune_trainer.sources.source_files import HeadLimits
source = HuggingFaceDataSource.model_validate(json.loads(sys.argv[1]))
try:
    folder = Path(sys.argv[2])
    folder.mkdir()
    found = HubDataFiles(source, "dataset.train", sys.argv[3] or None, folder)
    most = {"first": 100, "nothing": 10}.get(sys.argv[4])
    if most is None:
        files = found.fetch(found.files, folder)
    else:
        files = [found.fetch_head(found.files[0], folder, HeadLimits(most, most, ()))]
    write_index(folder, files)
except Exception as error:
    print(type(error).__name__, error)
else:
    print([row.place("acme/rows") for row in read_rows(folder, "dataset.train")])
"""

    def fetch(hub: Hub, token: str = "", fetch: str = "all", **source: Any) -> str:
        asked = {"repo": "acme/rows", "split": "train", **source}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(asked), str(folder), token, fetch],
            env={"HF_ENDPOINT": hub.endpoint, "HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    with served(Hub("acme/rows", files, token="secret")) as hub:
        assert fetch(hub, "secret") == "['acme/rows/train-0.jsonl line 1', 'acme/rows/train-1.jsonl line 1']"
        assert f"/datasets/acme/rows/resolve/{COMMIT}/train-0.jsonl" in hub.asked
        assert not any("test.jsonl" in path for path in hub.asked)
        assert fetch(hub, "secret", revision="v9") == (
            "UserError dataset.train.huggingFace.revision: acme/rows has no revision 'v9'"
        )
        assert fetch(hub).startswith("OutsideFailure dataset.train.huggingFace: acme/rows is gated and no token is set")
        assert fetch(hub, "secret", fetch="first") == "['acme/rows/train-0.jsonl line 1']"
        assert fetch(hub, "secret", fetch="nothing") == "[]", "no row ends within ten bytes"
        assert fetch(hub, "secret", split="dev").startswith(
            "UserError dataset.train.huggingFace.split: no data file is called after 'dev'"
        )
