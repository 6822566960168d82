"""What a run is made of, loaded from local files: the first rank of a node prepares base model and tokens on disk,
then every rank loads tokenizer, examples and model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_core.api.sources import DataSource
from finetune_trainer.data.dataset import limit_of, make_examples
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, stop_ids, tokenize_with
from finetune_trainer.inputs import source_name
from finetune_trainer.plan import WorkerPlan
from finetune_trainer.training.base import Skeleton, extend_base, skeleton
from finetune_trainer.training.model import (
    DTYPES,
    adapted_modules,
    adapts_an_embedding,
    add_adapters,
    enable_gradient_checkpointing,
    load_base,
)


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
    notices: list[str]
    """One sentence for each kind of row that was left out."""

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


def prepare(plan: WorkerPlan) -> list[str]:
    """Write what the ranks of this node share: the extended base where one is needed, and the tokenised rows.

    Returns the notices about rows; raises UserError for rows that the job does not allow.
    """
    bones, config = skeleton(plan.inputs.model), plan.config
    untie = bones.tied and adapts_an_embedding(bones, _targets(plan, bones))
    if config.model.added_tokens or untie:
        extend_base(
            plan.inputs.model,
            plan.folder / "base",
            tokens=config.model.added_tokens,
            untie=untie,
            seed=config.optimization.seed,
        )
    tokenize = tokenize_with(load_tokenizer(base_folder(plan)))
    limit = limit_of(config.dataset, bones.context)
    notices: list[str] = []
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
    return notices


def _files(plan: WorkerPlan) -> list[tuple[str, DataSource, Path]]:
    dataset, inputs = plan.config.dataset, plan.inputs
    given = (
        ("train", dataset.train, inputs.train),
        ("validation", dataset.validation, inputs.validation),
        ("test", dataset.test, inputs.test),
    )
    return [(name, source, path) for name, source, path in given if source is not None and path is not None]


def load_data(plan: WorkerPlan, notices: list[str]) -> Data:
    """Load what `prepare` wrote; ``notices`` are what it returned."""
    tokenizer = load_tokenizer(base_folder(plan))
    folder = plan.folder / "tokens"
    present = {name for name, _, _ in _files(plan)}
    sets = {
        name: ExampleSet.load(folder / name) if name in present else ExampleSet.empty()
        for name in ("train", "validation", "test")
    }
    dataset = plan.config.dataset
    longest = max(max(examples.lengths, default=0) for examples in sets.values())
    return Data(
        tokenizer=tokenizer,
        bones=skeleton(base_folder(plan)),
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        capacity=max(longest, min(dataset.max_length, skeleton_context(plan))) if dataset.packing else None,
        stop_ids=stop_ids(tokenizer, dataset.format),
        notices=notices,
    )


def skeleton_context(plan: WorkerPlan) -> int:
    """Return the model's context in tokens, or dataset.maxLength where the model has no limit."""
    return skeleton(plan.inputs.model).context or plan.config.dataset.max_length


def load_model(plan: WorkerPlan) -> Any:
    """Return the model that is trained: the base, with adapters where the method is LoRA."""
    config, folder = plan.config, base_folder(plan)
    targets = _targets(plan, skeleton(plan.inputs.model))
    model = load_base(folder, DTYPES[config.optimization.precision])
    if config.optimization.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.lora is None:
        return model
    return add_adapters(
        model, config.lora, targets=targets, seed=config.optimization.seed, base_name=source_name(config.model)
    )
