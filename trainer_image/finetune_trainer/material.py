"""What a run is made of, loaded from local files: the first rank of a node prepares base model and tokens on disk,
then every rank loads tokenizer, examples and model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_core.api.sources import DataSource
from finetune_core.contract import ContractModel
from finetune_core.errors import UserError
from finetune_trainer.checkpoints.export import NewRows, check_mergeable, new_rows
from finetune_trainer.data.dataset import length_limit, make_examples
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, stop_ids, tokenize_functions
from finetune_trainer.engine.engine import shard_new_models
from finetune_trainer.model.base import Skeleton, check_complete, extend_base, skeleton
from finetune_trainer.model.load import (
    DTYPES,
    adapted,
    adapted_modules,
    adapts_an_embedding,
    add_adapters,
    enable_gradient_checkpointing,
    load_base,
)
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.sources.inputs import source_name


class Prepared(ContractModel):
    """What the first rank of a node says about what it wrote for the others."""

    notices: list[str]
    """One sentence for each kind of row that was left out."""
    context: int
    """Longest example in tokens that model and job allow."""
    data_sha256: str
    """Of the training rows as token ids."""
    model_context: int
    """Longest text in tokens that the model reads, dataset.maxLength where it has no limit."""
    new_rows: NewRows | None = None
    """Where the added tokens' rows lie in the base."""
    new_rows_sha256: str | None = None
    """Of these rows."""


def same_on_all_nodes(answers: Sequence[object]) -> Prepared:
    """Return what all nodes prepared; ``answers`` are those of their first ranks, None of the others.

    Raises UserError where the nodes read different data: a branch or a file changed between them.
    """
    prepared = [Prepared.model_validate(answer) for answer in answers if answer is not None]
    if len({(one.data_sha256, one.new_rows_sha256) for one in prepared}) > 1:
        raise UserError(
            "dataset.train",
            "the nodes of this job read different rows: it changed while they started; name a commit as `revision`, or"
            " a file that nobody writes to",
        )
    return prepared[0]


@dataclass(frozen=True)
class Data:
    """Tokenizer and examples."""

    tokenizer: Any
    bones: Skeleton
    """The model as the run computes with it, without weights."""
    train: ExampleSet
    validation: ExampleSet
    test: ExampleSet
    capacity: int | None
    """Most tokens of a packed sequence; None: one example a sequence."""
    stop_ids: list[int]
    """Tokens that end a generated answer."""
    prepared: Prepared

    @property
    def pad(self) -> int:
        """Return the id that fills short rows; nothing sees it, so any will do."""
        return int(self.tokenizer.eos_token_id)


def base_folder(plan: WorkerPlan) -> Path:
    """Return the folder of the base model that the run computes with, once `prepare` has been there."""
    extended = plan.folder / "base"
    return extended if extended.is_dir() else plan.inputs.model


def _targets(plan: WorkerPlan, bones: Skeleton) -> list[str]:
    config = plan.config
    return adapted_modules(bones, config.lora, added_tokens=bool(config.model.added_tokens)) if config.lora else []


def prepare(plan: WorkerPlan) -> Prepared:
    """Write what the ranks of this node share: the extended base where one is needed, and the tokenised rows.

    Raises UserError for rows that the job does not allow, and for target modules that the model does not have.
    """
    check_complete(plan.inputs.model)
    bones, config = skeleton(plan.inputs.model), plan.config
    targets = _targets(plan, bones)
    untie = bones.tied and adapts_an_embedding(bones, targets)
    if config.model.added_tokens or untie:
        extend_base(
            plan.inputs.model,
            plan.folder / "base",
            tokens=config.model.added_tokens,
            untie=untie,
            seed=config.optimization.seed,
        )
    if config.storage.artifact != "Adapter":
        check_mergeable([f"{name}.weight" for name in adapted(bones, targets)], base_folder(plan))
    tokenizer = load_tokenizer(base_folder(plan))
    tokenize = tokenize_functions(tokenizer)
    limit = length_limit(config.dataset, bones.context)
    notices: list[str] = []
    if config.model.added_tokens and targets and not adapts_an_embedding(bones, targets):
        notices.append(
            "model.addedTokens: lora.targetModules leaves out both embeddings, so the new rows stay as they were drawn"
        )
    data_sha256 = ""
    for name, source, path in _files(plan):
        examples, left_out = make_examples(
            read_rows(path, f"dataset.{name}"),
            source_name(source),
            f"dataset.{name}",
            config.dataset,
            tokenize,
            limit=limit,
            keep_rows=config.dataset.task != "None" and name != "train",
        )
        examples.save(plan.folder / "tokens" / name)
        notices += left_out
        data_sha256 = data_sha256 or examples.digest
    rows = _new_rows(plan, bones, tokenizer)
    return Prepared(
        notices=notices,
        context=limit.tokens,
        data_sha256=data_sha256,
        model_context=bones.context or config.dataset.max_length,
        new_rows=rows,
        new_rows_sha256=_digest(plan, rows),
    )


def _new_rows(plan: WorkerPlan, bones: Skeleton, tokenizer: Any) -> NewRows | None:
    """Return where the added tokens' rows lie."""
    if not plan.config.model.added_tokens:
        return None
    ids = [tokenizer.convert_tokens_to_ids(token) for token in plan.config.model.added_tokens]
    once = bones.tied or bones.output_name is None
    output_key = None if once else f"{bones.output_name}.weight"
    return NewRows(ids=ids, input_key=f"{bones.input_name}.weight", output_key=output_key)


def _digest(plan: WorkerPlan, rows: NewRows | None) -> str | None:
    if rows is None:
        return None
    sha256 = hashlib.sha256()
    for tensor in new_rows(base_folder(plan), rows, DTYPES["fp32"]).values():
        sha256.update(tensor.numpy().tobytes())
    return sha256.hexdigest()


def _files(plan: WorkerPlan) -> list[tuple[str, DataSource, Path]]:
    dataset, inputs = plan.config.dataset, plan.inputs
    given = (
        ("train", dataset.train, inputs.train),
        ("validation", dataset.validation, inputs.validation),
        ("test", dataset.test, inputs.test),
    )
    return [(name, source, path) for name, source, path in given if source is not None and path is not None]


def load_data(plan: WorkerPlan, prepared: Prepared) -> Data:
    """Load what `prepare` wrote."""
    tokenizer = load_tokenizer(base_folder(plan))
    folder = plan.folder / "tokens"
    present = {name for name, _, _ in _files(plan)}
    sets = {
        name: ExampleSet.load(folder / name) if name in present else ExampleSet.empty()
        for name in ("train", "validation", "test")
    }
    dataset = plan.config.dataset
    return Data(
        tokenizer=tokenizer,
        bones=skeleton(base_folder(plan)),
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        capacity=prepared.context if dataset.packing else None,
        stop_ids=stop_ids(tokenizer, dataset.format),
        prepared=prepared,
    )


def load_model(plan: WorkerPlan) -> Any:
    """Return the model that is trained: the base, with adapters where the method is LoRA.

    A collective under ZeRO-3, which shards the weights while they are read.
    """
    config, folder = plan.config, base_folder(plan)
    targets = _targets(plan, skeleton(plan.inputs.model))
    sharding = shard_new_models(config.optimization, config.world.size)
    model = load_base(folder, DTYPES[config.optimization.precision], sharded=sharding is not None)
    # transformers looks whether it still lives, also when it generates.
    model.sharding = sharding
    if config.optimization.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.lora is None:
        return model
    return add_adapters(
        model, config.lora, targets=targets, seed=config.optimization.seed, base_name=source_name(config.model)
    )
