"""Each format of rows trains like a plain PyTorch loop over the examples that the rows must become: with packing, every
ZeRO stage, evaluation, and after a resume with the same and with other ranks.

`row_formats.py` lists the formats. `FEW` has one case for each entry of this list. In the runs of these cases, each
value of method, stage, packing and number of ranks occurs together with each value of the other three. The test that is
marked long trains every entry with every method and stage, with and without packing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from minio.commonconfig import CopySource
from transformers import AutoTokenizer

from finetune_core.api.base import ApiModel
from finetune_core.api.dataset import DatasetSpec
from finetune_core.contract import ScoreRecord
from finetune_trainer.data.chat.chat_template import use_chat_template
from finetune_trainer.data.dataset import length_limit, make_examples
from finetune_trainer.data.examples import joined
from finetune_trainer.data.files.kinds import Compression, Kind, kind_of
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, tokenize_functions
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.storage.evaluation_file import EvaluationFile
from tests.trainer import row_formats
from tests.trainer.gangs import losses_of, rows_consumed, step_rows, train_all
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.plain_loop import Plain, PlainExample, plain_batches, plain_loop
from tests.trainer.pods import run_config
from tests.trainer.row_files import shares, write_files
from tests.trainer.row_formats import FORMATS, RowFormat, Text, found_examples, plain_example, texts
from tests.trainer.test_recovery import artifact_files

pytestmark = pytest.mark.gang

STEPS, INTERRUPTED = 6, 2
RATE, GLOBAL_BATCH = 1e-3, 6
TRAIN_ROWS, VALIDATION_ROWS = 12, 5
PRODUCT_SECONDS = 350
"""The longest time in seconds that the runs of one call of `Bench.train` may take together."""
METHODS, STAGES = ("LoRA", "Full"), (0, 1, 2, 3)
NAMES = [form.name for form in FORMATS]


@dataclass(frozen=True)
class Run:
    """One training of a format, with its settings."""

    form: RowFormat
    method: str
    stage: int
    packing: bool
    world: int
    job: str
    """The first word of the job's name. A run resumes if the job has a checkpoint."""

    @property
    def name(self) -> str:
        """The name of the job, which is the same for all runs of the job."""
        return f"{self.job}-{self.form.name}-{self.method}".lower()


@dataclass(frozen=True)
class Case:
    """How a format is trained and resumed. ``run`` is the training without a stop."""

    run: Run
    moved: Run
    """The run that resumes a copy of the stopped job with other settings."""
    repeated: bool = True
    """Whether the job is also trained without a stop, and resumed with the same settings."""

    @property
    def cut(self) -> Run:
        """The run that is stopped. The run that resumes the job with the same settings has the same `Run`."""
        return replace(self.run, job=f"{self.run.job}-cut")


