"""The preflight checks find in advance what would end the training, and report it in the training's own sentences.

Findings about what the user must correct are final, for example an error in the spec or a file that does not exist.
Findings about a failure outside of the job are not, for example refused credentials, because a further try may succeed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from finetune_core.contract.preflight_result import PREFLIGHT_SECONDS, FindingKind, PreflightResult
from finetune_trainer.data.chat import chat_template
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preflight import entrypoint
from finetune_trainer.preflight.findings import Findings
from tests.trainer.hub import TOKEN, Hub, running_hub
from tests.trainer.objectstore import BUCKET, ObjectStore, free_port, write_credentials
from tests.trainer.pods import run_config
from tests.trainer.preflights import on_a_volume, paths_in, run_program
from tests.trainer.swallowing import swallowing_store

FIELD = "dataset__format__promptCompletion"
FINAL, OUTSIDE = FindingKind.FINAL, FindingKind.OUTSIDE
Check = Callable[..., list[tuple[FindingKind, str]]]


@pytest.fixture
def paths(tmp_path: Path, store: ObjectStore) -> Paths:
    return paths_in(tmp_path, store)


@pytest.fixture
def check(paths: Paths, store: ObjectStore, request: pytest.FixtureRequest) -> Check:
    """A function that runs all checks in this process and returns their findings."""

    def run(*, credentials: Path | None = None, **changes: Any) -> list[tuple[FindingKind, str]]:
        name = request.node.name.replace("[", "-").replace("]", "").replace(" ", "-")
        paths.run_file.write_text(json.dumps(run_config(store, name, world__nodes=1, **changes)))
        findings = Findings()
        entrypoint.run_checks(findings, paths.model_copy(update={"credentials": credentials or paths.credentials}))
        return [(finding.kind, finding.message) for finding in findings.result.findings]

    return run


def test_nothing_is_found_where_nothing_is_wrong_and_nothing_is_left_behind(check: Check, store: ObjectStore) -> None:
    assert check() == []
    assert [key for key in store.keys("runs/") if "preflight" in key] == []


def test_the_sizes_of_model_and_data_are_told(paths: Paths, store: ObjectStore, tiny_model: Path) -> None:
    paths.run_file.write_text(json.dumps(run_config(store, "sizes", world__nodes=1)))
    findings = Findings()
    entrypoint.run_checks(findings, paths)
    sizes = findings.result.sizes
    assert sizes is not None
    assert sizes.model_bytes == sum(path.stat().st_size for path in tiny_model.iterdir())
    data = [store.read(f"data/{name}.jsonl") for name in ("train", "validation")]
    assert sizes.data_bytes == sum(map(len, data))


def test_a_cache_that_nobody_can_write_to_is_a_notice_and_no_finding(paths: Paths, store: ObjectStore) -> None:
    paths.model_cache.mkdir()
    (paths.model_cache / "finetune-models").write_text("a file in the place of the folder")
    paths.run_file.write_text(json.dumps(run_config(store, "cache", world__nodes=1)))
    findings = Findings()
    entrypoint.run_checks(findings, paths)
    assert findings.result.findings == []
    assert any(notice.startswith("storage.cache: user ") for notice in findings.result.notices)


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        (
            {f"{FIELD}__completionField": "answer"},
            FINAL,
            "dataset.format.promptCompletion.completionField: no column 'answer' in train.jsonl;"
            " it has 'question', 'reply'",
        ),
        (
            {f"{FIELD}__template": "{question}{#input}{input}{/input}"},
            FINAL,
            "dataset.format.promptCompletion.template: no column 'input' in train.jsonl; it has 'question', 'reply'",
        ),
        (
            {
                "evaluation__basePrompt": "{prompt} {hint}",
                "dataset__validation": {"s3": {"uri": f"s3://{BUCKET}/data/train.jsonl"}},
            },
            FINAL,
            "evaluation.basePrompt: no column 'hint' in train.jsonl; it has 'question', 'reply'",
        ),
        (
            {"dataset__train": {"s3": {"uri": f"s3://{BUCKET}/data/absent.jsonl"}}},
            FINAL,
            f"dataset.train.s3.uri: there is no object s3://{BUCKET}/data/absent.jsonl",
        ),
        (
            {"dataset__test": {"volume": {"claimName": "rows", "path": "test.jsonl"}}},
            FINAL,
            "dataset.test.volume.path: there is no 'test.jsonl' in volume 'rows'",
        ),
        (
            {"model": {"s3": {"uri": f"s3://{BUCKET}/data"}}},
            FINAL,
            "model.s3.uri: there is no config.json: it must be a folder with a model in transformers' layout",
        ),
        ({"dataset__maxLength": 12}, FINAL, "tokens, more than dataset.maxLength 12 (set dataset.longRows to Skip"),
        (
            {"dataset__format": {"messages": {"messagesField": "reply"}}},
            FINAL,
            "dataset.format.messages: the model's tokenizer has no chat template",
        ),
        (
            {"model__addedTokens": ["answer"]},
            FINAL,
            "model.addedTokens: must not hold 'answer': the model's tokenizer has it already",
        ),
        (
            {"storage__uri": "s3://no-such-bucket/runs"},
            OUTSIDE,
            "storage.uri: bucket 'no-such-bucket' does not exist at {endpoint}",
        ),
    ],
    ids=[
        "column",
        "column of a template",
        "column of the base prompt",
        "no data",
        "no test rows",
        "no model",
        "long row",
        "no template",
        "token twice",
        "no bucket",
    ],
)
def test_the_cause_is_named(
    changes: dict[str, Any], kind: FindingKind, sentence: str, check: Check, store: ObjectStore
) -> None:
    found = check(**changes)
    assert found, "nothing was found"
    assert found[0][0] is kind, found
    assert sentence.format(endpoint=store.endpoint) in found[0][1]


NOTHING_GRADED = "dataset.validation: none of 7 rows can be graded (7 because the gold row has no number after ####)"


@pytest.mark.parametrize(
    ("task", "evaluation", "sentence"),
    [
        (
            {"name": "Number", "fields": {"answer": "total"}},
            {},
            "dataset.task.fields.answer: no column 'total' in validation.jsonl; it has 'question', 'reply'",
        ),
        ({"name": "SQL"}, {}, "dataset.task.fields.context: no column 'context' in validation.jsonl; it has"),
        ({"name": "Regex", "pattern": "("}, {}, "dataset.task.pattern: must be a regular expression in the syntax"),
        (
            {"entryPoint": "overlap"},
            {},
            "dataset.task.entryPoint: the trainer image has no entry point overlap of the group"
            " finetune_trainer.graders; it has none",
        ),
        (
            {"name": "GSM8K"},
            {"bestBy": "TaskScore", "artifactFrom": "Best"},
            f"{NOTHING_GRADED}, and evaluation.bestBy needs a score of dataset.task",
        ),
        (
            {"name": "GSM8K"},
            {"require": [{"score": "exact", "atLeast": "0.5"}], "artifactFrom": "Last"},
            f"{NOTHING_GRADED}, and evaluation.require needs a score of dataset.task",
        ),
        (
            {"name": "GSM8K"},
            {"require": [{"score": "execution", "atLeast": "0.5"}], "artifactFrom": "Last"},
            "evaluation.require: names the score execution; the job has perplexity, allTokenPerplexity, exact",
        ),
    ],
    ids=["column", "no tables", "pattern", "entry point", "best by nothing", "nothing required", "other score"],
)
def test_what_can_not_be_graded_is_a_finding(
    task: dict[str, Any], evaluation: dict[str, Any], sentence: str, check: Check
) -> None:
    changes = {"evaluation": evaluation} if evaluation else {}
    (found,) = check(dataset__task=task, **changes)
    assert found[0] is FINAL
    assert sentence in found[1]


def test_a_column_of_tools_that_no_source_of_a_mix_has_is_a_finding(check: Check, store: ObjectStore) -> None:
    part = {"s3": {"uri": f"s3://{BUCKET}/data/train.jsonl"}}
    form = {"messages": {"messagesField": "question", "toolsField": "function_s"}}
    found = check(dataset__train={"mix": [part, part]}, dataset__format=form)
    sentence = "dataset.format.messages.toolsField: no column 'function_s' in the 2 sources of dataset.train.mix"
    assert (FINAL, sentence) in found


def test_rows_that_can_not_be_graded_are_a_notice_where_no_score_is_needed(
    check: Check, paths: Paths, store: ObjectStore
) -> None:
    assert check(dataset__task={"name": "GSM8K"}) == []
    findings = Findings()
    entrypoint.run_checks(findings, paths)
    assert findings.result.notices == [NOTHING_GRADED]


def test_everything_that_is_wrong_is_told_in_one_look(check: Check) -> None:
    found = check(
        **{f"{FIELD}__completionField": "answer"},
        dataset__test={"s3": {"uri": f"s3://{BUCKET}/data/absent.jsonl"}},
        model={"s3": {"uri": f"s3://{BUCKET}/nowhere"}},
    )
    assert {message.split(":")[0] for _, message in found} == {
        "model.s3.uri",
        "dataset.format.promptCompletion.completionField",
        "dataset.test.s3.uri",
    }


def test_refused_credentials_and_a_silent_store_lie_outside_and_are_said_once(
    check: Check, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_credentials(tmp_path / "wrong", "test-access", "another-secret")
    ((kind, sentence),) = check(credentials=tmp_path / "wrong")
    assert kind is OUTSIDE
    assert sentence.startswith(f"storage.credentialsSecretRef: {store.endpoint} refused the credentials")
    assert "another-secret" not in sentence
    (tmp_path / "empty").mkdir()
    ((kind, sentence),) = check(credentials=tmp_path / "empty")
    assert (kind, "has no key AWS_ACCESS_KEY_ID" in sentence) == (OUTSIDE, True)
    monkeypatch.setattr(entrypoint, "STORE_CHECK_SECONDS", 1.0)
    ((kind, sentence),) = check(storage__endpoint=f"http://127.0.0.1:{free_port()}")
    assert (kind, "can't be reached" in sentence) == (OUTSIDE, True)


def test_a_store_that_ignores_if_none_match_is_refused(check: Check, store: ObjectStore) -> None:
    with swallowing_store(store.endpoint) as endpoint:
        ((kind, sentence),) = check(storage__endpoint=endpoint)
    assert kind is FINAL
    assert sentence.startswith(f"storage.endpoint: {endpoint} must honour If-None-Match")
    assert [key for key in store.keys("runs/") if "/preflight/" in key] == []


@pytest.fixture
def broken_model(tmp_path: Path, tiny_model: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of the model on a volume, which a test may break, and the change of the spec that selects the copy."""
    folder = tmp_path / "volumes" / "models" / "copy"
    shutil.copytree(tiny_model, folder)
    return folder, {"model": {"volume": {"claimName": "models", "path": "copy"}}}


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _split(folder: Path, *, lost_file: bool) -> None:
    """Rename the weight file and write an index.

    The index also names a tensor that is missing or, with ``lost_file``, a file that is missing.
    """
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    weights["lost.weight"] = f"model-0000{2 if lost_file else 1}-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def _write(path: Path, content: Any, *, split: bool = False) -> None:
    """Write ``content`` as JSON. With ``split``, first rename the weight file, so that it can be found only through an
    index."""
    if split:
        _split(path.parent, lost_file=False)
    path.write_text(json.dumps(content))


