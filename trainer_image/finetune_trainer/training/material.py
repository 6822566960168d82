"""What a run is made of, loaded from local files on every rank: tokenizer, examples, model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_core.api.sources import DataSource, ModelSpec
from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_trainer.data.examples import Example, Examples, Tokenize, make_examples
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, tokenize_with
from finetune_trainer.plan import WorkerPlan
from finetune_trainer.training.model import (
    DTYPES,
    add_adapters,
    enable_gradient_checkpointing,
    load_base,
)


@dataclass(frozen=True)
class Data:
    """Tokenizer and examples."""

    tokenizer: Any
    train: list[Example]
    validation: list[Example]
    notices: list[str]

    @property
    def pad(self) -> int:
        """Return the id that fills short rows; masked, so any will do."""
        return int(self.tokenizer.eos_token_id)


def source_name(source: ModelSpec | DataSource) -> str:
    """Return how a person names a source: its address, repository or claim."""
    hub = getattr(source, "hugging_face", None)
    if hub is not None:
        return str(hub.repo)
    if source.s3 is not None:
        return source.s3.uri
    if source.volume is not None:
        return f"{source.volume.claim_name}/{source.volume.path}"
    raise UserError("model", "must name a source")


def load_data(plan: WorkerPlan) -> Data:
    """Read and tokenise training and validation rows; raises UserError for rows that the job does not allow."""
    tokenizer = load_tokenizer(plan.inputs.model)
    tokenize = tokenize_with(tokenizer)
    dataset = plan.config.dataset
    train = _examples(plan.config, dataset.train, plan.inputs.train, "dataset.train", tokenize)
    validation = Examples()
    if dataset.validation is not None and plan.inputs.validation is not None:
        validation = _examples(plan.config, dataset.validation, plan.inputs.validation, "dataset.validation", tokenize)
    return Data(tokenizer, train.examples, validation.examples, [*train.notices, *validation.notices])


def _examples(config: RunConfig, source: DataSource, path: Path, name: str, tokenize: Tokenize) -> Examples:
    return make_examples(read_rows(path, name), source_name(source), name, config.dataset, tokenize)


def load_model(plan: WorkerPlan) -> Any:
    """Return the model that is trained: the base, with adapters where the method is LoRA."""
    config = plan.config
    model = load_base(plan.inputs.model, DTYPES[config.optimization.precision])
    if config.optimization.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.lora is None:
        return model
    return add_adapters(model, config.lora, seed=config.optimization.seed, base_name=source_name(config.model))
