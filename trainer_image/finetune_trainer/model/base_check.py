"""Checks that the base model of a job can be loaded, extended and adapted as the job asks for, before any
weight is read. The checks read only the configuration, the tokenizer and the headers of the weight files, and build the
model on torch's meta device.

`preparation.py` runs the checks before it writes anything. The preflight check runs the same checks on files that hold
only the headers. So a model that can't be used is found before the training pods start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_trainer.data.tokenizer import add_tokens, check_ends, load_tokenizer
from finetune_trainer.model.adapter_fit import (
    FittedAdapter,
    continued_targets,
    fit_adapter,
    other_base_notice,
    unknown_fields_notice,
)
from finetune_trainer.model.adapters import AdapterTargets, adapts_an_embedding, choose_targets, unquantized_notice
from finetune_trainer.model.attention import ModelAbilities, check_abilities, kernels
from finetune_trainer.model.extended_base import check_extendable
from finetune_trainer.model.given_adapter import FIELD, adapter_of
from finetune_trainer.model.load import DTYPES
from finetune_trainer.model.structure import ModelStructure, read_structure
from finetune_trainer.model.tensor_names import TensorNames
from finetune_trainer.model.weight_check import check_sharded, check_weights
from finetune_trainer.model.weight_files import WeightFiles, check_complete


@dataclass(frozen=True)
class JobBase:
    """The base model of a job, as its configuration, tokenizer and headers describe it. Each property raises UserError
    where the files do not describe a model that the job can use."""

    folder: Path
    """Folder of the model's files. Of the weight files only the headers are read, so the rest of them may be holes."""
    config: RunConfig
    """The run file of the job, with the settings of the adapter that the job continues (`with_settings_of`)."""
    adapter: Path | None = None
    """Folder of the adapter that the job starts from; None without one. Of its weight file too, only the header is
    read."""
    base_name: str = ""
    """Name of the base model. The name of a base model in the adapter's configuration is compared with it. Empty: the
    names are not compared."""

    @cached_property
    def structure(self) -> ModelStructure:
        """The modules of the model on the meta device."""
        return read_structure(self.folder)

    @cached_property
    def targets(self) -> AdapterTargets:
        """The weights that get an adapter: none where the job trains all weights."""
        lora, added_tokens = self.config.lora, bool(self.config.model.added_tokens)
        if lora is not None and self.continued is not None:
            return continued_targets(self.structure, lora, self.continued)
        return choose_targets(self.structure, lora, added_tokens=added_tokens) if lora is not None else AdapterTargets()

    @cached_property
    def fitted(self) -> FittedAdapter | None:
        """The adapter that the job starts from, compared with the model. None without one."""
        given = adapter_of(self.adapter)
        if given is None:
            return None
        rows = self.rows if self._continues else self.structure.rows
        return fit_adapter(self.structure, given, rows=rows)

    @property
    def continued(self) -> FittedAdapter | None:
        """The adapter that the job continues; None where it continues none."""
        return self.fitted if self._continues else None

    @property
    def merged(self) -> FittedAdapter | None:
        """The adapter that the job merges into the model first; None where it merges none."""
        return None if self._continues else self.fitted

    @property
    def _continues(self) -> bool:
        source = self.config.model.adapter
        return source is not None and source.use == "Continue"

    @property
    def unties(self) -> bool:
        """Whether the output head must get weights of its own, because an adapter changes the input embedding or the
        head, and the two share their weights."""
        return self.structure.tied and adapts_an_embedding(self.structure, self.targets)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model, with the added tokens of the job. A tokenizer is refused if a token that ends an
        answer has no row in the embedding."""
        tokenizer = load_tokenizer(self.folder)
        check_ends(tokenizer, self.folder, self.structure.rows)
        add_tokens(tokenizer, self.config.model.added_tokens)
        return tokenizer

    @property
    def rows(self) -> int:
        """Number of rows of the input embedding of the model that the job trains, including the rows of the added
        tokens."""
        added = [int(self.tokenizer.convert_tokens_to_ids(token)) for token in self.config.model.added_tokens]
        return max([self.structure.rows, *(number + 1 for number in added)])


def check_base(base: JobBase) -> list[str]:
    """Run all checks, and return their notices. Raises UserError for the first one that fails."""
    return [notice for check in CHECKS for notice in check(base) or ()]


def _check_files(base: JobBase) -> None:
    check_complete(base.folder)


def _check_structure(base: JobBase) -> None:
    assert base.structure.model is not None


def _check_weights(base: JobBase) -> list[str]:
    return check_weights(base.structure, base.folder, DTYPES[base.config.optimization.precision])


def _check_shards(base: JobBase) -> None:
    if base.config.optimization.zero_stage == 3:
        check_sharded(base.structure, base.folder)


def _check_tokens(base: JobBase) -> None:
    assert base.tokenizer is not None


def _check_targets(base: JobBase) -> list[str]:
    lora = base.config.lora
    assert base.targets.names or lora is None
    return unquantized_notice(base.structure) if lora is not None and lora.quantization is not None else []


def _check_training(base: JobBase) -> None:
    abilities, optimization = ModelAbilities.of(base.structure.model), base.config.optimization
    packing = base.config.dataset.packing
    check_abilities(abilities, packing=packing, gradient_checkpointing=optimization.gradient_checkpointing)
    # The device is known only later, in the worker.
    kernels(optimization.attention, abilities, None, optimization.precision, packing=packing)


def _check_adapter(base: JobBase) -> list[str]:
    if base.fitted is None:
        return []
    if base.merged is not None:
        _check_mergeable(base, base.merged)
    given = base.fitted.given
    other = other_base_notice(given, base.base_name) if base.base_name else []
    return [*other, *unknown_fields_notice(given)]


def _check_mergeable(base: JobBase, fitted: FittedAdapter) -> None:
    """Raise UserError where the merged model can't be written with the files of the base model."""
    structure = base.structure
    embeddings = {f"{name}.weight" for name in (structure.input_name, structure.output_name)}
    changed = [*fitted.adapted, *fitted.replaced]
    shared = sorted(embeddings.intersection(changed))
    if structure.tied and shared:
        raise UserError(
            FIELD,
            f"can't be merged: it changes {shared[0]}, and the base model has one weight for the input embedding and"
            " the output head; name the model that the adapter was trained on as the base model",
        )
    TensorNames(structure.model, WeightFiles.of(base.folder).shapes, FIELD).check_writable(changed)


def _check_extension(base: JobBase) -> None:
    if base.config.model.added_tokens or base.unties:
        check_extendable(base.structure, WeightFiles.of(base.folder), rows=base.rows, untie=base.unties)


CHECKS: tuple[Callable[[JobBase], list[str] | None], ...] = (
    _check_files,
    _check_structure,
    _check_weights,
    _check_shards,
    _check_tokens,
    _check_training,
    _check_adapter,
    _check_targets,
    _check_extension,
)
"""The checks in the order in which they run. After a failed check no later check runs, because most checks need files
that an earlier check has found to be complete."""
