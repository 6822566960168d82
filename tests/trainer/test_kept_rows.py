"""`prepare_node` makes the examples of `make_examples`, with any number of CPUs, and makes them once for all attempts
and jobs that name the same volume in `storage.cache`. A change of anything that decides the examples makes them anew,
and so does whatever is wrong on the volume."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finetune_core.contract import Identity, RunConfig
from finetune_core.contract.pod import CPU_REQUEST_VARIABLE, SECRET_ACCESS_KEY
from finetune_core.errors import UserError
from finetune_trainer import node_examples
from finetune_trainer.data.dataset import columns_read, length_limit, make_examples, render_row
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.prepared import chunk_outcomes, example_identity, prepared_rows
from finetune_trainer.data.prepared.example_cache import FOLDER
from finetune_trainer.data.reader import read_rows
from finetune_trainer.node_examples import examples_folder
from finetune_trainer.pod import cgroup
from finetune_trainer.pod.errors import StopAgreed
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preparation import PreparationSummary, job_tokenize_functions, load_data, prepare_node
from tests.trainer import row_formats, tiny
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import children, run_config
from tests.trainer.row_formats import APPENDING

DATED = "note {{ strftime_now('%d') }} " + APPENDING
"""A chat template that shows the date."""
TRAIN_ROWS, TEST_ROWS = 30, 4


def conversation(number: int) -> dict[str, Any]:
    texts = [f"w{number % 50}", f"w{(number + 1) % 50} w3"]
    return {"messages": [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]}


class Job:
    """A job whose rows are conversations. Each call of `prepare` takes the place of an attempt."""

    def __init__(self, store: ObjectStore, model: Path, folder: Path) -> None:
        self.folder = folder
        self.model = shutil.copytree(model, folder / "model")
        self.write_template(DATED)
        self.train = tiny.write_jsonl(folder / "train.jsonl", [conversation(number) for number in range(TRAIN_ROWS)])
        self.test = tiny.write_jsonl(folder / "test.jsonl", [conversation(number) for number in range(TEST_ROWS)])
        self.mix: list[Path] = []
        self.config = run_config(store, "kept", dataset__format={"messages": {}}, dataset__validation=None)
        self.config["dataset"]["test"] = {"s3": {"uri": "s3://bucket/test.jsonl"}}
        self.config["templateDate"] = "2026-11-30"
        self.uid = "uid-1"
        self.cache = folder / "cache"
        self.cache.mkdir()
        self.credentials = folder / "credentials"
        self.credentials.mkdir()
        self.write_secret("a secret access key")
        self._attempts = 0

    def write_template(self, text: str) -> None:
        file = self.model / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": text}))

    def write_secret(self, secret: str) -> None:
        (self.credentials / SECRET_ACCESS_KEY).write_text(secret)

    def swap_two_tokens(self) -> None:
        file = self.model / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
        file.write_text(json.dumps(content))

    def plan(self) -> WorkerPlan:
        """Return the plan of the next attempt."""
        self._attempts += 1
        scratch = self.folder / f"scratch-{self._attempts}"
        scratch.mkdir()
        return WorkerPlan(
            paths=Paths(scratch=scratch, model_cache=self.cache, credentials=self.credentials),
            identity=Identity(
                namespace="n", name=self.uid, uid=self.uid, attempt=1, pod_name="p", pod_uid="p", node_rank=0
            ),
            config=RunConfig.model_validate(self.config),
            inputs=Inputs(model=self.model, train=self.train, mix=self.mix, test=self.test),
            folder=scratch,
        )

    def prepare(self) -> Attempt:
        """Prepare the next attempt."""
        plan = self.plan()
        summary = prepare_node(plan, ())
        loaded = load_data(plan, summary)
        return Attempt(summary, loaded.train, loaded.test)

    def kept(self) -> list[Path]:
        """Return the files on the volume."""
        return sorted((self.cache / FOLDER).iterdir())


class Attempt(NamedTuple):
    """What the ranks of an attempt get."""

    summary: PreparationSummary
    train: ExampleSet
    test: ExampleSet

    @property
    def values(self) -> object:
        return self.summary, self.train.digest, self.test.digest_with_rows, list(self.test.rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return row_formats.write_model(tmp_path_factory.mktemp("kept") / "model")


@pytest.fixture
def job(store: ObjectStore, model: Path, tmp_path: Path) -> Job:
    return Job(store, model, tmp_path)


class Counter:
    """Counts the rows that are tokenised in this process."""

    def __init__(self) -> None:
        self.rows = 0

    def taken(self) -> int:
        """Return how many rows were tokenised since the last call."""
        rows, self.rows = self.rows, 0
        return rows


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the rows that are tokenised. There is one CPU, so that this process tokenises all rows."""
    counter = Counter()

    def counted(*arguments: Any) -> Any:
        counter.rows += 1
        return render_row(*arguments)

    monkeypatch.setattr(chunk_outcomes, "render_row", counted)
    monkeypatch.setattr(cgroup, "cpu_limit", lambda: 1.0)
    return counter