def few_cases() -> Iterator[Case]:
    """Yield a case for each format. The job is resumed with one rank instead of two, with other packing, and in the
    first twelve cases at another stage."""
    for number, form in enumerate(FORMATS):
        method, stage, packing = METHODS[(number // 2) % 2], number % 4, (number // 4) % 2 == 1
        run = Run(form, method, stage, packing, 2, "few")
        moved = Run(form, method, (stage + 1 + number // 4) % 4, not packing, 1, "few-moved")
        yield Case(run, moved, repeated=number % 6 == 0)


FEW = list(few_cases())


@dataclass(frozen=True, eq=False)
class Bench:
    """The object store, the model and the data with which the jobs of this module train."""

    store: ObjectStore
    model: Path
    folder: Path

    def inputs(self, form: RowFormat) -> Inputs:
        """Return the inputs for a format. The first call for the format writes its data."""
        paths, validation = self._files(form)
        return Inputs(
            model=self.model,
            train=paths[0].parent if form.mix else paths[0],
            mix=paths if form.mix else [],
            validation=validation,
        )

    @functools.cache  # noqa: B019  (the bench lives as long as the tests of this module)
    def _files(self, form: RowFormat) -> tuple[list[Path], Path]:
        rows, scored = form.rows(TRAIN_ROWS, 1), form.rows(VALIDATION_ROWS, 2)
        paths = write_files(form, self.folder / form.name / "train", [made.row for made in rows])
        one_file = replace(form, file=form.file.split(",")[0], mix=())
        target = self.folder / form.name / "validation"
        return paths, write_files(one_file, target, [made.row for made in scored])[0]

    def config(self, run: Run) -> dict[str, Any]:
        form = run.form
        config = run_config(
            self.store,
            run.name,
            world__nodes=run.world,
            method=run.method,
            dataset__format=form.form,
            dataset__packing=run.packing,
            optimization__zeroStage=run.stage,
            optimization__maxSteps=STEPS,
            optimization__learningRate=RATE,
            optimization__globalBatchSize=GLOBAL_BATCH,
            storage__checkpointEverySteps=100,
            evaluation__everySteps=100,
            **{f"dataset__{name}": value for name, value in form.dataset.items()},
        )
        if form.mix:
            source = config["dataset"]["train"]
            weights = [{} if weight is None else {"weight": weight} for weight in form.mix]
            config["dataset"]["train"] = {"mix": [{**source, **weight} for weight in weights]}
        return config

    def train(
        self, runs: Sequence[Run], folder: str, *, stopped: Iterable[Run] = ()
    ) -> dict[Run, dict[int, list[int]]]:
        """Train ``runs``, which all have the same number of ranks. The runs in ``stopped`` end after step
        INTERRUPTED. Return the numbers of the examples that the ranks of each run consumed, by step."""
        cut = set(stopped)
        train_all(
            [self.config(run) for run in runs],
            [self.inputs(run.form) for run in runs],
            self.folder / folder,
            credentials=self.store.credentials,
            seconds=PRODUCT_SECONDS,
            faults=[{"kind": "stop", "step": INTERRUPTED + 1} if run in cut else None for run in runs],
        )
        return {run: rows_consumed(self.folder / folder, index, run.world) for index, run in enumerate(runs)}

    def copy(self, run: Run, target: Run) -> None:
        """Copy the files of a job in the bucket to another job, which can then resume from the same checkpoint."""
        prefix = f"runs/default/{run.name}/uid-1/"
        for key in self.store.keys(prefix):
            self.store.client.copy_object(
                BUCKET, key.replace(f"/{run.name}/", f"/{target.name}/"), CopySource(BUCKET, key)
            )

    @functools.cache  # noqa: B019
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.model)

    def example(self, text: Text) -> PlainExample:
        """Return the example ``text`` as token ids."""
        return plain_example(self.tokenizer(), text)

    def examples(self, form: RowFormat) -> list[PlainExample]:
        """Return the training examples that the rows of a format must become."""
        parts = shares(form, form.rows(TRAIN_ROWS, 1))
        return [self.example(text) for part in parts for text in texts(part)]

    def batches(self, form: RowFormat) -> list[list[int]]:
        """Return, for each step of a run, the numbers of the examples that it consumes, sorted."""
        sizes = [len(texts(part)) for part in shares(form, form.rows(TRAIN_ROWS, 1))]
        batches = plain_batches(sizes, form.mix, steps=STEPS, size=GLOBAL_BATCH)
        return [sorted(batch) for batch in batches]

    @functools.cache  # noqa: B019
    def plain(self, form: RowFormat, method: str) -> Plain:
        """Return the results of the plain training loop on the rows of ``form``."""
        train = self.examples(form)
        validation = [self.example(text) for text in texts(form.rows(VALIDATION_ROWS, 2))]
        torch.set_num_threads(1)
        return plain_loop(self.model, method, train, validation, self.batches(form), rate=RATE)

    def losses(self, run: Run) -> list[float]:
        assert [row.step for row in step_rows(self.store, run.name)] == list(range(1, STEPS + 1)), run
        return losses_of(self.store, run.name)

    def assert_like_plain(self, run: Run) -> None:
        """Assert that the losses, and the perplexities of base and tuned model, are those of the plain loop."""
        plain = self.plain(run.form, run.method)
        worst = max(abs(a - b) / b for a, b in zip(self.losses(run), plain.losses, strict=True))
        print(f"{run.name}: largest relative difference of a loss {worst:.2g}")
        assert self.losses(run) == pytest.approx(plain.losses, rel=1e-6), run
        last = step_rows(self.store, run.name)[-1]
        assert last.perplexity == pytest.approx(plain.perplexity, rel=1e-6), run
        base, tuned = self.evaluation(run)
        assert base.perplexity == pytest.approx(plain.base_perplexity, rel=1e-6), run
        assert tuned.perplexity == pytest.approx(plain.perplexity, rel=1e-6), run

    def evaluation(self, run: Run) -> tuple[ScoreRecord, ScoreRecord]:
        """Return the scores of base and tuned model."""
        key = max(self.store.keys(f"runs/default/{run.name}/uid-1/evaluation/"))
        found = EvaluationFile.model_validate_json(self.store.read(key)).evaluation
        assert found.base is not None
        assert found.tuned is not None
        return found.base, found.tuned


@pytest.fixture(scope="module")
def bench(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("formats")
    return Bench(store, row_formats.write_model(folder / "model"), folder)


@pytest.mark.parametrize("form", FORMATS, ids=NAMES)
def test_rows_become_the_examples_that_they_must_become(form: RowFormat, bench: Bench) -> None:
    run = Run(form, "LoRA", 0, packing=False, world=1, job="examples")
    dataset = DatasetSpec.model_validate(bench.config(run)["dataset"])
    tokenizer = load_tokenizer(bench.model)
    use_chat_template(tokenizer, dataset.format, bench.model)
    inputs = bench.inputs(form)
    made = [
        make_examples(
            read_rows(path, "dataset.train"),
            path.name,
            "dataset.train",
            dataset,
            tokenize_functions(tokenizer),
            limit=length_limit(dataset, None),
        )[0]
        for path in inputs.mix or [inputs.train]
    ]
    assert found_examples(joined(made)) == bench.examples(form)


@dataclass(frozen=True)
class Trained:
    """What the runs of a case consumed: the numbers of the examples, by step."""

    whole: dict[int, list[int]]
    """Examples of the run that was not stopped."""
    before: dict[int, list[int]]
    """Examples of the run that was stopped."""
    after: dict[int, list[int]]
    """Examples of the run that resumed with the same settings."""
    moved: dict[int, list[int]]
    """Examples of the run that resumed with other settings (`Case.moved`)."""


def train_cases(cases: Sequence[Case], bench: Bench, folder: str) -> dict[Case, Trained]:
    """Train each case with a stop, and resume it with other settings. Also train the cases that are `repeated` without
    a stop, and resume them with the same settings. Return what the runs of each case consumed."""
    whole = [case.run for case in cases if case.repeated]
    cut = [case.cut for case in cases]
    found = [bench.train([*whole, *cut], f"{folder}-first", stopped=cut)]
    for case in cases:
        bench.copy(case.cut, case.moved)
    found.append(bench.train([case.cut for case in cases if case.repeated], f"{folder}-again"))
    for world in sorted({case.moved.world for case in cases}):
        found.append(
            bench.train([case.moved for case in cases if case.moved.world == world], f"{folder}-moved-{world}")
        )
    first, again, *others = found
    moved = dict(itertools.chain.from_iterable(rows.items() for rows in others))
    return {
        case: Trained(first.get(case.run, {}), first[case.cut], again.get(case.cut, {}), moved[case.moved])
        for case in cases
    }


def assert_the_same_bits(case: Case, rows: Trained, bench: Bench) -> None:
    """Assert that a run that was stopped and resumed with the same settings has the same bits as the run without a
    stop, and that the latter has the rows, losses and perplexities of the plain loop."""
    assert rows.whole == dict(enumerate(bench.batches(case.run.form), start=1))
    bench.assert_like_plain(case.run)
    assert (max(rows.before), min(rows.after)) == (INTERRUPTED, INTERRUPTED + 1)
    assert {**rows.before, **rows.after} == rows.whole
    assert bench.losses(case.cut) == bench.losses(case.run)
    assert artifact_files(bench.store, case.cut.name) == artifact_files(bench.store, case.run.name)
    assert bench.evaluation(case.cut) == bench.evaluation(case.run)


def assert_goes_on_in_another_way(case: Case, rows: Trained, bench: Bench) -> None:
    """Assert that a run that resumed with other settings has lost and repeated no row, and has the losses and
    perplexities of the plain loop."""
    assert (max(rows.before), min(rows.moved)) == (INTERRUPTED, INTERRUPTED + 1)
    assert {**rows.before, **rows.moved} == dict(enumerate(bench.batches(case.run.form), start=1))
    bench.assert_like_plain(case.moved)


@pytest.fixture(scope="module")
def trained(bench: Bench) -> dict[Case, Trained]:
    return train_cases(FEW, bench, "few")


@pytest.mark.parametrize("case", FEW, ids=NAMES)
def test_a_resume_with_other_ranks_stage_and_packing_has_the_rows_and_losses_of_a_plain_loop(
    case: Case, trained: dict[Case, Trained], bench: Bench
) -> None:
    assert_goes_on_in_another_way(case, trained[case], bench)


REPEATED = [case for case in FEW if case.repeated]


@pytest.mark.parametrize("case", REPEATED, ids=[case.run.form.name for case in REPEATED])
def test_a_resume_in_the_same_way_has_the_same_bits(case: Case, trained: dict[Case, Trained], bench: Bench) -> None:
    assert_the_same_bits(case, trained[case], bench)


@pytest.mark.long
@pytest.mark.timeout(6 * PRODUCT_SECONDS)  # the test trains five times
@pytest.mark.parametrize(("method", "stage", "packing"), list(itertools.product(METHODS, STAGES, (False, True))))
def test_every_format_in_every_combination(method: str, stage: int, packing: bool, bench: Bench) -> None:
    """Every format is trained on one rank and on two. The run on two ranks is resumed on two ranks, and on one rank or
    four."""
    job = f"{stage}{'p' * packing}"
    cases = [
        Case(
            Run(form, method, stage, packing, 2, job),
            Run(form, method, (stage + 1 + number % 3) % 4, not packing, 1 if number % 2 else 4, f"{job}-moved"),
        )
        for number, form in enumerate(FORMATS)
    ]
    alone = [replace(case.run, world=1, job=f"{job}-alone") for case in cases]
    for case, rows in train_cases(cases, bench, f"{job}-{method}").items():
        assert_the_same_bits(case, rows, bench)
        assert_goes_on_in_another_way(case, rows, bench)
    for run, consumed in bench.train(alone, f"{job}-{method}-alone").items():
        assert consumed == dict(enumerate(bench.batches(run.form), start=1))
        bench.assert_like_plain(run)


def test_every_pair_of_method_stage_and_packing_occurs_among_the_few_runs() -> None:
    few = [run for case in FEW for run in (case.run, case.moved)]
    settings: list[Callable[[Run], object]] = [
        lambda run: run.method,
        lambda run: run.stage,
        lambda run: run.packing,
        lambda run: run.world,
    ]
    for first, second in itertools.combinations(settings, 2):
        possible = set(itertools.product({first(run) for run in few}, {second(run) for run in few}))
        assert {(first(run), second(run)) for run in few} == possible
    assert {(run.form.name, run.packing) for run in few} == set(itertools.product(NAMES, (False, True)))


# ---- the table has everything that the API has ----


def missing_of(models: Sequence[ApiModel], path: str) -> list[str]:
    """Return what is missing in ``models``, which are all of one class and lie at ``path``. A choice of a field of type
    Literal is missing if no model has it, set or by default. Any other field is missing if no model sets it. Models
    that are values of fields are searched too."""
    found: list[str] = []
    for name, info in type(models[0]).model_fields.items():
        at = f"{path}.{info.alias or name}"
        choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        found += [f"{at}: {choice}" for choice in choices if choice not in {getattr(model, name) for model in models}]
        given = [getattr(model, name) for model in models if name in model.model_fields_set]
        if not given and not choices:
            found.append(at)
        inner = [value for value in given if isinstance(value, ApiModel)]
        found += missing_of(inner, at) if inner else []
    return found


def specs() -> list[DatasetSpec]:
    source = {"s3": {"uri": "s3://bucket/rows.jsonl"}}
    return [DatasetSpec.model_validate({"train": source, "format": form.form, **form.dataset}) for form in FORMATS]


def test_every_field_and_choice_of_a_format_is_in_the_table() -> None:
    assert missing_of([spec.format for spec in specs()], "dataset.format") == []
    policies = [
        f"{field}: {choice}"
        for field in ("long_rows", "bad_rows")
        for choice in get_args(DatasetSpec.model_fields[field].annotation)
        if choice not in {getattr(spec, field) for spec in specs()}
    ]
    assert policies == []


def test_every_kind_of_file_and_mix_is_in_the_table() -> None:
    kinds = [kind_of(f"rows{suffix}") for form in FORMATS for suffix in form.file.split(",")]
    assert {found.kind for found in kinds if found is not None} == set(Kind)
    assert {found.compression for found in kinds if found is not None} == set(Compression)
    assert {weight is None for form in FORMATS for weight in form.mix} == {False, True}
    assert any("," in form.file and not form.mix for form in FORMATS), "a source of several files"