def remove_tokenizer(folder: Path) -> None:
    """Remove every file of the tokenizer."""
    for path in folder.glob("tokenizer*"):
        path.unlink()


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (_cut, "model.safetensors has {size} bytes and must have"),
    "no file": (lambda folder: _split(folder, lost_file=True), "there is no model-00002-of-00002.safetensors"),
    "no tensor": (
        lambda folder: _split(folder, lost_file=False),
        "model-00001-of-00002.safetensors has no tensor 'lost.weight'",
    ),
    "pickle": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x02" + bytes(64)),
        "model.safetensors is no whole safetensors file (66 bytes)",
    ),
    "pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors is a pointer of Git LFS",
    ),
    "other names": (
        lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
        "there must be a model.safetensors or a model.safetensors.index.json",
    ),
    "unknown type": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'),
        "its config.json can't be used: its model_type 'abacus' is none that transformers",
    ),
    "no language model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
        "config.json names model_type 'vit', which is no causal language model",
    ),
    "no tokenizer": (
        remove_tokenizer,
        "its tokenizer can't be loaded",
    ),
    "an index of numbers": (
        lambda folder: _write(folder / "model.safetensors.index.json", {"weight_map": {"a": 5, "b": "x"}}, split=True),
        "model.safetensors.index.json must be JSON with a weight_map",
    ),
    "an index that names no text": (
        lambda folder: _write(
            folder / "model.safetensors.index.json", {"weight_map": {"a": "\ud800.safetensors"}}, split=True
        ),
        r"there is no \ud800.safetensors, which model.safetensors.index.json names",
    ),
    "a deep configuration": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        "its config.json can't be used: config.json must be a JSON object in UTF-8 (maximum recursion depth exceeded",
    ),
    "no heads": (
        lambda folder: _write(folder / "config.json", {"model_type": "llama", "num_attention_heads": 0}),
        "its config.json can't be used: `num_attention_heads` of config.json is 0, with which transformers fails:"
        " integer division or modulo by zero",
    ),
    "labels that are a number": (
        lambda folder: _write(folder / "config.json", {"model_type": "llama", "id2label": 5}),
        "its config.json can't be used: `id2label` of config.json is 5, with which transformers fails: 'int'",
    ),
    "a deep tokenizer": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[" * 100_000),
        "its tokenizer can't be used: tokenizer_config.json must be a JSON object in UTF-8 (maximum recursion depth",
    ),
    "a tokenizer that is a list": (
        lambda folder: _write(folder / "tokenizer_config.json", [1]),
        "its tokenizer can't be used: tokenizer_config.json must be a JSON object, and holds a list",
    ),
    "a tokenizer whose end is a number": (
        lambda folder: _write(folder / "tokenizer_config.json", {"eos_token": 5}),
        "its tokenizer can't be loaded: `eos_token` of tokenizer_config.json is 5, with which transformers fails:",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_an_incomplete_model_is_named_by_its_file(
    name: str, broken_model: tuple[Path, dict[str, Any]], check: Check
) -> None:
    folder, change = broken_model
    assert check(**change) == []
    damage, sentence = BREAKS[name]
    damage(folder)
    size = (folder / "model.safetensors").stat().st_size if (folder / "model.safetensors").exists() else 0
    ((kind, found),) = check(**change)
    assert kind is FINAL
    assert found.startswith("model")
    assert sentence.format(size=size) in found


def test_rows_are_looked_at_in_the_beginning_of_a_large_file(
    check: Check, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.preflight.row_check.HEAD_BYTES", 4096)
    good = json.dumps({"question": "w1 w2", "reply": "w2 w1"}) + "\n"
    bad = json.dumps({"question": "w1", "reply": ""}) + "\n"
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "early.jsonl").write_text(good * 3 + bad + good * 1000)
    (folder / "late.jsonl").write_text(good * 1000 + bad)
    (folder / "skipped.jsonl").write_text(bad * 1000 + good)
    store.upload("large", folder)
    ((kind, sentence),) = check(dataset__train={"s3": {"uri": f"s3://{BUCKET}/large/early.jsonl"}})
    assert (kind, "large/early.jsonl line 4 has an empty 'reply'" in sentence) == (FINAL, True)
    assert check(dataset__train={"s3": {"uri": f"s3://{BUCKET}/large/late.jsonl"}}) == []
    skipped = {"dataset__train": {"s3": {"uri": f"s3://{BUCKET}/large/skipped.jsonl"}}, "dataset__badRows": "Skip"}
    assert check(**skipped) == [], "rows to learn from may follow the ones that were looked at"


def test_the_columns_and_first_rows_of_a_large_parquet_file_are_looked_at(
    check: Check, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.preflight.row_check.WHOLE_FILE_BYTES", 100_000)
    rows = [{"question": "w1", "reply": "w2" if number != 3 else "", "more": "x" * 9000} for number in range(100)]
    folder = tmp_path / "shards"
    folder.mkdir()
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "a.parquet", row_group_size=20, compression="none", use_dictionary=False)
    assert (folder / "a.parquet").stat().st_size > 500_000
    store.upload("shards", folder)
    train = {"dataset__train": {"s3": {"uri": f"s3://{BUCKET}/shards"}}}
    ((kind, sentence),) = check(**train)
    assert (kind, f"s3://{BUCKET}/shards/a.parquet row 4 has an empty 'reply'" in sentence) == (FINAL, True)
    kind, sentence = check(**train, **{f"{FIELD}__completionField": "answer"})[0]
    assert kind is FINAL
    assert f"no column 'answer' in s3://{BUCKET}/shards/a.parquet; it has 'question', 'reply', 'more'" in sentence


def test_the_column_of_a_grader_is_fetched_of_a_large_parquet_file(
    check: Check, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The column that the grader reads is no column of the format. The date in this column is graded as the text that
    templates show."""
    monkeypatch.setattr("finetune_trainer.preflight.row_check.WHOLE_FILE_BYTES", 100_000)
    rows = [{"question": "w1", "reply": "w2", "day": date(2026, 3, 1), "more": "x" * 9000} for _ in range(100)]
    folder = tmp_path / "graded"
    folder.mkdir()
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "a.parquet", row_group_size=20, compression="none", use_dictionary=False)
    store.upload("graded", folder)
    graded = {
        "dataset__validation": {"s3": {"uri": f"s3://{BUCKET}/graded"}},
        "evaluation": {"bestBy": "TaskScore", "artifactFrom": "Best"},
    }
    assert check(**graded, dataset__task={"name": "ExactMatch", "fields": {"answer": "day"}}) == []
    ((kind, sentence),) = check(**graded, dataset__task={"name": "ExactMatch", "fields": {"answer": "hour"}})
    assert kind is FINAL
    assert "dataset.task.fields.answer: no column 'hour' in" in sentence


def test_rows_whose_completion_is_a_template_are_graded_by_its_text(check: Check) -> None:
    changes: dict[str, Any] = {
        f"{FIELD}__completion": "{reply} #### 7",
        "dataset__task": {"name": "GSM8K"},
        "evaluation": {"bestBy": "TaskScore", "artifactFrom": "Best"},
    }
    assert check(**changes) == []
    ((kind, sentence),) = check(**changes | {f"{FIELD}__completion": "{reply} ####"})
    assert (kind, "none of 7 rows can be graded" in sentence) == (FINAL, True)


def test_only_rows_to_which_answers_are_generated_count_as_rows_that_can_be_graded(
    check: Check, store: ObjectStore, tmp_path: Path
) -> None:
    rows = [{"question": "w1"}, {"question": "w1", "reply": "w2"}, {"question": "w1", "reply": "#### 7"}]
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store.upload("answers", folder)
    changes: dict[str, Any] = {
        "dataset__validation": {"s3": {"uri": f"s3://{BUCKET}/answers/rows.jsonl"}},
        "dataset__badRows": "Skip",
        "dataset__task": {"name": "GSM8K"},
    }

    scored = {"bestBy": "TaskScore", "artifactFrom": "Best"}

    def checked(asked: int) -> list[tuple[FindingKind, str]]:
        return check(**changes, evaluation=scored | {"generation": {"maxExamples": asked}})

    assert checked(2) == []
    ((kind, sentence),) = checked(1)
    assert kind is FINAL
    assert "dataset.validation: the only row can't be graded (1 because the gold row has no number" in sentence


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    with running_hub({"team/tiny": tiny_model}) as running:
        yield running


def test_a_model_on_the_hub_is_looked_at_without_its_weights(hub: Hub, paths: Paths, store: ObjectStore) -> None:
    paths.hub_token_file.write_text(TOKEN)
    paths.run_file.write_text(json.dumps(run_config(store, "hub", model={"huggingFace": {"repo": "team/tiny"}})))
    ended = run_program(paths, HF_ENDPOINT=hub.endpoint)
    assert (ended.code, ended.result.findings) == (0, []), ended.log
    fetched = {request.rsplit("/", 1)[-1] for request in hub.requests if request.startswith("GET /team/tiny/resolve")}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= fetched
    assert not (paths.scratch / "preflight/model/model.safetensors").exists()
    whole = paths.scratch / "preflight/headers/model.safetensors"
    assert whole.stat().st_size > 100_000
    assert whole.stat().st_blocks * 512 <= 16_384, "only the header takes space on the disk"


def test_what_the_hub_refuses_is_told_apart(hub: Hub, paths: Paths, store: ObjectStore) -> None:
    def found(token: str, **model: str) -> tuple[int, str]:
        paths.hub_token_file.write_text(token)
        source = {"repo": "team/tiny"} | model
        paths.run_file.write_text(json.dumps(run_config(store, "hub", model={"huggingFace": source})))
        ended = run_program(paths, HF_ENDPOINT=hub.endpoint)
        return ended.code, ended.result.sentence

    code, sentence = found("hf_wrong")
    assert code == 75
    assert sentence == "model.huggingFace: team/tiny does not exist, or the token gives no access to it"
    code, sentence = found(TOKEN, revision="v9")
    assert (code, sentence) == (64, "model.huggingFace.revision: team/tiny has no revision 'v9'")
    hub.gated.add("team/tiny")
    code, sentence = found(TOKEN)
    assert (code, "team/tiny is gated and the token gives no access to it" in sentence) == (75, True)


def test_the_program_needs_little_memory_and_leaves_a_whole_result(paths: Paths, store: ObjectStore) -> None:
    long_key = "/".join(["x" * 200] * 4)
    changes: dict[str, Any] = {"dataset__train": {"s3": {"uri": f"s3://{BUCKET}/{long_key}.jsonl"}}}
    changes["dataset__test"] = {"s3": {"uri": f"s3://{BUCKET}/{long_key}-2.jsonl"}}
    paths.run_file.write_text(json.dumps(run_config(store, "whole", **changes)))
    ended = run_program(paths)
    assert ended.code == 64, ended.log
    assert ended.result.findings[0].kind is FINAL
    assert ended.result.findings[0].message.startswith(f"dataset.train.s3.uri: there is no object s3://{BUCKET}/xxx")
    assert "Traceback" not in ended.log
    # The preflight pod may use 1 GiB, so 400 MiB leave it much room.
    assert ended.data_memory_mebibytes < 400
    # The child that imports torch has 750 MiB at its peak, and 300 of them are mapped files, which the kernel can free
    # at any time.
    assert ended.memory_mebibytes < 900


SMALL_CHECK = """
import sys
from pathlib import Path
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preflight import entrypoint

entrypoint.TORCH_MEMORY_BYTES = 1 << 20
sys.exit(entrypoint.run(Paths.model_validate_json(sys.argv[1]), {}))
"""


def test_a_model_that_is_too_large_for_the_last_checks_is_a_notice(paths: Paths, store: ObjectStore) -> None:
    """The training pod has much more memory than the pod of the check, so the job is not refused.

    The checks run in a process of their own. In the process of the tests torch may be imported already, and the memory
    that earlier tests have freed may be enough for the checks.
    """
    paths.run_file.write_text(json.dumps(run_config(store, "large", world__nodes=1)))
    command = [sys.executable, "-c", SMALL_CHECK, paths.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PREFLIGHT_SECONDS, check=False)
    result = PreflightResult.from_termination_message(paths.termination_log.read_text())
    assert done.returncode == 0, done.stderr
    assert result is not None
    assert result.findings == []
    sentence = "model: it is too large for the last checks before the training, which were left out"
    assert result.notices == [sentence]


def test_the_data_is_checked_without_torch(paths: Paths, store: ObjectStore) -> None:
    """torch takes hundreds of MiB, which the child that reads the data may need for the data."""
    paths.run_file.write_text(json.dumps(run_config(store, "light", model={"s3": {"uri": f"s3://{BUCKET}/data"}})))
    ended = run_program(paths, interpreter=["-X", "importtime"])
    assert ended.code == 64, ended.log
    modules = {line.rsplit("|", 1)[-1].strip() for line in ended.log.splitlines() if line.startswith("import time:")}
    assert "transformers" in modules
    assert not [name for name in modules if name.split(".")[0] == "torch"]
    assert ended.memory_mebibytes < 400


def test_rows_that_are_nested_deeply_are_read_as_others(check: Check, paths: Paths) -> None:
    path, source = on_a_volume(paths, "train.jsonl")
    inner = "[" * 900 + "]" * 900
    path.write_text(f'{{"question": "w1", "reply": "w2", "other": {inner}}}\n' * 3)
    assert check(**source) == []


def test_long_documents_are_checked_by_their_first_rows(check: Check, paths: Paths) -> None:
    path, source = on_a_volume(paths, "train.jsonl")
    with path.open("w") as file:
        for number in range(40):
            file.write(json.dumps({"question": f"w{number % 9} " * 100_000, "reply": "w1"}) + "\n")
    assert check(**source, dataset__longRows="Skip") == []


TALK = json.dumps({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}) + "\n"
SIMPLE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ({}, ""),
        ({"templateArguments": {"thinking": "false"}}, "templateArguments.thinking: is not read by the chat template"),
        ({"chatTemplate": {"file": "b.jinja"}}, "chatTemplate.file: the model has no b.jinja (templates: a.jinja"),
        ({"chatTemplate": {"text": SIMPLE + "{% if %}"}}, "chatTemplate: is no chat template: "),
        (
            {
                "chatTemplate": {
                    "text": SIMPLE + "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
                }
            },
            "the chat template takes more than",
        ),
    ],
    ids=["fine", "argument", "file", "text", "endless"],
)
def test_the_chat_template_of_a_job_is_checked_with_the_rows(
    form: dict[str, Any],
    sentence: str,
    tiny_model: Path,
    paths: Paths,
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)
    folder = paths.volumes / "models"
    shutil.copytree(tiny_model, folder)
    (folder / "a.jinja").write_text(SIMPLE)
    path, source = on_a_volume(paths, "train.jsonl")
    path.write_text(TALK)
    chosen = {"messages": {"chatTemplate": {"file": "a.jinja"}} | form}
    model = {"volume": {"claimName": "models", "path": "."}}
    found = check(**source, model=model, dataset__format=chosen, dataset__validation=None)
    assert [kind for kind, _ in found] == ([FINAL] if sentence else [])
    assert all(message.startswith("dataset.format.messages") and sentence in message for _, message in found), found


def test_the_columns_of_a_conversation_that_no_field_names_are_read_too(
    tiny_model: Path, paths: Paths, check: Check
) -> None:
    """Of a parquet file only the columns that the job needs are read. The column `system` is one of them."""
    folder = paths.volumes / "models"
    shutil.copytree(tiny_model, folder)
    (folder / "a.jinja").write_text(SIMPLE.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}"))
    path, source = on_a_volume(paths, "train.parquet")
    messages = json.loads(TALK)["messages"]
    parquet.write_table(pyarrow.table({"id": [1], "messages": [messages], "system": ["w3"]}), path)
    form = {"messages": {"chatTemplate": {"file": "a.jinja"}}}
    model = {"volume": {"claimName": "models", "path": "."}}
    ((kind, message),) = check(**source, model=model, dataset__format=form, dataset__validation=None)
    assert kind == FINAL
    assert (
        "row 1 has 'content' in column 'system' of role 'system', which the model's chat template leaves out" in message
    )