def test_another_attempt_and_another_job_tokenise_nothing(
    job: Job, tokenised: Counter, capsys: pytest.CaptureFixture[str]
) -> None:
    first = job.prepare()
    assert tokenised.taken() == TRAIN_ROWS + TEST_ROWS
    assert "storage.cache" not in capsys.readouterr().out
    assert len(job.kept()) == 2
    assert job.prepare().values == first.values
    assert tokenised.taken() == 0
    assert capsys.readouterr().out.count("which storage.cache had already") == 2
    job.uid = "uid-2"
    job.config["optimization"] |= {"seed": 43, "learningRate": 2e-3}
    job.config["storage"]["uri"] += "-2"
    assert job.prepare().values == first.values
    assert tokenised.taken() == 0
    assert len(job.kept()) == 2


def set_date(job: Job) -> None:
    job.config["templateDate"] = "2026-12-01"


def change_a_row(job: Job) -> None:
    tiny.write_jsonl(job.train, [conversation(number) for number in (*range(TRAIN_ROWS - 1), 49)])


def set_length(job: Job) -> None:
    job.config["dataset"]["maxLength"] = 63


def learn_the_last(job: Job) -> None:
    job.config["dataset"]["format"] = {"messages": {"learn": "LastAssistant"}}


def add_a_token(job: Job) -> None:
    job.config["model"]["addedTokens"] = ["<A>"]


