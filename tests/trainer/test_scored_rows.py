"""The base model is scored only on rows on which the tuned model is scored, also where the two models read the rows in
different forms. Of these rows it leaves out those that it can't read, such as rows that are too long for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune_core.contract import Identity, RunConfig
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.evaluation.sets import (
    BASE_MODEL_SET_FOLDER,
    base_model_set,
    prepare_base_model_set,
    tuned_model_set,
)
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preparation import load_data, prepare_node
from tests.trainer import row_formats, tiny
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.row_files import file_content
from tests.trainer.row_formats import FORMATS, RowFormat, found_examples, plain_example, texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return row_formats.write_model(tmp_path_factory.mktemp("scored") / "model")


def plan_of(config: dict[str, Any], model: Path, train: Path, validation: Path, folder: Path) -> WorkerPlan:
    return WorkerPlan(
        paths=Paths(scratch=folder),
        identity=Identity(namespace="n", name="n", uid="u", attempt=1, pod_name="p", pod_uid="p", node_rank=0),
        config=RunConfig.model_validate(config),
        inputs=Inputs(model=model, train=train, validation=validation),
        folder=folder,
    )


def prepared(
    config: dict[str, Any], model: Path, train: Path, validation: Path, folder: Path
) -> tuple[ExampleSet, ExampleSet, list[str]]:
    """Return the examples that the tuned model and the base model are scored on, and the notices about the base model's
    examples."""
    plan = plan_of(config, model, train, validation, folder)
    prepare_node(plan, [])
    notices = prepare_base_model_set(plan, [])
    tuned, base = (ExampleSet.load(folder / "tokens" / name) for name in ("validation", BASE_MODEL_SET_FOLDER))
    return tuned, base, notices


@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
def test_with_added_tokens_the_base_model_is_scored_on_the_rows_of_the_tuned_model(
    form: RowFormat, store: ObjectStore, model: Path, tmp_path: Path
) -> None:
    """No row has an added token, so both models read the same examples."""
    made = form.rows(12, 3)
    rows = tmp_path / f"rows{form.file.split(',')[0]}"
    rows.write_bytes(file_content(rows.suffixes, [item.row for item in made]))
    config = run_config(store, "scored", dataset__format=form.form)
    config["model"]["addedTokens"] = ["<A>"]
    config["dataset"] |= form.dataset
    tuned, base, notices = prepared(config, model, rows, rows, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = [plain_example(tokenizer, text) for text in texts(made)]
    assert found_examples(tuned) == expected
    assert found_examples(base) == expected
    assert all(notice.startswith("dataset.validation, as the base model reads it: ") for notice in notices)


def test_a_row_that_the_tuned_model_skips_is_skipped_for_a_base_prompt_too(
    store: ObjectStore, model: Path, tmp_path: Path
) -> None:
    rows = [
        {"question": "w1", "reply": "w2"},
        {"question": " ".join(["w1"] * 70), "reply": "w3"},
        {"question": "w4", "reply": ""},
    ]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    config = run_config(store, "scored", dataset__longRows="Skip", dataset__badRows="Skip")
    config["evaluation"]["basePrompt"] = "note {prompt} answer"
    tuned, base, notices = prepared(config, model, path, path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert [tokenizer.decode(example.ids) for example in tuned] == ["ask w1 answer w2 <end>"]
    assert [tokenizer.decode(example.ids) for example in base] == ["note w1 answer w2 <end>"]
    assert notices == []


def test_the_base_model_answers_the_rows_that_the_tuned_model_answers(
    store: ObjectStore, model: Path, tmp_path: Path
) -> None:
    """The base model can't read the second row with its long prompt. It must not answer the fourth row instead, which
    the tuned model does not answer."""
    rows = [{"question": " ".join(["w1"] * count), "reply": "w2", "shots": "w3"} for count in range(1, 5)]
    rows[1]["shots"] = " ".join(["w3"] * 200)
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    config = run_config(store, "scored", dataset__task={"name": "ExactMatch"})
    config["evaluation"] |= {"basePrompt": "note {shots} {prompt} answer", "generation": {"maxExamples": 3}}
    plan = plan_of(config, model, path, path, tmp_path)
    data = load_data(plan, prepare_node(plan, ["reply"]))
    prepare_base_model_set(plan, ["reply"])
    tuned, base = tuned_model_set(plan, data), base_model_set(plan, data, one_line=False)
    assert tuned is not None
    assert base is not None
    assert [len(found.examples) for found in (tuned, base)] == [4, 3]
    answered = [[row.number for row in found.examples.rows[: found.answered]] for found in (tuned, base)]
    assert answered == [[1, 2, 3], [1, 3]]