CHANGES: dict[str, tuple[Callable[[Job], object], int]] = {
    "a row": (change_a_row, TRAIN_ROWS),
    "a file of the tokenizer": (Job.swap_two_tokens, TRAIN_ROWS + TEST_ROWS),
    "the template": (lambda job: job.write_template(DATED.replace("note {{", "offer {{")), TRAIN_ROWS + TEST_ROWS),
    "the date": (set_date, TRAIN_ROWS + TEST_ROWS),
    "the longest example": (set_length, TRAIN_ROWS + TEST_ROWS),
    "what is learned": (learn_the_last, TRAIN_ROWS + TEST_ROWS),
    "an added token": (add_a_token, TRAIN_ROWS + TEST_ROWS),
    "the secret": (lambda job: job.write_secret("another one"), TRAIN_ROWS + TEST_ROWS),
}
"""Changes of a job, and how many rows are tokenised after each."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_decides_the_examples_makes_them_anew(change: str, job: Job, tokenised: Counter) -> None:
    job.prepare()
    tokenised.taken()
    apply, rows = CHANGES[change]
    apply(job)
    job.prepare()
    assert tokenised.taken() == rows
    job.prepare()
    assert tokenised.taken() == 0


def test_another_version_of_the_code_makes_the_examples_anew(
    job: Job, tokenised: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.prepare()
    monkeypatch.setattr(example_identity, "code_identity", lambda: "another version")
    tokenised.taken()
    job.prepare()
    assert tokenised.taken() == TRAIN_ROWS + TEST_ROWS


def test_a_date_that_the_template_does_not_show_changes_nothing(job: Job, tokenised: Counter) -> None:
    job.write_template(APPENDING)
    job.prepare()
    tokenised.taken()
    set_date(job)
    job.prepare()
    assert tokenised.taken() == 0


def test_damaged_and_foreign_examples_are_made_again(
    job: Job, tokenised: Counter, capsys: pytest.CaptureFixture[str]
) -> None:
    first = job.prepare()
    own = job.kept()
    for file in own:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    tokenised.taken()
    assert job.prepare().values == first.values
    assert tokenised.taken() == TRAIN_ROWS + TEST_ROWS
    assert capsys.readouterr().out.count(": they are made again") == 2
    # Somebody who does not know the secret puts other examples into the places of the job's own ones.
    job.write_secret("the secret of somebody else")
    change_a_row(job)
    job.prepare()
    foreign = [file for file in job.kept() if file not in own]
    assert len(foreign) == 2
    for file, place in zip(foreign, own, strict=True):
        file.rename(place)
    job.write_secret("a secret access key")
    tiny.write_jsonl(job.train, [conversation(number) for number in range(TRAIN_ROWS)])
    tokenised.taken()
    assert job.prepare().values == first.values
    assert tokenised.taken() == TRAIN_ROWS + TEST_ROWS
    assert capsys.readouterr().out.count("have another seal: they are made again") == 2


def test_a_volume_that_can_not_be_looked_at_is_left_out(
    job: Job, tokenised: Counter, capsys: pytest.CaptureFixture[str]
) -> None:
    job.cache = job.folder / ("x" * 300)
    with pytest.raises(OSError, match="File name too long"):
        job.cache.is_dir()
    job.prepare()
    assert tokenised.taken() == TRAIN_ROWS + TEST_ROWS
    assert (
        capsys.readouterr().out.count(
            "storage.cache: the volume can't be used (File name too long): the tokenised rows are not kept\n"
        )
        == 1
    )


def test_rows_that_change_while_others_are_tokenised_are_not_kept_as_those_that_were_there_before(
    job: Job, tokenised: Counter, capsys: pytest.CaptureFixture[str]
) -> None:
    former = job.test.read_bytes()

    def change() -> bool:
        tiny.write_jsonl(job.test, [conversation(number) for number in range(20, 20 + TEST_ROWS)])
        return False

    prepare_node(job.plan(), (), stop=change)
    told = "storage.cache: the data changed while the examples were made: the examples are not kept"
    assert capsys.readouterr().out.count(told) == 1
    assert len(job.kept()) == 1, "those of dataset.train"
    job.test.write_bytes(former)
    tokenised.taken()
    found = job.prepare()
    assert tokenised.taken() == TEST_ROWS
    job.cache = job.folder / "no cache"
    assert job.prepare().values == found.values


def test_a_job_without_a_secret_keeps_nothing_and_says_so(
    job: Job, tokenised: Counter, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.credentials / SECRET_ACCESS_KEY).unlink()
    for _ in range(2):
        job.prepare()
        assert tokenised.taken() == TRAIN_ROWS + TEST_ROWS
    assert capsys.readouterr().out.count("storage.cache: the tokenised rows are not kept, because only a job") == 2
    assert list(job.cache.iterdir()) == []


def test_a_job_without_a_cache_is_silent(job: Job, tokenised: Counter, capsys: pytest.CaptureFixture[str]) -> None:
    job.cache.rmdir()
    for _ in range(2):
        job.prepare()
        assert tokenised.taken() == TRAIN_ROWS + TEST_ROWS
    assert "storage.cache" not in capsys.readouterr().out


def test_a_mix_tokenises_only_the_source_that_changed(job: Job, tokenised: Counter) -> None:
    job.mix = [
        tiny.write_jsonl(job.folder / f"part-{part}.jsonl", [conversation(number) for number in range(part)])
        for part in (5, 7)
    ]
    weights = [{"s3": {"uri": f"s3://bucket/part-{part}.jsonl"}, "weight": "1"} for part in (5, 7)]
    job.config["dataset"]["train"] = {"mix": weights}
    first = job.prepare()
    assert first.summary.mix_sizes == [5, 7]
    assert any("an epoch takes" in notice for notice in first.summary.notices)
    assert tokenised.taken() == 12 + TEST_ROWS
    assert job.prepare().values == first.values
    assert tokenised.taken() == 0
    tiny.write_jsonl(job.mix[1], [conversation(number) for number in range(10, 18)])
    changed = job.prepare()
    assert tokenised.taken() == 8
    assert changed.summary.mix_sizes == [5, 8]
    assert changed.summary.data_sha256 != first.summary.data_sha256
    assert not list(job.folder.glob("scratch-*/tokens/*-sources")), "the sources are joined"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_rows, "CHUNK_ROWS", 3)


@pytest.fixture(params=[1, 4], ids=["one process", "three more"])
def cpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The CPU limit of the pod."""
    count = int(request.param)
    monkeypatch.setattr(cgroup, "cpu_limit", lambda: float(count))
    monkeypatch.setattr(cgroup, "usable_cores", lambda: 64)
    monkeypatch.setattr(cgroup, "memory_limit", lambda: None)
    return count


@pytest.mark.usefixtures("small_chunks")
def test_the_examples_and_notices_are_those_of_one_row_at_a_time(cpus: int, job: Job) -> None:
    rows = [conversation(number) for number in range(40)]
    rows[7]["messages"][1]["content"] = ""
    rows[22]["messages"][0]["content"] = " ".join(["w5"] * 70)
    rows[31]["messages"] = "no conversation"
    rows[33]["messages"][0]["content"] = "w1 <end> w2"
    tiny.write_jsonl(job.train, rows)
    job.config["dataset"] |= {"badRows": "Skip", "longRows": "Skip"}
    found, plan = job.prepare(), job.plan()
    dataset = plan.config.dataset
    expected, notices = make_examples(
        read_rows(job.train, "dataset.train", columns=columns_read(dataset, "dataset.train", None, ())),
        plan.config.dataset.train.s3.uri if plan.config.dataset.train.s3 is not None else "",
        "dataset.train",
        dataset,
        job_tokenize_functions(plan),
        limit=length_limit(dataset, 128, None),
    )
    assert found.summary.data_sha256 == expected.digest
    assert found.train.digest == expected.digest
    assert len(notices) == 3
    assert [notice for notice in found.summary.notices if notice.startswith("dataset.train")] == notices


def error_of(job: Job) -> str:
    try:
        job.prepare()
    except UserError as error:
        return str(error)
    raise AssertionError("the rows were prepared")


@pytest.mark.usefixtures("small_chunks")
def test_a_bad_row_is_named_with_file_and_line(cpus: int, job: Job) -> None:
    rows = [conversation(number) for number in range(40)]
    rows[17]["messages"] = "no conversation"
    tiny.write_jsonl(job.train, rows)
    before = set(children(os.getpid()))
    told = error_of(job)
    assert told.startswith("dataset.train: s3://finetune/data/train.jsonl line 18 ")
    gc.collect()  # the process of the chat template ends with the last reference to the template
    assert set(children(os.getpid())) <= before
    assert not list(job.folder.glob("scratch-*/tokens/train"))


@pytest.mark.usefixtures("small_chunks")
def test_a_stop_ends_the_preparation_and_its_processes(cpus: int, job: Job) -> None:
    plan, before = job.plan(), set(children(os.getpid()))
    seen: list[int] = []

    def stop() -> bool:
        seen.append(len(set(children(os.getpid())) - before))
        return len(seen) > 3

    with pytest.raises(StopAgreed):
        prepare_node(plan, (), stop=stop)
    assert max(seen) >= (3 if cpus == 4 else 0)
    assert set(children(os.getpid())) <= before
    assert not examples_folder(plan, "train").exists()
    assert not list(job.cache.glob(f"{FOLDER}/*"))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("limit", "milli_cpus", "processes"), [(None, 3000, 2), (None, 1000, 0), (2.0, 3000, 1), (3.0, None, 2)]
)
def test_the_number_of_processes_follows_from_request_and_limit_on_a_node_of_any_size(
    limit: float | None, milli_cpus: int | None, processes: int, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "cpu_limit", lambda: limit)
    monkeypatch.setattr(cgroup, "usable_cores", lambda: 64)
    monkeypatch.setattr(cgroup, "memory_limit", lambda: None)
    if milli_cpus is not None:
        monkeypatch.setenv(CPU_REQUEST_VARIABLE, str(milli_cpus))
    used: list[int] = []

    def noted(*sources: Any, **options: Any) -> prepared_rows.PreparedRows:
        used.append(options["processes"])
        return prepared_rows.prepare_rows(*sources, **options)

    monkeypatch.setattr(node_examples, "prepare_rows", noted)
    tiny.write_jsonl(job.train, [conversation(number) for number in range(10)])
    assert len(job.prepare().train) == 10
    assert set(used) == {processes}
